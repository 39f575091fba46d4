"""Checkpoints: what they know of the code that wrote them, and those that older code wrote."""

import shutil
from dataclasses import asdict, replace

import pytest
import torch
from torch.testing import assert_close

import stage_a
import stage_b
import stage_c
from plumbing import checkpoint, text, training
from plumbing.cli import UsageError
from published import weights
from test_shapes import TINY_A, TINY_B, TINY_C, shake
from tests.common import command

STAGES = {"A": (stage_a, stage_a.StageA, TINY_A), "B": (stage_b, stage_b.StageB, TINY_B),
          "C": (stage_c, stage_c.StageC, TINY_C)}


@pytest.fixture
def saved(tmp_path):
    """stage -> path of a checkpoint with a probe."""
    for stage, (_, Model, config) in STAGES.items():
        model = shake(Model(config), 0.2)
        weights = "model" if stage == "A" else "ema"
        checkpoint.save_checkpoint(tmp_path / f"{stage}.pt", {
            "stage": stage, "config": asdict(config), weights: model.state_dict(),
            "probe": checkpoint.probe(model)})
    return {stage: tmp_path / f"{stage}.pt" for stage in STAGES}


def test_unedited_code_is_silent(saved, capsys):
    """Code that computes what it did loads without a word; so do weights that keep no probe."""
    for stage, (module, _, _) in STAGES.items():
        module.load(saved[stage])
        module.load(checkpoint.POCKET / f"stage_{stage.lower()}.safetensors")
    assert capsys.readouterr().err == ""


def without_abs(x_t, a, b):
    return (x_t - a) / (1 - b + 1e-5)


def linear_alpha_bar(t):
    return (1 - t).clamp(1e-4, 0.9999)


def without_beta(self, x):
    energy = x.square().sum((1, 2), keepdim=True).sqrt()
    return self.gamma * x * energy / (energy.mean(-1, keepdim=True) + 1e-6) + x


@pytest.mark.parametrize("stage, place, name, edited, what", [
    ("C", stage_c, "ab_to_eps", without_abs, "output differs by"),
    ("C", stage_c, "alpha_bar", linear_alpha_bar, "alpha_bar differs by"),
    ("B", stage_b, "alpha_bar", linear_alpha_bar, "alpha_bar differs by"),
    ("C", stage_c.GlobalResponseNorm, "forward", without_beta, "output differs by"),
    ("B", stage_b.GlobalResponseNorm, "forward", without_beta, "output differs by"),
    ("A", stage_a.ResBlock, "forward", lambda self, x: x, "output differs by")])
def test_edited_code_is_said(saved, capsys, monkeypatch, stage, place, name, edited, what):
    """A head, schedule or block that was edited since is said in one sentence, and only that."""
    monkeypatch.setattr(place, name, edited)
    STAGES[stage][0].load(saved[stage])
    said = capsys.readouterr().err
    assert said.startswith(f"{saved[stage]}: Stage {stage} no longer computes what it did")
    assert what in said and said.strip().count("\n") == 0


def test_probe_changes_nothing(monkeypatch):
    """A probe draws no global random numbers and leaves the model as it was; one that the model
    cannot take is empty, so that an edited model can still be saved."""
    for module, Model, config in STAGES.values():
        model = Model(config).train()
        weights = {name: value.clone() for name, value in model.state_dict().items()}
        state = torch.get_rng_state()
        assert len(checkpoint.probe(model)["output"]) == 16
        assert torch.equal(state, torch.get_rng_state()) and model.training
        assert all(parameter.requires_grad for parameter in model.parameters())
        assert_close(model.state_dict(), weights, rtol=0, atol=0)
    monkeypatch.setattr(stage_c.StageC, "forward", lambda self, x_t, t, text, size: x_t)
    assert checkpoint.probe(stage_c.StageC(TINY_C)) == {}


OVERWRITTEN = """
import shutil, sys
from pathlib import Path
import torch
import stage_a, stage_b, stage_c
from plumbing import checkpoint, text
from pocket import text as pocket_text
from test_shapes import TINY_C

folder, found = Path(sys.argv[1]), {}
for stage, module in dict(A=stage_a, B=stage_b, C=stage_c).items():
    found[f"{stage}.pt"] = module.load(folder / f"{stage}.pt")
    found[f"stage_{stage.lower()}.safetensors"] = module.load(folder /
                                                              f"stage_{stage.lower()}.safetensors")
pocket_text.TAUGHT = folder / "text.safetensors"
found["text.safetensors"] = text.text_encoder("pocket")
text.TEXT_ENCODERS["clip-h"] = text.TEXT_ENCODERS["pocket"]
found["clip.pt"] = text.text_encoder("clip-h", folder / "clip.pt")
found["vqgan/diffusion_pytorch_model.safetensors"] = stage_a.load(folder / "vqgan")

class Kept:                                                 # as an optimizer, it keeps the tensors
    def load_state_dict(self, state):
        self.state_dict = lambda: state
from plumbing import training
run, kept = training.Run("C", TINY_C, folder / "run", torch.device("cpu")), Kept()
run.restore(optimizer=kept)
found["run/checkpoint.pt"] = kept

before = {name: {key: value.clone() for key, value in model.state_dict().items()}
          for name, model in found.items()}
noted = run.errors[0][0].clone()
for name in found:                                              # in place, as `cp` and rsync do it
    size = (folder / name).stat().st_size
    with open(folder / name, "r+b") as file:
        file.write(b"\\x01" * size)
for name, model in found.items():
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[name][key]), f"{name}: {key} changed with the file"
assert torch.equal(run.errors[0][0], noted)
for name, model in found.items():                               # and where it is shorter now
    open(folder / name, "wb").close()
    [value.sum() for value in model.state_dict().values()]
run.errors[0][0].sum()
print(len(found), "models")
"""


def test_overwritten_file_changes_no_model(saved, tmp_path):
    """What was loaded stays as it is when the file is overwritten in place: none stays mapped."""
    for name in ("stage_a", "stage_b", "stage_c", "text"):
        shutil.copy(checkpoint.POCKET / f"{name}.safetensors", tmp_path)
    torch.save(text.text_encoder().tower.state_dict(), tmp_path / "clip.pt")
    weights.write_folder(tmp_path / "vqgan", *weights.to_diffusers(
        "A", TINY_A, stage_a.StageA(TINY_A).state_dict()))
    run = training.Run("C", TINY_C, tmp_path / "run", torch.device("cpu"))
    run.errors = [(torch.rand(5000), torch.rand(5000))]
    run.save(optimizer={"moment": torch.rand(5000)})
    run.lock.close()                                            # as at the end of its steps
    done = command("-c", OVERWRITTEN, tmp_path)
    assert done.stdout.strip().endswith("10 models"), done.stdout


def test_older_names(tmp_path):
    """A Stage B that was saved with `head` and `compressor` loads with `prediction` and
    `compressor_preset`, without the bounds of a weight, and as the same network; with such bounds
    another network computed, so it is refused."""
    for old, new in (("velocity", "v"), ("released", "released")):
        config = {**asdict(TINY_B), "head": old, "compressor": TINY_B.compressor_preset,
                  "weight_cap": 0.0, "weight_floor": 0.0}
        del config["prediction"], config["compressor_preset"]
        model = shake(stage_b.StageB(replace(TINY_B, prediction=new)))
        checkpoint.save_checkpoint(tmp_path / "b.pt", {
            "stage": "B", "config": config, "ema": model.state_dict()})
        found = stage_b.load(tmp_path / "b.pt")
        assert found.config == model.config
        assert_close(found.state_dict(), model.state_dict(), rtol=0, atol=0)
        checkpoint.save_checkpoint(tmp_path / "b.pt", {
            "stage": "B", "config": {**config, "weight_cap": 1e4}, "ema": model.state_dict()})
        with pytest.raises(UsageError, match="weight_cap"):
            stage_b.load(tmp_path / "b.pt")
    model = shake(stage_a.StageA(TINY_A))
    checkpoint.save_checkpoint(tmp_path / "a.pt", {
        "stage": "A", "config": {**asdict(TINY_A), "compile": True}, "model": model.state_dict()})
    assert stage_a.load(tmp_path / "a.pt").config == TINY_A     # it was speed, not arithmetic
