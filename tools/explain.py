"""Two pictures that explain: `sample.py --stages`, the way to a picture; `--reconstruct`, the loss.
"""

import io
from pathlib import Path

import torch
from PIL import Image
from torchvision.transforms.functional import to_tensor

import data
import semantic_compressor
import stage_b
from plumbing import pictures
from plumbing.cli import UsageError


def check(prompts, settings):
    """Raises UsageError for what a sheet would leave out, before anything is loaded."""
    if len(prompts) > 1 or settings.n > 1 or settings.stages and settings.reconstruct:
        raise UsageError(f"--stages and --reconstruct: found {len(prompts)} prompts, --n "
                         f"{settings.n}; expected one of the two, one prompt and no --n")


@torch.no_grad()
def picture_of_steps(chain, prompt, seed, how):
    """A sheet: C's latent after 1 step, 1/4 … of all (three channels); B's, decoded by A."""
    history_c, history_b = [], []
    image, = chain.draw([prompt], [seed], **how, history_c=history_c, history_b=history_b)
    way_c, way_b = ([way[round(quarter * (len(way) - 1) / 4)] for quarter in range(5)]
                    for way in (history_c, history_b))
    shown = [torch.nn.functional.interpolate(pictures.latent_picture(x), image.size[::-1])[0]
             for x in way_c] + [chain.a.decode(chain.a.unstandardise(x))[0] for x in way_b]
    shares = ("the first step", "1/4", "1/2", "3/4", "all steps")
    return pictures.grid(shown, 5, [f"Stage {stage} after {share}"
                                    for stage in "CB" for share in shares])


def as_jpeg(image, limit=0):
    """(3, H, W) in [0, 1] -> (the picture after JPEG, its bytes): the best of Pillow's qualities
    that fits in `limit` bytes, or 1, the smallest file, where none does."""
    for quality in range(100 if limit else 1, 0, -1):
        file = io.BytesIO()
        pictures.to_pil(image).save(file, "JPEG", quality=quality, optimize=True)
        if file.tell() <= limit:
            break
    return to_tensor(Image.open(file)), file.tell()


@torch.no_grad()
def reconstruct(chain, paths, prompt, settings):
    """Images through A alone, through compressor, B and A, and as the smallest JPEG: a sheet with a
    row for each, with bytes (latents as float16) and PSNR in dB. B's guidance is 1 unless given.
    """
    if chain.compressor is None:
        raise UsageError("--reconstruct needs the Semantic Compressor, and these weights have "
                         "none; name one by --compressor")
    guidance = 1.0 if settings.guidance_b is None else settings.guidance_b
    rows = []
    for path in paths:
        pixels = read(path, settings.size, chain.b.config.image_size)
        pixels = pixels.to(next(chain.a.parameters()).device)
        latent = chain.a.encode(pixels)
        sem = chain.compressor.standardise(chain.compressor(semantic_compressor.resize(pixels)))
        drawn = stage_b.draw_images(chain, sem, [prompt], [settings.seed], settings.steps_b,
                                    guidance, settings.start, settings.negative)
        jpeg, jpeg_bytes = as_jpeg(pixels[0])
        shown = [("the image", pixels, pixels.numel()),
                 ("Stage A alone", chain.a.decode(latent), 2 * latent.numel()),
                 ("compressor + B + A", drawn, 2 * sem.numel()),
                 ("the smallest JPEG", jpeg[None], jpeg_bytes)]
        captions = [f"{name}: {size:,} bytes" + f", {pictures.psnr(one.cpu(), pixels.cpu()):.1f} dB"
                    * (one is not pixels) for name, one, size in shown]
        print(f"{path}: " + "; ".join(captions[1:]))
        rows.append(pictures.grid([one[0] for _, one, _ in shown], 4, captions))
    sheet = Image.new("RGB", (max(row.width for row in rows), sum(row.height for row in rows)),
                      "white")
    for index, row in enumerate(rows):
        sheet.paste(row, (0, sum(above.height for above in rows[:index])))
    return sheet


def read(path, size, trained):
    """An image file -> (1, 3, H, W) in [0, 1], of `size`, else about the size of training."""
    try:
        image = data.decode(Path(path).read_bytes())
    except (OSError, data.BadSample) as error:
        raise UsageError(f"{path}: expected an image that Pillow reads ({error})") from None
    scale = min(1, trained / min(image.size)) / 128
    size = size or tuple(
        min(max(128, round(side * scale) * 128), 4 * trained) for side in image.size)
    if size != image.size:
        print(f"{path}: {image.size[0]}x{image.size[1]} is resized to {size[0]}x{size[1]}, about "
              f"the {trained} px of training (--size overrides)")
        image = image.resize(size, Image.Resampling.BICUBIC)
    return to_tensor(image)[None]
