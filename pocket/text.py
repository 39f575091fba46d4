"""Weights of the small text tower: random embeddings, and layers that teach_text.py taught."""

import os

import numpy as np
import torch

from plumbing.checkpoint import POCKET, read_tensors

TAUGHT = POCKET / "text.safetensors"


def weights(tower):
    """The random weights below; in its layers those that pocket/teach_text.py taught, if there."""
    state = random_weights(tower)
    taught = read_tensors(TAUGHT) if os.path.exists(TAUGHT) else {}
    layers = {name for name in state if name.startswith("transformer.")}
    if taught and layers != set(taught):
        raise ValueError(f"expected the {len(layers)} tensors of the layers, found {len(taught)}; "
                         f"{min(layers ^ set(taught))} is in one of the two alone")
    return state | taught


def random_weights(tower):
    """Random weights that are the same on every machine: a fixed code for captions, not CLIP.

    RandomState's stream is frozen for good, and a uniform number needs no logarithm, whose last
    digit may differ between machines.
    """
    rng, state = np.random.RandomState(24), {}
    for name, parameter in sorted(tower.state_dict().items()):
        if parameter.ndim == 1:  # layer norms and biases
            value = np.full(parameter.shape, float(name.endswith("weight")))
        else:
            std = 1 / np.sqrt(parameter.shape[1])  # fan-in
            if name.endswith(("out_proj.weight", "c_proj.weight")):
                std *= 0.5  # branches add to the words, they do not drown them
            std = {"token_embedding.weight": 1.0, "positional_embedding": 0.5}.get(name, std)
            value = (rng.random_sample(tuple(parameter.shape)) * 2 - 1) * (np.sqrt(3) * std)
        state[name] = torch.from_numpy(value.astype(np.float32))
    return state
