"""Stage C: draws the Semantic Compressor's tiny latent from text. The text-conditional model.

This is the paper's idea: the latent of a 1024x1024 image is 16x24x24, 42 times smaller on a side
and 341 times in numbers, so the model that has to understand text works on 576 positions, without
downsampling, and is cheap to train (Würstchen, §3.2 and Appendix E.3).

    x_t = sqrt(alpha_bar(t)) x_0 + sqrt(1 - alpha_bar(t)) eps              forward process, §3.2
    A, B = f_theta(x_t, text, t)
    eps_hat = (x_t - A) / (|1 - B| + 1e-5)                                 the A/B head, §3.2
    loss = p2(t) * |eps - eps_hat|^2,  p2 = (1 - alpha_bar) / (1 + alpha_bar)   §3.2

    x_t (B, 16, h, w) --1x1--> (B, D, h, w) --[ResBlock, TimestepBlock, AttnBlock] x depth-->
    --LayerNorm, 1x1--> A, B (B, 16, h, w) each --> eps_hat (B, 16, h, w)
    text (B, L, E) --MLP--> (B, L, D), read by every AttnBlock

Letters: B batch (the head's B is `b` in code), h w the latent's grid (24x24 for 1024 px), D width,
L text tokens, E width of the text encoder, t noise level from 0 (clean) to 1 (noise).
Architecture and attribute names follow the published v2 prior (dome272/Wuerstchen, modules.py).

    python stage_c.py --data shards/                         paper size, for a GPU
    python stage_c.py --data shards/shapes --preset pocket   two CPU cores, minutes
"""

import copy
import math
from dataclasses import dataclass, replace
from pathlib import Path
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
    latent_channels: int = 16          # paper, §3.1
    width: int = 1280                  # paper, E.3 (347 M; its "1B" is `released`)
    depth: int = 16                    # paper, E.3
    heads: int = 16                    # paper, E.3
    text_width: int = 1024             # paper, E.3: CLIP-H
    timestep_width: int = 64           # official code
    dropout: float = 0.1               # official code
    # loss
    p2: Literal["paper", "released", "none"] = "paper"   # paper, §3.2; released: 1 - alpha_bar
    text_drop: float = 0.05            # paper, §3.2
    # data
    text_encoder: str = "clip-h"       # paper, §4
    image_size: int = 512              # paper, E.3, first run: 12x12 latents
    sizes: tuple = ()                  # the compressor's inputs, HxW, one for each batch (E.3)
    remember: bool = False             # encode each image and caption once and keep them in memory
    # filters by what the .json of a sample says (data.py); these values let all pass
    min_size: int = 0                  # shorter side of the original in pixels, at least
    min_aesthetic: float = 0.0         # LAION's aesthetic score, at least
    max_pwatermark: float = 1.0        # LAION's probability of a watermark, at most
    max_punsafe: float = 1.0           # LAION's probability of not being safe for work, at most
    # training
    steps: int = 500_000               # paper, E.3, first run
    batch_size: int = 96               # ours: 96 x 16 is the 1536 of E.3; 27.2 GiB, H200
    accumulate: int = 16
    lr: float = 1e-4                   # paper, E.3
    muon: bool = False                 # paper, E.3: AdamW; pocket: Muon's steps for matrices
    warmup: int = 10_000               # official code (the paper gives it for Stage B only)
    cooldown: int = 0                  # ours: linear decay at the end; the paper names none
    grad_clip: float = 1.0             # official code
    # the average of the weights over some 1,000 steps samples better than those of any one step
    ema: float = 0.999                 # ours: the released 0.9 every 100 steps, as one per step
    seed: int = 0
    workers: int = 8
    compile: bool = False
    checkpoint_activations: bool = False   # less memory, a fifth more work
    log_every: int = 100
    preview_every: int = 5000
    save_every: int = 1000


PRESETS = {
    "paper": Config(),
    # the later runs of E.3, by --init-from; warmup: ours, short, as each has a new optimizer
    # and micro-batches: ours, of the paper's 1536, 768, 384; estimated 32, 28, 32 GiB, released 30
    "paper-2": Config(image_size=1024, steps=364_000, batch_size=32, accumulate=48, warmup=500),
    "paper-3": Config(image_size=1024, steps=4_000, batch_size=16, accumulate=48, warmup=500,
                      sizes=("768x1280", "1280x768", "768x768")),
    "paper-4": Config(image_size=1024, steps=50_000, batch_size=32, accumulate=12, warmup=500),
    "released": Config(                # official v2 weights: 993,636,896 parameters, CLIP-bigG text
        width=1536, depth=32, heads=24, text_width=1280, text_encoder="clip-bigg", p2="released",
        batch_size=16, accumulate=96),
    "pocket": Config(                  # ours: the same class at a size for two CPU cores
        width=192, depth=4, heads=6, text_width=128, dropout=0.0, text_encoder="pocket",
        image_size=128, remember=True, steps=2000, batch_size=128, accumulate=1, lr=4e-3,
        muon=True, warmup=100, cooldown=700, workers=1, log_every=20, preview_every=200,
        save_every=100),
}
PRESETS["finetune"] = replace(         # ours: released weights go on; 32 x 12 is paper-4's 384
    PRESETS["released"], image_size=1024, steps=10_000, lr=1e-5, warmup=500, batch_size=32,
    accumulate=12, checkpoint_activations=True)


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


# ---- blocks: Stage C alone -----------------------------------------------------------------------

class ResBlock(nn.Module):
    """ConvNeXt block with GlobalResponseNorm. Unlike Stage B's it has no skip input."""

    def __init__(self, c, dropout):
        super().__init__()
        self.depthwise = nn.Conv2d(c, c, 3, padding=1, groups=c)
        self.norm = LayerNorm2d(c)
        self.channelwise = nn.Sequential(
            nn.Linear(c, 4 * c), nn.GELU(), GlobalResponseNorm(4 * c), nn.Dropout(dropout),
            nn.Linear(4 * c, c))

    def forward(self, x):                                                 # (B, D, h, w)
        y = self.norm(self.depthwise(x)).permute(0, 2, 3, 1)              # (B, h, w, D)
        return x + self.channelwise(y).permute(0, 3, 1, 2)


class AttnBlock(nn.Module):
    """Each latent position attends to all positions and all text tokens at once (E.3)."""
    # departs: one joint attention (official code), where the paper has cross-attention

    def __init__(self, c, heads, dropout):
        super().__init__()
        self.norm = LayerNorm2d(c)
        self.attention = Attention(c, heads, dropout)
        self.kv_mapper = nn.Sequential(nn.SiLU(), nn.Linear(c, c))

    def precompute(self, text):                 # (B, L, D) -> keys, values (B, heads, L, D / heads)
        return self.attention.keys_values(self.kv_mapper(text))

    def forward(self, x, text, precomputed=None):       # (B, D, h, w), (B, L, D)
        keys, values = precomputed or self.precompute(text)
        y = self.norm(x).flatten(2).transpose(1, 2)                       # (B, h*w, D)
        return x + self.attention(y, keys, values).transpose(1, 2).unflatten(2, x.shape[-2:])


# ---- model ---------------------------------------------------------------------------------------

def ab_to_eps(x_t, a, b):
    """The A/B head: eps_hat = (x_t - A) / (|1 - B| + 1e-5), §3.2.

    It is the forward process solved for the noise: A stands for the signal sqrt(alpha_bar) x_0,
    |1 - B| for the noise's size sqrt(1 - alpha_bar), positive also where B overshoots 1.
    At init A = B = 0, so eps_hat = x_t / (1 + 1e-5). With a = alpha_bar the error of that is
    (1 - sqrt(1 - a))^2 + a: 1.95 at t = .01, .58 at .5, .0001 at 1. A network that predicts eps
    from zero has an error of 1 at every t. So this head starts better where p2 puts its weight, at
    high noise; the paper suspects that the usual start made training unstable.
    """
    return (x_t - a) / ((1 - b).abs() + 1e-5)


class StageC(nn.Module):
    """The prior: x_t (B, 16, h, w), t (B,), text (B, L, text_width) -> eps_hat (B, 16, h, w)."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        c, e = config.width, config.text_width
        self.projection = nn.Conv2d(config.latent_channels, c, 1)
        self.cond_mapper = nn.Sequential(nn.Linear(e, c), nn.LeakyReLU(0.2), nn.Linear(c, c))
        self.blocks = nn.ModuleList()
        for _ in range(config.depth):
            self.blocks += [ResBlock(c, config.dropout), TimestepBlock(c, config.timestep_width),
                            AttnBlock(c, config.heads, config.dropout)]
        self.out = nn.Sequential(LayerNorm2d(c), nn.Conv2d(c, 2 * config.latent_channels, 1))
        self.init_weights()

    def init_weights(self):
        """The official code's initialisation (the paper: it starts by predicting 0)."""
        for layer in self.modules():
            if isinstance(layer, (nn.Linear, nn.Conv2d)):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)
        for block in self.blocks:
            if isinstance(block, ResBlock):        # depth residuals add up to the variance of one
                block.channelwise[-1].weight.data *= (1 / self.config.depth) ** 0.5
            if isinstance(block, TimestepBlock):
                nn.init.zeros_(block.mapper.weight)            # scale 1, shift 0: the identity
            if isinstance(block, AttnBlock):       # there q, k, v are one (3c, c) matrix
                for layer in (block.attention.to_q, block.attention.to_k, block.attention.to_v):
                    nn.init.xavier_uniform_(layer.weight, gain=0.5 ** 0.5)
        for layer in (self.projection, self.cond_mapper[0], self.cond_mapper[2]):
            nn.init.normal_(layer.weight, std=0.02)
        nn.init.zeros_(self.out[1].weight)         # A = B = 0: see ab_to_eps

    def precompute(self, text):
        """(B, L, E) -> keys, values of each attention block: made once for all sampling steps."""
        text = self.cond_mapper(text)                                     # (B, L, D)
        return [block.precompute(text) for block in self.blocks if isinstance(block, AttnBlock)]

    def forward(self, x_t, t, text, precomputed=None):
        if x_t.shape[1] != self.config.latent_channels:
            raise ValueError(f"Stage C found latents of {x_t.shape[1]} channels, expected "
                             f"{self.config.latent_channels}")
        t_embedding = timestep_embedding(t, self.config.timestep_width)   # (B, 64)
        text = self.cond_mapper(text) if precomputed is None else None    # (B, L, D)
        precomputed = iter(precomputed or ())
        recompute = self.config.checkpoint_activations and self.training
        x = self.projection(x_t)                                          # (B, D, h, w)
        x = x.contiguous(memory_format=torch.channels_last)     # the blocks' (B, h, w, D): no copy
        for block in self.blocks:
            condition = (t_embedding,) if isinstance(block, TimestepBlock) else ()
            if isinstance(block, AttnBlock):
                condition = (text, next(precomputed, None))
            x = (torch.utils.checkpoint.checkpoint(block, x, *condition, use_reentrant=False)
                 if recompute else block(x, *condition))
        # float32: bf16 steps by .0039 below 1, and at t = .001 the true |1 - B| is .0100
        with torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False):
            a, b = self.out(x.float()).chunk(2, dim=1)                    # (B, 16, h, w) each
        return ab_to_eps(x_t, a, b)


# ---- loss ----------------------------------------------------------------------------------------

def p2_weight(t, form="paper"):
    """How much each noise level counts in the loss (§3.2, after Choi et al., 2022). (B,) -> (B,).

    Predicting the noise of a nearly clean latent is hard to do well and decides nothing that can be
    seen; at high noise the subject of the picture is decided. With the paper's form t = .25, .5,
    .75 count .083, .339, .748; as draw_t draws t, its quarters carry 1, 10, 27, 62 % of the weight.
    """
    a_bar = alpha_bar(t)                                 # SNR, signal to noise: a_bar / (1 - a_bar)
    forms = {"paper": (1 - a_bar) / (1 + a_bar),         # = 1 / (1 + 2 SNR)
             "released": 1 - a_bar,                      # = 1 / (1 + SNR): Choi's, k = gamma = 1
             "none": torch.ones_like(a_bar)}
    if form not in forms:
        raise ValueError(f"p2 form {form!r}: expected paper, released or none")
    return forms[form]


def drop_text(text, null_text, rate):
    """Replace the text (B, L, E) of a share of samples by the empty caption's (1, L, E), §3.2."""
    dropped = torch.rand(len(text), 1, 1, device=text.device) < rate    # official: whole batches
    return torch.where(dropped, null_text, text)


def loss(model, x_0, text, t=None, noise=None, p2=None):
    """p2-weighted error of the predicted noise (§3.2) -> scalar, t, unweighted error of each (B,).

    x_0: (B, 16, h, w), the compressor's standardised latents. text: (B, L, E). t (B,) and noise (as
    x_0) are drawn if None. p2: a form of p2_weight; the model's if None.
    """
    t = draw_t(len(x_0), x_0.device) if t is None else t
    noise = torch.randn_like(x_0) if noise is None else noise
    eps_hat = model(diffuse(x_0, t, noise), t, text)                      # (B, 16, h, w)
    error = (eps_hat - noise).square().mean((1, 2, 3))                    # (B,)
    return (p2_weight(t, p2 or model.config.p2) * error).mean(), t, error.detach()


# ---- sampler -------------------------------------------------------------------------------------

@torch.no_grad()
def ddpm_sample(model, shape, text, null_text, steps=60, guidance=4.0, x=None, generator=None,
                history=None):
    """Draw standardised latents from text: DDPM (Ho et al., 2020), §3.3, on evenly spaced t.

    shape: (B, 16, h, w). text: (B, L, E); null_text: (1, L, E) or (B, L, E). steps: 60 (§4), or the
    levels from 1 to 0. x: the start, noise if None. generator: one, or a list of one per sample.
    history: a list that receives x after each step.
    guidance: classifier-free guidance (Ho & Salimans, 2022). Training drops some texts, so the one
    model predicts with the text and without: eps_hat = null + guidance * (conditional - null). 1 is
    conditional, 0 unconditional, above 1 the difference that the text makes is enlarged.
    """
    device = next(model.parameters()).device
    x = randn(shape, generator, device) if x is None else x
    if guidance != 1:                                   # one batch: conditional, unconditional
        text = torch.cat([text, null_text.expand_as(text)])
    precomputed = model.precompute(text)
    levels = torch.linspace(1, 0, steps + 1) if isinstance(steps, int) else torch.tensor(steps)
    for t, t_next in zip(levels.to(device), levels[1:].to(device)):
        both = x if guidance == 1 else torch.cat([x, x])
        eps_hat = model(both, t.expand(len(both)), text, precomputed)
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


# diffusers' recommended 29 steps (DEFAULT_STAGE_C_TIMESTEPS): two thirds of them at high noise
RELEASED_LEVELS = (*(1 - i / 57 for i in range(20)), *((10 - i) / 15 for i in range(1, 11)))


# ---- training ------------------------------------------------------------------------------------

import re

import data
import semantic_compressor
import stage_b
from plumbing import checkpoint, cli, pictures, training
from plumbing.text import text_encoder


def train(config, source, out, path_a, path_b, clip=None, init_from=None, path_compressor=None):
    """Train on captioned images or on cached latents. Goes on by itself if `out` holds a run.

    path_compressor: else path_b's. path_a, path_b: Stages A and B, for previews; may be missing.
    clip: weights of the text encoder; None: the hub's. init_from: weights a new run begins with.
    """
    device = training.setup(config.seed)
    compressor = semantic_compressor.load(path_compressor or path_b, device)     # frozen
    encoder = text_encoder(config.text_encoder, clip, device, config.text_width)    # frozen
    null_text = encoder([""])                                             # (1, L, E)
    dataset = training_data(config, source, compressor, encoder)

    @torch.no_grad()
    def targets(batch):
        """Images (or latents), captions (or tokens) -> x_0 (B, 16, h, w), text (B, L, E)."""
        if "remembered" in batch:
            return [part.to(device, non_blocking=True) for part in batch["remembered"]]
        x_0 = batch["images"].to(device)
        if x_0.shape[1] == 3:                                             # images, not latents
            small = x_0 if config.sizes else semantic_compressor.resize(x_0)
            x_0 = compressor.standardise(compressor(small).float())
        return x_0, batch["tokens"].to(device) if "tokens" in batch else encoder(batch["captions"])

    if config.remember:
        dataset = data.remember(dataset, targets, label="compressor latents and text tokens")
    captions = next(data.stream(dataset, 16, config.seed))["captions"]    # of the previews
    decoder = None
    if path_b and path_a and (path_a == "released" or Path(path_a).exists()):
        decoder = (path_a, path_b, path_compressor, clip)
        stage_b.load_decoder(*decoder)                 # fail now, not at the first preview

    run = training.Run("C", config, out, device, init_from, samples=len(dataset),
                       compressor=checkpoint.checksum(compressor.state_dict()),
                       text_encoder=encoder.identity)
    model = StageC(config).to(device).train()
    if init_from and run.new:                                             # weights, nothing else
        run.begin(model, load(init_from), init_from)
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer = training.optimizer(config, [dict(params=[*model.parameters()])])
    batches = data.Stream(dataset, config, device)
    run.restore(model=model, ema=ema, optimizer=optimizer, batches=batches)
    if config.compile:
        model.compile(dynamic=False)       # each size by itself; in place, so names stay clean

    for step in run.steps():
        optimizer.zero_grad(set_to_none=True)
        for _ in range(config.accumulate):
            with training.autocast(device):
                # batch, targets
                x_0, text = targets(next(batches))                        # (B, 16, h, w), (B, L, E)
                text = drop_text(text, null_text, config.text_drop)
                # loss
                value, t, error = loss(model, x_0, text)
            run.note(t, error)
            (value / config.accumulate).backward()
        # clip, lr, step
        training.average_gradients(model.parameters())
        grad = nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        lr = training.learning_rate(step, config)
        for group in optimizer.param_groups:
            group["lr"] = lr
        if run.finite(grad):
            optimizer.step()
            training.ema_update(ema, model, step, config.ema)             # EMA
        # log, preview, checkpoint
        run.log(loss=value, grad=grad, lr=lr)
        if run.due("preview"):
            preview(ema, encoder, captions, decoder, run.preview)
        if run.due("save"):
            run.save()


def training_data(config, source, compressor, encoder):
    """Images at Stage A's size, at the compressor's for --sizes; or latents if source has them."""
    cached = semantic_compressor.cached(source, compressor)
    tokens = cached and cached.get("text_encoder")                        # made by which
    if not all(re.fullmatch(r"[1-9]\d{1,3}x[1-9]\d{1,3}", size) for size in config.sizes):
        raise cli.UsageError(f"--sizes {','.join(config.sizes)}: expected HxW,HxW,…")
    sizes = [tuple(int(side) for side in size.split("x")) for size in config.sizes]     # (H, W)
    if sizes and (cached or config.remember):
        raise cli.UsageError("--sizes: batches of several sizes are made from images as training "
                             "goes; give image shards and --no-remember")
    if cached and cached["image_size"] != config.image_size:
        raise cli.UsageError(f"{source}: holds latents of {cached['image_size']}-px images, "
                             f"expected --image-size {config.image_size}")
    if tokens and tokens != encoder.identity:
        raise cli.UsageError(f"{source}: holds tokens of another text encoder, {tokens}, than "
                             f"--text-encoder and --clip give, {encoder.identity}")
    side = min(min(size) for size in sizes) if sizes else config.image_size
    dataset = (data.CaptionedLatents if cached else data.CaptionedImages)(
        source, resize=side, crop=sizes or side, seed=config.seed, center=config.remember,
        filters=data.filters(config))
    dataset.tokens = (encoder.length, encoder.width) if tokens else None
    return dataset


@torch.no_grad()
def preview(model, encoder, captions, decoder, path):
    """Sixteen captions of the data at fixed noise, decoded by the B and A in `decoder`'s files."""
    side, seeds = model.config.image_size * 3 // 128, range(len(captions))
    shape = (len(captions), model.config.latent_channels, side, side)
    device = next(model.parameters()).device
    with training.autocast(device):
        latents = ddpm_sample(model, shape, encoder(captions), encoder([""]), steps=20,
                              generator=stage_b.generators(seeds))
        images = pictures.latent_picture(latents)
        if decoder:
            decoder = stage_b.load_decoder(*decoder, device=device)
            images = torch.cat([                      # four at a time: 16 of 1024 px fill 46 GiB
                stage_b.draw_images(decoder, latents[i:i + 4], captions[i:i + 4], seeds[i:i + 4])
                for i in range(0, len(seeds), 4)])
    pictures.grid(images.float().cpu(), 4, captions).save(path)


def load(path, device="cpu"):
    """A trained StageC (its EMA), in eval mode, from a checkpoint of ours or a published one."""
    return checkpoint.rebuild(path, "C", StageC, PRESETS["released"], device)


if __name__ == "__main__":
    from pocket import shapes
    training.command("c", train, Config, PRESETS, __doc__, shapes.source)
