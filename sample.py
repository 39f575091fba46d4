"""From a prompt to a PNG: the chain C -> B -> A (Würstchen, §3.3 and Figure 2).

    text --Stage C, 60 steps--> (16, 3H/128, 3W/128) --Stage B, 12 steps--> (4, H/4, W/4)
         --Stage A's decoder--> (3, H, W)

    python sample.py "a red star above a blue circle" --out star.png
    python sample.py --prompts prompts.txt --n 2 --seed 7 --size 256x128
    python sample.py "a red star" --stages              the way from C's latent to the picture
    python sample.py --reconstruct photo.png            what Stage A alone loses, and what B loses
    python sample.py "a photo of a fox" --weights released --size 1024x1024      Würstchen v2

The weights are those in pocket/, small ones for the drawings of pocket/shapes.py; or a folder with
stage_a/, stage_b/ and stage_c/, each with a checkpoint.pt, as the training commands leave it
(`--weights runs/pocket`); or published ones (see `find`). Prompt, seed and settings are written
into the PNG's metadata. Picture i of a seed is the same whatever is drawn beside it.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torchvision.transforms.functional import to_tensor
from tqdm import tqdm

import data
import semantic_compressor
import stage_a
import stage_b
import stage_c
from plumbing.cli import UsageError
from plumbing import checkpoint, cli, pictures, training


# ---- weights -------------------------------------------------------------------------------------

DIFFUSERS = dict(a="wuerstchen/vqgan", b="wuerstchen/decoder", c="wuerstchen-prior/prior",
                 compressor="EfficientNetEncoder", text_b="wuerstchen/text_encoder",
                 text_c="wuerstchen-prior/text_encoder")                  # warp-ai, on the hub
POCKET = {part: checkpoint.POCKET / f"stage_{stage}.safetensors"                 # in this repository
          for part, stage in dict(a="a", b="b", c="c", compressor="b").items()}
LAYOUTS = (      # of a folder of weights; the compressor and the text encoders may be missing
    dict(a="stage_a/checkpoint.pt", b="stage_b/checkpoint.pt", c="stage_c/checkpoint.pt",
         compressor="stage_b/checkpoint.pt"),                             # what training leaves
    dict(POCKET, b="stage_b/checkpoint.pt", c="stage_c/checkpoint.pt",
         compressor="stage_b/checkpoint.pt"),                             # B and C trained on A's
    dict(POCKET, c="stage_c/checkpoint.pt"),                              # Stage C trained alone
    {part: path.name for part, path in POCKET.items()},
    DIFFUSERS,
    dict(a="vqgan_f4_v1_500k.pt", b="model_v2_stage_b.pt", compressor="model_v2_stage_b.pt",
         c="model_v2_stage_c_finetune_interpolation.pt"),                 # official (dome272)
    dict(a="vqgan_f4_v1_500k.pt", b="model_v2_stage_b.pt", compressor="model_v2_stage_b.pt",
         c="model_v2_stage_c.pt"))


def find(folder, needed="abc"):
    """A folder of weights -> where its parts are: {"a": path, "b": …, "c": …, …}."""
    for layout in LAYOUTS:
        paths = {part: Path(folder) / name for part, name in layout.items()}
        found = all(paths[part].exists() for part in needed)
        if found and any(Path(folder) in path.parents for path in paths.values() if path.exists()):
            return {part: path for part, path in paths.items()
                    if path.exists() and (part != "c" or "c" in needed)}
    raise UsageError(
        f"--weights {folder}: expected stage_a/, stage_b/ and "
        "stage_c/, each with the checkpoint.pt that training leaves; or wuerstchen/ with vqgan/ "
        "and decoder/ and wuerstchen-prior/ with prior/, as diffusers writes them; or the official "
        "files vqgan_f4_v1_500k.pt, model_v2_stage_b.pt and model_v2_stage_c.pt")


def download():
    """The published weights (Würstchen v2) from the hub: {"a": path, …}. About 12.5 GB, once."""
    import huggingface_hub
    patterns = ["*/*.json", "*/model.safetensors", "*/diffusion_pytorch_model.safetensors"]
    roots = {}
    for name in ("wuerstchen", "wuerstchen-prior"):
        try:
            data.check_hub()
            roots[name] = huggingface_hub.snapshot_download(
                f"warp-ai/{name}", allow_patterns=patterns)
        except (OSError, ValueError) as offline:                          # HfHubHTTPError is one
            try:
                roots[name] = huggingface_hub.snapshot_download(
                    f"warp-ai/{name}", allow_patterns=patterns, local_files_only=True)
            except (OSError, ValueError):
                raise UsageError(
                    f"--weights released: not all of warp-ai/{name} is in the hub's cache, and it "
                    f"cannot be downloaded ({str(offline).splitlines()[0]}); go online once, or "
                    "put decoder/, vqgan/, text_encoder/ and tokenizer/ of warp-ai/wuerstchen into "
                    "DIR/wuerstchen, prior/, text_encoder/ and tokenizer/ of "
                    "warp-ai/wuerstchen-prior into DIR/wuerstchen-prior and give --weights DIR"
                ) from None
    parts = {part: name.split("/") for part, name in DIFFUSERS.items() if "/" in name}
    return {part: Path(roots[repository]) / folder for part, (repository, folder) in parts.items()}


# ---- the chain -----------------------------------------------------------------------------------

@dataclass
class Chain:
    """The trained networks in eval mode. `c` is None where only B and A were asked for."""
    a: stage_a.StageA
    b: stage_b.StageB
    c: stage_c.StageC
    compressor: semantic_compressor.SemanticCompressor    # None: not among the weights
    scale: tuple                                          # (mean, std) of its raw latents
    text_b: data.TextEncoder
    text_c: data.TextEncoder


def load_chain(a, b, c=None, compressor=None, text_b=None, text_c=None, clip=None, device="cpu"):
    """Load the stages and the text encoders that they were trained with, from the paths of `find`.

    compressor: None where it is in Stage B's checkpoint. clip: weights for CLIP text encoders
    (data.text_encoder), before text_b and text_c. Raises UsageError with a sentence: a
    missing file, a checkpoint of another stage, or stages that were not trained on each other.
    """
    vqgan, decoder = stage_a.load(a, device), stage_b.load(b, device)
    state_b, state_c = (checkpoint.load_checkpoint(path, stage) if path and Path(path).is_file() else {}
                        for path, stage in ((b, "B"), (c, "C")))
    released = semantic_compressor.PRESETS["released"]
    scale, net = (released.latent_mean, released.latent_std), None
    if compressor or "compressor_ema" in state_b:
        net = semantic_compressor.load(compressor or b, device)
        scale = net.config.latent_mean, net.config.latent_std
    if "stage_a" in state_b and checkpoint.checksum(vqgan.state_dict()) != state_b["stage_a"]:
        raise UsageError(f"{b}: trained on the latents of another Stage A than {a}; give "
                                  "the one it was trained with")
    if "compressor" in state_c and checkpoint.checksum(net.state_dict()) != state_c["compressor"]:
        raise UsageError(f"{c}: trained on the latents of another compressor than the one "
                                  f"in {b}; Stage C has to be trained again when Stage B was")
    encoder_b = text_encoder(state_b, "clip-h", decoder, b, clip or text_b, device)
    prior, encoder_c = None, encoder_b
    if c is not None:
        prior = stage_c.load(c, device)
        if "text_encoder" not in state_c or state_c["text_encoder"] != state_b.get("text_encoder"):
            encoder_c = text_encoder(state_c, "clip-bigg", prior, c, clip or text_c, device)
    return Chain(vqgan, decoder, prior, net, scale, encoder_b, encoder_c)


def text_encoder(state, published, model, path, weights, device):
    """The text encoder a checkpoint names, or the `published` one where it names none.

    UsageError if it is not the one that the model was trained with.
    """
    known = state.get("text_encoder", {"name": published})
    encoder = data.text_encoder(known["name"], weights, device)
    if encoder.checksum != known.get("checksum", encoder.checksum):
        raise UsageError(
            f"{path}: trained with another text encoder {encoder.name} than the one loaded (sha256 "
            f"{encoder.checksum[:12]}, expected {known['checksum'][:12]})")
    if encoder.width != model.config.text_width:
        raise UsageError(f"{path}: reads text tokens {model.config.text_width} wide, those"
                                  f" of the text encoder {encoder.name} are {encoder.width} wide")
    return encoder


def generators(seeds):
    """One stream of random numbers per picture, always on the CPU: the same on any machine."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def draw_latents(chain, prompts, seeds, height, width, steps=60, guidance=4.0, negative="",
                 history=None):
    """Stage C: prompts -> standardised latents (B, 16, 3H/128, 3W/128), §3.3."""
    shape = (len(prompts), chain.c.config.latent_channels, height * 3 // 128, width * 3 // 128)
    return stage_c.ddpm_sample(
        chain.c, shape, chain.text_c(prompts), chain.text_c([negative]), steps, guidance,
        generator=generators(seeds), history=history)


def draw_images(chain, latents, prompts, seeds, steps=12, guidance=None, start=None, negative="",
                history=None):
    """Stages B and A: standardised compressor latents (B, 16, h, w) -> (B, 3, 128h/3, 128w/3).

    guidance: None is Stage B's own (its Config). start: "tokens" (§3.3); "gaussian" for the
    released kind; None is that default. Images are about [0, 1], not clamped.
    """
    raw = chain.b.config.condition == "raw"
    mean, std = chain.scale
    sem = latents * std + mean if raw else latents
    shape = (len(latents), chain.b.config.latent_channels,
             latents.shape[2] * 32 // 3, latents.shape[3] * 32 // 3)
    guidance = chain.b.config.guidance if guidance is None else guidance
    start = ("gaussian" if raw else "tokens") if start is None else start
    noise = generators((seed + 2 ** 31) % 2 ** 32 for seed in seeds)      # not the noise of Stage C
    x = chain.a.random_tokens(shape, noise) if start == "tokens" else None
    drawn = stage_b.ddpm_sample(chain.b, shape, sem, chain.text_b(prompts), torch.zeros_like(sem),
                                chain.text_b([negative]), steps, guidance, x, noise, history)
    return chain.a.decode(chain.a.unstandardise(drawn))


def decode(latents, captions, a, b, clip=None):
    """Standardised compressor latents -> images: Stage C's previews while it trains."""
    chain = load_chain(a, b, clip=clip, device=latents.device)
    return draw_images(chain, latents, captions, range(len(captions)))


# ---- two pictures that explain -------------------------------------------------------------------

@torch.no_grad()
def picture_of_steps(chain, prompt, seed, height, width, settings):
    """C's latent on its way (three channels), B's (decoded by A); and the final picture."""
    history_c, history_b = [], []
    latents = draw_latents(chain, [prompt], [seed], height, width, settings.steps_c,
                           settings.guidance_c, settings.negative, history_c)
    image = draw_images(chain, latents, [prompt], [seed], settings.steps_b, settings.guidance_b,
                        settings.start, settings.negative, history_b)

    def spread(steps, count):
        return [steps[round(index * (len(steps) - 1) / (count - 1))] for index in range(count)]

    big = torch.nn.functional.interpolate
    row_c = [big(pictures.latent_picture(x), (height, width))[0] for x in spread(history_c, 5)]
    row_b = [chain.a.decode(chain.a.unstandardise(x))[0] for x in spread(history_b, 5)]
    shares = ("the first step", "1/4", "1/2", "3/4", "all steps")
    names = [f"Stage {stage} after {share}" for stage in "CB" for share in shares]
    return pictures.grid(row_c + row_b, 5, names), image


@torch.no_grad()
def reconstruct(chain, path, prompt, settings):
    """An image through A alone, and through compressor, B and A: (sheet, the two PSNRs in dB)."""
    try:
        image = data.decode(Path(path).read_bytes())
    except (OSError, data.BadSample) as error:
        raise UsageError(f"{path}: expected an image that Pillow reads ({error})")
    width, height = (max(128, round(side / 128) * 128) for side in image.size)
    if (width, height) != image.size:
        print(f"{path}: {image.size[0]}x{image.size[1]} is resized to {width}x{height}")
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    pixels = to_tensor(image)[None].to(next(chain.a.parameters()).device)   # (1, 3, H, W) in [0, 1]
    by_a = chain.a.decode(chain.a.encode(pixels))
    latents = chain.compressor.standardise(chain.compressor(semantic_compressor.resize(pixels)))
    by_b = draw_images(chain, latents, [prompt], [settings.seed], settings.steps_b,
                       settings.guidance_b, settings.start, settings.negative)
    loss_a, loss_b = pictures.psnr(by_a, pixels), pictures.psnr(by_b, pixels)
    captions = ["the image", f"through Stage A alone: {loss_a:.1f} dB",
                f"through compressor, B and A: {loss_b:.1f} dB"]
    return pictures.grid([pixels[0], by_a[0], by_b[0]], 3, captions), (loss_a, loss_b)


def export(chain, folder):
    """Write A, B, C and the compressor as diffusers does: folder/wuerstchen, …-prior, ….

    The text encoders are not written: they are those of warp-ai/wuerstchen and -prior, unchanged.
    Raises UsageError where diffusers has no such network.
    """
    if chain.b.config.attend_to_sem or chain.b.config.prediction != "released":
        raise UsageError("diffusers' Stage B does not attend to the compressor's latents and "
                              "has the released head; only one trained with --preset released can "
                              "be exported")
    folder = Path(folder)
    raw = chain.b.config.condition == "raw"
    mean, std = chain.scale if raw else (0.0, 1.0)
    try:
        checkpoint.save_diffusers(folder / "wuerstchen/vqgan", *stage_a.to_diffusers(chain.a))
    except ValueError as error:
        raise UsageError(str(error)) from None
    checkpoint.save_diffusers(folder / "wuerstchen/decoder", stage_b.to_diffusers(chain.b.config),
                       chain.b.state_dict())
    checkpoint.save_diffusers(folder / "wuerstchen-prior/prior", stage_c.to_diffusers(chain.c.config),
                       chain.c.state_dict())
    if chain.compressor is not None:
        checkpoint.save_diffusers(folder / "EfficientNetEncoder",
                           *semantic_compressor.to_diffusers(chain.compressor))
    # diffusers calls the divisor "latent_mean" and the offset "latent_std": raw = x * mean - std
    text = {"scheduler": ["diffusers", "DDPMWuerstchenScheduler"],
            "text_encoder": ["transformers", "CLIPTextModel"],
            "tokenizer": ["transformers", "CLIPTokenizerFast"]}
    pipelines = {
        "wuerstchen": dict(_class_name="WuerstchenDecoderPipeline", latent_dim_scale=10.67,
                           decoder=["wuerstchen", "WuerstchenDiffNeXt"],
                           vqgan=["wuerstchen", "PaellaVQModel"], **text),
        "wuerstchen-prior": dict(_class_name="WuerstchenPriorPipeline", latent_mean=std,
                                 latent_std=-mean, resolution_multiple=42.67,
                                 prior=["wuerstchen", "WuerstchenPrior"], **text)}
    scheduler = dict(_class_name="DDPMWuerstchenScheduler", s=0.008, scaler=1.0)
    for name, index in pipelines.items():
        (folder / name / "scheduler").mkdir(exist_ok=True)
        for file, content in (("model_index.json", index),
                              ("scheduler/scheduler_config.json", scheduler)):
            (folder / name / file).write_text(json.dumps(content, indent=2) + "\n")


# ---- command line --------------------------------------------------------------------------------

def read_size(text):
    """"256x128" -> (width, height), multiples of 128; anything else is refused with what works."""
    try:
        width, height = (int(part) for part in text.lower().split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: expected WIDTHxHEIGHT, as 256x128") from None
    if width % 128 or height % 128 or width < 128 or height < 128:
        low = [max(128, side // 128 * 128) for side in (width, height)]
        high = [max(128, -(-side // 128) * 128) for side in (width, height)]
        raise argparse.ArgumentTypeError(
            f"{text}: sides must be multiples of 128, so that both latent grids are whole; the "
            f"nearest that work are {low[0]}x{low[1]} and {high[0]}x{high[1]}")
    return width, height


def count_or_released(text):
    """A number of steps, or the word `released`."""
    return text if text == "released" else int(text)


def options():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompt", nargs="*", help="one or more prompts")
    parser.add_argument("--prompts", metavar="FILE", help="a file with one prompt per line")
    parser.add_argument("--out", default="sample.png")
    parser.add_argument("--weights", default=checkpoint.POCKET,
                        help="a folder, as runs/pocket (default: those of this repository, in "
                             "pocket/), or `released`: downloads the published ones")
    parser.add_argument("--clip", metavar="PATH", help="local weights of the CLIP text encoder, or "
                        "a folder with those of both as clip-h… and clip-bigg…")
    parser.add_argument("--n", type=int, default=1, help="pictures per prompt (1)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first picture (0)")
    parser.add_argument("--size", type=read_size, metavar="WxH", help="default: as in training")
    parser.add_argument("--steps-c", type=count_or_released, default=60,
                        metavar="N", help="Stage C steps (60: §4), or `released`: diffusers' 29")
    parser.add_argument("--steps-b", type=int, default=12, help="Stage B steps (12: §4)")
    parser.add_argument("--guidance-c", type=float, default=4.0, help="1 conditional, 0 not (4)")
    parser.add_argument("--guidance-b", type=float, help="likewise (default: the weights' own)")
    parser.add_argument("--start", choices=("tokens", "gaussian"),
                        help="what Stage B starts from: random codebook tokens (§3.3; default) or "
                             "noise (default of released weights)")
    parser.add_argument("--negative", default="", metavar="PROMPT", help="to be led away from")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--stages", action="store_true", help="show the steps to one picture")
    parser.add_argument("--reconstruct", metavar="IMAGE", help="what each stage loses of an image")
    parser.add_argument("--export", metavar="DIR", help="write the weights as diffusers reads them")
    return parser


def main(argv=None):
    settings = options().parse_args(argv)
    prompts = list(settings.prompt)
    if settings.prompts:
        try:
            lines = Path(settings.prompts).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"{settings.prompts}: expected UTF-8 text, a prompt on each line ({error})")
        prompts += [line.strip() for line in lines if line.strip()]
    if not prompts and not settings.reconstruct and not settings.export:
        raise UsageError('no prompt: give one, as `python sample.py "a red star above a blue circle"`')
    if settings.steps_c == "released":
        settings.steps_c = stage_c.RELEASED_LEVELS
    elif settings.steps_c < 1:
        raise UsageError("--steps-c is a count: expected 1 or more, or `released`")
    if settings.n < 1 or settings.steps_b < 1 or settings.batch_size < 1:
        raise UsageError("--n, --steps-b and --batch-size are counts: expected 1 or more")
    if not Path(settings.out).parent.is_dir():
        raise UsageError(f"--out {settings.out}: the folder {Path(settings.out).parent} does not exist")

    device, _, _ = training.setup(settings.seed)
    paths = download() if settings.weights == "released" else find(
        settings.weights, "ab" if settings.reconstruct else "abc")
    chain = load_chain(**paths, clip=settings.clip, device=device)
    if settings.export:
        export(chain, settings.export)
        print(f"{settings.export}: wuerstchen/ and wuerstchen-prior/, as diffusers reads them")
        return
    if settings.reconstruct and chain.compressor is None:
        raise UsageError(f"--reconstruct needs the Semantic Compressor, and {settings.weights} holds none; "
                 "put warp-ai/EfficientNetEncoder beside wuerstchen/, as EfficientNetEncoder/")

    about = dict(seed=settings.seed, steps_c=settings.steps_c, steps_b=settings.steps_b,
                 guidance_c=settings.guidance_c, guidance_b=settings.guidance_b,
                 start=settings.start, negative=settings.negative,
                 weights="pocket" if settings.weights == checkpoint.POCKET else settings.weights)
    if settings.reconstruct:
        sheet, loss = reconstruct(chain, settings.reconstruct, (prompts + [""])[0], settings)
        print(f"Stage A alone {loss[0]:.1f} dB; compressor, B and A {loss[1]:.1f} dB")
        save(sheet, settings.out, dict(about, reconstruct=settings.reconstruct, prompts=prompts))
        return
    width, height = settings.size or (chain.c.config.image_size,) * 2
    if settings.stages:
        sheet, _ = picture_of_steps(chain, prompts[0], settings.seed, height, width, settings)
        save(sheet, settings.out, dict(about, size=f"{width}x{height}", prompts=prompts[:1]))
        return
    jobs = [(prompt, settings.seed + i) for i, prompt in enumerate(
        prompt for prompt in prompts for _ in range(settings.n))]
    images = []
    for first in tqdm(range(0, len(jobs), settings.batch_size), unit="batch"):
        some, seeds = zip(*jobs[first:first + settings.batch_size])
        latents = draw_latents(chain, list(some), seeds, height, width, settings.steps_c,
                               settings.guidance_c, settings.negative)
        with torch.no_grad():
            images += draw_images(chain, latents, list(some), seeds, settings.steps_b,
                                  settings.guidance_b, settings.start, settings.negative).cpu()
    if len(jobs) == 1:
        sheet = pictures.to_pil(images[0])
    else:
        columns = settings.n if settings.n > 1 else min(8, len(jobs))
        sheet = pictures.grid(images, columns, [prompt for prompt, _ in jobs])
    save(sheet, settings.out, dict(about, size=f"{width}x{height}", n=settings.n, prompts=prompts))


def save(sheet, path, about):
    """Write the PNG with its settings as JSON under the keyword "parameters"."""
    info = PngInfo()
    info.add_itxt("parameters", json.dumps(about, ensure_ascii=False))
    sheet.save(path, pnginfo=info)
    print(path)


if __name__ == "__main__":
    cli.start(main)
