"""Stage B: a latent diffusion U-Net that draws Stage A's latent from the compressor's tiny one.

It is a decoder that invents detail: given the Semantic Compressor's 16x24x24 grid (at sampling time
Stage C's) and the text, it draws the 4x256x256 latent that Stage A decodes to 1024x1024 pixels
(Würstchen, §3.1, E.2). The compressor is trained here, too: its grid becomes what helps B most.

    x_t = sqrt(alpha_bar(t)) x_0 + sqrt(1 - alpha_bar(t)) eps        forward process
    eps_hat = f(x_t, t, sem, text)     §3.1, which prints an x_0 form, X̄_0 = f(…), but compares eps
    loss = |eps - eps_hat|^2                                         LDM training, §3.1

    x_t (B, 4, H, W) --unshuffle--> (B, c_0, H_0, W_0) --4 levels down, 4 up--> eps_hat (B, 4, H, W)
    sem (B, 16, h, w) attended to, and concatenated in every block of the levels with attention
    text (B, L, E)    attended to

Letters: B batch, C c channels, H W Stage A's grid (256x256 for 1024 px), h w the compressor's grid
(24x24), L text tokens, E width of the text encoder, cond the width that text and sem are mapped to,
H_i W_i and c_i grid and width of level i (H_0 = H / patch_size), t noise level in [0, 1].
Architecture and attribute names follow the published v2 decoder (dome272/Wuerstchen, modules.py,
DiffNeXt). Its training was never published; the training here follows the paper.

    python stage_b.py --data shards/                         paper size, for a GPU
    python stage_b.py --data shards/shapes --preset pocket   one CPU core, 1,000 steps in 8 minutes
"""

import copy
import functools
import math
from dataclasses import asdict, dataclass
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F
import torch.utils.checkpoint


# ---- Config --------------------------------------------------------------------------------------

# Sources: the paper; where it is silent the official code; else ours. departs: not as in the paper
@dataclass(frozen=True)
class Config:
    # architecture
    latent_channels: int = 4           # paper, E.1: Stage A's
    sem_channels: int = 16             # paper, E.2: the compressor's
    widths: tuple = (320, 640, 1280, 1280)   # paper, E.2
    heads: tuple = (0, 10, 20, 20)     # paper, E.2; 0: a level without attention and without sem
    blocks: tuple = (4, 4, 14, 4)      # paper, E.2
    patch_size: int = 2                # official code; departs: E.2 has a 2x2 convolution there
    text_width: int = 1024             # paper, E.2: CLIP-H
    cond_width: int = 1024             # official code: width that text and sem are mapped to
    timestep_width: int = 64           # official code
    dropout: float = 0.1               # official code
    attend_to_sem: bool = True         # paper, §3.1, E.2 (released: False, concatenation alone)
    condition: Literal["standardised", "raw"] = "standardised"   # ours: the scale of sem
    prediction: Literal["released", "v"] = "released"   # official code; the paper is silent
    sem_init: float = 0.02             # official code: std of sem's maps at init; pocket: 1
    # loss, sampling
    t_power: float = 1.0               # official code: t as drawn. See `loss`; pocket: 1.5
    guidance: float = 4.0              # paper, §4 (released: 1, that is, off); pocket: 2
    # conditions while training: shares of all samples; noise for a share of the rest
    drop_both: float = 0.05            # ours: §3.1 gives no numbers
    drop_text: float = 0.05            # ours: as Stage C's, §3.2
    drop_sem: float = 0.05             # official code (v1), there for whole batches
    noise_sem: float = 0.3             # official code (v1), there for whole batches; pocket: 0.1
    noise_sem_t: float = 0.5           # official code (v1): t ~ U(0, 0.5)
    # data
    text_encoder: str = "clip-h"       # paper, §4
    compressor_preset: Literal["paper", "released", "pocket"] = "paper"    # which trains along
    image_size: int = 512              # paper, E.2, first phase
    remember: bool = False             # encode each image and caption once and keep them in memory
    # filters by what the .json of a sample says (data.py); these values let all pass
    min_size: int = 0                  # shorter side of the original in pixels, at least
    min_aesthetic: float = 0.0         # LAION's aesthetic score, at least
    max_pwatermark: float = 1.0        # LAION's probability of a watermark, at most
    max_punsafe: float = 1.0           # LAION's probability of not being safe for work, at most
    # training
    steps: int = 457_000               # paper, E.2, first phase
    batch_size: int = 16               # ours: 16 x 32 is the 512 of E.2
    accumulate: int = 32
    lr: float = 1e-4                   # paper, E.2
    muon: bool = False                 # paper, E.2: AdamW; pocket: Muon's steps for matrices
    compressor_share: float = 1.0      # of lr, for the compressor (paper: 1); 0: it does not learn
    warmup: int = 10_000               # paper, E.2
    cooldown: int = 0                  # ours: linear decay at the end; the paper names none
    grad_clip: float = 1.0             # official code
    ema: float = 0.999                 # ours: the released code trains B without
    seed: int = 0
    workers: int = 8
    compile: bool = False
    checkpoint_activations: bool = False   # less memory, a fifth more work
    log_every: int = 100
    preview_every: int = 5000
    save_every: int = 1000


PRESETS = {
    # checkpointed: BatchNorm sees a micro-batch, which shall not be smaller. 31 GiB; 52 without
    "paper": Config(checkpoint_activations=True),
    # the second phase of E.2, by --init-from; warmup: ours, short, as it has a new optimizer
    "paper-2": Config(image_size=1024, steps=300_000, batch_size=4, warmup=500,    # 4 x 32 = 128
                      checkpoint_activations=True),
    "released": Config(attend_to_sem=False, condition="raw", guidance=1.0,
                       compressor_preset="released", checkpoint_activations=True),     # official v2
    "pocket": Config(                  # ours: the same class at a size for two CPU cores
        widths=(48, 96, 160), heads=(0, 3, 5), blocks=(1, 2, 2), text_width=128, cond_width=64,
        dropout=0.0, prediction="v", sem_init=1.0, t_power=1.5, noise_sem=0.1, guidance=2.0,
        drop_text=0.5,     # captions name the colours: less, and B takes them from the text alone
        text_encoder="pocket", compressor_preset="pocket", image_size=128, remember=True,
        accumulate=1, steps=11_000, batch_size=32, lr=4e-3, muon=True, compressor_share=1 / 6,
        warmup=100, cooldown=4000, workers=1, log_every=20, preview_every=250, save_every=100),
}


# ---- schedule: verbatim in stage_b.py and stage_c.py ---------------------------------------------

def alpha_bar(t):
    """Signal power left at noise level t: the cosine schedule (Nichol & Dhariwal, 2021), §3.2."""
    s = 0.008                                                             # official code
    ratio = torch.cos((t + s) / (1 + s) * math.pi / 2) / math.cos(s / (1 + s) * math.pi / 2)
    # official code: the sampler divides by alpha_bar and by 1 - alpha_bar, so both stay above 0
    return ratio.square().clamp(1e-4, 0.9999)


def draw_t(n, device="cpu"):
    """Draw n continuous noise levels (§3.2) as in the official code: float32 (B,) in [0.001, 1]."""
    # 1.08 puts 7.5 % of all samples at exactly t = 1, where sampling starts and all of the picture
    # is still to be decided; 0.001 keeps t away from 0, where there is no noise to predict
    return ((1 - torch.rand(n, device=device)) * 1.08 + 0.001).clamp(0.001, 1.0)


def diffuse(x_0, t, noise):
    """x_t = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) noise (§3.2). t: (B,)."""
    a_bar = alpha_bar(t).view(-1, 1, 1, 1)
    return a_bar.sqrt() * x_0 + (1 - a_bar).sqrt() * noise


def randn(shape, generator=None, device="cpu"):
    """Standard normal noise. A list of generators gives each sample its own, whatever the batch."""
    if isinstance(generator, (list, tuple)):
        return torch.stack([torch.randn(shape[1:], generator=g) for g in generator]).to(device)
    return torch.randn(shape, generator=generator, device=device)


# ---- blocks: verbatim in stage_b.py and stage_c.py -----------------------------------------------

class LayerNorm2d(nn.LayerNorm):
    """LayerNorm over the channels of (B, C, h, w), without scale and shift (official code)."""

    def __init__(self, c):
        super().__init__(c, elementwise_affine=False, eps=1e-6)

    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class GlobalResponseNorm(nn.Module):
    """(B, h, w, C): scale a channel by its norm over the grid / the mean norm of all channels."""
    # ConvNeXt V2 (Woo et al., 2023). The identity at init

    def __init__(self, c):
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1, 1, 1, c))
        self.beta = nn.Parameter(torch.zeros(1, 1, 1, c))

    def forward(self, x):
        # x.norm in parts, many times faster on a CPU; 1e-12 because sqrt has no gradient at 0
        energy = ((x * x).sum((1, 2), keepdim=True, dtype=torch.float32) + 1e-12).sqrt()
        share = energy / (energy.mean(-1, keepdim=True) + 1e-6)           # (B, 1, 1, C)
        # in bf16 where x is: with these in float32 training would keep a third more activations
        gamma, beta, share = (one.to(x.dtype) for one in (self.gamma, self.beta, share))
        return gamma * (x * share) + beta + x


class TimestepBlock(nn.Module):
    """Scale and shift each channel by the noise level (departs: §3.2 has cross-attention, too)."""

    def __init__(self, c, c_timestep):
        super().__init__()
        self.mapper = nn.Linear(c_timestep, 2 * c)

    def forward(self, x, t_embedding):
        scale, shift = self.mapper(t_embedding)[:, :, None, None].chunk(2, dim=1)
        return x * (1 + scale) + shift


def timestep_embedding(t, width):
    """(B,) in [0, 1] -> (B, width): sines and cosines of 10,000 t, frequencies 1 … 1e-4; fp32."""
    half = width // 2
    frequencies = torch.exp(-math.log(10_000) / (half - 1) * torch.arange(half, device=t.device))
    angles = t.float()[:, None] * 10_000 * frequencies                    # (B, width / 2)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class Attention(nn.Module):
    """Multi-head attention of x (B, N, C) over itself and over conditions (B, M, C)."""

    def __init__(self, c, heads, dropout):
        super().__init__()
        if heads < 1 or c % heads:
            raise ValueError(f"found {heads} heads for a width of {c}, expected a divisor of it")
        self.heads, self.dropout = heads, dropout
        self.to_q, self.to_k, self.to_v = nn.Linear(c, c), nn.Linear(c, c), nn.Linear(c, c)
        self.to_out = nn.ModuleList([nn.Linear(c, c)])                    # published name: to_out.0

    def keys_values(self, tokens):              # (B, M, C) -> keys, values (B, heads, M, C / heads)
        return [layer(tokens).unflatten(-1, (self.heads, -1)).transpose(1, 2)
                for layer in (self.to_k, self.to_v)]

    def forward(self, x, keys, values):         # (B, N, C), twice (B, heads, M, C / heads)
        q = self.to_q(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, heads, N, C / heads)
        k, v = (torch.cat(pair, 2) for pair in zip(self.keys_values(x), (keys, values)))  # N + M
        dropout = self.dropout if self.training else 0.0    # of the weights (diffusers: output)
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)    # (B, heads, N, C / heads)
        return self.to_out[0](y.transpose(1, 2).flatten(2))               # (B, N, C)


# ---- blocks: Stage B alone -----------------------------------------------------------------------

class ResBlock(nn.Module):
    """ConvNeXt block with GlobalResponseNorm. Unlike Stage C's it takes skips: U-Net's, sem."""

    def __init__(self, c, c_skip, dropout):
        super().__init__()
        self.depthwise = nn.Conv2d(c, c, 3, padding=1, groups=c)
        self.norm = LayerNorm2d(c)
        self.channelwise = nn.Sequential(
            nn.Linear(c + c_skip, 4 * c), nn.GELU(), GlobalResponseNorm(4 * c), nn.Dropout(dropout),
            nn.Linear(4 * c, c))

    def forward(self, x, skips=()):                     # (B, c, h, w), [(B, …, h, w)]
        y = self.norm(self.depthwise(x))                # the skips are not normalised (E.2)
        y = torch.cat([y, *skips], dim=1) if skips else y                 # (B, c + c_skip, h, w)
        return x + self.channelwise(y.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class AttnBlock(nn.Module):
    """Each position attends to all positions of its level, the text and the compressor's latent."""
    # departs: one joint attention (official code), where the paper has cross-attention. sem is
    # projected "to the same dimension in each block" (§3.1); in the released model it is not there

    def __init__(self, c, heads, cond_width, dropout, sem_channels):
        super().__init__()
        self.norm = LayerNorm2d(c)
        self.attention = Attention(c, heads, dropout)
        self.kv_mapper = nn.Sequential(nn.SiLU(), nn.Linear(cond_width, c))
        self.sem_mapper = nn.Linear(sem_channels, c) if sem_channels else None

    def precompute(self, sem, text):                    # (B, 16, h, w), (B, L, cond)
        tokens = self.kv_mapper(text)                                     # (B, L, c)
        if self.sem_mapper is not None:                                   # -> (B, L + h*w, c)
            tokens = torch.cat([tokens, self.sem_mapper(sem.flatten(2).transpose(1, 2))], dim=1)
        return self.attention.keys_values(tokens)       # twice (B, heads, L + h*w, c / heads)

    def forward(self, x, sem, text, precomputed=None):  # (B, c, H, W)
        keys, values = precomputed or self.precompute(sem, text)
        y = self.norm(x).flatten(2).transpose(1, 2)                       # (B, H*W, c)
        return x + self.attention(y, keys, values).transpose(1, 2).unflatten(2, x.shape[-2:])


# ---- model ---------------------------------------------------------------------------------------

class StageB(nn.Module):
    """x_t (B, 4, H, W), t (B,), sem (B, 16, h, w), text (B, L, E) -> eps_hat (B, 4, H, W)."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        c, heads, cond, patch = config.widths, config.heads, config.cond_width, config.patch_size
        if not len(c) == len(heads) == len(config.blocks):
            raise ValueError(f"found widths {c}: heads and blocks need one number for each, too")
        sem, levels = config.sem_channels, range(len(c))
        self.clip_mapper = nn.Linear(config.text_width, cond)             # text of CLIP -> tokens
        self.seq_norm = nn.LayerNorm(cond, elementwise_affine=False, eps=1e-6)
        self.effnet_mappers = nn.ModuleList([             # sem ("effnet") -> cond: down, then up
            nn.Conv2d(sem, cond, 1) if heads[i] else None for i in (*levels, *reversed(levels))])
        self.embedding = nn.Sequential(
            nn.PixelUnshuffle(patch), nn.Conv2d(config.latent_channels * patch ** 2, c[0], 1),
            LayerNorm2d(c[0]))

        def level(i, down):
            """Level i on the way down or up, as one flat list (published names)."""
            layers = [] if i == 0 or not down else [nn.Sequential(
                LayerNorm2d(c[i - 1]), nn.Conv2d(c[i - 1], c[i], 2, stride=2))]
            for j in range(config.blocks[i]):
                skip = 0 if down or i == levels[-1] or j > 0 else c[i]    # from the way down
                layers += [ResBlock(c[i], skip + (cond if heads[i] else 0), config.dropout),
                           TimestepBlock(c[i], config.timestep_width)]
                if heads[i]:
                    layers.append(AttnBlock(c[i], heads[i], cond, config.dropout,
                                            sem if config.attend_to_sem else 0))
            if not down and i > 0:
                layers.append(nn.Sequential(
                    LayerNorm2d(c[i]), nn.ConvTranspose2d(c[i], c[i - 1], 2, stride=2)))
            return nn.ModuleList(layers)

        self.down_blocks = nn.ModuleList([level(i, down=True) for i in levels])
        self.up_blocks = nn.ModuleList([level(i, down=False) for i in reversed(levels)])
        out = config.latent_channels * (2 if config.prediction == "released" else 1)
        self.clf = nn.Sequential(                                         # the output head
            LayerNorm2d(c[0]), nn.Conv2d(c[0], out * patch ** 2, 1), nn.PixelShuffle(patch))
        self.init_weights()

    def init_weights(self):
        """The official code's initialisation (the paper gives none)."""
        for layer in self.modules():
            if isinstance(layer, (nn.Linear, nn.Conv2d)):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)
        for block in self.modules():
            if isinstance(block, ResBlock):        # all residuals add up to the variance of one
                block.channelwise[-1].weight.data *= (1 / sum(self.config.blocks)) ** 0.5
            if isinstance(block, TimestepBlock):
                nn.init.zeros_(block.mapper.weight)            # scale 1, shift 0: the identity
            if isinstance(block, AttnBlock):       # there q, k, v are one (3c, c) matrix
                for layer in (block.attention.to_q, block.attention.to_k, block.attention.to_v):
                    nn.init.xavier_uniform_(layer.weight, gain=0.5 ** 0.5)
        nn.init.normal_(self.clip_mapper.weight, std=0.02)
        for layer in filter(None, self.effnet_mappers):        # pocket: 1, so sem is heard early
            nn.init.normal_(layer.weight, std=self.config.sem_init)
        nn.init.xavier_uniform_(self.embedding[1].weight, gain=0.02)
        nn.init.zeros_(self.clf[1].weight)

    def precompute(self, sem, text):
        """-> keys, values of each attention block: made once for all sampling steps."""
        text = self.seq_norm(self.clip_mapper(text))                      # (B, L, cond)
        return [block.precompute(sem, text) for block in self.modules()
                if isinstance(block, AttnBlock)]

    def forward(self, x_t, t, sem, text, precomputed=None):
        levels, patch, (H, W) = range(len(self.down_blocks)), self.config.patch_size, x_t.shape[2:]
        channels = (self.config.latent_channels, self.config.sem_channels)
        divisor = patch * 2 ** levels[-1]
        if H % divisor or W % divisor or (x_t.shape[1], sem.shape[1]) != channels:
            raise ValueError(f"Stage B found latents of {H}x{W}, {x_t.shape[1]} and {sem.shape[1]} "
                             f"channels, expected multiples of {divisor}, channels {channels}")
        t_embedding = timestep_embedding(t, self.config.timestep_width)   # (B, 64)
        text = self.seq_norm(self.clip_mapper(text)) if precomputed is None else None
        sem = sem.float().contiguous()     # torch resizes channels-last to one column wrongly
        precomputed = iter(precomputed or ())
        recompute = self.config.checkpoint_activations and self.training

        def run_level(i, x, layers, mapper, skip=()):
            """Level i. Each ResBlock takes the resized sem, the first one the U-Net's skip, too."""
            always, size = [], (H // patch // 2 ** i, W // patch // 2 ** i)
            if mapper is not None:                                        # official code's options
                sem_i = F.interpolate(sem, size, mode="bicubic", antialias=True, align_corners=True)
                sem_i = sem_i.contiguous(memory_format=torch.channels_last)
                always = [mapper(sem_i)]                                  # (B, cond, H_i, W_i)
            skips = [*skip, *always]
            for layer in layers:
                condition = (t_embedding,) if isinstance(layer, TimestepBlock) else ()
                if isinstance(layer, ResBlock):
                    condition, skips = (skips,), always
                elif isinstance(layer, AttnBlock):
                    condition = (sem, text, next(precomputed, None))
                x = (torch.utils.checkpoint.checkpoint(layer, x, *condition, use_reentrant=False)
                     if recompute else layer(x, *condition))
            return x

        x = self.embedding(x_t)                                           # (B, c_0, H_0, W_0)
        x = x.contiguous(memory_format=torch.channels_last)     # the blocks' (B, h, w, c): no copy
        mappers, skips = iter(self.effnet_mappers), []
        for i, layers in zip(levels, self.down_blocks):
            x = run_level(i, x, layers, next(mappers))
            skips.append(x)
        for i, layers in zip(reversed(levels), self.up_blocks):          # the deepest takes no skip
            x = run_level(i, x, layers, next(mappers), [skips[i]] if i < levels[-1] else ())
        with torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False):
            out = self.clf(x.float())                                     # float32, as Stage C's
        if self.config.prediction == "v":
            # departs (pocket): v = sqrt(a_bar) eps - sqrt(1 - a_bar) x_0 (Salimans & Ho, 2022) has
            # the same size at every t. At init v_hat = 0, that is, x_0_hat = sqrt(a_bar) x_t.
            a_bar = alpha_bar(t)[:, None, None, None]
            return (1 - a_bar).sqrt() * x_t + a_bar.sqrt() * out          # (B, 4, H, W)
        # Official head (the paper is silent): eps_hat = (x_t - A) / B. A is the signal part, B the
        # noise's size sqrt(1 - alpha_bar), in (.001, .999). At init A = 0, B = .5: eps_hat = 2 x_t.
        a, b = out.chunk(2, dim=1)                                        # (B, 4, H, W) each
        return (x_t - a) / (b.sigmoid() * (1 - 2e-3) + 1e-3)


# ---- loss ----------------------------------------------------------------------------------------

def drop_and_noise(sem, text, null_text, config, scale=None):
    """Make the conditions imperfect, each sample by itself, as sampling will find them (§3.1).

    Shares of the samples (Config) lose text, sem, or both (the unconditional branch of guidance). A
    share of the rest gets sem noised to a level t ~ U(0, 0.5), as Stage C's latents are imperfect;
    the model is not told the level.
    sem: (B, 16, h, w), raw. null_text: (1, L, E). scale: (mean, std) of sem; None: the batch's, as
    those of a compressor that trains move. -> sem on the scale B reads (config.condition), text.
    """
    mean, std = scale or (sem.detach().mean(), sem.detach().std())
    sem = (sem - mean) / std                            # unit variance: the noise has a known size
    u, v = torch.rand(2, len(sem), 1, 1, device=sem.device)
    no_text = u < config.drop_text + config.drop_both   # u: [ text | both | sem | nothing dropped ]
    dropped = u < config.drop_text + config.drop_both + config.drop_sem
    no_sem, noised = dropped & (config.drop_text <= u), ~dropped & (v < config.noise_sem)
    t = torch.rand(len(sem), device=sem.device) * config.noise_sem_t
    sem = torch.where(noised[..., None], diffuse(sem, t, torch.randn_like(sem)), sem)
    if config.condition == "raw":
        sem = sem * std + mean
    return torch.where(no_sem[..., None], 0.0, sem), torch.where(no_text, null_text, text)


def loss(model, x_0, sem, text, t=None, noise=None):
    """Error of the predicted noise (LDM, §3.1) -> scalar, t (B,), unweighted error of each (B,).

    x_0: (B, 4, H, W), Stage A's standardised latents. sem: (B, 16, h, w). text: (B, L, E). t (B,)
    and noise (as x_0) are drawn if None.
    """
    if t is None:
        # departs (pocket): drawn nearer to t = 1 (t_power 1.5: half of all t are above .69). Flat
        # drawings can be denoised from x_t alone except there: there the conditions are learned.
        t = 1 - (1 - draw_t(len(x_0), x_0.device)) ** model.config.t_power
    noise = torch.randn_like(x_0) if noise is None else noise
    eps_hat = model(diffuse(x_0, t, noise), t, sem, text)                 # (B, 4, H, W)
    error = (eps_hat - noise).square().mean((1, 2, 3))                    # (B,)
    if model.config.prediction == "v":
        # departs (pocket): the error of v, 1 / alpha_bar times the one of eps. Near t = 1 an error
        # in eps barely shows whether x_0 is right
        return (error / alpha_bar(t)).mean(), t, error.detach()
    return error.mean(), t, error.detach()


# ---- sampler -------------------------------------------------------------------------------------

@torch.no_grad()
def ddpm_sample(model, shape, sem, text, null_sem, null_text, steps=12, guidance=4.0, x=None,
                generator=None, history=None):
    """Draw standardised Stage A latents: DDPM (Ho et al., 2020), §3.3, on evenly spaced t.

    shape: (B, 4, H, W). sem: (B, 16, h, w); null_sem: zeros like it. text: (B, L, E); null_text:
    (1, L, E) or (B, L, E). steps: 12 (§4). generator: one, or a list of one per sample. history: a
    list that receives x after each step. guidance: classifier-free guidance as in Stage C, 4 (§4);
    null has both conditions dropped, as some samples in training.
    x: the start. The paper takes random codebook tokens (StageA.random_tokens): they have the
    values of latents and no more structure than noise. None: noise, as in the released code.
    """
    device = next(model.parameters()).device
    x = randn(shape, generator, device) if x is None else x
    if guidance != 1:                                   # one batch: conditional, unconditional
        sem = torch.cat([sem, null_sem.expand_as(sem)])
        text = torch.cat([text, null_text.expand_as(text)])
    precomputed = model.precompute(sem, text)
    levels = torch.linspace(1, 0, steps + 1, device=device)
    for t, t_next in zip(levels, levels[1:]):
        both = x if guidance == 1 else torch.cat([x, x])
        eps_hat = model(both, t.expand(len(both)), sem, text, precomputed)
        if guidance != 1:
            conditional, null = eps_hat.chunk(2)
            eps_hat = null + guidance * (conditional - null)
        a_bar, a_bar_next = alpha_bar(t), alpha_bar(t_next)
        a = a_bar / a_bar_next                                            # alpha of this step
        x = (x - (1 - a) / (1 - a_bar).sqrt() * eps_hat) / a.sqrt()       # the mean, §3.3
        if t_next > 0:
            sigma = ((1 - a) * (1 - a_bar_next) / (1 - a_bar)).sqrt()
            x = x + sigma * randn(shape, generator, device)
        if history is not None:
            history.append(x)
    return x


# ---- training ------------------------------------------------------------------------------------

import data
import semantic_compressor
import stage_a
from plumbing import checkpoint, pictures, training
from plumbing.cli import UsageError
from plumbing.text import known_text_encoder, text_encoder


def train(config, source, out, path_a, clip=None, init_from=None):
    """Train Stage B and the compressor on captioned images. Goes on by itself if `out` holds a run.

    path_a: Stage A. clip: CLIP's weights; None: the hub's. init_from: a Stage B to begin with.
    """
    device = training.setup(config.seed)
    vqgan = stage_a.load(path_a, device)                    # frozen: its latents are what B draws
    encoder = text_encoder(config.text_encoder, clip, device, config.text_width)    # frozen
    null_text = encoder([""])                                             # (1, L, E)
    dataset = data.CaptionedImages(source, resize=config.image_size, crop=config.image_size,
                                   seed=config.seed, center=config.remember,
                                   filters=data.filters(config))
    # images to preview and to measure BatchNorm on: 64 of 1024 px, at most 256 of smaller ones
    preview_batch = data.preview_batch(dataset, min(256, 2 ** 26 // config.image_size ** 2), device)
    calibration = semantic_compressor.resize(preview_batch["images"])

    run = training.Run("B", config, out, device, init_from, samples=len(dataset),
                       stage_a=checkpoint.checksum(vqgan.state_dict()),
                       text_encoder=encoder.identity)
    trained = config.compressor_share > 0                  # else it stays as --init-from gave it
    compressor = semantic_compressor.new(config.compressor_preset, init_from if run.new else
                                         run.out / "checkpoint.pt", trained, device)
    model = StageB(config).to(device).train()
    if init_from and run.new:                                             # weights, nothing else
        run.begin(model, load(init_from), init_from)
    ema, compressor_ema = (copy.deepcopy(net).eval().requires_grad_(False)
                           for net in (model, compressor))
    compressor = training.synchronised(compressor)      # not its average: one process measures it
    groups = [dict(params=[*model.parameters()], share=1.0),              # share of lr
              dict(params=[*compressor.parameters()], share=config.compressor_share)]
    parameters = groups[0]["params"] + groups[1]["params"]
    optimizer = training.optimizer(config, groups, betas=(0.9, 0.95))     # official code: AdamW

    @torch.no_grad()
    def targets(batch):
        """-> x_0 (B, 4, H, W), text (B, L, E), images for the compressor; if frozen, its sem."""
        if "remembered" in batch:
            return [part.to(device, non_blocking=True) for part in batch["remembered"]]
        images = batch["images"].to(device)
        small = semantic_compressor.resize(images)                        # (B, 3, 3H/4, 3W/4)
        return (vqgan.standardise(vqgan.encode(images).float()), encoder(batch["captions"]),
                small if trained else compressor_ema(small))

    batches = data.Stream(dataset, config, device)
    run.restore(model=model, ema=ema, compressor=compressor, compressor_ema=compressor_ema,
                optimizer=optimizer, batches=batches)
    if config.remember:
        batches.dataset = data.remember(dataset, targets, label="Stage A latents and text tokens")
    if config.compile:
        model.compile(dynamic=False)       # each size by itself; in place, so names stay clean
        if training.world() == 1:                                     # synchronised norms: eagerly
            compressor.compile(dynamic=False)

    # While the learning rate decays (pocket), the compressor's BatchNorm keeps its statistics:
    # those of small batches vary, and Stage B gets used to the latents that sampling will have.
    freeze = config.steps - training.cooldown(config)
    for step in run.steps():
        optimizer.zero_grad(set_to_none=True)
        if trained and step == freeze:
            semantic_compressor.measure_batchnorm(compressor, calibration)
        compressor.train(trained and step < freeze)
        for _ in range(config.accumulate):
            with training.autocast(device):
                x_0, text, images = targets(next(batches))                # batch, targets
                # loss
                sem = (compressor(images) if trained else images).float()  # (B, 16, h, w), raw
                sem, text = drop_and_noise(sem, text, null_text, config,
                                           None if trained else compressor.scale)
                value, t, error = loss(model, x_0, sem, text)
            run.note(t, error)
            (value / config.accumulate).backward()
        # clip, lr, step
        training.average_gradients(parameters)
        grad = nn.utils.clip_grad_norm_(parameters, config.grad_clip)
        lr = training.learning_rate(step, config)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["share"]
        if run.finite(grad):
            optimizer.step()
            training.ema_update(ema, model, step, config.ema)             # EMA
            training.ema_update(compressor_ema, compressor, step, config.ema)
        # log, preview, checkpoint
        run.log(loss=value, grad=grad, lr=lr)
        if trained and (run.due("preview") or run.due("save")):           # with its latents' scale
            compressor_ema.config = semantic_compressor.measure(compressor_ema, calibration,
                                                                step >= freeze)
        if run.due("preview"):
            preview(ema, compressor_ema, vqgan, encoder, preview_batch, run.preview)
        if run.due("save"):
            run.save(compressor_config=asdict(compressor_ema.config))


@torch.no_grad()
def preview(model, compressor, vqgan, encoder, batch, path):
    """Top row: images. Then: through A alone; through compressor, B (12 steps, w = 1) and A."""
    images, captions = batch["images"][:8], batch["captions"][:8]
    with training.autocast(images.device):
        latents = compressor.standardise(compressor(semantic_compressor.resize(images)).float())
        drawn = draw_images(Decoder(vqgan, model, compressor.scale, encoder, None), latents,
                            captions, range(len(images)), guidance=1)
        rows = [images, vqgan.decode(vqgan.encode(images)), drawn]
    pictures.grid(torch.cat(rows).float().cpu(), columns=len(images)).save(path)


def load(path, device="cpu"):
    """A trained StageB (its EMA), in eval mode, from a checkpoint of ours or a published one."""
    return checkpoint.rebuild(path, "B", StageB, PRESETS["released"], device)


@dataclass
class Decoder:
    """Stages A and B, trained on each other, and what B reads; all in eval mode."""
    a: stage_a.StageA
    b: StageB
    scale: tuple                        # (mean, std) of the compressor's raw latents
    text_b: torch.nn.Module             # the text encoder
    compressor_file: str                # None: not among the weights

    @functools.cached_property
    def compressor(self):
        """The Semantic Compressor, or None. Read when it is used: drawing does without it."""
        return self.compressor_file and semantic_compressor.load(
            self.compressor_file, next(self.b.parameters()).device)


def load_decoder(a, b, compressor=None, clip=None, device="cpu"):
    """Load checkpoints a and b, and the text encoder that b names (a published one: CLIP-H).

    compressor: None where it is in b. clip: weights of the text encoder. Raises UsageError: a
    missing file, one of another stage, or stages that were not trained on each other.
    """
    known = checkpoint.load_checkpoint(b, "B")
    vqgan, model, own = stage_a.load(a, device), load(b, device), known.get("compressor_ema")
    file = compressor or (b if own else None)
    checksum, about = checkpoint.compressor(file)
    if own and checksum != checkpoint.compressor(b)[0]:
        raise UsageError(f"{b}: trained with another compressor than the one in {compressor}")
    if known.get("stage_a") not in (None, checkpoint.checksum(vqgan.state_dict())):
        raise UsageError(f"{b}: trained on the latents of another Stage A than {a}; give the one "
                         "it was trained with")
    scale = asdict(semantic_compressor.PRESETS["released"]) | about
    return Decoder(vqgan, model, (scale["latent_mean"], scale["latent_std"]), known_text_encoder(
        b, known, "clip-h", clip, device, model.config.text_width), file)


def generators(seeds):
    """One stream of random numbers per picture, always on the CPU: the same on any machine."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@torch.no_grad()
def draw_images(decoder, latents, prompts, seeds, steps=12, guidance=None, start=None, negative="",
                history=None):
    """Stages B and A: standardised compressor latents (B, 16, h, w) -> (B, 3, 128h/3, 128w/3).

    guidance: None is Stage B's own (its Config). start: "tokens" (§3.3); "gaussian" for the
    released kind; None is that default. Images are about [0, 1], not clamped.
    """
    model, (mean, std) = decoder.b, decoder.scale
    raw = model.config.condition == "raw"
    sem = latents * std + mean if raw else latents
    shape = (len(sem), model.config.latent_channels, *(n * 32 // 3 for n in sem.shape[2:]))
    guidance = model.config.guidance if guidance is None else guidance
    noise = generators((seed + 2 ** 31) % 2 ** 32 for seed in seeds)      # not the noise of Stage C
    start = ("gaussian" if raw else "tokens") if start is None else start
    x = decoder.a.random_tokens(shape, noise) if start == "tokens" else None
    drawn = ddpm_sample(model, shape, sem, decoder.text_b(prompts), torch.zeros_like(sem),
                        decoder.text_b([negative]), steps, guidance, x, noise, history)
    return decoder.a.decode(decoder.a.unstandardise(drawn))


if __name__ == "__main__":
    from pocket import shapes
    training.command("b", train, Config, PRESETS, __doc__, shapes.source)
