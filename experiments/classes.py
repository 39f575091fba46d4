"""Another condition than text: Stage C from a class id. docs/add_a_condition.md explains the seam.

    python -m experiments.lab classes train
    python -m experiments.lab classes sample "red star" --weights runs/lab/classes
"""

import re

import torch
import torch.nn as nn

import stage_c
from plumbing import text
from pocket import shapes

WIDTH = 1 + len(shapes.COLOURS) * len(shapes.SHAPES)          # E = 49, a number for each class


def class_of(caption):
    """The class of a caption: colour and shape of its first object, 1 … 48; 0: no caption."""
    words = re.findall("[a-z]+", caption.lower())
    found = [[names.index(word) for word in words if word in names]
             for names in (list(shapes.COLOURS), list(shapes.SHAPES))]
    return 1 + found[0][0] * len(shapes.SHAPES) + found[1][0] if all(found) else 0


class Classes(nn.Module):
    """What stands in for the text encoder: encoder(["a red star", ""]) -> float32 (B, L, E)."""
    checksum = "one-hot"
    identity = {"name": "classes", "checksum": checksum}      # a checkpoint keeps it

    def __init__(self):
        super().__init__()
        self.register_buffer("table", torch.eye(WIDTH))

    def tokens(self, captions):                               # sample.py lets it say what is cut
        return [class_of(caption) for caption in captions]

    def forward(self, captions):                              # -> (B, 1, 49): one token, one-hot
        return self.table[self.tokens(captions)][:, None]


def use():
    """Stage C's training, and what samples from its checkpoint, know the encoder "classes"."""
    known = text.text_encoder

    def text_encoder(name="pocket", weights=None, device="cpu", width=None):
        if name == "classes":
            return Classes().to(device)
        return known(name, weights, device, width)
    text.text_encoder = stage_c.text_encoder = text_encoder
