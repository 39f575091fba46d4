"""
The frozen text encoder: captions -> un-pooled tokens after the final layer norm.

The towers are open_clip's: the small one of pocket/, which needs no download, and the text halves
of CLIP ViT-H/14 and ViT-bigG/14. Folders that transformers wrote, and the hub, are in published/.

    B  batch      L  text tokens      D  width of a token
"""

import functools
import glob
import hashlib
import os
import pickle

import numpy as np
import torch
from torch import nn

from plumbing.cli import ROOT, UsageError

POCKET_TEXT = ROOT / "pocket" / "text.safetensors"
END_OF_TEXT = 49407  # CLIP's vocabulary; laion's tokenizers for H-14 and bigG-14 also pad with it

TEXT_ENCODERS = {
    # ours: small enough for a CPU; 24 positions hold every caption of pocket/shapes.py
    "pocket": {"width": 128, "heads": 4, "layers": 2, "length": 24},
    # open_clip's model configs; Stage B and the paper's Stage C, then the released Stage C
    "clip-h": {"width": 1024, "heads": 16, "layers": 24, "length": 77,
               "hub": ("ViT-H-14", "laion2b_s32b_b79k", "3.9 GB")},
    "clip-bigg": {"width": 1280, "heads": 20, "layers": 32, "length": 77,
                  "hub": ("ViT-bigG-14", "laion2b_s39b_b160k", "10.2 GB")},
}


class TextEncoder(nn.Module):
    """Frozen: encoder(["a red star", ""]) -> float32 (B, L, D), after the final layer norm.

    Padded as the released models were trained (Hugging Face's CLIP tokenizer and text model): up
    to L with the token `pad`, and nothing attends to a padded position. What comes out at those
    positions still goes on to Stages B and C, which attend to all L. (pocket/teach_text.py alone
    unfreezes layers: then what comes out has a gradient.)
    """

    def __init__(self, name, tower, tokenizer, pad):
        super().__init__()
        self.name, self.tower, self.tokenizer, self.pad = name, tower, tokenizer, pad
        self.width, self.length = tower.width, tower.context_length
        self.eval().requires_grad_(False)

    def train(self, mode=True):
        return super().train(False)  # frozen: stays in eval mode inside a model that trains

    @functools.cached_property
    def checksum(self):
        """sha256 of weights and padding: a checkpoint keeps it, so that sampling uses the same."""
        digest = hashlib.sha256(f"padded with {self.pad}, masked".encode())
        for name, parameter in sorted(self.tower.state_dict().items()):
            digest.update(name.encode())
            digest.update(parameter.float().cpu().numpy().astype("<f4").tobytes())
        return digest.hexdigest()

    @property
    def identity(self):
        """What a checkpoint keeps of it: {"name": …, "checksum": …}."""
        return {"name": self.name, "checksum": self.checksum}

    def tokens(self, captions):
        """[str] -> ids (B, L) int64; real (B, L) bool, False where there is padding."""
        ids = self.tokenizer(list(captions), context_length=self.length)
        ends = ids == END_OF_TEXT
        real = ends.cumsum(1) - ends.long() == 0  # up to and with the first end of text
        return torch.where(real, ids, self.pad), real

    def forward(self, captions):
        tower = self.tower
        ids, real = (x.to(tower.positional_embedding.device) for x in self.tokens(captions))
        mask = tower.attn_mask.masked_fill(~real[:, None], float("-inf"))            # (B, L, L)
        x = tower.token_embedding(ids) + tower.positional_embedding                  # (B, L, D)
        x = tower.transformer(x, attn_mask=mask.repeat_interleave(tower.heads, 0))
        return tower.ln_final(x).float()


def known_text_encoder(path, state, published, weights, device, width):
    """The text encoder that the checkpoint `state` of `path` names; `published` if it names none.

    Raises UsageError if `weights` are another one than its model was trained with.
    """
    known = state.get("text_encoder", {"name": published})
    encoder = text_encoder(known["name"], weights, device, width)
    if encoder.checksum != known.get("checksum", encoder.checksum):
        raise UsageError(f"{path}: trained with another text encoder {encoder.name} (sha256 "
                         f"{known['checksum'][:12]}) than this one ({encoder.checksum[:12]})")
    return encoder


def text_encoder(name="pocket", weights=None, device="cpu", width=None):
    """The text encoder of that name: pocket (built in), clip-h or clip-bigg.

    weights: for CLIP, None for the hub, or a local path: an open_clip checkpoint, a folder
    text_encoder/ as transformers writes it (its size is read from config.json, its padding from the
    folder tokenizer/ beside it), or a folder that holds either under the encoder's name.
    width: of its tokens, as the model that reads them expects it. Raises UsageError.
    """
    if name not in TEXT_ENCODERS:
        raise UsageError(f"text encoder {name!r} is not known; expected one of "
                         f"{', '.join(TEXT_ENCODERS)}.")
    size, pad, published = TEXT_ENCODERS[name], END_OF_TEXT, None
    if name != "pocket" and weights and os.path.isdir(weights):
        named = sorted(glob.glob(os.path.join(glob.escape(weights), f"{name}*")))
        weights = named[0] if named else weights
        if os.path.isdir(weights):
            from published import text as published
            size, pad = published.size_and_pad(weights)
    # Imported here: it takes seconds, and most commands never need it.
    from open_clip.tokenizer import SimpleTokenizer
    from open_clip.transformer import TextTransformer

    with torch.device("meta"):  # no memory and no random numbers for what is replaced at once
        tower = TextTransformer(context_length=size["length"], width=size["width"],
                                heads=size["heads"], layers=size["layers"], output_dim=None,
                                mlp_ratio=size.get("mlp_ratio", 4.0))
    state = (_pocket_weights(tower) if name == "pocket" else
             published.weights(weights) if published else _clip_weights(name, weights, size))
    try:
        tower.load_state_dict(state, assign=True)
    except RuntimeError as error:
        detail = str(error).splitlines()[-1].strip()[:160]
        raise UsageError(f"{weights}: is not the text tower of {name}, {size['width']} wide with "
                         f"{size['layers']} layers: {detail}.") from None
    if width not in (None, tower.width):
        raise UsageError(f"the text encoder {name} gives tokens {tower.width} wide, and the model "
                         f"reads tokens {width} wide (--text-encoder, --text-width)")
    tower.attn_mask = tower.build_causal_mask()  # not part of the state, so still on "meta"
    return TextEncoder(name, tower.float(), SimpleTokenizer(), pad).to(device)


def _pocket_weights(tower):
    """The random weights below; in its layers those that pocket/teach_text.py taught, if there."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    state = random_text_weights(tower)
    if os.path.exists(POCKET_TEXT):
        try:
            taught = {name: value.float() for name, value in load_file(POCKET_TEXT).items()}
        except (OSError, SafetensorError) as error:
            raise UsageError(f"{POCKET_TEXT}: not a readable text tower ({error}).") from None
        expected, found = ({name: tuple(value.shape) for name, value in tensors.items()
                            if tensors is taught or name.startswith("transformer.")}
                           for tensors in (state, taught))
        if expected != found:
            name = sorted(name for name, _ in expected.items() ^ found.items())[0]
            raise UsageError(f"{POCKET_TEXT}: expected the {len(expected)} tensors of the pocket "
                             f"tower's layers; of {name} it has {found.get(name)}, expected "
                             f"{expected.get(name)}.")
        state |= taught
    return state


def random_text_weights(tower):
    """Random weights that are the same on every machine: a fixed code for captions, not CLIP.

    Uniform numbers of a given standard deviation: RandomState's stream is frozen for good, and
    a uniform draw needs no logarithm, whose last digit may differ between machines.
    """
    rng, state = np.random.RandomState(24), {}
    for name, parameter in sorted(tower.state_dict().items()):
        if parameter.ndim == 1:  # layer norms and biases
            value = np.full(parameter.shape, float(name.endswith("weight")))
        else:
            std = {"token_embedding.weight": 1.0, "positional_embedding": 0.5}.get(name)
            if std is None:
                std = 1 / np.sqrt(parameter.shape[1])  # fan-in
                if name.endswith(("out_proj.weight", "c_proj.weight")):
                    std *= 0.5  # branches add to the words, they do not drown them
            value = (rng.random_sample(tuple(parameter.shape)) * 2 - 1) * (np.sqrt(3) * std)
        state[name] = torch.from_numpy(value.astype(np.float32))
    return state


def _clip_weights(name, weights, size):
    """The text tower's part of an open_clip checkpoint, from the file or from the hub."""
    from safetensors import SafetensorError, safe_open

    model, tag, download = size["hub"]
    wanted = ("positional_embedding", "token_embedding.", "transformer.", "ln_final.")
    try:
        if not weights:
            from published import hub
            weights = hub.open_clip_checkpoint(model, tag)
        path = os.fspath(weights)
        if not os.path.isfile(path):
            raise FileNotFoundError(f"there is no file {path}")
        if path.endswith(".safetensors"):
            with safe_open(path, framework="pt") as file:  # only what is asked for
                names = {key: _short(key) for key in file.keys()}
                return {short: file.get_tensor(key) for key, short in names.items()
                        if short.startswith(wanted)}
        state = torch.load(path, map_location="cpu", weights_only=True)
        state = state.get("state_dict", state)
        return {_short(key): x for key, x in state.items() if _short(key).startswith(wanted)}
    except (OSError, RuntimeError, ValueError, AttributeError, EOFError,
            SafetensorError, pickle.UnpicklingError) as error:
        reason = str(error).partition("\n")[0].partition(". ")[0][:160].rstrip(". ")
        raise UsageError(
            f"The CLIP weights of {name} ({model}, {tag}) could not be loaded ({reason}): give "
            "their file with --clip /path/open_clip_model.safetensors, or go online once "
            f"({download}), or use --preset pocket, which needs no CLIP.") from None


def _short(key):
    """Names of a model in DistributedDataParallel, or with a separate text tower, as in CLIP."""
    return key.removeprefix("module.").removeprefix("text.")
