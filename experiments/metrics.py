"""FID, Inception Score, CLIP score and PickScore of folders of pictures; how far to trust FID.

    python -m experiments.metrics real drawn [other]            the first folder is the reference
    python -m experiments.metrics real --robustness fid_robustness.png      Table 3 (Appendix B)
    python -m experiments.metrics real first second --features inception --text      Tables 1 and 2

`python -m experiments.study draw` makes such folders. Their pictures are cut to the middle square.

--features pocket     (default) the shipped compressor's backbone, 512 numbers of a picture of
                      128 px: works offline, and has been taught the drawings' labels and nothing
                      else. Its distance is a Fréchet distance, but no FID.
--features inception  FID and Inception Score: torch-fidelity's Inception V3, 2,048 numbers of a
                      picture of 256 px (§4). Needs its weights.
--text                CLIP score of each folder, and PickScore as in Table 1: the share of the
                      prompts (prompts.txt of the folder) for which the second folder is preferred
                      to each further one. Needs CLIP-H and PickScore from the hub.

A distance depends on how many pictures there are. So each is printed with n and with the floor,
the distance between two halves of the reference. Under 500 pictures it says little.
"""

import io
from functools import partial
from pathlib import Path

import torch
import torch.nn as nn
from PIL import Image, ImageEnhance, ImageOps
from torchvision.transforms.functional import pil_to_tensor
from tqdm import tqdm

import data
import semantic_compressor
from experiments import study
from plumbing import checkpoint, cli, training
from plumbing.cli import UsageError
from sources.captions import BadSample
from sources.tars import PICTURES

SIDES = {"pocket": 128, "inception": 256}      # of the pictures that are compared, in pixels
FEW = 500                                      # pictures
CLIP, PICKSCORE = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K", "yuvalkirstain/PickScore_v1"


# ---- Table 3's manipulations: a picture and its side in pixels -> the changed picture ------------

def square(picture, side, resample=Image.Resampling.BICUBIC):
    return ImageOps.fit(picture, (side, side), resample)


def jpeg(picture, side, quality):
    file = io.BytesIO()
    square(picture, side).save(file, "JPEG", quality=quality)
    return Image.open(file).convert("RGB")


def palette(picture, side):                    # ours: the paper does not say which 8-bit palette;
    return square(picture, side).convert("P").convert("RGB")     # Pillow's, 216 colours, dithered


def enhanced(picture, side, what, by):
    return what(square(picture, side)).enhance(by)


TABLE_3 = [                                    # name, the paper's FID on COCO 30k and CelebA-HQ
    ("JPEG quality 95", 0.268, 0.56, partial(jpeg, quality=95)),
    ("JPEG quality 90", 1.713, 2.381, partial(jpeg, quality=90)),
    ("JPEG quality 80", 6.658, 6.291, partial(jpeg, quality=80)),
    ("JPEG quality 70", 10.469, 9.156, partial(jpeg, quality=70)),
    ("JPEG quality 60", 13.274, 11.617, partial(jpeg, quality=60)),
    ("JPEG quality 50", 15.129, 13.519, partial(jpeg, quality=50)),
    ("nearest-neighbour resampling", 5.239, 3.705, partial(square, resample=Image.NEAREST)),
    ("bilinear resampling", 0.330, 0.569, partial(square, resample=Image.BILINEAR)),
    ("8-bit colour palette", 27.989, 31.289, palette),
    ("brightness +10 %", 0.085, 0.112, partial(enhanced, what=ImageEnhance.Brightness, by=1.1)),
    ("brightness -10 %", 0.054, 0.101, partial(enhanced, what=ImageEnhance.Brightness, by=0.9)),
    ("contrast +10 %", 0.051, 0.077, partial(enhanced, what=ImageEnhance.Contrast, by=1.1)),
    ("contrast -10 %", 0.072, 0.098, partial(enhanced, what=ImageEnhance.Contrast, by=0.9))]


# ---- features and what is computed of them -------------------------------------------------------

def network(name, device):
    """A function: uint8 (B, 3, side, side) -> features (B, D), logits (B, K) or None."""
    if name == "pocket":
        compressor = semantic_compressor.load(checkpoint.POCKET / "stage_b.safetensors", device)
        compressor.mapper = nn.Identity()
        return lambda images: (compressor(semantic_compressor.resize(images / 255)).mean((2, 3)),
                               None)
    try:
        from torch_fidelity import feature_extractor_inceptionv3 as fidelity
        return fidelity.FeatureExtractorInceptionV3(
            "inception-v3-compat", ["2048", "logits_unbiased"]).to(device)
    except ImportError:
        raise UsageError("--features inception: needs `pip install torch-fidelity`") from None
    except OSError as error:                                              # URLError is one
        raise UsageError(f"--features inception: its weights cannot be downloaded ({error}); put "
                         f"{fidelity.URL_INCEPTION_V3} into {torch.hub.get_dir()}/checkpoints/"
                         ) from None


def files_in(folder):
    """The pictures of a folder, sorted. Raises UsageError."""
    found = sorted(path for path in Path(folder).glob("*")
                   if path.suffix.lower().lstrip(".") in PICTURES)
    if len(found) < 4:
        raise UsageError(f"{folder}: found {len(found)} pictures, expected a folder of at least 4")
    if len(found) < FEW:
        print(f"warning: {folder} has {len(found)} pictures; under {FEW} a Fréchet distance tells "
              "the number of pictures more than their quality")
    return found


def opened(path):
    """The picture in a file. Raises UsageError."""
    try:
        return data.decode(path.read_bytes())
    except BadSample as error:
        raise UsageError(f"{path}: {error}") from None


@torch.no_grad()
def features(net, files, side, device, change=square, label=""):
    """-> features (n, D) and logits (n, K) or None, of the pictures after `change`."""
    found = []
    for first in tqdm(range(0, len(files), 50), desc=label, unit="batch", leave=False):
        some = [pil_to_tensor(change(opened(path), side))
                for path in files[first:first + 50]]
        found.append(net(torch.stack(some).to(device)))
    columns = list(zip(*found))
    return [torch.cat(column).cpu().double() if column[0] is not None else None
            for column in columns]


def frechet(a, b):
    """Fréchet distance of two sets of features (n, D) and (m, D), taken as normal distributions:
    |mean_a - mean_b|^2 + tr(cov_a + cov_b - 2 (cov_a cov_b)^(1/2)). Heusel et al., 2017.
    """
    cov_a, cov_b = a.T.cov(), b.T.cov()
    values, vectors = torch.linalg.eigh(cov_a)
    part = vectors * values.clamp_min(0).sqrt()        # cov_a = part part^T; part^T cov_b part
    # has the eigenvalues of cov_a cov_b, whose roots add up to the trace of its root
    root = torch.linalg.eigvalsh(part.T @ cov_b @ part).clamp_min(0).sqrt().sum()
    return ((a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * root
            ).item()


def inception_score(logits, parts=10):
    """exp of the mean divergence of p(class | picture) from p(class): its mean over ten parts of
    the pictures, and deviation. Salimans et al., 2016.
    """
    scores = torch.stack([
        (p * (p.log() - p.mean(0).log())).sum(1).mean().exp()
        for p in logits.softmax(1).clamp_min(1e-30).chunk(parts)])
    return scores.mean().item(), scores.std().item()


def floor(real):
    """The distance between two halves of the reference."""
    order = torch.randperm(len(real), generator=torch.Generator().manual_seed(0))
    return frechet(*(real[half] for half in order.chunk(2)))


@torch.no_grad()
def likeness(where, files, prompts, device):
    """Cosine of each picture and its prompt (n,), by a CLIP model in transformers' format."""
    try:
        from transformers import CLIPModel, CLIPProcessor
        model, prepare = CLIPModel.from_pretrained(where), CLIPProcessor.from_pretrained(CLIP)
    except ImportError:
        raise UsageError("--text: needs `pip install transformers`") from None
    except OSError as error:
        raise UsageError(f"--text: {where} is not in the hub's cache and cannot be downloaded; "
                         f"go online once ({str(error).splitlines()[0]})") from None
    model, found = model.to(device).eval(), []
    for first in tqdm(range(0, len(prompts), 32), desc=where, unit="batch", leave=False):
        some = slice(first, first + 32)
        inputs = prepare(text=prompts[some], images=[opened(path) for path in files[some]],
                         return_tensors="pt", padding="max_length", truncation=True)
        out = model(**inputs.to(device))
        found.append((out.image_embeds * out.text_embeds).sum(1).cpu())
    return torch.cat(found)


# ---- the command ---------------------------------------------------------------------------------

def robustness(net, files, real, settings, device):
    """Table 3 on these files: prints the distances, draws them beside the paper's."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UsageError("--robustness: matplotlib is not installed: pip install matplotlib"
                         ) from None
    side, rows = SIDES[settings.features], []
    print("\n| manipulation | here | paper, COCO 30k | paper, CelebA-HQ |\n|---|---|---|---|")
    for name, *paper, change in TABLE_3:
        mine, _ = features(net, files, side, device, change, name)
        rows.append((name, frechet(real, mine), *paper))
        print(f"| {name} | {rows[-1][1]:.3f} | {paper[0]} | {paper[1]} |", flush=True)
    names, *columns = zip(*rows)
    titles = (f"here: {settings.features} features, n = {len(files):,}",
              "paper: FID, COCO, n = 30,000", "paper: FID, CelebA-HQ")
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    axes = figure.subplots(1, 3, sharey=True)
    for axis, title, values in zip(axes, titles, columns):
        axis.barh(names, values, color=["#c44"] * 6 + ["#48c"] * 2 + ["#e90"] + ["#888"] * 4)
        axis.set(xscale="log", title=title)
        axis.bar_label(axis.containers[0], fmt="%.3g", padding=2, fontsize=8)
        axis.margins(x=0.2)
    axes[0].axvline(floor(real), color="black", linestyle="--")
    axes[0].set(xlabel="dashed: between two halves of the set")
    axes[0].invert_yaxis()
    figure.savefig(settings.robustness, dpi=100)
    print(settings.robustness)


def main(argv=None):
    parser = cli.Parser(__doc__)
    parser.add_argument("folders", nargs="+", type=Path, help="the reference, then others")
    parser.add_argument("--features", choices=SIDES, default="pocket")
    parser.add_argument("--text", action="store_true", help="CLIP score and PickScore, too")
    parser.add_argument("--robustness", metavar="PNG", help="Table 3 on the reference")
    settings = parser.parse_args(argv)
    device, side = training.setup(0), SIDES[settings.features]
    net, files = network(settings.features, device), [files_in(one) for one in settings.folders]
    real, _ = features(net, files[0], side, device, label=str(settings.folders[0]))
    name = "FID" if settings.features == "inception" else "Fréchet distance, pocket features"
    print(f"{settings.folders[0]}: n = {len(real):,}; floor, two halves of it: {floor(real):.3f}")
    if len(files) > 1:
        print(f"\n| folder | n | {name} | Inception Score | CLIP score |\n|---|---|---|---|---|")
    likes = []
    for folder, mine in zip(settings.folders[1:], files[1:]):
        found, logits = features(net, mine, side, device, label=str(folder))
        score = "{:.2f} ± {:.2f}".format(*inception_score(logits)) if logits is not None else ""
        if settings.text:
            prompts = study.read(folder / "prompts.txt").splitlines()
            if len(prompts) != len(mine):
                raise UsageError(f"{folder}/prompts.txt: found {len(prompts)} prompts, expected "
                                 f"{len(mine)}, one for each picture")
            likes.append(likeness(PICKSCORE, mine, prompts, device))
            clip = f"{100 * likeness(CLIP, mine, prompts, device).clamp_min(0).mean():.2f}"
        print(f"| {folder} | {len(mine):,} | {frechet(real, found):.3f} | {score} | "
              f"{clip if settings.text else ''} |", flush=True)
    if len(likes) > 1:
        print("\n" + study.table(f"PickScore: {settings.folders[1]} against", *(
            study.row(folder, (likes[0] - other).sign().int().tolist())
            for folder, other in zip(settings.folders[2:], likes[1:]))))
    if settings.robustness:
        robustness(net, files[0], real, settings, device)


if __name__ == "__main__":
    cli.start(main)
