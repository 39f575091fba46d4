"""A run that was killed or stopped, and gone on with, equals one that was not: to the bit."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch

import stage_a
import stage_b
import stage_c
from test_shapes import TINY_A, TINY_B, TINY_C
from tests.common import HERE, flags, same_checkpoint

STAGES = {"a": (stage_a, TINY_A), "b": (stage_b, TINY_B), "c": (stage_c, TINY_C)}
# saves, previews and log lines at different steps, so that each is once the last before the stop
BOOKS = dict(steps=24, log_every=3, save_every=4, preview_every=6)
QUICK = {("a", signal.SIGKILL, 1), ("b", signal.SIGKILL, 1), ("c", signal.SIGKILL, 1),
         ("c", signal.SIGTERM, 2)}


def start(stage, world, drawings, chain, out):
    """Start the stage's command in `world` processes that train together."""
    module, config = STAGES[stage]
    weights = {"a": [], "b": ["a"], "c": ["a", "b"]}[stage]
    arguments = [f"stage_{stage}.py", *flags(replace(config, **BOOKS), module.PRESETS["pocket"]),
                 "--data", str(drawings), "--out", str(out)]
    for one in weights:
        arguments += [f"--stage-{one}", str(chain / f"stage_{one}/checkpoint.pt")]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = dict(os.environ, OMP_NUM_THREADS="1", MASTER_ADDR="127.0.0.1",
                       MASTER_PORT=str(port), WORLD_SIZE=str(world))
    return [subprocess.Popen([sys.executable, *arguments], cwd=HERE, text=True,
                             env=dict(environment, RANK=str(rank), LOCAL_RANK=str(rank)),
                             stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
            for rank in range(world)]


def finish(processes):
    """Wait for all; -> (exit codes, what the first one printed)."""
    said = [process.communicate(timeout=200)[0] for process in processes]
    return [process.returncode for process in processes], said[0]


def lines(out):
    return (out / "log.jsonl").read_text().splitlines() if (out / "log.jsonl").exists() else []


@pytest.fixture(scope="session")
def whole(tmp_path_factory, drawings, chain):
    """whole(stage, world): the folder of a run that nothing stopped; each is made once."""
    made = {}

    def make(stage, world):
        if (stage, world) not in made:
            out = tmp_path_factory.mktemp(f"whole_{stage}{world}")
            codes, said = finish(start(stage, world, drawings, chain, out))
            assert not any(codes), said
            made[stage, world] = out
        return made[stage, world]
    return make


@pytest.mark.parametrize("stage, how, world", [
    pytest.param(stage, how, world, id=f"{stage}-{how.name}-{world}",
                 marks=() if (stage, how, world) in QUICK else pytest.mark.slow)
    for stage in "abc" for how in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
    for world in (1, 2)])
def test_stopped_and_gone_on(stage, how, world, drawings, chain, whole, tmp_path):
    """Final tensors, log.jsonl but for its rates, and all previews are those of a whole run.

    SIGTERM reaches one process alone, and all of them stop; the others get Ctrl-C all together.
    """
    processes = start(stage, world, drawings, chain, tmp_path)
    while all(one.poll() is None for one in processes) and len(lines(tmp_path)) < 2:
        time.sleep(0.005)
    for process in processes[-1:] if how == signal.SIGTERM else processes:
        process.send_signal(how)
    codes, said = finish(processes)
    if how == signal.SIGKILL:
        assert codes == [-how] * world, said
    else:
        assert codes == [0] * world and "the same command goes on from there" in said, said
    step = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"]
    assert step < BOOKS["steps"], "stopped too late to test anything"
    codes, said = finish(start(stage, world, drawings, chain, tmp_path))
    assert not any(codes) and f"going on from {tmp_path}/checkpoint.pt at step {step}" in said, said
    expected = whole(stage, world)
    same_checkpoint(tmp_path / "checkpoint.pt", expected / "checkpoint.pt")
    assert [dict(json.loads(line), images_per_s=0) for line in lines(tmp_path)] == [
        dict(json.loads(line), images_per_s=0) for line in lines(expected)]
    pictures = [{path.name: path.read_bytes() for path in out.glob("*.png")}
                for out in (tmp_path, expected)]
    assert pictures[0] == pictures[1] and len(pictures[0]) == 4
