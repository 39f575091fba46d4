"""From a prompt to a PNG: the chain C -> B -> A (Würstchen, §3.3 and Figure 2).

    text --Stage C, 60 steps--> (16, 3H/128, 3W/128) --Stage B, 12 steps--> (4, H/4, W/4)
         --Stage A's decoder--> (3, H, W)

    python sample.py "a red star above a blue circle" --out star.png
    python sample.py --prompts prompts.txt --n 2 --seed 7 --size 256x128
    python sample.py "a red star" --stages              the way from C's latent to the picture
    python sample.py --reconstruct photo.png            what Stage A alone loses, and what B loses
    python sample.py "a photo of a fox" --weights released --size 1024x1024      Würstchen v2

The weights are those of pocket/, small ones for the drawings of pocket/shapes.py; or a folder that
training leaves (`--weights runs/pocket`); or published ones. Prompt, seed and settings are in the
PNG's metadata. Picture i of a seed is the same whatever is drawn beside it.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm

import data
import semantic_compressor
import stage_b
import stage_c
from plumbing import checkpoint, cli, pictures, text, training
from plumbing.cli import UsageError

PARTS = dict(a="stage_a", b="stage_b", c="stage_c", compressor="stage_b")
RUN = {part: f"{stage}/checkpoint.pt" for part, stage in PARTS.items()}    # what training leaves
POCKET = {part: checkpoint.POCKET / f"{stage}.safetensors" for part, stage in PARTS.items()}


def find(folder, needed="abc"):
    """A folder of weights, pocket or released -> where its parts are: {"a": path, "b": …, …}. The
    compressor and the text encoders may be missing. Raises UsageError.
    """
    layouts = [RUN, {**RUN, "a": POCKET["a"]},                            # B and C trained on it
               {**POCKET, "c": RUN["c"]},                                 # Stage C trained alone
               {part: path.name for part, path in POCKET.items()}]
    if (cli.ROOT / "published").is_dir():
        from published import hub
        if folder == "released":
            return hub.download()
        layouts += hub.LAYOUTS
    folder = checkpoint.POCKET if folder == "pocket" else Path(folder)
    for layout in layouts:
        paths = {part: folder / name for part, name in layout.items()
                 if (folder / name).exists() and (part != "c" or "c" in needed)}
        if set(needed) <= set(paths) and any(folder in path.parents for path in paths.values()):
            return paths
    raise UsageError(
        f"--weights {folder}: expected stage_a/, stage_b/ and stage_c/, each with the "
        "checkpoint.pt that training leaves; or wuerstchen/ with vqgan/ and decoder/, and "
        "wuerstchen-prior/ with prior/, as diffusers writes them; or the official files "
        "vqgan_f4_v1_500k.pt, model_v2_stage_b.pt and model_v2_stage_c.pt")


# ---- the chain -----------------------------------------------------------------------------------

@dataclass
class Chain(stage_b.Decoder):
    """All trained networks in eval mode. `c` is None where only B and A were asked for."""
    c: stage_c.StageC
    text_c: torch.nn.Module


def load_chain(a, b, c=None, compressor=None, text_b=None, text_c=None, clip=None, device="cpu"):
    """Load the stages and the text encoders that they were trained with, from the paths of `find`.

    clip: weights for CLIP text encoders (plumbing/text.py), before text_b and text_c. Raises
    UsageError: a missing file, one of another stage, stages that were not trained on each other.
    """
    decoder = stage_b.load_decoder(a, b, compressor, clip or text_b, device)
    chain = Chain(**vars(decoder), c=None, text_c=decoder.text_b)
    if c is not None:
        chain.c, known = stage_c.load(c, device), checkpoint.load_checkpoint(c, "C")
        if "compressor" in known and known["compressor"] != checkpoint.checksum(
                chain.compressor.state_dict()):
            raise UsageError(f"{c}: trained on the latents of another compressor than the one in "
                             f"{b}; Stage C has to be trained again when Stage B was")
        if known.get("text_encoder") != chain.text_b.identity:
            chain.text_c = text.known_text_encoder(c, known, "clip-bigg", clip or text_c, device,
                                                   chain.c.config.text_width)
    return chain


def draw_latents(chain, prompts, seeds, height, width, steps=60, guidance=4.0, negative="",
                 history=None):
    """Stage C: prompts -> standardised latents (B, 16, 3H/128, 3W/128), §3.3."""
    shape = (len(prompts), chain.c.config.latent_channels, height * 3 // 128, width * 3 // 128)
    return stage_c.ddpm_sample(
        chain.c, shape, chain.text_c(prompts), chain.text_c([negative]), steps, guidance,
        generator=stage_b.generators(seeds), history=history)


def draw(chain, prompts, seeds, settings, history_c=None, history_b=None):
    """Prompts -> images (B, 3, H, W), with the settings of the command line."""
    latents = draw_latents(chain, prompts, seeds, *settings.size[::-1], settings.steps_c,
                           settings.guidance_c, settings.negative, history_c)
    return stage_b.draw_images(chain, latents, prompts, seeds, settings.steps_b,
                               settings.guidance_b, settings.start, settings.negative, history_b)


# ---- two pictures that explain -------------------------------------------------------------------

@torch.no_grad()
def picture_of_steps(chain, prompt, settings):
    """A sheet: C's latent after 1 step, 1/4 … of all (three channels); B's, decoded by A."""
    history_c, history_b = [], []
    image = draw(chain, [prompt], [settings.seed], settings, history_c, history_b)[0]
    way_c, way_b = ([way[round(quarter * (len(way) - 1) / 4)] for quarter in range(5)]
                    for way in (history_c, history_b))
    shown = [torch.nn.functional.interpolate(pictures.latent_picture(x), image.shape[1:])[0]
             for x in way_c] + [chain.a.decode(chain.a.unstandardise(x))[0] for x in way_b]
    shares = ("the first step", "1/4", "1/2", "3/4", "all steps")
    return pictures.grid(shown, 5, [f"Stage {stage} after {share}"
                                    for stage in "CB" for share in shares])


@torch.no_grad()
def reconstruct(chain, path, prompt, settings):
    """An image through A alone, and through compressor, B and A: a sheet with the PSNRs in dB."""
    if chain.compressor is None:
        raise UsageError("--reconstruct needs the Semantic Compressor, and these weights have "
                         "none; put warp-ai's EfficientNetEncoder/ beside wuerstchen/")
    try:
        image = data.decode(Path(path).read_bytes())
    except (OSError, data.BadSample) as error:
        raise UsageError(f"{path}: expected an image that Pillow reads ({error})") from None
    size = tuple(max(128, round(side / 128) * 128) for side in image.size)
    if size != image.size:
        print(f"{path}: {image.size[0]}x{image.size[1]} is resized to {size[0]}x{size[1]}")
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


# ---- command line --------------------------------------------------------------------------------

def width_x_height(text):
    """"256x128" -> (256, 128), multiples of 128; anything else is refused with what works."""
    width, height = [int(side) for side in text.lower().split("x")]
    low, high = (f"{max(128, (width + more) // 128 * 128)}x{max(128, (height + more) // 128 * 128)}"
                 for more in (0, 127))
    if f"{width}x{height}" != low:
        raise argparse.ArgumentTypeError(f"{text}: sides must be multiples of 128, so that both "
                                         f"latent grids are whole; near are {low} and {high}")
    return width, height


def count(text):
    """"12" -> 12, and nothing below 1."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected 1 or more")
    return int(text)


def steps(text):
    """A count; or "released", the noise levels of diffusers' 29 steps."""
    return stage_c.RELEASED_LEVELS if text == "released" else count(text)


def options():
    parser = argparse.ArgumentParser(description=__doc__, **cli.STYLE)
    add = parser.add_argument
    add("prompt", nargs="*", help="one or more prompts")
    add("--prompts", metavar="FILE", help="a file with one prompt per line")
    add("--out", metavar="PNG", default="sample.png", help="where the picture goes (sample.png)")
    add("--weights", default="pocket", metavar="DIR", help="or pocket (default), or released")
    add("--clip", metavar="PATH", help="CLIP's weights; or a folder with clip-h… and clip-bigg…")
    add("--n", type=count, default=1, help="pictures per prompt (1)")
    add("--seed", type=int, default=0, help="seed of the first picture (0)")
    add("--size", type=width_x_height, metavar="WxH", help="in pixels (default: as in training)")
    add("--steps-c", type=steps, default=60, help="Stage C's steps (60: §4), or released: 29")
    add("--steps-b", type=count, default=12, help="Stage B's steps (12: §4)")
    add("--guidance-c", type=float, default=4.0, help="1 conditional, 0 not (4)")
    add("--guidance-b", type=float, help="likewise (default: the weights' own)")
    add("--start", choices=("tokens", "gaussian"), help="of Stage B (§3.3: tokens)")
    add("--negative", default="", metavar="PROMPT", help="to be led away from")
    add("--batch-size", type=count, default=16, help="pictures drawn at once (16)")
    add("--stages", action="store_true", help="show the steps to one picture")
    add("--reconstruct", metavar="IMAGE", help="what each stage loses of an image")
    return parser


def main(argv=None):
    settings = options().parse_args(argv)
    try:
        text = Path(settings.prompts).read_text("utf-8-sig") if settings.prompts else ""
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{settings.prompts}: expected UTF-8 text, a prompt on each line "
                         f"({error})") from None
    prompts = settings.prompt + [line.strip() for line in text.split("\n") if line.strip()]
    if not prompts and not settings.reconstruct:
        raise UsageError('no prompt: give one, as `python sample.py "a red star"`')
    if not Path(settings.out).parent.is_dir():
        raise UsageError(f"--out {settings.out}: its folder does not exist")

    device = training.setup(settings.seed)
    paths = find(settings.weights, "ab" if settings.reconstruct else "abc")
    chain = load_chain(**paths, clip=settings.clip, device=device)
    chain.text_c.tokens([*prompts, settings.negative])        # which says what is cut, of them all
    settings.size = settings.size or chain.c and (chain.c.config.image_size,) * 2
    if settings.reconstruct:
        sheet = reconstruct(chain, settings.reconstruct, (prompts + [""])[0], settings)
    elif settings.stages:
        sheet = picture_of_steps(chain, prompts[0], settings)
    else:
        jobs, images = [prompt for prompt in prompts for _ in range(settings.n)], []
        seeds = range(settings.seed, settings.seed + len(jobs))
        for first in tqdm(range(0, len(jobs), settings.batch_size), unit="batch"):
            some = slice(first, first + settings.batch_size)
            images += draw(chain, jobs[some], seeds[some], settings).cpu()
        columns = settings.n if settings.n > 1 else min(8, len(jobs))
        sheet = (pictures.grid(images, columns, jobs) if len(jobs) > 1 else
                 pictures.to_pil(images[0]))
    about = {name: value for name, value in vars(settings).items()
             if name not in ("prompt", "out", "clip", "batch_size")}
    info = PngInfo()
    info.add_itxt("parameters", json.dumps(dict(about, prompts=prompts), ensure_ascii=False))
    sheet.save(settings.out, pnginfo=info)
    print(settings.out)


if __name__ == "__main__":
    cli.start(main)
