"""Stage A: a VQGAN that turns pixels into a latent 4 times smaller on each side, and back.

Trained first, used last: Stage B learns to draw Stage A's latents, and Stage A's decoder turns
what it drew into pixels (Würstchen, §3.1 and E.1).

    images (B, 3, H, W) in [0, 1]  --encode-->  latents (B, 4, H/4, W/4)  --decode-->  images
                                                   |  quantize: the nearest of 8,192 codes
                                                   v
                                                tokens (B, H/4, W/4)

Quantisation shapes the latent space while Stage A trains. Stage B works on the unquantised latents
(§3.1); for the decoder to learn those, too, 10 % of the training samples skip the quantiser (E.1).

    loss = 1.0 * MSE  +  0.1 * perceptual  +  w * adversarial  +  codebook + 0.25 * commitment
           w = 0 for the first 10,000 steps, then 0.01                                       (E.1)

Letters: B batch, C channels, H W height and width of the image, h w of a latent grid, K codes.
Architecture and attribute names are those of the published VQGAN (dome272/Wuerstchen, vqgan.py).

    python stage_a.py --data shards/                         paper size, for a GPU
    python stage_a.py --data shards/shapes --preset pocket   two CPU cores, minutes
"""

from dataclasses import asdict, dataclass, replace
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F


# ---- Config --------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Config:
    # architecture
    widths: tuple = (192, 384)         # official code; departs: E.1's "all 384" fits no known size
    decoder_blocks: int = 16           # paper, E.1: 23.1 M (its "18M" is `released`, with 12)
    latent_channels: int = 4           # paper, E.1
    codebook_size: int = 8192          # paper, §3.1
    latent_mean: float = 0.0           # of raw latents, measured when a checkpoint is written
    latent_std: float = 1.0            # likewise
    # loss
    mse_weight: float = 1.0            # paper, E.1
    perceptual_weight: float = 0.1     # paper, E.1
    adversarial_weight: float = 0.01   # paper, E.1
    adversarial_start: int = 10_000    # paper, E.1
    commitment: float = 0.25           # official code
    quantise_drop: float = 0.1         # paper, E.1
    perceptual: Literal["vgg16", "none"] = "vgg16"   # ours: E.1 names none; "none": no download
    revive_every: int = 100            # ours: steps between replacements of unused codes
    # data
    resize: int = 256                  # paper, E.1
    crop: int = 128                    # paper, E.1
    # filters by what the .json of a sample says (data.py); these values let all pass
    min_size: int = 0                  # shorter side of the original in pixels, at least
    min_aesthetic: float = 0.0         # LAION's aesthetic score, at least
    max_pwatermark: float = 1.0        # LAION's probability of a watermark, at most
    max_punsafe: float = 1.0           # LAION's probability of not being safe for work, at most
    # training
    steps: int = 500_000               # paper, E.1
    batch_size: int = 64               # ours: 64 x 4 is the 256 of E.1; 24.4 GiB, H200
    accumulate: int = 4
    lr: float = 1e-4                   # paper, E.1
    warmup: int = 0                    # paper gives none for Stage A
    cooldown: int = 0                  # ours: linear decay at the end; the paper names none
    grad_clip: float = 1.0             # official code (Stages B and C)
    seed: int = 0
    workers: int = 8
    log_every: int = 100
    preview_every: int = 1000
    save_every: int = 1000


PRESETS = {
    "paper": Config(),
    "released": Config(decoder_blocks=12, latent_mean=0.0, latent_std=0.3764),  # official code
    "pocket": Config(                  # ours: the same classes at a size for two CPU cores
        widths=(48, 96), decoder_blocks=3, codebook_size=1024, perceptual="none",
        resize=128, crop=64, steps=800, batch_size=32, accumulate=1, lr=2e-3, warmup=50,
        cooldown=400, workers=1, log_every=20, preview_every=200, save_every=100),
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


@torch.no_grad()
def nearest(x, codes):
    """Which of codes (K, C) is nearest to each x (B, h, w, C): least |c|^2 / 2 - x c, int64."""
    # not in bf16, which picks another code for one vector in seven; MPS has no float64
    rows = x.flatten(0, 2).to(torch.float32 if x.device.type == "mps" else torch.float64)
    with torch.autocast(x.device.type, enabled=False):
        c = codes.to(rows.dtype)                                          # (K, C)
        return torch.cat([torch.addmm(c.square().sum(1) / 2, some, c.T, alpha=-1).argmin(1)
                          for some in rows.split(16_384)]).view(x.shape[:3])    # in (16384, K)


class VectorQuantizer(nn.Module):
    """The codebook: each latent vector becomes the nearest of K codes (VQ-VAE)."""

    def __init__(self, codebook_size, channels):
        super().__init__()
        self.embedding = nn.Embedding(codebook_size, channels)            # (K, C)
        nn.init.uniform_(self.embedding.weight, -1 / codebook_size, 1 / codebook_size)

    def forward(self, latents, commitment):
        """(B, C, h, w) -> quantised (B, C, h, w), indices (B, h, w) int64, loss (scalar)."""
        indices = nearest(latents.permute(0, 2, 3, 1), self.embedding.weight)
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
        if len(config.widths) != 2:
            raise ValueError(f"Stage A found widths {config.widths}, expected two")
        (c0, c1), z = config.widths, config.latent_channels
        self.in_block = nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(3 * 4, c0, 1))
        self.down_blocks = nn.Sequential(
            ResBlock(c0, 4 * c0), nn.Conv2d(c0, c1, 4, stride=2, padding=1), ResBlock(c1, 4 * c1),
            # BatchNorm holds the latents at unit variance, without a KL term
            nn.Sequential(nn.Conv2d(c1, z, 1, bias=False), nn.BatchNorm2d(z)))
        self.vquantizer = VectorQuantizer(config.codebook_size, z)
        self.up_blocks = nn.Sequential(
            nn.Sequential(nn.Conv2d(z, c1, 1)),
            *[ResBlock(c1, 4 * c1) for _ in range(config.decoder_blocks)],
            nn.ConvTranspose2d(c1, c0, 4, stride=2, padding=1), ResBlock(c0, 4 * c0))
        self.out_block = nn.Sequential(nn.Conv2d(c0, 3 * 4, 1), nn.PixelShuffle(2))

    def encode(self, images):
        """(B, 3, H, W) in [0, 1] -> unquantised latents (B, 4, H/4, W/4)."""
        if any(side % 4 for side in images.shape[-2:]):
            raise ValueError(f"Stage A found images {tuple(images.shape)}, expected multiples of 4")
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
        """Random codes (B, 4, h, w), standardised: Stage B's start (§3.3). generators: one each."""
        indices = torch.stack([torch.randint(self.config.codebook_size, shape[2:], generator=one)
                               for one in generators or [None] * shape[0]])      # (B, h, w)
        codes = self.vquantizer.embedding(indices.to(self.vquantizer.embedding.weight.device))
        return self.standardise(codes.permute(0, 3, 1, 2))                # (B, 4, h, w)


# ---- a network that only judges ------------------------------------------------------------------

class PatchDiscriminator(nn.Module):
    """Patch discriminator of Esser et al. (2021), whom E.1 names: one logit for each 70x70 patch.

    departs: the official repository has another (spectral norm, a last sigmoid); nothing trains it.
    """

    def __init__(self, width=64):
        super().__init__()
        layers = [nn.Conv2d(3, width, 4, 2, 1), nn.LeakyReLU(0.2)]
        for c, stride in ((width, 2), (2 * width, 2), (4 * width, 1)):
            layers += [nn.Conv2d(c, 2 * c, 4, stride, 1, bias=False), nn.BatchNorm2d(2 * c),
                       nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(8 * width, 1, 4, 1, 1))
        for layer in self.layers:                                 # Esser et al., after pix2pix
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, 0.0, 0.02)
            elif isinstance(layer, nn.BatchNorm2d):
                nn.init.normal_(layer.weight, 1.0, 0.02)          # its bias is 0

    def forward(self, images):                                            # (B, 3, H, W) in [0, 1]
        return self.layers(images * 2 - 1)                                # (B, 1, H/8 - 2, W/8 - 2)


# ---- loss ----------------------------------------------------------------------------------------

def loss(model, images, perceptual=None, discriminator=None, drop=None):
    """What the encoder, codebook and decoder minimise (E.1): -> scalar, and a dict of what it saw.

    images: (B, 3, H, W) in [0, 1]. perceptual: a distance of two batches of images, or None.
    discriminator: None before its start step. drop: (B,) bool, the samples that skip the quantiser,
    drawn if None. The dict: decoded images, latents, indices and mse, without a gradient.
    """
    config = model.config
    latents = model.encode(images)                                        # (B, 4, H/4, W/4)
    quantised, indices, vq_loss = model.quantize(latents)                 # indices (B, H/4, W/4)
    if drop is None:
        drop = torch.rand(len(images), device=images.device) < config.quantise_drop
    decoded = model.decode(torch.where(drop.view(-1, 1, 1, 1), latents, quantised))  # like images
    mse = F.mse_loss(decoded, images)
    total = config.mse_weight * mse + vq_loss
    if perceptual is not None:
        total = total + config.perceptual_weight * perceptual(decoded, images)
    if discriminator is not None:
        # Hinge GAN, generator's side: raise the logits of what we decoded. E.1 has a fixed weight;
        # Esser et al. balance it by gradient norms.
        total = total - config.adversarial_weight * discriminator(decoded).mean()
    return total, dict(decoded=decoded.detach(), latents=latents.detach(), indices=indices,
                       mse=mse.detach())


def discriminator_loss(discriminator, real, decoded):
    """Hinge loss: logits of real patches above 1, of decoded ones below -1. Returns a scalar."""
    return 0.5 * (F.relu(1 - discriminator(real)).mean()
                  + F.relu(1 + discriminator(decoded.detach())).mean())


class CodeUsage(nn.Module):
    """Which codes were chosen since the last revival, and the revival of those that were not.

    The released initialisation (±1/K) lies far inside latents of unit variance: a few outer codes
    would win everything and the rest never get a gradient. At step 0 no code counts as used.
    """

    def __init__(self, codebook_size):
        super().__init__()
        self.register_buffer("used", torch.zeros(codebook_size, dtype=torch.bool))     # (K,)

    @torch.no_grad()
    def revive(self, codes, latents):
        """Put every unused one of `codes` (K, C) onto a random vector of `latents` (B, C, h, w)."""
        rows = latents.permute(0, 2, 3, 1).flatten(0, 2)                  # (B*h*w, C)
        picked = rows[torch.randint(len(rows), self.used.shape, device=rows.device)]   # (K, C)
        codes.copy_(torch.where(self.used[:, None], codes, picked.to(codes.dtype)))


@torch.no_grad()
def latent_scale(model, images):
    """(mean, std) of the latents of `images` in eval mode: the scale that the checkpoint keeps."""
    training = model.training
    latents = torch.cat([model.eval().encode(part) for part in images.split(32)]).float()
    model.train(training)
    if not latents.isfinite().all():
        raise ValueError("Stage A's latents are not finite any more, so nothing was saved; the "
                         "checkpoint is the one before. Try a lower --lr")
    return latents.mean().item(), latents.std().item()


# ---- training ------------------------------------------------------------------------------------

import data
from plumbing import checkpoint, cli, pictures, training


def train(config, source, out):
    """Train on images (captions are not used). Goes on by itself if `out` holds a run."""
    device = training.setup(config.seed)
    dataset = data.CaptionedImages(source, resize=config.resize, crop=config.crop, seed=config.seed,
                                   filters=data.filters(config))
    preview_batch = data.preview_batch(dataset, 128, device)["images"]    # and to measure the scale

    run = training.Run("A", config, out, device, samples=len(dataset))
    model = training.synchronised(StageA(config).to(device).train())
    discriminator = training.synchronised(PatchDiscriminator().to(device).train())
    perceptual = None if config.perceptual == "none" else VGG16Perceptual().to(device)
    usage = CodeUsage(config.codebook_size).to(device)
    # AdamW and lr: paper, E.1, which names no betas. Esser et al. have (.5, .9) for both networks;
    # the VQGAN departs: torch's (.9, .999), with which the weights in pocket/ were trained.
    optimizer = torch.optim.AdamW(model.parameters(), config.lr, fused=True)
    optimizer_d = torch.optim.AdamW(discriminator.parameters(), config.lr, (0.5, 0.9), fused=True)
    batches = data.Stream(dataset, config, device)
    run.restore(model=model, discriminator=discriminator, usage=usage, optimizer=optimizer,
                optimizer_d=optimizer_d, batches=batches)
    codes = model.vquantizer.embedding.weight.data                        # (K, 4)

    for step in run.steps():
        judge = discriminator if step >= config.adversarial_start else None
        for one in (optimizer, optimizer_d):
            one.zero_grad(set_to_none=True)
        for _ in range(config.accumulate):
            images = next(batches)["images"]                              # (B, 3, crop, crop)
            if step == 0:                                                 # data-dependent codebook
                usage.revive(codes, model.encode(images))
                training.agree(usage.used, codes)
            discriminator.requires_grad_(False)                           # here it only judges …
            with training.autocast(device):
                value, found = loss(model, images, perceptual, judge)
            usage.used[found["indices"]] = True
            # backward
            (value / config.accumulate).backward()
            if judge:                                                     # … here it only learns
                discriminator.requires_grad_(True)
                with training.autocast(device):
                    value_d = discriminator_loss(discriminator, images, found["decoded"].float())
                (value_d / config.accumulate).backward()
        # clip, lr, step
        grads = []
        for net in (model, judge) if judge else (model,):
            training.average_gradients(net.parameters())
            grads.append(nn.utils.clip_grad_norm_(net.parameters(), config.grad_clip))
        lr = training.learning_rate(step, config)
        for group in optimizer.param_groups + optimizer_d.param_groups:
            group["lr"] = lr
        if run.finite(sum(grads)):
            optimizer.step()
            if judge:
                optimizer_d.step()
        # log, codebook
        training.agree(usage.used, codes)                                 # what any process used
        run.log(loss=value, mse=found["mse"], grad=grads[0], lr=lr,
                psnr=pictures.psnr(found["decoded"], images), codes_used=usage.used.float().mean())
        if run.step % config.revive_every == 0 and not run.in_a_row:
            usage.revive(codes, found["latents"])
            training.agree(usage.used, codes)
            usage.used.zero_()
        # preview, checkpoint
        if run.due("preview"):
            preview(model, preview_batch[:8], run.preview)
        if run.due("save"):
            mean, std = latent_scale(model, preview_batch)
            run.save(config=asdict(replace(config, latent_mean=mean, latent_std=std)))


class VGG16Perceptual(nn.Module):
    """Distance of two pictures in the features of an ImageNet VGG16, at five depths.

    LPIPS (Zhang et al., 2018) without its learned channel weights: features scaled to unit length.
    """

    def __init__(self, weights="DEFAULT"):
        super().__init__()
        import torchvision                                                # for training alone
        try:
            features = torchvision.models.vgg16(weights=weights).features[:30]
        except OSError as error:                                          # URLError is an OSError
            raise cli.UsageError(f"the ImageNet weights of VGG16 cannot be downloaded ({error}); "
                                 "go online once, put vgg16-397923af.pth into ~/.cache/torch/hub/"
                                 "checkpoints/, or train with --perceptual none") from None
        self.features = features.eval().requires_grad_(False)
        self.depths = (3, 8, 15, 22, 29)                              # the ReLU before each pooling
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1))

    def forward(self, a, b):                                  # two (B, 3, H, W) in [0, 1] -> scalar
        distance = 0.0
        a, b = (a - self.mean) / self.std, (b - self.mean) / self.std
        for depth, layer in enumerate(self.features):
            a, b = layer(a), layer(b)
            if depth in self.depths:
                difference = F.normalize(a, dim=1) - F.normalize(b, dim=1)
                distance = distance + difference.square().sum(1).mean()
        return distance


@torch.no_grad()
def preview(model, images, path):
    """Top row: images. Below: decoded from the quantised and from the unquantised latents."""
    model.eval()
    latents = model.encode(images)
    rows = [images, model.decode(model.quantize(latents)[0]), model.decode(latents)]
    model.train()
    pictures.grid(torch.cat(rows).float().cpu(), columns=len(images), scale=2).save(path)


def load(path, device="cpu"):
    """A trained StageA, in eval mode, from a checkpoint of ours or a published one."""
    return checkpoint.rebuild(path, "A", StageA, PRESETS["released"], device)


if __name__ == "__main__":
    from pocket import shapes
    training.command("a", train, Config, PRESETS, __doc__, shapes.source)
