"""Who draws, Stage C or Stage B? A small decoder shows what is in the latent alone (Appendix D).

    python -m experiments.small_decoder [--n 500] [--figure figures/who_draws.png]
    python -m experiments.small_decoder --preset paper --weights released --data shards/ \\
        --prompts prompts.txt --steps 100000                                    on a GPU

It learns to paint a picture, reduced, from the compressor's latent, without noise to start from and
without text, so it can only paint what the latent says. What B + A have in their picture and it has
not is B's own. It is trained once for each compressor, kept in --out, and goes on where it stopped.
Then it writes

    figure   rows of prompts: the drawing; from its true latent, and from C's, the small decoder and
             B + A. Then one latent of C with three seeds of B, three latents with one seed, and the
             deviation between the three pictures, four times as bright
    table    prompts right, as prompt_accuracy.py judges them; with --prompts there is none
"""

from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torchvision.transforms.functional import to_tensor
from tqdm import tqdm

import data
import sample
import semantic_compressor
import stage_b
from experiments import prompt_accuracy as checker
from experiments import study
from plumbing import checkpoint, cli, pictures, training
from plumbing.cli import UsageError
from pocket import shapes

WIDTHS = {"paper": (512, 256, 128, 64),       # Appendix D: 24x24 -> 384 px; 3,858,371 parameters
          "pocket": (256, 128, 64, 32, 16)}   # ours: 3x3 -> 96 px
NOISE = 0.1        # ours: on the latents, of unit variance, as those that C draws are not exact
COLUMNS = ("count", "colour", "shape", "size", "place", "relation", "background")
SEEDS = 1_000_000  # of pictures: first of `--seed 1`, as in prompt_accuracy.py


def small_decoder(widths, channels=16):
    """(B, 16, h, w) -> (B, 3, 2^n h, 2^n w) for n widths. Appendix D's "downsampling" convolution,
    2x2 with stride 2, must go up, as a latent becomes a picture; so read, its parameters come out.
    """
    layers = []
    for width in widths:
        layers += [nn.ConvTranspose2d(channels, width, 2, stride=2),
                   nn.Conv2d(width, width, 3, padding=1), nn.GELU(), nn.BatchNorm2d(width)]
        channels = width
    return nn.Sequential(*layers, nn.Conv2d(channels, 3, 1))


def train(chain, settings, device):
    """The decoder for this compressor; one that --out holds is used, or goes on from its step."""
    path, decoder = settings.out / "decoder.pt", small_decoder(WIDTHS[settings.preset])
    decoder.to(device, memory_format=torch.channels_last)                 # faster on a CPU
    source = settings.data or "shards/shapes"
    known = dict(compressor=checkpoint.checksum(chain.compressor.state_dict()), data=source,
                 **{name: getattr(settings, name) for name in (
                     "preset", "steps", "batch_size", "lr")})
    found = torch.load(path, map_location=device) if path.exists() else {}
    if found and {name: found.get(name) for name in known} != known:
        print(f"{path}: of another compressor, data or setting; trained anew")
        found = {}
    size, begin = chain.c.config.image_size, found.get("step", 0)
    optimizer = torch.optim.AdamW(decoder.parameters(), settings.lr)
    if found:
        decoder.load_state_dict(found["model"])
        optimizer.load_state_dict(found["optimizer"])
    if begin == settings.steps:
        return decoder.eval()
    if settings.data is None:
        shapes.make_shapes(source)
    batches = data.stream(data.CaptionedImages(source, resize=size, crop=size, center=True),
                          settings.batch_size, workers=1)
    if found:
        batches.load_state_dict(found["data"])
    for step in (bar := tqdm(range(begin, settings.steps), desc="small decoder")):
        torch.manual_seed(step)
        images = next(batches)["images"].to(device)
        with torch.no_grad():
            sem = latents_of(chain, images)                               # (B, 16, h, w)
        painted = decoder(sem + NOISE * torch.randn_like(sem))
        target = F.interpolate(images, painted.shape[2:], mode="bicubic", antialias=True)
        error = (painted - target).square().mean()
        optimizer.zero_grad()
        error.backward()
        optimizer.param_groups[0]["lr"] = settings.lr * min(
            1, (step + 1) / 100, 3 * (1 - step / settings.steps))
        optimizer.step()
        if (step + 1) % 50 == 0 or step + 1 == settings.steps:
            bar.set_postfix_str(f"{-10 * error.log10().item():.1f} dB")
            checkpoint.save_checkpoint(path, dict(
                known, step=step + 1, model=decoder.state_dict(), data=batches.state_dict(),
                optimizer=optimizer.state_dict()))
    return decoder.eval()


def latents_of(chain, images):
    """(B, 3, H, W) -> standardised latents (B, 16, 3H/128, 3W/128)."""
    return chain.compressor.standardise(chain.compressor(semantic_compressor.resize(images)))


@torch.no_grad()
def draw(chain, decoder, prompts, scenes, seeds):
    """{way: pictures (B, 3, H, W)}; the ways from true latents only where there are scenes."""
    size, ways, device = chain.c.config.image_size, {}, next(decoder.parameters()).device
    latents = {"C": sample.draw_latents(chain, prompts, seeds, size, size)}
    if scenes:
        drawings = torch.stack([to_tensor(shapes.render(scene, size)) for scene in scenes])
        latents = {"compressor": latents_of(chain, drawings.to(device)), **latents}
        side = 2 ** ((len(decoder) - 1) // 4) * latents["C"].shape[-1]
        ways = {"the drawings": drawings, f"the drawings, at {side} px and back": resized(
            F.interpolate(drawings, (side, side), mode="bicubic", antialias=True), size)}
    for name, sem in latents.items():
        ways[f"{name} + small decoder"] = resized(decoder(sem), size)
        ways[f"{name} + B + A"] = stage_b.draw_images(chain, sem, prompts, seeds)
    return {name: images.cpu() for name, images in ways.items()}


def resized(images, size):
    return F.interpolate(images, (size, size), mode="bicubic", antialias=True).clamp(0, 1)


@torch.no_grad()
def figure(chain, decoder, prompts, scenes, rows=6):
    """The sheet, and in dB how alike two pictures of other seeds of B, and other latents, are."""
    size, seeds = chain.c.config.image_size, [SEEDS + i for i in range(rows)]
    ways = draw(chain, decoder, prompts[:rows], scenes[:rows], seeds)
    names = [name for name in ways if " px " not in name]
    blank = [torch.ones(3, size, size)] * (5 - len(names))
    shown = [one for i in range(rows) for one in [*(ways[name][i] for name in names), *blank]]
    words = [one for prompt in prompts[:rows] for one in [f"{names[0]}: {prompt}", *names[1:],
                                                          *[""] * len(blank)]]
    three, alike = list(range(3)), {}
    latents = sample.draw_latents(chain, [prompts[0]] * 3, three, size, size)   # three seeds of C
    for what, sem, noise in (("seed of B", latents[:1].expand(3, -1, -1, -1), three),
                             ("latent of C", latents, [0] * 3)):
        painted = resized(decoder(sem[:1]), size).cpu()
        drawn = stage_b.draw_images(chain, sem, [prompts[0]] * 3, noise).cpu().clamp(0, 1)
        alike[what] = pictures.psnr(drawn, drawn.roll(1, 0)).item()
        shown += [painted[0], *drawn, 4 * drawn.std(0)]
        words += [f"small decoder, latent 1: {prompts[0]}", *(f"{what} {i + 1}" for i in three),
                  "deviation x 4"]
    return pictures.grid(shown, 5, words), alike


def main(argv=None):
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add("--weights", default="pocket")
    add("--preset", choices=WIDTHS, default="pocket", help="of the small decoder")
    add("--data", help="what it trains on (shards/shapes, which are made if they are not there)")
    add("--steps", type=int, default=3000)
    add("--batch-size", type=int, default=16)
    add("--lr", type=float, default=2e-3)
    add("--n", type=int, default=500, help="prompts of the table (500)")
    add("--prompts", help="a file of prompts for the figure, in place of the drawings' grammar")
    add("--out", default="runs/small_decoder", type=Path)
    add("--figure", default="runs/small_decoder/who_draws.png", type=Path)
    settings = parser.parse_args(argv)
    device = training.setup(0)
    if settings.prompts:
        prompts, scenes = study.read(settings.prompts).splitlines(), []
    else:
        prompts, scenes = map(list, zip(*checker.prompts(max(settings.n, 6), "train", 1)))
    if not prompts:
        raise UsageError(f"{settings.prompts}: empty, expected a prompt on each line")
    for folder in (settings.out, settings.figure.parent):
        folder.mkdir(parents=True, exist_ok=True)
    chain = sample.load_chain(**sample.find(settings.weights), device=device)
    decoder = train(chain, settings, device)
    sheet, alike = figure(chain, decoder, prompts, scenes, min(6, len(prompts)))
    sheet.save(settings.figure)
    print(f"{settings.figure}; two pictures that differ in the seed of B alone agree to "
          f"{alike['seed of B']:.1f} dB, in the latent alone to {alike['latent of C']:.1f} dB")
    judged = {}
    for first in tqdm(range(0, settings.n if scenes else 0, 50), desc="table", unit="batch"):
        some = slice(first, min(first + 50, settings.n))
        seeds = [SEEDS + i for i in range(some.start, some.stop)]
        for way, images in draw(chain, decoder, prompts[some], scenes[some], seeds).items():
            judged.setdefault(way, []).extend(
                checker.compare(checker.look_at(image), scene, prompt)
                for image, scene, prompt in zip(images, scenes[some], prompts[some]))
    if judged:
        print(f"| {settings.n} prompts, % right | all | " + " | ".join(COLUMNS) + " |")
        print("|---" * (len(COLUMNS) + 2) + "|")
    for way, votes in judged.items():
        found = checker.tally(votes)
        low, high = found["all"]["interval"]
        print(f"| {way} | {found['all']['percent']:.1f} ({low:.0f}–{high:.0f}) | " + " | ".join(
            f"{found[name]['percent']:.1f}" if name in found else "" for name in COLUMNS) + " |")


if __name__ == "__main__":
    cli.start(main)
