"""A page to play with: what prompt, guidance, steps and seed do to C's latent and to the picture.

    python -m experiments.play [--weights pocket] [--out docs/play.html]

Everything is drawn beforehand, each prompt with each seed, guidance and number of steps below, and
stands in the one file: it opens from disk or from any web server, and asks the network for nothing.
The pictures are WebP in the best of QUALITIES with which the page fits in LIMIT bytes. The small
weights take 70 seconds of CPU time.
"""

import base64
import io
import itertools
import json
import os
import time
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

import sample
from plumbing import cli, pictures, training
from plumbing.cli import UsageError

TEMPLATE = Path(__file__).with_name("play.html")
LIMIT = 3_000_000                      # bytes
SIDE = 128                             # pixels of a picture; one of B's steps has half of that
QUALITIES = (90, 80, 70, 60, 50, 40, 30, 20, 10)
PROMPTS = {                            # chosen before drawing -> what is held out of training
    "a red star above a blue circle": "",
    "a pink cross left of a cyan star": "",
    "a green triangle below a purple square": "",
    "a large yellow circle on a black background": "",
    "a small orange heart on a white background": "",
    "a red star": "",
    "a purple heart": "in no training picture",
    "a pink star above a blue circle": "the two together in no training picture"}
SEEDS, GUIDANCE, STEPS_C = (0, 1, 2), (1, 2, 4, 8), (5, 15, 60)
STEPS_B = (1, 4, 7, 10)                # shown of B's 12: two rows of two, as large as a picture


@torch.no_grad()
def draw(chain):
    """-> latents (8, 3, 12, 16, 3, 3) of prompts, seeds and settings, standardised; and a sheet for
    each prompt and seed, a row of B's steps and picture for each setting: PIL's, 256 x 12 * 128.
    """
    prompts, seeds = zip(*itertools.product(PROMPTS, SEEDS))
    settings, latents = list(itertools.product(GUIDANCE, STEPS_C)), []
    sheets = [Image.new("RGB", (2 * SIDE, len(settings) * SIDE)) for _ in prompts]
    for row, (guidance, steps) in enumerate(tqdm(settings, unit="setting")):
        way_c, way_b = [], []
        drawn = chain.draw(prompts, seeds, (SIDE, SIDE), steps, guidance, history_c=way_c,
                           history_b=way_b)
        latents.append(way_c[-1].cpu())
        for place, step in enumerate(STEPS_B):
            decoded = chain.a.decode(chain.a.unstandardise(way_b[step - 1]))
            x, y = place % 2 * SIDE // 2, place // 2 * SIDE // 2 + row * SIDE
            for sheet, image in zip(sheets, decoded):
                sheet.paste(pictures.to_pil(image).reduce(2), (x, y))
        for sheet, image in zip(sheets, drawn):
            sheet.paste(image, (SIDE, row * SIDE))
    return torch.stack(latents, 1).unflatten(0, (len(PROMPTS), len(SEEDS))), sheets


def in_text(content):
    return base64.b64encode(content).decode()


def webp(sheet, quality):
    file = io.BytesIO()
    sheet.save(file, "WEBP", quality=quality)
    return in_text(file.getvalue())


def page(latents, sheets):
    """-> (the page as text, the WebP quality of its pictures). Latents are bytes: 0 to 255 for -3
    to 3 standard deviations, clamped. Raises UsageError where LIMIT is too small."""
    levels = ((latents / 6 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
    data = dict(prompts=list(PROMPTS.items()), seed=SEEDS, guidance=GUIDANCE, steps=STEPS_C,
                shape=latents.shape[-3:], side=SIDE, stepsB=STEPS_B,
                latents=[in_text(one.numpy().tobytes()) for one in levels.flatten(0, 1)])
    for quality in QUALITIES:
        data["sheets"] = [webp(sheet, quality) for sheet in sheets]
        text = TEMPLATE.read_text("utf-8").replace(
            "@DATA@", json.dumps(data).replace("<", "\\u003c"))
        if len(text.encode()) <= LIMIT:
            return text, quality
    raise UsageError(f"the page has {len(text.encode()):,} bytes with the lowest quality, expected "
                     f"at most {LIMIT:,}")


def main(argv=None):
    parser = cli.Parser(__doc__)
    parser.add_argument("--weights", default="pocket", metavar="DIR", help="or pocket (default)")
    parser.add_argument("--out", type=Path, default=cli.ROOT / "docs/play.html", metavar="HTML",
                        help="(docs/play.html)")
    settings = parser.parse_args(argv)
    out = settings.out
    if out.suffix != ".html" or out.is_dir() or not os.access(out.parent, os.W_OK):
        raise UsageError(f"--out {out}: expected a file that ends in .html, in a folder that is "
                         "there and may be written")
    chain = sample.load_chain(**sample.find(settings.weights), device=training.setup(0))
    side = chain.c.config.image_size
    if side != SIDE:
        raise UsageError(f"--weights {settings.weights}: found a Stage C of {side} px, expected "
                         f"{SIDE}, as larger pictures do not fit in the page")
    text, quality = page(*draw(chain))
    out.write_text(text, "utf-8")
    count = len(PROMPTS) * len(SEEDS) * len(GUIDANCE) * len(STEPS_C)
    print(f"{out}: {count} pictures, WebP quality {quality}, {len(text.encode()) / 1e6:.2f} MB, "
          f"{time.process_time():.0f} CPU seconds")


if __name__ == "__main__":
    cli.start(main)
