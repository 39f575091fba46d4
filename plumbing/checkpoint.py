"""Checkpoints: written whole or not at all, read without running code, refused with a sentence."""

import dataclasses
import functools
import hashlib
import json
import math
import os
import pickle
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open

from plumbing.cli import UsageError


POCKET = Path(__file__).resolve().parent.parent / "pocket"    # the weights of the repository


def earlier(stage, out, preset):
    """Where an earlier stage's checkpoint is: beside `out`; else, at pocket size, in pocket/."""
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
    with open(aside, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)
    folder = os.open(path.parent, os.O_RDONLY)                # the rename itself must survive, too
    os.fsync(folder)
    os.close(folder)


MADE_BY = {"A": "Stage A, as `python stage_a.py --data …` makes it; or name it with --stage-a",
           "B": "Stage B, as `python stage_b.py --data …` makes it; or name it with --stage-b",
           "C": "Stage C, as `python stage_c.py --data …` makes it",
           "compressor": "Stage B with the trained Semantic Compressor, as `python stage_b.py "
                         "--data …` makes it; or name it with --stage-b"}


def load_checkpoint(path, stage):
    """Read a checkpoint to the CPU, never unpickling code. Four forms, one result, a dict:

    ours               what save_checkpoint wrote
    a .safetensors     the small weights of the repository, written by pocket/ship.py
    a folder or .pt    of diffusers or of the official code: published/weights.py
    stage: "A", "B" or "C", or "compressor" (which also finds the one inside a Stage B checkpoint).
    Raises UsageError, one sentence, if it is missing, damaged or of another stage.
    """
    path = Path(path)
    if path.is_dir():
        from published import weights                         # for foreign files alone
        return weights.read_folder(path, stage)
    if not path.is_file():
        raise UsageError(f"{path}: no such file; expected a checkpoint of {MADE_BY[stage]}")
    try:
        state = (load_shipped(path) if path.suffix == ".safetensors" else
                 torch.load(path, map_location="cpu", weights_only=True, mmap=True))
    except (RuntimeError, EOFError, ValueError, KeyError, TypeError, SafetensorError,
            pickle.UnpicklingError) as error:
        raise UsageError(f"{path}: not a readable checkpoint "
                         f"({str(error).splitlines()[0]})") from None
    if isinstance(state, dict) and {"state_dict", "ema_state_dict"} & set(state):
        from published import weights
        return weights.read_official(state, stage)
    found = state.get("stage") if isinstance(state, dict) else type(state).__name__
    if found != stage.replace("compressor", "B"):
        raise UsageError(f"{path}: found a checkpoint of {found!r}, expected one of stage "
                         f"{stage!r}")
    return dict(state, config=translated(state.get("config", {})))


RENAMED = {"head": ("prediction", {"velocity": "v"})}         # old field -> its name and values now


def translated(config):
    """The config of an older checkpoint with the names and values of today."""
    out = {}
    for name, value in config.items():
        name, values = RENAMED.get(name, (name, {}))
        out[name] = values.get(value, value)
    return out


def load_shipped(path):
    """A .safetensors file with its config in the metadata; "compressor.…" is the compressor's."""
    with safe_open(path, "pt") as file:
        if "checkpoint" not in (file.metadata() or {}):
            raise ValueError("no config in its metadata: not written by pocket/ship.py")
        state = json.loads(file.metadata()["checkpoint"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    inner = "compressor."
    state["compressor_ema"] = {name.removeprefix(inner): value for name, value in tensors.items()
                               if name.startswith(inner)}
    state["ema"] = state["model"] = {name: value for name, value in tensors.items()
                                     if not name.startswith(inner)}
    for config in ("config", "compressor_config"):           # JSON has no tuples
        state[config] = {name: tuple(value) if isinstance(value, list) else value
                         for name, value in state.get(config, {}).items()}
    return state


def rebuild(path, stage, Model, released, device):
    """The trained Model, in eval mode on `device`, from any form of a checkpoint.

    released: the Config that a published checkpoint changes. Of B, C and the compressor it has the
    averaged weights. Warns if Model computes something else than when the checkpoint was written.
    """
    state, part = load_checkpoint(path, stage), "compressor_" if stage == "compressor" else ""
    try:
        base = released if state.get("published") else type(released)()
        config = dataclasses.replace(base, **state[part + "config"])
        model = build(Model, config, state["model" if stage == "A" else part + "ema"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        lines = str(error).splitlines()
        what = (lines[1] if len(lines) > 1 else str(error)).strip()[:300]
        raise UsageError(f"{path}: does not hold the weights of {Model.__name__}: {what}"
                         ) from None
    differs = edited(model, state.get(part + "probe", {}))
    if differs:
        print(f"{path}: Stage {stage} no longer computes what it did when this checkpoint was "
              f"written ({differs}): its code was edited since", file=sys.stderr, flush=True)
    return model.to(device)


def build(Model, config, tensors):
    """Model(config) with these weights: on the CPU, float32, in eval mode."""
    with torch.device("meta"):                 # no initial weights: no time, no random numbers
        model = Model(config)
    model.load_state_dict({name: value.cpu().float() if value.is_floating_point() else value.cpu()
                           for name, value in tensors.items()}, assign=True)
    return model.eval().requires_grad_(False)


# ---- what the code computed when the checkpoint was written --------------------------------------

@torch.no_grad()
def probe(model):
    """What a Stage A, B or C computes: {"output": 16 numbers; of B and C "alpha_bar": at five t}.

    Of one fixed input on the smallest grid, on the CPU. {} for a model that does not take it.
    """
    config, found = model.config, {}
    draw = functools.partial(torch.randn, generator=torch.Generator().manual_seed(0))
    schedule = getattr(sys.modules[type(model).__module__], "alpha_bar", None)
    try:
        model = build(type(model), config, model.state_dict())
        if schedule is None:                                  # Stage A
            output = model.decode(model.encode(draw(1, 3, 16, 16)))
        else:
            found["alpha_bar"], sem, side = schedule(torch.linspace(0, 1, 5)).tolist(), (), 2
            if hasattr(config, "sem_channels"):               # Stage B
                sem = [draw(1, config.sem_channels, 3, 3)]
                side = config.patch_size * 2 ** (len(config.widths) - 1)
            output = model(draw(1, config.latent_channels, side, side), torch.tensor([0.5]),
                           *sem, draw(1, 2, config.text_width))
    except (AttributeError, RuntimeError, TypeError, ValueError):
        return {}
    return dict(found, output=output.flatten()[::max(1, output.numel() // 16 - 1)][:16].tolist())


def edited(model, kept):
    """How the probe of `model` differs from `kept`, in words; "" if it does not.

    Other machines, TF32 and weights rounded to float16 change an output by less than is allowed.
    """
    now, words = probe(model) if kept else {}, []
    for name, old in kept.items():
        old = torch.tensor(old)
        off = (torch.tensor(now.get(name, [math.nan])) - old).abs().max()
        if not off <= (1e-5 if name == "alpha_bar" else 0.02 * old.std()):     # or it is NaN
            words.append(f"{name} differs by {off:.2g}")
    return ", ".join(words)


# ---- a run that goes on --------------------------------------------------------------------------

# What may change when a run goes on: its length, and what is about the machine and the log. Of
# batch_size and accumulate the product is compared. The scale of latents is measured in the run.
MAY_CHANGE = {"batch_size", "accumulate", "steps", "cooldown", "workers", "compile",
              "checkpoint_activations", "log_every", "preview_every", "save_every", "latent_mean",
              "latent_std", "guidance"}


def resume(path, stage, config, device, must_match, init_from=None):
    """Load the checkpoint of the run that goes on; None if there is none at `path`.

    The config must be the one of the run but for MAY_CHANGE, and so must everything in must_match:
    a run that goes on with other numbers would be two runs under one name. Raises UsageError.
    """
    first = not dist.is_initialized() or dist.get_rank() == 0
    found = torch.tensor(float(Path(path).is_file()), device=device)
    if dist.is_initialized():
        dist.all_reduce(found)
        if found.item() not in (0, dist.get_world_size()):
            raise UsageError(f"{path}: some processes find it and others do not; --out has to be "
                             "on a disk that all machines share")
    if not found:
        if init_from and first:
            print(f"a new run at step 0 with the weights of {init_from}, and with nothing else of "
                  "it: not its optimizer, schedule or place in the data", flush=True)
        return None
    if init_from and first:
        print(f"{path} is there, so that run goes on; --init-from has no effect", flush=True)
    state = load_checkpoint(path, stage)
    if not {"optimizer", "errors"} <= set(state):
        raise UsageError(f"{path}: holds weights without the state of a training, so it cannot be "
                         "continued; give it as --init-from with another --out to begin with its "
                         "weights")
    now, then = dataclasses.asdict(config), dict(state["config"])
    for settings in (now, then):
        settings["batch-size x accumulate"] = settings["batch_size"] * settings["accumulate"]
    differ = [f"--{name.replace('_', '-')} is {now[name]}, was {then.get(name)}"
              for name in now if name not in MAY_CHANGE and now[name] != then.get(name)]
    differ += [f"{name} is {value}, was {state.get(name)}" for name, value in must_match.items()
               if state.get(name) != value]
    if differ:
        raise UsageError(f"{path}: this run was started with another configuration "
                         f"({'; '.join(differ)}); give the old values to go on with it, or another "
                         "--out to start anew")
    if first:
        print(f"going on from {path} at step {state['step']}", flush=True)
    return state


def checksum(tensors):
    """sha256 over the bytes of a dict of tensors, in the order of their names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
