"""Pocket's stand-in for CLIP: the small text tower learns which object a caption puts where.

    python -m pocket.teach_text [--steps 2000] [--out runs/pocket/text]

CLIP's tower comes with the meaning of words and of their order. Pocket's begins at random: its
tokens are a fixed code, and a small Stage C did not learn from pictures to tell "a red star above a
blue circle" from "above a red star is a blue circle" (every pair, one of two ways, by luck). The
captions of the drawings can teach it, without any picture:

    caption --tower--> tokens (B, 24, 128); its end of text (B, 128) + noise --head--> (B, K) scores
    loss = cross-entropy of what the caption says: background, axis, place, and of both objects, the
    left or upper one first, whatever the caption begins with: colour, shape and size

Only the two transformer layers learn; the 49,408 token embeddings, drawn from a fixed seed
(text.random_weights), stay. The head is not needed afterwards.

Leaves the layers' average in OUT/text.safetensors (float16). `cp` that to pocket/ and every
training reads it from there; Stages B and C before it do not fit then and say so. Stopped and
started again, this goes on. log.jsonl has the shares of right answers on captions with combinations
that no training names (split "heldout").
"""

import copy
import json
from dataclasses import asdict, replace

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import save_file

import stage_c
from plumbing import checkpoint, cli, text, training
from pocket import shapes
from pocket import text as pocket_text

CONFIG = replace(stage_c.PRESETS["pocket"], steps=2000, batch_size=128, lr=2e-3, cooldown=1000,
                 log_every=20, save_every=100)
SEED = 2                                       # of the scenes; Stages B and C have 0, teach.py 1
NOISE = 0.3                                    # on tokens whose entries have unit variance
UNSAID = [None]                                # a caption need not name it, or has no second object
OBJECT = {"colour": UNSAID + list(shapes.COLOURS), "shape": UNSAID + list(shapes.SHAPES),
          "size": UNSAID + list(shapes.SIZES)}
NAMES = {"background": UNSAID + list(shapes.BACKGROUNDS), "axis": UNSAID + ["across", "down"],
         "place": UNSAID + list(shapes.PLACES),
         **{f"{name} {i}": values for i in (1, 2) for name, values in OBJECT.items()}}


def labels(scene, caption):
    """What the caption says about its scene: {name: index into NAMES[name]}; 0: unsaid."""
    things, relation = scene["objects"], scene["relation"]
    if relation in ("right of", "below"):                                 # the left or upper first
        things = things[::-1]
    said = dict(background=scene["background"] if scene["background"] in caption else None,
                axis=None if relation is None else
                "across" if relation in ("left of", "right of") else "down",
                place=None)
    if relation is None and (place := things[0]["place"]) and shapes.PLACES[place][2] in caption:
        said["place"] = place
    for i, thing in enumerate(things, 1):
        words = f"{thing['colour']} {thing['shape']}"
        sized = f"{thing['size']} {words}" in caption
        said |= {f"colour {i}": thing["colour"], f"shape {i}": thing["shape"],
                 f"size {i}": thing["size"] if sized else None}
    return {name: values.index(said.get(name)) for name, values in NAMES.items()}


def batch(indices, split, device="cpu"):
    """-> captions [str], answers {name: (B,) int64}."""
    scenes = [shapes.scene(index, split, SEED) for index in indices]
    captions = [shapes.caption(scene, np.random.RandomState([SEED, index]))
                for index, scene in zip(indices, scenes)]
    answers = [labels(*pair) for pair in zip(scenes, captions)]
    return captions, {name: torch.tensor([one[name] for one in answers], device=device)
                      for name in NAMES}


def make_head(width):
    """(B, width) -> (B, K): one hidden layer."""
    return nn.Sequential(nn.Linear(width, 256), nn.GELU(),
                         nn.Linear(256, sum(map(len, NAMES.values()))))


def end_of_text(encoder, captions):
    """The token at the end of each caption, which alone has seen all of it: (B, width)."""
    real = encoder.tokens(captions)[1]                                    # (B, L)
    tokens = encoder(captions)                                            # (B, L, width)
    return tokens[torch.arange(len(captions)), real.sum(1) - 1]


def loss(head, features, answers):
    """Cross-entropy of every answer, and the shares right."""
    total, right = 0.0, {}
    parts = head(features).split([*map(len, NAMES.values())], dim=-1)
    for name, part in zip(NAMES, parts):
        total = total + F.cross_entropy(part, answers[name])
        right[name] = (part.argmax(-1) == answers[name]).float().mean().item()
    return total, right


def teach(config, out):
    """config: a stage_c.Config, whose steps, batch_size, lr and so on are used here."""
    device = training.setup(config.seed)
    encoder = text.text_encoder("pocket", device=device)
    encoder.tower.load_state_dict(pocket_text.random_weights(encoder.tower))
    test = batch(range(1000), "heldout", device)

    run = training.Run("text", config, out, device)
    ema = copy.deepcopy(encoder)
    layers = encoder.tower.transformer.requires_grad_(True)
    head = make_head(encoder.width).to(device)
    ema_head = copy.deepcopy(head).requires_grad_(False)
    parameters = [*layers.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=config.lr, betas=(0.9, 0.95))
    run.restore(layers=layers, layers_ema=ema.tower.transformer, head=head, head_ema=ema_head,
                optimizer=optimizer)

    for step in run.steps():
        first = step * config.batch_size                                  # every caption is new
        captions, answers = batch(range(first, first + config.batch_size), "train", device)
        features = end_of_text(encoder, captions)
        value, _ = loss(head, features + NOISE * torch.randn_like(features), answers)
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        grad = nn.utils.clip_grad_norm_(parameters, config.grad_clip)
        for group in optimizer.param_groups:
            group["lr"] = training.learning_rate(step, config)
        if run.finite(grad):
            optimizer.step()
            training.ema_update(ema.tower.transformer, layers, step, config.ema)
            training.ema_update(ema_head, head, step, config.ema)
        right = {}
        if (step + 1) % config.save_every == 0 or step + 1 == config.steps:
            with torch.no_grad():
                right = loss(ema_head, end_of_text(ema, test[0]), test[1])[1]
        run.log(loss=value, grad=grad, **right)
        if run.due("save"):
            run.save()
            tensors = {f"transformer.{name}": value.half().contiguous()
                       for name, value in ema.tower.transformer.state_dict().items()}
            save_file(tensors, run.out / "text.safetensors", {
                "format": "pt", "steps": str(run.step), "config": json.dumps(asdict(config)),
                "right on heldout": json.dumps(right), "sha256": checkpoint.checksum(tensors)})


def main():
    parser = cli.Parser(__doc__)
    parser.add_argument("--out", default="runs/pocket/text")
    parser.add_argument("--steps", type=int, default=CONFIG.steps)
    settings = parser.parse_args()
    teach(replace(CONFIG, steps=settings.steps, cooldown=settings.steps // 2), settings.out)


if __name__ == "__main__":
    cli.start(main)
