"""One change, named; then Stage C's training, its sampling or a study with that change.

    python -m experiments.lab eps train                      a small Stage C, 100 steps: a minute
    python -m experiments.lab eps sample "a red star" --weights runs/lab/eps
    python -m experiments.lab shuffled prompt_accuracy --weights pocket --n 60

The first word is one of VARIANTS, the second one of PROGRAMS; what follows are that program's own
options. `train` is stage_c.py with the settings SMALL, into runs/lab/VARIANT. docs/lab.md has the
exercises. A checkpoint is sampled with the change that it was trained with.
"""

import random
import sys

import torch

import sample
import stage_c
from experiments import classes, prompt_accuracy, start
from plumbing import cli, text, training
from plumbing.cli import UsageError
from pocket import shapes
from semantic_compressor import SemanticCompressor

DRAWINGS = "shards/lab"                                       # 1,000, made when they are not there
SMALL = ("--preset pocket --width 96 --depth 2 --steps 100 --batch-size 64 --warmup 20 "
         "--cooldown 0 --log-every 10").split()


def plain():
    """Nothing changes."""


def eps():
    """The head is eps_hat = B: 0 at init, as usual in diffusion models."""
    stage_c.ab_to_eps = lambda x_t, a, b: b


def v():
    """The head predicts v (Salimans & Ho, 2022); v_hat = 0 at init. The loss is that of eps."""
    class StageC(stage_c.StageC):
        def forward(self, x_t, t, *conditions):
            a_bar = stage_c.alpha_bar(t).view(-1, 1, 1, 1)
            v_hat = super().forward(x_t, t, *conditions)      # by the head `eps`: B as it is
            return (1 - a_bar).sqrt() * x_t + a_bar.sqrt() * v_hat
    StageC.__module__ = stage_c.__name__                      # where a checkpoint's probe looks
    eps()
    stage_c.StageC = StageC


def min_snr():
    """The loss's weight is min(SNR, 5) / SNR (Hang et al., 2023) in place of p2."""
    def weight(t, form=None):
        a_bar = stage_c.alpha_bar(t)
        return (5 * (1 - a_bar) / a_bar).clamp(max=1)
    stage_c.p2_weight = weight


def linear():
    """C's schedule is alpha_bar = 1 - t, in training and sampling, with the same clamps."""
    stage_c.alpha_bar = lambda t: (1 - t).clamp(1e-4, 0.9999)


def shuffled():
    """The words of each caption in an order that follows from the caption, for C and B."""
    known = text.TextEncoder.forward

    def forward(self, captions):
        words = [one.split() for one in captions]
        return known(self, [" ".join(random.Random(str(one)).sample(one, len(one)))
                            for one in words])
    text.TextEncoder.forward = forward


def four():
    """Of the compressor's 16 channels the last 12 are 0."""
    known = SemanticCompressor.standardise

    def standardise(self, latents):
        return known(self, latents) * (torch.arange(latents.shape[1]) < 4).view(-1, 1, 1)
    SemanticCompressor.standardise = standardise


VARIANTS = {"plain": plain, "eps": eps, "v": v, "min-snr": min_snr, "linear": linear,
            "shuffled": shuffled, "four": four, "classes": classes.use}


def train(variant):
    """stage_c.py --preset pocket … with SMALL, and then with what the command line says."""
    sys.argv[1:1] = [*SMALL, "--out", f"runs/lab/{variant}/stage_c"]
    if variant == "classes":
        sys.argv[1:1] = ["--text-encoder", "classes", "--text-width", str(classes.WIDTH)]
    if not any(one.split("=")[0] == "--data" for one in sys.argv):
        shapes.make_shapes(DRAWINGS, count=1000)
        sys.argv += ["--data", DRAWINGS]
    training.command("c", stage_c.train, stage_c.Config, stage_c.PRESETS, stage_c.__doc__,
                     shapes.source)


PROGRAMS = {"train": None, "sample": sample.main, "prompt_accuracy": prompt_accuracy.main,
            "start": start.main}


def main():
    variant, program = [*sys.argv[1:3], "", ""][:2]
    if variant not in VARIANTS or program not in PROGRAMS:
        raise UsageError(f"found {variant!r} {program!r}, expected one of {', '.join(VARIANTS)} "
                         f"and then one of {', '.join(PROGRAMS)}")
    sys.argv[1:3] = []
    VARIANTS[variant]()
    train(variant) if program == "train" else PROGRAMS[program]()


if __name__ == "__main__":
    cli.start(main)
