"""The baseline of E.4: one U-Net that draws an autoencoder's latent from text, with no Stage C.

Of Stage B's blocks, without the compressor's latent. What E.4 leaves open, and what is taken here:

- The first stage is SD 1.4's VAE in E.4 and SD 2.1's in §4: both give 4 x 64 x 64 for 512 px.
- The text has 768 numbers a token in E.4 ("like for the other models", which have 1,024) and comes
  from CLIP-H, which has 1,024: 1,024.
- A block has two cross-attentions, to t and to the text. t is one token, and attention to one token
  is a linear map of it: a TimestepBlock, as in B and C. The other is B's joint attention.
- The decoder's 5, 15, 5 and 3 blocks: no direction is given. From the deepest level, so that 15
  stand at the level of the encoder's 14.

So read it has .895 B parameters; the paper says .99 B. In the other direction it has .70 B; with
attention to t 1.16 and .90 B. No reading tried gives .99.

experiments/equal_compute.py trains the pocket size and compares it with C + B + A.
"""

import copy
from dataclasses import dataclass

import torch
import torch.nn as nn

import data
import sample
import stage_a
import stage_b
import stage_c
from plumbing import checkpoint, pictures, training
from plumbing.text import text_encoder
from stage_b import (AttnBlock, LayerNorm2d, ResBlock, TimestepBlock, alpha_bar,
                     timestep_embedding)


@dataclass(frozen=True)
class Config:
    latent_channels: int = 4                   # of SD's VAE, and of Stage A
    widths: tuple = (320, 640, 1280, 1280)     # paper, E.4
    heads: tuple = (5, 10, 20, 20)             # paper, E.4
    down: tuple = (2, 4, 14, 4)                # paper, E.4: blocks, from the finest level
    up: tuple = (5, 15, 5, 3)                  # paper, E.4: ours: from the deepest level
    text_width: int = 1024                     # paper, §4: CLIP-H
    cond_width: int = 1024                     # as Stage B
    timestep_width: int = 64                   # as Stage B
    dropout: float = 0.1                       # paper, E.4
    steps: int = 1_500_000                     # paper, E.4
    batch_size: int = 1280                     # paper, E.4
    image_size: int = 512                      # paper, §4
    text_drop: float = 0.05                    # paper, E.4
    lr: float = 1e-4                           # paper, E.4
    warmup: int = 10_000                       # paper, E.4
    muon: bool = False                         # paper, E.4: AdamW; pocket: as Stage C
    cooldown: int = 0                          # this and what follows: as Stage C
    accumulate: int = 1
    grad_clip: float = 1.0
    ema: float = 0.999
    seed: int = 0
    workers: int = 8
    log_every: int = 100
    preview_every: int = 5000
    save_every: int = 1000


PRESETS = {
    "paper": Config(),
    # ours; batch: so that as many steps as Stage C's are as many operations
    "pocket": Config(widths=(48, 96, 160), heads=(2, 3, 5), down=(1, 1, 2), up=(2, 1, 1),
                     text_width=128, cond_width=64, dropout=0.0, image_size=128, batch_size=44,
                     lr=4e-3, muon=True, warmup=100, workers=1, log_every=20, preview_every=500,
                     save_every=100)}


class LDM(nn.Module):
    """x_t (B, 4, H, W), t (B,), text (B, L, E) -> eps_hat (B, 4, H, W)."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        c, heads, cond, levels = config.widths, config.heads, config.cond_width, len(config.widths)
        self.text_mapper = nn.Sequential(
            nn.Linear(config.text_width, cond),
            nn.LayerNorm(cond, elementwise_affine=False, eps=1e-6))
        self.embedding = nn.Sequential(        # as B's; E.4 has a 2x2 convolution of stride 2 here
            nn.PixelUnshuffle(2), nn.Conv2d(4 * config.latent_channels, c[0], 1), LayerNorm2d(c[0]))

        def blocks(i, n, skip):                # the first one takes the U-Net's skip
            return [layer for j in range(n) for layer in (
                ResBlock(c[i], 0 if j else skip, config.dropout),
                TimestepBlock(c[i], config.timestep_width),
                AttnBlock(c[i], heads[i], cond, config.dropout, 0))]
        self.down_blocks, self.up_blocks = nn.ModuleList(), nn.ModuleList()
        for i in range(levels):
            smaller = [nn.Sequential(LayerNorm2d(c[i - 1]), nn.Conv2d(c[i - 1], c[i], 2, stride=2))
                       ] if i else []
            self.down_blocks.append(nn.ModuleList(smaller + blocks(i, config.down[i], 0)))
        for i, n in zip(reversed(range(levels)), config.up):
            larger = [nn.Sequential(LayerNorm2d(c[i]),
                                    nn.ConvTranspose2d(c[i], c[i - 1], 2, stride=2))] if i else []
            skip = c[i] if i < levels - 1 else 0
            self.up_blocks.append(nn.ModuleList(blocks(i, n, skip) + larger))
        self.clf = nn.Sequential(
            LayerNorm2d(c[0]), nn.Conv2d(c[0], 4 * config.latent_channels, 1), nn.PixelShuffle(2))
        self.init_weights()

    def init_weights(self):
        """As Stage B's."""
        depth = sum(self.config.down) + sum(self.config.up)
        for layer in self.modules():
            if isinstance(layer, (nn.Linear, nn.Conv2d)):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)
        for block in self.modules():
            if isinstance(block, ResBlock):
                block.channelwise[-1].weight.data *= (2 / depth) ** 0.5
            if isinstance(block, TimestepBlock):
                nn.init.zeros_(block.mapper.weight)
        nn.init.normal_(self.text_mapper[0].weight, std=0.02)
        nn.init.xavier_uniform_(self.embedding[1].weight, gain=0.02)
        nn.init.zeros_(self.clf[1].weight)

    def precompute(self, text):                # as stage_c.ddpm_sample calls it
        return None

    def forward(self, x_t, t, text, precomputed=None):
        t_embedding = timestep_embedding(t, self.config.timestep_width)
        text = self.text_mapper(text)
        a_bar = alpha_bar(t)[:, None, None, None]

        def run_level(x, layers, skip=()):
            for layer in layers:
                if isinstance(layer, ResBlock):
                    x, skip = layer(x, skip), ()
                elif isinstance(layer, TimestepBlock):
                    x = layer(x, t_embedding)
                else:
                    x = layer(x, None, text) if isinstance(layer, AttnBlock) else layer(x)
            return x
        x, skips = self.embedding(x_t), []
        for layers in self.down_blocks:
            x = run_level(x, layers)
            skips.append(x)
        for layers, skip in zip(self.up_blocks, [(), *([one] for one in skips[-2::-1])]):
            x = run_level(x, layers, skip)
        return (1 - a_bar).sqrt() * x_t + a_bar.sqrt() * self.clf(x).float()   # v, as pocket's B


def loss(model, x_0, text):
    """-> scalar, t, error of eps (B,). E.4 names no loss; this, v's error (Salimans & Ho, 2022),
    was better than that of x_0 for such blocks on these latents: docs/findings.md.
    """
    t, noise = stage_b.draw_t(len(x_0), x_0.device), torch.randn_like(x_0)
    eps_hat = model(stage_b.diffuse(x_0, t, noise), t, text)              # (B, 4, H, W)
    error = (eps_hat - noise).square().mean((1, 2, 3))
    return (error / alpha_bar(t)).mean(), t, error.detach()


@torch.no_grad()
def draw(model, a, encoder, prompts, seeds, guidance, steps=60):
    """Prompts -> images (B, 3, H, W), about [0, 1], by Stage C's sampler."""
    side = model.config.image_size // 4
    latents = stage_c.ddpm_sample(
        model, (len(prompts), model.config.latent_channels, side, side), encoder(prompts),
        encoder([""]), steps, guidance, generator=stage_b.generators(seeds))
    return a.decode(a.unstandardise(latents))


# ---- training ------------------------------------------------------------------------------------

def train(config, source, out):
    """Train the pocket baseline on captioned drawings. Goes on by itself if `out` holds a run."""
    from experiments import price                                         # which counts this file
    device = training.setup(config.seed)
    a, encoder = stage_a.load(sample.POCKET["a"], device), text_encoder("pocket", None, device)
    null_text = encoder([""])
    work = 3 * price.of_baseline("pocket", config.image_size)              # of one picture

    def targets(batch):
        x_0 = a.standardise(a.encode(batch["images"].to(device)).float())   # (B, 4, 32, 32)
        return x_0, encoder(batch["captions"])
    dataset = data.remember(data.CaptionedImages(
        source, resize=config.image_size, crop=config.image_size, center=True), targets,
        label="Stage A latents and text tokens")
    captions = next(data.stream(dataset, 8))["captions"]

    run = training.Run("LDM", config, out, device, samples=len(dataset),
                       stage_a=checkpoint.checksum(a.state_dict()), text_encoder=encoder.identity)
    model = LDM(config).to(device).train()
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer = training.optimizer(config, [dict(params=[*model.parameters()])])
    batches = data.Stream(dataset, config, device)
    run.restore(model=model, ema=ema, optimizer=optimizer, batches=batches)
    for step in run.steps():
        x_0, text = (part.to(device) for part in next(batches)["remembered"])
        with training.autocast(device):
            value, t, error = loss(model, x_0, stage_c.drop_text(text, null_text, config.text_drop))
        run.note(t, error)
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        grad = nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        lr = training.learning_rate(step, config)
        for group in optimizer.param_groups:
            group["lr"] = lr
        if run.finite(grad):
            optimizer.step()
            training.ema_update(ema, model, step, config.ema)
        samples = (step + 1) * config.batch_size
        run.log(loss=value, grad=grad, lr=lr, samples=samples, tflop=samples * work / 1e12)
        if run.due("preview"):
            drawn = draw(ema, a, encoder, captions, range(len(captions)), 4.0, steps=20)
            pictures.grid(drawn.cpu(), 4, captions).save(run.preview)
        if run.due("save"):
            run.save()
