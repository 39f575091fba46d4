"""Two pictures that explain: `sample.py --stages`, the way to a picture; `--reconstruct`, the loss.
"""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

import data
import semantic_compressor
import stage_b
from plumbing import pictures
from plumbing.cli import UsageError


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


@torch.no_grad()
def reconstruct(chain, path, prompt, settings):
    """An image through A alone, and through compressor, B and A: a sheet with the PSNRs in dB."""
    if chain.compressor is None:
        raise UsageError("--reconstruct needs the Semantic Compressor, and these weights have "
                         "none; name one by --compressor")
    try:
        image = data.decode(Path(path).read_bytes())
    except (OSError, data.BadSample) as error:
        raise UsageError(f"{path}: expected an image that Pillow reads ({error})") from None
    trained = chain.b.config.image_size
    scale = min(1, trained / min(image.size)) / 128
    size = settings.size or tuple(
        min(max(128, round(side * scale) * 128), 4 * trained) for side in image.size)
    if size != image.size:
        print(f"{path}: {image.size[0]}x{image.size[1]} is resized to {size[0]}x{size[1]}, about "
              f"the {trained} px of training (--size overrides)")
        image = image.resize(size, Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255   # (1, 3, H, W), [0, 1]
    pixels = pixels.to(next(chain.a.parameters()).device)
    by_a = chain.a.decode(chain.a.encode(pixels))
    latents = chain.compressor.standardise(chain.compressor(semantic_compressor.resize(pixels)))
    by_b = stage_b.draw_images(chain, latents, [prompt], [settings.seed], settings.steps_b,
                               settings.guidance_b, settings.start, settings.negative)
    captions = ["the image", f"through Stage A alone: {pictures.psnr(by_a, pixels):.1f} dB",
                f"through compressor, B and A: {pictures.psnr(by_b, pixels):.1f} dB"]
    print("; ".join(captions[1:]))
    return pictures.grid([pixels[0], by_a[0], by_b[0]], 3, captions)
