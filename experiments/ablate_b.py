"""Which recipe of the small Stage B learns to draw small shapes?

    python -m experiments.ablate_b ceiling                           what A and sem leave possible
    python -m experiments.ablate_b train NAME [key=value …]          train, then evaluate
    python -m experiments.ablate_b file pocket/stage_b.safetensors   evaluate a trained Stage B

Stage B alone is trained, on drawings encoded once by the shipped Stage A, compressor and text
tower; it is evaluated on unseen ones from their true sem, so no other stage can be at fault.
key=value, as in JSON: a field of stage_b.Config (those about data and compressor change nothing
here) or one of RECIPE. Batch, t and noise follow from (seed, step): variants of one seed see the
same. Stopped and started again, `train` goes on; OUT/NAME-s0 holds its log and checkpoint.
On one CPU thread, or on a GPU. Results go to OUT/results.jsonl: x_0 error on objects by t; of
sampled pictures PSNR and, as the checker of prompt_accuracy.py sees them, shapes and colours right
by size, in percent.
"""

import copy
import json
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torchvision.transforms.functional import to_tensor
from tqdm import tqdm

import semantic_compressor
import stage_a
import stage_b
from experiments import prompt_accuracy as checker
from plumbing import cli, pictures, training
from plumbing.checkpoint import POCKET, UNREADABLE, save_checkpoint
from plumbing.cli import UsageError
from plumbing.text import text_encoder
from pocket import shapes, teach

SEEDS = dict(train=0, test=77)        # unseen drawings: another seed, same split
LEVELS = (0.25, 0.5, 0.8, 0.9, 1.0)   # noise levels at which the x_0 error is measured
RECIPE = dict(
    loss="v",                         # "v": stage_b.loss; "x0": the error in x_0, within bounds
    damp=False,                       # x_t's embedding times sqrt(alpha_bar)
    drawings=8000,                    # to train on
    test=256,                         # unseen ones that are drawn and judged
    out="runs/ablate")
CHOICES = dict(loss=["v", "x0"], prediction=["v", "released"])
BASE = dict(compile=False, steps=1000, cooldown=-1, log_every=50, save_every=250)    # -1: a third


def choose(settings):
    """["key=value", …] -> (stage_b.Config, RECIPE with the changes)."""
    found = asdict(stage_b.PRESETS["pocket"]) | BASE | RECIPE
    for name, _, text in (item.partition("=") for item in settings):
        kind = type(found.get(name))
        try:
            value = text if kind is str else json.loads(text)
        except ValueError:
            value = None
        value = kind(value) if (type(value), kind) in ((list, tuple), (int, float)) else value
        if name not in found or type(value) is not kind or value not in CHOICES.get(name, [value]):
            raise UsageError(f"{name}={text}: expected a field of stage_b.Config or one of "
                             f"{', '.join(RECIPE)}, and a value of its kind")
        found[name] = value
    if found["cooldown"] < 0:
        found["cooldown"] = found["steps"] // 3
    if min(found["drawings"], found["test"]) < 1:
        raise UsageError(f"drawings={found['drawings']} test={found['test']}: expected 1 or more")
    config = {name: value for name, value in found.items() if name not in RECIPE}
    cli.check_config(stage_b.Config, config, "key=value")
    return stage_b.Config(**config), {name: found[name] for name in RECIPE}


# ---- drawings, encoded once ----------------------------------------------------------------------

@torch.no_grad()
def encoded(count, seed, keep_images):
    """Drawings 0 … count - 1 of the train split: {"x_0", "sem", "text"[, "images"], …}."""
    device = training.setup(0)
    vqgan = stage_a.load(POCKET / "stage_a.safetensors", device)
    compressor = semantic_compressor.load(POCKET / "stage_b.safetensors", device)
    encoder, parts, scenes = text_encoder("pocket"), [], []
    for first in tqdm(range(0, count, 64), desc="encoding drawings, 64 at a time"):
        some = [shapes.scene(i, "train", seed) for i in range(first, min(first + 64, count))]
        images = torch.stack([to_tensor(shapes.render(scene, 128)) for scene in some]).to(device)
        words = [shapes.caption(scene, shapes.scene_rng(seed, "train", 10 ** 6 + first + i))
                 for i, scene in enumerate(some)]
        sem = compressor.standardise(compressor(semantic_compressor.resize(images)))
        parts.append([one.cpu() for one in (
            vqgan.standardise(vqgan.encode(images)), sem, encoder(words).half(),
            *[images] * keep_images)])
        scenes += some
    return dict(zip(("x_0", "sem", "text", "images"), map(torch.cat, zip(*parts))),
                scenes=scenes, null=encoder([""]))


def load(out, kind, count):
    """Those to "train" on, or to "test" with: from the file in `out`, which is made if need be."""
    path = Path(out, f"{kind}-{count}.pt")
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        save_checkpoint(path, encoded(count, SEEDS[kind], kind == "test"))
    try:
        return torch.load(path, mmap=True)
    except UNREADABLE as error:
        raise UsageError(f"{path}: expected encoded drawings ({str(error).splitlines()[0]}); "
                         "delete it, and it is made again") from None


# ---- what is measured ----------------------------------------------------------------------------

def judged(images, scenes):
    """Percent: shapes and colours right, by size of the object; drawings right as a whole."""
    right, total, whole = Counter(), Counter(), 0
    for image, scene in zip(images, scenes):
        found = checker.look_at(image)["objects"]
        good = len(found) == len(scene["objects"])
        for thing in scene["objects"]:
            def distance(one):
                return ((one["x"] - thing["x"]) ** 2 + (one["y"] - thing["y"]) ** 2) ** 0.5
            near = min(found, key=distance, default=None)
            near = near if near and distance(near) < 0.12 else {}
            total[thing["size"]] += 1
            for name in ("shape", "colour"):
                right[name, thing["size"]] += near.get(name) == thing[name]
                good &= near.get(name) == thing[name]
        whole += good
    return {f"{name} {size}": round(100 * right[name, size] / max(total[size], 1), 1)
            for name in ("shape", "colour") for size in shapes.SIZES} | {
        "whole": round(100 * whole / len(scenes), 1), "of": len(scenes)}


@torch.no_grad()
def evaluate(model, test, png):
    """All that is measured of a trained StageB (in eval mode), and a sheet of 16 drawings."""
    device, out = next(model.parameters()).device, {}
    vqgan = stage_a.load(POCKET / "stage_a.safetensors", device)
    x_0, sem, text, images, null = (test[name].to(device) for name in (
        "x_0", "sem", "text", "images", "null"))
    edge, text = images[:, :, :1, :1], text.float()                       # no object reaches it
    objects = F.max_pool2d(((images - edge).abs().sum(1, keepdim=True) > 0.2).float(), 4)
    noise = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(5)).to(device)
    parts, drawn = torch.arange(len(x_0)).split(64), []
    for level in LEVELS:
        error = []
        for i in parts:
            t = torch.full((len(i),), level, device=device)
            a = stage_b.alpha_bar(t)[:, None, None, None]
            eps_hat = model(stage_b.diffuse(x_0[i], t, noise[i]), t, sem[i], text[i])
            off = (1 - a) / a * (eps_hat - noise[i]).square().mean(1, keepdim=True)   # of x_0_hat
            error.append((off * objects[i]).sum((1, 2, 3)) / objects[i].sum((1, 2, 3)))
        out[f"x0 {level:g}"] = round(torch.cat(error).mean().item(), 4)
    for i in tqdm(parts, desc="drawing, 64 at a time"):
        noises = stage_b.generators(2 ** 31 + 1_000_000 + j for j in i.tolist())
        start, w = vqgan.random_tokens(x_0[i].shape, noises), model.config.guidance
        latents = stage_b.ddpm_sample(model, start.shape, sem[i], text[i], 0 * sem[i], null,
                                      12, w, start, noises)
        drawn.append(vqgan.decode(vqgan.unstandardise(latents)))
    drawn, images = torch.cat(drawn).cpu(), images.cpu()
    rows = [images[:16], vqgan.decode(vqgan.unstandardise(x_0[:16])).cpu(), drawn[:16]]
    pictures.grid(torch.cat(rows), len(rows[0])).save(png)
    return out | dict(psnr=round(pictures.psnr(drawn, images).item(), 2),
                      **judged(drawn, test["scenes"]))


def note(out, **record):
    with Path(out, "results.jsonl").open("a") as file:
        file.write(json.dumps(record) + "\n")
    print(json.dumps(record), flush=True)


def ceiling(recipe, steps=3000):
    """The judge on the drawings and on A's reconstructions; a head that reads shapes from sem."""
    out, test = recipe["out"], load(recipe["out"], "test", 512)
    train = load(out, "train", recipe["drawings"])
    vqgan = stage_a.load(POCKET / "stage_a.safetensors")
    noisy = test["x_0"] + 0.1 * torch.randn_like(test["x_0"])
    for name, latents in (("the drawings", None), ("A", test["x_0"]),
                          ("A, latents + noise .1", noisy)):
        with torch.no_grad():
            images = test["images"] if latents is None else torch.cat(
                [vqgan.decode(vqgan.unstandardise(part)) for part in latents.split(64)])
        note(out, name=name, psnr=round(pictures.psnr(images, test["images"]).item(), 2),
             **judged(images, test["scenes"]))

    def answers(part):                                                    # {name: (N, 9)}
        found = [teach.labels(scene)[0] for scene in part["scenes"]]
        return {name: torch.stack([one[name] for one in found]) for name in teach.NAMES}

    def scores(sem):                                                      # {name: (B, 9, K)}
        widths = [*map(len, teach.NAMES.values()), teach.MEASURES]
        return dict(zip(teach.NAMES, head(sem).flatten(2).transpose(1, 2).split(widths, dim=2)))
    truth, known, head = answers(train), answers(test), teach.make_head()
    optimizer = torch.optim.AdamW(head.parameters())
    for step in tqdm(range(steps), desc="a head on sem"):
        i = torch.randint(len(train["sem"]), (128,))
        found, there = scores(train["sem"][i]), truth["there"][i] > 0
        value = sum(F.cross_entropy(found[name][there], truth[name][i][there])
                    for name in ("shape", "size", "colour"))
        optimizer.zero_grad()
        value.backward()
        optimizer.param_groups[0]["lr"] = 2e-3 * min(1, 3 * (1 - step / steps))
        optimizer.step()
    for level in (0.0, 0.1, 0.3, 0.5):
        with torch.no_grad():
            found = scores(test["sem"] + level * torch.randn_like(test["sem"]))
        result = {}
        for k, size in enumerate(shapes.SIZES):
            there = (known["there"] > 0) & (known["size"] == k)
            for name in ("shape", "colour"):
                hit = found[name][there].argmax(-1) == known[name][there]
                result[f"{name} {size}"] = round(100 * hit.float().mean().item(), 1)
        note(out, name=f"a head on sem, noise {level:g}", **result)


# ---- a variant -----------------------------------------------------------------------------------

class Damped(stage_b.StageB):
    """StageB, x_t's embedding times sqrt(alpha_bar): the nearer t is to 1, the less x_t counts."""

    def forward(self, x_t, t, sem, text, precomputed=None):
        gain = stage_b.alpha_bar(t).sqrt()[:, None, None, None]
        hook = self.embedding.register_forward_hook(lambda *given: given[2] * gain)
        with hook:
            return super().forward(x_t, t, sem, text, precomputed)


def loss(model, kind, x_0, sem, text):
    """kind "v": stage_b.loss. "x0": the error in x_0, (1 - alpha_bar) / alpha_bar times eps's."""
    if kind == "v":
        return stage_b.loss(model, x_0, sem, text)
    t = 1 - (1 - stage_b.draw_t(len(x_0), x_0.device)) ** model.config.t_power
    noise, a_bar = torch.randn_like(x_0), stage_b.alpha_bar(t)
    error = (model(stage_b.diffuse(x_0, t, noise), t, sem, text) - noise).square().mean((1, 2, 3))
    return (((1 - a_bar) / a_bar).clamp(0.5, 1e4) * error).mean(), t, error.detach()


def train(name, settings):
    config, recipe = choose(settings)
    device = training.setup(config.seed)
    cached = {name: part.to(device) for name, part in load(
        recipe["out"], "train", recipe["drawings"]).items() if torch.is_tensor(part)}
    out = Path(recipe["out"], f"{name}-s{config.seed}")
    run = training.Run("B", config, out, device, **{
        key: recipe[key] for key in ("loss", "damp", "drawings")})
    model = (Damped if recipe["damp"] else stage_b.StageB)(config).to(device).train()
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer = training.optimizer(config, [dict(params=[*model.parameters()])],
                                   betas=(0.9, 0.95))
    spent = run.state.get("cpu_s", 0.0)                                   # before a stop
    run.restore(model=model, ema=ema, optimizer=optimizer)
    if config.compile:
        model.compile(dynamic=False)
    begun = time.process_time()
    for step in run.steps():
        i = torch.randint(len(cached["sem"]), (config.batch_size,))
        sem, text = stage_b.drop_and_noise(cached["sem"][i], cached["text"][i].float(),
                                           cached["null"], config, (0.0, 1.0))
        with training.autocast(device):
            value, t, error = loss(model, recipe["loss"], cached["x_0"][i], sem, text)
        run.note(t, error)
        model.zero_grad(set_to_none=True)
        value.backward()
        grad = nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        taken = run.finite(grad)
        for group in optimizer.param_groups:
            group["lr"] = training.learning_rate(step, config)
        if taken:
            optimizer.step()
            training.ema_update(ema, model, step, config.ema)
        run.log(loss=value, grad=grad)
        if run.due("save"):
            run.save(cpu_s=spent + time.process_time() - begun)
    spent += time.process_time() - begun
    if run.step == config.steps:
        note(recipe["out"], name=name, settings=settings, seed=config.seed, steps=config.steps,
             cpu_minutes=round(spent / 60, 2), **evaluate(
                 ema, load(recipe["out"], "test", recipe["test"]), out / "sheet.png"))


def main():
    parser = cli.Parser(__doc__)
    parser.add_argument("what", choices=("ceiling", "train", "file"))
    parser.add_argument("rest", nargs="*", help="NAME or PATH, then key=value …")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if args.what == "ceiling":
        return ceiling(choose(args.rest)[1])
    if not args.rest or "=" in args.rest[0]:
        raise UsageError(f"{args.what}: expected a NAME or a PATH after it")
    name, *settings = args.rest
    if args.what == "train":
        return train(name, settings)
    recipe, model = choose(settings)[1], stage_b.load(name)
    test = load(recipe["out"], "test", recipe["test"])
    note(recipe["out"], name=name, **evaluate(model, test, Path(recipe["out"], "file.png")))


if __name__ == "__main__":
    cli.start(main)
