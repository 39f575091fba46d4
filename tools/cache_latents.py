"""The Semantic Compressor's latents, computed once and kept: Stage C trains faster from them.

    python -m tools.cache_latents shards/ --weights runs/paper/stage_b/checkpoint.pt \\
        --image-size 1024 --out latents/ --tokens
    python stage_c.py --data latents/ --preset paper-2 …

--tokens keeps the frozen text encoder's tokens of the captions, too: more disk, less work. Captions
and .json are kept, images are not. Stopped and started again, it goes on with the shards that are
missing.
"""

import io
import json
import os

import numpy as np
import torch
from tqdm import tqdm

import data
import semantic_compressor
from plumbing import checkpoint, cli, text, training
from sources import listing, tars


@torch.no_grad()
def cache(source, weights, out, image_size=None, batch_size=32, workers=2, per_shard=1000,
          tokens=False, text_encoder="clip-h", clip=None):
    """Shards of images -> shards of latents: KEY.npy, float16 (16, h, w), standardised.

    weights: a checkpoint with the compressor. image_size: side of Stage A's image in pixels; None:
    as in that checkpoint. tokens: the file goes on with a second array, float16 (L, E), the tokens
    of the caption by text_encoder and clip, as in Stage C. Captions and .json are kept. Finished
    shards are not made again.
    """
    device = training.setup(0)
    compressor = semantic_compressor.load(weights, device)
    encoder = text.text_encoder(text_encoder, clip, device) if tokens else None
    if image_size is None:
        state = checkpoint.load_checkpoint(weights, "compressor")
        image_size = state.get("config", {}).get("image_size")
    if not image_size or image_size % 128:
        raise cli.UsageError(f"--image-size {image_size}: expected a multiple of 128")
    dataset = data.CaptionedImages(source, resize=image_size, crop=image_size, center=True)
    settings = {"compressor": checkpoint.checksum(compressor.state_dict()),
                "text_encoder": encoder and encoder.identity,
                "image_size": image_size, "source": os.path.abspath(source),
                "samples": len(dataset), "per_shard": per_shard, "data": dataset.checksum}
    os.makedirs(out, exist_ok=True)
    note = os.path.join(out, "latents.json")
    if os.path.isfile(note):
        found = {"text_encoder": None, **cli.read_json(note, {
            name: type(value) for name, value in settings.items()
            if name not in ("data", "text_encoder")})}  # older ones do not have these
        differ = [name for name in settings if settings[name] != found.get(name, settings[name])]
        if differ:
            raise cli.UsageError(f"{out}: holds latents made with another {' and '.join(differ)}; "
                                 "give a new folder")
    elif set(os.listdir(out)) - {"latents.json.tmp"}:  # left over where a kill came between
        raise cli.UsageError(f"{out}: holds other files; expected a new folder")
    with open(f"{note}.tmp", "w", encoding="utf-8") as file:
        json.dump(settings, file)
    os.replace(f"{note}.tmp", note)
    failures = listing.FailureCounter(dataset)
    with tqdm(total=len(dataset), desc="latents", unit="img") as bar:
        for number, first in enumerate(range(0, len(dataset), per_shard)):
            path = os.path.join(out, f"{number:05d}.tar")
            indices = range(first, min(first + per_shard, len(dataset)))
            if os.path.exists(path):
                bar.update(len(indices))
                continue
            samples = []
            for _, batch in data.batches_in_order(dataset, indices, batch_size, workers):
                failures.note(batch)
                bar.update(len(batch["keys"]) + len(batch["failed"]))
                if not batch["keys"]:
                    continue
                images = semantic_compressor.resize(batch["images"].to(device))
                kept = [compressor.standardise(compressor(images))]       # (B, 16, h, w)
                kept += [encoder(batch["captions"])] if encoder else []   # (B, L, E)
                kept = [one.half().cpu().numpy() for one in kept]
                if not all(np.isfinite(one).all() for one in kept):
                    raise cli.UsageError(f"{source}: {batch['keys'][0]} and those after it gave "
                                         "numbers that float16 cannot hold; expected to 65,504")
                for index, *arrays in zip(batch["indices"], *kept):
                    file, meta = io.BytesIO(), dataset.meta(index)
                    for array in arrays:                                  # one after the other
                        np.save(file, array)
                    samples.append((f"{number:05d}{len(samples):04d}", {
                        "npy": file.getvalue(), "txt": dataset.caption(index).encode(),
                        "json": json.dumps({**meta, "source": dataset.key(index)}).encode()}))
            if samples:
                tars.write_tar(path, samples)
    made = data.CaptionedLatents(out)
    each = sum(map(os.path.getsize, made.shards)) / len(made)             # bytes
    print(f"{out}: latents{' and tokens' * tokens} of {len(made):,} images at {image_size} px, "
          f"{each / 1000:.1f} GB a million; train on them with: python stage_c.py --data {out} …")


def main():
    parser = cli.Parser(__doc__)
    parser.add_argument("source", help="shards or a folder of captioned images")
    parser.add_argument("--weights", required=True, help="Stage B checkpoint with the compressor")
    parser.add_argument("--out", required=True, help="folder for the shards of latents")
    parser.add_argument("--image-size", type=int, help="side of Stage A's image (as in Stage B)")
    parser.add_argument("--tokens", action="store_true", help="keep the captions' tokens, too")
    parser.add_argument("--text-encoder", default="clip-h", help="whose tokens (clip-h)")
    parser.add_argument("--clip", help="its weights, as in Stage C")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--workers", type=int, default=2)
    settings = parser.parse_args()
    if not settings.tokens and (settings.clip or settings.text_encoder != "clip-h"):
        raise cli.UsageError("--text-encoder and --clip have no effect without --tokens")
    cache(**vars(settings))


if __name__ == "__main__":
    cli.start(main)
