"""The frozen text encoder: captions -> un-pooled tokens after the final layer norm.

Three towers of one class: the small one of pocket/, which needs no download, and the text halves of
CLIP ViT-H/14 and ViT-bigG/14. Folders that transformers wrote, and the hub, are in published/.

    B  batch      L  text tokens      D  width of a token
"""

import functools
import glob
import importlib.util
import os
import re
import sys
import types
import unicodedata
from collections import OrderedDict

import regex
import torch
from torch import nn
from tqdm import tqdm

from plumbing.checkpoint import UNREADABLE, checksum, copied, empty, read_tensors
from plumbing.cli import UsageError

WORD = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+")     # CLIP's
MARKS = {"<|startoftext|>": 49406, "<|endoftext|>": 49407}    # the last two of its vocabulary
START_OF_TEXT, END_OF_TEXT = MARKS.values()   # the tokenizers of H-14 and bigG-14 pad with this one

TEXT_ENCODERS = {
    # ours: small enough for a CPU; 24 positions hold every caption of pocket/shapes.py
    "pocket": {"width": 128, "heads": 4, "layers": 2, "context_length": 24},
    # open_clip's model configs; Stage B and the paper's Stage C, then the released Stage C
    "clip-h": {"width": 1024, "heads": 16, "layers": 24, "context_length": 77},
    "clip-bigg": {"width": 1280, "heads": 20, "layers": 32, "context_length": 77}}
HUB = {"clip-h": ("ViT-H-14", "laion2b_s32b_b79k", "3.9 GB"),
       "clip-bigg": ("ViT-bigG-14", "laion2b_s39b_b160k", "10.2 GB")}


@functools.cache
def byte_pairs():
    """open_clip's tokenizer, from its file alone: to import the whole package takes seconds."""
    package = types.ModuleType("open_clip_alone")             # one whose __init__.py does not run
    package.__path__ = importlib.util.find_spec("open_clip").submodule_search_locations
    sys.modules.setdefault(package.__name__, package)
    return importlib.import_module(f"{package.__name__}.tokenizer").SimpleTokenizer()


def ids_of(caption):
    """Ids of a caption as transformers' CLIPTokenizer gives them, the released models' tokenizer.

    open_clip's own replaces curly quotes, ligatures and "&amp;" first; its byte pairs are the same.
    """
    clip, ids = byte_pairs(), []
    for part in re.split("(" + "|".join(map(re.escape, MARKS)) + ")", caption):
        lower = "".join(letter.lower() for letter in unicodedata.normalize("NFC", part))
        words = ["".join(clip.byte_encoder[byte] for byte in word.encode())
                 for word in WORD.findall(lower)]
        ids += [MARKS[part]] if part in MARKS else [
            clip.encoder[piece] for word in words for piece in clip.bpe(word).split(" ")]
    return ids


def first_ids(caption, room):
    """-> the first `room` ids of a caption; "at word 9, 'blue'" if it is cut there, else ""."""
    ids = []
    for number, word in enumerate(regex.finditer(r"\S+", caption), 1):
        ids += ids_of(word[0][:33 * room])                    # no token has 33 letters
        if len(ids) > room:
            return ids[:room], f"at word {number}, {word[0][:40]!r}"
    return ids, ""


class Layer(nn.Module):
    """One layer of CLIP's text transformer (Radford et al., 2021), with open_clip's names."""

    def __init__(self, width, heads, mlp_ratio):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.Sequential(OrderedDict(
            c_fc=nn.Linear(width, int(width * mlp_ratio)), gelu=nn.GELU(),
            c_proj=nn.Linear(int(width * mlp_ratio), width)))

    def forward(self, x, mask):
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, attn_mask=mask, need_weights=False)[0]            # (B, L, D)
        return x + self.mlp(self.ln_2(x))


class Tower(nn.Module):
    """ids (B, L), mask (B heads, L, L) added to attention's scores -> tokens (B, L, D).

    Here and not open_clip's, which imports torchvision and torch's compiler: a second.
    """

    def __init__(self, width, heads, layers, context_length, mlp_ratio=4.0):
        super().__init__()
        self.width, self.heads, self.context_length = width, heads, context_length
        self.token_embedding = nn.Embedding(END_OF_TEXT + 1, width)
        self.positional_embedding = nn.Parameter(torch.zeros(context_length, width))
        self.transformer = nn.ModuleDict(dict(resblocks=nn.ModuleList(
            Layer(width, heads, mlp_ratio) for _ in range(layers))))
        self.ln_final = nn.LayerNorm(width)

    def forward(self, ids, mask):
        x = self.token_embedding(ids) + self.positional_embedding
        for layer in self.transformer["resblocks"]:
            x = layer(x, mask)
        return self.ln_final(x)


class TextEncoder(nn.Module):
    """Frozen: encoder(["a red star", ""]) -> float32 (B, L, D), after the final layer norm.

    Padded as the released models were trained: up to L with the token `pad`, to which nothing in
    here attends. Stages B and C attend to all L of what comes out. pocket/teach_text.py alone
    unfreezes layers; then it has a gradient.
    """

    def __init__(self, name, tower, pad):
        super().__init__()
        self.name, self.tower, self.pad = name, tower, pad
        self.width, self.length = tower.width, tower.context_length
        self.told = False                                     # which captions are cut
        self.eval().requires_grad_(False)

    def train(self, mode=True):
        return super().train(False)  # frozen: stays in eval mode inside a model that trains

    @functools.cached_property
    def checksum(self):
        """sha256 of weights and padding: a checkpoint keeps it, so that sampling uses the same."""
        return checksum(self.tower.state_dict(), f"padded with {self.pad}, masked")

    @property
    def identity(self):
        """What a checkpoint keeps of it: {"name": …, "checksum": …}."""
        return {"name": self.name, "checksum": self.checksum}

    def tokens(self, captions):
        """[str] -> ids (B, L) int64; real (B, L) bool, False where there is padding. Says once how
        many are longer, and at which word they are cut: training reads them on and on.
        """
        found = [first_ids(one, self.length - 2) for one in captions]
        cut = [f"{one[:40]!r} {where}" for one, (_, where) in zip(captions, found) if where]
        if cut and not self.told:
            tqdm.write(f"{len(cut)} of {len(captions)} texts are longer than the {self.length} "
                       f"tokens of the text encoder {self.name} and are cut: "
                       + "; ".join(cut[:20] + ["…"] * (len(cut) > 20)), file=sys.stderr)
        self.told = self.told or bool(cut)
        rows = [[START_OF_TEXT, *ids, END_OF_TEXT] for ids, _ in found]
        ids = torch.tensor([row + [self.pad] * (self.length - len(row)) for row in rows])
        ends = torch.tensor([len(row) for row in rows])
        return ids, torch.arange(self.length) < ends[:, None]

    def forward(self, captions):
        device = self.tower.positional_embedding.device
        ids, real = (x.to(device, non_blocking=True) for x in self.tokens(captions))
        hidden = ~real[:, None].expand(-1, self.length, -1).tril()                   # (B, L, L)
        mask = torch.zeros(hidden.shape, device=ids.device).masked_fill(hidden, float("-inf"))
        return self.tower(ids, mask.repeat_interleave(self.tower.heads, 0)).float()


def known_text_encoder(path, state, published, weights, device, width):
    """The text encoder that the checkpoint `state` of `path` names, else `published`; UsageError if
    `weights` are another than its model was trained with. One published beside it comes first.
    """
    known = state.get("text_encoder", {"name": published})
    encoder = text_encoder(known["name"], state.get("text_beside") or weights, device, width)
    if encoder.checksum != known.get("checksum", encoder.checksum):
        raise UsageError(f"{path}: trained with another text encoder {encoder.name} (sha256 "
                         f"{known['checksum'][:12]}) than this one ({encoder.checksum[:12]})")
    return encoder


def text_encoder(name="pocket", weights=None, device="cpu", width=None):
    """The text encoder of that name: pocket (built in), clip-h or clip-bigg.

    weights: for CLIP, None or "released" for open_clip's or Würstchen v2's on the hub, or a local
    path: an open_clip checkpoint, a folder text_encoder/ as transformers writes it (config.json has
    its size, tokenizer/ beside it its padding), or a folder with either under the encoder's name.
    width: of its tokens, as the model that reads them expects it. Raises UsageError.
    """
    if name not in TEXT_ENCODERS:
        raise UsageError(f"text encoder {name!r}: expected one of {', '.join(TEXT_ENCODERS)}")
    size, pad, published = TEXT_ENCODERS[name], END_OF_TEXT, None
    if name == "pocket":
        from pocket import text as pocket
        weights = pocket.TAUGHT
    if weights == "released":
        from published import hub
        weights = hub.released(name)
    if weights and os.path.isdir(weights):
        named = sorted(glob.glob(os.path.join(glob.escape(weights), f"{name}*")))
        weights = named[0] if named else weights
        if os.path.isdir(weights):
            from published import text as published
            size, pad = published.size_and_pad(weights)
    with empty():
        tower = Tower(**size)
    try:
        tower.load_state_dict(copied(
            pocket.weights(tower) if name == "pocket" else
            published.weights(weights) if published else clip_weights(name, weights)), assign=True)
    except UsageError:
        raise
    except UNREADABLE as error:
        detail = str(error).splitlines()[-1].strip()[:200]
        raise UsageError(f"{weights or 'the hub'}: is not the text tower of {name}, "
                         f"{size['width']} wide with {size['layers']} layers: {detail}.") from None
    if width not in (None, tower.width):
        raise UsageError(f"the text encoder {name} gives tokens {tower.width} wide, and the model "
                         f"reads tokens {width} wide (--text-encoder, --text-width)")
    return TextEncoder(name, tower, pad).to(device)


def clip_weights(name, weights):
    """The text tower's part of an open_clip checkpoint, from the file or from the hub."""
    model, tag, download = HUB[name]
    wanted = ("positional_embedding", "token_embedding.", "transformer.", "ln_final.")
    try:
        if not weights:
            from published import hub
            weights = hub.open_clip_checkpoint(model, tag)
        state = read_tensors(weights)
        # names of a model in DistributedDataParallel, or with a separate text tower, as in CLIP
        state = {key.removeprefix("module.").removeprefix("text."): value
                 for key, value in state.get("state_dict", state).items()}
    except UNREADABLE as error:
        reason = str(error).partition("\n")[0].partition(". ")[0][:160].rstrip(". ")
        raise UsageError(
            f"The CLIP weights of {name} ({model}, {tag}) could not be loaded ({reason}): give "
            "their file with --clip /path/open_clip_model.safetensors, or go online once "
            f"({download}), or use --preset pocket, which needs no CLIP.") from None
    return {key: value for key, value in state.items() if key.startswith(wanted)}
