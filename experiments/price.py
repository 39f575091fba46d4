"""What trainings cost in counted operations: E.1 to E.4 and the pocket recipe (Table 2).

    python -m experiments.efficiency --parts recipe [--size pocket]

A training step is counted as three forward passes. torch's own count of a backward pass is not
used: for a depthwise convolution it is many times too high. The frozen networks that a step runs,
compressor, first stage and text encoder, are counted once each. Left out: Stage A's discriminator
and VGG, optimizers, EMA, previews.
"""

import functools

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import semantic_compressor
import stage_a
import stage_b
import stage_c
from experiments import baseline_ldm
from plumbing import text
from plumbing.cli import UsageError

PAPER_HOURS = {"C": 24602, "B": 11000, "baseline": 25000}                 # §4, Table 2, §4.3
PHASES_C = (((12, 12), 500_000, 1536), ((24, 24), 364_000, 1536),         # E.3: latents, steps,
            ((24, 40), 4_000, 768), ((24, 24), 50_000, 384))              # batch
PHASES_B = ((512, 457_000, 512), (1024, 300_000, 128))                    # E.2: pixels, …


# ---- operations of one forward pass, a multiply-add is two ---------------------------------------

def forward_flops(make, *shapes):
    """Of make()(zeros of these shapes), on the device that holds no numbers; attention as two
    matrix products, as fused kernels have no formula everywhere.
    """
    with torch.device("meta"):
        model, inputs = make(), [torch.zeros(shape) for shape in shapes]
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model(*inputs)
    return counter.get_total_flops()


def tokens(config):
    """(1, L, E) of the text that a network with this config reads."""
    return 1, 24 if config.text_width == 128 else 77, config.text_width


@functools.cache
def of_c(config, grid):
    return forward_flops(lambda: stage_c.StageC(config), (1, config.latent_channels, *grid), (1,),
                         tokens(config))


@functools.cache
def of_b(preset, pixels):
    config = stage_b.PRESETS[preset]
    return forward_flops(lambda: stage_b.StageB(config), (1, 4, pixels // 4, pixels // 4), (1,),
                         (1, 16, pixels * 3 // 128, pixels * 3 // 128), tokens(config))


@functools.cache
def of_compressor(preset, height, width):
    """height, width: of the latent."""
    return forward_flops(lambda: semantic_compressor.SemanticCompressor(
        semantic_compressor.PRESETS[preset]).eval(), (1, 3, 32 * height, 32 * width))


@functools.cache
def of_a(preset, pixels, decoder=False):
    def make():
        model = stage_a.StageA(stage_a.PRESETS[preset]).eval()
        return (lambda x: model.decode(model.encode(x))) if decoder else model.encode
    return forward_flops(make, (1, 3, pixels, pixels))


@functools.cache
def of_baseline(preset, pixels=512):
    config = baseline_ldm.PRESETS[preset]
    side = pixels // (8 if preset == "paper" else 4)
    return forward_flops(lambda: baseline_ldm.LDM(config), (1, 4, side, side), (1,), tokens(config))


@functools.cache
def of_text(name):
    def make():
        tower = text.Tower(**text.TEXT_ENCODERS[name])
        return lambda ids: tower(ids.long(), None)
    return forward_flops(make, (1, text.TEXT_ENCODERS[name]["context_length"]))


def vae():
    """SD's VAE with random weights, from diffusers."""
    from diffusers import AutoencoderKL
    return AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4)


@functools.cache
def of_vae(pixels):
    """The encoder of SD's VAE."""
    try:
        return forward_flops(lambda: vae().encode, (1, 3, pixels, pixels))
    except ImportError:
        raise UsageError("the baseline's first stage is counted with diffusers, which is not "
                         "installed: `pip install diffusers`") from None


# ---- trainings: rows of (samples, operations that learn, operations of frozen networks) ----------

def samples(config):
    return config.steps * config.batch_size * config.accumulate


def training_of_c(name):
    """Stage C's four phases (E.3), by the network of a preset of stage_c.py."""
    config, rows = stage_c.PRESETS[name], []
    for grid, steps, batch in PHASES_C:
        n = steps * batch
        rows.append((n, 3 * n * of_c(config, grid),
                     n * (of_compressor("paper", *grid) + of_text(config.text_encoder))))
    return tuple(map(sum, zip(*rows)))


def paper():
    """{training: (samples, learning, frozen)} of E.1 to E.4."""
    b = tuple(map(sum, zip(*((
        n, 3 * n * (of_b("paper", pixels) + of_compressor("paper", *[pixels * 3 // 128] * 2)),
        n * (of_a("paper", pixels) + of_text("clip-h")))
        for pixels, n in ((pixels, steps * batch) for pixels, steps, batch in PHASES_B)))))
    a, base = stage_a.PRESETS["paper"], baseline_ldm.PRESETS["paper"]
    n_a, n = samples(a), base.steps * base.batch_size
    return {
        "Stage A (E.1)": (n_a, 3 * n_a * of_a("paper", a.crop, decoder=True), 0),
        "Stage B and compressor (E.2)": b,
        "Stage C, E.3's network": training_of_c("paper"),
        "Stage C, released network": training_of_c("released"),
        "Baseline LDM (E.4)": (n, 3 * n * of_baseline("paper"),
                               n * (of_vae(512) + of_text("clip-h")))}


def pocket(drawings=20_000):
    """The same of `make pocket`, without its text tower. B and C encode each drawing once."""
    from pocket import teach
    a, b, c = (stage.PRESETS["pocket"] for stage in (stage_a, stage_b, stage_c))
    n_a, n_t, n_b, n_c = map(samples, (a, teach.CONFIG, b, c))
    side = b.image_size * 3 // 128
    frozen = drawings * (of_compressor("pocket", side, side) + of_text("pocket"))
    return {
        "Stage A": (n_a, 3 * n_a * of_a("pocket", a.crop, decoder=True), 0),
        "compressor, pocket.teach": (n_t, 3 * n_t * of_compressor("pocket", side, side), 0),
        "Stage B": (n_b, 3 * n_b * of_b("pocket", b.image_size),
                    frozen + drawings * of_a("pocket", b.image_size)),
        "Stage C": (n_c, 3 * n_c * of_c(c, (side, side)), frozen)}


def report(size, measured=None):
    """The table and what follows from it, as text. measured: seconds of a step at pocket size, as
    efficiency.train_pocket gives them, for hours.
    """
    rows = pocket() if size == "pocket" else paper()
    lines = ["| training | samples | learns, FLOP | frozen networks, FLOP | all, FLOP |",
             "|---|---|---|---|---|"]
    lines += [f"| {name} | {n:,} | {learns:.2g} | {frozen:.2g} | {learns + frozen:.2g} |"
              for name, (n, learns, frozen) in rows.items()]
    if size == "pocket":
        total = sum(learns + frozen for _, learns, frozen in rows.values())
        lines.append(f"\nIn all {total / 1e12:,.0f} TFLOP.")
        for name, stage in (("A", stage_a), ("compressor + B", stage_b), ("C", stage_c)):
            for how, row in (measured or {}).get(name, {}).items():
                hours = row["seconds"] * stage.PRESETS["pocket"].steps / 3600
                lines.append(f"{name}, {how}: {hours:.2f} hours at the speed measured here.")
        return "\n".join(lines)
    base = "Baseline LDM (E.4)"
    lines.append("")
    for part, total in (("what learns", 2), ("all, no latents stored", 3)):
        learns = {name: sum(row[1:total]) for name, row in rows.items()}
        shares = (learns["Stage B and compressor (E.2)"] + learns[name] for name in rows
                  if name.startswith("Stage C"))
        lines.append("C + B in units of the baseline, {}: {:.1f} with E.3's network, {:.1f} with "
                     "the released one.".format(part, *(one / learns[base] for one in shares)))
    lines.append("A forward pass for one picture, C on 24x24 (1024 px) in units of the baseline on "
                 "64x64 (512 px): " + ", ".join(
                     f"{of_c(stage_c.PRESETS[name], (24, 24)) / of_baseline('paper'):.1f} ({name})"
                     for name in ("paper", "released")) + ".")
    lines.append("The paper's A100-hours: C {C:,}, B {B:,}, baseline about {baseline:,}.".format(
        **PAPER_HOURS))
    return "\n".join(lines)
