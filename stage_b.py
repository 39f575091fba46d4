"""Stage B: a latent diffusion U-Net that draws Stage A's latent from the compressor's tiny one.

It is a decoder that invents detail: given the Semantic Compressor's 16x24x24 grid (at sampling time
Stage C's) and the text, it draws the 4x256x256 latent that Stage A decodes to 1024x1024 pixels
(Würstchen, §3.1 and Appendix E.2). The compressor is trained here, jointly: its grid becomes
whatever helps Stage B most.

    x_t = sqrt(alpha_bar(t)) x_0 + sqrt(1 - alpha_bar(t)) eps        forward process
    eps_hat = f(x_t, t, sem, text)                                   §3.1
    loss = |eps - eps_hat|^2                                         LDM training, §3.1

    x_t (B, 4, H, W) --unshuffle--> (B, c_0, H_0, W_0) --4 levels down, 4 up--> eps_hat (B, 4, H, W)
    sem (B, 16, h, w) concatenated in every block of the levels with attention, and attended to
    text (B, L, E)    attended to

Letters: B batch, C c channels, H W Stage A's grid (256x256 for a 1024-px image), h w the
compressor's grid (24x24), L text tokens, E width of the text encoder, cond the width that text and
sem are mapped to, H_i W_i and c_i grid (H_0 is H / patch_size) and width of level i, t noise level
in [0, 1].
Architecture and attribute names follow the published v2 decoder (dome272/Wuerstchen, modules.py,
DiffNeXt). Its training was never published; the training here follows the paper.

    python stage_b.py --data shards/                         paper size, for a GPU
    python stage_b.py --data shards/shapes --preset pocket   two CPU cores, 1,000 steps in 6 minutes

A healthy pocket run (with a compressor from pocket/teach.py, --compressor-share 0) prints: error
by noise level near [t<.25 .9 | .5 .5 | .75 .15 | 1 .008] after 100 steps and falling at every
level. In the previews backgrounds and places are right by step 1,000, colours by 4,000. Shapes take
longest: large ones come out between 4,000 and 11,000 steps, small ones are still round then.
"""

import copy
import itertools
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F
import torch.utils.checkpoint

from plumbing.cli import UsageError


# ---- Config --------------------------------------------------------------------------------------

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
    # loss
    weight_cap: float = 0.0            # paper: unweighted. See `loss`; pocket: 1e4
    weight_floor: float = 0.0          # ours, with weight_cap alone; pocket: 0.5
    t_power: float = 1.0               # official code: t as drawn. See `loss`; pocket: 1.5
    # sampling
    guidance: float = 4.0              # paper, §4 (released: 1, that is, off); pocket: 2
    # conditions while training: shares of all samples; noise for a share of the rest
    drop_both: float = 0.05            # ours: §3.1 gives no numbers; pocket: 0.02
    drop_text: float = 0.05            # ours: as Stage C's, §3.2; pocket: 0.5
    drop_sem: float = 0.05             # official code (v1), there for whole batches; pocket: 0.02
    noise_sem: float = 0.3             # official code (v1), there for whole batches; pocket: 0.1
    noise_sem_t: float = 0.5           # official code (v1): t ~ U(0, 0.5)
    # data
    text_encoder: str = "clip-h"       # paper, §4
    compressor: str = "paper"          # which of semantic_compressor.PRESETS is trained along
    image_size: int = 512              # paper, E.2, first phase
    remember: bool = False             # encode each image and caption once and keep them in memory
    min_size: int = 0                  # filters by the .json of each sample (data.py): these four
    min_aesthetic: float = 0.0         # values let all pass; README: the released scripts'
    max_pwatermark: float = 1.0
    max_punsafe: float = 1.0
    # training
    steps: int = 457_000               # paper, E.2, first phase
    batch_size: int = 16               # ours: 16 x 32 is the 512 of E.2; what fits: unmeasured
    accumulate: int = 32
    lr: float = 1e-4                   # paper, E.2
    compressor_share: float = 1.0      # of lr, for the compressor. Paper: all of it; pocket: 1/3.
                                       # 0: it stays as --init-from gave it
    warmup: int = 10_000               # paper, E.2
    cooldown: int = 0                  # ours: linear decay at the end; the paper names none
    grad_clip: float = 1.0             # official code
    ema: float = 0.999                 # ours: the released code trains B without
    seed: int = 0
    workers: int = 8
    compile: bool = False
    checkpoint_activations: bool = False   # less memory, a third more work
    log_every: int = 100
    preview_every: int = 5000
    save_every: int = 1000


PRESETS = {
    "paper": Config(),
    # The second phase of E.2, from the checkpoint of the first (--init-from). Warm-up: ours, short,
    # because it begins with a new optimizer.
    "paper-2": Config(image_size=1024, steps=300_000, batch_size=4, warmup=500),   # 4 x 32 = 128
    "released": Config(attend_to_sem=False, condition="raw", guidance=1.0,
                       compressor="released"),                                         # official v2
    "pocket": Config(                  # ours: the same class at a size for two CPU cores
        widths=(48, 96, 160), heads=(0, 3, 5), blocks=(1, 2, 2), text_width=128, cond_width=64,
        dropout=0.0, prediction="v", weight_cap=1e4, weight_floor=0.5, t_power=1.5, guidance=2.0,
        # half of all samples see no text: captions name the colours, and a compressor that can
        # leave them to the text does not learn to say which object has which. Fewer lose the
        # latent or get it noised, because there is time for few steps
        drop_text=0.5, drop_both=0.02, drop_sem=0.02, noise_sem=0.1,
        text_encoder="pocket", compressor="pocket", image_size=128, remember=True, accumulate=1,
        steps=11_000, batch_size=32, lr=2e-3, compressor_share=1 / 3, warmup=100,
        cooldown=4000, workers=1, log_every=20, preview_every=250, save_every=100),
}


# ---- schedule: verbatim in stage_b.py and stage_c.py ---------------------------------------------

def alpha_bar(t):
    """Signal power left at noise level t: the cosine schedule (Nichol & Dhariwal, 2021), §3.2.

    t: float tensor in [0, 1] of any shape. Clamped to [1e-4, 0.9999] (official code), so that
    neither alpha_bar nor 1 - alpha_bar, by which the sampler divides, is ever 0.
    """
    s = 0.008                                                             # official code
    ratio = torch.cos((t + s) / (1 + s) * math.pi / 2) / math.cos(s / (1 + s) * math.pi / 2)
    return ratio.square().clamp(1e-4, 0.9999)


def draw_t(n, device="cpu"):
    """Draw n continuous noise levels (§3.2) as the official code does: (B,) float32 in [0.001, 1].

    1.08 stretches U(0, 1) past the end and the clamp folds the surplus back: 7.5 % of all samples
    are at exactly t = 1, where sampling starts and all of the picture is still to be decided.
    0.001 keeps t away from 0, where there is no noise to predict.
    """
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
    """Channels compete by their energy over the whole grid (ConvNeXt V2, Woo et al., 2023).

    (B, h, w, C), channels last. The identity at init.
    """

    def __init__(self, c):
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1, 1, 1, c))
        self.beta = nn.Parameter(torch.zeros(1, 1, 1, c))

    def forward(self, x):
        # x.norm in parts, many times faster on a CPU; 1e-12 because sqrt has no gradient at 0
        energy = (x.square().sum((1, 2), keepdim=True) + 1e-12).sqrt()    # (B, 1, 1, C)
        share = energy / (energy.mean(-1, keepdim=True) + 1e-6)
        return self.gamma * (x * share) + self.beta + x


class TimestepBlock(nn.Module):
    """Scale and shift every channel by the noise level. The identity at init.

    departs: as in the official code; §3.2 mentions cross-attention for the time, too.
    """

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
    """Multi-head attention of x (B, N, C) over itself and over conditions (B, M, C).

    Keys and values are made by `read`, those of the conditions apart from x's own: while sampling
    they are the same at every step and made once.
    """

    def __init__(self, c, heads, dropout):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.to_q, self.to_k, self.to_v = nn.Linear(c, c), nn.Linear(c, c), nn.Linear(c, c)
        self.to_out = nn.ModuleList([nn.Linear(c, c)])                    # published name: to_out.0

    def read(self, tokens):                     # (B, M, C) -> keys, values (B, heads, M, C / heads)
        return [layer(tokens).unflatten(-1, (self.heads, -1)).transpose(1, 2)
                for layer in (self.to_k, self.to_v)]

    def forward(self, x, keys, values):         # (B, N, C), twice (B, heads, M, C / heads)
        q = self.to_q(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, heads, N, C / heads)
        own_keys, own_values = self.read(x)
        k = torch.cat([own_keys, keys], dim=2)                            # (B, heads, N + M, …)
        v = torch.cat([own_values, values], dim=2)
        # dropout on the attention weights, as in the official code (diffusers drops the output)
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)    # (B, heads, N, C / heads)
        return self.to_out[0](y.transpose(1, 2).flatten(2))               # (B, N, C)


# ---- blocks: Stage B alone -----------------------------------------------------------------------

class ResBlock(nn.Module):
    """ConvNeXt block with GlobalResponseNorm. Unlike Stage C's it takes a skip input.

    The skip (U-Net features and/or compressor latents) is concatenated after the norm, before the
    channelwise part (E.2), so it is not normalised.
    """

    def __init__(self, c, c_skip, dropout):
        super().__init__()
        self.depthwise = nn.Conv2d(c, c, 3, padding=1, groups=c)
        self.norm = LayerNorm2d(c)
        self.channelwise = nn.Sequential(
            nn.Linear(c + c_skip, 4 * c), nn.GELU(), GlobalResponseNorm(4 * c), nn.Dropout(dropout),
            nn.Linear(4 * c, c))

    def forward(self, x, skip=None):                    # (B, c, h, w), (B, c_skip, h, w)
        y = self.norm(self.depthwise(x))
        y = y if skip is None else torch.cat([y, skip], dim=1)            # (B, c + c_skip, h, w)
        return x + self.channelwise(y.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class AttnBlock(nn.Module):
    """Each position attends to all positions of its level, the text and the compressor's latents.

    departs: one joint attention (official code), where the paper has cross-attention. Unlike in
    Stage C, the flattened compressor latents are projected "to the same dimension in each block"
    and concatenated to the keys (§3.1); the released model has no such projection (sem_channels =
    0 here).
    """

    def __init__(self, c, heads, cond_width, sem_channels, dropout):
        super().__init__()
        self.norm = LayerNorm2d(c)
        self.attention = Attention(c, heads, dropout)
        self.kv_mapper = nn.Sequential(nn.SiLU(), nn.Linear(cond_width, c))
        self.sem_mapper = nn.Linear(sem_channels, c) if sem_channels else None

    def read(self, sem, text):                          # (B, h*w, 16), (B, L, cond)
        tokens = self.kv_mapper(text)
        if self.sem_mapper is not None:
            tokens = torch.cat([tokens, self.sem_mapper(sem)], dim=1)     # (B, L + h*w, c)
        return self.attention.read(tokens)      # keys, values (B, heads, L + h*w, c / heads)

    def forward(self, x, sem, text, read=None):         # (B, c, H, W), what `read` made before
        keys, values = read or self.read(sem, text)
        y = self.norm(x).flatten(2).transpose(1, 2)                       # (B, H*W, c)
        return x + self.attention(y, keys, values).transpose(1, 2).unflatten(2, x.shape[-2:])


# ---- model ---------------------------------------------------------------------------------------

class StageB(nn.Module):
    """The decoder: x_t (B, 4, H, W), t (B,), sem (B, 16, h, w), text (B, L, E) -> eps_hat like x_t.

    H and W must be multiples of patch_size * 2^(levels - 1): 16 at paper size.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        widths, heads, blocks = config.widths, config.heads, config.blocks
        levels, patch = len(widths), config.patch_size ** 2
        cond, sem = config.cond_width, config.sem_channels

        self.clip_mapper = nn.Linear(config.text_width, cond)             # text of CLIP -> tokens
        self.seq_norm = nn.LayerNorm(cond, elementwise_affine=False, eps=1e-6)
        # compressor ("effnet") latents -> cond_width: one map per level on the way down, then up
        self.effnet_mappers = nn.ModuleList([
            nn.Conv2d(sem, cond, 1) if heads[i] else None
            for i in [*range(levels), *reversed(range(levels))]])
        self.embedding = nn.Sequential(
            nn.PixelUnshuffle(config.patch_size),
            nn.Conv2d(config.latent_channels * patch, widths[0], 1),
            LayerNorm2d(widths[0]))

        def stage(i, first_skip):
            """(ResBlock, TimestepBlock[, AttnBlock]) x blocks[i] of level i, as one flat list."""
            c, layers = widths[i], []
            for j in range(blocks[i]):
                skip = (cond if heads[i] else 0) + (first_skip if j == 0 else 0)
                layers += [ResBlock(c, skip, config.dropout),
                           TimestepBlock(c, config.timestep_width)]
                if heads[i]:
                    layers.append(AttnBlock(c, heads[i], cond, sem if config.attend_to_sem else 0,
                                            config.dropout))
            return layers

        self.down_blocks, self.up_blocks = nn.ModuleList(), nn.ModuleList()
        for i in range(levels):
            down = [] if i == 0 else [nn.Sequential(
                LayerNorm2d(widths[i - 1]), nn.Conv2d(widths[i - 1], widths[i], 2, stride=2))]
            self.down_blocks.append(nn.ModuleList(down + stage(i, 0)))
        for i in reversed(range(levels)):
            up = [] if i == 0 else [nn.Sequential(
                LayerNorm2d(widths[i]), nn.ConvTranspose2d(widths[i], widths[i - 1], 2, stride=2))]
            # the U-Net skip enters the first block of each level but the deepest
            self.up_blocks.append(nn.ModuleList(stage(i, widths[i] if i < levels - 1 else 0) + up))
        out = config.latent_channels * (2 if config.prediction == "released" else 1)
        self.clf = nn.Sequential(                                         # the output head
            LayerNorm2d(widths[0]),
            nn.Conv2d(widths[0], out * patch, 1),
            nn.PixelShuffle(config.patch_size))
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
                nn.init.zeros_(block.mapper.weight)
            if isinstance(block, AttnBlock):       # there q, k, v are one (3c, c) matrix
                for layer in (block.attention.to_q, block.attention.to_k, block.attention.to_v):
                    nn.init.xavier_uniform_(layer.weight, gain=0.5 ** 0.5)
        nn.init.normal_(self.clip_mapper.weight, std=0.02)
        loud = self.config.prediction == "v"       # departs (pocket): so that sem is heard early
        for layer in self.effnet_mappers:
            if layer is not None:
                nn.init.normal_(layer.weight, std=1.0 if loud else 0.02)
        nn.init.xavier_uniform_(self.embedding[1].weight, gain=0.02)
        nn.init.zeros_(self.clf[1].weight)

    def tokens(self, sem, text):
        """(B, 16, h, w), (B, L, text_width) -> (B, h*w, 16), (B, L, cond): what is attended to."""
        return sem.flatten(2).transpose(1, 2), self.seq_norm(self.clip_mapper(text))

    def read(self, sem, text):
        """sem, text -> (keys, values) of each attention block, in the order of forward."""
        tokens = self.tokens(sem, text)
        return [layer.read(*tokens) for level in (*self.down_blocks, *self.up_blocks)
                for layer in level if isinstance(layer, AttnBlock)]

    def forward(self, x_t, t, sem, text, read=None):
        """read: what `read` made of the same sem and text, or None."""
        H, W, divisor = *x_t.shape[-2:], self.config.patch_size * 2 ** (len(self.config.widths) - 1)
        if H % divisor or W % divisor:
            raise ValueError(f"Stage B found latents of {H}x{W}, expected multiples of {divisor}")
        t_embedding = timestep_embedding(t, self.config.timestep_width)   # (B, 64)
        tokens = self.tokens(sem, text) if read is None else (None, None)
        reads = iter(read) if read else itertools.repeat(None)
        sem = sem.float().contiguous(memory_format=torch.channels_last)

        def level(x, layers, mapper, skip=None):
            """Run one level; the resized sem joins every block, the skip only the first."""
            extra = None
            for layer in layers:
                condition = ()                                            # of a resampling layer
                if isinstance(layer, ResBlock):
                    if mapper is not None and extra is None:              # once the size is known
                        extra = mapper(F.interpolate(                     # official code's options
                            sem, x.shape[-2:], mode="bicubic", antialias=True,
                            align_corners=True))                          # (B, cond, H_i, W_i)
                    condition = tuple(part for part in (skip, extra) if part is not None)
                    if len(condition) > 1:
                        condition = (torch.cat(condition, dim=1),)
                    skip = None
                elif isinstance(layer, TimestepBlock):
                    condition = (t_embedding,)
                elif isinstance(layer, AttnBlock):
                    condition = (*tokens, next(reads))
                if self.config.checkpoint_activations and self.training:
                    x = torch.utils.checkpoint.checkpoint(layer, x, *condition, use_reentrant=False)
                else:
                    x = layer(x, *condition)
            return x

        a_bar = alpha_bar(t)[:, None, None, None]                         # for prediction v
        x = self.embedding(x_t)                                           # (B, c_0, H_0, W_0)
        if self.config.prediction == "v":
            # departs (pocket): near t = 1, where only sem and text can tell what to draw, the noise
            # is as loud in the embedding as a picture would be, so it is turned down
            x = x * a_bar.sqrt()
        x = x.contiguous(memory_format=torch.channels_last)     # the blocks' (B, h, w, c): no copy
        skips = []
        for layers, mapper in zip(self.down_blocks, self.effnet_mappers):
            x = level(x, layers, mapper)
            skips.insert(0, x)
        for i, layers in enumerate(self.up_blocks):
            mapper = self.effnet_mappers[len(skips) + i]
            x = level(x, layers, mapper, skips[i] if i > 0 else None)
        if self.config.prediction == "v":
            # departs (pocket): v = sqrt(a_bar) eps - sqrt(1 - a_bar) x_0 (Salimans & Ho, 2022) has
            # the same size at every t. At init v_hat = 0, that is, x_0_hat = sqrt(a_bar) x_t.
            v_hat = self.clf(x).float()                                   # (B, 4, H, W)
            return (1 - a_bar).sqrt() * x_t + a_bar.sqrt() * v_hat
        # Official head: eps_hat = (x_t - A) / B with B in (0.001, 0.999): B stands for the noise's
        # size sqrt(1 - alpha_bar), A for the signal part. At init A = 0, B = .5: eps_hat = 2 x_t.
        # The paper is silent on Stage B's head; Stage C's is another one.
        a, b = self.clf(x).float().chunk(2, dim=1)                        # (B, 4, H, W) each
        return (x_t - a) / (b.sigmoid() * (1 - 2e-3) + 1e-3)


# ---- loss ----------------------------------------------------------------------------------------

def drop_and_noise(sem, text, null_text, config, mean=0.0, std=1.0):
    """Make the conditions imperfect, each sample by itself, as sampling will find them (§3.1).

    5 % lose both (the unconditional branch of guidance), 5 % the text, 5 % sem; of the rest, 30 %
    get sem noised to a level t ~ U(0, 0.5), because Stage C's latents will not be perfect. The
    model is not told the level. (pocket: 2, 50, 2 and 10 %)
    sem: (B, 16, h, w) standardised. mean, std: the scale Stage B reads, (-1, 42) for released
    weights. null_text: (1, L, E), tokens of the empty caption. Returns (sem, text).
    """
    n, device = len(sem), sem.device
    u = torch.rand(n, 1, 1, device=device)
    to_both, to_text = config.drop_both, config.drop_both + config.drop_text
    to_sem = to_text + config.drop_sem                  # u: [ both | text | sem | nothing dropped ]
    no_text = u < to_text
    no_sem = (u < to_both) | ((to_text <= u) & (u < to_sem))
    noised = (to_sem <= u) & (torch.rand(n, 1, 1, device=device) < config.noise_sem)
    t = torch.rand(n, device=device) * config.noise_sem_t
    sem = torch.where(noised[..., None], diffuse(sem, t, torch.randn_like(sem)), sem)
    sem = torch.where(no_sem[..., None], 0.0, sem * std + mean)     # zeros on the scale B reads
    return sem, torch.where(no_text, null_text, text)


def loss(model, x_0, sem, text, t=None, noise=None, record=None):
    """Mean squared error of the predicted noise (LDM training, §3.1).

    x_0: (B, 4, H, W) standardised Stage A latents. sem: (B, 16, h, w). text: (B, L, E). t: (B,) in
    [0, 1], drawn if None. noise: like x_0, drawn if None. record: a list that receives (t,
    unweighted error), both (B,). Returns a scalar.
    """
    if t is None:
        # departs (pocket): drawn nearer to t = 1 (t_power 1.5: half of all t are above .69). Flat
        # drawings can be denoised from x_t alone except there: there the conditions are learned.
        t = 1 - (1 - draw_t(len(x_0), x_0.device)) ** model.config.t_power
    noise = torch.randn_like(x_0) if noise is None else noise
    eps_hat = model(diffuse(x_0, t, noise), t, sem, text)                 # (B, 4, H, W)
    error = (eps_hat - noise).square().mean((1, 2, 3))                    # (B,)
    if record is not None:
        record.append((t.detach(), error.detach()))
    if model.config.weight_cap:
        # departs (pocket): the error is measured in x_0, which is (1 - alpha_bar) / alpha_bar times
        # that in eps, up to a cap: near t = 1 an error in eps barely shows whether x_0 is right.
        # And down to a floor, so that the levels near t = 0, where the factor is small, count too.
        a_bar = alpha_bar(t)
        weight = ((1 - a_bar) / a_bar).clamp(model.config.weight_floor, model.config.weight_cap)
        error = weight * error
    return error.mean()


# ---- sampler -------------------------------------------------------------------------------------

@torch.no_grad()
def ddpm_sample(model, shape, sem, text, null_sem, null_text, steps=12, guidance=4.0, x=None,
                generator=None, history=None):
    """Draw standardised Stage A latents: DDPM (Ho et al., 2020), §3.3, on evenly spaced t.

    shape: (B, 4, H, W). sem: (B, 16, h, w); null_sem: like it, zeros. text: (B, L, E); null_text:
    (1, L, E) or (B, L, E). steps: 12 (§4). guidance: eps_hat = null + guidance * (conditional -
    null): 4 (§4), 1 is conditional, 0 unconditional; null has both conditions dropped.
    x: the start at t = 1: the paper takes random codebook tokens (StageA.random_tokens), the
    released code noise, which is drawn if None. generator: a torch.Generator, or a list of one per
    sample. history: a list that receives x after each step.
    """
    device = next(model.parameters()).device
    x = randn(shape, generator, device) if x is None else x
    if guidance != 1:                                   # one batch: conditional, unconditional
        sem = torch.cat([sem, null_sem.expand_as(sem)])
        text = torch.cat([text, null_text.expand_as(text)])
    read = model.read(sem, text)                                          # once, not at every step
    levels = torch.linspace(1, 0, steps + 1, device=device)
    for t, t_next in zip(levels[:-1], levels[1:]):
        if guidance == 1:
            eps_hat = model(x, t.expand(len(x)), sem, text, read)
        else:
            both = model(torch.cat([x, x]), t.expand(2 * len(x)), sem, text, read)
            conditional, null = both.chunk(2)
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

def train(config, source, out, stage_a_path, clip=None, init_from=None):
    """Train Stage B and the compressor on captioned images. Goes on by itself if `out` holds a run.

    stage_a_path: checkpoint of Stage A. clip: local weights of the text encoder, or None for the
    hub. init_from: a checkpoint whose Stage B and compressor a new run begins with.
    """
    import data
    import semantic_compressor
    import stage_a
    from plumbing import checkpoint, training

    device, rank, world = training.setup(config.seed)
    out = Path(out)
    checkpoint.required(stage_a_path, "a Stage A checkpoint",
                 "train it with `python stage_a.py --data …`, or name it with --stage-a. It also "
                 f"needs the text encoder {config.text_encoder} (the hub's, or --clip PATH)")
    if config.compressor not in semantic_compressor.PRESETS:
        raise UsageError(f"--compressor {config.compressor}: expected one of "
                              f"{', '.join(semantic_compressor.PRESETS)}")
    trained = config.compressor_share > 0
    if not trained and not init_from:
        raise UsageError("--compressor-share 0 leaves the compressor as it is: give the "
                              "checkpoint with a trained one as --init-from")
    for name, known in dict(condition=("raw", "standardised"),
                            prediction=("released", "v")).items():
        found = getattr(config, name)
        if found not in known:
            raise UsageError(f"--{name} {found}: expected {' or '.join(known)}")
    vqgan = stage_a.load(stage_a_path, device)
    encoder = data.text_encoder(config.text_encoder, clip, device)
    if encoder.width != config.text_width:
        raise UsageError(f"--text-encoder {encoder.name} gives tokens {encoder.width} wide, "
                              f"expected --text-width {config.text_width}")
    dataset = data.CaptionedImages(source, resize=config.image_size, crop=config.image_size,
                                   seed=config.seed, center=config.remember,
                                   filters=data.filters(config))
    first = dataset if config.remember else data.CaptionedImages(
        source, resize=config.image_size, crop=config.image_size, center=True,
        filters=data.filters(config))
    fixed = next(data.stream(first, min(256, 2 ** 26 // config.image_size ** 2), seed=config.seed))
    fixed["images"] = fixed["images"].to(device)                          # preview, scale
    settling = semantic_compressor.resize(fixed["images"])
    out.mkdir(parents=True, exist_ok=True)

    def targets(batch):
        """A batch -> x_0 (B, 4, H, W), images for sem (B, 3, 3H, 3W), text (B, L, E).

        A compressor that stays as it is has already turned the images into sem (B, 16, h, w).
        """
        with torch.no_grad():
            images = batch["images"].to(device)
            x_0 = vqgan.standardise(vqgan.encode(images))
            small = semantic_compressor.resize(images)
            return x_0, small if trained else compressor_ema(small), encoder(batch["captions"])

    null_text = encoder([""])                                             # (1, L, E)

    torch.manual_seed(config.seed)
    compressor_config = semantic_compressor.PRESETS[config.compressor]
    compressor = semantic_compressor.SemanticCompressor(compressor_config).to(device).train()
    model = StageB(config).to(device).train()
    given = dict(samples=len(dataset), stage_a=checkpoint.checksum(vqgan.state_dict()),
                 text_encoder=dict(name=encoder.name, checksum=encoder.checksum))
    state = checkpoint.resume(out / "checkpoint.pt", "B", config, device, rank, given, init_from)
    if init_from and not state:                                           # weights, nothing else
        model.load_state_dict(load(init_from).state_dict())
        compressor.load_state_dict(semantic_compressor.load(init_from).state_dict())
    elif compressor_config.imagenet and not state:
        semantic_compressor.imagenet_weights(compressor)
    ema, compressor_ema = (copy.deepcopy(net).eval().requires_grad_(False)
                           for net in (model, compressor))
    # After its average was copied: that one is measured by the first process alone (`settle`).
    compressor = training.synchronised(compressor, world).requires_grad_(trained)
    parameters = [*model.parameters(), *(compressor.parameters() if trained else ())]
    optimizer = torch.optim.AdamW(
        [dict(params=model.parameters(), share=1.0),
         dict(params=compressor.parameters(), share=config.compressor_share)],     # of lr
        lr=config.lr, betas=(0.9, 0.95), fused=True)                      # betas: official code
    start, position = 0, (0, 0)
    if state:
        model.load_state_dict(state["model"])
        ema.load_state_dict(state["ema"])
        compressor.load_state_dict(state["compressor"])
        compressor_ema.load_state_dict(state["compressor_ema"])
        optimizer.load_state_dict(state["optimizer"])
        start, position, state = state["step"], state["position"], None   # its memory is needed
    elif rank:
        torch.manual_seed(config.seed + rank)                             # other noise on each rank
    if config.remember:
        dataset = data.remember(dataset, targets, label="Stage A latents and text tokens")
    if config.compile:
        model.compile()                                               # in place: names stay clean
        if world == 1:                                                # synchronised norms: eagerly
            compressor.compile()

    batches = data.stream(dataset, config.batch_size, config.seed, position, rank, world,
                          0 if config.remember else config.workers)
    log, guard, stop = training.Log(out, config, start, rank, world), training.NanGuard(), training.StopSignal()
    record = []                                                   # (t, error) since the last log
    freeze = config.steps - config.cooldown if config.cooldown else None
    for step in range(start, config.steps):
        optimizer.zero_grad(set_to_none=True)
        seen = 0
        # While the learning rate decays (pocket), the compressor's BatchNorm keeps its statistics:
        # those of small batches vary, and Stage B gets used to the latents that sampling will have.
        if step == freeze and trained:
            semantic_compressor.settle(compressor, settling)
        frozen = not trained or (freeze is not None and step >= freeze)
        compressor.train(not frozen)
        for _ in range(config.accumulate):
            # batch
            batch = next(batches)
            position = batch["position"]
            # targets
            x_0, images, text = (part.to(device) for part in (batch["remembered"] if config.remember
                                                              else targets(batch)))
            # loss
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                sem = (compressor(images) if trained else images).float()  # (B, 16, h, w), raw
                # Standardised with the batch's own scale, so that the noise on it has a known size.
                # (After a BatchNorm without affine parameters that is about 0 and 1 anyway.)
                mean, std = sem.detach().mean(), sem.detach().std()
                scale = (mean, std) if config.condition == "raw" else (0.0, 1.0)
                sem, text = drop_and_noise((sem - mean) / std, text, null_text, config, *scale)
                value = loss(model, x_0, sem, text, record=record)
            # backward
            (value / config.accumulate).backward()
            seen += len(x_0) * world
        # clip
        training.average_gradients(parameters, world)
        grad = nn.utils.clip_grad_norm_(parameters, config.grad_clip)
        # lr, step
        lr = training.learning_rate(step, config)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["share"]
        if not guard.is_bad(grad, step):
            optimizer.step()
            # EMA
            training.ema_update(ema, model, step, config.ema)
            if trained:
                training.ema_update(compressor_ema, compressor, step, config.ema)
        done, last = step + 1, stop.now(device, world) or step + 1 == config.steps
        # log
        log.step(seen)
        if done % config.log_every == 0 or last:
            log.write(done, training.by_level(record), loss=value.item(), grad=grad.item(), lr=lr,
                      skipped=guard.skipped)
            record.clear()
        saves, previews = (rank == 0 and (done % every == 0 or last)
                           for every in (config.save_every, config.preview_every))
        if previews or saves:
            if not frozen:
                semantic_compressor.settle(compressor_ema, settling)
            scale = semantic_compressor.latent_scale(compressor_ema, settling)
        # checkpoint
        if saves:
            checkpoint.save_checkpoint(out / "checkpoint.pt", dict(
                stage="B", config=asdict(config), step=done, position=position,
                compressor_config=asdict(replace(compressor_config, latent_mean=scale[0],
                                                 latent_std=scale[1])),
                model=model.state_dict(), ema=ema.state_dict(), compressor=compressor.state_dict(),
                compressor_ema=compressor_ema.state_dict(), optimizer=optimizer.state_dict(),
                random=checkpoint.random_state(device), **given))
            log.pause()
        # preview
        if previews:
            preview(ema, compressor_ema, scale, vqgan, encoder, fixed,
                    out / f"preview_{done:07d}.png")
            log.pause()
        if last:
            break
    log.finish(out, stop)


@torch.no_grad()
def preview(model, compressor, scale, vqgan, encoder, fixed, path):
    """Top row: images. Then: through A alone; through compressor, B (12 steps, w = 1) and A."""
    import semantic_compressor
    from plumbing import pictures
    images, text = fixed["images"][:8], encoder(fixed["captions"][:8])
    raw = compressor(semantic_compressor.resize(images))
    sem = raw if model.config.condition == "raw" else (raw - scale[0]) / scale[1]
    latents = vqgan.encode(images)
    generators = [torch.Generator().manual_seed(index) for index in range(len(images))]
    drawn = ddpm_sample(model, latents.shape, sem, text, torch.zeros_like(sem), text, guidance=1,
                        x=vqgan.random_tokens(latents.shape, generators), generator=generators)
    rows = [images, vqgan.decode(latents), vqgan.decode(vqgan.unstandardise(drawn))]
    pictures.grid(torch.cat(rows).float().cpu(), columns=len(images)).save(path)


def load(path, device="cpu"):
    """A trained StageB (its EMA), in eval mode, from a checkpoint of ours or a published one."""
    from plumbing import checkpoint
    return checkpoint.rebuild(path, "B", StageB, PRESETS["released"], device)


if __name__ == "__main__":
    from plumbing import checkpoint, cli
    from pocket import shapes
    config, args = cli.parse(
        Config, PRESETS, __doc__, data=(None, "shards or a folder of captioned images (data.py)"),
        out=(None, "folder of this run (default runs/SIZE/stage_b; of phase 2: stage_b-2)"),
        stage_a=(None, "Stage A checkpoint (default: stage_a/checkpoint.pt beside --out)"),
        clip=(None, "local weights of the CLIP text encoder, file or folder (default: the hub)"),
        init_from=(None, "begin a new run with the weights of this checkpoint (E.2, phase 2)"))
    size, _, phase = args.preset.partition("-")
    out = args.out or f"runs/{size}/stage_b" + (f"-{phase}" if phase else "")
    cli.start(train, config, shapes.source(args), out,
              args.stage_a or checkpoint.earlier("a", out, args.preset), args.clip, args.init_from)
