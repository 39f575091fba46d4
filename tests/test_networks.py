"""What Stages B and C are made of: values worked out by hand, or an independent reference."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import stage_b
from test_shapes import TEXT, TINY_B

FIVE = replace(TINY_B, widths=(8, 8, 8, 8, 8), heads=(0, 2, 2, 2, 2), blocks=(1, 1, 1, 1, 1))


def resized(model, sem, H, W):
    """[(level, sem at its size)] of all levels with attention, down and up, in a run of Stage B."""
    found, n = [], len(model.config.widths)
    handles = [mapper.register_forward_pre_hook(
        lambda _, given, i=i: found.append((min(i, 2 * n - 1 - i), given[0].detach().clone())))
        for i, mapper in enumerate(model.effnet_mappers) if mapper is not None]
    model(torch.randn(len(sem), 4, H, W), torch.rand(len(sem)), sem, torch.randn(len(sem), *TEXT))
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("H, W", [(160, 32), (32, 160), (32, 32), (64, 352)])
def test_sem_is_resized_at_any_ratio(H, W, memory_format):
    """At every level, one column or one row included, sem is what float64 makes of it."""
    sem = torch.randn(2, 16, H * 3 // 32, W * 3 // 32)
    found = resized(stage_b.StageB(FIVE), sem.contiguous(memory_format=memory_format), H, W)
    assert len(found) == 8
    for level, small in found:
        size = (H // 2 ** (level + 1), W // 2 ** (level + 1))
        expected = F.interpolate(sem.double(), size, mode="bicubic", antialias=True,
                                 align_corners=True)
        off = (small - expected).abs().max().item()
        assert small.shape == expected.shape and off < 1e-4, (
            f"sem of {tuple(sem.shape[2:])} resized to {size}: off by {off:.2g}")
