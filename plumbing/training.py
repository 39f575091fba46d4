"""What a training run needs besides its mathematics: processes, checkpoint, log, an orderly end.

Nothing here owns a loop: a stage's train() says what a step is, and calls these by name.
"""

import ctypes
import dataclasses
import inspect
import json
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from plumbing import checkpoint, cli
from plumbing.cli import UsageError


# ---- processes: one, or several that torchrun started --------------------------------------------

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
    """-> the device of this process. Joins the other processes if `torchrun` started several."""
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")        # TF32 for what autocast leaves in fp32
    else:
        device = torch.device("cpu")
        keep_freed_memory()
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    torch.manual_seed(seed)
    return device


def rank():
    """The number of this process, 0 for the first: it alone saves, draws previews and prints."""
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    """The number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def synchronised(model):
    """On several GPUs BatchNorm uses the batch of all processes. torch has no such layer for CPUs:
    there each process uses its own batch, and the first one's statistics are saved.
    """
    if world() > 1 and torch.cuda.is_available():
        return torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return model


def average_gradients(parameters):
    """Average the gradients over all processes, once per optimizer step.

    departs from the habit of wrapping in DistributedDataParallel: that hooks into one module's
    forward, and Stage B trains two modules, Stage A calls three methods.
    """
    if world() == 1:
        return
    for parameter in parameters:
        if parameter.requires_grad:
            if parameter.grad is None:                        # every process must join every call
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad)
            parameter.grad /= world()


def agree(flags, tensor):
    """After it every process has the union of all `flags` (bool) and the first one's `tensor`."""
    if world() > 1:
        union = flags.float()
        dist.all_reduce(union, dist.ReduceOp.MAX)
        flags.copy_(union > 0)
        dist.broadcast(tensor, 0)


# ---- inside the loop -----------------------------------------------------------------------------

def cooldown(config):
    """The steps at the end over which the learning rate decays: at most the second half of a run.

    So a run that is given fewer --steps than its preset still trains at the full rate first.
    """
    return min(config.cooldown, config.steps // 2)


def learning_rate(step, config):
    """config.lr with a linear warm-up and, over the last steps, see `cooldown`, a linear decay."""
    return config.lr * min(1.0, (step + 1) / max(config.warmup, 1),
                           (config.steps - step) / max(cooldown(config), 1))


@torch.no_grad()
def ema_update(ema, model, step, limit):
    """Move the average towards the model: decay min(limit, (1 + n) / (10 + n)) at step n.

    Averages parameters. Buffers (BatchNorm statistics) are copied: they are averages already.
    """
    decay = min(limit, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)
    for mine, its in zip(ema.buffers(), model.buffers()):
        mine.copy_(its)


# ---- the books of a run --------------------------------------------------------------------------

EDGES = (0.25, 0.5, 0.75, 1.0)                            # upper ends of the quarters of t


def by_level(record):
    """Mean error of each quarter of t, from [(t, error), …], each (B,); NaN where there is none."""
    t, error = (torch.cat(column).float().cpu() for column in zip(*record))
    quarter = torch.bucketize(t, torch.tensor(EDGES))
    return [error[quarter == index].mean().item() for index in range(len(EDGES))]


class Run:
    """The books of one training run: its step, its checkpoint, its log, and when to stop.

        run = Run("C", config, out, device, compressor=…)   finds the checkpoint that `out` may hold
        run.restore(model=model, optimizer=optimizer, …)    fills these from it
        for step in run.steps():                            0, 1, … or on from there
            …
            run.note(t, error)                              each micro-batch, for the error by level
            if run.finite(grad):                            take the step, or leave it out
                …
            run.log(loss=value, grad=grad, lr=lr)           counts the step
            if run.due("preview"):                          on the first process alone, so nothing
                preview(…, run.preview)                     below may wait for another process
            if run.due("save"):
                run.save()

    must_match: what must be the same when the run goes on (number of samples, checksums of frozen
    networks). init_from: the file a new run takes its weights from. Raises UsageError.
    """

    def __init__(self, stage, config, out, device, init_from=None, **must_match):
        self.stage, self.config, self.out, self.device = stage, config, Path(out), device
        self.must_match, self.parts = must_match, {}
        self.out.mkdir(parents=True, exist_ok=True)
        self.state = checkpoint.resume(self.out / "checkpoint.pt", stage, config, device,
                                       must_match, init_from)
        self.new = self.state is None
        self.step = 0 if self.new else self.state["step"]
        self.errors, self.in_a_row, self.skipped = [], 0, 0   # not finite: steps in a row, in all
        self.asked = self.stopping = False                    # this process; all of them
        torch.manual_seed(config.seed)                        # initial weights: the same everywhere

    def restore(self, **parts):
        """parts: all that must survive a stop; each has state_dict() and load_state_dict()."""
        self.parts = parts
        if not self.new:
            for name, part in parts.items():
                part.load_state_dict(self.state.pop(name))
            self.errors = [tuple(one.to(self.device) for one in pair)
                           for pair in self.state["errors"]]
            self.in_a_row, self.skipped = self.state["in_a_row"], self.state["skipped"]
        self.state = None                                     # its memory is needed

    def steps(self):
        """The steps still to do. Ends early, after a whole step, on Ctrl-C or SIGTERM.

        The random numbers of a step follow from (seed, process, step), so a run that was stopped
        goes on as if it had not been.
        """
        config = self.config
        self.batch = config.batch_size * config.accumulate * world()
        self.say(f"{config.steps - self.step:,} steps to go; effective batch {config.batch_size} x "
                 f"{config.accumulate} accumulated x {world()} process(es) = {self.batch:,}, "
                 f"{(config.steps - self.step) * self.batch:,} samples")
        if rank() == 0:
            self.forget_later_lines()
        before = {one: signal.signal(one, self.ask) for one in (signal.SIGINT, signal.SIGTERM)}
        self.bar = tqdm(total=config.steps, initial=self.step, disable=rank() != 0, unit="step",
                        smoothing=0.05, mininterval=1.0 if sys.stderr.isatty() else 15.0)
        self.seconds, self.counted = 0.0, 0                   # of the steps since the last line
        self.durations = []                                   # of the first steps
        try:
            for step in range(self.step, config.steps):
                torch.manual_seed(int(np.random.SeedSequence(
                    (config.seed, rank(), step)).generate_state(1, np.uint64)[0]))
                self.begun = time.perf_counter()
                yield step
                if self.stopping:
                    break
        finally:
            self.bar.close()
            for one, handler in before.items():
                signal.signal(one, handler)
        self.say(f"stopped on request, saved in {self.out}; the same command goes on from there"
                 if self.step < config.steps else
                 f"finished; checkpoint, log and previews are in {self.out}")

    def forget_later_lines(self):
        """Cut what the log holds of steps after the checkpoint: they are done again."""
        path = self.out / "log.jsonl"
        if path.exists():
            path.write_text("".join(
                line for line in path.read_text().splitlines(keepends=True)
                if line.endswith("\n") and json.loads(line)["step"] <= self.step))

    def ask(self, *_):
        """The first signal: stop after this step. A second Ctrl-C: at once."""
        self.asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def note(self, t, error):
        """Keep the errors (B,) of a micro-batch at noise levels t (B,) for the next log line."""
        self.errors.append((t.detach(), error.detach()))

    def finite(self, grad):
        """Whether to take the step. Ten gradients in a row that are not finite end the run.

        grad: the norm of the averaged gradients (scalar). Here the processes agree on stopping,
        too, and here alone a step waits for the device.
        """
        flags = torch.stack([1 - torch.isfinite(grad).float(),
                             torch.full_like(grad, float(self.asked))])
        if world() > 1:
            dist.all_reduce(flags, dist.ReduceOp.MAX)
        bad, self.stopping = (bool(flag) for flag in flags.tolist())
        self.in_a_row = self.in_a_row + 1 if bad else 0
        self.skipped += bad
        if self.in_a_row == 10:
            raise UsageError(
                f"step {self.step}: the gradient was not finite 10 times in a row; nothing was "
                f"saved since the first of them, so {self.out}/checkpoint.pt is sound if it is "
                "there. Try a lower --lr, a longer --warmup or a smaller --grad-clip")
        return not bad

    def log(self, **numbers):
        """Count a step. Every log_every steps, and at the end: one line here and in log.jsonl."""
        took = time.perf_counter() - self.begun
        self.step += 1
        self.seconds, self.counted = self.seconds + took, self.counted + 1
        self.bar.update()
        if len(self.durations) < 5:                           # the first two compile, open files, …
            self.durations.append(took)
            if len(self.durations) == 5:
                self.forecast(sum(self.durations[2:]) / 3)
        if self.step % self.config.log_every and self.step < self.config.steps:
            return
        measured = [name for name, number in numbers.items() if isinstance(number, torch.Tensor)]
        values = torch.stack([numbers[name].detach().float() for name in measured])
        if world() > 1:                                       # each process has those of its batch
            dist.all_reduce(values)
            values /= world()
        numbers.update(zip(measured, values.tolist()))
        each = self.seconds / self.counted
        if self.errors:
            numbers["mse_by_t"] = by_level(self.errors)       # of this process
        self.errors, self.seconds, self.counted = [], 0.0, 0
        if rank() == 0:
            self.write(dict(numbers, skipped=self.skipped, images_per_s=self.batch / each),
                       each * (self.config.steps - self.step) / 3600)

    def forecast(self, seconds):
        """Say how long the whole run takes, at so many seconds a step."""
        hours = seconds * (self.config.steps - self.step) / 3600
        unit = "GPU" if self.device.type == "cuda" else "CPU process"
        self.say(f"a step takes {seconds:.2f} s (measured now), so what is left takes "
                 f"{span(hours)}: {hours * world():,.2g} {unit}-hours")

    def write(self, numbers, hours):
        """One line on the screen, one in log.jsonl. hours: what is left."""
        bins = "".join(f" | {edge:g} {level:.3f}"[0 if edge > EDGES[0] else 3:] for edge, level in
                       zip(EDGES, numbers.get("mse_by_t", ())))
        rest = "".join(f"  {name} {number:.3g}" for name, number in numbers.items()
                       if name not in ("loss", "images_per_s", "mse_by_t"))
        rate = numbers["images_per_s"]
        each = f" ({rate / world():.0f} per process)" if world() > 1 else ""
        self.bar.set_postfix_str(f"loss {numbers['loss']:.4f}, {rate:.0f} img/s", refresh=False)
        tqdm.write(f"step {self.step}  loss {numbers['loss']:.4f}{f'  [t<{bins}]' * bool(bins)}"
                   f"{rest}  {rate:.0f} img/s{each}  {span(hours)} left")
        sys.stdout.flush()
        with open(self.out / "log.jsonl", "a") as file:       # NaN is no JSON: an empty bin is null
            file.write(json.dumps({"step": self.step, **numbers}).replace("NaN", "null") + "\n")

    def due(self, what):
        """Whether to "preview" or to "save", on the first process: every preview_every or
        save_every steps and at the end. A stop on request saves, too; what it draws would be a
        preview too many. Nothing is due while gradients are not finite.
        """
        last = self.step == self.config.steps or (what == "save" and self.stopping)
        regular = self.step % getattr(self.config, f"{what}_every") == 0 and not self.in_a_row
        return rank() == 0 and (last or regular)

    @property
    def preview(self):
        """The file for this step's picture."""
        return self.out / f"preview_{self.step:07d}.png"

    def save(self, **more):
        """Write the checkpoint. more: what else it shall hold, or in place of what it would.

        It keeps what the model (its average, where there is one) computed of a fixed input, too.
        """
        model = self.parts.get("ema", self.parts.get("model"))
        checkpoint.save_checkpoint(self.out / "checkpoint.pt", {
            "stage": self.stage, "config": dataclasses.asdict(self.config), "step": self.step,
            "errors": self.errors, "in_a_row": self.in_a_row, "skipped": self.skipped,
            "probe": checkpoint.probe(model) if model else {},
            **self.must_match, **{name: part.state_dict() for name, part in self.parts.items()},
            **more})

    def say(self, text):
        """Print, on the first process; above the progress bar if there is one."""
        if rank() == 0:
            tqdm.write(text)
            sys.stdout.flush()


def span(hours):
    """Hours as text; below one, in minutes."""
    return f"{hours:,.1f} h" if hours >= 1 else f"{60 * hours:.0f} min"


# ---- the command of a stage ----------------------------------------------------------------------

PATHS = {
    "source": ("data", "shards or a folder of captioned images (data.py)"),
    "out": ("out", "folder of this run (default: runs/PRESET/stage_?)"),
    "path_a": ("stage_a", "Stage A checkpoint (default: stage_a/checkpoint.pt beside --out)"),
    "path_b": ("stage_b", "Stage B checkpoint (default: stage_b/checkpoint.pt beside --out)"),
    "clip": ("clip", "local weights of the CLIP text encoder, file or folder (default: the hub)"),
    "init_from": ("init_from", "a new run begins with the weights of this checkpoint (E.2, E.3)")}


def command(stage, train, Config, presets, doc, data):
    """Run train() with what the command line gives; its parameters say which paths it takes.

    stage: "a", "b" or "c". data: a function of the parsed options -> the source to train on.
    """
    names = [name for name in inspect.signature(train).parameters if name in PATHS]
    config, args = cli.parse(Config, presets, doc, **{
        PATHS[name][0]: (None, PATHS[name][1]) for name in names})
    size, _, phase = args.preset.partition("-")           # a phase finds the stages before it in
    out = args.out or f"runs/{size}/stage_{stage}" + (f"-{phase}" if phase else "")   # its size's
    given = {name: getattr(args, PATHS[name][0]) for name in names}

    def start():
        given.update(source=data(args), out=out)
        for name in {"path_a", "path_b"} & set(names):
            given[name] = given[name] or checkpoint.earlier(name[-1], out, args.preset)
        train(config, **given)
    cli.start(start)
