"""The last step of E.3: the weights half way between those of two trainings of Stage C.

    python -m tools.interpolate runs/paper/stage_c-3/checkpoint.pt \\
        runs/paper/stage_c-4/checkpoint.pt --out runs/paper/stage_c

What it writes samples; it cannot be trained on.
"""

from pathlib import Path

from plumbing import checkpoint, cli


def interpolate(first, second, out, share=0.5):
    """Write out/checkpoint.pt: first + share * (second - first), of the averaged weights.

    first, second: checkpoints of Stage C with the same architecture. Raises UsageError.
    """
    one, two = (checkpoint.load_checkpoint(path, "C") for path in (first, second))
    for name in ("compressor", "text_encoder"):
        if one.get(name) != two.get(name):
            raise cli.UsageError(f"{first} and {second} were trained with different values of "
                                 f"{name}: between them lies no model")
    first_ema, second_ema = (checkpoint.copied(state["ema"]) for state in (one, two))
    shapes = [(state["config"].get("heads"), {name: value.shape for name, value in ema.items()})
              for state, ema in ((one, first_ema), (two, second_ema))]
    if shapes[0] != shapes[1]:
        raise cli.UsageError(f"{first} and {second} hold networks of different sizes: between them "
                             "lies no model")
    path = Path(out) / "checkpoint.pt"
    if path.exists():
        raise cli.UsageError(f"{path} is there already and would be lost; give another --out")
    path.parent.mkdir(parents=True, exist_ok=True)
    checkpoint.save_checkpoint(path, dict(
        stage="C", config=two["config"], step=two.get("step", 0), samples=0,
        ema={name: value.lerp(second_ema[name], share) for name, value in first_ema.items()},
        **{name: two[name] for name in ("compressor", "text_encoder", "published")
           if name in two}))
    print(f"{path}: {1 - share:g} of {first} and {share:g} of {second}")


def main():
    parser = cli.Parser(__doc__)
    parser.add_argument("first", help="a checkpoint of Stage C")
    parser.add_argument("second", help="another one")
    parser.add_argument("--out", required=True, help="folder for the checkpoint between them")
    interpolate(**vars(parser.parse_args()))


if __name__ == "__main__":
    cli.start(main)
