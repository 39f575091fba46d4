"""The Semantic Compressor: an image becomes a grid 42.67 times smaller on each side.

It defines the space in which Stage C draws (Würstchen, §3.1 and E.2). `python stage_b.py` trains it
jointly with Stage B, which learns to draw an image from this grid. Then it is frozen: its latents,
which `python -m tools.cache_latents` can keep, are what Stage C learns to draw in its place.

    image (B, 3, H, W)  --3/4, bicubic-->  (B, 3, 3H/4, 3W/4)  --EfficientNetV2, stride 32-->
    (B, 1280, 3H/128, 3W/128)  --1x1 convolution, BatchNorm-->  (B, 16, 3H/128, 3W/128)

    1024 px -> 768 px -> 24x24;   512 px -> 384 px -> 12x12;   pocket: 128 px -> 96 px -> 3x3
    (§3.1 says 786 px: a misprint for 768, as E.2 and E.3 have it; 786 would give 25x25)

The network's output is raw; standardised = (raw - mean) / std has mean 0 and unit variance, which
Stage C's schedule and Stage B's noise on it assume. At a deviation of 1/42 the signal-to-noise
ratio would be off by 42^2. The released weights need (mean, std) = (-1, 42).
Letters: B batch, H W height and width of the image given to Stage A, h w of the latent grid.
"""

import copy
import os
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F


# ---- Config --------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Config:
    backbone: str = "efficientnet_v2_s"   # paper, §3.4; "narrow" is the pocket one
    imagenet: bool = True                 # paper, §3.1: its weights, when training starts
    latent_channels: int = 16             # paper, §3.1
    # departs: no scale and shift in the last BatchNorm (released: True). Stage B's noise on the
    # latents has a fixed size: with a scale, a channel could outgrow it or vanish in it.
    affine: bool = False
    latent_mean: float = 0.0              # of raw latents, measured when a checkpoint is written
    latent_std: float = 1.0               # likewise


PRESETS = {
    "paper": Config(),
    "released": Config(affine=True, latent_mean=-1.0, latent_std=42.0),   # official: (z + 1) / 42
    "pocket": Config(backbone="narrow", imagenet=False),   # ours: 1.1 M parameters; the drawings
}                                                          # have pocket/teach.py for ImageNet


# ---- model ---------------------------------------------------------------------------------------

def efficientnet_features(name):
    """The convolutional part of an EfficientNetV2, stride 32, and its number of output channels."""
    with torch.device("cpu"):                  # torch 2.6 cannot import it on "meta"
        from torchvision.models import efficientnet as tv     # takes a second; drawing needs none
    if name == "efficientnet_v2_s":
        return tv.efficientnet_v2_s(weights=None).features, 1280
    if name != "narrow":
        raise ValueError(f"backbone {name!r}: expected efficientnet_v2_s or narrow")
    # expand ratio, kernel, stride, channels in, channels out, layers: the S network, narrower
    settings = [
        tv.FusedMBConvConfig(1, 3, 1, 8, 8, 1), tv.FusedMBConvConfig(4, 3, 2, 8, 24, 1),
        tv.FusedMBConvConfig(4, 3, 2, 24, 48, 1), tv.MBConvConfig(4, 3, 2, 48, 96, 2),
        tv.MBConvConfig(4, 3, 1, 96, 96, 2), tv.MBConvConfig(6, 3, 2, 96, 128, 3)]
    # no stochastic depth: a regulariser that a network this small does not need
    return tv.EfficientNet(settings, dropout=0.0, stochastic_depth_prob=0.0, last_channel=512,
                           norm_layer=partial(nn.BatchNorm2d, eps=1e-3)).features, 512


class SemanticCompressor(nn.Module):
    """(B, 3, 3H/4, 3W/4) in [0, 1] -> raw latents (B, 16, 3H/128, 3W/128)."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.backbone, channels = efficientnet_features(config.backbone)
        self.mapper = nn.Sequential(                          # both names as in dome272/Wuerstchen
            nn.Conv2d(channels, config.latent_channels, 1, bias=False),
            nn.BatchNorm2d(config.latent_channels, affine=config.affine))
        # of ImageNet; on the CPU also where a model is built on "meta": no checkpoint holds them
        for name, value in (("mean", [0.485, 0.456, 0.406]), ("std", [0.229, 0.224, 0.225])):
            self.register_buffer(name, torch.tensor(value, device="cpu").view(3, 1, 1), False)

    def forward(self, images):
        """images: at the compressor's size (see `resize`), in [0, 1]; normalised here as in E.2."""
        H, W = images.shape[-2:]
        if H % 32 or W % 32:
            raise ValueError(f"the compressor found an image of {H}x{W}, expected multiples of 32")
        mean, std = self.mean.to(images), self.std.to(images)     # they move from "meta" alone
        return self.mapper(self.backbone((images - mean) / std))          # (B, 16, h, w)

    @property
    def scale(self):
        """(mean, standard deviation) of its raw latents."""
        return self.config.latent_mean, self.config.latent_std

    def standardise(self, latents):
        """Raw latents -> mean 0, standard deviation 1: what Stage C draws."""
        return (latents - self.config.latent_mean) / self.config.latent_std


def resize(images):
    """(B, 3, H, W) at Stage A's size -> (B, 3, 3H/4, 3W/4), bicubic (§3.1) with antialiasing."""
    H, W = images.shape[-2:]
    if H % 128 or W % 128:                                      # else the grid would not be whole
        raise ValueError(f"found an image of {H}x{W}, expected sides that are multiples of 128")
    small = (H * 3 // 4, W * 3 // 4)
    return F.interpolate(images, small, mode="bicubic", antialias=True).clamp(0, 1)


@torch.no_grad()
def measure_batchnorm(model, images):
    """Give `model` the BatchNorm statistics of one batch of training images (N, 3, 3H/4, 3W/4).

    Running statistics lag behind weights that change, and those of an average of weights (EMA) were
    never measured. Stochastic depth would change what reaches a BatchNorm, so it is off.
    """
    copied = copy.deepcopy(model).eval()
    for layer in copied.modules():
        if isinstance(layer, (nn.BatchNorm2d, nn.SyncBatchNorm)):
            layer.reset_running_stats()
            layer.train().momentum = None                                 # the plain average
    copied(images)
    model.load_state_dict(copied.state_dict())


@torch.no_grad()
def measure(model, images, frozen=False):
    """-> the Config of an averaged compressor, in eval mode, with the scale of its raw latents."""
    if not frozen:                     # otherwise its BatchNorm statistics are those of its weights
        measure_batchnorm(model, images)
    latents = torch.cat([model.eval()(part) for part in images.split(32)]).float()
    if not latents.isfinite().all():
        raise ValueError("the compressor's latents are not finite any more, so nothing was saved; "
                         "the checkpoint is the one before. Try a lower --lr")
    return replace(model.config, latent_mean=latents.mean().item(), latent_std=latents.std().item())


# ---- training: there is no loop here, `python stage_b.py` trains this network with Stage B -------

from plumbing import checkpoint, cli


def new(preset, weights=None, trained=True, device="cpu"):
    """A compressor to train: as in `weights`, a Stage B checkpoint, or new, of a name in PRESETS.

    A new one has ImageNet's weights (§3.1) where the preset says so. trained: False freezes it.
    """
    config = PRESETS[preset]
    if not (weights or trained):
        raise cli.UsageError("--compressor-share 0 leaves the compressor as it is: give the "
                             "checkpoint with a trained one as --init-from")
    model = load(weights) if weights else SemanticCompressor(config)
    if model.config.backbone != config.backbone:
        raise cli.UsageError(f"{weights}: its compressor has the backbone {model.config.backbone}, "
                             f"expected {config.backbone}, as --compressor-preset {preset} has it")
    if config.imagenet and not weights:                                   # a download
        from torchvision.models import efficientnet as tv
        try:
            state = tv.EfficientNet_V2_S_Weights.DEFAULT.get_state_dict(progress=True)
        except OSError as error:                                          # URLError is an OSError
            raise cli.UsageError("the ImageNet weights of EfficientNetV2-S cannot be downloaded ("
                                 f"{error}); go online once, or put efficientnet_v2_s-dd5fe13b.pth "
                                 "into ~/.cache/torch/hub/checkpoints/") from None
        model.backbone.load_state_dict({name.removeprefix("features."): value for name, value in
                                        state.items() if name.startswith("features.")})
    return model.to(device).train(trained).requires_grad_(trained)


def load(path, device="cpu"):
    """The trained compressor, in eval mode, from a Stage B checkpoint or a published one."""
    return checkpoint.rebuild(path, "compressor", SemanticCompressor, PRESETS["released"], device)


def cached(source, compressor):
    """latents.json of a folder that tools/cache_latents.py wrote; None for any other source."""
    path = os.path.join(source, "latents.json")
    if not os.path.isfile(path):
        return None
    found = cli.read_json(path, {"compressor": str, "image_size": int})
    if found["compressor"] != checkpoint.checksum(compressor.state_dict()):
        raise cli.UsageError(f"{source}: holds latents of another compressor than the one given; "
                             "`python -m tools.cache_latents` writes new ones, into a new folder")
    return found
