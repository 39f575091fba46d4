"""Pocket's stand-in for ImageNet: the compressor learns to say what a drawing shows.

    python pocket/teach.py [--compile] [--stage-b runs/pocket/stage_b-1/checkpoint.pt]
                           [--out runs/pocket/taught] [--steps 2000]

The paper's compressor begins with the weights of a network that has learned to tell a thousand
kinds of things apart (EfficientNetV2-S on ImageNet, §3.1). Pocket's has no such past, and Stage B's
error alone is slow to teach it one: a star in place of a small circle changes few pixels, and the
latent does not say which it was. Every drawing carries its labels, so between two phases of Stage B
the compressor is taught with them, and keeps near what Stage B has learned to read:

    drawing --compressor--> latent (B, 16, 3, 3) + noise --head, cell by cell--> (B, 9, K) scores
    loss = cross-entropy of the labels + error of the measures + STAY |latent - latent before|^2

The head sees one cell of the latent at a time and names the object whose centre lies in that cell
(of two in one cell, the second is at the next cell): is there one, its colour, shape and size,
where it is, its radius and rotation; and, in every cell, the background. The noise keeps the
answers apart by more than Stage C will be wrong by. The head is not needed afterwards.

Writes a checkpoint for `stage_b.py --compressor-share 0 --init-from`: Stage B as it was given and
the taught compressor. Stopped and started again, it goes on. log.jsonl has the shares of right
answers on drawings with combinations that no training shows (split "heldout").
"""

import argparse
import copy
import sys
from dataclasses import asdict, replace
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torchvision.transforms.functional import to_tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import semantic_compressor  # noqa: E402
import stage_b  # noqa: E402
from plumbing import run  # noqa: E402
from pocket import shapes  # noqa: E402

SETTINGS = dict(steps=2000, batch_size=32, accumulate=1, lr=1e-3, warmup=100, cooldown=900,
                log_every=20, save_every=200)
SEED = 1                                       # of the drawings; data.py shapes, for Stage B, has 0
STAY = 1.0
NOISE = 0.3                                    # on standardised latents
GRID = 3                                       # cells of the latent along a side
NAMES = {"there": [False, True], "background": list(shapes.BACKGROUNDS),
         "colour": list(shapes.COLOURS), "shape": list(shapes.SHAPES), "size": list(shapes.SIZES)}
MEASURES = 4                                   # x, y, radius, rotation


def labels(scene):
    """What each of the 9 cells shows: {name: (9,) int64} and measures (9, 4), about unit variance.

    Background is of every cell; the others hold where "there" is 1. Coordinates count from the
    middle of the cell.
    """
    answers = {name: torch.zeros(GRID ** 2, dtype=torch.long) for name in NAMES}
    answers["background"][:] = NAMES["background"].index(scene["background"])
    measures = torch.zeros(GRID ** 2, MEASURES)
    for thing in scene["objects"]:
        def offsets(cell):
            return thing["x"] * GRID - cell % GRID - 0.5, thing["y"] * GRID - cell // GRID - 0.5
        free = [cell for cell in range(GRID ** 2) if not answers["there"][cell]]
        cell = min(free, key=lambda one: sum(offset ** 2 for offset in offsets(one)))
        answers["there"][cell] = 1
        for name in ("colour", "shape", "size"):
            answers[name][cell] = NAMES[name].index(thing[name])
        measures[cell] = torch.tensor([*(3 * offset for offset in offsets(cell)),
                                       15 * (thing["radius"] - 0.18), thing["rotation"] / 7])
    return answers, measures


def batch(indices, split, device="cpu"):
    """-> images (B, 3, 96, 96), answers {name: (B, 9)}, measures (B, 9, 4)."""
    scenes = [shapes.scene(index, split, SEED) for index in indices]
    images = torch.stack([to_tensor(shapes.render(scene, 128)) for scene in scenes])
    answers, measures = zip(*[labels(scene) for scene in scenes])
    return (semantic_compressor.resize(images.to(device)),
            {name: torch.stack([one[name] for one in answers]).to(device) for name in NAMES},
            torch.stack(measures).to(device))


def make_head(channels=16):
    """(B, 16, 3, 3) -> (B, K, 3, 3): 1x1 convolutions, so no cell sees its neighbours."""
    scores = sum(map(len, NAMES.values())) + MEASURES
    return nn.Sequential(nn.Conv2d(channels, 256, 1), nn.GELU(), nn.Conv2d(256, 256, 1), nn.GELU(),
                         nn.Conv2d(256, scores, 1))


def loss(head, latent, answers, measures):
    """Cross-entropy of every answer plus squared error of the measures, and the shares right."""
    scores = head(latent).flatten(2).transpose(1, 2)                      # (B, 9, K)
    *parts, found = scores.split([*map(len, NAMES.values()), MEASURES], dim=-1)
    there, total, right = answers["there"] > 0, 0.0, {}
    for name, part in zip(NAMES, parts):
        where = there if name in ("colour", "shape", "size") else torch.ones_like(there)
        total = total + F.cross_entropy(part[where], answers[name][where])
        right[name] = (part[where].argmax(-1) == answers[name][where]).float().mean().item()
    error = (found[there] - measures[there]).square().mean(0)             # (4,)
    return total + error.sum(), right


def teach(given, out, **settings):
    """given: the Stage B checkpoint to begin with. settings: in place of those in SETTINGS."""
    run.required(given, "a Stage B checkpoint", "train it with `python stage_b.py --preset pocket`")
    out, state = Path(out), run.load_checkpoint(given, "B")
    config = replace(stage_b.config_of(state), **{**SETTINGS, **settings})
    device, _, _ = run.setup(config.seed)
    before = semantic_compressor.load(given, device)
    # In eval mode throughout: its BatchNorm keeps its statistics, because Stage B knows its scale.
    compressor = copy.deepcopy(before).requires_grad_(True)
    head = make_head(before.config.latent_channels).to(device)
    ema, ema_head = (copy.deepcopy(net).requires_grad_(False) for net in (compressor, head))
    parameters = [*compressor.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=config.lr, betas=(0.9, 0.95))
    parts = dict(compressor=compressor, compressor_ema=ema, head=head, head_ema=ema_head,
                 optimizer=optimizer)
    origin = dict(stage_b=run.checksum(state["ema"]), taught=run.checksum(before.state_dict()))
    out.mkdir(parents=True, exist_ok=True)
    found, start = run.resume(out / "checkpoint.pt", "B", config, device, 0, origin), 0
    if found:
        for name, part in parts.items():
            part.load_state_dict(found[name])
        start = found["step"]
    if config.compile:
        compressor.compile()
        before.compile()
    test = batch(range(256), "heldout", device)
    log, guard, stop = run.Log(out, config, start, 0, 1), run.NanGuard(), run.StopSignal()
    for step in range(start, config.steps):
        first = step * config.batch_size                                  # every drawing is new
        images, *truth = batch(range(first, first + config.batch_size), "train", device)
        with torch.no_grad():
            known = before.standardise(before(images))
        latent = before.standardise(compressor(images))                   # (B, 16, 3, 3)
        value, _ = loss(head, latent + NOISE * torch.randn_like(latent), *truth)
        away = (latent - known).square().mean()
        optimizer.zero_grad(set_to_none=True)
        (value + STAY * away).backward()
        grad = nn.utils.clip_grad_norm_(parameters, config.grad_clip)
        for group in optimizer.param_groups:
            group["lr"] = run.learning_rate(step, config)
        if not guard.is_bad(grad, step):
            optimizer.step()
            run.ema_update(ema, compressor, step, config.ema)
            run.ema_update(ema_head, head, step, config.ema)
        done, last = step + 1, stop.now(device, 1) or step + 1 == config.steps
        log.step(config.batch_size)
        saves, right = done % config.save_every == 0 or last, {}
        if saves:
            with torch.no_grad():
                right = loss(ema_head, before.standardise(ema(test[0])), *test[1:])[1]
            scale = semantic_compressor.latent_scale(ema, test[0])
            run.save_checkpoint(out / "checkpoint.pt", dict(
                {**state, **{name: part.state_dict() for name, part in parts.items()}}, step=done,
                config=asdict(config), compressor_config=asdict(replace(
                    before.config, latent_mean=scale[0], latent_std=scale[1])),
                model=state["ema"], ema=state["ema"], random=run.random_state(device), **origin))
        if saves or done % config.log_every == 0:
            log.write(done, loss=value.item(), away=away.item(), grad=grad.item(), **right)
        if last:
            break
    log.finish(out, stop)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage-b", default="runs/pocket/stage_b-1/checkpoint.pt")
    parser.add_argument("--out", default="runs/pocket/taught")
    parser.add_argument("--steps", type=int, default=SETTINGS["steps"])
    parser.add_argument("--compile", action="store_true")
    settings = parser.parse_args()
    teach(settings.stage_b, settings.out, steps=settings.steps, compile=settings.compile)


if __name__ == "__main__":
    run.start(main)
