"""The Semantic Compressor: an image becomes a grid 42.67 times smaller on each side.

It defines the space in which Stage C draws (Würstchen, §3.1 and E.2). It is trained jointly with
Stage B, which learns to draw an image from this grid; afterwards it is frozen and is Stage C's
target; at sampling time it is gone, because Stage C has taken its place.

    image (B, 3, H, W)  --3/4, bicubic-->  (B, 3, 3H/4, 3W/4)  --EfficientNetV2, stride 32-->
    (B, 1280, 3H/128, 3W/128)  --1x1 convolution, BatchNorm-->  (B, 16, 3H/128, 3W/128)

    1024 px -> 768 px -> 24x24;   512 px -> 384 px -> 12x12;   pocket: 128 px -> 96 px -> 3x3

§3.1 says 786 px for the input: a misprint for 768, as E.2 and E.3 have it (786 would give 25x25).

Raw and standardised: the network's output is raw; standardised = (raw - mean) / std has mean 0 and
standard deviation 1 and is what Stage C draws. Unit variance matters: the noise that Stage B gets
on it and Stage C's schedule both assume it; at a deviation of 1/42 the signal-to-noise ratio would
be off by 42^2. The released weights need (mean, std) = (-1, 42).

Letters: B batch, H W height and width of the image given to Stage A.
Attribute names (`backbone`, `mapper`) are those of the published weights (dome272/Wuerstchen).
There is no training loop here: `python stage_b.py` trains this network together with Stage B.
While Stage C trains it is frozen, so its latents can be computed once and kept
(`python -m tools.cache_latents`).
"""

import json
import os
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from torchvision.models import efficientnet as tv   # not later: torch 2.6 cannot while on "meta"


# ---- Config --------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Config:
    backbone: str = "efficientnet_v2_s"   # paper, §3.4; "narrow" is the pocket one
    imagenet: bool = True                 # paper, §3.1: its weights, when training starts
    latent_channels: int = 16             # paper, §3.1
    # departs: no scale and shift in the last BatchNorm (released: True). Stage B's noise on the
    # latents has a fixed size; so every channel stays at unit variance and none can grow away from
    # that noise, or be drowned in it.
    affine: bool = False
    # scale of the latents, standardised = (raw - mean) / std: measured when a checkpoint is written
    latent_mean: float = 0.0
    latent_std: float = 1.0


PRESETS = {
    "paper": Config(),
    "released": Config(affine=True, latent_mean=-1.0, latent_std=42.0),   # official: (z + 1) / 42
    "pocket": Config(backbone="narrow", imagenet=False),   # ours: 1.1 M parameters; the drawings
}                                                          # have pocket/teach.py for ImageNet


# ---- model ---------------------------------------------------------------------------------------

def efficientnet_features(name):
    """The convolutional part of an EfficientNetV2, stride 32, and its number of output channels."""
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
    net = tv.EfficientNet(settings, dropout=0.0, stochastic_depth_prob=0.0, last_channel=512,
                          norm_layer=partial(nn.BatchNorm2d, eps=1e-3))
    return net.features, 512


class SemanticCompressor(nn.Module):
    """(B, 3, 3H/4, 3W/4) in [0, 1] -> raw latents (B, 16, 3H/128, 3W/128)."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.backbone, channels = efficientnet_features(config.backbone)
        self.mapper = nn.Sequential(
            nn.Conv2d(channels, config.latent_channels, 1, bias=False),
            nn.BatchNorm2d(config.latent_channels, affine=config.affine))

    def forward(self, images):
        """images: at the compressor's size (see `resize`), in [0, 1]; normalised here as in E.2."""
        if images.shape[-2] % 32 or images.shape[-1] % 32:
            raise ValueError(f"the Semantic Compressor found an image of {images.shape[-2]}x"
                             f"{images.shape[-1]}, expected multiples of 32")
        mean = images.new_tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
        std = images.new_tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)
        return self.mapper(self.backbone((images - mean) / std))          # (B, 16, h, w)

    @property
    def scale(self):
        """(mean, standard deviation) of its raw latents."""
        return self.config.latent_mean, self.config.latent_std

    def standardise(self, latents):
        """Raw latents -> mean 0, standard deviation 1: what Stage C draws."""
        return (latents - self.config.latent_mean) / self.config.latent_std

    def unstandardise(self, latents):
        return latents * self.config.latent_std + self.config.latent_mean


def resize(images):
    """(B, 3, H, W) at Stage A's size -> (B, 3, 3H/4, 3W/4), bicubic (§3.1) with antialiasing.

    H and W must be multiples of 128, so that both grids are whole; ValueError otherwise.
    """
    H, W = images.shape[-2:]
    if H % 128 or W % 128:
        raise ValueError(f"found an image of {H}x{W}, expected sides that are multiples of 128")
    small = (H * 3 // 4, W * 3 // 4)
    return F.interpolate(images, small, mode="bicubic", antialias=True).clamp(0, 1)


@torch.no_grad()
def settle(model, images):
    """Measure the BatchNorm statistics of `model` anew, in place, on one batch of training images.

    images: (N, 3, 3H/4, 3W/4). Running statistics lag behind weights that change, and those of an
    average of weights (EMA) were never measured.
    """
    with torch.random.fork_rng():              # stochastic depth draws, training must not notice
        torch.optim.swa_utils.update_bn([images], model)


@torch.no_grad()
def latent_scale(model, images):
    """(mean, std) of the raw latents of `images` (at the compressor's size), in eval mode."""
    training = model.training
    latents = torch.cat([model.eval()(part) for part in images.split(32)]).float()
    model.train(training)
    if not latents.isfinite().all():
        raise ValueError("the compressor's latents are not finite any more, so nothing was "
                                 "saved; the checkpoint is the one before. Try a lower --lr")
    return latents.mean().item(), latents.std().item()


def measure(model, images, settled=False):
    """-> the Config of an averaged compressor with the scale of its latents, measured on `images`.

    settled: whether its BatchNorm statistics are those of its weights; if not they are measured.
    """
    if not settled:
        settle(model, images)
    mean, std = latent_scale(model, images)
    return replace(model.config, latent_mean=mean, latent_std=std)


# ---- training: there is no loop here, `python stage_b.py` trains this network with Stage B -------

from plumbing import checkpoint, cli


def new(preset, weights=None, trained=True, device="cpu"):
    """A compressor to train, with ImageNet's weights (§3.1) where the preset says so.

    preset: a name in PRESETS. weights: a Stage B checkpoint that holds one to go on with.
    trained: False freezes it, which takes weights. Raises UsageError.
    """
    if preset not in PRESETS:
        raise cli.UsageError(f"--compressor {preset}: expected one of {', '.join(PRESETS)}")
    model = SemanticCompressor(PRESETS[preset])
    if weights:
        found = load(weights)
        if found.config.backbone != model.config.backbone:
            raise cli.UsageError(f"{weights}: its compressor has the backbone "
                                 f"{found.config.backbone}, expected {model.config.backbone}, as "
                                 f"--compressor {preset} has it")
        model = found
    elif not trained:
        raise cli.UsageError("--compressor-share 0 leaves the compressor as it is: give the "
                             "checkpoint with a trained one as --init-from")
    elif model.config.imagenet:
        imagenet_weights(model)
    return model.to(device).train(trained).requires_grad_(trained)


def imagenet_weights(model):
    """Fill the backbone with torchvision's ImageNet weights (§3.1; a download)."""
    try:
        state = tv.EfficientNet_V2_S_Weights.DEFAULT.get_state_dict(progress=True)
    except OSError as error:                                              # URLError is an OSError
        raise cli.UsageError(
            f"the ImageNet weights of EfficientNetV2-S cannot be downloaded ({error}); go online "
            "once, or put efficientnet_v2_s-dd5fe13b.pth into ~/.cache/torch/hub/checkpoints/"
        ) from None
    prefix = "features."
    model.backbone.load_state_dict(
        {name[len(prefix):]: value for name, value in state.items() if name.startswith(prefix)})


def load(path, device="cpu"):
    """The trained compressor, in eval mode, from a Stage B checkpoint or a published one."""
    return checkpoint.rebuild(path, "compressor", SemanticCompressor, PRESETS["released"], device)


def cached(source, compressor):
    """latents.json of a folder that `cache` wrote, or None if `source` is something else.

    Raises UsageError if its latents are those of another compressor.
    """
    path = os.path.join(source, "latents.json")
    if not os.path.isfile(path):
        return None
    with open(path, encoding="utf-8") as file:
        found = json.load(file)
    if found["compressor"] != checkpoint.checksum(compressor.state_dict()):
        raise cli.UsageError(f"{source}: holds latents of another compressor than the one given; "
                             "write them again, into a new folder, with `python -m "
                             "tools.cache_latents`")
    return found
