"""What a training step needs of a GPU, without one: memory by part, operations, what fits a card.

    python -m experiments.fit --preset paper                  A, B and C; a minute on two CPU cores
    python -m experiments.fit --preset paper-2 --stages c batch_size=48 checkpoint_activations=True
    python -m experiments.fit --check                         the error, against real CPU memory
    python -m experiments.fit --preset paper --measure        the same steps on the GPU that is here

The real train() runs on fake CUDA tensors (fakegpu.py) with random networks and blank images: one
step of one micro-batch, a preview and a save. The optimizer's state is there from the start, and so
are gradients where a step has several micro-batches. The largest micro-batch lies on a line through
the peaks of two. `name=value` changes a field of Config. A card of 40 GB is taken to have 39.4 GiB,
of which .6 go to CUDA itself and a tenth to fragments. --measure trains with the same networks on
noise: a step counts four micro-batches at most, two steps warm up and three are timed.
"""

import argparse
import ast
import contextlib
import copy
import functools
import inspect
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch
from PIL import Image

import data
import semantic_compressor
import stage_a
import stage_b
import stage_c
from experiments import fakegpu
from plumbing import checkpoint, cli, pictures, text, training

STAGES = {"a": stage_a, "b": stage_b, "c": stage_c}
GIB = 2 ** 30
USABLE = {40: 39.4, 80: 79.1}                    # GiB that torch reports of an A100's memory
PEAK = {"bfloat16": 312e12, "float32": 156e12, "float64": 19.5e12}   # A100, nominal; 32 as TF32
BANDWIDTH = 1.555e12                             # bytes/s, A100 of 40 GB, nominal
LOADER = 243 * 512 ** 2                          # pixels a core-second: docs/speed.md, Loading
CHECKS = {                                       # settings whose step a CPU can do, too
    "b": dict(image_size=256, batch_size=12, widths=(64, 128, 256), blocks=(2, 2, 4),
              heads=(0, 4, 8), cond_width=128),
    "c": dict(image_size=512, batch_size=64, width=384, depth=6, heads=6)}


# ---- the step ------------------------------------------------------------------------------------

def tower(name="pocket", weights=None, device="cpu", width=None):
    """plumbing.text.text_encoder, with random weights."""
    encoder = text.TextEncoder(name, text.Tower(**text.TEXT_ENCODERS[name]), text.END_OF_TEXT)
    encoder.__dict__["checksum"] = "0"
    return encoder.to(device)


def frozen(Model, config):
    """A load() of that Model: (path, device) -> random weights."""
    return lambda path, device="cpu": Model(config).to(device).eval().requires_grad_(False)


@functools.cache
def noise(side):
    """A picture of (H, W) whose bytes are random: on zeros a GPU computes faster."""
    return torch.randint(256, (3, *side), dtype=torch.uint8)


@contextlib.contextmanager
def stand_ins(preset):
    """Networks without files, blank images, and no reading of numbers that fake tensors lack."""
    size = "pocket" if preset == "pocket" else "paper"
    pick = {name: stage.PRESETS[size] for name, stage in STAGES.items()}
    load_a = frozen(stage_a.StageA, pick["a"])
    nets = {key: replace(one, imagenet=False) for key, one in semantic_compressor.PRESETS.items()}
    load_compressor = frozen(semantic_compressor.SemanticCompressor, nets[size])

    def decoder(*paths, device="cpu", **options):
        return stage_b.Decoder(load_a(0, device), frozen(stage_b.StageB, pick["b"])(0, device),
                               (0.0, 1.0), tower(pick["b"].text_encoder, device=device), None)

    def one_step(sampler):                        # it holds no more than any of its steps
        def called(*arguments, **options):
            given = inspect.signature(sampler).bind(*arguments, **options).arguments
            return sampler(**{**given, "steps": 1})
        return called

    def blank(self, epoch, index, crop):
        return {"image": noise((crop, crop) if isinstance(crop, int) else tuple(crop))}
    patch = mock.patch.object
    with contextlib.ExitStack() as stack:
        for one in (
                patch(training.Run, "resume", lambda self, *a: {}),
                patch(training, "by_level", lambda record: [0.0] * 4),
                patch(checkpoint, "checksum", lambda *a: "0"),
                patch(checkpoint, "probe", lambda model: {}),
                patch(checkpoint, "save_checkpoint", lambda *a: None),
                patch(pictures, "grid", lambda *a, **k: mock.MagicMock()),
                patch(data.CaptionedImages, "load", blank),
                patch(stage_a, "load", load_a), patch(stage_b, "load_decoder", decoder),
                patch(semantic_compressor, "load", load_compressor),
                mock.patch.dict(semantic_compressor.PRESETS, nets),
                patch(stage_a, "VGG16Perceptual",
                      functools.partial(stage_a.VGG16Perceptual, weights=None)),
                patch(stage_b, "ddpm_sample", one_step(stage_b.ddpm_sample)),
                patch(stage_c, "ddpm_sample", one_step(stage_c.ddpm_sample)),
                patch(stage_b, "text_encoder", tower), patch(stage_c, "text_encoder", tower)):
            stack.enter_context(one)
        yield


def step(name, preset, config, meter, previews=True):
    """Run one step of a stage's train() -> bytes by part and at the peaks, operations by dtype.

    meter: has now, peak and flops, as a FakeGPU. previews: False leaves out previews and saves. A
    meter with `turns` is a Card: so many steps are timed, after two others.
    """
    stage, found, turns = STAGES[name], {}, getattr(meter, "turns", 0)
    short = dict(steps=2, warmup=0, cooldown=0, workers=0, accumulate=1, log_every=1,
                 compile=False, remember=False, adversarial_start=0,
                 sizes=getattr(config, "sizes", ())[:1])
    several, all_steps = config.accumulate > 1 and not turns, training.Run.steps
    if turns:
        short |= dict(steps=3 + turns, accumulate=min(config.accumulate, 4), log_every=10 ** 6,
                      workers=2, compile=getattr(config, "compile", False))
    config = replace(config, **{key: value for key, value in short.items()
                                if hasattr(config, key)})

    def restore(run, **parts):
        """In place of Run.restore: optimizers get their state; what is resident is noted."""
        run.parts, run.step, trained = parts, 1, 0
        for one in parts.values():
            if hasattr(one, "param_groups"):
                weights = [w for group in one.param_groups for w in group["params"]]
                for w in weights:
                    w.grad = torch.zeros_like(w)
                one.step()
                if several:                               # those of the micro-batches before
                    one.zero_grad = lambda **_: None
                else:
                    one.zero_grad()
                trained += sum(w.nbytes for w in weights)
        ema = sum(w.nbytes for key, net in parts.items() if "ema" in key for w in net.parameters())
        found.update(parameters=trained, gradients=trained, optimizer=2 * trained, ema=ema,
                     frozen=meter.now - (3 + several) * trained - ema)
        meter.peak, meter.flops, meter.waits, meter.traffic = meter.now, *map(Counter, [()] * 3)

    def timed(run):
        for number in all_steps(run):
            if number == run.config.steps - turns:
                meter.peak = meter.now                    # of the timed steps, not of compiling
            begin = time.perf_counter()
            yield number
            meter.wait()
            found.setdefault("seconds", []).append(time.perf_counter() - begin)

    def aside(function, instead=None):
        """Previews and saves have a peak of their own; left out they give `instead`."""
        def called(*arguments, **options):
            found["step"] = max(found.get("step", 0), meter.peak)
            counts = [copy.copy(one) for one in (meter.flops, meter.waits, meter.traffic)]
            meter.peak = meter.now
            result = function(*arguments, **options) if previews else instead
            found["aside"] = max(found.get("aside", 0), meter.peak)
            meter.peak, meter.flops, meter.waits, meter.traffic = meter.now, *counts
            return result
        return called

    with tempfile.TemporaryDirectory() as folder, stand_ins(preset):
        Image.new("RGB", (8, 8)).save(f"{folder}/0.png")
        Path(f"{folder}/0.txt").write_text("a caption of some words")
        given = {key: folder for key, one in inspect.signature(stage.train).parameters.items()
                 if key not in ("config", "clip", "init_from")}
        asides = [(stage, "preview", None), (stage_a, "latent_scale", (0.0, 1.0)),
                  (semantic_compressor, "measure", semantic_compressor.Config())]
        with contextlib.ExitStack() as stack:
            stack.enter_context(mock.patch.object(training.Run, "restore", restore))
            if turns:
                stack.enter_context(mock.patch.object(training.Run, "steps", timed))
            for module, function, instead in asides:
                stack.enter_context(mock.patch.object(
                    module, function, aside(getattr(module, function), instead)))
            stage.train(config, **given)
    found["step"] = max(found.get("step", 0), meter.peak)
    if turns:
        return dict(found, reserved=torch.cuda.max_memory_reserved(),
                    images=config.batch_size * config.accumulate,
                    seconds=statistics.median(found["seconds"][-turns:]))
    return dict(found, waits=[[*where, times] for where, times in meter.waits.items()],
                traffic={op: n / config.batch_size for op, n in meter.traffic.items()},
                flops={str(kind)[6:]: n / config.batch_size for kind, n in meter.flops.items()},
                activations=found["step"] - sum(found[key] for key in (
                    "parameters", "gradients", "optimizer", "ema", "frozen")))


# ---- what fits -----------------------------------------------------------------------------------

def largest(runs, given, room):
    """The largest micro-batch whose step takes at most `room` bytes, from the peaks of two."""
    one, half = (runs[size]["step"] for size in sorted(runs, reverse=True))
    slope = max(1, (one - half) / (given - min(runs))) if len(runs) > 1 else one / given
    return max(0, int(given + (room - one) // slope))


def pair(effective, most):
    """The largest micro-batch up to `most` that divides the effective batch, and how many."""
    size = max((n for n in range(1, most + 1) if effective % n == 0), default=0)
    return f"--batch-size {size} --accumulate {effective // size}" if size else "nothing fits"


def report(name, preset, config, cards, share):
    """All that is printed of a stage: of steps of two sizes, with checkpointing and without."""
    given, effective = config.batch_size, config.batch_size * config.accumulate
    kept = getattr(config, "checkpoint_activations", None)
    jobs = [dict(stage=name, preset=preset, previews=(kind, size) == (kept, given),
                 config=dict(vars(config), batch_size=size, accumulate=effective // size,
                             **({} if kept is None else {"checkpoint_activations": kind})))
            for kind in ([None] if kept is None else [False, True])
            for size in sorted({given, max(1, given // 2)}, reverse=True)]
    return jobs, functools.partial(table, name, preset, config, cards, share)


def table(name, preset, config, cards, share, jobs, results):
    given, effective = config.batch_size, config.batch_size * config.accumulate
    runs = {}                                             # by checkpointing, then by micro-batch
    for job, found in zip(jobs, (one.result() for one in results)):
        kind = job["config"].get("checkpoint_activations")
        runs.setdefault(kind, {})[job["config"]["batch_size"]] = found
    words = {None: "", False: ", activations kept", True: ", checkpointed"}
    mine = getattr(config, "checkpoint_activations", None)
    found, side = runs[mine][given], getattr(config, "image_size", None) or config.resize
    gib = {key: f"{n / GIB:.1f}" for key, n in found.items() if isinstance(n, (int, float))}
    each, rest = sum(found["flops"].values()), found["flops"].get("float32", 0)
    seconds = sum(n / PEAK[kind] for kind, n in found["flops"].items()) / share
    lines = [
        f"Stage {name.upper()} {preset}: micro-batch {given} x {config.accumulate} = {effective} "
        f"images of {side} px{words[mine]}",
        f"  GiB: parameters {gib['parameters']}, gradients {gib['gradients']}, AdamW "
        f"{gib['optimizer']}, EMA {gib['ema']}, frozen networks and kept images {gib['frozen']}, "
        f"activations {gib['activations']}",
        f"  GiB: peak of a step {gib['step']}, of previews and saves {gib['aside']}",
        f"  {each / 1e12:.3g} TFLOP an image ({rest / each:.1%} in float32), "
        f"{each * effective / 1e12:,.0f} a step; at {share:.0%} of an A100's nominal peak "
        f"{1 / seconds:,.0f} images/s, {config.steps * effective * seconds / 86400:,.0f} days, "
        f"{side ** 2 / seconds / LOADER:.1f} loader cores"]
    products = seconds * share                            # at the nominal peak
    beside = {op: n / BANDWIDTH / products for op, n in found["traffic"].items()}
    lines.append("  not compiled, at the nominal bandwidth beside matrix products at the nominal "
                 f"peak: {sum(beside.values()):.0%}; " + ", ".join(
                     f"{op} {part:.0%}" for op, part in sorted(
                         beside.items(), key=lambda one: -one[1]) if part > 0.02))
    for kind, ours in runs.items():
        for card in cards:
            most = largest(ours, given, (USABLE.get(card, card * 0.985) * 0.9 - 0.6) * GIB)
            lines.append(f"  {card:g} GB{words[kind]}: micro-batch {most} at most; "
                         f"{pair(effective, most)}")
    return "\n".join(lines)


# ---- the error -----------------------------------------------------------------------------------

class Resident:
    """The memory of this process, by the kernel's count: now, and the peak since it was set."""

    flops, waits, traffic, start = Counter(), Counter(), Counter(), 0

    def read(self, field):
        line = next(one for one in open("/proc/self/status") if one.startswith(field))
        return int(line.split()[1]) * 1024 - self.start

    now = property(lambda self: self.read("VmRSS"))
    peak = property(lambda self: self.read("VmHWM"),
                    lambda self, _: Path("/proc/self/clear_refs").write_text("5"))


def check(name, half, real):
    """-> bytes at the peak of a step on the CPU: counted, or really taken (real)."""
    config = replace(STAGES[name].PRESETS["pocket"], accumulate=2, dropout=0.1, **CHECKS[name])
    autocast = functools.partial(torch.autocast, "cpu", torch.bfloat16, enabled=half)
    with mock.patch.object(training, "autocast", lambda device: autocast()), \
            mock.patch.object(training, "setup", lambda seed: torch.device("cpu")):
        if not real:
            with fakegpu.pretend("cpu") as meter:
                return step(name, "pocket", config, meter)["step"]
        meter = Resident()
        meter.start = meter.now
        return step(name, "pocket", config, meter)["step"]


# ---- really, on a GPU ----------------------------------------------------------------------------

class Card:
    """The memory of this process on the GPU, as torch's allocator counts it, and its clock."""

    flops, waits, traffic, turns = Counter(), Counter(), Counter(), 3
    wait = staticmethod(torch.cuda.synchronize)
    now = property(lambda self: torch.cuda.memory_allocated())
    peak = property(lambda self: torch.cuda.max_memory_allocated(),
                    lambda self, _: torch.cuda.reset_peak_memory_stats())


def measured(name, preset, config):
    """The line of a stage: peak and speed of its steps on this GPU."""
    if not torch.cuda.is_available():
        raise cli.UsageError("--measure: expected a GPU, torch finds none")
    found = run(dict(stage=name, preset=preset, config=vars(config), really=True))
    return (f"Stage {name.upper()} {preset}, micro-batch {config.batch_size}"
            f"{', compiled' * getattr(config, 'compile', False)}, {torch.cuda.get_device_name()}: "
            f"peak of a step {found['step'] / GIB:.1f} GiB, reserved "
            f"{found['reserved'] / GIB:.1f} GiB; {found['images'] / found['seconds']:.1f} images/s")


# ---- command line --------------------------------------------------------------------------------

def run(job):
    """A job in a process of its own, judged by what it printed: fake CUDA may end it badly."""
    # malloc gives each large tensor back at once, so that the kernel counts what lives
    done = subprocess.run(
        [sys.executable, "-m", "experiments.fit", "--job", json.dumps(job)], cwd=cli.ROOT,
        env=os.environ if "really" in job else dict(
            os.environ, CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1",
            MALLOC_MMAP_THRESHOLD_="65536", MALLOC_TRIM_THRESHOLD_="0"),
        capture_output=True, text=True)
    if "RESULT " not in done.stdout:
        raise cli.UsageError(f"the step could not be run: {done.stderr.strip()[-300:]}")
    return json.loads(done.stdout.partition("RESULT ")[2])


def work(job):
    if "half" in job:
        return check(**job)
    stage = STAGES[job["stage"]]
    config = stage.Config(**{key: tuple(value) if isinstance(value, list) else value
                             for key, value in job["config"].items()})
    if "really" in job:
        return step(job["stage"], job["preset"], config, Card(), previews=False)
    with fakegpu.pretend() as gpu:
        return step(job["stage"], job["preset"], config, gpu, job["previews"])


def changed(config, settings):
    """config with `name=value` for each of settings."""
    try:
        given = dict(one.split("=") for one in settings)
        return replace(config, **{
            key: value if isinstance(getattr(config, key), str) else ast.literal_eval(value)
            for key, value in given.items()})
    except (AttributeError, SyntaxError, ValueError):
        raise cli.UsageError(f"{' '.join(settings)}: expected name=value, of fields of "
                             f"{type(config).__module__}.Config") from None


def main():
    parser = cli.Parser(__doc__)
    parser.add_argument("settings", nargs="*", help="name=value, fields of Config")
    parser.add_argument("--preset", default="paper", help="of the stages (paper)")
    parser.add_argument("--stages", default="abc", help="which (abc)")
    parser.add_argument("--cards", default="40,80", help="GB of memory (40,80)")
    parser.add_argument("--share", type=float, default=0.3, help="of the nominal peak (0.3)")
    parser.add_argument("--check", action="store_true", help="the error of the counts, on this CPU")
    parser.add_argument("--measure", action="store_true", help="peak and images/s on this GPU")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        print("RESULT", json.dumps(work(json.loads(args.job))), flush=True)
        return
    if args.check:
        for name, half in itertools.product(CHECKS, (False, True)):
            counted, real = (run(dict(name=name, half=half, real=real)) / GIB
                             for real in (False, True))
            print(f"Stage {name.upper()} {'bf16' if half else 'fp32'}: counted {counted:.2f} GiB, "
                  f"really {real:.2f}: {counted / real - 1:+.1%}", flush=True)
        return
    try:
        cards = [float(card) for card in args.cards.split(",")]
    except ValueError:
        raise cli.UsageError(f"--cards {args.cards}: expected GB, such as 40,80") from None
    if set(args.stages) - set(STAGES) or args.share <= 0:
        raise cli.UsageError(f"--stages {args.stages} --share {args.share}: expected letters of "
                             "abc and a share above 0")
    names = [name for name in args.stages if args.preset in STAGES[name].PRESETS]
    if not names:
        raise cli.UsageError(f"--preset {args.preset}: no stage of {args.stages} has it")
    if args.measure:
        for name in names:
            print(measured(name, args.preset, changed(
                STAGES[name].PRESETS[args.preset], args.settings)), flush=True)
        return
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        tables = []
        for name in names:
            jobs, show = report(name, args.preset, changed(
                STAGES[name].PRESETS[args.preset], args.settings), cards, args.share)
            tables.append(functools.partial(show, jobs, [pool.submit(run, job) for job in jobs]))
        try:
            for show in tables:
                print(show(), flush=True)
        finally:
            pool.shutdown(cancel_futures=True)


if __name__ == "__main__":
    cli.start(main)
