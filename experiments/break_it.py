"""One-line edits that break something, and the test that says what.

    python -m experiments.break_it p2             one row of ROWS: the edit, the claim, what failed
    python -m experiments.break_it --all          every row, and whether its test failed
    python -m experiments.break_it --page         docs/break_it.md, anew

A row is applied to a copy of the project in a temporary folder; the files here stay as they are.
"""

import ast
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from plumbing import cli
from plumbing.cli import ROOT, UsageError

NEEDED = ("plumbing", "pocket", "published", "sources", "tests", "tools")    # what tests import


@dataclass
class Row:
    """In `file` the text `old`, which occurs once, becomes `new`; then `test` fails. why: what the
    edit does, or what it would do to a training.
    """
    file: str
    old: str
    new: str
    test: str
    why: str

    @property
    def where(self):
        """The innermost function or class that holds `old`: the outermost class before its name."""
        source, names = (ROOT / self.file).read_text(encoding="utf-8"), []
        line = source[:source.index(self.old)].count("\n") + 1
        for node in ast.walk(ast.parse(source)):          # outer ones come first
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and (
                    node.lineno <= line <= node.end_lineno):
                names.append(node.name)
        return ".".join(names)


ROWS = {
    # ---- Stage C
    "abs": Row("stage_c.py", "(1 - b).abs()", "(1 - b)", "test_ab_head",
               "a size of the noise below zero, where B overshoots 1"),
    "p2": Row("stage_c.py", '"paper": (1 - a_bar)', '"paper": a_bar', "test_p2_weight",
              "low noise, which decides nothing that can be seen, weighs most"),
    "no-p2": Row("stage_c.py", "(p2_weight(t, p2 or model.config.p2) * error)", "error",
                 "test_loss_is_weighted_by_p2", "p2 is forgotten"),
    "sqrt": Row("stage_c.py", "(1 - a_bar).sqrt() * noise", "(1 - a_bar) * noise",
                "test_schedule", "x_t has less than unit variance in the middle of the schedule"),
    "clamp": Row("stage_b.py", ".clamp(1e-4, 0.9999)", "", "test_schedule",
                 "the sampler divides by 0 at t = 1"),
    "t-is-1": Row("stage_c.py", "* 1.08", "* 1.0", "test_schedule",
                  "hardly any training at t = 1, where sampling starts"),
    "mean": Row("stage_c.py", "(1 - a_bar).sqrt() * eps_hat", "(1 - a_bar) * eps_hat",
                "test_sampler_oracle", "the sampler's mean, without its root"),
    "swapped": Row("stage_b.py", "conditional, null = eps_hat", "null, conditional = eps_hat",
                   "test_guidance", "guidance leads away from the text"),
    "guidance": Row("stage_c.py", "    eps_hat = null + guidance *",
                    "    eps_hat = conditional + guidance *", "test_guidance",
                    "guidance 1 is not the conditional prediction"),
    "channels": Row("stage_b.py", "guidance * (conditional - null)",
                    "guidance * (conditional - null) * (torch.arange(4) < 3).view(1, 4, 1, 1)",
                    "test_guidance", "the last channel of the latent is not guided"),
    "keys": Row("stage_c.py", "(self.to_k, self.to_v)]", "(self.to_q, self.to_v)]",
                "test_every_parameter_has_a_gradient", "to_k is made and never called"),
    "deaf": Row("stage_c.py", "self.attention(y, keys, values)",
                "self.attention(y, keys[:, :, :0], values[:, :, :0])",
                "test_text_matters_after_one_step", "the latent attends to itself alone"),
    "h-w": Row("stage_c.py", ".unflatten(2, x.shape[-2:])", ".unflatten(2, x.shape[-2:][::-1])",
               "test_shapes_end_to_end", "height and width swapped: square pictures do not notice"),
    "loud": Row("stage_c.py", "nn.init.zeros_(self.out[1].weight)",
                "nn.init.normal_(self.out[1].weight)", "test_initial_outputs",
                "the head starts with random A and B"),
    "timestep": Row("stage_c.py", "x * (1 + scale) + shift", "x * scale + shift",
                    "test_zero_initialised_branches_are_the_identity",
                    "with zero weights the block returns 0, so nothing passes"),
    "whole-batch": Row("stage_c.py", "torch.rand(len(text), 1, 1,", "torch.rand(1, 1, 1,",
                       "test_drop_text", "one draw for the whole batch"),
    "other-noise": Row("stage_c.py", "error = (eps_hat - noise)",
                       "error = (eps_hat - torch.randn_like(x_0))", "test_overfit_c_two_captions",
                       "the target is not the noise in x_t: the best answer is 0"),
    "twins": Row("stage_c.py", "* 10_000 * frequencies", "* 1_000 * frequencies", "test_twins",
                 "one of two equal functions was edited"),
    "width": Row("stage_c.py", "width: int = 1280", "width: int = 1024", "test_parameter_counts",
                 "another network than the paper's 347 M"),
    # ---- Stage A
    "detach": Row("stage_a.py", "F.mse_loss(quantised, latents.detach())",
                  "F.mse_loss(quantised.detach(), latents)", "test_vq_gradients",
                  "latents move to codes, and codes stay where they are"),
    "commitment": Row("stage_a.py", "+ commitment * F.mse_loss", "+ F.mse_loss",
                      "test_vq_gradients", "the encoder is pulled to the codes four times as hard"),
    "straight": Row("stage_a.py", "return latents + (quantised - latents).detach(), indices",
                    "return quantised, indices", "test_vq_gradients",
                    "no straight-through: the decoder's gradient ends at the codebook"),
    "farthest": Row("stage_a.py", ".argmin(1)", ".argmax(1)", "test_vq_is_the_nearest_code",
                    "the farthest code"),
    "mask": Row("stage_a.py", "torch.where(drop.view(-1, 1, 1, 1), latents, quantised)",
                "torch.where(drop.view(-1, 1, 1, 1), quantised, latents)",
                "test_quantisation_drop", "90 % skip the quantiser, not 10 %"),
    "sign": Row("stage_a.py", "total - config.adversarial_weight",
                "total + config.adversarial_weight", "test_discriminator_sends_gradients",
                "the decoder learns to be found out"),
    "judge": Row("stage_a.py", "F.relu(1 + discriminator(", "F.relu(1 - discriminator(",
                 "test_hinge_loss", "the discriminator calls everything real"),
    "perceptual": Row("stage_a.py", "perceptual_weight: float = 0.1",
                      "perceptual_weight: float = 1.0", "test_weights_of_stage_a",
                      "ten times the weight of E.1"),
    "revival": Row("stage_a.py", "codes.copy_(torch.where(self.used[:, None], codes, picked.to("
                   "codes.dtype)))", "codes.copy_(torch.where(self.used[:, None], picked.to("
                   "codes.dtype), codes))", "test_codebook_does_not_collapse",
                   "codes in use are replaced, unused ones stay unused"),
    "scale": Row("stage_a.py", "/ self.config.latent_std", "* self.config.latent_std",
                 "test_standardise", "the released latents get a variance of .02"),
    # ---- Stage B and the compressor
    "v": Row("stage_b.py", "return (1 - a_bar).sqrt() * x_t", "return a_bar.sqrt() * x_t",
             "test_prediction_v", "the part of eps_hat that x_t gives is off at every t but .5"),
    "v-loss": Row("stage_b.py", "(error / alpha_bar(t)).mean()", "error.mean()",
                  "test_stage_b_loss", "the error is that of eps: hardly any at t = 1"),
    "skips": Row("stage_b.py", "torch.cat([y, *skips], dim=1)",
                 "torch.cat([y, *[0 * one for one in skips]], dim=1)",
                 "test_every_parameter_has_a_gradient",
                 "zeros where the U-Net's skips and sem should be"),
    "zero": Row("stage_b.py", "torch.where(no_sem[..., None], 0.0, sem)",
                "torch.where(no_sem[..., None], mean, sem)", "test_drop_and_noise",
                "dropped sem is the mean, as a grey picture would have it, not zero"),
    "both": Row("stage_b.py", "no_text = u < config.drop_text + config.drop_both",
                "no_text = u < config.drop_text", "test_drop_and_noise",
                "no sample loses both conditions: guidance has nothing to start from"),
    "misprint": Row("semantic_compressor.py", "if H % 32 or W % 32:", "if False:",
                    "test_compressor_input_size", "§3.1's 786 px pass, and give 25x25"),
    "ratio": Row("semantic_compressor.py", "(H * 3 // 4, W * 3 // 4)", "(H // 2, W // 2)",
                 "test_shapes_end_to_end", "64 : 1 instead of 42.67 : 1"),
    # ---- training and data
    "ema": Row("plumbing/training.py", "mine.copy_(its)", "pass",
               "tests/test_training.py::test_ema",
               "the average keeps the BatchNorm statistics of the first step"),
    "warm-up": Row("plumbing/training.py", "(step + 1) / max(config.warmup, 1)",
                   "step / max(config.warmup, 1)", "tests/test_training.py::test_learning_rate",
                   "the first step is none"),
    "seed": Row("plumbing/training.py", "(config.seed, rank(), step)", "(config.seed, rank())",
                "tests/test_training.py::test_steps_have_their_own_random_numbers",
                "each step has the same noise levels and noise"),
    "epoch": Row("data.py", "self.taken = epoch * len(self.dataset) + sample",
                 "self.taken = sample", "tests/test_data.py::test_resume_across_an_epoch_border",
                 "a run that goes on begins the first epoch's order again"),
    "ranks": Row("data.py", "batch[rank * size:(rank + 1) * size]", "batch[:size]",
                 "tests/test_data.py::test_ranks_share_the_global_batch",
                 "every process trains on the same samples"),
}


def node_id(test):
    return test if "::" in test else f"test_shapes.py::{test}"


def claim(test):
    """The docstring of a test, as one line."""
    file, name = node_id(test).split("::")
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    node = next(node for node in tree.body if getattr(node, "name", None) == name)
    return " ".join(ast.get_docstring(node).split())


def copy_project(folder):
    """The Python files, with what the tests read, without weights of A, B and C."""
    for path in ROOT.glob("*.py"):
        shutil.copy(path, folder)
    for name in NEEDED:
        shutil.copytree(ROOT / name, folder / name,
                        ignore=shutil.ignore_patterns("__pycache__", "stage_*"))


def fails(row):
    """Apply a row to a copy, run its test -> (whether it failed, what it said: a list of lines)."""
    with tempfile.TemporaryDirectory() as folder:
        copy_project(Path(folder))
        file = Path(folder, row.file)
        source = file.read_text(encoding="utf-8")
        if source.count(row.old) != 1:
            raise UsageError(f"{row.file}: found {row.old!r} {source.count(row.old)} times, "
                             "expected once")
        file.write_text(source.replace(row.old, row.new), encoding="utf-8")
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-x", "--tb=short", "-p", "no:cacheprovider",
             node_id(row.test)], cwd=folder, capture_output=True, text=True,
            env=dict(os.environ, OMP_NUM_THREADS="1"))
    said = re.findall(r"^E +(.*)$", done.stdout, re.M)
    if done.returncode not in (0, 1) or (done.returncode == 1 and not said):
        raise UsageError(f"the test did not run: {done.stdout[-500:]}{done.stderr[-500:]}")
    # the words, not the expression that pytest shows after them
    return done.returncode == 1, [line for line in said if not re.match(r"(assert|\+) ", line)]


def show(name):
    """Apply a row and print it. -> whether its test failed."""
    row = ROWS[name]
    print(f"{row.file}, {row.where or 'top level'}: {row.why}\n  - {row.old}\n  + {row.new}\n"
          f"{node_id(row.test)} claims:\n  {claim(row.test)}", flush=True)
    failed, said = fails(row)
    print("it fails:" if failed else "it passes", *said[:6], sep="\n  ")
    return failed


def table():
    """The rows, as docs/break_it.md has them."""
    def code(text):
        return f"`{text}`".replace("|", "\\|")
    yield "| row | file, where | edit | what it does | fails |\n|---|---|---|---|---|"
    for name, row in ROWS.items():
        edit = f"{code(row.old.strip())} → {code(row.new) if row.new else 'nothing'}"
        test = row.test.split("::")[-1]
        yield (f"| {name} | {row.file}, {code(row.where)} | {edit} | {row.why} | {code(test)} |")


PAGE = ROOT / "docs/break_it.md"
START = "<!-- rows: python -m experiments.break_it --page -->\n"


def page():
    """docs/break_it.md with the rows of today below START."""
    return PAGE.read_text(encoding="utf-8").partition(START)[0] + START + "\n".join(table()) + "\n"


def main():
    parser = cli.Parser(__doc__)
    parser.add_argument("row", nargs="?", choices=ROWS, metavar="ROW", help=", ".join(ROWS))
    parser.add_argument("--all", action="store_true", help="every row")
    parser.add_argument("--page", action="store_true", help="write the table of docs/break_it.md")
    settings = parser.parse_args()
    if settings.page:
        PAGE.write_text(page(), encoding="utf-8")
    elif settings.all:
        passed = [name for name, row in tqdm(ROWS.items(), unit="row") if not fails(row)[0]]
        if passed:
            raise UsageError(f"unnoticed: {', '.join(passed)}")
        print(f"{len(ROWS)} edits, each noticed by its test")
    elif settings.row:
        show(settings.row)
    else:
        raise UsageError(f"which row? {', '.join(ROWS)}; or --all")


if __name__ == "__main__":
    cli.start(main)
