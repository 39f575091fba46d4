"""Checkpoints: what they know of the code that wrote them, and those that older code wrote."""

from dataclasses import asdict, replace

import pytest
import torch
from torch.testing import assert_close

import stage_a
import stage_b
import stage_c
from plumbing import checkpoint
from test_shapes import TINY_A, TINY_B, TINY_C, shake

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
        weights, state = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
        assert len(checkpoint.probe(model)["output"]) == 16
        assert torch.equal(state, torch.get_rng_state()) and model.training
        assert all(parameter.requires_grad for parameter in model.parameters())
        assert_close(model.state_dict(), weights, rtol=0, atol=0)
    monkeypatch.setattr(stage_c.StageC, "forward", lambda self, x_t, t, text, size: x_t)
    assert checkpoint.probe(stage_c.StageC(TINY_C)) == {}


def test_older_names(tmp_path):
    """A Stage B that was saved with `head` loads with `prediction`, and as the same network."""
    for old, new in (("velocity", "v"), ("released", "released")):
        config = {**asdict(TINY_B), "head": old}
        del config["prediction"]
        model = shake(stage_b.StageB(replace(TINY_B, prediction=new)))
        checkpoint.save_checkpoint(tmp_path / "b.pt", {
            "stage": "B", "config": config, "ema": model.state_dict()})
        found = stage_b.load(tmp_path / "b.pt")
        assert found.config == model.config
        assert_close(found.state_dict(), model.state_dict(), rtol=0, atol=0)
