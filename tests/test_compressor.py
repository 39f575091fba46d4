"""The Semantic Compressor while Stage B trains: frozen, cooling down, its scale."""

from dataclasses import replace

import pytest
import torch

import semantic_compressor
import stage_b
from plumbing import training
from plumbing.cli import UsageError
from test_shapes import TINY_A, TINY_B, TINY_C


@pytest.mark.parametrize("config", [TINY_A, TINY_B, TINY_C], ids="abc")
def test_a_cooldown_is_at_most_half_of_the_run(config):
    """`--steps 300` with a preset's cooldown of 700 still trains at the full rate first."""
    config = replace(config, lr=1.0, warmup=0, steps=300, cooldown=700)
    rates = [training.learning_rate(step, config) for step in range(300)]
    assert rates[0] == rates[150] == 1 and rates[225] == 0.5 and rates[299] == 1 / 150


def test_a_short_run_measures_the_compressor(chain, drawings, tmp_path):
    """With a cooldown longer than the run BatchNorm still learns, and is measured at its start."""
    stage_b.train(replace(TINY_B, steps=4, cooldown=100), drawings, tmp_path,
                  chain / "stage_a/checkpoint.pt")
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    norm = state["compressor"]["mapper.1.running_var"]
    assert not torch.equal(norm, torch.ones_like(norm))
    assert abs(state["compressor_config"]["latent_std"] - 1) < 0.5, "BatchNorm at (0, 1)"


def test_frozen_compressor_has_one_scale(chain, drawings, tmp_path, monkeypatch):
    """B trains on sem as sampling standardises it, not by each batch's own mean and deviation."""
    state = torch.load(chain / "stage_b/checkpoint.pt", weights_only=True)
    state["compressor_config"].update(latent_mean=0.5, latent_std=2.0)
    torch.save(state, tmp_path / "given.pt")
    seen, plain = [], stage_b.drop_and_noise

    def spy(sem, text, null_text, config, scale=None):
        seen.append((sem, scale))
        return plain(sem, text, null_text, config, scale)
    monkeypatch.setattr(stage_b, "drop_and_noise", spy)
    for out in ("one", "one"):                       # the second call goes on, without init_from
        stage_b.train(replace(TINY_B, steps=len(seen) + 2, compressor_share=0.0), drawings,
                      tmp_path / out, chain / "stage_a/checkpoint.pt",
                      init_from=None if seen else tmp_path / "given.pt")
    assert len(seen) == 4 and {scale for _, scale in seen} == {(0.5, 2.0)}
    kept = semantic_compressor.load(tmp_path / "one/checkpoint.pt")
    assert kept.scale == (0.5, 2.0)
    same = semantic_compressor.load(tmp_path / "given.pt").state_dict()
    assert all(torch.equal(value, same[name]) for name, value in kept.state_dict().items())


def test_frozen_without_weights_is_refused(chain, drawings, tmp_path):
    """A frozen compressor has to come from somewhere; one of another architecture is named."""
    a = chain / "stage_a/checkpoint.pt"
    with pytest.raises(UsageError, match="--compressor-share 0 leaves the compressor as it is"):
        stage_b.train(replace(TINY_B, compressor_share=0.0), drawings, tmp_path / "b", a)
    with pytest.raises(UsageError, match="backbone narrow, expected efficientnet_v2_s"):
        stage_b.train(replace(TINY_B, compressor_preset="paper"), drawings, tmp_path / "b", a,
                      init_from=chain / "stage_b/checkpoint.pt")
