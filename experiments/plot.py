"""Several trainings in one picture: the error by noise level, one panel for each quarter of t.

    python -m experiments.plot runs/*/log.jsonl --out curves.png

Logs of Stages B and C (Stage A has no noise levels). The legend names what differs in the settings
that the checkpoint beside each log keeps, or the folders where nothing does. Needs matplotlib.
"""

import json
from pathlib import Path

import torch

from plumbing import cli
from plumbing.checkpoint import UNREADABLE
from plumbing.cli import UsageError
from plumbing.training import EDGES


def read(path):
    """log.jsonl -> (steps, [its errors in each quarter of t]); an empty quarter is NaN."""
    try:
        lines = [json.loads(line) for line in Path(path).read_text().splitlines()]
        rows = [(line["step"], line["mse_by_t"]) for line in lines
                if "mse_by_t" in line and len(line["mse_by_t"]) == len(EDGES)]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UsageError(f"{path}: expected the log.jsonl of a training ({error!r})") from None
    if not rows:
        raise UsageError(f"{path}: has no error by noise level; expected a log of Stage B or C")
    steps, levels = zip(*rows)
    return steps, [[float("nan") if one is None else one for one in quarter]
                   for quarter in zip(*levels)]


def legends(paths):
    """What tells the runs apart: "lr 0.004, muon True", or the folders' names."""
    configs = []
    for path in paths:
        saved = Path(path).with_name("checkpoint.pt")
        try:
            configs.append(torch.load(saved, weights_only=True, mmap=True)["config"]
                           if saved.exists() else {})
        except UNREADABLE as error:
            raise UsageError(f"{saved}: expected the checkpoint of that training "
                             f"({str(error).splitlines()[0]})") from None
    names = dict.fromkeys(name for config in configs for name in config)
    differ = [name for name in names if len({str(one.get(name)) for one in configs}) > 1]
    texts = [", ".join(f"{name} {one[name]}" for name in differ if name in one) for one in configs]
    if len(set(texts)) == len(texts) > 1:
        return texts
    folders = [Path(path).parent.parts for path in paths]
    return [" ".join([*(part for part in parts if not all(part in one for one in folders)),
                      *[text] * bool(text)]) or str(path)
            for path, parts, text in zip(paths, folders, texts)]


def plot(paths, out=None):
    """Draw the logs -> matplotlib's figure, saved if `out` is given."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UsageError("matplotlib is not installed: pip install matplotlib") from None
    logs, texts = [read(path) for path in paths], legends(paths)
    figure = Figure(figsize=(4 * len(EDGES), 4), layout="constrained")
    for index, panel in enumerate(figure.subplots(1, len(EDGES))):
        for (steps, quarters), text in zip(logs, texts):
            panel.plot(steps, quarters[index], label=text)
        low = EDGES[index - 1] if index else 0
        panel.set(title=f"t from {low:g} to {EDGES[index]:g}", xlabel="step", yscale="log")
        panel.grid(alpha=0.3, which="both")
    figure.axes[0].set_ylabel("error of eps_hat")
    figure.legend(texts, loc="outside lower center")
    if out:
        try:
            figure.savefig(out, dpi=100)
        except (OSError, ValueError) as error:
            raise UsageError(f"--out {out}: {error}") from None
    return figure


def main():
    parser = cli.Parser(__doc__)
    parser.add_argument("logs", nargs="+", metavar="LOG", help="log.jsonl of one or more trainings")
    parser.add_argument("--out", default="curves.png", metavar="PNG", help="(curves.png)")
    settings = parser.parse_args()
    plot(settings.logs, settings.out)
    print(settings.out)


if __name__ == "__main__":
    cli.start(main)
