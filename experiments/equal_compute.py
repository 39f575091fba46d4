"""Is C + B + A the cheaper one to train? Pocket's against E.4's baseline, by counted operations.

    python -m experiments.equal_compute train ldm [--seed 1] [--tflop 268]
    python -m experiments.equal_compute train c [--seed 1]
    python -m experiments.equal_compute curve runs/equal/*-s*

train   for an eighth, a quarter, half and all of --tflop a run of its own, each with its own decay
        of the learning rate. Up to the decay they are one run, so OUT/trunk is trained once. What
        was stopped goes on by the same command; a larger --tflop goes on with the same trunk.
curve   prompts right (prompt_accuracy.py, split "train") of these runs, kept in --results, and the
        figure of all that stands there, with Wilson's 95 % bands. The baseline gets the best of
        guidance 1, 2 and 4, chosen for each run on other prompts; C has 4. Rows of C are with the
        Stages A and B of --weights, which count with all steps that they were trained for.

A training step counts as three forward passes (price.py). All operations: with the frozen networks;
for C also those of B, the compressor and A, for the baseline those of A. The pocket text tower,
which both read, is in none.
"""

import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest import mock

import torch
from tqdm import tqdm

import data
import sample
import stage_b
import stage_c
from experiments import baseline_ldm, price
from experiments import prompt_accuracy as checker
from plumbing import checkpoint, cli, training
from plumbing.cli import UsageError
from pocket import shapes

PRESETS = {"ldm": baseline_ldm.PRESETS["pocket"], "c": stage_c.PRESETS["pocket"]}
RECIPE_B = stage_b.PRESETS["pocket"]
SHARES = (8, 4, 2, 1)                          # parts of the budget: 1/8, …
GUIDANCE = (1.0, 2.0, 4.0)
FIELDS = dict(run=str, steps=int, seed=int, way=str, right=int, n=int, tflop=float, tflop_all=float)
WAYS = {"C + B + A": "tab:blue", "C + B without text + A": "tab:cyan", "LDM + A": "tab:orange"}


def operations(model, samples=1):
    """Of training the text model alone, "ldm" or "c", on so many pictures."""
    return 3 * samples * (price.of_baseline("pocket", 128) if model == "ldm" else
                          price.of_c(PRESETS["c"], (3, 3)))


def before(model, stage_b_file=None, drawings=20_000):
    """Operations of all that is trained or run beside the text model. stage_b_file: whose steps
    count, with those of the runs that it went on from; None: those of Stage B's recipe.
    """
    rows = price.pocket(drawings)
    if model == "c" and stage_b_file:
        n, learns, frozen = rows["Stage B"]
        steps = sum(part["steps"] for part in checkpoint.parts(stage_b_file, "B")
                    if "pocket.teach" not in str(part["command"]))      # a row of its own
        rows["Stage B"] = n, learns * steps / RECIPE_B.steps, frozen
    if model == "ldm":
        return sum(rows["Stage A"][1:]) + drawings * (
            price.of_a("pocket", 128) + price.of_text("pocket"))
    return sum(sum(row[1:]) for name, row in rows.items() if name != "Stage C") + rows["Stage C"][2]


def budget(model, seed=0, tflop=None):
    """The config of "ldm" or "c" that trains for so many TFLOP, those of Stage C's recipe if None;
    the learning rate decays over the same share of the steps as there.
    """
    c, config = PRESETS["c"], PRESETS[model]
    work = tflop * 1e12 if tflop else operations("c", c.steps * c.batch_size)
    steps = round(work / operations(model, config.batch_size))
    if steps < max(SHARES):
        raise UsageError(f"--tflop {tflop}: that is {steps} steps of {model}, expected at least "
                         f"{max(SHARES)}, so that each part of the budget has one")
    return replace(config, seed=seed, steps=steps, cooldown=steps * c.cooldown // c.steps,
                   preview_every=steps)


# ---- train ---------------------------------------------------------------------------------------

def taken(folder):
    """-> "ldm", "c" or None, and the steps of the run in `folder`, 0 if there is none."""
    path = Path(folder) / "checkpoint.pt"
    state = checkpoint.read_tensors(path) if path.exists() else dict(stage=None, step=0)
    return dict(LDM="ldm", C="c").get(state["stage"]), state["step"]


def train(model, config, source, out):
    """Train "ldm" or "c" for each of SHARES of config.steps, in out/STEPS."""
    remember, known = data.remember, []

    def once(*given, **more):                  # what is encoded is the same in all runs
        known[:] = known or [remember(*given, **more)]
        return known[0]

    def reach(folder, steps, cooldown):        # -> whether it did: not where it was stopped
        now = replace(config, steps=steps, cooldown=cooldown)
        if taken(folder)[1] < steps:
            with mock.patch.object(data, "remember", once):
                baseline_ldm.train(now, source, folder) if model == "ldm" else stage_c.train(
                    now, source, folder, sample.POCKET["a"], sample.POCKET["b"])
        return taken(folder)[1] >= steps

    trunk = out / "trunk"
    for share in SHARES:
        steps, cooldown = config.steps // share, config.cooldown // share
        branch, begun = out / f"{steps:06d}", out / f"{steps:06d}.part"
        if not branch.exists() and taken(trunk)[1] > steps - cooldown:
            print(f"{branch}: left out, as {trunk} is past the begin of its decay")
            continue
        if not branch.exists():
            if not reach(trunk, steps - cooldown, 0):
                return
            shutil.copytree(trunk, begun, dirs_exist_ok=True)
            begun.rename(branch)
        if not reach(branch, steps, cooldown):
            return


# ---- curve ---------------------------------------------------------------------------------------

@torch.no_grad()
def judge(draw, n, seed):
    """draw(prompts, seeds) -> {way: images}. -> {way: how many of n prompts are all right}."""
    jobs, right = checker.prompts(n, "train", seed), {}
    for first in tqdm(range(0, n, 50), unit="batch", leave=False):
        prompts, scenes = map(list, zip(*jobs[first:first + 50]))
        seeds = [seed * 1_000_000 + first + i for i in range(len(prompts))]
        for way, images in draw(prompts, seeds).items():
            right[way] = right.get(way, 0) + sum(
                checker.compare(checker.look_at(image), scene, prompt)["all"]
                for image, scene, prompt in zip(images.cpu(), scenes, prompts))
    return right


def load_baseline(path, device):
    """A trained baseline -> draw(prompts, seeds, guidance) -> images (B, 3, 128, 128)."""
    decoder = sample.load_chain(**sample.find("pocket", "ab"), device=device)
    a = checkpoint.checksum(decoder.a.state_dict())
    if checkpoint.load_checkpoint(path, "LDM")["stage_a"] != a:
        raise UsageError(f"{path}: trained on the latents of another Stage A than the one in "
                         "pocket/; expected a run with that one")
    net = checkpoint.rebuild(path, "LDM", baseline_ldm.LDM, baseline_ldm.PRESETS["paper"], device)
    return partial(baseline_ldm.draw, net, decoder.a, decoder.text_b)


def measure(folder, settings):
    """The rows of one run: {way, run, seed, steps, n, right, tflop, tflop_all, guidance, …}."""
    model, steps = taken(folder)
    path = folder / "checkpoint.pt"
    config = checkpoint.load_checkpoint(path, dict(ldm="LDM", c="C")[model])["config"]
    own = operations(model, steps * config["batch_size"])
    paths = sample.find(settings.weights, "ab", c=path if model == "c" else None)
    row = dict(run=str(folder), seed=config["seed"], steps=steps, n=settings.n,
               prompts=settings.seed, tflop=own / 1e12,
               tflop_all=(own + before(model, paths["b"])) / 1e12)
    if model == "c":
        chain = sample.load_chain(**paths, device=settings.device)

        def draw(prompts, seeds):
            latents = sample.draw_latents(chain, prompts, seeds, 128, 128)
            return {way: stage_b.draw_images(chain, latents, words, seeds) for way, words in (
                ("C + B + A", prompts), ("C + B without text + A", [""] * len(prompts)))}
        return [dict(row, way=way, right=right, guidance=4.0, weights=settings.weights)
                for way, right in judge(draw, settings.n, settings.seed).items()]
    draw_one = load_baseline(path, settings.device)

    def draw(prompts, seeds, guidance=GUIDANCE):
        return {one: draw_one(prompts, seeds, one) for one in guidance}
    tried = judge(draw, settings.tries, settings.seed + 1)
    best = max(tried, key=tried.get)
    right = judge(lambda *jobs: draw(*jobs, [best]), settings.n, settings.seed)[best]
    return [dict(row, way="LDM + A", right=right, guidance=best, tried=tried, of=settings.tries)]


def figure(rows, path):
    """Rows of --results -> the figure, saved at `path`: prompts right against operations."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UsageError("matplotlib is not installed: pip install matplotlib") from None
    sheet = Figure(figsize=(11, 4.5), layout="constrained")
    for axis, panel, label in zip(("tflop", "tflop_all"), sheet.subplots(1, 2, sharey=True),
                                  ("the text model alone", "all that is trained and run")):
        lines = {}
        for row in sorted(rows, key=lambda row: row["tflop"]):
            of = row.get("weights", "pocket")
            lines.setdefault((row["way"], row["seed"], of), []).append(row)
        for (way, seed, weights), some in sorted(lines.items()):
            x, low, high = zip(*((row[axis], *checker.interval(row["right"], row["n"]))
                                 for row in some))
            panel.plot(x, [100 * row["right"] / row["n"] for row in some], color=WAYS[way],
                       marker="o" if weights == "pocket" else "*", linestyle="-:"[seed % 2],
                       label=f"{way}, seed {seed}" + f", {weights}" * (weights != "pocket"))
            panel.fill_between(x, low, high, color=WAYS[way], alpha=0.15, linewidth=0)
            if len(x) == 1:
                panel.vlines(x, low, high, color=WAYS[way])
        ldm, c = (max((row[axis] for row in rows if row["way"].startswith(model)), default=0)
                  for model in ("LDM", "C"))
        if ldm < 0.98 * c:
            panel.set_title(f"LDM at C's {c:.0f} TFLOP: not measured", fontsize=10)
        panel.set(xlabel=f"TFLOP of {label}", ylim=(0, None))
        panel.set_xscale("log", base=2)
        panel.xaxis.set_major_formatter("{x:.4g}")
        panel.grid(alpha=0.3)
    sheet.axes[0].set_ylabel("prompts right, %, with 95 % bands")
    sheet.legend(*sheet.axes[0].get_legend_handles_labels(), fontsize=8, ncols=3,
                 loc="outside lower center")
    sheet.savefig(path, dpi=100)


def curve(settings):
    for path in (settings.results, settings.figure):
        path.parent.mkdir(parents=True, exist_ok=True)
    kept = settings.results.read_text().splitlines() if settings.results.exists() else []
    rows = [cli.read_json(settings.results, FIELDS, line) for line in kept]
    # rows of the baseline name no weights
    known = {(row["run"], row["steps"], row["n"], row.get("prompts", 1)) for row in rows
             if row.get("weights", settings.weights) == settings.weights}
    if lacking := [str(run) for run in settings.runs if not [*run.glob("[0-9]" * 6)]]:
        raise UsageError(f"{lacking[0]}: expected the --out of `equal_compute train`")
    for folder in sorted(one for run in settings.runs for one in run.glob("[0-9]" * 6)):
        model, steps = taken(folder)
        if steps < int(folder.name):
            print(f"{folder}: left out, it is at step {steps}")
        elif (str(folder), steps, settings.n, settings.seed) not in known:
            found = measure(folder, settings)
            rows += found
            with open(settings.results, "a") as file:
                file.writelines(json.dumps(row) + "\n" for row in found)
            print(*(f"{row['way']}, {row['tflop']:.1f} TFLOP: {row['right']} of {row['n']}"
                    for row in found), sep="; ", flush=True)
    if not rows:
        raise UsageError(f"{settings.results}: no results; expected runs of `equal_compute train`")
    figure(rows, settings.figure)
    print(settings.figure)


def main(argv=None):
    parser = cli.Parser(__doc__)
    commands = parser.add_subparsers(dest="what", required=True, metavar="train|curve")
    one = commands.add_parser("train")
    one.add_argument("model", choices=PRESETS)
    one.add_argument("--seed", type=int, default=0)
    one.add_argument("--tflop", type=float, help="of the text model alone (Stage C's recipe: 44)")
    one.add_argument("--data", help="drawings (shards/shapes, made if they are not there)")
    one.add_argument("--out", type=Path, help="(runs/equal/MODEL-sSEED)")
    one = commands.add_parser("curve")
    one.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="--out of train")
    one.add_argument("--n", type=int, default=200, help="prompts (200)")
    one.add_argument("--tries", type=int, default=60, help="prompts to choose guidance on (60)")
    one.add_argument("--seed", type=int, default=1, help="of prompts and noise (1); next: tries")
    one.add_argument("--weights", default="pocket", help="Stages A and B of C's rows (pocket)")
    one.add_argument("--results", type=Path, default="runs/equal/curve.jsonl")
    one.add_argument("--figure", type=Path, default="runs/equal/baseline.png")
    settings = parser.parse_args(argv)
    if settings.what == "curve":
        settings.device = training.setup(0)
        return curve(settings)
    if settings.data is None:
        settings.data = "shards/shapes"
        shapes.make_shapes(settings.data)
    train(settings.model, budget(settings.model, settings.seed, settings.tflop), settings.data,
          settings.out or Path(f"runs/equal/{settings.model}-s{settings.seed}"))


if __name__ == "__main__":
    cli.start(main)
