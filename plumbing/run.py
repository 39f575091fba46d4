"""The plumbing that the training loops share and that a reader need never open.

Command line from a dataclass, torchrun, checkpoints, the log line, the EMA update, preview grids.
Nothing here owns a loop: each stage's `train()` stays flat and calls these functions by name.
"""

import argparse
import ctypes
import dataclasses
import hashlib
import json
import os
import pickle
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from tqdm import tqdm


# ---- command line --------------------------------------------------------------------------------

def parse(Config, presets, doc, argv=None, preset="paper", **paths):
    """Make the command line of a stage from the fields of its Config.

    paths: further options, name -> (default, help). Returns (config, namespace of the paths and of
    the preset's name). A tuple is given with commas: `--widths 48,96`.
    """
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=list(presets), default=preset,
                        help=f"a named set of all that follows (default {preset})")
    for name, (default, text) in paths.items():
        parser.add_argument("--" + name.replace("_", "-"), default=default, help=text)
    for field in dataclasses.fields(Config):
        flag, value = "--" + field.name.replace("_", "-"), getattr(presets[preset], field.name)
        text = ", ".join(f"{key} {getattr(one, field.name)}" for key, one in presets.items())
        if isinstance(value, bool):
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, help=text,
                                default=argparse.SUPPRESS)
        elif isinstance(value, tuple):
            parser.add_argument(flag, type=tuple_of(type((*value, "")[0])), help=text,
                                metavar="A,B,…", default=argparse.SUPPRESS)
        else:
            parser.add_argument(flag, type=type(value), help=text, metavar=type(value).__name__,
                                default=argparse.SUPPRESS)
    given = vars(parser.parse_args(argv))
    fields = {field.name for field in dataclasses.fields(Config)}
    changed = {name: value for name, value in given.items() if name in fields}
    others = {name: value for name, value in given.items() if name not in fields}
    if others["preset"] != "pocket" and not torch.cuda.is_available():
        print(f"note: no GPU is visible and the preset {others['preset']!r} is made for one; "
              "--preset pocket is made for the CPU", file=sys.stderr, flush=True)
    return dataclasses.replace(presets[others["preset"]], **changed), argparse.Namespace(**others)


def tuple_of(kind):
    """An argparse type that reads "48,96" as a tuple of `kind`."""
    def read(text):
        return tuple(kind(part) for part in text.split(","))
    read.__name__ = f"tuple of {kind.__name__}"
    return read


def required(path, what, how):
    """Return `path` as a Path, or stop with one sentence: what is missing and how it is made."""
    if not Path(path).exists():
        sys.exit(f"{path}: {what} is needed here and was not found; {how}")
    return Path(path)


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


def source(args):
    """--data, or, at pocket size, the built-in drawings, which are made if they are not there."""
    if args.data is not None:
        return args.data
    if args.preset != "pocket":
        sys.exit("--data is missing: a folder of tar shards, for example from "
                 "`python data.py shapes --out shards/shapes`")
    import data
    start(data.make_shapes, "shards/shapes")
    return "shards/shapes"


class ConfigError(ValueError):
    """Settings that do not fit together; the message is one sentence."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message is one sentence with its path."""


def start(train, *arguments):
    """Run `train`; an error that carries its own sentence ends the program with that alone."""
    from data import DataError
    try:
        return train(*arguments)
    except (DataError, CheckpointError, ConfigError, FloatingPointError) as error:
        sys.exit(str(error))
    except torch.cuda.OutOfMemoryError as error:
        sys.exit(f"the GPU's memory is full ({str(error).partition('.')[0]}); try half the "
                 "--batch-size with twice the --accumulate")
    except KeyboardInterrupt:
        sys.exit("stopped; nothing more was saved, and the same command goes on from what was")


# ---- torchrun ------------------------------------------------------------------------------------

def keep_freed_memory():
    """Let glibc keep what is freed; by default each large tensor costs fresh pages from the kernel.

    On two CPU cores Stage A's training step takes 0.45 s with this and 0.67 s without.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):                          # glibc alone; elsewhere nothing happens
        m_trim_threshold, m_mmap_max = -1, -4                 # malloc.h
        libc.mallopt(m_mmap_max, 0)
        libc.mallopt(m_trim_threshold, 2 ** 31 - 1)


def setup(seed):
    """Return (device, rank, world) and seed torch; several processes if started by `torchrun`."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cpu")
    if not torch.cuda.is_available():
        keep_freed_memory()
    else:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")        # TF32 for what autocast leaves in fp32
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    torch.manual_seed(seed)                                   # the same initial weights everywhere
    return device, rank, world


def synchronised(model, world):
    """On several GPUs BatchNorm uses the batch of all processes. torch has no such layer for CPUs:
    there each process uses its own batch, and the first one's statistics are saved.
    """
    if world > 1 and torch.cuda.is_available():
        return torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return model


def average_gradients(parameters, world):
    """Average the gradients over all processes, once per optimizer step.

    departs from the habit of wrapping in DistributedDataParallel: one visible call after the last
    micro-batch serves any forward path (Stage B trains two modules, Stage A calls three methods).
    """
    if world == 1:
        return
    for parameter in parameters:
        if parameter.requires_grad:
            if parameter.grad is None:                        # every process must join every call
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad)
            parameter.grad /= world


def agree(flags, tensor, world):
    """After it every process has the union of all `flags` (bool) and rank 0's `tensor`."""
    if world > 1:
        union = flags.float()
        dist.all_reduce(union, dist.ReduceOp.MAX)
        flags.copy_(union > 0)
        dist.broadcast(tensor, 0)


# ---- checkpoints ---------------------------------------------------------------------------------

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


def load_checkpoint(path, stage=None):
    """Read a checkpoint to the CPU, never unpickling code. Four forms, one result, a dict:

    ours               what save_checkpoint wrote
    a .safetensors     the small weights of the repository, written by pocket/ship.py
    a folder           config.json (here as "diffusers") and safetensors (as "ema"), by diffusers
    an official .pt    its weights as "ema", with the names of OFFICIAL_NAMES replaced
    stage: "A", "B" or "C", or "compressor" (which also finds the one inside a Stage B checkpoint).
    Raises CheckpointError, one sentence, if it is missing, damaged or of another stage.
    """
    path = Path(path)
    if path.is_dir():
        return load_diffusers(path, stage)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; expected a checkpoint of stage {stage}")
    try:
        state = (load_shipped(path) if path.suffix == ".safetensors" else
                 torch.load(path, map_location="cpu", weights_only=True, mmap=True))
    except (RuntimeError, EOFError, ValueError, KeyError, TypeError, SafetensorError,
            pickle.UnpicklingError) as error:
        raise CheckpointError(f"{path}: not a readable checkpoint "
                              f"({str(error).splitlines()[0]})") from None
    if isinstance(state, dict) and {"state_dict", "ema_state_dict"} & set(state):
        weights = official(state.get("ema_state_dict") or state["state_dict"])
        state = {"stage": stage.replace("compressor", "B") if stage else "official",
                 "model": weights, "ema": weights,
                 "compressor_ema": state.get("effnet_state_dict", {})}
    found = state.get("stage") if isinstance(state, dict) else type(state).__name__
    if stage is not None and found != stage.replace("compressor", "B"):
        raise CheckpointError(f"{path}: found a checkpoint of {found!r}, expected one of stage "
                              f"{stage!r}")
    return state


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


DIFFUSERS_CLASSES = {"A": "PaellaVQModel", "B": "WuerstchenDiffNeXt", "C": "WuerstchenPrior",
                     "compressor": "EfficientNetEncoder"}


def load_diffusers(folder, stage):
    """A folder with config.json and diffusion_pytorch_model.safetensors: names as they are."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        tensors = load_file(folder / "diffusion_pytorch_model.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: expected a folder in diffusers' layout, config.json and "
                              f"diffusion_pytorch_model.safetensors ({error})") from None
    found = config.get("_class_name")
    if stage is not None and found != DIFFUSERS_CLASSES[stage]:
        raise CheckpointError(f"{folder}: found a {found}, expected {DIFFUSERS_CLASSES[stage]}")
    return {"stage": stage, "diffusers": config, "model": tensors, "ema": tensors,
            "compressor_ema": tensors}


def save_diffusers(folder, config, tensors):
    """Write what load_diffusers and diffusers' from_pretrained read."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    save_file(tensors, Path(folder) / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    (Path(folder) / "config.json").write_text(json.dumps(config, indent=2) + "\n")


OFFICIAL_NAMES = {"vquantizer.codebook.": "vquantizer.embedding.",
                  "attention.attn.out_proj.": "attention.to_out.0.",
                  "attention.attn.in_proj_weight": ("to_q.weight", "to_k.weight", "to_v.weight"),
                  "attention.attn.in_proj_bias": ("to_q.bias", "to_k.bias", "to_v.bias")}


def official(tensors):
    """Weights by the names of the official .pt files -> by those of the diffusers folders."""
    renamed = {}
    for name, value in tensors.items():
        for theirs, ours in OFFICIAL_NAMES.items():
            if theirs in name and isinstance(ours, tuple):        # q, k, v are one matrix there
                head = name.partition("attn.")[0]
                renamed.update(zip([head + one for one in ours], value.chunk(3)))
                break
            name = name.replace(theirs, ours if isinstance(ours, str) else theirs)
        else:
            renamed[name] = value
    return renamed


def rebuild(path, stage, Model, config_of, device, weights="ema"):
    """Model(config_of(state)) with its weights, in eval mode, from any form of a checkpoint."""
    state = load_checkpoint(path, stage)
    try:
        config = config_of(state)
        with torch.device("meta"):             # no initial weights: no time, no random numbers
            model = Model(config)
        tensors = {name: value.float() if value.is_floating_point() else value
                   for name, value in state[weights].items()}
        model.load_state_dict(tensors, assign=True)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        lines = str(error).splitlines()
        what = (lines[1] if len(lines) > 1 else str(error)).strip()[:300]
        raise CheckpointError(f"{path}: does not hold the weights of {Model.__name__}: {what}"
                              ) from None
    return model.to(device).eval().requires_grad_(False)


def random_state(device):
    """The state of torch's random numbers, for a checkpoint."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


# what may change when a run goes on: its length, and what is about the machine and the log (of
# batch_size and accumulate the parts, not their product)
FREE = {"batch_size", "accumulate", "steps", "cooldown", "workers", "compile",
        "checkpoint_activations", "log_every", "preview_every", "save_every", "latent_mean",
        "latent_std", "guidance"}


def resume(path, stage, config, device, rank, given, init_from=None):
    """Load the checkpoint that `--out` holds, or None. Restores the random numbers.

    The config must be the one of the run, but for the fields in FREE, and so must everything in
    `given` (the number of samples, the other stages' checksums): a run that goes on with other
    numbers would be two runs under one name.
    """
    found = torch.tensor(float(Path(path).is_file()), device=device)
    if dist.is_initialized():
        dist.all_reduce(found)
        if found.item() not in (0, dist.get_world_size()):
            sys.exit(f"{path}: some processes find it and others do not; --out has to be on a disk "
                     "that all machines share")
    if not found:
        if init_from and rank == 0:
            print(f"a new run at step 0 with the weights of {init_from}, and with nothing else of "
                  "it: not its optimizer, schedule or place in the data", flush=True)
        return None
    if init_from and rank == 0:
        print(f"{path} is there, so that run goes on; --init-from has no effect", flush=True)
    state = load_checkpoint(path, stage)
    if "optimizer" not in state:
        sys.exit(f"{path}: holds weights without the state of a training, so it cannot be "
                 "continued; give it as --init-from with another --out to begin with its weights")
    now, then = dataclasses.asdict(config), dict(state["config"])
    for settings in (now, then):
        settings["batch-size x accumulate"] = settings["batch_size"] * settings["accumulate"]
    differ = [f"--{name.replace('_', '-')} is {now[name]}, was {then.get(name)}"
              for name in now if name not in FREE and now[name] != then.get(name)]
    differ += [f"{name} is {value}, was {state.get(name)}" for name, value in given.items()
               if state.get(name) != value]
    if differ:
        sys.exit(f"{path}: this run was started with another configuration ({'; '.join(differ)}); "
                 "give the old values to go on with it, or another --out to start anew")
    if "cuda" in state["random"] and device.type == "cuda":
        torch.cuda.set_rng_state(state["random"]["cuda"], device)
    torch.set_rng_state(state["random"]["cpu"])
    if rank:                                              # rank 0 wrote it: draw other noise here
        torch.manual_seed(config.seed + 1000 * state["step"] + rank)
    if rank == 0:
        print(f"going on from {path} at step {state['step']}", flush=True)
    return state


def checksum(tensors):
    """sha256 over the bytes of a dict of tensors, in the order of their names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


# ---- inside the loop -----------------------------------------------------------------------------

def learning_rate(step, config):
    """config.lr with a linear warm-up and, over the last config.cooldown steps, a linear decay."""
    return config.lr * min(1.0, (step + 1) / max(config.warmup, 1),
                           (config.steps - step) / max(config.cooldown, 1))


@torch.no_grad()
def ema_update(ema, model, step, limit):
    """Move the average towards the model: decay min(limit, (1 + n) / (10 + n)) at step n.

    Averages parameters. Buffers (BatchNorm statistics) are copied: they are averages already.
    """
    decay = min(limit, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)
    for mine, its in zip(ema.buffers(), model.buffers()):
        mine.copy_(its)


class NanGuard:
    """Counts steps whose gradient is not finite; ten in a row stop the run with a sentence."""

    def __init__(self, limit=10):
        self.limit, self.in_a_row, self.skipped = limit, 0, 0

    def is_bad(self, grad_norm, step):
        if torch.isfinite(grad_norm):
            self.in_a_row = 0
            return False
        self.in_a_row, self.skipped = self.in_a_row + 1, self.skipped + 1
        if self.in_a_row >= self.limit:
            sys.exit(f"step {step}: the gradient was not finite {self.limit} times in a row; the "
                     "last checkpoint is untouched. Try a lower --lr, a longer --warmup or a "
                     "smaller --grad-clip")
        return True


class StopSignal:
    """Ctrl-C and SIGTERM ask the loop to stop after this step; a second Ctrl-C stops at once."""

    def __init__(self):
        self.asked, self.process = False, os.getpid()
        signal.signal(signal.SIGINT, self.ask)
        signal.signal(signal.SIGTERM, self.ask)

    def ask(self, number, frame):
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if os.getpid() == self.process:
            self.asked = True
        else:                                             # a forked worker: simply end
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def over(self):
        """The loop is over: signals mean again what they usually mean."""
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def now(self, device, world):
        """Whether to stop after this step; all processes agree, whichever of them was asked."""
        if world > 1:
            asked = torch.tensor(float(self.asked), device=device)
            dist.all_reduce(asked, dist.ReduceOp.MAX)
            self.asked = bool(asked)
        return self.asked


def by_level(record, edges=(0.25, 0.5, 0.75, 1.0)):
    """Mean squared error by noise level, from [(t, error), …]: t up to .25, .5, .75 and 1."""
    t, error = (torch.cat(column).float().cpu() for column in zip(*record))
    means, low = [], -1.0
    for high in edges:
        inside = (t > low) & (t <= high)
        means.append(error[inside].mean().item() if inside.any() else float("nan"))
        low = high
    return means


class Log:
    """A tqdm bar with loss, img/s and ETA; a JSON line in out/log.jsonl per `log_every` steps."""

    def __init__(self, out, config, start, rank, world):
        self.path, self.rank, self.world = Path(out) / "log.jsonl", rank, world
        self.images, self.clock = 0, time.perf_counter()
        steps, self.left = config.steps, config.steps - start
        self.batch, self.warm, self.begun = config.batch_size * config.accumulate * world, 0, 0.0
        if rank == 0:
            print(f"{self.left:,} steps to go; effective batch {config.batch_size} x "
                  f"{config.accumulate} accumulated x {world} process(es) = {self.batch:,}, "
                  f"{self.left * self.batch:,} samples", flush=True)
        self.bar = tqdm(total=steps, initial=start, disable=rank != 0, unit="step", smoothing=0.05,
                        mininterval=1.0 if sys.stderr.isatty() else 15.0)
        if rank == 0 and self.path.exists():              # lines after the checkpoint: run again
            lines = [line for line in self.path.read_text().splitlines(keepends=True)
                     if line.endswith("\n") and json.loads(line)["step"] <= start]
            self.path.write_text("".join(lines))

    def step(self, images):
        self.images += images
        self.bar.update()
        self.warm += 1                                    # steps 1 and 2 compile, open files, …
        if self.warm == 2:
            self.begun = time.perf_counter()
        if self.warm == 5 and self.rank == 0:
            seconds = (time.perf_counter() - self.begun) / 3
            hours = seconds * self.left / 3600
            unit = "GPU" if torch.cuda.is_available() else "CPU process"
            tqdm.write(f"a step takes {seconds:.2f} s (measured now), so this run takes "
                       f"{hours:,.1f} hours: {hours * self.world:,.1f} {unit}-hours")

    def write(self, step, levels=None, **numbers):
        """Print the fixed line and append it to log.jsonl. numbers: name -> float."""
        seconds = time.perf_counter() - self.clock
        numbers["images_per_s"] = self.images / max(seconds, 1e-9)
        self.images, self.clock = 0, time.perf_counter()
        if self.world > 1:            # each process has the loss of its batch (levels: rank 0's)
            device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
            total = torch.tensor(numbers["loss"], device=device)
            dist.all_reduce(total)
            numbers["loss"] = total.item() / self.world
        if self.rank:
            return
        loss, rate = numbers["loss"], numbers["images_per_s"]
        bins = ""
        if levels is not None:
            numbers["mse_by_t"] = levels
            bins = "  [t<" + " | ".join(f"{edge} {value:.3f}" for edge, value in
                                        zip((".25", ".5", ".75", "1"), levels)) + "]"
        rest = "".join(f"  {name} {value:.3g}" for name, value in numbers.items()
                       if name not in ("loss", "images_per_s", "mse_by_t"))
        self.bar.set_postfix_str(f"loss {loss:.4f}, {rate:.0f} img/s", refresh=False)
        each = f" ({rate / self.world:.0f} per process)" if self.world > 1 else ""
        tqdm.write(f"step {step}  loss {loss:.4f}{bins}{rest}  {rate:.0f} img/s{each}")
        sys.stdout.flush()
        with open(self.path, "a") as file:                # NaN is not JSON: an empty bin is null
            file.write(json.dumps({"step": step, **numbers}).replace("NaN", "null") + "\n")

    def pause(self):
        """Call after a preview or a checkpoint: their time is not the step's."""
        self.clock, self.images = time.perf_counter(), 0

    def finish(self, out, stop):
        """Say how the run ended. stop: its StopSignal."""
        stop.over()
        self.bar.close()
        if self.rank == 0:
            print(f"stopped on request, saved in {out}; the same command goes on from there"
                  if stop.asked else f"finished; checkpoint, log and previews are in {out}",
                  flush=True)


# ---- pictures ------------------------------------------------------------------------------------

def to_pil(image):
    """(3, H, W) float in [0, 1] -> PIL image; anything outside is clamped."""
    array = (image.detach().float().cpu().clamp(0, 1) * 255).round().to(torch.uint8)
    return Image.fromarray(array.permute(1, 2, 0).numpy())


def grid(images, columns, captions=None, scale=1):
    """Put pictures (3, H, W) on a sheet, row by row; a caption stands below its picture."""
    images = [to_pil(image) for image in images]
    width, height = (side * scale for side in images[0].size)
    font, line = ImageFont.load_default(11), 13
    texts = [wrap(text, width, font) for text in captions or [""] * len(images)]
    below = line * max(text.count("\n") + 1 for text in texts) + 3 if captions else 0
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * (width + 4) + 4, rows * (height + below + 4) + 4), "white")
    pen = ImageDraw.Draw(sheet)
    for index, (image, text) in enumerate(zip(images, texts)):
        x, y = 4 + index % columns * (width + 4), 4 + index // columns * (height + below + 4)
        sheet.paste(image.resize((width, height), Image.Resampling.NEAREST), (x, y))
        pen.rectangle((x - 1, y - 1, x + width, y + height), outline=(200, 200, 200))
        if captions:
            pen.multiline_text((x, y + height + 1), text, fill="black", font=font, spacing=1)
    return sheet


def wrap(text, width, font):
    """Break a caption into lines that fit under a picture `width` pixels wide."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        fits = not lines[-1] or font.getlength(longer) <= width
        lines = lines[:-1] + [longer] if fits else lines + [word]
    return "\n".join(lines)


def latent_picture(latents, channels=3):
    """(B, C, h, w) latents -> (B, 3, 8h, 8w) in [0, 1]: three channels, ±3 standard deviations."""
    three = latents[:, :channels].float().cpu() / 6 + 0.5
    return three.repeat_interleave(8, -1).repeat_interleave(8, -2).clamp(0, 1)


def psnr(a, b):
    """Peak signal-to-noise ratio in dB of pictures in [0, 1], averaged over the batch."""
    error = (a.float().clamp(0, 1) - b.float().clamp(0, 1)).square().mean((1, 2, 3))
    return (-10 * error.clamp_min(1e-10).log10()).mean().item()
