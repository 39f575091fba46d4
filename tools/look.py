"""What a source holds: counts, sizes and captions as text, some of its pictures as a PNG.

    python -m tools.look shards/ [--out look.png]

A source is a folder, a tar or a quoted pattern (see data.py).
"""

import collections
import textwrap
import unicodedata

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import data
import sample
from plumbing import cli, pictures, text
from plumbing.cli import UsageError
from sources.captions import caption_of

CELL = 160  # ours: side of a thumbnail, in pixels
LENGTHS = {size["context_length"]: name.partition("-")[0]
           for name, size in text.TEXT_ENCODERS.items()}


def look(source, out="look.png", shown=24, check=1000):
    """Print what a source holds, of which `check` samples are decoded; draw `shown` of them.

    Raises UsageError if none can be decoded.
    """
    dataset = data.CaptionedImages(source, report=False)
    print(dataset.describe())
    spread = np.linspace(0, len(dataset) - 1, min(check, len(dataset))).round().astype(int)
    good, bad, sizes, captions = [], collections.Counter(), collections.Counter(), []
    lists = 0
    for index in tqdm(spread, desc="decode", unit="img", delay=1, leave=False):
        sample = dataset[int(index)]
        if "failed" in sample:
            reason = sample["failed"]
            bad[reason.partition(":")[0]] += 1
            if sum(bad.values()) <= 5:
                print(f"  unreadable: {sample['key']}: {reason}")
            continue
        sizes[tuple(sample["image"].shape[:0:-1])] += 1
        captions.append(sample["caption"])
        found = caption_of(sample["meta"])
        lists += isinstance(found, list) and sample["caption"] == " ".join(str(found[0]).split())
        good.append(int(index))
    part = "all" if len(spread) == len(dataset) else f"{len(spread):,} of {len(dataset):,}"
    print(f"  decoded {part}: {len(good):,} readable"
          + "".join(f", {n:,} x {reason}" for reason, n in bad.items()))
    if not good:
        raise UsageError(f"{source}: none of {len(spread):,} samples can be decoded.")
    print("  sizes (width x height): "
          + ", ".join(f"{w} x {h} ({n:,})" for (w, h), n in sizes.most_common(5))
          + (f" and {len(sizes) - 5:,} others" if len(sizes) > 5 else ""))
    words = [len(caption.split()) for caption in captions]
    print(f"  captions: {min(words)} to {max(words)} words, on average {np.mean(words):.1f}")
    for length, name in LENGTHS.items():
        cut = sum(bool(text.first_ids(caption, length - 2)[1]) for caption in captions)
        print(f"  longer than the {length} tokens of {name}, and cut there: {cut:,}")
    damaged = sum("\N{REPLACEMENT CHARACTER}" in caption for caption in captions)
    print(f"  with letters that were lost before (U+FFFD): {damaged:,}\n" * bool(damaged)
          + f"  lists of captions, of which the first is read: {lists:,}\n" * bool(lists), end="")
    known, twice = set(), 0
    for index in tqdm(range(len(dataset)), desc="json", unit="img", delay=1, leave=False):
        try:
            meta = dataset.meta(index)
        except data.BadSample:
            continue
        name = str(meta.get("sha256") or meta.get("hash"))
        twice += name in known
        known |= {name} - {"None"}
    if known:
        print(f"  by sha256 or hash: {len(known):,} different images, {twice:,} are there again")
    chosen = [good[i] for i in np.linspace(0, len(good) - 1, min(shown, len(good))).astype(int)]
    for index in chosen[:5]:
        print(f"    {dataset.key(index)}: {dataset.caption(index)[:1000]}")
    contact_sheet(dataset, chosen).save(out)
    print(f"  contact sheet: {out}")


def contact_sheet(dataset, indices):
    """Thumbnails with their captions below, as one PIL image."""
    images = [thumbnail(data.decode(dataset.bytes_of(index, 0), CELL)) for index in indices]
    return pictures.grid(images, 6, [short(dataset.caption(index)) for index in indices])


def short(caption):
    """The first 150 letters of a caption, without accents, which Pillow's own font lacks."""
    letters = unicodedata.normalize("NFD", caption[:1000])
    first, *rest = textwrap.wrap("".join(c for c in letters if not unicodedata.combining(c)),
                                 150) or [""]
    return f"{first} …" if rest else first


def thumbnail(image):
    """A PIL image -> (3, CELL, CELL) in [0, 1], shrunk if it is larger, in the middle of white."""
    image.thumbnail((CELL, CELL))
    cell = Image.new("RGB", (CELL, CELL), "white")
    cell.paste(image, ((CELL - image.width) // 2, (CELL - image.height) // 2))
    return torch.from_numpy(np.array(cell)).permute(2, 0, 1) / 255


def main(argv=None):
    parser = cli.Parser(__doc__, prog="python -m tools.look")
    parser.add_argument("source", nargs="+", help="folder, tar, or quoted pattern")
    parser.add_argument("--out", default="look.png", help="contact sheet (default: %(default)s)")
    given = parser.parse_args(argv)
    if len(given.source) > 1:
        raise UsageError(f"look takes one source but got {len(given.source)}, as when the shell "
                         "expands a pattern; put it in quotes.")
    if sample.check_out(given.out):
        raise UsageError(f"--out {given.out}: is a folder, expected a file")
    look(given.source[0], given.out)


if __name__ == "__main__":
    cli.start(main)
