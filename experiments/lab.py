"""One change to Stage C, named; then its training, its sampling or a study with that change.

    python -m experiments.lab eps stage_c --preset pocket --out runs/lab/eps
    python -m experiments.lab eps sample "a red star" --weights runs/lab/eps
    python -m experiments.lab shuffled prompt_accuracy --weights pocket --n 60

The first word is one of VARIANTS, the second stage_c, sample or prompt_accuracy; what follows are
that program's own options. docs/lab.md has the exercises. A checkpoint is sampled with the change
it was trained with; with another, it says that it no longer computes what it did.
"""

import random
import sys

import sample
import stage_c
from experiments import classes, prompt_accuracy
from plumbing import cli, text, training
from plumbing.cli import UsageError
from pocket import shapes


def plain():
    """Nothing changes."""


def eps():
    """The head is eps_hat = B: 0 at init, as usual in diffusion models."""
    stage_c.ab_to_eps = lambda x_t, a, b: b


def v():
    """The head predicts v (Salimans & Ho, 2022); v_hat = 0 at init. The loss is that of eps."""
    class StageC(stage_c.StageC):
        def forward(self, x_t, t, *condition):
            a_bar = stage_c.alpha_bar(t).view(-1, 1, 1, 1)
            return (1 - a_bar).sqrt() * x_t + a_bar.sqrt() * super().forward(x_t, t, *condition)
    eps()                                                     # what is below this forward: v_hat
    stage_c.StageC = StageC


def min_snr():
    """The loss's weight is min(SNR, 5) / SNR (Hang et al., 2023) in place of p2."""
    def weight(t, form=None):
        a_bar = stage_c.alpha_bar(t)
        return (5 * (1 - a_bar) / a_bar).clamp(max=1)
    stage_c.p2_weight = weight


def linear():
    """The schedule is alpha_bar = 1 - t, in training and sampling; both clamps stay."""
    stage_c.alpha_bar = lambda t: (1 - t).clamp(1e-4, 0.9999)


def shuffled():
    """The words of each caption in an order that follows from the caption."""
    known = text.TextEncoder.forward

    def forward(self, captions):
        return known(self, [" ".join(random.Random(one).sample(one.split(), len(one.split())))
                            for one in captions])
    text.TextEncoder.forward = forward


VARIANTS = {"plain": plain, "eps": eps, "v": v, "min-snr": min_snr, "linear": linear,
            "shuffled": shuffled, "classes": classes.use}
PROGRAMS = {
    "stage_c": lambda: training.command("c", stage_c.train, stage_c.Config, stage_c.PRESETS,
                                        stage_c.__doc__, shapes.source),
    "sample": sample.main, "prompt_accuracy": prompt_accuracy.main}


def main():
    variant, program = [*sys.argv[1:3], "", ""][:2]
    if variant not in VARIANTS or program not in PROGRAMS:
        raise UsageError(f"found {variant!r} {program!r}, expected one of {', '.join(VARIANTS)} "
                         f"and then one of {', '.join(PROGRAMS)}")
    sys.argv[1:3] = []
    VARIANTS[variant]()
    PROGRAMS[program]()


if __name__ == "__main__":
    cli.start(main)
