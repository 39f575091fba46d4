"""Stage A: a VQGAN that turns pixels into a latent 4 times smaller on each side, and back.

Trained first, used last: Stage B learns to draw Stage A's latents, and Stage A's decoder turns
what it drew into pixels (Würstchen, §3.1 and Appendix E.1).

    images (B, 3, H, W) in [0, 1]  --encode-->  latents (B, 4, H/4, W/4)  --decode-->  images
                                                   |  quantize: the nearest of 8,192 codes
                                                   v
                                                tokens (B, H/4, W/4)

Quantisation shapes the latent space while Stage A trains and is dropped afterwards: Stage B works
on the unquantised latents (§3.1). So that the decoder is used to them, 10 % of the training
samples skip the quantiser (E.1).

    loss = 1.0 * MSE  +  0.1 * perceptual  +  w * adversarial  +  codebook + 0.25 * commitment
           w = 0 for the first 10,000 steps, then 0.01                                       (E.1)

Letters: B batch, C channels, H W height and width of the image, h w of a latent grid, K codes.
Architecture follows the published v1/v2 VQGAN (dome272/Wuerstchen, vqgan.py): same attribute
names, so that its weights load without renaming.

    python stage_a.py --data shards/                         paper size, for a GPU
    python stage_a.py --data shards/shapes --preset pocket   two CPU cores, minutes

A healthy pocket run prints: psnr above 20 after 100 steps and rising, codes_used above .9 at 300.
"""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F


# ---- Config --------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Config:
    # architecture
    widths: tuple = (192, 384)         # official code. departs: with E.1's "all 384" neither
                                       # published number of parameters comes out
    decoder_blocks: int = 16           # paper, E.1: 23.1 M (its "18M" is `released`, with 12)
    latent_channels: int = 4           # paper, E.1
    codebook_size: int = 8192          # paper, §3.1
    # scale of the latents, standardised = (raw - mean) / std: measured when a checkpoint is written
    latent_mean: float = 0.0
    latent_std: float = 1.0
    # loss
    mse_weight: float = 1.0            # paper, E.1
    perceptual_weight: float = 0.1     # paper, E.1
    adversarial_weight: float = 0.01   # paper, E.1
    adversarial_start: int = 10_000    # paper, E.1
    commitment: float = 0.25           # official code
    quantise_drop: float = 0.1         # paper, E.1
    perceptual: Literal["vgg16", "none"] = "vgg16"   # ours: the paper names no network;
                                       # "none" needs no download
    revive_every: int = 100            # ours: steps between replacements of unused codes
    # data
    resize: int = 256                  # paper, E.1
    crop: int = 128                    # paper, E.1
    min_size: int = 0                  # filters by the .json of each sample (data.py): these four
    min_aesthetic: float = 0.0         # values let all pass; README: the released scripts'
    max_pwatermark: float = 1.0
    max_punsafe: float = 1.0
    # training
    steps: int = 500_000               # paper, E.1
    batch_size: int = 256              # paper, E.1
    accumulate: int = 1
    lr: float = 1e-4                   # paper, E.1
    warmup: int = 0                    # paper gives none for Stage A
    cooldown: int = 0                  # ours: linear decay at the end; the paper names none
    grad_clip: float = 1.0             # official code (Stages B and C)
    seed: int = 0
    workers: int = 8
    compile: bool = False
    log_every: int = 100
    preview_every: int = 1000
    save_every: int = 1000


PRESETS = {
    "paper": Config(),
    "released": Config(decoder_blocks=12, latent_mean=0.0, latent_std=0.3764),  # official code
    "pocket": Config(                  # ours: the same classes at a size for two CPU cores
        widths=(48, 96), decoder_blocks=3, codebook_size=1024, perceptual="none",
        resize=128, crop=64, steps=800, batch_size=32, lr=2e-3, warmup=50, cooldown=400, workers=1,
        log_every=20, preview_every=200, save_every=100),
}


# ---- blocks --------------------------------------------------------------------------------------

class ResBlock(nn.Module):
    """ConvNeXt block with six scalar gammas (vqgan.py of the official code); the identity at init.

    Two residual branches: a depthwise 3x3 convolution over space, a two-layer MLP over channels.
    gammas[0], [1] scale and shift the first norm, [2] its branch; [3], [4], [5] likewise.
    """

    def __init__(self, c, c_hidden):
        super().__init__()
        self.norm1 = nn.LayerNorm(c, elementwise_affine=False, eps=1e-6)
        self.depthwise = nn.Sequential(nn.ReplicationPad2d(1), nn.Conv2d(c, c, 3, groups=c))
        self.norm2 = nn.LayerNorm(c, elementwise_affine=False, eps=1e-6)
        self.channelwise = nn.Sequential(nn.Linear(c, c_hidden), nn.GELU(), nn.Linear(c_hidden, c))
        self.gammas = nn.Parameter(torch.zeros(6))
        for layer in (self.depthwise[1], self.channelwise[0], self.channelwise[2]):
            nn.init.xavier_uniform_(layer.weight)                         # official code
            nn.init.zeros_(layer.bias)

    def forward(self, x):                                                 # (B, C, h, w)
        g = self.gammas
        y = self.norm1(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)         # LayerNorm over channels
        x = x + self.depthwise(y * (1 + g[0]) + g[1]) * g[2]
        y = self.norm2(x.permute(0, 2, 3, 1)) * (1 + g[3]) + g[4]         # (B, h, w, C)
        return x + self.channelwise(y).permute(0, 3, 1, 2) * g[5]         # (B, C, h, w)


class VectorQuantizer(nn.Module):
    """The codebook: each latent vector becomes the nearest of K codes (VQ-VAE)."""

    def __init__(self, codebook_size, channels):
        super().__init__()
        self.embedding = nn.Embedding(codebook_size, channels)            # (K, C)
        nn.init.uniform_(self.embedding.weight, -1 / codebook_size, 1 / codebook_size)

    def forward(self, latents, commitment):
        """(B, C, h, w) -> quantised (B, C, h, w), indices (B, h, w) int64, loss (scalar)."""
        x = latents.permute(0, 2, 3, 1)                                   # (B, h, w, C)
        codes = self.embedding.weight
        # The nearest code, 32,768 vectors at a time. In float32 and without a matrix product, even
        # under autocast: distances from bf16 pick another code for one vector in seven.
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            indices = torch.cat([
                torch.cdist(rows.float(), codes, compute_mode="donot_use_mm_for_euclid_dist")
                .argmin(1) for rows in x.flatten(0, 2).split(32_768)])    # (n, K) -> (n,)
            indices = indices.view(x.shape[:3])                           # (B, h, w)
        quantised = self.embedding(indices).permute(0, 3, 1, 2)           # (B, C, h, w)
        # The first term moves codes towards latents, the second latents towards codes.
        vq_loss = (F.mse_loss(quantised, latents.detach())
                   + commitment * F.mse_loss(latents, quantised.detach()))
        # Straight-through: forward the code, backward as if nothing had happened.
        return latents + (quantised - latents).detach(), indices, vq_loss


# ---- model ---------------------------------------------------------------------------------------

class StageA(nn.Module):
    """VQGAN, f4. Images are (B, 3, H, W) in [0, 1] with H and W multiples of 4; latents are raw."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        c0, c1 = config.widths
        z = config.latent_channels
        self.in_block = nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(3 * 4, c0, 1))
        self.down_blocks = nn.Sequential(
            ResBlock(c0, 4 * c0),
            nn.Conv2d(c0, c1, 4, stride=2, padding=1),
            ResBlock(c1, 4 * c1),
            # BatchNorm holds the latents at unit variance, without a KL term
            nn.Sequential(nn.Conv2d(c1, z, 1, bias=False), nn.BatchNorm2d(z)))
        self.vquantizer = VectorQuantizer(config.codebook_size, z)
        self.up_blocks = nn.Sequential(
            nn.Sequential(nn.Conv2d(z, c1, 1)),
            *[ResBlock(c1, 4 * c1) for _ in range(config.decoder_blocks)],
            nn.ConvTranspose2d(c1, c0, 4, stride=2, padding=1),
            ResBlock(c0, 4 * c0))
        self.out_block = nn.Sequential(nn.Conv2d(c0, 3 * 4, 1), nn.PixelShuffle(2))

    def encode(self, images):
        """(B, 3, H, W) in [0, 1] -> unquantised latents (B, 4, H/4, W/4).

        ValueError if H or W is not a multiple of 4.
        """
        if images.shape[-2] % 4 or images.shape[-1] % 4:
            raise ValueError(f"Stage A found an image of {images.shape[-2]}x{images.shape[-1]}, "
                             "expected height and width to be multiples of 4")
        return self.down_blocks(self.in_block(images))

    def quantize(self, latents):
        """(B, 4, h, w) -> quantised (B, 4, h, w), indices (B, h, w), codebook + commitment loss."""
        return self.vquantizer(latents, self.config.commitment)

    def decode(self, latents):
        """(B, 4, h, w), quantised or not -> images (B, 3, 4h, 4w), about [0, 1], not clamped."""
        return self.out_block(self.up_blocks(latents))

    def standardise(self, latents):
        """Raw latents -> mean 0, standard deviation 1: what Stage B draws."""
        return (latents - self.config.latent_mean) / self.config.latent_std

    def unstandardise(self, latents):
        return latents * self.config.latent_std + self.config.latent_mean

    def random_tokens(self, shape, generators=None):
        """Codes drawn at random, standardised: where Stage B's sampling starts (§3.3).

        shape: (B, 4, h, w). generators: None, or one torch.Generator for each sample.
        """
        indices = torch.stack([                                           # (B, h, w)
            torch.randint(self.config.codebook_size, shape[2:],
                          generator=generators[i] if generators else None)
            for i in range(shape[0])])
        codes = self.vquantizer.embedding(indices.to(self.vquantizer.embedding.weight.device))
        return self.standardise(codes.permute(0, 3, 1, 2))                # (B, 4, h, w)


# ---- the two networks that only judge ------------------------------------------------------------

class PatchDiscriminator(nn.Module):
    """Patch discriminator of Esser et al. (2021): one logit for each 70x70 patch, not one an image.

    departs: the official repository has another one (spectral norm, sigmoid at its end) that no
    training script uses; the paper says "trained as described by Esser et al.".
    """

    def __init__(self, width=64):
        super().__init__()
        layers, c = [nn.Conv2d(3, width, 4, 2, 1), nn.LeakyReLU(0.2)], width
        for stride in (2, 2, 1):
            c_next = min(2 * c, 8 * width)
            layers += [nn.Conv2d(c, c_next, 4, stride, 1, bias=False), nn.BatchNorm2d(c_next),
                       nn.LeakyReLU(0.2)]
            c = c_next
        self.layers = nn.Sequential(*layers, nn.Conv2d(c, 1, 4, 1, 1))
        for layer in self.layers:
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, 0.0, 0.02)               # Esser et al., after pix2pix

    def forward(self, images):                                            # (B, 3, H, W) in [0, 1]
        return self.layers(images * 2 - 1)                                # (B, 1, H/8 - 2, W/8 - 2)


class VGG16Perceptual(nn.Module):
    """Distance of two pictures in the features of an ImageNet VGG16, at five depths.

    LPIPS (Zhang et al., 2018) without its learned channel weights: features scaled to unit length.
    """

    def __init__(self, weights="DEFAULT"):
        super().__init__()
        import torchvision
        features = torchvision.models.vgg16(weights=weights).features[:30]
        self.features = features.eval().requires_grad_(False)
        self.depths = (3, 8, 15, 22, 29)                              # the ReLU before each pooling
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1))

    def forward(self, a, b):
        """Two (B, 3, H, W) in [0, 1] -> scalar."""
        distance = 0.0
        a, b = (a - self.mean) / self.std, (b - self.mean) / self.std
        for depth, layer in enumerate(self.features):
            a, b = layer(a), layer(b)
            if depth in self.depths:
                difference = F.normalize(a, dim=1) - F.normalize(b, dim=1)
                distance = distance + difference.square().sum(1).mean()
        return distance


def perceptual_network(name):
    """"vgg16" -> the network with its ImageNet weights (a download); "none" -> None."""
    if name == "none":
        return None
    if name != "vgg16":
        raise ValueError(f"--perceptual {name}: found an unknown network, expected vgg16 or none")
    try:
        return VGG16Perceptual()
    except OSError as error:                                              # URLError is an OSError
        raise ValueError(f"the ImageNet weights of VGG16 could not be downloaded ({error}); go online "
                 "once, put vgg16-397923af.pth into ~/.cache/torch/hub/checkpoints/, or train with "
                 "--perceptual none")


# ---- loss ----------------------------------------------------------------------------------------

def loss(model, images, perceptual=None, discriminator=None, drop=None, record=None):
    """What the encoder, codebook and decoder minimise (E.1).

    images: (B, 3, H, W) in [0, 1]. discriminator: None before its start step. drop: (B,) bool,
    the samples that skip the quantiser; drawn with 10 % if None. record: a dict that receives the
    reconstruction, latents, indices and mse of this call. Returns a scalar.
    """
    config = model.config
    latents = model.encode(images)                                        # (B, 4, H/4, W/4)
    quantised, indices, vq_loss = model.quantize(latents)
    if drop is None:
        drop = torch.rand(len(images), device=images.device) < config.quantise_drop
    decoded = model.decode(torch.where(drop.view(-1, 1, 1, 1), latents, quantised))
    mse = F.mse_loss(decoded, images)
    total = config.mse_weight * mse + vq_loss
    if perceptual is not None:
        total = total + config.perceptual_weight * perceptual(decoded, images)
    if discriminator is not None:
        # Hinge GAN, generator's side: raise the logits of what we decoded. The weight is fixed
        # (E.1); Esser et al. instead balance it by gradient norms.
        total = total - config.adversarial_weight * discriminator(decoded).mean()
    if record is not None:
        record.update(decoded=decoded.detach(), latents=latents.detach(), indices=indices,
                      mse=mse.detach())
    return total


def discriminator_loss(discriminator, real, decoded):
    """Hinge loss: logits of real patches above 1, of decoded ones below -1. Returns a scalar."""
    return 0.5 * (F.relu(1 - discriminator(real)).mean()
                  + F.relu(1 + discriminator(decoded.detach())).mean())


@torch.no_grad()
def revive_codes(model, latents, used):
    """Put every code that `used` (K,) bool does not name onto a random latent of this batch.

    The released initialisation (±1/K) lies far inside latents of unit variance: a few outer codes
    would win everything and the rest never get a gradient. Called at step 0 for all codes.
    """
    rows = latents.permute(0, 2, 3, 1).flatten(0, 2)                      # (B*h*w, C)
    picked = rows[torch.randint(len(rows), used.shape, device=rows.device)]   # (K, C)
    codes = model.vquantizer.embedding.weight
    codes.copy_(torch.where(used[:, None], codes, picked.to(codes.dtype)))


@torch.no_grad()
def latent_scale(model, images):
    """(mean, std) of the latents of `images` in eval mode: the scale that the checkpoint keeps."""
    training = model.training
    latents = torch.cat([model.eval().encode(part) for part in images.split(32)]).float()
    model.train(training)
    if not latents.isfinite().all():
        raise ValueError("Stage A's latents are not finite any more, so nothing was saved; "
                                 "the checkpoint is the one before. Try a lower --lr")
    return latents.mean().item(), latents.std().item()


# ---- training ------------------------------------------------------------------------------------

def train(config, source, out):
    """Train on images (captions are not used). Goes on by itself if `out` holds a run."""
    import data
    from plumbing import checkpoint, pictures, training

    device, rank, world = training.setup(config.seed)
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    dataset = data.CaptionedImages(source, resize=config.resize, crop=config.crop, seed=config.seed,
                                   filters=data.filters(config))

    model = training.synchronised(StageA(config).to(device).train(), world)
    discriminator = training.synchronised(PatchDiscriminator().to(device).train(), world)
    perceptual = perceptual_network(config.perceptual)
    perceptual = perceptual.to(device) if perceptual else None
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, fused=True)
    optimizer_d = torch.optim.AdamW(discriminator.parameters(), lr=config.lr, fused=True)
    used = torch.zeros(config.codebook_size, dtype=torch.bool, device=device)
    start, position = 0, (0, 0)
    first = data.CaptionedImages(source, resize=config.resize, crop=config.crop, center=True,
                                 filters=data.filters(config))
    fixed = next(data.stream(first, 128, seed=config.seed))["images"].to(device)   # preview, scale

    given = dict(samples=len(dataset))
    state = checkpoint.resume(out / "checkpoint.pt", "A", config, device, rank, given)
    if state:
        model.load_state_dict(state["model"])
        discriminator.load_state_dict(state["discriminator"])
        optimizer.load_state_dict(state["optimizer"])
        optimizer_d.load_state_dict(state["optimizer_d"])
        used.copy_(state["used"])
        start, position, state = state["step"], state["position"], None   # its memory is needed
    elif rank:
        torch.manual_seed(config.seed + rank)                             # other noise on each rank
    if config.compile:
        model.down_blocks.compile()
        model.up_blocks.compile()

    batches = data.stream(dataset, config.batch_size, config.seed, position, rank, world,
                          config.workers)
    log, guard, stop = training.Log(out, config, start, rank, world), training.NanGuard(), training.StopSignal()
    for step in range(start, config.steps):
        optimizer.zero_grad(set_to_none=True)
        optimizer_d.zero_grad(set_to_none=True)
        adversarial = step >= config.adversarial_start
        for _ in range(config.accumulate):
            # batch
            batch = next(batches)
            images = batch["images"].to(device)                           # (B, 3, crop, crop)
            position = batch["position"]
            # loss
            record = {}
            if step == 0:                                                 # data-dependent codebook
                with torch.no_grad():
                    revive_codes(model, model.encode(images), used)
                training.agree(used, model.vquantizer.embedding.weight.data, world)
            discriminator.requires_grad_(False)                           # it only judges here …
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                value = loss(model, images, perceptual, discriminator if adversarial else None,
                             record=record)
            used[record["indices"].flatten()] = True
            # backward
            (value / config.accumulate).backward()
            if adversarial:
                discriminator.requires_grad_(True)                        # … and only learns here
                with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                    value_d = discriminator_loss(discriminator, images, record["decoded"].float())
                (value_d / config.accumulate).backward()
        # clip
        training.average_gradients(model.parameters(), world)
        grad = nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        grad_d = torch.zeros(())
        if adversarial:
            training.average_gradients(discriminator.parameters(), world)
            grad_d = nn.utils.clip_grad_norm_(discriminator.parameters(), config.grad_clip)
        # lr, step
        lr = training.learning_rate(step, config)
        for group in optimizer.param_groups + optimizer_d.param_groups:
            group["lr"] = lr
        if not guard.is_bad(grad + grad_d.to(device), step):
            optimizer.step()
            if adversarial:
                optimizer_d.step()
        done, last = step + 1, stop.now(device, world) or step + 1 == config.steps
        code_use = used.float().mean()                                    # since the last revival
        if done % config.revive_every == 0:
            training.agree(used, model.vquantizer.embedding.weight.data, world)
            revive_codes(model, record["latents"], used)
            training.agree(used, model.vquantizer.embedding.weight.data, world)
            used.zero_()
        # log
        log.step(len(images) * config.accumulate * world)
        if done % config.log_every == 0 or last:
            log.write(done, loss=value.item(), mse=record["mse"].item(), grad=grad.item(), lr=lr,
                      psnr=pictures.psnr(record["decoded"], images), codes_used=code_use.item(),
                      skipped=guard.skipped)
        # checkpoint
        if rank == 0 and (done % config.save_every == 0 or last):
            mean, std = latent_scale(model, fixed)
            checkpoint.save_checkpoint(out / "checkpoint.pt", dict(
                stage="A", config=asdict(replace(config, latent_mean=mean, latent_std=std)),
                step=done, position=position, model=model.state_dict(), used=used,
                discriminator=discriminator.state_dict(), optimizer=optimizer.state_dict(),
                optimizer_d=optimizer_d.state_dict(), random=checkpoint.random_state(device), **given))
            log.pause()
        # preview
        if rank == 0 and (done % config.preview_every == 0 or last):
            preview(model, fixed[:8], out / f"preview_{done:07d}.png")
            log.pause()
        if last:
            break
    log.finish(out, stop)


@torch.no_grad()
def preview(model, images, path):
    """Top row: images. Below: decoded from the quantised and from the unquantised latents."""
    from plumbing import pictures
    model.eval()
    latents = model.encode(images)
    rows = [images, model.decode(model.quantize(latents)[0]), model.decode(latents)]
    model.train()
    pictures.grid(torch.cat(rows).float().cpu(), columns=len(images), scale=2).save(path)


def load(path, device="cpu"):
    """A trained StageA, in eval mode, from a checkpoint of ours or a published one."""
    from plumbing import checkpoint
    return checkpoint.rebuild(path, "A", StageA, PRESETS["released"], device)


if __name__ == "__main__":
    from plumbing import cli
    from pocket import shapes
    config, args = cli.parse(
        Config, PRESETS, __doc__, data=(None, "shards or a folder of captioned images (data.py)"),
        out=(None, "folder of this run (default runs/PRESET/stage_a)"))
    cli.start(train, config, shapes.source(args), args.out or f"runs/{args.preset}/stage_a")
