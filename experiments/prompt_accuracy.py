"""Does the picture show what the prompt asked for? The drawings' small world can be checked.

    python -m experiments.prompt_accuracy [--weights runs/pocket] [--n 1000] [--seed 1] [--out DIR]

Prompts come from the grammar of pocket/shapes.py, with one object and two in turn; one that came
before, mostly of a single object, is left out. Those of the training split ("seen") and those of
the held-out one are counted apart. `look_at` sees only the picture, never the prompt, and says what
is there; `compare` then holds that against what the prompt mentions.

    the drawings    themselves: what the checker can do
    A               through Stage A
    compressor+B+A  from the drawing's own latent: what Stage C's latents can be decoded to
    C+B+A           from the prompt
    C+B+A, no text in B; other text in B: that of the next prompt. Who draws what is asked for?

Of the held-out split three parts are counted apart: one object of a held-out colour and shape, such
an object beside another, and two objects that are seen in training, but not together.

Writes accuracy.json, with every prompt that C+B+A drew wrong, and failures.png into --out, and
prints tables with 95 % intervals (Wilson).
"""

import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torchvision.transforms.functional import to_tensor
from tqdm import tqdm

import sample
import semantic_compressor
import stage_b
from plumbing import cli, pictures, training
from plumbing.cli import UsageError
from pocket import shapes


# ---- the checker: picture -> what is there -------------------------------------------------------

def blobs(mask):
    """(H, W) bool -> (H, W) int64: 0 outside, one number for each connected part (8 neighbours)."""
    labels = torch.arange(1, mask.numel() + 1, dtype=torch.float32).view(1, 1, *mask.shape) * mask
    while True:                                        # the largest number of each part spreads
        spread = F.max_pool2d(labels, 3, stride=1, padding=1) * mask
        if torch.equal(spread, labels):
            return labels[0, 0].long()
        labels = spread


def centred(mask):
    """A blob (H, W) bool -> (40, 40) float: moved to its centre of mass and scaled to one area."""
    ys, xs = torch.nonzero(mask, as_tuple=True)
    reach = 1.5 * len(ys) ** 0.5                        # half the side of the window, in pixels
    steps = torch.linspace(-1, 1, 40) * reach
    H, W = mask.shape
    x = ((steps + xs.float().mean()) * 2 + 1) / W - 1
    y = ((steps + ys.float().mean()) * 2 + 1) / H - 1
    window = torch.stack(torch.meshgrid(y, x, indexing="ij")[::-1], dim=-1)[None]
    return F.grid_sample(mask.float()[None, None], window, align_corners=False)[0, 0]


def make_templates():
    """[(shape, centred mask, area / radius^2, centre of mass / radius)] at several rotations."""
    found = []
    for shape in shapes.SHAPES:
        for rotation in (-12, -6, 0, 6, 12) if shape != "circle" else (0,):
            thing = dict(colour="red", shape=shape, x=0.5, y=0.5, radius=0.25, rotation=rotation,
                         tint=[0, 0, 0])
            picture = shapes.render(dict(background="white", tint=[0, 0, 0], objects=[thing]), 128)
            mask = to_tensor(picture)[2] < 0.5          # blue: white has it, red has not
            ys, xs = torch.nonzero(mask, as_tuple=True)
            dx, dy = ((part.float().mean().item() - 63.5) / 32 for part in (xs, ys))
            found.append((shape, centred(mask), mask.sum().item() / 32 ** 2, dx, dy))
    return found


TEMPLATES = make_templates()
COLOURS = torch.tensor(list(shapes.COLOURS.values())) / 255               # (8, 3)
BACKGROUNDS = torch.tensor(list(shapes.BACKGROUNDS.values())) / 255       # (4, 3)


def nearest(colours, palette):
    """(N, 3) -> (N,) index of the nearest of (K, 3)."""
    return torch.cdist(colours, palette).argmin(1)


def look_at(picture):
    """(3, H, W) in [0, 1] -> {"background", "objects": [{colour, shape, size, x, y, radius}, …]}.

    x, y, radius are in picture widths. A colour is "mixed" where under four fifths of the inside
    of an object are nearest to one colour of the palette.
    """
    picture = picture.clamp(0, 1)
    H, W = picture.shape[1:]
    frame = torch.cat([picture[:, :2].flatten(1), picture[:, -2:].flatten(1),
                       picture[:, :, :2].flatten(1), picture[:, :, -2:].flatten(1)], 1)
    ground = frame.median(1).values                                       # nothing reaches it
    background = list(shapes.BACKGROUNDS)[nearest(ground[None], BACKGROUNDS)]
    smooth = F.avg_pool2d(F.pad(picture[None], (1, 1, 1, 1), mode="replicate"), 3, 1)[0]
    # An object's colour is at least 114 of 255 from any background: half of that is the outline.
    away = (smooth - ground[:, None, None]).square().sum(0).sqrt()
    labels, objects = blobs(away > 57 / 255), []
    for number in labels.unique()[1:]:
        blob = labels == number
        area = blob.sum().item()
        if area < 0.004 * H * W:                                          # the smallest star: .015
            continue
        inside = -F.max_pool2d(-blob.float()[None], 5, 1, 2)[0] > 0       # two pixels from the edge
        inside = inside if inside.sum() > 8 else blob
        votes = nearest(smooth[:, inside].T, COLOURS).bincount(minlength=len(COLOURS))
        colour = list(shapes.COLOURS)[votes.argmax()]
        if votes.max() < 0.8 * votes.sum():
            colour = "mixed"
        view = centred(blob)
        shape, _, share, dx, dy = min(TEMPLATES, key=lambda one: (one[1] - view).abs().sum().item())
        ys, xs = torch.nonzero(blob, as_tuple=True)
        radius = (area / share) ** 0.5
        x, y = xs.float().mean().item() - dx * radius, ys.float().mean().item() - dy * radius
        size = min(shapes.SIZES, key=lambda name: abs(sum(shapes.SIZES[name]) / 2 - radius / W))
        objects.append(dict(colour=colour, shape=shape, size=size, x=(x + 0.5) / W, y=(y + 0.5) / H,
                            radius=radius / W))
    return {"background": background, "objects": objects}


# ---- the comparison: what is there against what was asked for ------------------------------------

def at_place(thing, place):
    """Whether a single object is where "on the left" and so on put it, within .06 of its way."""
    low, high = shapes.EDGE + thing["radius"], 1 - shapes.EDGE - thing["radius"]
    for position, goal in zip((thing["x"], thing["y"]), shapes.PLACES[place][:2]):
        way = (position - low) / max(high - low, 1e-6)
        if not {0.0: way < 0.26, 0.5: abs(way - 0.5) < 0.10, 1.0: way > 0.74}[goal]:
            return False
    return True


def in_relation(first, second, relation):
    """Whether the first object is left of (…) the second, and more so than above or below it."""
    along, across = first["x"] - second["x"], first["y"] - second["y"]
    if relation in ("above", "below"):
        along, across = across, along
    return (along < 0) == (relation in ("left of", "above")) and abs(along) > abs(across)


def compare(found, scene, caption):
    """{attribute: bool} for all that the caption mentions, and "all". Attributes: count, colour,
    shape, size, place, relation, background; of two objects both must be right.
    """
    def judge(things):
        pairs = list(zip(things, scene["objects"]))
        right = dict(colour=all(one["colour"] == other["colour"] for one, other in pairs),
                     shape=all(one["shape"] == other["shape"] for one, other in pairs))
        sizes = [one["size"] == other["size"] for one, other in pairs
                 if f"{other['size']} {other['colour']} {other['shape']}" in caption]
        if sizes:
            right["size"] = all(sizes)
        if scene["relation"]:
            right["relation"] = in_relation(*things, scene["relation"])
        elif (place := scene["objects"][0]["place"]) and shapes.PLACES[place][2] in caption:
            right["place"] = at_place(things[0], place)
        return right

    things = found["objects"]
    count = len(things) == len(scene["objects"])
    if count:
        orders = [things] if len(things) == 1 else [things, things[::-1]]
        right = max((judge(order) for order in orders),
                    key=lambda one: (one["colour"] + one["shape"], sum(one.values())))
    else:                                               # nothing else can be assigned, so all wrong
        things = (things + [dict(colour=None, shape=None, size=None, x=0, y=0, radius=0.1)] * 2)
        right = dict.fromkeys(judge(things[:len(scene["objects"])]), False)
    right["count"] = count
    if scene["background"] in caption:
        right["background"] = found["background"] == scene["background"]
    return dict(right, all=all(right.values()))


# ---- the study -----------------------------------------------------------------------------------

ATTRIBUTES = ("all", "count", "colour", "shape", "size", "place", "relation", "background")


def prompts(n, split, seed):
    """n different (caption, scene): one object and two in turn, but for captions that came before.
    """
    found, attempt = {}, 0
    while len(found) < n:
        rng = np.random.RandomState([seed, 4 if split == "train" else 5, attempt])
        scene = shapes.draw_scene(rng, split, count=1 + attempt % 2)
        found.setdefault(shapes.caption(scene, rng), scene)
        attempt += 1
    return list(found.items())


def interval(right, n):
    """Wilson's 95 % interval of a share, in percent."""
    z, p = 1.96, right / n
    middle, half = p + z * z / (2 * n), z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    return [100 * (middle - half) / (1 + z * z / n), 100 * (middle + half) / (1 + z * z / n)]


def tally(judged):
    """[{attribute: bool}] -> {attribute: {"right", "of", "percent", "interval"}}."""
    table = {}
    for name in ATTRIBUTES:
        votes = [one[name] for one in judged if name in one]
        if votes:
            right = sum(votes)
            table[name] = dict(right=right, of=len(votes), percent=100 * right / len(votes),
                               interval=interval(right, len(votes)))
    return table


def part(scene):
    """What a scene of the held-out split holds out."""
    if "object" not in scene["held_out"]:
        return "a pair"
    return "an object alone" if len(scene["objects"]) == 1 else "an object in a pair"


@torch.no_grad()
def draw(chain, jobs, seeds, settings, ways):
    """Draw one batch in all the ways: {way: (B, 3, H, W)}."""
    captions, scenes = zip(*jobs)
    captions = list(captions)
    size = chain.c.config.image_size
    drawings = torch.stack([to_tensor(shapes.render(scene, size)) for scene in scenes])
    decode = dict(steps=settings.steps_b, guidance=settings.guidance_b)
    out = {"the drawings": drawings, "A": chain.a.decode(chain.a.encode(drawings))}
    sem = chain.compressor.standardise(chain.compressor(semantic_compressor.resize(drawings)))
    out["compressor+B+A"] = stage_b.draw_images(chain, sem, captions, seeds, **decode)
    latents = sample.draw_latents(chain, captions, seeds, size, size, settings.steps_c,
                                  settings.guidance_c)
    out["C+B+A"] = stage_b.draw_images(chain, latents, captions, seeds, **decode)
    out["C+B+A, no text in B"] = stage_b.draw_images(chain, latents, [""] * len(jobs), seeds,
                                                    **decode)
    out["C+B+A, other text in B"] = stage_b.draw_images(
        chain, latents, captions[1:] + captions[:1], seeds, **decode)
    return {way: out[way] for way in ways}


WAYS = ("the drawings", "A", "compressor+B+A", "C+B+A", "C+B+A, no text in B",
        "C+B+A, other text in B")


def main():
    parser = cli.Parser(__doc__)
    parser.add_argument("--weights", default="runs/pocket")
    parser.add_argument("--n", type=int, default=1000, help="prompts of each split (1000)")
    parser.add_argument("--seed", type=int, default=1, help="of prompts and noise (1)")
    parser.add_argument("--steps-c", type=int, default=60)
    parser.add_argument("--steps-b", type=int, default=12)
    parser.add_argument("--guidance-c", type=float, default=4.0)
    parser.add_argument("--guidance-b", type=float)
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--out", default="runs/accuracy", type=Path)
    settings = parser.parse_args()
    if settings.batch_size == 1 or settings.n % settings.batch_size == 1:
        raise UsageError(f"--n {settings.n} --batch-size {settings.batch_size} has a batch of one "
                         "prompt, which needs a second for \"other text in B\"; give another --n")
    training.setup(0)
    chain = sample.load_chain(**sample.find(settings.weights))
    settings.out.mkdir(parents=True, exist_ok=True)
    report, failures = {}, []
    for split, label in (("train", "seen"), ("heldout", "held out")):
        jobs, judged = prompts(settings.n, split, settings.seed), {way: [] for way in WAYS}
        for first in tqdm(range(0, len(jobs), settings.batch_size), desc=label, unit="batch"):
            some = jobs[first:first + settings.batch_size]
            seeds = [settings.seed * 1_000_000 + first + i for i in range(len(some))]
            for way, images in draw(chain, some, seeds, settings, WAYS).items():
                for (caption, scene), image in zip(some, images):
                    found = look_at(image)
                    right = compare(found, scene, caption)
                    judged[way].append(right)
                    if way == "C+B+A" and not right["all"]:
                        wrong = [name for name, good in right.items() if not good and name != "all"]
                        failures.append((image.cpu(), f"{caption} [{', '.join(wrong)}]"))
        report[label] = {way: tally(votes) for way, votes in judged.items()}
        for name in sorted({part(scene) for _, scene in jobs}) if split == "heldout" else ():
            report[f"{label}: {name}"] = {
                way: tally([right for right, (_, scene) in zip(votes, jobs) if part(scene) == name])
                for way, votes in judged.items()}
    (settings.out / "accuracy.json").write_text(json.dumps(
        dict(settings={name: str(value) for name, value in vars(settings).items()}, **report,
             wrong=[text for _, text in failures]), indent=1) + "\n")
    if failures:
        chosen = failures[:: max(1, len(failures) // 48)][:48]
        pictures.grid([image for image, _ in chosen], 8, [text for _, text in chosen]).save(
            settings.out / "failures.png")
    for label, ways in report.items():
        n = ways["the drawings"]["all"]["of"]
        print(f"\n| {label}, {n} prompts, % right | " + " | ".join(ATTRIBUTES) + " |")
        print("|---" * (len(ATTRIBUTES) + 1) + "|")
        for way, table in ways.items():
            cells = [""] * len(ATTRIBUTES)
            for column, name in enumerate(ATTRIBUTES):
                if name in table:
                    low, high = table[name]["interval"]
                    cells[column] = f"{table[name]['percent']:.1f} ({low:.0f}–{high:.0f})"
            print(f"| {way} | " + " | ".join(cells) + " |")
    print(f"\n{settings.out}/accuracy.json, failures.png")


if __name__ == "__main__":
    cli.start(main)
