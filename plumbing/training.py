"""What a training run needs besides its mathematics: processes, log, an orderly end.

Nothing here owns a loop: a stage's train() says what a step is, and calls these by name.
"""

import ctypes
import json
import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

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
            raise UsageError(f"step {step}: the gradient was not finite {self.limit} times in a row; the "
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
