"""Which of two models do people prefer? The blind study of §4.2 and Appendix C.

    python -m experiments.study draw --out first --scenes 200             options of sample.py, too
    python -m experiments.study draw --out second --scenes 200 --baseline runs/equal/ldm-s0/002029
    python -m experiments.study make first second --out runs/study        one static page
    python -m experiments.study count runs/study votes-*.json             what the voters said
    python -m experiments.study judge first second                        what the checker says

draw    one picture for each prompt, 00000.png and so on, and prompts.txt: of a file (--prompts), or
        of the drawings' grammar (--scenes N; --real: the drawings themselves). Pictures of any
        other model work, too, if they are named like this.
make    OUT/page/ can be opened from disk or put on any web server. A prompt and two pictures are
        shown, pairs and sides at random; neither page nor files say which model drew which. That
        is in OUT/key.json, which is not for voters. Their votes stay in the browser until they
        save them as a file and send it.
count   by vote; and by voter: the model that each one prefers, of those who judged at least the
        median number of pairs. Voters, not votes, are resampled for the 95 % intervals by vote, as
        the votes of one person are not independent. A pair that one voter judged twice counts once.
judge   Table 1's form with the checker of prompt_accuracy.py in place of PickScore: it prefers the
        picture with more of the prompt right. It knows nothing of taste, and no person voted.
"""

import json
import secrets
from pathlib import Path
from statistics import median

import numpy as np
import torch
from PIL import Image
from torchvision.transforms.functional import to_tensor
from tqdm import tqdm

import sample
from experiments import equal_compute
from experiments import prompt_accuracy as checker
from plumbing import cli, pictures, training
from plumbing.cli import UsageError
from pocket import shapes

PAGE = Path(__file__).with_name("study.html")
HOW = ("size", "steps_c", "guidance_c", "negative", "steps_b", "guidance_b", "start")


def read(path):
    """The text of a file. Raises UsageError."""
    try:
        return Path(path).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: expected a file of UTF-8 text ({error})") from None


def pairs_of(first, second):
    """[(prompt, its pictures in both folders)]. Raises UsageError."""
    prompts, found = read(first / "prompts.txt").splitlines(), []
    other = second / "prompts.txt"
    if other.exists() and read(other).splitlines() != prompts:
        raise UsageError(f"{other}: other prompts than in {first}/prompts.txt; expected the same")
    for number, prompt in enumerate(prompts):
        paths = [folder / f"{number:05d}.png" for folder in (first, second)]
        for path in paths:
            if not path.is_file():
                raise UsageError(f"{path}: missing, expected a picture for each of the "
                                 f"{len(prompts)} prompts of {first}/prompts.txt")
        if len({Image.open(path).size for path in paths}) > 1:
            raise UsageError(f"{paths[0]} and {paths[1]}: found different sizes, which tell the "
                             "models apart; expected the same")
        found.append((prompt, paths))
    return found


def draw(settings):
    """One picture for each prompt; a call that was stopped goes on."""
    if settings.n > 1 or settings.stages or settings.reconstruct:
        raise UsageError("draw has one picture for each prompt: no --n, --stages, --reconstruct")
    ways = settings.scenes, settings.prompts, settings.prompt
    if sum(map(bool, ways)) != 1 or settings.real and not settings.scenes or not settings.out:
        raise UsageError("draw: expected --out, and prompts of one kind: --scenes, --prompts or "
                         "written out; --real needs --scenes")
    default = sample.options().get_default
    if settings.baseline and (more := [name for name in HOW if name != "guidance_c"
                                       and getattr(settings, name) != default(name)]):
        raise UsageError(f"draw --baseline: found --{more[0].replace('_', '-')}, expected "
                         "--guidance-c alone")
    out, device = Path(settings.out), training.setup(settings.seed, settings.device)
    jobs = checker.prompts(settings.scenes, settings.split, settings.seed + 1)
    prompts, scenes = map(list, zip(*jobs)) if jobs else (settings.prompt, [])
    prompts = read(settings.prompts).splitlines() if settings.prompts else prompts
    about = json.dumps({**vars(settings), "out": None, "batch_size": None, "scenes": scenes},
                       default=str)
    out.mkdir(parents=True, exist_ok=True)
    if (out / "about.json").exists() and read(out / "about.json") != about:
        raise UsageError(f"{out}: holds pictures of other settings; give another --out")
    (out / "about.json").write_text(about, "utf-8")
    (out / "prompts.txt").write_text("".join(f"{prompt}\n" for prompt in prompts), "utf-8")
    if settings.real:
        def drawn(some):
            return [shapes.render(scenes[i], (settings.size or (128,))[0]) for i in some]
    elif settings.baseline:
        images = equal_compute.load_baseline(settings.baseline / "checkpoint.pt", device)

        def drawn(some):
            return map(pictures.to_pil, images([prompts[i] for i in some], [
                settings.seed + i for i in some], settings.guidance_c))
    else:
        paths = sample.find(settings.weights, a=settings.stage_a, b=settings.stage_b,
                            c=settings.stage_c, compressor=settings.compressor)
        chain = sample.load_chain(**paths, clip=settings.clip, device=device)
        settings.size = settings.size or (chain.c.config.image_size,) * 2

        def drawn(some):
            return chain.draw([prompts[i] for i in some], [settings.seed + i for i in some],
                              **{name: getattr(settings, name) for name in HOW})
    left = [i for i in range(len(prompts)) if not (out / f"{i:05d}.png").exists()]
    for first in tqdm(range(0, len(left), settings.batch_size), unit="batch"):
        some = left[first:first + settings.batch_size]
        for i, picture in zip(some, drawn(some)):
            picture.save(out / f"{i:05d}.png")


def make(settings):
    """Write the page, its pictures under random names, and the key."""
    out, key, pairs, jobs = settings.out / "page", {}, [], {}
    for number, (prompt, paths) in enumerate(pairs_of(settings.first, settings.second)):
        names = [secrets.token_hex(8) for _ in paths]
        key.update(zip(names, (0, 1)))
        jobs.update(zip(names, paths))
        pairs.append(dict(pair=number, prompt=prompt, pictures=sorted(names)))
    if out.exists():
        raise UsageError(f"{out}: there is a study already; give another --out")
    (out / "pictures").mkdir(parents=True)
    for name in sorted(jobs):             # in random order, so that not even a file's age says more
        with Image.open(jobs[name]) as picture:
            pixels = Image.fromarray(np.asarray(picture.convert("RGB")))           # no metadata
        pixels.save(out / "pictures" / f"{name}.png")
    study, text = secrets.token_hex(4), json.dumps(pairs).replace("<", "\\u003c")
    (out / "index.html").write_text(read(PAGE).replace("@STUDY@", study).replace(
        "@GOAL@", str(settings.goal)).replace("@PAIRS@", text), "utf-8")
    (settings.out / "key.json").write_text(json.dumps(
        dict(study=study, models=[str(settings.first), str(settings.second)], key=key), indent=1))
    print(f"{out}/index.html: {len(pairs)} pairs; {settings.out}/key.json is for `count` alone")


def ballots(known, files):
    """{voter: {pair: (1 the first model, -1 the second, 0 equal; 1 left, -1 right, 0 equal)}}."""
    voters = {}
    for file in files:
        try:
            found = json.loads(read(file))
            study, mine = found["study"], voters.setdefault(found["voter"], {})
            for vote in found["votes"] if study == known["study"] else ():
                side = {"left": 1, "right": -1, "equal": 0}[vote["choice"]]
                mine[vote["pair"]] = side and 1 - 2 * known["key"][vote[vote["choice"]]], side
        except (KeyError, TypeError, json.JSONDecodeError):
            raise UsageError(f"{file}: expected votes as the page saves them") from None
        if study != known["study"]:
            raise UsageError(f"{file}: votes of study {study}, expected {known['study']}")
    return {voter: mine for voter, mine in voters.items() if mine}


def resampled(wins, losses, draws=2000):
    """95 % interval of the share of wins in percent, from (N,) counts of N voters drawn anew."""
    chosen = np.random.RandomState(0).randint(len(wins), size=(draws, len(wins)))
    won, lost = (np.asarray(counts)[chosen].sum(1) for counts in (wins, losses))
    return np.percentile(100 * won / np.maximum(won + lost, 1), (2.5, 97.5)).tolist()


def row(name, values, voters=None):
    """A row of `table`. values: 1 won, -1 lost, 0 equal; voters: the same, a list for each."""
    wins, losses = values.count(1), values.count(-1)
    share = "–"
    if wins + losses:
        low, high = (resampled(*([one.count(sign) for one in voters] for sign in (1, -1)))
                     if voters else checker.interval(wins, wins + losses))
        share = f"{100 * wins / (wins + losses):.1f} " + (
            "(one voter)" if voters and len(voters) == 1 else f"({low:.0f}–{high:.0f})")
    return f"| {name} | {wins} | {losses} | {values.count(0)} | {share} |"


def table(title, *rows):
    return "\n".join([f"| {title} | won | lost | equal | % of the decided (95 %) |",
                      "|---" * 5 + "|", *rows])


def count(known, files):
    """The two analyses of §4.2 and the position bias, as text."""
    voters = [list(mine.values()) for mine in ballots(known, files).values()]
    if not voters:
        raise UsageError("no votes: give the files that the page saves")
    by_model, by_side = ([[vote[i] for vote in one] for one in voters] for i in (0, 1))
    least = median(map(len, voters))
    personal = [int(np.sign(sum(one))) for one in by_model if len(one) >= least]
    sizes = sorted(map(len, voters), reverse=True)
    return f"{sum(sizes)} votes of {len(voters)} voters ({', '.join(map(str, sizes))})\n\n" + table(
        " against ".join(known["models"]), row("by vote", sum(by_model, []), by_model),
        row(f"by voter, of {least:g} votes or more", personal),
        row("left against right", sum(by_side, []), by_side))


@torch.no_grad()
def judge(first, second):
    """The checker's preference for each scene: 1 the first folder, -1 the second, 0 equal."""
    scenes, others = (json.loads(read(one / "about.json"))["scenes"] for one in (first, second))
    if not scenes or scenes != others:
        raise UsageError(f"{first} and {second}: expected pictures of the same --scenes")
    found = []
    for scene, (prompt, paths) in zip(scenes, pairs_of(first, second)):
        one, other = (sum(checker.compare(checker.look_at(to_tensor(
            Image.open(path).convert("RGB"))), scene, prompt).values()) for path in paths)
        found.append(int(np.sign(one - other)))
    return found


def main(argv=None):
    parser = cli.Parser(__doc__)
    commands = parser.add_subparsers(dest="what", required=True, metavar="draw|make|count|judge")
    one = commands.add_parser("draw", parents=[sample.options()], add_help=False)
    one.add_argument("--scenes", type=int, default=0, help="prompts of the drawings' grammar")
    one.add_argument("--split", choices=("train", "heldout"), default="train")
    one.add_argument("--baseline", type=Path, help="a run of equal_compute in place of C, B and A")
    one.add_argument("--real", action="store_true", help="the drawings of --scenes themselves")
    one.set_defaults(out=None)
    for name in ("make", "judge"):
        one = commands.add_parser(name)
        one.add_argument("first", type=Path, help="a folder of pictures with its prompts.txt")
        one.add_argument("second", type=Path, help="a folder of pictures of the same prompts")
        if name == "make":
            one.add_argument("--out", type=Path, default="runs/study")
            one.add_argument("--goal", type=int, default=50, help="pairs asked of a voter (50)")
    one = commands.add_parser("count")
    one.add_argument("study", type=Path, help="--out of `make`")
    one.add_argument("files", nargs="+", help="votes that the page saved")
    settings = parser.parse_args(argv)
    if settings.what == "judge":
        print(table(f"{settings.first} against {settings.second}", row(
            "the checker, no person", judge(settings.first, settings.second))))
    elif settings.what == "count":
        print(count(cli.read_json(settings.study / "key.json", dict(
            study=str, models=list, key=dict)), settings.files))
    else:
        dict(draw=draw, make=make)[settings.what](settings)


if __name__ == "__main__":
    cli.start(main)
