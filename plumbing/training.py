"""What a training run needs besides its mathematics: processes, checkpoint, log, an orderly end.

Nothing here owns a loop: a stage's train() says what a step is, and calls these by name.
"""

import copy
import ctypes
import dataclasses
import inspect
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from plumbing import checkpoint, cli


# ---- processes: one, or several that torchrun started --------------------------------------------

def setup(seed, device=None):
    """-> the device of this process: `device`, else what --device names, else the best there is.
    Joins the other processes if `torchrun` started several. Raises UsageError."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": 1}
    device = device or cli.CHOSEN["device"] or max(there, key=there.get)  # of equals the first
    index, told = int(os.environ.get("LOCAL_RANK", 0)), os.environ
    if not there[device]:
        raise cli.UsageError(f"--device {device}: torch finds no such device here")
    if device == "cuda":
        torch.cuda.set_device(index)
        torch.set_float32_matmul_precision("high")        # TF32 for what autocast leaves in fp32
        if not torch.cuda.is_bf16_supported(including_emulation=False) and rank() == 0:
            print("this GPU has no bfloat16: all is computed in float32", flush=True)
    elif sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt"):
        # glibc shall keep what is freed: else each large tensor costs fresh pages, and a step of
        # Stage A on two cores 0.67 s in place of 0.45 s
        for parameter, value in ((-4, 0), (-1, 2 ** 31 - 1)):             # mmap_max, trim_threshold
            ctypes.CDLL(None).mallopt(parameter, value)
    several = told.get("WORLD_SIZE", told.get("SLURM_NTASKS", "1"))
    missing = {"WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"} - set(told)
    if several != "1" and missing:
        raise cli.UsageError(f"WORLD_SIZE or SLURM_NTASKS is {several}, and {min(missing)} is not "
                             "set: start one torchrun on each machine; or unset both to be alone")
    if several != "1" and not dist.is_initialized():
        if "TORCHELASTIC_RUN_ID" not in told:
            print(f"waiting for {several} processes; to be alone, unset WORLD_SIZE", flush=True)
        dist.init_process_group("nccl" if device == "cuda" and dist.is_nccl_available() else "gloo")
    torch.manual_seed(seed)
    return torch.device(device, index) if device == "cuda" else torch.device(device)


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
    several = world() > 1 and torch.cuda.is_available()
    return torch.nn.SyncBatchNorm.convert_sync_batchnorm(model) if several else model


def autocast(device):
    """Matrix products in bf16 on a GPU that has it; all in float32 elsewhere."""
    fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.autocast(device.type, torch.bfloat16, enabled=fast)


def average_gradients(parameters):
    """Average the gradients over all processes. DistributedDataParallel would hook into the forward
    of one module, but Stage B trains two modules and Stage A calls three methods.
    """
    for parameter in parameters:
        if world() > 1 and parameter.requires_grad:
            if parameter.grad is None:                    # every process must join every call
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


def locked(path):
    """-> `path`, open: until it is closed, or this process ends, no other has it; None: one has."""
    file = open(path, "a")                                # workers do not inherit the lock
    try:
        import fcntl
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return None
    except ImportError:                                   # Windows: two of the same are not noticed
        pass
    return file


def cooldown(config):
    """The steps at the end over which the learning rate decays: at most the second half of a run,
    so that one with fewer --steps than its preset still trains at the full rate first.
    """
    return min(config.cooldown, config.steps // 2)


def learning_rate(step, config):
    """config.lr with a linear warm-up and, over the last `cooldown` steps, a linear decay."""
    return config.lr * min(1.0, (step + 1) / max(config.warmup, 1),
                           (config.steps - step) / max(cooldown(config), 1))


class Muon:
    """Muon (Jordan et al., 2024) for matrices and AdamW for all else, as one optimizer."""

    def __init__(self, groups, lr, **adamw):
        if not hasattr(torch.optim, "Muon"):
            raise cli.UsageError(f"--muon: expected torch 2.9 or newer, found {torch.__version__}; "
                                 "--no-muon trains with AdamW, which needs more steps")
        matrices, rest = ([group | {"params": [p for p in group["params"] if (p.dim() == 2) == two]}
                           for group in groups] for two in (True, False))
        self.parts = (torch.optim.AdamW(rest, lr, **adamw),
                      torch.optim.Muon([group for group in matrices if group["params"]], lr, 0.01,
                                       adjust_lr_fn="match_rms_adamw"))   # AdamW's lr and decay
        self.zero_grad = lambda **how: [part.zero_grad(**how) for part in self.parts]
        self.step = lambda: [part.step() for part in self.parts]
        self.state_dict = lambda: dict(enumerate(part.state_dict() for part in self.parts))
        self.load_state_dict = lambda state: [
            part.load_state_dict(state[i]) for i, part in enumerate(self.parts)]

    @property
    def state(self):                                          # {parameter: {name: tensor}}
        return {one: kept for part in self.parts for one, kept in part.state.items()}

    @property
    def param_groups(self):
        return [group for part in self.parts for group in part.param_groups]


def optimizer(config, groups, **more):
    """AdamW, or Muon for matrices where the config says so. groups: [{"params": […], …}]."""
    return (Muon if config.muon else torch.optim.AdamW)(groups, lr=config.lr, fused=True, **more)


@torch.no_grad()
def ema_update(ema, model, step, limit):
    """Move the average towards the model: decay min(limit, (1 + n) / (10 + n)) at step n. Buffers
    (BatchNorm statistics) are copied: they are averages already.
    """
    decay = min(limit, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)
    for mine, its in zip(ema.buffers(), model.buffers()):
        mine.copy_(its)


# ---- the books of a run --------------------------------------------------------------------------

EDGES = (0.25, 0.5, 0.75, 1.0)                            # upper ends of the quarters of t
# What may change when a run goes on: its length, and what is about the machine and the log. Of
# batch_size and accumulate the product is compared. The scale of latents is measured in the run.
MAY_CHANGE = {"batch_size", "accumulate", "steps", "cooldown", "workers", "compile",
              "checkpoint_activations", "log_every", "preview_every", "save_every", "latent_mean",
              "latent_std", "guidance"}
BATCH = "batch-size x accumulate x processes"


def by_level(record):
    """Mean error of each quarter of t, from [(t, error), …], each (B,); NaN where there is none."""
    t, error = (torch.cat(column).float().cpu() for column in zip(*record))
    quarter = torch.bucketize(t, torch.tensor(EDGES))
    return [error[quarter == index].mean().item() for index in range(len(EDGES))]


class Run:
    """The books of one training run: its step, its checkpoint, its log, and when to stop.

    Run(…) finds the checkpoint that `out` may hold, restore(…) fills models and optimizers from it,
    steps() are those still to do. In a step note(…) keeps the errors of each micro-batch, finite(…)
    says whether to take it, log(…) counts it; then due("preview") and due("save") say what is to be
    done. They are true on the first process alone, so nothing under them may wait for another.

    must_match: what must be the same when the run goes on (number of samples, checksums of frozen
    networks). init_from: the file a new run takes its weights from. Raises UsageError.
    """

    def __init__(self, stage, config, out, device, init_from=None, **must_match):
        self.stage, self.config, self.out, self.device = stage, config, Path(out), device
        self.must_match, self.parts, self.lock = must_match, {}, None
        self.out.mkdir(parents=True, exist_ok=True)
        self.state = self.resume(init_from)
        self.new, self.step = not self.state, self.state.get("step", 0)
        self.before = (self.state.get("before", []) if self.state or not init_from else
                       checkpoint.parts(init_from, stage))    # runs that its weights come from
        self.in_a_row, self.skipped = 0, 0                    # not finite: steps in a row, in all
        self.errors, self.seconds = [], []                    # since the last line; of each step
        self.buffers = []                                     # with what they were as it began
        self.asked = self.stopping = False                    # this process; all of them
        torch.manual_seed(config.seed)                        # initial weights: the same everywhere

    def resume(self, init_from):
        """-> the checkpoint of the run that goes on, {} if `out` holds none. All settings but those
        of MAY_CHANGE, and all of must_match, must be as they were: else two runs had one name.
        """
        path = self.out / "checkpoint.pt"
        for name in ("checkpoint.pt", "checkpoint.pt.tmp", "log.jsonl", ".lock"):
            if os.path.lexists(self.out / name) and not os.path.isfile(self.out / name):
                raise cli.UsageError(f"{self.out / name}: is in the way, as it is no file")
        found = torch.tensor(float(path.is_file()), device=self.device)
        self.lock = locked(self.out / ".lock") if rank() == 0 else None
        if rank() == 0 and not self.lock:
            found -= 2 * world()
        if world() > 1:
            dist.all_reduce(found)
        if found < 0:
            raise cli.UsageError(f"{self.out}: another process trains there; wait for its end")
        if found.item() not in (0, world()):
            raise cli.UsageError(f"{path}: some processes find it and others do not; --out has to "
                                 "be on a disk that all machines share")
        if init_from:
            self.say(f"{path} is there, so that run goes on; --init-from has no effect" if found
                     else f"a new run at step 0 with the weights of {init_from}, and with nothing "
                     "else of it: not its optimizer, schedule or place in the data")
        if not found:
            return {}
        state = checkpoint.load_checkpoint(path, self.stage)
        if not {"optimizer", "errors", "skipped", "step", "config"} <= set(state):
            raise cli.UsageError(f"{path}: holds weights without the state of a training, so it "
                                 "cannot be continued; give it as --init-from with another --out "
                                 "to begin with its weights")
        now = dataclasses.asdict(self.config)
        then = now | cli.check_config(type(self.config), state["config"], path)
        for one, n in (now, world()), (then, state.get("processes", world())):
            one[BATCH] = one["batch_size"] * one["accumulate"] * n
        pairs = [(f"--{name.replace('_', '-')}", value, then.get(name))
                 for name, value in now.items() if name not in MAY_CHANGE]
        pairs += [(name, value, state.get(name)) for name, value in self.must_match.items()]
        differ = [f"{name} is {new}, was {old}" for name, new, old in pairs if new != old]
        if differ:
            keep, rest = divmod(then[BATCH], self.config.batch_size * world())
            differ[-1] += f"; --accumulate {keep} keeps the batch" * (not rest)
            anew = (f"`--init-from {path} --out {self.out}-2` to begin a new run with its weights, "
                    if self.stage != "A" else "")
            raise cli.UsageError(f"{path}: this run was started with another configuration "
                                 f"({'; '.join(differ)}); give the old values to go on with it, "
                                 f"{anew}or another --out to start anew")
        self.say(f"going on from {path} at step {state['step']}")
        return state

    @staticmethod
    def begin(model, trained, path):
        """Give `model` the weights of `trained`, which is from `path`. Raises UsageError."""
        try:
            model.load_state_dict(trained.state_dict())
        except RuntimeError as error:                         # a line for each tensor
            raise cli.UsageError(f"--init-from {path}: has another network than these settings "
                                 f"make ({str(error).splitlines()[1].strip()})") from None

    def restore(self, **parts):
        """parts: all that must survive a stop; each has state_dict() and load_state_dict()."""
        self.parts = parts
        if not self.new:
            try:
                for name, part in parts.items():              # copied: the file is only mapped
                    part.load_state_dict(copy.deepcopy(self.state.pop(name)))
                self.errors = [(t.to(self.device), error.to(self.device))
                               for t, error in copy.deepcopy(self.state["errors"])]
                by_level(self.errors or [(torch.ones(1), torch.ones(1))])
                for one, state in (pair for part in parts.values()
                                   for pair in getattr(part, "state", {}).items()):
                    [torch.broadcast_to(value, one.shape) for value in state.values()]
            except checkpoint.UNREADABLE as error:
                raise cli.UsageError(f"{self.out}/checkpoint.pt: not the state of this training "
                                     f"({str(error).strip()[:300]})") from None
            self.skipped = self.state["skipped"]
        self.state = None                                     # its memory is needed

    def steps(self):
        """The steps still to do. Ctrl-C and SIGTERM end them after a whole step. The random numbers
        of a step follow from (seed, process, step), so a run goes on as if it had not stopped.
        """
        config, left = self.config, self.config.steps - self.step
        self.batch = config.batch_size * config.accumulate * world()
        self.say(f"{left:,} steps to go; effective batch {config.batch_size} x "
                 f"{config.accumulate} accumulated x {world()} process(es) = {self.batch:,}, "
                 f"{left * self.batch:,} samples")
        path = self.out / "log.jsonl"
        if rank() == 0 and path.exists():                     # steps after the checkpoint: cut
            kept, damaged = [], 0
            for line in path.read_bytes().splitlines(keepends=True):
                try:
                    found = cli.read_json(path, {"step": int}, line)
                    kept += [line.strip() + b"\n"] * (found["step"] <= self.step)
                except cli.UsageError:
                    damaged += line.endswith(b"\n")           # else: cut off by a kill
            path.write_bytes(b"".join(kept))
            if damaged:
                self.say(f"{path}: {damaged} damaged line(s) left out")
        before = {one: signal.signal(one, self.ask) for one in (signal.SIGINT, signal.SIGTERM)}
        self.bar = tqdm(total=config.steps, initial=self.step, disable=rank() != 0, unit="step",
                        smoothing=0.05, mininterval=1.0 if sys.stderr.isatty() else 15.0)
        try:
            for step in range(self.step, config.steps):
                torch.manual_seed(int(np.random.SeedSequence(
                    (config.seed, rank(), step)).generate_state(1, np.uint64)[0]))
                self.buffers = [(one, one.clone()) for part in self.parts.values()
                                for one in getattr(part, "buffers", list)()]
                self.begun = time.perf_counter()
                yield step
                if self.stopping:
                    break
        finally:
            self.bar.close()
            if self.lock:
                self.lock.close()
            for one, handler in before.items():
                signal.signal(one, handler)
        lost = f" but for {self.in_a_row} last steps, not finite" * bool(self.in_a_row)
        self.say(f"stopped on request, saved in {self.out}{lost}; the same command goes on from "
                 "there"
                 if self.step < config.steps else
                 f"finished; checkpoint, log and previews are in {self.out}{lost}")

    def ask(self, *_):
        """The first signal: stop after this step. A second Ctrl-C: at once."""
        self.asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def note(self, t, error):
        """Keep the errors (B,) of a micro-batch at noise levels t (B,) for the next log line."""
        self.errors.append((t.detach(), error.detach()))

    def finite(self, grad):
        """Whether to take the step. Ten gradients in a row that are not finite end the run. The
        processes agree on that and on stopping; here alone a step waits for the device.

        grad: the norm of the averaged gradients (scalar).
        """
        flags = torch.stack([1 - torch.isfinite(grad).float(),
                             torch.full_like(grad, float(self.asked))])
        if world() > 1:
            dist.all_reduce(flags, dist.ReduceOp.MAX)
        bad, self.stopping = (bool(flag) for flag in flags.tolist())
        self.in_a_row = self.in_a_row + 1 if bad else 0
        self.skipped += bad
        for buffer, before in self.buffers * bad:             # BatchNorm's statistics, used codes
            buffer.copy_(before)
        if self.in_a_row == 10:
            raise cli.UsageError(f"step {self.step}: the gradient was not finite 10 times in a "
                                 "row, and nothing was saved since the first of them. Try a lower "
                                 "--lr, a longer --warmup or a smaller --grad-clip")
        return not bad

    def log(self, **numbers):
        """Count a step. Every log_every steps, and at the end: one line here and in log.jsonl."""
        self.step += 1
        self.preview = self.out / f"preview_{self.step:07d}.png"           # for its picture
        self.seconds.append(time.perf_counter() - self.begun)
        self.bar.update()
        left, every = self.config.steps - self.step, self.config.log_every
        if len(self.seconds) == 5:                            # the first two compile, open files, …
            each = np.mean(self.seconds[2:])
            unit = "GPU" if self.device.type == "cuda" else "CPU process"
            self.say(f"a step takes {each:.2f} s (measured now), so what is left takes "
                     f"{span(each * left)}: {each * left * world() / 3600:,.2g} {unit}-hours")
        if self.step % every and left:
            return
        each = np.mean(self.seconds[-((self.step - 1) % every + 1):])      # since the last line
        tensors = {name: value for name, value in numbers.items() if torch.is_tensor(value)}
        values = torch.stack([value.detach().float() for value in tensors.values()])
        if world() > 1:                                       # each process has those of its batch
            dist.all_reduce(values)
            values /= world()
        numbers.update(zip(tensors, values.tolist()))
        levels = by_level(self.errors) if self.errors else []              # of this process
        self.errors = []
        if rank() > 0:
            return
        numbers["skipped"], rate = self.skipped, self.batch / each
        bins = " | ".join(f"{edge:g} {level:.3f}" for edge, level in zip(EDGES, levels))
        words = [f"step {self.step}", f"loss {numbers['loss']:.4f}", bins and f"[t<{bins}]",
                 *(f"{name} {number:.3g}" for name, number in numbers.items() if name != "loss"),
                 f"{rate:.0f} img/s" + f" ({rate / world():.0f} per process)" * (world() > 1),
                 f"{span(each * left)} left"]
        self.bar.set_postfix_str(f"{words[1]}, {rate:.0f} img/s", refresh=False)
        self.say("  ".join(filter(None, words)))
        numbers |= {"mse_by_t": levels} if levels else {}
        with open(self.out / "log.jsonl", "a") as file:       # NaN is no JSON: an empty bin is null
            file.write(json.dumps({"step": self.step, **numbers, "images_per_s": rate}
                                  ).replace("NaN", "null") + "\n")

    def due(self, what):
        """Whether to "preview" or "save", on the first process: every preview_every or save_every
        steps and at the end, but while steps are skipped. A stop on request saves, too.
        """
        last = self.step == self.config.steps or (what == "save" and self.stopping)
        regular = self.step % getattr(self.config, f"{what}_every") == 0
        return rank() == 0 and (last or regular) and not self.in_a_row

    def save(self, **more):
        """Write the checkpoint. more: what else it shall hold, or in place of what it would. The
        probe of the model, or of its average, costs what checkpoint.probe says.
        """
        model = self.parts.get("ema", self.parts.get("model"))
        checkpoint.save_checkpoint(self.out / "checkpoint.pt", {
            "stage": self.stage, "config": dataclasses.asdict(self.config), "step": self.step,
            "errors": self.errors, "skipped": self.skipped, "processes": world(),
            "probe": checkpoint.probe(model) if model else {},
            "before": self.before, "command": cli.command(),
            **self.must_match, **{name: part.state_dict() for name, part in self.parts.items()},
            **more})

    def say(self, text):
        """Print, on the first process; above the progress bar if there is one."""
        if rank() == 0:
            tqdm.write(text)
            sys.stdout.flush()


def span(seconds):
    """A time in hours, below one in minutes."""
    return f"{seconds / 3600:,.1f} h" if seconds >= 3600 else f"{seconds / 60:.0f} min"


# ---- the command of a stage ----------------------------------------------------------------------

PATHS = {
    "source": ("data", "shards or a folder of captioned images (data.py)"),
    "out": ("out", "folder of this run (default: runs/PRESET/stage_?)"),
    "path_a": ("stage_a", "checkpoint, or released (default: stage_a/checkpoint.pt beside --out)"),
    "path_b": ("stage_b", "checkpoint, or released (default: stage_b/checkpoint.pt beside --out)"),
    "path_compressor": ("compressor", "checkpoint, or released (default: the one in --stage-b)"),
    "clip": ("clip", "CLIP's text encoder, file or folder, or released (default: open_clip's hub)"),
    "init_from": ("init_from", "checkpoint, or released, that a new run begins with (E.2, E.3)")}


def command(stage, train, Config, presets, doc, data):
    """Run the train() of stage "a", "b" or "c" with what the command line gives; its parameters say
    which PATHS it takes. data: a function of the parsed options -> the source to train on.
    """
    names = [name for name in inspect.signature(train).parameters if name in PATHS]
    config, args = cli.parse(Config, presets, doc, **dict(PATHS[name] for name in names))
    size, dash, phase = args.preset.partition("-")            # a phase stands beside its size's
    out = args.out or f"runs/{size}/stage_{stage}{dash}{phase}"

    def start():
        given = {name: getattr(args, PATHS[name][0]) for name in names}
        for name in {"path_a", "path_b"} & set(names):
            if not (given[name] or given.get("path_compressor")):
                given[name] = checkpoint.checkpoint_of_earlier_stage(name[-1], out, args.preset)
        try:
            train(config, **dict(given, source=data(args), out=out))
        except torch.cuda.OutOfMemoryError:
            gib = torch.cuda.get_device_properties(0).total_memory / 2 ** 30
            print("the GPU's memory is full; what fits is counted now, a minute", file=sys.stderr)
            sys.exit(subprocess.run([
                sys.executable, "-m", "experiments.fit", "--preset", args.preset, "--stages", stage,
                "--cards", f"{gib / 0.985:.1f}", *(f"{k}={v}" for k, v in vars(config).items())],
                cwd=cli.ROOT, stdout=subprocess.PIPE, text=True).stdout or "try a smaller one")
    cli.start(start)
