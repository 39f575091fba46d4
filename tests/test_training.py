"""Training: the step's parts, stopping and going on, refusals, the command line of a stage."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn as nn
from torch.testing import assert_close

import semantic_compressor
import stage_a
import stage_b
import stage_c
from plumbing import checkpoint, cli, training
from plumbing.cli import UsageError
from test_shapes import TINY_A, TINY_B, TINY_C
from tests.common import HERE, command, flags, same, same_checkpoint


def test_ema():
    """The average moves by 1 - min(limit, (1 + n) / (10 + n)); buffers are copied."""
    model, ema = nn.BatchNorm1d(1), nn.BatchNorm1d(1)
    with torch.no_grad():
        model.weight.fill_(2.0), model.running_mean.fill_(5.0), ema.weight.fill_(1.0)
    training.ema_update(ema, model, 0, 0.999)
    assert_close(ema.weight, torch.tensor([1.9]))             # decay 0.1
    assert ema.running_mean.item() == 5, "the average's BatchNorm statistics are not the model's"
    training.ema_update(ema, model, 10 ** 6, 0.999)
    assert_close(ema.weight, torch.tensor([1.9001]))


def test_learning_rate():
    """Linear warm-up, then constant, then (with a cooldown) linear decay to the last step."""
    config = replace(TINY_C, lr=1.0, warmup=10, steps=100, cooldown=0)
    rates = [training.learning_rate(step, config) for step in (0, 9, 50, 99)]
    assert rates == [0.1, 1, 1, 1], f"of a warm-up of 10 steps, steps 0, 9, 50, 99 have {rates}"
    config = replace(config, cooldown=50)
    assert [training.learning_rate(step, config) for step in (50, 75, 99)] == [1, 0.5, 0.02]


def test_steps_that_are_not_finite(tmp_path):
    """Such a step is not taken, and counted; nothing is due; ten in a row end with a sentence."""
    run = training.Run("C", replace(TINY_C, steps=100), tmp_path, torch.device("cpu"))
    run.step = TINY_C.save_every
    assert not run.finite(torch.tensor(float("nan"))) and not run.due("save")
    assert run.finite(torch.tensor(1.0)) and run.due("save")
    for _ in range(9):
        assert not run.finite(torch.tensor(float("inf")))
    assert run.skipped == 10
    with pytest.raises(UsageError, match="10 times in a row"):
        run.finite(torch.tensor(float("nan")))


def test_loss_by_noise_level():
    """Errors fall into the right quarter of t, t = 1 into the last; an empty quarter is NaN."""
    record = [(torch.tensor([0.1, 0.25, 0.6]), torch.tensor([1.0, 3.0, 5.0])),
              (torch.tensor([1.0]), torch.tensor([7.0]))]
    levels = training.by_level(record)
    assert levels[0] == 2 and levels[2] == 5 and levels[3] == 7 and np.isnan(levels[1])


def test_steps_have_their_own_random_numbers(tmp_path):
    """A step's numbers follow from (seed, process, step): not from the steps drawn before it."""
    def draws(out, steps, seed=0):
        run = training.Run("C", replace(TINY_C, steps=5, seed=seed), out, torch.device("cpu"))
        run.step, found = steps[0], {}
        for step in run.steps():
            found[step] = torch.rand(3).tolist()
            run.log(loss=torch.zeros(()))
        return found
    whole, later = draws(tmp_path, (0,)), draws(tmp_path, (3,))
    assert list(whole) == [0, 1, 2, 3, 4] and later == {3: whole[3], 4: whole[4]}
    assert len({tuple(one) for one in whole.values()}) == 5, "two steps drew the same numbers"
    assert draws(tmp_path, (0,), seed=1)[0] != whole[0]


def test_checkpoint_errors(tmp_path):
    """Missing, damaged and mistaken checkpoints each give one sentence with the path."""
    with pytest.raises(UsageError, match="no such file"):
        stage_a.load(tmp_path / "none.pt")
    (tmp_path / "bad.pt").write_bytes(b"<html>not found</html>")
    with pytest.raises(UsageError, match="not a readable checkpoint"):
        stage_a.load(tmp_path / "bad.pt")
    checkpoint.save_checkpoint(tmp_path / "b.pt", dict(stage="B"))
    assert not list(tmp_path.glob("*.tmp"))
    with pytest.raises(UsageError,
                       match="found a checkpoint of 'B', expected one of stage 'A'"):
        stage_a.load(tmp_path / "b.pt")


@pytest.mark.parametrize("stage", ["a", "b", "c"])
def test_resuming_changes_nothing(stage, chain, drawings, tmp_path):
    """Two steps, then a resumed run of two more: equal to four uninterrupted steps, to the bit."""
    module, config = {"a": (stage_a, TINY_A), "b": (stage_b, TINY_B), "c": (stage_c, TINY_C)}[stage]
    weights = {"a": [], "b": ["stage_a"], "c": ["stage_a", "stage_b"]}[stage]
    weights = [chain / name / "checkpoint.pt" for name in weights]
    module.train(replace(config, steps=2), drawings, tmp_path, *weights)
    module.train(config, drawings, tmp_path, *weights)
    same_checkpoint(tmp_path / "checkpoint.pt", chain / f"stage_{stage}/checkpoint.pt")
    steps = [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4]


KEYED = """
import functools, itertools, json, sys, zlib
from dataclasses import replace
import torch, stage_c
torch.optim.AdamW = functools.partial(torch.optim.AdamW, eps=0.01)  # 1e-8: rounding turns the signs
steps, plain = itertools.count(1), stage_c.loss
def keyed(model, x_0, text):                     # randomness by (step, sample), not by process
    step = next(steps)
    streams = [torch.Generator().manual_seed(zlib.crc32(row.numpy().tobytes()) + step)
               for row in x_0]
    t = torch.cat([torch.rand(1, generator=one) for one in streams])
    return plain(model, x_0, text, t, stage_c.randn(x_0.shape, streams))
stage_c.loss = keyed
stage_c.train(replace(stage_c.PRESETS["pocket"], **json.loads(sys.argv[1])), *sys.argv[2:])
"""


@pytest.mark.slow
def test_two_processes_are_one_with_both_batches(chain, drawings, tmp_path):
    """torchrun with 2 x 2 images trains as one process with 4: same losses, same weights."""
    (tmp_path / "keyed.py").write_text(KEYED)
    weights = [str(chain / f"stage_{stage}/checkpoint.pt") for stage in "ab"]
    launchers = {1: [], 2: ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]}
    logs, states = [], []
    for world, launcher in launchers.items():
        config = {name: value for name, value in vars(replace(
            TINY_C, text_drop=0.0, batch_size=4 // world, muon=False, lr=2e-3)).items()
            if value != getattr(stage_c.PRESETS["pocket"], name)}
        out = tmp_path / str(world)
        done = command(*launcher, tmp_path / "keyed.py", json.dumps(config), drawings, out,
                       *weights, env=dict(os.environ, PYTHONPATH=str(HERE), OMP_NUM_THREADS="1"))
        assert ("per process" in done.stdout) == (world == 2)
        logs.append([json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()])
        states.append(torch.load(out / "checkpoint.pt", weights_only=True))
    assert states[0]["batches"] == states[1]["batches"]
    for one, two in zip(*logs):
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-4)
    for name, value in states[0]["model"].items():
        assert_close(value, states[1]["model"][name], atol=2e-5, rtol=1e-4)


def test_interrupt_saves(drawings, tmp_path):
    """Ctrl-C saves a checkpoint, says how to go on and ends cleanly."""
    config = replace(TINY_A, steps=100_000, save_every=100_000, workers=1)
    process = subprocess.Popen(
        [sys.executable, "stage_a.py", *flags(config, stage_a.PRESETS["pocket"]),
         "--data", str(drawings), "--out", str(tmp_path)],
        cwd=HERE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while process.poll() is None and not (tmp_path / "log.jsonl").exists():
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)                  # as a terminal does: workers get it, too
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and "the same command goes on" in out, out + err
    assert (tmp_path / "checkpoint.pt").is_file()


def test_another_config_is_refused(chain, drawings, tmp_path):
    """Going on with other numbers than the run was started with is refused with both values."""
    stage_a.train(replace(TINY_A, steps=1), drawings, tmp_path)
    with pytest.raises(UsageError, match=r"--lr is 0.5, was 0.002"):
        stage_a.train(replace(TINY_A, lr=0.5), drawings, tmp_path)
    half = replace(TINY_A, steps=2, batch_size=TINY_A.batch_size // 2)
    with pytest.raises(UsageError, match="x processes is 2, was 4.*--accumulate 2 keeps"):
        stage_a.train(half, drawings, tmp_path)
    stage_a.train(replace(half, accumulate=2), drawings, tmp_path)        # the same batch: allowed
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == 2
    c, more = chain / "stage_c", (drawings, chain / "stage_c", chain / "stage_a/checkpoint.pt",
                                  chain / "stage_b/checkpoint.pt")
    with pytest.raises(UsageError, match=f"`--init-from {c}/checkpoint.pt --out {c}-2` to begin"):
        stage_c.train(replace(TINY_C, lr=0.5), *more)


def test_discriminator_starts_at_its_step(drawings, tmp_path):
    """With --adversarial-start 2 the discriminator is untouched after 2 steps and moved after 3."""
    config = replace(TINY_A, adversarial_start=2)
    stage_a.train(replace(config, steps=2), drawings, tmp_path)
    before = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["discriminator"]
    stage_a.train(replace(config, steps=3), drawings, tmp_path)
    after = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["discriminator"]
    torch.manual_seed(config.seed)
    stage_a.StageA(config)
    fresh = stage_a.PatchDiscriminator().state_dict()
    assert_close(before["layers.0.weight"], fresh["layers.0.weight"])
    assert not torch.equal(before["layers.0.weight"], after["layers.0.weight"])


def test_checkpoint_keeps_the_scale(chain):
    """A's and the compressor's measured (mean, std) are in the checkpoint and used by load()."""
    a = stage_a.load(chain / "stage_a/checkpoint.pt")
    assert a.config.latent_std != 1 and not a.training
    compressor = semantic_compressor.load(chain / "stage_b/checkpoint.pt")
    assert compressor.config.latent_std != 1
    assert not any("latent" in key for key in {**a.state_dict(), **compressor.state_dict()})


def test_unknown_names_are_refused(capsys):
    """A name that a stage does not know is refused with those that it knows."""
    for module, flag, known in (
            (stage_b, "--condition", "raw"), (stage_b, "--prediction", "released"),
            (stage_b, "--compressor-preset", "pocket"),
            (stage_c, "--p2", "paper"), (stage_a, "--perceptual", "vgg16")):
        with pytest.raises(SystemExit):
            cli.parse(module.Config, module.PRESETS, "", [flag, "other"])
        assert re.search(f"argument {flag}: invalid choice: 'other' .choose from .*{known}",
                         capsys.readouterr().err)


def test_missing_stage_is_explained(drawings, tmp_path):
    """Stage C without a Stage B checkpoint says what is needed and which command makes it."""
    done = command("stage_c.py", "--data", drawings, "--preset", "pocket",
                   "--stage-b", tmp_path / "b.pt", check=False)
    assert done.returncode == 1
    assert "Semantic Compressor" in done.stderr and "stage_b.py" in done.stderr
    assert done.stderr.index("--compressor released") < done.stderr.index("stage_a.py")


def test_init_from_is_not_resuming(chain, drawings, tmp_path):
    """--init-from takes the weights and begins at step 0 with a new optimizer and schedule."""
    paths = [chain / "stage_a/checkpoint.pt", chain / "stage_b/checkpoint.pt"]
    stage_c.train(replace(TINY_C, steps=1, lr=0.0), drawings, tmp_path, *paths,
                  init_from=chain / "stage_c/checkpoint.pt")
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    before = torch.load(chain / "stage_c/checkpoint.pt", weights_only=True)
    same(state["model"], before["ema"], "model")
    with pytest.raises(UsageError, match="checkpoint.pt: has another network than these settings"):
        stage_c.train(replace(TINY_C, depth=TINY_C.depth + 1), drawings, tmp_path / "deep", *paths,
                      init_from=chain / "stage_c/checkpoint.pt")
    adamw = state["optimizer"].get(0, state["optimizer"])                 # the other is Muon's
    assert state["step"] == 1 and adamw["state"][0]["step"] == 1


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch before 2.9")
def test_muon_takes_the_matrices():
    """With --muon, Linear weights take Muon's steps; convolutions, biases and norms AdamW's."""
    model = stage_c.StageC(replace(TINY_C, muon=True))
    optimizer = training.optimizer(model.config, [dict(params=[*model.parameters()], share=0.5)])
    adamw, muon = optimizer.parts
    dims = [{p.dim() for group in part.param_groups for p in group["params"]} for part in
            (adamw, muon)]
    assert dims[1] == {2} and 2 not in dims[0] and 4 in dims[0], f"dimensions: {dims}"
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(
        [*model.parameters()]), "a parameter has no optimizer, or two"
    assert {group["share"] for group in optimizer.param_groups} == {0.5}
    assert type(training.optimizer(replace(TINY_C, muon=False), [
        dict(params=[*model.parameters()])])) is torch.optim.AdamW
