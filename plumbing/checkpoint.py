"""Checkpoints: written whole or not at all, read without running code, refused with a sentence."""

import contextlib
import dataclasses
import functools
import hashlib
import math
import os
import pickle
import struct
import sys
import zipfile
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch.overrides import TorchFunctionMode

from plumbing.cli import ROOT, UsageError, check_config, read_json

POCKET = ROOT / "pocket"                                      # the weights of the repository
UNREADABLE = (OSError, RuntimeError, EOFError, ValueError, LookupError, TypeError, AttributeError,
              ArithmeticError, AssertionError, SafetensorError, pickle.UnpicklingError,
              zipfile.BadZipFile, struct.error)               # what damaged files raise


def checkpoint_of_earlier_stage(stage, out, preset):
    """Where "a" or "b" is: beside `out`; at pocket size, where there is none, in pocket/."""
    own = Path(out).parent / f"stage_{stage}/checkpoint.pt"
    shipped = POCKET / f"stage_{stage}.safetensors"
    if own.exists() or preset != "pocket" or not shipped.exists():
        return own
    print(f"Stage {stage.upper()}: {shipped.relative_to(POCKET.parent)} of the repository, as "
          f"there is no {own}", flush=True)
    return shipped


def save_checkpoint(path, state):
    """Write `state` aside, force it to disk, rename it: a kill leaves the old or the new file."""
    path = Path(path)
    aside = path.with_name(path.name + ".tmp")
    try:
        with open(aside, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:
        while error.__context__:                              # torch's hides an OSError
            error = error.__context__
        raise UsageError(f"{aside}: cannot be written ({error}); {path} is as it was, and the same "
                         "command goes on once this is put right") from None
    os.replace(aside, path)
    if os.name != "nt":                                       # Windows opens no folder
        folder = os.open(path.parent, os.O_RDONLY)            # the rename itself must survive, too
        os.fsync(folder)
        os.close(folder)


def read_tensors(path):
    """The content of a .safetensors or torch file, unpickling no code. Raises one of UNREADABLE,
    also where it is not what was written, by a zip's CRC or our safetensors' sha256.

    It stays mapped into memory: copy what is kept, since whoever overwrites the file overwrites it.
    """
    if Path(path).suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            tensors, about = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()
        if "sha256" in (about or {}) and about["sha256"] != checksum(tensors):
            raise ValueError("damaged: its tensors are not those that were written")
        return tensors
    zipped, stat = zipfile.is_zipfile(path), os.stat(path)
    found = zipped and damaged(os.path.abspath(path), stat.st_ino, stat.st_size, stat.st_mtime_ns)
    if found:
        raise ValueError(f"damaged: {found} in it is not what was written")
    return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)


@functools.cache                                              # once for each state of a file
def damaged(path, *state):
    """The first record of a zip that differs from its CRC, or None: 0.4 s a GB on a CPU core."""
    with zipfile.ZipFile(path) as file:
        return file.testzip()


MADE_BY = {"A": "Stage A, as `python stage_a.py --data …` makes it; or name it with --stage-a",
           "B": "Stage B, as `python stage_b.py --data …` makes it; or name it with --stage-b",
           "C": "Stage C, as `python stage_c.py --data …` makes it",
           "LDM": "the baseline, as `python -m experiments.equal_compute train ldm` makes it",
           "compressor": "the Semantic Compressor: take `--compressor released` (81 MB), or train "
                         "it by `python stage_a.py --data …` and `python stage_b.py --data …`"}
KINDS = {**dict.fromkeys(("config", "model", "ema", "compressor_config", "compressor_ema", "probe",
                          "text_encoder", "batches", "optimizer", "provenance"), dict),
         **dict.fromkeys(("step", "skipped", "processes"), int),             # of a checkpoint
         **dict.fromkeys(("errors", "before"), list), "command": str}


def load_checkpoint(path, stage):
    """Read a checkpoint as `read_tensors` does. Several forms, one result, a dict:

    ours               what save_checkpoint wrote
    a .safetensors     the small weights of the repository, written by pocket/ship.py
    a folder or .pt    of diffusers or of the official code: published/weights.py
    "released"         Würstchen v2 in the hub's cache, downloaded once: published/hub.py
    stage: "A", "B", "C" or "compressor", which a Stage B checkpoint holds, too. Raises UsageError,
    one sentence, if it is missing, damaged or of another stage.
    """
    path = Path(path)
    if path.is_dir() or str(path) == "released":
        from published import weights                         # for foreign files alone
        return weights.read_folder(path, stage)
    if not path.is_file():
        raise UsageError(f"{path}: no such file; expected a checkpoint of {MADE_BY[stage]}")
    try:
        state = read_shipped(path) if path.suffix == ".safetensors" else read_tensors(path)
    except UNREADABLE as error:
        raise UsageError(f"{path}: not a readable checkpoint "
                         f"({(str(error) or repr(error)).splitlines()[0]})") from None
    if isinstance(state, dict) and {"state_dict", "ema_state_dict"} & set(state):
        from published import weights
        return weights.read_official(state, stage)
    found = state.get("stage") if isinstance(state, dict) else type(state).__name__
    if found != stage.replace("compressor", "B"):
        raise UsageError(f"{path}: found a checkpoint of {found!r}, expected one of stage "
                         f"{stage!r}")
    wrong = [name for name, kind in KINDS.items() if not isinstance(state.get(name, kind()), kind)
             or kind is int and state.get(name, 0) < 0]
    if wrong or not all(isinstance(one, str) for one in state.get("text_encoder", {}).values()):
        raise UsageError(f"{path}: not a readable checkpoint ({(*wrong, 'text_encoder')[0]} in it "
                         "is of another type than was written)")
    return {name: translated(value, found) if str(name).endswith("config") else value
            for name, value in state.items()}


RENAMED = {"head": ("prediction", {"velocity": "v"}), "compressor": ("compressor_preset", {})}
GONE = {("B", "weight_cap"): [0], ("B", "weight_floor"): [0],  # with these values nothing is lost
        ("A", "compile"): [True, False]}


def translated(config, stage):
    """An older config, or one from JSON, with the names (RENAMED, GONE) and types of today."""
    out = {}
    for name, value in config.items():
        if value in GONE.get((stage, name), []):
            continue
        name, values = RENAMED.get(name, (name, {}))
        out[name] = tuple(value) if isinstance(value, list) else values.get(str(value), value)
    return out


def compressor(path):
    """-> (checksum, config as a dict) of the one in a checkpoint, which is not built for that."""
    state = load_checkpoint(path, "compressor") if path else {}
    return path and checksum(copied(state.get("compressor_ema", {}))), state.get(
        "compressor_config", {})


def parts(path, stage):
    """The runs behind a checkpoint, in their order: [{"command": …, "steps": …}, …]."""
    state = load_checkpoint(path, stage)
    about = state.get("provenance") or {"command": state.get("command", "unknown"),
                                        "steps": state.get("step", 0)}
    return [*state.get("before", about.get("before", [])),
            {name: about.get(name) for name in ("command", "steps")}]


def read_shipped(path):
    """What pocket/ship.py wrote: all but the tensors is in the file's metadata."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
    about = metadata.get("checkpoint")
    if about is None:
        raise ValueError("no config in its metadata: not written by pocket/ship.py")
    origin = read_json(path, {}, metadata.get("provenance", "{}"))
    state = dict(read_json(path, {}, about), model={}, compressor_ema={}, provenance=origin)
    for name, value in read_tensors(path).items():
        inner = name.startswith("compressor.")
        state["compressor_ema" if inner else "model"][name.removeprefix("compressor.")] = value
    return dict(state, ema=state["model"])


def rebuild(path, stage, Model, released, device):
    """The trained Model, in eval mode on `device`, from any form of a checkpoint: but for A, of its
    averaged weights. Warns if Model computes something else than when the checkpoint was written.

    released: the Config that a published checkpoint changes.
    """
    state, part = load_checkpoint(path, stage), "compressor_" if stage == "compressor" else ""
    try:
        base = released if state.get("published") else type(released)()
        config = dataclasses.replace(
            base, **check_config(type(base), state[part + "config"], path))
        tensors = copied(state["model" if stage == "A" else part + "ema"])
        if not all(torch.isreal(one.sum()) and one.sum().isfinite() for one in tensors.values()):
            raise ValueError("some of them are not finite")
        model = build(Model, config, tensors)
        differs = edited(model, state.get(part + "probe", {}))
    except UsageError:
        raise
    except UNREADABLE as error:
        lines = str(error).splitlines()
        what = (lines[1] if len(lines) > 1 else str(error)).strip()[:300]
        raise UsageError(f"{path}: does not hold the weights of {Model.__name__}: {what}"
                         ) from None
    if differs:
        print(f"{path}: Stage {stage} no longer computes what it did when this checkpoint was "
              f"written ({differs}): its code was edited since", file=sys.stderr, flush=True)
    return model.to(device)


def copied(tensors):
    """Tensors on the CPU, numbers as float32, in memory of their own and not in a mapped file."""
    return {name: value.to("cpu", torch.float32 if value.is_floating_point() else value.dtype,
                           copy=True) for name, value in tensors.items()}


class Unfilled(TorchFunctionMode):
    """No initial weights: on "meta" torch imports its compiler for them, which takes a second."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__module__", "") == "torch.nn.init" or func.__name__ in (
                "normal_", "uniform_"):
            return [*args, *(kwargs or {}).values()][0]
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def empty():
    """What is built takes no memory, no time and no random numbers: its tensors come next."""
    with torch.device("meta"), Unfilled():
        yield


def build(Model, config, tensors):
    """Model(config) of these very tensors, in eval mode."""
    with empty():
        model = Model(config)
    model.load_state_dict(tensors, assign=True)
    return model.eval().requires_grad_(False)


@torch.no_grad()
def probe(model):
    """What A, B or C computes of one fixed input on the smallest grid, on the CPU: {"output": 16
    numbers; of B and C "alpha_bar": at five t}, {} for a model that does not take that input. With
    the paper's sizes it takes 0.8 s for B and 0.3 s for C, and a copy of the weights from a GPU.
    """
    config, found, sem, side = model.config, {}, [], 2
    draw = functools.partial(torch.randn, generator=torch.Generator().manual_seed(0))
    try:
        model = build(type(model), config, {k: v.cpu() for k, v in model.state_dict().items()})
        if hasattr(config, "codebook_size"):                      # Stage A
            output = model.decode(model.encode(draw(1, 3, 16, 16)))
        else:
            schedule = sys.modules[type(model).__module__].alpha_bar
            found["alpha_bar"] = schedule(torch.linspace(0, 1, 5)).tolist()
            if hasattr(config, "sem_channels"):                   # Stage B
                sem = [draw(1, config.sem_channels, 3, 3)]
                side = config.patch_size * 2 ** (len(config.widths) - 1)
            output = model(draw(1, config.latent_channels, side, side), torch.tensor([0.5]), *sem,
                           draw(1, 2, config.text_width))
    except (AttributeError, RuntimeError, TypeError, ValueError):
        return {}
    return dict(found, output=output.flatten()[::max(1, output.numel() // 16 - 1)][:16].tolist())


def edited(model, kept):
    """How the probe of `model` differs from `kept`, in words; "" if it does not, but for what other
    machines and weights rounded to float16 change.
    """
    now, words = probe(model) if kept else {}, []
    for name, old in kept.items():
        old = torch.tensor(old)
        off = (torch.tensor(now.get(name, [math.nan])) - old).abs().max()
        if not off <= (1e-5 if name == "alpha_bar" else 0.02 * old.std()):     # or it is NaN
            words.append(f"{name} differs by {off:.2g}")
    return ", ".join(words)


def checksum(tensors, start=""):
    """sha256 over the bytes of a dict of tensors, in the order of their names."""
    digest = hashlib.sha256(start.encode())
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
