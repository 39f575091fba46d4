"""From a prompt to a PNG: the chain C -> B -> A (Würstchen, §3.3 and Figure 2).

    text --Stage C, 60 steps--> (16, 3H/128, 3W/128) --Stage B, 12 steps--> (4, H/4, W/4)
         --Stage A's decoder--> (3, H, W)

    python sample.py "a red star above a blue circle" --out star.png
    python sample.py --prompts prompts.txt --n 2 --seed 7 --size 256x128
    python sample.py "a photo of a fox" --weights released --size 1024x1024      Würstchen v2

The weights are those of pocket/, small ones for the drawings of pocket/shapes.py; or a folder that
training leaves (`--weights runs/pocket`); or published ones. Prompt, seed and settings are in the
PNG's metadata. Picture i of a seed is the same whatever is drawn beside it.
"""

import argparse
import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm

import stage_b
import stage_c
from plumbing import checkpoint, cli, pictures, text, training
from plumbing.cli import UsageError

PARTS = dict(a="stage_a", b="stage_b", c="stage_c", compressor="stage_b")
RUN = {part: f"{stage}/checkpoint.pt" for part, stage in PARTS.items()}    # what training leaves
FORMATS = (".png", ".jpg", ".jpeg", ".webp")                 # which keep the settings
POCKET = {part: checkpoint.POCKET / f"{stage}.safetensors" for part, stage in PARTS.items()}


def hub():                             # None where published/ was deleted: ours needs nothing of it
    if (cli.ROOT / "published").is_dir():
        from published import hub
        return hub


def find(weights="pocket", needed="abc", **given):
    """A folder of weights, pocket or released -> where its parts are: {"a": path, "b": …, …}. The
    compressor may be missing. given: paths of parts that come before. Raises UsageError.
    """
    folder = checkpoint.POCKET if weights == "pocket" else Path(weights)
    given = {part: path for part, path in given.items() if path}
    if hub():
        given = hub().completed(weights, needed, given)
    for layout in (RUN, {**RUN, "a": POCKET["a"]}, {**POCKET, "c": RUN["c"]},    # on pocket's A, B
                   {part: path.name for part, path in POCKET.items()},
                   *(hub().LAYOUTS if hub() else ())):
        paths = {part: folder / name for part, name in layout.items()
                 if (folder / name).exists() and (
                     part in needed or part == "compressor" and "b" not in given)}
        if set(needed) <= {*paths, *given} and (set(needed) <= set(given) or any(
                folder in path.parents for path in paths.values())):
            return paths | given
    raise UsageError(
        f"--weights {folder}: expected stage_a/, stage_b/, stage_c/, each with the checkpoint.pt "
        "that training leaves; or wuerstchen/ and wuerstchen-prior/, as diffusers writes them; or "
        "the official vqgan_f4_v1_500k.pt, model_v2_stage_b.pt and model_v2_stage_c.pt")


# ---- the chain -----------------------------------------------------------------------------------

@dataclass
class Chain(stage_b.Decoder):
    """All trained networks in eval mode. `c` is None where only B and A were asked for."""
    c: stage_c.StageC
    text_c: torch.nn.Module

    def draw(self, prompts, seeds=None, size=None, steps_c=60, guidance_c=4.0, negative="",
             steps_b=12, guidance_b=None, start=None, history_c=None, history_b=None):
        """Prompts -> [PIL.Image], drawn at once. seeds: one for each; None: 0, 1, … size: (width,
        height) in pixels, multiples of 128; None: as in training. The others: stage_b.draw_images.
        """
        seeds, side = seeds or range(len(prompts)), self.c.config.image_size
        width, height = size or (side, side)
        if width % 128 or height % 128:
            raise UsageError(f"size ({width}, {height}): expected multiples of 128")
        latents = draw_latents(self, prompts, seeds, height, width, steps_c, guidance_c, negative,
                               history_c)
        return [pictures.to_pil(image) for image in stage_b.draw_images(
            self, latents, prompts, seeds, steps_b, guidance_b, start, negative, history_b)]


def load_chain(a, b, c=None, compressor=None, clip=None, device="cpu"):
    """Load the stages and the text encoders that they were trained with, from the paths of `find`.

    clip: weights for CLIP text encoders that no published stage has beside it. Raises UsageError:
    a missing file, one of another stage, stages that were not trained on each other.
    """
    decoder = stage_b.load_decoder(a, b, compressor, clip, device)
    chain = Chain(**vars(decoder), c=None, text_c=decoder.text_b)
    if c is not None:
        chain.c, known = stage_c.load(c, device), checkpoint.load_checkpoint(c, "C")
        has, _ = checkpoint.compressor(decoder.compressor_file)
        if known.get("compressor", has) != has:
            fits = hub() and hub().trained_on(c) or "of its own training"
            raise UsageError(f"{c}: trained on the latents of another compressor than the one in "
                             f"{compressor or b}; the --stage-b {fits} fits")
        if known.get("text_encoder") != chain.text_b.identity:
            clip = clip or ("released" if b == "released" else None)
            chain.text_c = text.known_text_encoder(c, known, "clip-bigg", clip, device,
                                                   chain.c.config.text_width)
    return chain


def draw_latents(chain, prompts, seeds, height, width, steps=60, guidance=4.0, negative="",
                 history=None):
    """Stage C: prompts -> standardised latents (B, 16, 3H/128, 3W/128), §3.3."""
    shape = (len(prompts), chain.c.config.latent_channels, height * 3 // 128, width * 3 // 128)
    return stage_c.ddpm_sample(
        chain.c, shape, chain.text_c(prompts), chain.text_c([negative]), steps, guidance,
        generator=stage_b.generators(seeds), history=history)


# ---- command line --------------------------------------------------------------------------------

def width_x_height(text):
    """"256x128" -> (256, 128), multiples of 128; anything else is refused with what works."""
    width, height = [int(side) for side in text.lower().split("x")]
    low, high = (f"{max(128, (width + more) // 128 * 128)}x{max(128, (height + more) // 128 * 128)}"
                 for more in (0, 127))
    if f"{width}x{height}" != low or max(width, height) > 2 ** 14:
        raise argparse.ArgumentTypeError(f"{text}: sides must be multiples of 128 to 16384, so "
                                         f"that both grids are whole; near are {low} and {high}")
    return width, height


def check_out(out):
    """-> whether `out` is a folder, which is made if need be. Raises UsageError, before the work,
    for what could not be written after it."""
    path, folder = Path(out), out.endswith("/") or Path(out).is_dir()
    if folder:
        path.mkdir(parents=True, exist_ok=True)
    fits = folder or path.suffix.lower() in FORMATS and (path.is_file() or not path.exists())
    if not (fits and os.access(path if path.exists() else path.parent, os.W_OK)):
        raise UsageError(f"--out {path}: expected a folder/, or a file in a folder that is there, "
                         f"which may be written and ends in {', '.join(FORMATS)}")
    return folder


def save(image, path, about):
    """Write a picture with its settings: a PNG's parameters, or Exif's ImageDescription. Where that
    fails it goes into the folder for temporary files. Raises UsageError."""
    info, exif = PngInfo(), Image.Exif()
    info.add_itxt("parameters", json.dumps(about, ensure_ascii=False))
    exif[0x010E] = json.dumps(about)
    try:
        png = str(path).lower().endswith(".png")
        image.save(path, **({"pnginfo": info} if png else {"exif": exif, "quality": 95}))
    except (OSError, ValueError) as error:
        with tempfile.NamedTemporaryFile(suffix=".png", delete=False) as file:
            image.save(file, "PNG", pnginfo=info)
        raise UsageError(f"--out {path}: {error}; the picture is in {file.name}") from None


def steps(text):
    """A number; or "released", the noise levels of diffusers' 29 steps."""
    return stage_c.RELEASED_LEVELS if text == "released" else cli.number("steps_c", int)(text)


def options():
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add("prompt", nargs="*", help="one or more prompts")
    add("--prompts", metavar="FILE", help="a file with one prompt per line")
    add("--out", metavar="PNG", default="sample.png", help="or a folder/, for a file per picture")
    add("--weights", default="pocket", metavar="DIR", help="or pocket (default), or released")
    add("--stage-a", metavar="PATH", help="in place of the one in --weights; or released")
    add("--stage-b", metavar="PATH", help="likewise, with its compressor")
    add("--stage-c", metavar="PATH", help="likewise")
    add("--compressor", metavar="PATH", help="likewise; where --stage-b has none")
    add("--clip", metavar="PATH", help="CLIP's weights; or a folder with clip-h… and clip-bigg…")
    add("--n", type=int, default=1, help="pictures per prompt (1)")
    add("--seed", type=int, default=0, help="seed of the first picture (0)")
    add("--size", type=width_x_height, metavar="WxH", help="in pixels (default: as in training)")
    add("--steps-c", type=steps, default=60, help="Stage C's steps (60: §4), or released: 29")
    add("--steps-b", type=int, default=12, help="Stage B's steps (12: §4)")
    add("--guidance-c", type=float, default=4.0, help="1 conditional, 0 not (4)")
    add("--guidance-b", type=float, help="likewise (default: the weights' own)")
    add("--start", choices=("tokens", "gaussian"), help="of Stage B (§3.3: tokens)")
    add("--negative", default="", metavar="PROMPT", help="to be led away from")
    add("--batch-size", type=int, default=16, help="pictures drawn at once (16)")
    add("--stages", action="store_true", help="show the steps to one picture")
    add("--reconstruct", nargs="+", metavar="IMAGE", help="what each stage loses of images")
    add("--device", choices=("cuda", "mps", "cpu"), help="the first that is there")
    return parser


def main(argv=None):
    settings = options().parse_args(argv)
    try:
        " ".join([*settings.prompt, settings.negative]).encode()
        content = Path(settings.prompts).read_text("utf-8-sig") if settings.prompts else ""
    except (OSError, UnicodeError) as error:
        raise UsageError(f"{settings.prompts or 'the prompt'}: expected UTF-8 text, a prompt on "
                         f"each line ({error})") from None
    prompts = settings.prompt + [line.strip() for line in content.split("\n") if line.strip()]
    if not prompts and not settings.reconstruct:
        raise UsageError('no prompt: give one, as `python sample.py "a red star"`')
    folder = check_out(settings.out)
    if settings.reconstruct or settings.stages:
        from tools import explain
        explain.check(prompts, settings)
    device = training.setup(settings.seed, settings.device)
    paths = find(settings.weights, "ab" if settings.reconstruct else "abc", a=settings.stage_a,
                 b=settings.stage_b, c=settings.stage_c, compressor=settings.compressor)
    chain = load_chain(**paths, clip=settings.clip, device=device)
    if chain.c:
        chain.text_c.tokens([*prompts, settings.negative])    # which says what is cut, of them all
    how = {name: getattr(settings, name) for name in ("size", "steps_c", "guidance_c", "negative",
                                                      "steps_b", "guidance_b", "start")}
    jobs, images, ended = [prompt for prompt in prompts for _ in range(settings.n)], [], None
    seeds = range(settings.seed, settings.seed + len(jobs))
    if settings.reconstruct:
        images = [explain.reconstruct(chain, settings.reconstruct, (prompts + [""])[0], settings)]
    elif settings.stages:
        images = [explain.picture_of_steps(chain, prompts[0], settings.seed, how)]
    else:
        try:
            for first in tqdm(range(0, len(jobs), settings.batch_size), unit="batch"):
                some = slice(first, first + settings.batch_size)
                images += chain.draw(jobs[some], seeds[some], **how)
        except (Exception, KeyboardInterrupt) as error:       # what was drawn before it is kept
            ended = error
    if len(images) > 1 and not folder:
        images = [pictures.grid(images, settings.n if settings.n > 1 else min(8, len(jobs)), jobs)]
    about = {name: value for name, value in vars(settings).items()
             if name not in ("prompt", "out", "clip", "batch_size", "device")}
    for number, image in enumerate(images):
        if len(images) > 1:
            about |= dict(seed=seeds[number], n=1)
        save(image, Path(settings.out, f"{number:04d}.png") if folder else settings.out,
             dict(about, prompts=[jobs[number]] if len(images) > 1 else prompts))
    print(*[settings.out] * bool(images))
    if ended:
        raise ended


if __name__ == "__main__":
    cli.start(main)
