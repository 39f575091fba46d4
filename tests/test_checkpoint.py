"""Checkpoints that older code wrote."""

from dataclasses import asdict, replace

from torch.testing import assert_close

import stage_b
from plumbing import checkpoint
from test_shapes import TINY_B, shake


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
