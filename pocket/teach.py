"""Pocket's stand-in for ImageNet: the compressor first learns to say what a drawing shows.

    python -m pocket.teach [--compile] [--steps 3000] [--out runs/pocket/taught]

The paper's compressor begins with the weights of a network that has learned to tell a thousand
kinds of things apart (EfficientNetV2-S on ImageNet, §3.1). Pocket's has no such past, and Stage B's
error alone is slow to teach it one: a star in place of a small circle changes few pixels, and the
latent does not say which it was. Every drawing carries its labels, so it learns from them:

    drawing --compressor--> latent (B, 16, 3, 3) + noise --head, cell by cell--> (B, 9, K) scores
    loss = cross-entropy of the labels + squared error of the measures

The head sees one cell of the latent at a time and names the object whose centre lies in that cell
(of two in one cell, the second is at the next cell): is there one, its colour, shape and size,
where it is, its radius and rotation; and, in every cell, the background. The noise keeps the
answers apart, so that a small error of Stage C changes none. The head is not needed afterwards.

Writes a checkpoint for `stage_b.py --init-from`, this compressor and an untrained Stage B; with
--compressor-share 0 it stays as it is. Stopped and started again, this goes on. log.jsonl has the
shares of right answers on drawings with combinations that no training shows (split "heldout").
"""

import copy
from dataclasses import asdict, replace

import torch
import torch.nn as nn
import torch.nn.functional as F
from torchvision.transforms.functional import to_tensor

import semantic_compressor
import stage_b
from plumbing import cli, training
from pocket import shapes

CONFIG = replace(stage_b.PRESETS["pocket"], steps=3000, lr=2e-3, cooldown=1200, save_every=200)
SEED = 1                                       # of the drawings; Stage B's have 0
NOISE = 0.3                                    # on latents whose channels have unit variance
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


def teach(config, out):
    """config: a stage_b.Config, whose steps, batch_size, lr and so on are used here."""
    device = training.setup(config.seed)
    test, calibration = batch(range(256), "heldout", device), batch(range(256), "train", device)[0]

    run = training.Run("B", config, out, device)
    compressor = semantic_compressor.new(config.compressor_preset, device=device)
    head = make_head(compressor.config.latent_channels).to(device)
    ema, ema_head = (copy.deepcopy(net).eval().requires_grad_(False) for net in (compressor, head))
    untrained = stage_b.StageB(config).state_dict()
    parameters = [*compressor.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=config.lr, betas=(0.9, 0.95))
    run.restore(compressor=compressor, compressor_ema=ema, head=head, head_ema=ema_head,
                optimizer=optimizer)
    if config.compile:
        compressor.compile(dynamic=False)

    for step in run.steps():
        first = 256 + step * config.batch_size                            # every drawing is new
        images, *truth = batch(range(first, first + config.batch_size), "train", device)
        latent = compressor(images)                                       # (B, 16, 3, 3)
        value, _ = loss(head, latent + NOISE * torch.randn_like(latent), *truth)
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        grad = nn.utils.clip_grad_norm_(parameters, config.grad_clip)
        for group in optimizer.param_groups:
            group["lr"] = training.learning_rate(step, config)
        if run.finite(grad):
            optimizer.step()
            training.ema_update(ema, compressor, step, config.ema)
            training.ema_update(ema_head, head, step, config.ema)
        right = {}
        if (step + 1) % config.save_every == 0 or step + 1 == config.steps:
            semantic_compressor.measure_batchnorm(ema, calibration)
            with torch.no_grad():
                right = loss(ema_head, ema(test[0]), *test[1:])[1]
        run.log(loss=value, grad=grad, **right)
        if run.due("save"):
            measured = semantic_compressor.measure(ema, calibration)
            run.save(model=untrained, ema=untrained, compressor_config=asdict(measured))


def main():
    parser = cli.Parser(__doc__)
    parser.add_argument("--out", default="runs/pocket/taught")
    parser.add_argument("--steps", type=int, default=CONFIG.steps)
    parser.add_argument("--compile", action="store_true")
    settings = parser.parse_args()
    teach(replace(CONFIG, steps=settings.steps, compile=settings.compile), settings.out)


if __name__ == "__main__":
    cli.start(main)
