"""What users, machines and damaged files do to a command: one sentence, and nothing is lost."""

import copy
import io
import json
import math
import os
import signal
import sys
import time
import types
from contextlib import nullcontext
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

import sample
import semantic_compressor
import stage_a
import stage_b
import stage_c
from plumbing import checkpoint, cli, pictures, training
from plumbing.cli import UsageError
from pocket import ship
from test_shapes import TINY_A, TINY_B, TINY_C
from tests.common import command

STAGES = {"a": stage_a, "b": stage_b, "c": stage_c}
CPU = torch.device("cpu")


# ---- the command line ----------------------------------------------------------------------------

@pytest.mark.parametrize("stage, flag, value", [
    (stage, flag, value) for flag, values in {
        "lr": ("nan", "-1", "inf"), "seed": ("-1", 10 ** 20), "batch-size": (0, -1),
        "workers": (-1, 10 ** 6), "accumulate": (0,), "save-every": (0,), "log-every": (0,),
        "preview-every": (0,), "steps": (0, -3, 10 ** 30), "grad-clip": ("nan",)}.items()
    for value in values for stage in "abc"] + [
    ("a", "crop", 7), ("a", "crop", 66), ("a", "codebook-size", 0), ("a", "latent-channels", 0),
    ("a", "quantise-drop", 1.5), ("a", "widths", "8,0"), ("b", "sem-channels", 8),
    ("b", "heads", "0,-1,2"),
    ("b", "dropout", -0.1), ("b", "ema", 2), ("b", "image-size", 100), ("c", "image-size", 0),
    ("c", "depth", 0), ("c", "depth", 10 ** 9), ("c", "timestep-width", 3), ("c", "heads", "x")])
def test_flags_out_of_range(stage, flag, value, capsys):
    """A number out of its range is refused by the command line, with the flag and the value."""
    module = STAGES[stage]
    with pytest.raises(SystemExit):
        cli.parse(module.Config, module.PRESETS, "", ["--preset", "pocket", f"--{flag}={value}"])
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"--{flag}: " in said and ("expected" in said or "invalid" in said), said


def test_ranges_hold_what_is_used():
    """Every preset, and every checkpoint in pocket/, is inside the ranges."""
    for module in STAGES.values():
        for name, preset in module.PRESETS.items():
            assert cli.check_config(module.Config, asdict(preset), name) == asdict(preset)
    for part, path in sample.POCKET.items():
        if part != "compressor":
            state = checkpoint.load_checkpoint(path, part.upper())
            cli.check_config(STAGES[part].Config, state["config"], path)


@pytest.mark.parametrize("module, Model, change", [
    (stage_a, stage_a.StageA, dict(widths=(8, 16, 16))), (stage_c, stage_c.StageC, dict(heads=0)),
    (stage_b, stage_b.StageB, dict(blocks=(1,))),
    (stage_b, stage_b.StageB, dict(heads=(0, 5, 2))), (stage_c, stage_c.StageC, dict(heads=5))])
def test_sizes_that_make_no_model(module, Model, change):
    """Sizes that do not go together are refused by the model, in a sentence for the user."""
    config = replace(module.PRESETS["pocket"], **change)
    with pytest.raises(SystemExit, match="found .*(expected|need)"):
        cli.start(Model, config)


@pytest.mark.parametrize("sizes", [("96",), ("96x",), ("axb", "96x96"), ("1x1",), ("9" * 5000,)])
def test_sizes_of_batches(sizes, drawings):
    """--sizes that are no HxW: a sentence."""
    compressor = semantic_compressor.SemanticCompressor(semantic_compressor.PRESETS["pocket"])
    with pytest.raises(UsageError, match="expected HxW,HxW"):
        stage_c.training_data(replace(TINY_C, sizes=sizes, remember=False), drawings, compressor,
                              None)


@pytest.mark.parametrize("encoding", ["cp932", "cp437", "ascii"])
@pytest.mark.parametrize("arguments", [["--help"], ["--lr", "ä…"]])
def test_console_of_another_encoding(encoding, arguments, monkeypatch):
    """What the console cannot show is printed as ?, by --help and by an error."""
    streams = [io.TextIOWrapper(io.BytesIO(), encoding) for _ in range(2)]
    monkeypatch.setattr(sys, "stdout", streams[0])
    monkeypatch.setattr(sys, "stderr", streams[1])
    with pytest.raises(SystemExit):
        cli.parse(stage_b.Config, stage_b.PRESETS, "Würstchen … §3.1 ×", arguments)
    with pytest.raises(SystemExit):
        sample.main(["--help"])
    for stream in streams:
        stream.flush()
    said = [stream.buffer.getvalue().decode(encoding) for stream in streams]
    assert "?" in said[arguments[0] == "--lr"] and "seed of the first picture" in said[0]


def test_pattern_that_the_shell_expanded(tmp_path, monkeypatch, capsys):
    """Several files after --data: the sentence says to quote the pattern."""
    monkeypatch.chdir(tmp_path)
    for name in ("a.tar", "b.tar", "c.tar"):
        (tmp_path / name).touch()
    with pytest.raises(SystemExit):
        cli.parse(stage_a.Config, stage_a.PRESETS, "", ["--data", "a.tar", "b.tar", "c.tar"],
                  data="a source")
    assert "put it in quotes" in capsys.readouterr().err


def fails(error):
    def main():
        raise error
    return main


class InductorError(RuntimeError):
    """As torch raises it."""


@pytest.mark.parametrize("main, said", [
    (fails(KeyboardInterrupt()), "stopped; "), (fails(MemoryError()), "the memory is full"),
    (fails(OSError(28, "No space left on device")), "No space left on device"),
    (fails(BrokenPipeError(32, "Broken pipe")), "Broken pipe"),
    (fails(InductorError("backend='inductor' raised:\nInvalidCxxCompiler: No working C++ compiler "
                         "found")), "--compile needs a C.. compiler"),
    (fails(torch.distributed.DistNetworkError("the client socket has timed out")), "timed out"),
    (fails(RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")), "--workers"),
    (fails(UsageError("Caught UsageError in DataLoader worker process 0.\nTraceback …\n"
                      "plumbing.cli.UsageError: x.tar: has shrunk")), "^x.tar: has shrunk"),
    (lambda: torch.empty(10 ** 14), "the memory is full"),
    (lambda: stage_a.StageA(TINY_A).encode(torch.zeros(1, 3, 7, 8)), "expected multiples of 4"),
    (lambda: stage_b.StageB(TINY_B)(torch.zeros(1, 8, 8, 8), torch.ones(1),
                                    torch.zeros(1, 16, 3, 3), torch.zeros(1, 5, 128)),
     "8x8, 8 and 16 channels, expected"),
    (lambda: stage_c.StageC(TINY_C)(torch.zeros(1, 8, 3, 3), torch.ones(1),
                                    torch.zeros(1, 5, 128)),
     "of 8 channels, expected 16")])
def test_one_sentence(main, said):
    """What the user can put right ends a command with one sentence."""
    with pytest.raises(SystemExit, match=said) as ended:
        cli.start(main)
    assert len(ended.value.code.splitlines()) == 1


@pytest.mark.parametrize("main", [
    fails(RuntimeError("shapes differ")), lambda: int("x"), lambda: {}["x"], lambda: 1 / 0])
def test_own_errors_keep_their_traceback(main):
    """An error of the program, or of a student's edit, is not hidden."""
    with pytest.raises((RuntimeError, ValueError, KeyError, ZeroDivisionError)):
        cli.start(main)


@pytest.mark.slow
def test_compile_without_a_compiler(drawings, tmp_path):
    """--compile on a machine without a C++ compiler: a sentence in place of 92 lines."""
    done = command("stage_c.py", "--preset", "pocket", "--data", drawings, "--out", tmp_path,
                   "--compile", "--steps", 1, check=False, env=dict(
                       os.environ, PATH="/nonexistent", CXX="/nonexistent", OMP_NUM_THREADS="1",
                       TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache")))
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "--compile needs a C++ compiler" in done.stderr.splitlines()[-1]


# ---- machines and processes ----------------------------------------------------------------------

def test_devices(monkeypatch):
    """--device, else the best there is; Windows has no fcntl and opens no folder. Simulated."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert training.setup(0) == CPU
    with pytest.raises(UsageError, match="--device mps: torch finds no such device"):
        training.setup(0, "mps")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert training.setup(0).type == "mps" and training.setup(0, "cpu") == CPU
    monkeypatch.setitem(cli.CHOSEN, "device", None)
    cli.parse(stage_a.Config, stage_a.PRESETS, "", ["--preset", "pocket", "--device", "cpu"])
    assert training.setup(0) == CPU


def test_a_card_without_bf16_computes_in_float32(monkeypatch, capsys):
    """And says so. Simulated."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: None)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: False)
    assert not training.autocast(training.setup(0, "cuda"))._enabled
    assert "no bfloat16" in capsys.readouterr().out
    torch.set_float32_matmul_precision("highest")


def test_windows(monkeypatch, tmp_path):
    """Without fcntl nothing is locked, and no folder is opened. Simulated."""
    monkeypatch.setitem(sys.modules, "fcntl", None)
    assert training.locked(tmp_path / ".lock")
    monkeypatch.setattr(checkpoint, "os", types.SimpleNamespace(
        **{**vars(os), "name": "nt", "open": fails(PermissionError())}))
    checkpoint.save_checkpoint(tmp_path / "checkpoint.pt", {"stage": "A"})
    assert (tmp_path / "checkpoint.pt").is_file()


@pytest.mark.parametrize("told", [
    {"SLURM_NTASKS": "2", "SLURM_PROCID": "0"}, {"WORLD_SIZE": "2"},
    {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}, {"WORLD_SIZE": "x"}])
def test_processes_that_do_not_know_of_each_other(told, monkeypatch):
    """SLURM's variables without torchrun's, or a left-over WORLD_SIZE: a sentence, no wait."""
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match="is not set: start one torchrun"):
        training.setup(0)


def run_in(out, **more):
    return training.Run("C", replace(TINY_C, **more), out, CPU)


def saved(out, step=1, **more):
    """A run with one model and its optimizer, saved after `step` steps; -> its parts."""
    run = run_in(out, steps=9, save_every=1, log_every=1, **more)
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    parts = dict(net=model, optimizer=torch.optim.AdamW(model.parameters()))
    run.restore(**parts)
    for _ in run.steps():
        model(torch.randn(4, 2)).square().sum().backward()
        parts["optimizer"].step()
        run.finite(torch.tensor(1.0))
        run.log(loss=torch.zeros(()))
        if run.due("save"):
            run.save()
        if run.step == step:
            break
    return parts


def test_one_run_at_a_time(tmp_path):
    """A second process is refused while the first one lives; kill -9 frees the folder at once, even
    if a worker of the killed one lives on.
    """
    ready, tell = os.pipe()
    child = os.fork()
    if child == 0:
        lives = run_in(tmp_path)
        worker = os.fork()
        if worker:
            os.write(tell, str(worker).encode())
        time.sleep(60)
        os._exit(lives.step)
    worker = int(os.read(ready, 20))
    try:
        with pytest.raises(UsageError, match="another process trains there"):
            run_in(tmp_path)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.kill(worker, 0)                                   # it lives
        run_in(tmp_path)
    finally:
        os.kill(worker, signal.SIGKILL)


def test_another_number_of_processes(tmp_path):
    """It changes the batch: refused, with the --accumulate that keeps it."""
    saved(tmp_path)
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert state["processes"] == 1
    checkpoint.save_checkpoint(tmp_path / "checkpoint.pt", dict(state, processes=3))
    batch = TINY_C.batch_size
    with pytest.raises(UsageError, match=f"x processes is {batch}, was {3 * batch}; --accumulate 3 "
                                         "keeps the batch"):
        run_in(tmp_path, steps=9, save_every=1, log_every=1)
    run_in(tmp_path, steps=9, accumulate=3)


def test_no_signal_is_lost(tmp_path):
    """One that arrives while the processes agree stops the run after the next step."""
    run = run_in(tmp_path)
    run.finite(torch.tensor(1.0))
    assert not run.stopping
    run.ask()                                                # as during that all_reduce
    run.finite(torch.tensor(1.0))
    run.finite(torch.tensor(1.0))
    assert run.stopping


# ---- files ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["checkpoint.pt", "checkpoint.pt.tmp", "log.jsonl"])
@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo, lambda path: os.symlink("nowhere", path)])
def test_what_is_in_the_way(name, make, tmp_path):
    """A folder, a fifo or a dangling link where the run will write: refused before the work."""
    make(tmp_path / name)
    with pytest.raises(UsageError, match=f"{name}: is in the way"):
        run_in(tmp_path)


@pytest.mark.parametrize("out", ["file", "file/below", "/proc/run"])
def test_out_that_cannot_be(out, tmp_path):
    """--out that is a file, or below one, or where nothing can be made: one sentence."""
    (tmp_path / "file").write_text("x")
    with pytest.raises(SystemExit, match=r"file|/proc/run"):
        cli.start(run_in, tmp_path / out)


def test_full_disk(tmp_path):
    """A save that does not fit says so; the checkpoint before it is the same to the bit."""
    saved(tmp_path)
    path = tmp_path / "checkpoint.pt"
    before = path.read_bytes()
    os.symlink("/dev/full", tmp_path / "checkpoint.pt.tmp")
    with pytest.raises(UsageError, match="No space left on device.*goes on"):
        checkpoint.save_checkpoint(path, {"w": torch.rand(10 ** 6)})
    assert path.read_bytes() == before
    os.remove(tmp_path / "checkpoint.pt.tmp")
    saved(tmp_path, step=3)
    assert torch.load(path, weights_only=True)["step"] == 3


def test_flipped_bits(tmp_path):
    """One flipped bit anywhere in the tensors of a .pt, or in our .safetensors, is noticed."""
    model = stage_c.StageC(TINY_C)
    path, rng = tmp_path / "c.pt", np.random.default_rng(0)
    checkpoint.save_checkpoint(path, dict(stage="C", config=asdict(TINY_C), ema=model.state_dict()))
    stage_c.load(path)
    ship.write(tmp_path / "c.safetensors", dict(stage="C", config=asdict(TINY_C)),
               ship.rounded(model.state_dict()), {})
    with safe_open(tmp_path / "c.safetensors", "pt") as file:
        assert len(file.metadata()["sha256"]) == 64
    stage_c.load(tmp_path / "c.safetensors")
    for path in (path, tmp_path / "c.safetensors"):
        content = path.read_bytes()
        for where in rng.integers(len(content) // 4, len(content) * 3 // 4, 10):
            damaged = bytearray(content)
            damaged[where] ^= 1 << int(rng.integers(8))
            other = path.with_stem(f"flipped{where}")
            other.write_bytes(damaged)
            try:
                for name, value in stage_c.load(other).state_dict().items():
                    assert torch.equal(value.half(), model.state_dict()[name].half()), (
                        f"{path.suffix}: bit of byte {where} flipped, and {name} loads changed")
            except UsageError as error:
                assert str(other) in str(error)


ODD = (None, -1, 0, 1.5, math.nan, 10 ** 30, "x", "", [], {}, (1, 2), [[0]], {"a": {}}, True,
       torch.zeros(3), torch.tensor(math.nan), {"w": torch.zeros(2)}, {1: 2}, b"x", [("a", "b")])


@pytest.mark.parametrize("every", [4, pytest.param(1, marks=pytest.mark.slow)])
def test_checkpoints_with_odd_contents(every, tmp_path):
    """A field, a setting or a tensor of another type, size or range: loaded or one sentence."""
    config = replace(TINY_C, width=8, depth=1, heads=1)
    model = stage_c.StageC(config)
    good = dict(stage="C", config=asdict(config), ema=model.state_dict(), step=3, compressor="0",
                text_encoder={"name": "pocket", "checksum": "0"})
    states = [{**good, name: odd} for name in good for odd in ODD] + [
        dict(good, config={**good["config"], name: odd})
        for name in ("depth", "width", "heads", "p2", "remember", "sizes", "lr") for odd in ODD] + [
        dict(good, ema={**good["ema"], "projection.bias": odd}) for odd in ODD] + [
        dict(good, text_encoder={"name": odd}) for odd in ODD] + [
        dict(good, probe={"output": odd}) for odd in ODD] + [
        {one: good[one] for one in good if one != name} for name in good] + [
        {**good, 7: 8}, [], "x", None]
    for number, state in enumerate(states[::every]):
        torch.save(state, tmp_path / f"{number}.pt")
        try:
            assert all(one.isfinite().all() for one in stage_c.load(
                tmp_path / f"{number}.pt").parameters()), "weights that are not finite were loaded"
        except UsageError as error:
            assert str(error).startswith(f"{tmp_path}/{number}.pt: "), error
        os.remove(tmp_path / f"{number}.pt")


@pytest.mark.parametrize("about", [
    "[]", "x", "{}", '{"stage": "C"}', '{"stage": "C", "config": []}', "[" * 100_000,
    '{"stage": "C", "config": {"depth": 1000000000}}', '{"stage": ["C"], "config": {}}'])
def test_odd_metadata_of_safetensors(about, tmp_path):
    save_file({"w": torch.zeros(1)}, tmp_path / "c.safetensors", {"checkpoint": about})
    with pytest.raises(UsageError, match="c.safetensors: "):
        stage_c.load(tmp_path / "c.safetensors")


@pytest.mark.parametrize("every", [5, pytest.param(1, marks=pytest.mark.slow)])
def test_resuming_from_odd_contents(every, tmp_path):
    """A training goes on, or says in one sentence why it does not."""
    saved(tmp_path)
    path = tmp_path / "checkpoint.pt"
    good = torch.load(path, weights_only=True)
    states = [{**good, name: odd} for name in good for odd in ODD] + [
        dict(good, config={**good["config"], name: odd}) for odd in ODD
        for name in ("batch_size", "accumulate", "steps")] + [
        {one: good[one] for one in good if one != name} for name in good]
    moments = good["optimizer"]["state"]
    states += [dict(good, optimizer=dict(good["optimizer"], state={
        **moments, 0: {**moments[0], "exp_avg": odd}})) for odd in (torch.zeros(7), "x", None)]
    for state in states[::every] + states[-3:]:
        torch.save(state, path)
        try:
            saved(tmp_path, step=9)
        except UsageError as error:
            assert "checkpoint.pt: " in str(error)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon is there from 2.9")
def test_resuming_with_another_muon_state(tmp_path):
    """A momentum of another size is one sentence, in Muon's part and in AdamW's."""
    layer = torch.nn.Linear(4, 3)
    made = {"muon": training.Muon([dict(params=[*layer.parameters()])], lr=1e-3)}
    layer(torch.ones(2, 4)).sum().backward()
    made["muon"].step()
    assert set(made["muon"].state) == set(layer.parameters())
    for odd in (None, torch.zeros(7)):
        run = run_in(tmp_path)
        state = copy.deepcopy(made["muon"].state_dict())
        if odd is not None:
            state[1]["state"][0]["momentum_buffer"] = odd
        run.new, run.state = False, dict(muon=state, errors=[], skipped=0)
        with nullcontext() if odd is None else pytest.raises(UsageError, match="not the state of"):
            run.restore(**made)
        run.lock.close()


@pytest.mark.parametrize("line", [
    b"\xff\xfe", b"[]", b"{}", b'{"step": "1"}', b'{"step": null}', b"[" * 100_000, b"x" * 99,
    b'{"step": 1e400}', b"\x00", b"{"])
def test_damaged_log(line, tmp_path, capsys):
    """Damaged lines of log.jsonl are left out and said; one cut off at the end is no damage."""
    saved(tmp_path)
    log = tmp_path / "log.jsonl"
    first = log.read_bytes()
    log.write_bytes(line + b"\n" + first + b'{"step": 9, "cut')
    saved(tmp_path, step=2)
    assert "1 damaged line(s) left out" in capsys.readouterr().out
    assert log.read_bytes().startswith(first)
    assert [json.loads(one)["step"] for one in log.read_text().splitlines()] == [1, 2]


# ---- steps that are not finite -------------------------------------------------------------------

def test_skipped_step_leaves_nothing(tmp_path):
    """BatchNorm's statistics are those before a step that is skipped, and nothing is saved then,
    neither at the end nor on a stop.
    """
    run, norm = run_in(tmp_path, steps=2, save_every=1, preview_every=1), torch.nn.BatchNorm1d(2)
    run.restore(norm=norm)
    for step in run.steps():
        norm(torch.randn(4, 2) + (math.nan if step else 0))
        assert run.finite(torch.tensor(math.nan if step else 1.0)) == (step == 0)
        run.stopping = run.stopping or step == 1
        run.log(loss=torch.zeros(()))
        assert run.due("save") == run.due("preview") == (step == 0)
    assert norm.running_mean.isfinite().all() and norm.num_batches_tracked == 1


def test_bad_batch_does_not_poison_stage_a(drawings, tmp_path, monkeypatch):
    """A batch that gives NaN at a revival leaves codebook and BatchNorm finite; the run goes on."""
    plain, calls = stage_a.loss, iter(range(99))
    monkeypatch.setattr(stage_a, "loss", lambda model, images, *more: plain(
        model, images * (math.nan if next(calls) == 1 else 1), *more))
    config = replace(TINY_A, steps=4, revive_every=2, adversarial_start=0)
    stage_a.train(config, drawings, tmp_path)
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert state["skipped"] == 1
    for part in ("model", "discriminator"):
        for name, value in state[part].items():
            assert value.isfinite().all(), f"{part}.{name} stayed not finite after one bad batch"


# ---- sample.py -----------------------------------------------------------------------------------

@pytest.mark.parametrize("out", ["x.foo", "x", "none/x.png", "dead.png"])
def test_out_is_checked_before_sampling(out, tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "dead.png")
    monkeypatch.setattr(sample, "find", fails(AssertionError("it began to work")))
    with pytest.raises(UsageError, match="--out"):
        sample.main(["a red star", "--out", str(tmp_path / out)])


@pytest.mark.parametrize("suffix", ["png", "jpg", "JPEG", "webp"])
def test_settings_are_kept(suffix, tmp_path):
    """Prompt and settings are in the file's metadata, whatever its form."""
    path, about = tmp_path / f"x.{suffix}", {"prompts": ["ein Käse, 日本"], "seed": 7}
    sample.save(Image.new("RGB", (64, 64)), path, about)
    image = Image.open(path)
    text = image.text["parameters"] if suffix == "png" else image.getexif()[0x010E]
    assert json.loads(text) == about


@pytest.mark.parametrize("name, about", [
    ("x.jpg", {"prompts": ["x" * 100_000]}), ("gone/x.png", {}), ("wide.webp", {})])
def test_picture_is_never_lost(name, about, tmp_path):
    """Where it cannot be written the picture is in the folder for temporary files."""
    picture = Image.new("RGB", (20_000 if name == "wide.webp" else 64, 64), "red")
    with pytest.raises(UsageError, match="the picture is in ") as error:
        sample.save(picture, tmp_path / name, about)
    kept = str(error.value).rpartition(" ")[2]
    assert Image.open(kept).convert("RGB").tobytes() == picture.tobytes()
    os.remove(kept)


@pytest.mark.parametrize("error", [MemoryError(), KeyboardInterrupt()])
@pytest.mark.parametrize("out", ["x.png", "x/"])
def test_pictures_of_earlier_batches_are_kept(out, error, tmp_path, monkeypatch, capsys):
    """Where a batch fills the memory, or Ctrl-C ends it, the pictures before it are written."""
    def draw(self, prompts, seeds, **how):
        if "b" in prompts:
            raise error
        return [Image.new("RGB", (8, 8), "red") for _ in prompts]
    monkeypatch.setattr(sample.Chain, "draw", draw)
    with pytest.raises(type(error)):
        sample.main(["a", "a", "b", "--batch-size", "2", "--out", f"{tmp_path}/{out}"])
    found = sorted(tmp_path.rglob("*.png"))
    assert [one.name for one in found] == (["x.png"] if out == "x.png" else
                                           ["0000.png", "0001.png"])
    assert capsys.readouterr().out.strip() == f"{tmp_path}/{out}"


def test_prompt_that_is_no_text():
    with pytest.raises(UsageError, match="the prompt: expected UTF-8"):
        sample.main(["a \udcff star"])


def test_large_photo(tmp_path, capsys):
    """--reconstruct of a photo of 12 megapixels works at the size of training, and says so."""
    Image.new("RGB", (4032, 3024), "red").save(tmp_path / "photo.jpg")
    sample.main(["--reconstruct", str(tmp_path / "photo.jpg"), "--steps-b", "1",
                 "--out", str(tmp_path / "x.png")])
    assert "4032x3024 is resized to 128x128" in capsys.readouterr().out
    assert Image.open(tmp_path / "x.png").height < 200


# ---- captions under pictures ---------------------------------------------------------------------

def test_transliteration():
    """Captions in the letters that Pillow's own font has: no boxes, what is left is ?."""
    assert pictures.plain("Käse, Öl, Straße, é – it’s “x”") == "Kaese, Oel, Strasse, e - it's \"x\""
    assert pictures.plain("Ka\u0308se 日本 ﬁ …") == "Kaese ?? fi ..."
    assert pictures.plain("plain ASCII ~") == "plain ASCII ~"
    pictures.grid([torch.zeros(3, 64, 64)], 1, ["日本語 " + "ä" * 20])
