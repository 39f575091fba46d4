"""Your own pictures as shards: jpg, png and webp are copied byte for byte, others become png.

    python -m tools.pack FOLDER --out shards/mine [--per-shard 1000]

FOLDER holds images, each with its caption in NAME.txt (or .caption, or as "text" or "caption" in
NAME.json), or all captions in metadata.jsonl or metadata.csv. Of a list of captions the first is
taken. What is left out is counted and named.
"""

import glob
import io
import os

from PIL import Image
from tqdm import tqdm

import data
from plumbing import cli
from plumbing.cli import UsageError
from sources import listing, tars

COPIED = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}  # MPO: many phones


def pack(folder, out, per_shard=1000):
    """Write a folder of captioned images as shards in the new folder `out`.

    What cannot be decoded is left out and counted. Raises UsageError if `out` holds anything, if
    `folder` holds shards, or if most of it cannot be used.
    """
    if not 1 <= per_shard <= tars.PER_SHARD:
        raise UsageError(f"--per-shard {per_shard}: expected 1 to {tars.PER_SHARD:,}.")
    if os.path.exists(out) and (not os.path.isdir(out) or os.listdir(out)):
        raise UsageError(f"{out}: is there already and not empty; expected a new folder "
                         "(nothing is overwritten).")
    dataset = data.CaptionedImages(folder, report=False)
    if dataset.shards:
        raise UsageError(f"{folder}: holds shards already; expected a folder of images.")
    print(dataset.describe())
    part = f"{os.path.normpath(out)}.part"  # takes the final name only when all is written
    os.makedirs(part, exist_ok=True)
    for old in glob.glob(os.path.join(glob.escape(part), "*.tar*")):
        os.remove(old)
    failures, shard, written = listing.FailureCounter(dataset), [], 0
    for index in tqdm(range(len(dataset)), desc="pack", unit="img"):
        try:
            content = dataset.bytes_of(index, 0)
            image = data.decode(content)  # all of it, so that no broken file gets into a shard
            caption, extra = dataset.caption(index), dataset.meta(index)
        except data.BadSample as error:
            failures.note({"keys": [], "failed": {index: (dataset.key(index), str(error))}})
            continue
        failures.note({"keys": [dataset.key(index)], "failed": {}})
        suffix = COPIED.get(Image.open(io.BytesIO(content)).format)
        if suffix is None:
            png = io.BytesIO()
            image.save(png, "PNG")
            suffix, content = "png", png.getvalue()
        number, place = divmod(written, per_shard)
        shard.append(tars.sample(f"{number:05d}{place:04d}", suffix, content, image.size, caption,
                                 {**extra, "source": dataset.key(index)}))
        written += 1
        if len(shard) == per_shard:
            tars.write_tar(os.path.join(part, f"{number:05d}.tar"), shard)
            shard = []
    if shard:
        tars.write_tar(os.path.join(part, f"{written // per_shard:05d}.tar"), shard)
    if os.path.isdir(out):
        os.rmdir(out)
    os.makedirs(os.path.dirname(os.path.abspath(out)), exist_ok=True)
    os.rename(part, out)
    left = f"; left out {failures.counts()}" * bool(failures.reasons)
    print(f"{out}: {written:,} samples in {-(-written // per_shard)} shard(s){left}; "
          f"see them with: python -m tools.look {out}")


def main(argv=None):
    parser = cli.Parser(__doc__, prog="python -m tools.pack")
    parser.add_argument("folder", help="images with NAME.txt, or with metadata.jsonl or .csv")
    parser.add_argument("--out", required=True, help="new folder for the shards")
    parser.add_argument("--per-shard", type=int, default=1000)
    try:
        pack(**vars(parser.parse_args(argv)))
    except KeyboardInterrupt:
        raise UsageError("stopped; the same command begins again") from None


if __name__ == "__main__":
    cli.start(main)
