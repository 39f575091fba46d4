"""
The built-in drawings: a small world whose captions can be checked by eye.

    python -m pocket.shapes --out shards/shapes [--count 20000] [--split heldout] [--size 128]

One or two coloured shapes on a plain background. A picture is first a *scene*, a plain dict
that says what is there (and is stored as the .json of its sample), then a drawing, then a
caption. A caption always names every colour and every shape; size, place and background are
mentioned or not, and what it does not mention varies freely.

    {"background": "white", "tint": [0, 5, -3], "held_out": [],
     "relation": "left of",                    # of objects[0] to objects[1]; None for one object
     "objects": [{"colour": "red", "shape": "star", "size": "small", "place": None,
                  "x": 0.31, "y": 0.52, "radius": 0.12,  # in picture widths, from the top left;
                  "rotation": 3.1, "tint": [2, -7, 0]},  # the circle around (x, y) holds it
                 ...]}

Held out of training, fixed by a constant below and therefore before any training:
  - 6 of the 48 (colour, shape) pairs, one for each shape: a train picture never shows them;
  - 240 of the 2,256 ordered pairs of different objects, always both orders of the same two,
    because "A left of B" is the same picture as "B right of A": each of the two objects is
    common in the train pictures, the two together never occur.
Every picture of the split "heldout" shows at least one of these.

Everything follows from (seed, split, index) by numpy's RandomState, whose streams are frozen:
the same drawings in every numpy version, for any number of workers.
"""

import glob
import io
import json
import multiprocessing
import multiprocessing.connection
import os
import signal

import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

from plumbing import cli
from plumbing.cli import UsageError, read_json
from sources import tars

# ---- The grammar ---------------------------------------------------------------------------------

VERSION = 1  # of the drawings: goes up when the same seed would draw something else
COLOURS = {  # ours: 8 words for which CLIP has one token each, far apart also after the jitter
    "red": (222, 30, 38), "orange": (255, 136, 0), "yellow": (255, 222, 20),
    "green": (28, 150, 50), "cyan": (40, 215, 225), "blue": (30, 80, 240),
    "purple": (125, 30, 165), "pink": (255, 130, 190),
}
BACKGROUNDS = {  # ours: none of them close to an object's colour
    "white": (248, 248, 248), "gray": (140, 140, 140), "black": (12, 12, 12),
    "brown": (92, 58, 34),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "heart")
SIZES = {  # radius of the circle around the object, in picture widths; clear gaps in between
    "small": (0.110, 0.125), "medium": (0.165, 0.185), "large": (0.250, 0.275),
}
RELATIONS = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
PLACES = {  # where a single object may be: (x, y), and how a caption says it
    "left": (0.0, 0.5, "on the left"), "right": (1.0, 0.5, "on the right"),
    "top": (0.5, 0.0, "at the top"), "bottom": (0.5, 1.0, "at the bottom"),
    "centre": (0.5, 0.5, "in the middle"),
}
EDGE = 0.02  # no object comes closer to the border, in picture widths
GAP = 0.04   # nor one object closer to the other, along the axis of their relation

OBJECTS = [(colour, shape) for colour in COLOURS for shape in SHAPES]


def _choose_held_out():
    """-> (set of 6 objects, set of 240 ordered pairs of other objects)."""
    rng = np.random.RandomState(20230601)  # a constant: the month the paper appeared
    colours = rng.permutation(list(COLOURS))[:len(SHAPES)]
    objects = {(str(colour), shape) for colour, shape in zip(colours, SHAPES)}
    kept = [thing for thing in OBJECTS if thing not in objects]
    couples = [(a, b) for i, a in enumerate(kept) for b in kept[i + 1:]]
    chosen = [couples[i] for i in rng.permutation(len(couples))[:120]]
    return objects, set(chosen) | {(b, a) for a, b in chosen}


HELD_OUT_OBJECTS, HELD_OUT_PAIRS = _choose_held_out()


def held_out(scene):
    """-> what of the scene is held out of training: [] or some of "object", "pair"."""
    things = [(thing["colour"], thing["shape"]) for thing in scene["objects"]]
    found = ["object"] if any(thing in HELD_OUT_OBJECTS for thing in things) else []
    return found + (["pair"] if tuple(things) in HELD_OUT_PAIRS else [])


# ---- Scenes --------------------------------------------------------------------------------------

def scene_rng(seed, split, index):
    """The random stream of one picture, the same wherever and whenever it is drawn."""
    if split not in ("train", "heldout"):
        raise ValueError(f"split {split!r} is not known: expected 'train' or 'heldout'")
    return np.random.RandomState([seed, 0 if split == "train" else 1, index])


def scene(index, split="train", seed=0):
    """The scene of picture `index`: odd indices show two objects."""
    return draw_scene(scene_rng(seed, split, index), split, count=1 + index % 2)


def draw_scene(rng, split="train", count=None):
    """A random scene of the split, with 1 or 2 objects (count=None: either)."""
    count = count or int(rng.randint(1, 3))
    chosen = _choose_objects(rng, split, count)
    picture = {
        "background": _pick(rng, list(BACKGROUNDS)), "relation": None,
        "objects": _place_one(rng) if count == 1 else None,
    }
    if count == 2:
        picture["relation"], picture["objects"] = _place_two(rng)
    for (colour, shape), thing in zip(chosen, picture["objects"]):
        thing.update(colour=colour, shape=shape,
                     rotation=round(rng.uniform(-12, 12), 2),                     # degrees
                     tint=[int(rng.randint(-10, 11)) for _ in range(3)])          # of 255
    picture["tint"] = [int(rng.randint(-6, 7)) for _ in range(3)]
    picture["held_out"] = held_out(picture)
    return picture


def _pick(rng, choices):
    return choices[rng.randint(len(choices))]


def _choose_objects(rng, split, count):
    """`count` different (colour, shape) pairs that the split may show."""
    if split == "heldout" and (count == 1 or rng.uniform() < 0.5):
        first = _pick(rng, sorted(HELD_OUT_OBJECTS))
    elif split == "heldout":
        return _pick(rng, sorted(HELD_OUT_PAIRS))
    else:
        first = _pick(rng, [thing for thing in OBJECTS if thing not in HELD_OUT_OBJECTS])
    if count == 1:
        return [first]
    while True:
        second = _pick(rng, OBJECTS)
        if second == first or (second[0] == first[0] and rng.uniform() < 0.75):
            continue  # two objects of one colour are allowed but rare
        forbidden = second in HELD_OUT_OBJECTS or (first, second) in HELD_OUT_PAIRS
        if split == "train" and forbidden:
            continue
        pair = [first, second]
        return pair if rng.uniform() < 0.5 else pair[::-1]


def _place_one(rng):
    size = _pick(rng, list(SIZES))
    radius = rng.uniform(*SIZES[size])
    low, high = EDGE + radius, 1 - EDGE - radius
    place = _pick(rng, list(PLACES)) if rng.uniform() < 0.5 else None
    if place is None:
        x, y = rng.uniform(low, high), rng.uniform(low, high)
    else:  # towards an edge: the nearest fifth of the free way, else the middle give or take 4 %
        x, y = (low + (high - low) * (0.2 * rng.uniform() if goal == 0 else
                                      1 - 0.2 * rng.uniform() if goal == 1 else
                                      0.5 + 0.08 * rng.uniform(-1, 1))
                for goal in PLACES[place][:2])
    return [_object(size, place, x, y, radius)]


def _place_two(rng):
    """-> (relation, two objects): objects[0] stands in `relation` to objects[1]."""
    sizes = ("large", "large")
    while sizes == ("large", "large"):  # the one combination that does not fit side by side
        sizes = (_pick(rng, list(SIZES)), _pick(rng, list(SIZES)))
    radii = [rng.uniform(*SIZES[size]) for size in sizes]
    relation = _pick(rng, list(RELATIONS))
    # Along the axis: edge, near object, gap, far object, edge. The rest of the way is shared
    # out at random, so that the two circles never touch and the relation is always clear.
    spare = 1 - 2 * EDGE - GAP - 2 * sum(radii)
    before, between, _ = spare * rng.dirichlet((1, 1, 1))
    near, far = (0, 1) if relation in ("left of", "above") else (1, 0)
    along = [0.0, 0.0]
    along[near] = EDGE + before + radii[near]
    along[far] = along[near] + radii[near] + GAP + between + radii[far]
    # Across the axis both stand near one line, at most a third of their distance apart.
    room = [(EDGE + radius, 1 - EDGE - radius) for radius in radii]
    line = rng.uniform(max(low for low, _ in room), min(high for _, high in room))
    reach = abs(along[0] - along[1]) / 6
    across = [float(np.clip(line + rng.uniform(-reach, reach), *limits)) for limits in room]
    sideways = relation in ("left of", "right of")
    return relation, [
        _object(sizes[i], None, *((along[i], across[i]) if sideways else (across[i], along[i])),
                radii[i])
        for i in range(2)
    ]


def _object(size, place, x, y, radius):
    return {"colour": None, "shape": None, "size": size, "place": place,
            "x": round(float(x), 4), "y": round(float(y), 4), "radius": round(float(radius), 4)}


# ---- Drawing -------------------------------------------------------------------------------------

def _outlines():
    """Each shape as corners inside the unit circle, y downwards; None is the circle itself."""
    def on_circle(degrees, radius=1.0):
        angle = np.deg2rad(np.asarray(degrees, dtype=np.float64) - 90)
        return np.stack((np.cos(angle), np.sin(angle)), axis=1) * np.reshape(radius, (-1, 1))

    arm = 0.34  # half the width of the cross's arms
    end = (1 - arm ** 2) ** 0.5
    corner = [(arm, -end), (arm, -arm), (end, -arm), (end, arm), (arm, arm), (arm, end)]
    turn = np.linspace(0, 2 * np.pi, 60, endpoint=False)
    heart = np.stack((16 * np.sin(turn) ** 3,
                      -13 * np.cos(turn) + 5 * np.cos(2 * turn) + 2 * np.cos(3 * turn)
                      + np.cos(4 * turn) - 2.5), axis=1)
    return {
        "circle": None,
        "square": on_circle([45, 135, 225, 315]),
        "triangle": on_circle([0, 120, 240]),
        "star": on_circle(np.arange(10) * 36, np.where(np.arange(10) % 2, 0.42, 1.0)),
        "cross": np.array(corner + [(-x, -y) for x, y in corner]),
        "heart": heart / np.linalg.norm(heart, axis=1).max(),
    }


OUTLINES = _outlines()
SMOOTH = 4  # drawn four times as large, then averaged: that is the antialiasing


def render(scene, size=128):
    """The scene as a square RGB picture of `size` pixels."""
    def tinted(colour, tint):
        return tuple(int(np.clip(c + t, 0, 255)) for c, t in zip(colour, tint))

    large = size * SMOOTH
    picture = Image.new("RGB", (large, large), tinted(BACKGROUNDS[scene["background"]],
                                                      scene["tint"]))
    draw = ImageDraw.Draw(picture)
    for thing in scene["objects"]:
        x, y, radius = (thing[name] * large for name in ("x", "y", "radius"))
        fill = tinted(COLOURS[thing["colour"]], thing["tint"])
        corners = OUTLINES[thing["shape"]]
        if corners is None:
            radius *= 0.88  # a full circle would look larger than the other shapes of its size
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)
        else:
            turn = np.deg2rad(thing["rotation"])
            matrix = np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
            draw.polygon([tuple(p) for p in (x, y) + radius * corners @ matrix], fill=fill)
    return picture.reduce(SMOOTH)


# ---- Captions ------------------------------------------------------------------------------------

SAID = {  # A stands in this relation to B; all true of the same picture, in the same order
    "left of": ("left of", "to the left of"), "right of": ("right of", "to the right of"),
    "above": ("above",), "below": ("below", "under"),
}
AFTERWARDS = {  # "B with A ... it": the same relation, told from the other object
    "left of": "on its left", "right of": "on its right", "above": "above it",
    "below": "below it",
}


def caption(scene, rng=None):
    """One sentence about the scene; rng=None gives the plainest one (colours, shapes, order)."""
    things = [_phrase(thing, rng) for thing in scene["objects"]]
    relation, background = scene["relation"], scene["background"]
    if relation is None:
        place = scene["objects"][0]["place"]
        said = things[0]
        if place is not None and rng is not None and rng.uniform() < 0.8:
            said = f"{said} {PLACES[place][2]}"
    else:
        if rng is not None and rng.uniform() < 0.5:  # the same picture, told from the other end
            relation, things = RELATIONS[relation], things[::-1]
        form = 0 if rng is None else rng.randint(5)
        if form == 3:    # "under a blue circle is a red star"
            said = f"{_pick(rng, SAID[relation])} {things[1]} is {things[0]}"
        elif form == 4:  # "a blue circle with a red star below it"
            said = f"{things[1]} with {things[0]} {AFTERWARDS[relation]}"
        else:
            words = SAID[relation][0] if rng is None else _pick(rng, SAID[relation])
            said = f"{things[0]} {words} {things[1]}"
    if rng is None or rng.uniform() < 0.5:
        return said
    forms = [f"on {background}: {said}", f"{said} on a {background} background",
             f"a {background} background with {said}"]
    return forms[rng.randint(3)] if said.startswith("a") and " is " not in said else forms[0]


def _phrase(thing, rng):
    words = [thing["colour"], thing["shape"]]
    if rng is not None and rng.uniform() < 0.5:
        words.insert(0, thing["size"])
    article = "an" if words[0][0] in "aeiou" else "a"
    return " ".join([article] + words)


def prompts(n, seed=0, split="train"):
    """n (caption, scene) pairs to sample from: plain captions, each of them once.

    Half of them have two objects; more, where a split has too few different single ones.
    """
    found = {}
    for attempt in range(100 * n):
        rng = np.random.RandomState([seed, 2 if split == "train" else 3, attempt])
        picture = draw_scene(rng, split, count=1 + attempt % 2)
        found.setdefault(caption(picture), picture)
        if len(found) == n:
            break
    else:
        raise ValueError(f"split {split!r} has no {n} different captions, only {len(found)}")
    return list(found.items())


# ---- Shards --------------------------------------------------------------------------------------

def make_shapes(out, count=20_000, split="train", size=128, seed=0, workers=2, per_shard=500):
    """Write `count` drawings of `size` pixels as shards; a run that was stopped goes on.

    Raises UsageError if `out` holds anything else.
    """
    if min(count, size, per_shard) < 1 or per_shard > tars.PER_SHARD:
        raise UsageError(f"--count {count} --size {size} --per-shard {per_shard}: expected numbers "
                         f"from 1 (a shard holds at most {tars.PER_SHARD:,}).")
    os.makedirs(out, exist_ok=True)
    settings = {"count": count, "split": split, "size": size, "seed": seed,
                "per_shard": per_shard, "grammar": VERSION}
    note, found = os.path.join(out, "shapes.json"), None
    if os.path.isfile(note):
        found = read_json(note, {})
    if found != settings and (found or glob.glob(os.path.join(glob.escape(out), "*.tar"))):
        raise UsageError(f"{out}: holds other data ({found or 'tars without a shapes.json'}), "
                         f"expected an empty folder or the drawings of {settings}.")
    with open(f"{note}.tmp", "w", encoding="utf-8") as file:
        json.dump(settings, file)
    os.replace(f"{note}.tmp", note)
    jobs = []
    for number, first in enumerate(range(0, count, per_shard)):
        path = os.path.join(out, f"{number:05d}.tar")
        if not os.path.exists(path):
            indices = range(first, min(first + per_shard, count))
            jobs.append((path, number, indices, split, seed, size))
    missing = sum(len(job[2]) for job in jobs)
    with tqdm(total=count, initial=count - missing, desc=f"{split} drawings", unit="img") as bar:
        for drawn in _in_processes(_draw_shard, jobs, min(workers, len(jobs))):
            bar.update(drawn)
    print(f"{out}: {count:,} drawings of {size} px, split {split}, "
          f"in {-(-count // per_shard)} shards; see them with: python -m tools.look {out}")


def _in_processes(function, jobs, workers):
    """Yield function(job) of each job, in the order in which they end. Ctrl-C and SIGTERM raise
    KeyboardInterrupt here and end the workers, which say nothing.
    """
    if workers < 2:
        yield from map(function, jobs)
        return
    started, readers = [], []
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        for number in range(workers):
            reader, writer = multiprocessing.Pipe(duplex=False)
            started.append(multiprocessing.Process(
                target=_work, args=(function, jobs[number::workers], writer), daemon=True))
            started[-1].start()
            writer.close()
            readers.append(reader)
        while readers:
            for reader in multiprocessing.connection.wait(readers):
                try:
                    done = reader.recv()
                except EOFError:                                  # this worker has ended
                    readers.remove(reader)
                    continue
                if isinstance(done, Exception):
                    raise done
                yield done
    finally:
        for worker in started:
            if readers:                                           # stopped before the end
                worker.kill()
            worker.join()
        signal.signal(signal.SIGTERM, before)
    if any(worker.exitcode for worker in started):
        raise UsageError("a worker was killed, as where memory is short; the same command goes on")


def _work(function, jobs, writer):
    for one in (signal.SIGINT, signal.SIGTERM):                   # for the parent alone
        signal.signal(one, signal.SIG_IGN)
    for job in jobs:
        try:
            writer.send(function(job))
        except Exception as error:
            writer.send(error)
            return


def _draw_shard(job):
    """Draw one shard (runs in a worker process) -> number of samples."""
    path, number, indices, split, seed, size = job
    samples = []
    for place, index in enumerate(indices):
        rng = scene_rng(seed, split, index)
        picture = draw_scene(rng, split, count=1 + index % 2)
        said = caption(picture, rng)
        png = io.BytesIO()
        render(picture, size).save(png, "PNG", compress_level=1)  # ours: fast, small enough
        samples.append(tars.sample(f"{number:05d}{place:04d}", "png", png.getvalue(), (size, size),
                                   said, {**picture, "split": split, "seed": seed, "index": index}))
    tars.write_tar(path, samples)
    return len(samples)


def source(args):
    """--data, or, at pocket size, the built-in drawings, which are made if they are not there."""
    if args.data is not None:
        return args.data
    if args.preset != "pocket":
        raise UsageError("--data is missing: a folder of tar shards, for example from "
                         "`python -m pocket.shapes --out shards/shapes`")
    make_shapes("shards/shapes")
    return "shards/shapes"


def main(argv=None):
    parser = cli.Parser(__doc__, prog="python -m pocket.shapes")
    parser.add_argument("--out", required=True, help="folder for the shards")
    parser.add_argument("--count", type=int, default=20_000, help="drawings (default %(default)s)")
    parser.add_argument("--split", choices=("train", "heldout"), default="train")
    parser.add_argument("--size", type=int, default=128, help="pixels (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--per-shard", type=int, default=500)
    make_shapes(**vars(parser.parse_args(argv)))


if __name__ == "__main__":
    cli.start(main)
