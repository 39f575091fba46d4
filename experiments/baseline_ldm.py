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
"""

from dataclasses import dataclass

import torch.nn as nn

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


PRESETS = {
    "paper": Config(),
    "pocket": Config(widths=(48, 96, 160), heads=(2, 3, 5), down=(1, 1, 2), up=(2, 1, 1),
                     text_width=128, cond_width=64, dropout=0.0, image_size=128)}


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

    def forward(self, x_t, t, text):
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
        x, skips = self.embedding(x_t) * a_bar.sqrt(), []                 # ours: as pocket's B
        for layers in self.down_blocks:
            x = run_level(x, layers)
            skips.append(x)
        for layers, skip in zip(self.up_blocks, [(), *([one] for one in skips[-2::-1])]):
            x = run_level(x, layers, skip)
        return (1 - a_bar).sqrt() * x_t + a_bar.sqrt() * self.clf(x).float()   # v, as pocket's B
