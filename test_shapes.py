"""The specification, as tests: shapes, hand values, oracles, overfitting, resuming, commands.

    pytest test_shapes.py            (or `make test`, which also makes the environment)

Each test's one-line docstring is its claim. The README's table "Break it" names one-line edits of
the stage files and the test that fails for each.
"""

import copy
import inspect
import io
import itertools
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
from PIL import Image
from safetensors import safe_open
from torch.testing import assert_close

import data
import sample
import semantic_compressor
import stage_a
import stage_b
import stage_c
from plumbing import run
from pocket import shapes, ship, teach, teach_text

HERE = Path(__file__).parent

# Small configurations of the same classes: what the tests train and sample.
TINY_A = replace(stage_a.PRESETS["pocket"], widths=(8, 16), decoder_blocks=1, codebook_size=32,
                 steps=4, batch_size=4, warmup=1, cooldown=0, workers=0, log_every=1,
                 preview_every=100, save_every=2)
TINY_B = replace(stage_b.PRESETS["pocket"], widths=(8, 16, 16), heads=(0, 2, 2), blocks=(1, 1, 2),
                 patch_size=2, cond_width=8, steps=4, batch_size=4, warmup=1, cooldown=0,
                 log_every=1, preview_every=100, save_every=2)
TINY_C = replace(stage_c.PRESETS["pocket"], width=32, depth=2, heads=4, steps=4, batch_size=4,
                 warmup=1, cooldown=0, log_every=1, preview_every=100, save_every=2)
TEXT = (24, 128)                                            # tokens and width of the pocket encoder


@pytest.fixture(autouse=True)
def seeded():
    """Each test draws the same numbers whichever tests ran before it."""
    torch.manual_seed(0)


def shake(model, size=0.05):
    """Move every parameter away from its initial value, so that no zero hides a dead path."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(size * torch.randn_like(parameter))
    return model


def flags(config, preset):
    """The command-line flags that turn the preset into `config`."""
    out = []
    for name, value in vars(config).items():
        if value != getattr(preset, name):
            text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
            out += [f"--{name.replace('_', '-')}", text]
    return ["--preset", "pocket", *out]


def command(*arguments, check=True, **options):
    """Run a command of the README; on failure show what it printed."""
    done = subprocess.run([sys.executable, *map(str, arguments)], cwd=HERE, capture_output=True,
                          text=True, timeout=200, **options)
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


# ---- shapes and sizes ----------------------------------------------------------------------------

@pytest.mark.parametrize("module, name, preset, count", [
    (stage_a, "StageA", "paper", 23_148_550), (stage_a, "StageA", "released", 18_406_894),
    (stage_b, "StageB", "released", 1_055_365_280),
    (stage_c, "StageC", "paper", 347_037_472), (stage_c, "StageC", "released", 993_636_896),
    (semantic_compressor, "SemanticCompressor", "released", 20_198_000),
    (semantic_compressor, "SemanticCompressor", "paper", 20_198_000 - 32)])   # 16 scales, 16 shifts
def test_parameter_counts(module, name, preset, count):
    """The big presets have exactly the published or derived number of parameters."""
    with torch.device("meta"):
        model = getattr(module, name)(module.PRESETS[preset])
    assert sum(parameter.numel() for parameter in model.parameters()) == count


def test_paper_shapes_on_meta():
    """At paper size: 1024x768 -> 4x256x192 and 16x24x18 latents; B and C keep their shapes."""
    with torch.device("meta"):
        images = torch.empty(1, 3, 1024, 768)
        a = stage_a.StageA(stage_a.PRESETS["paper"])
        latents = a.encode(images)
        assert latents.shape == (1, 4, 256, 192)
        assert a.decode(latents).shape == images.shape
        compressor = semantic_compressor.SemanticCompressor(semantic_compressor.PRESETS["paper"])
        sem = compressor(torch.empty(1, 3, 768, 576))
        assert sem.shape == (1, 16, 24, 18)
        text, t = torch.empty(1, 77, 1024), torch.empty(1)
        b = stage_b.StageB(stage_b.PRESETS["paper"])
        assert b(latents, t, sem, text).shape == latents.shape
        c = stage_c.StageC(stage_c.PRESETS["paper"])
        assert c(sem, t, text).shape == sem.shape


@pytest.mark.parametrize("batch", [1, 3])
def test_shapes_end_to_end(batch):
    """Non-square pictures pass through the pocket chain, and 42.67 : 1 is what the shapes say."""
    images = torch.rand(batch, 3, 128, 256)
    a = stage_a.StageA(TINY_A)
    latents = a.encode(images)
    quantised, indices, vq_loss = a.quantize(latents)
    assert latents.shape == quantised.shape == (batch, 4, 32, 64)
    assert indices.shape == (batch, 32, 64) and indices.dtype == torch.int64 and vq_loss.shape == ()
    assert a.decode(latents).shape == images.shape
    compressor = semantic_compressor.SemanticCompressor(semantic_compressor.PRESETS["pocket"])
    sem = compressor(semantic_compressor.resize(images))
    assert sem.shape == (batch, 16, 3, 6)
    factor = images.shape[2] / sem.shape[2]
    assert factor == images.shape[3] / sem.shape[3] == pytest.approx(42.67, abs=0.01)
    text, t = torch.randn(batch, *TEXT), torch.rand(batch)
    assert stage_b.StageB(TINY_B)(latents, t, sem, text).shape == latents.shape
    assert stage_c.StageC(TINY_C)(sem, t, text).shape == sem.shape


def test_compressor_input_size():
    """768 px give 24x24; 786 px, the misprint of §3.1, would give 25x25 and are refused."""
    compressor = semantic_compressor.SemanticCompressor(semantic_compressor.PRESETS["pocket"])
    compressor.eval()
    assert compressor(torch.rand(1, 3, 768, 96)).shape == (1, 16, 24, 3)
    assert compressor.backbone(torch.rand(1, 3, 786, 96)).shape[2] == 25
    with pytest.raises(ValueError, match="786"):
        compressor(torch.rand(1, 3, 786, 96))
    with pytest.raises(ValueError, match="multiples of 128"):
        semantic_compressor.resize(torch.rand(1, 3, 100, 128))


def test_four_level_b():
    """A four-level Stage B with attention and injection on three levels, conditioned both ways."""
    for attend in (True, False):
        config = replace(TINY_B, widths=(8, 12, 16, 16), heads=(0, 2, 4, 4), blocks=(1, 1, 2, 1),
                         attend_to_sem=attend)
        model = shake(stage_b.StageB(config))
        x, t = torch.randn(2, 4, 16, 32), torch.rand(2)
        sem, text = torch.randn(2, 16, 3, 6), torch.randn(2, *TEXT)
        out = model(x, t, sem, text)
        assert out.shape == x.shape
        assert not torch.allclose(out, model(x, t, sem + 1, text))
        assert not torch.allclose(out, model(x, t, sem, text + torch.randn_like(text)))
        with pytest.raises(ValueError, match="multiples of 16"):
            model(torch.randn(2, 4, 24, 32), t, sem, text)


def test_published_names():
    """State-dict keys are those of the published checkpoints."""
    c = stage_c.StageC(TINY_C).state_dict()
    for key in ("projection.weight", "cond_mapper.0.weight", "cond_mapper.2.bias",
                "blocks.0.depthwise.weight", "blocks.0.channelwise.0.weight",
                "blocks.0.channelwise.2.gamma", "blocks.0.channelwise.4.weight",
                "blocks.1.mapper.weight", "blocks.2.attention.to_q.weight",
                "blocks.2.attention.to_out.0.bias", "blocks.2.kv_mapper.1.weight",
                "out.1.weight"):
        assert key in c
    b = stage_b.StageB(replace(TINY_B, attend_to_sem=False, head="released")).state_dict()
    for key in ("clip_mapper.weight", "effnet_mappers.1.weight", "effnet_mappers.4.bias",
                "embedding.1.weight", "down_blocks.1.0.1.weight",
                "down_blocks.1.3.attention.to_v.weight", "up_blocks.0.6.1.weight", "clf.1.weight"):
        assert key in b
    assert not any("sem_mapper" in key for key in b)
    a = stage_a.StageA(TINY_A).state_dict()
    for key in ("in_block.1.weight", "down_blocks.0.gammas", "down_blocks.0.depthwise.1.weight",
                "down_blocks.0.channelwise.2.bias", "down_blocks.3.0.weight",
                "down_blocks.3.1.running_var", "vquantizer.embedding.weight",
                "up_blocks.0.0.weight", "out_block.0.weight"):
        assert key in a
    with torch.device("meta"):
        model = semantic_compressor.SemanticCompressor(semantic_compressor.PRESETS["released"])
    keys = {"backbone.1.0.block.0.0.weight", "mapper.0.weight", "mapper.1.bias"}
    assert keys <= set(model.state_dict())


# ---- gradients and initialisation ----------------------------------------------------------------

@pytest.mark.parametrize("head", ["released", "velocity"])
def test_every_parameter_has_a_gradient(head):
    """One loss reaches every parameter of A, B, the compressor and C: none is made but unused."""
    a, b = shake(stage_a.StageA(TINY_A)), shake(stage_b.StageB(replace(TINY_B, head=head)))
    c = shake(stage_c.StageC(TINY_C))
    compressor = semantic_compressor.SemanticCompressor(semantic_compressor.PRESETS["pocket"])
    stage_a.loss(a, torch.rand(4, 3, 32, 64)).backward()
    text = torch.randn(4, *TEXT)
    stage_b.loss(b, torch.randn(4, 4, 16, 32), compressor(torch.rand(4, 3, 96, 192)),
                 text).backward()
    stage_c.loss(c, torch.randn(4, 16, 3, 5), text).backward()
    for model in (a, b, compressor, c):
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, name
            # a bias on all keys shifts every attention score alike: its true gradient is zero
            assert parameter.grad.abs().max() > 0 or name.endswith("to_k.bias"), name


def test_initial_outputs():
    """At init eps_hat is x_t / (1 + 1e-5) in Stage C (§3.2), 2 x_t in Stage B (released head);
    with its velocity head v_hat is 0, so that x_0_hat is sqrt(alpha_bar) x_t."""
    x, t, text = torch.randn(2, 16, 3, 5), torch.rand(2), torch.randn(2, *TEXT)
    assert_close(stage_c.StageC(TINY_C)(x, t, text), x / (1 + 1e-5))
    x = torch.randn(2, 4, 16, 32)
    sem = torch.randn(2, 16, 3, 6)
    assert_close(stage_b.StageB(replace(TINY_B, head="released"))(x, t, sem, text), 2 * x)
    a = stage_b.alpha_bar(t).view(-1, 1, 1, 1)
    eps_hat = stage_b.StageB(replace(TINY_B, head="velocity"))(x, t, sem, text)
    assert_close((x - (1 - a).sqrt() * eps_hat) / a.sqrt(), a.sqrt() * x, atol=1e-4, rtol=1e-4)


def test_velocity_head():
    """eps_hat and x_0_hat of the velocity head fit v_hat at every t; x_t hardly counts at 1."""
    model = shake(stage_b.StageB(replace(TINY_B, head="velocity"))).eval()
    x, sem, text = torch.randn(2, 4, 16, 16), torch.randn(2, 16, 3, 3), torch.randn(2, *TEXT)
    found = []
    model.clf.register_forward_hook(lambda *given: found.append(given[2]))
    for level in (0.0, 0.3, 0.7, 1.0):
        t = torch.full((2,), level)
        a = stage_b.alpha_bar(t[:1])
        eps_hat = model(x, t, sem, text)
        x_0_hat = (x - (1 - a).sqrt() * eps_hat) / a.sqrt()
        assert_close(found[-1], a.sqrt() * eps_hat - (1 - a).sqrt() * x_0_hat,
                     atol=1e-3, rtol=1e-3)
    t, change = torch.ones(2), []
    for level in (0.5, 1.0):
        model(x, level * t, sem, text)
        model(-x, level * t, sem, text)
        change.append((found[-1] - found[-2]).abs().max())
    assert change[1] < 0.4 * change[0]                  # 1.4 times it if x_t is not turned down


def test_zero_initialised_branches_are_the_identity():
    """Stage A's block, GlobalResponseNorm and TimestepBlock return their input at init."""
    x = torch.randn(2, 8, 5, 7)
    assert_close(stage_a.ResBlock(8, 16)(x), x)
    block = stage_c.StageC(TINY_C).blocks[1]
    x = torch.randn(2, 32, 3, 5)
    assert_close(block(x, torch.randn(2, 64)), x)
    x = torch.randn(2, 5, 7, 8)
    assert_close(stage_c.GlobalResponseNorm(8)(x), x)


def test_text_matters_after_one_step():
    """After one optimizer step another text changes the output of B and C; before it does not."""
    torch.manual_seed(0)
    text, t, sem = torch.randn(2, *TEXT), torch.full((2,), 0.5), torch.randn(2, 16, 3, 3)
    for model, x, more in ((stage_c.StageC(TINY_C), torch.randn(2, 16, 3, 3), ()),
                           (stage_b.StageB(TINY_B), torch.randn(2, 4, 16, 16), (sem,))):
        module = stage_c if more == () else stage_b
        assert_close(model(x, t, *more, text), model(x, t, *more, text.flip(0)))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        module.loss(model, x, *more, text).backward()
        optimizer.step()
        assert not torch.allclose(model(x, t, *more, text), model(x, t, *more, text.flip(0)),
                                  atol=1e-6)


# ---- hand values ---------------------------------------------------------------------------------

def test_ab_head():
    """eps_hat = (x - A) / (|1 - B| + 1e-5), on values worked out by hand, B beyond 1 included."""
    x, a = torch.tensor([3.0, 3.0, 3.0, -1.0]), torch.tensor([0.0, 1.0, 1.0, 1.0])
    b = torch.tensor([0.0, 0.5, 1.5, 3.0])
    expected = torch.tensor([3 / 1.00001, 2 / 0.50001, 2 / 0.50001, -2 / 2.00001])
    assert_close(stage_c.ab_to_eps(x, a, b), expected)
    one, zero = torch.tensor(1.0), torch.tensor(0.0)
    assert_close(stage_c.ab_to_eps(one, zero, one), torch.tensor(1e5))


def test_p2_weight():
    """p2 at t = .25, .5, .75: (1 - a) / (1 + a) as in §3.2, 1 - a as released, 1 for none."""
    t = torch.tensor([0.25, 0.5, 0.75])
    assert_close(stage_c.p2_weight(t), torch.tensor([0.0832, 0.3387, 0.7477]), atol=1e-3, rtol=0)
    assert_close(stage_c.p2_weight(t, "released"), torch.tensor([0.1535, 0.5060, 0.8556]),
                 atol=1e-3, rtol=0)
    assert_close(stage_c.p2_weight(t, "none"), torch.ones(3))
    with pytest.raises(ValueError, match="paper, released or none"):
        stage_c.p2_weight(t, "p3")


def test_loss_is_weighted_by_p2():
    """Stage C's loss is the mean of p2(t) times the error of each sample, by hand."""
    class Fixed(nn.Module):
        def forward(self, x_t, t, text):
            return torch.zeros_like(x_t)
    x_0, noise, t = torch.zeros(2, 16, 3, 3), torch.ones(2, 16, 3, 3), torch.tensor([0.25, 0.75])
    record = []
    value = stage_c.loss(Fixed(), x_0, None, t=t, noise=noise, p2="paper", record=record)
    assert_close(value, stage_c.p2_weight(t).mean())         # the error is 1 everywhere
    assert_close(record[0][1], torch.ones(2))                # and the record is not weighted


def test_stage_b_weight():
    """Stage B's loss is the error of the noise; with a cap, the error in x_0 within bounds."""
    class Fixed(nn.Module):
        config = replace(TINY_B, weight_cap=0.0)

        def forward(self, x_t, t, sem, text):
            return torch.zeros_like(x_t)
    model, x_0, t = Fixed(), torch.zeros(3, 4, 4, 4), torch.tensor([0.05, 0.5, 0.99])
    assert_close(stage_b.loss(model, x_0, None, None, t, torch.ones_like(x_0)), torch.tensor(1.0))
    model.config = replace(TINY_B, weight_cap=20.0, weight_floor=0.5)
    expected = torch.tensor((0.5 + 0.5060 / 0.4940 + 20) / 3)     # a is 0.494 at t = .5
    assert_close(stage_b.loss(model, x_0, None, None, t, torch.ones_like(x_0)), expected,
                 atol=1e-3, rtol=0)
    assert stage_b.PRESETS["paper"].weight_cap == stage_b.PRESETS["released"].weight_cap == 0


@pytest.mark.parametrize("module", [stage_b, stage_c])
def test_schedule(module):
    """alpha_bar falls from .9999 to .0001, flat at the clamp; noised variance is 1; draw_t fits."""
    t = torch.linspace(0, 1, 1001)
    a = module.alpha_bar(t)
    assert a[0] == pytest.approx(0.9999) and a[-1] == pytest.approx(1e-4)
    assert (a.diff() <= 0).all() and (a[10:-10].diff() < 0).all()
    assert_close(module.alpha_bar(torch.tensor([0.5])), torch.tensor([0.4939]), atol=1e-3, rtol=0)
    torch.manual_seed(0)
    x_0, noise, t = torch.randn(64, 4, 16, 16), torch.randn(64, 4, 16, 16), torch.rand(64)
    assert module.diffuse(x_0, t, noise).var().item() == pytest.approx(1, abs=0.02)
    drawn = module.draw_t(200_000)
    assert 0.001 <= drawn.min() < 0.002 and drawn.max() == 1 and drawn.dtype == torch.float32
    assert (drawn == 1).float().mean().item() == pytest.approx(0.075, abs=0.002)


# ---- sampler -------------------------------------------------------------------------------------

class Oracle(nn.Module):
    """Knows x_0 and returns the exact noise; with text it can be told to return other things."""

    def __init__(self, module, x_0):
        super().__init__()
        self.module, self.x_0, self.weight = module, x_0, nn.Parameter(torch.zeros(()))

    def read(self, *conditions):
        return conditions[-1]

    def forward(self, x_t, t, *conditions):
        a = self.module.alpha_bar(t).view(-1, 1, 1, 1)
        return (x_t - a.sqrt() * self.x_0) / (1 - a).sqrt()


@pytest.mark.parametrize("module, steps", [(stage_c, 60), (stage_b, 12)])
def test_sampler_oracle(module, steps):
    """With a model that returns the exact noise for a known x_0 the DDPM loop returns x_0."""
    torch.manual_seed(0)
    x_0 = torch.randn(2, 4, 6, 5)
    text = torch.zeros(2, *TEXT)
    more = (torch.zeros(2, 16, 3, 3),) if module is stage_b else ()
    out = module.ddpm_sample(Oracle(module, x_0), x_0.shape, *more, text, *more, text[:1],
                             steps=steps, guidance=1)
    assert_close(out, x_0, atol=0.05, rtol=0)


class Conditional(nn.Module):
    """eps_hat is the mean of the text, on every channel: shows which branch the sampler used."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def read(self, *conditions):
        return conditions[-1]

    def forward(self, x_t, t, *conditions):
        return torch.ones_like(x_t) * conditions[-1].mean((1, 2)).view(-1, 1, 1, 1)


@pytest.mark.parametrize("module", [stage_b, stage_c])
def test_guidance(module):
    """Guidance 1 is the conditional, 0 the unconditional, 4 the extrapolation, on all channels."""
    shape, x = (2, 4, 6, 6), torch.randn(2, 4, 6, 6)
    more = (torch.zeros(2, 16, 3, 3),) if module is stage_b else ()
    text, null = torch.full((2, *TEXT), 0.5), torch.full((1, *TEXT), 0.2)

    def end(text, null, guidance):
        return module.ddpm_sample(Conditional(), shape, *more, text, *more, null, 3, guidance, x=x,
                                  generator=torch.Generator().manual_seed(0))
    conditional, unconditional = end(text, null, 1), end(null.expand(2, -1, -1), null, 1)
    assert_close(end(text, null, 1.0 + 1e-9), conditional, atol=1e-5, rtol=1e-5)
    assert_close(end(text, null, 0), unconditional, atol=1e-5, rtol=1e-5)
    strong = end(text, null, 4)
    assert_close(strong, unconditional + 4 * (conditional - unconditional), atol=1e-4, rtol=1e-4)
    assert (strong - unconditional).abs().amin((0, 2, 3)).min() > 0.01    # no channel left out


@pytest.mark.parametrize("module", [stage_b, stage_c])
def test_conditions_are_read_once(module, monkeypatch):
    """`read` is called once per sampling, and what it returns gives the same as the tokens."""
    config = {stage_b: TINY_B, stage_c: TINY_C}[module]
    model = shake({stage_b: stage_b.StageB, stage_c: stage_c.StageC}[module](config)).eval()
    x, t = torch.randn(2, *((4, 16, 16) if module is stage_b else (16, 3, 3))), torch.rand(2)
    text = torch.randn(2, *TEXT)
    sem = (torch.randn(2, 16, 3, 3),) if module is stage_b else ()
    with torch.no_grad():
        assert torch.equal(model(x, t, *sem, text), model(x, t, *sem, text, model.read(*sem, text)))
        assert not torch.equal(model(x, t, *sem, text),
                               model(x, t, *sem, text, model.read(*sem, -text)))
    calls, read = [], model.read
    monkeypatch.setattr(model, "read", lambda *given: calls.append(len(given[0])) or read(*given))
    for guidance in (1, 2):
        module.ddpm_sample(model, x.shape, *sem, text, *sem, text[:1], 3, guidance)
    assert calls == [2, 4]


CHANNELS_LAST = torch.channels_last


@pytest.mark.parametrize("module", [stage_b, stage_c])
def test_channels_last_changes_nothing(module, monkeypatch):
    """Memory format is speed, not arithmetic: outputs and gradients agree to rounding."""
    config = {stage_b: TINY_B, stage_c: TINY_C}[module]
    model = shake({stage_b: stage_b.StageB, stage_c: stage_c.StageC}[module](config)).eval()
    x, t = torch.randn(2, *((4, 16, 16) if module is stage_b else (16, 6, 5))), torch.rand(2)
    sem = (torch.randn(2, 16, 3, 3),) if module is stage_b else ()
    text, found = torch.randn(2, *TEXT), []
    given = []                                          # is what a ResBlock gets channels-last?
    block = next(layer for layer in model.modules() if isinstance(layer, module.ResBlock))
    block.register_forward_pre_hook(lambda _, inputs: given.append(
        all(one.is_contiguous(memory_format=CHANNELS_LAST) for one in inputs if one is not None)))
    for memory_format in (CHANNELS_LAST, torch.contiguous_format):
        monkeypatch.setattr(torch, "channels_last", memory_format)
        model.zero_grad()
        out = model(x, t, *sem, text)
        out.square().mean().backward()
        found.append((out.detach(), [p.grad.clone() for p in model.parameters()]))
    assert given == [True, False]
    assert_close(*[one[0] for one in found], atol=1e-4, rtol=1e-4)
    for one, two in zip(found[0][1], found[1][1]):
        assert_close(one, two, atol=1e-4 * max(1.0, one.abs().max().item()), rtol=1e-3)


@pytest.mark.parametrize("module", [stage_b, stage_c])
def test_compiled_changes_nothing(module):
    """`--compile` is speed, not arithmetic: outputs and gradients agree to rounding."""
    config = {stage_b: replace(TINY_B, widths=(8, 16), heads=(0, 2), blocks=(1, 1)),
              stage_c: replace(TINY_C, depth=1)}[module]
    model = shake({stage_b: stage_b.StageB, stage_c: stage_c.StageC}[module](config))
    fast = copy.deepcopy(model)
    fast.compile()                                      # in place, as the stages do
    x, t = torch.randn(2, *((4, 16, 16) if module is stage_b else (16, 6, 5))), torch.rand(2)
    sem = (torch.randn(2, 16, 3, 3),) if module is stage_b else ()
    text, found = torch.randn(2, *TEXT), []
    for one in (model, fast):
        out = one(x, t, *sem, text)
        out.square().mean().backward()
        found.append((out.detach(), [p.grad for p in one.parameters()]))
    assert fast._compiled_call_impl is not None and model._compiled_call_impl is None
    for one, two in zip([found[0][0], *found[0][1]], [found[1][0], *found[1][1]]):
        assert_close(one, two, atol=1e-4 * max(1.0, one.abs().max().item()), rtol=1e-3)
    assert list(fast.state_dict()) == list(model.state_dict())            # names stay clean


@pytest.mark.parametrize("module", [stage_b, stage_c])
def test_own_generator_per_sample(module):
    """Sample i depends on its own generator, not on the rest of the batch."""
    config = {stage_b: TINY_B, stage_c: TINY_C}[module]
    model = shake({stage_b: stage_b.StageB, stage_c: stage_c.StageC}[module](config)).eval()
    size = (4, 16, 16) if module is stage_b else (16, 3, 3)

    def draw(seeds):
        more = (torch.ones(len(seeds), 16, 3, 3),) if module is stage_b else ()
        text = torch.ones(len(seeds), *TEXT)
        return module.ddpm_sample(model, (len(seeds), *size), *more, text, *more, text, steps=3,
                                  guidance=2, generator=sample.generators(seeds))
    together, alone = draw([5, 6, 7]), draw([7])
    assert_close(together[2:], alone, atol=1e-3, rtol=1e-3)
    assert not torch.allclose(together[0], together[1], atol=0.1)


# ---- vector quantisation and Stage A's losses ----------------------------------------------------

def test_vq_is_the_nearest_code():
    """The index is the arg min of the Euclidean distance to all codes, by brute force."""
    a = stage_a.StageA(TINY_A)
    nn.init.normal_(a.vquantizer.embedding.weight)
    latents = torch.randn(3, 4, 5, 6)
    quantised, indices, _ = a.quantize(latents)
    rows = latents.permute(0, 2, 3, 1).reshape(-1, 4)
    assert_close(indices.flatten(), torch.cdist(rows, a.vquantizer.embedding.weight).argmin(1))
    assert_close(quantised, a.vquantizer.embedding.weight[indices].permute(0, 3, 1, 2))


def test_vq_gradients():
    """Straight-through gradient is 1; the commitment factor .25 is on the encoder's term alone."""
    quantizer = stage_a.VectorQuantizer(1, 4)
    with torch.no_grad():
        quantizer.embedding.weight.fill_(2.0)
    latents = torch.zeros(1, 4, 1, 1, requires_grad=True)
    quantised, _, vq_loss = quantizer(latents, 0.25)
    quantised.sum().backward()
    assert_close(latents.grad, torch.ones_like(latents))
    latents.grad = None
    quantizer(latents, 0.25)[2].backward()          # mean over 4 of (0 - 2)^2: derivative 2 * 2 / 4
    assert_close(latents.grad.flatten(), torch.full((4,), -0.25))
    assert_close(quantizer.embedding.weight.grad.flatten(), torch.full((4,), 1.0))
    assert_close(vq_loss, torch.tensor(5.0))        # 4 + 0.25 * 4


def test_quantisation_drop():
    """Samples named by `drop` skip the quantiser, the others do not; 10 % are drawn by default."""
    a = stage_a.StageA(replace(TINY_A, decoder_blocks=0)).eval()
    nn.init.normal_(a.vquantizer.embedding.weight)
    images, record = torch.rand(2, 3, 16, 16), {}
    stage_a.loss(a, images, drop=torch.tensor([True, False]), record=record)
    latents = a.encode(images)
    assert_close(record["decoded"][0], a.decode(latents)[0].detach())
    assert_close(record["decoded"][1], a.decode(a.quantize(latents)[0])[1].detach())
    assert not torch.allclose(record["decoded"][1], a.decode(latents)[1])
    assert stage_a.PRESETS["paper"].quantise_drop == 0.1


def test_codebook_does_not_collapse():
    """From the released initialisation few codes win; after revive_codes most are used."""
    torch.manual_seed(0)
    a = stage_a.StageA(replace(TINY_A, codebook_size=512))
    latents = a.encode(torch.rand(8, 3, 64, 64))
    before = a.quantize(latents)[1].unique().numel()
    stage_a.revive_codes(a, latents.detach(), torch.zeros(512, dtype=torch.bool))
    after = a.quantize(latents)[1].unique().numel()
    assert before < 0.3 * 512 and after > 0.8 * 512
    kept = a.vquantizer.embedding.weight.clone()
    stage_a.revive_codes(a, latents.detach(), torch.ones(512, dtype=torch.bool))
    assert_close(a.vquantizer.embedding.weight, kept)


def test_discriminator_sends_gradients():
    """The adversarial term adds its weight times the discriminator's gradient to the decoder's."""
    torch.manual_seed(0)
    a, images = shake(stage_a.StageA(TINY_A)), torch.rand(2, 3, 64, 64)
    drop = torch.zeros(2, dtype=torch.bool)
    judge = stage_a.PatchDiscriminator(8)
    weight = a.up_blocks[0][0].weight

    def gradient(discriminator):
        a.zero_grad()
        stage_a.loss(a, images, None, discriminator, drop).backward()
        return weight.grad.clone()
    without, with_judge = gradient(None), gradient(judge)
    a.zero_grad()
    (-judge(a.decode(a.quantize(a.encode(images))[0])).mean()).backward()
    assert_close(with_judge - without, TINY_A.adversarial_weight * weight.grad,
                 atol=1e-6, rtol=1e-2)
    assert weight.grad.abs().max() > 0


def test_hinge_loss():
    """Real logits above 1 and decoded ones below -1 cost nothing; 0 everywhere costs 1."""
    class Judge(nn.Module):
        def forward(self, images):
            return images.mean((1, 2, 3))
    real, fake = torch.full((2, 3, 4, 4), 2.0), torch.full((2, 3, 4, 4), -2.0)
    assert stage_a.discriminator_loss(Judge(), real, fake) == 0
    assert stage_a.discriminator_loss(Judge(), fake, real) == 3
    assert stage_a.discriminator_loss(Judge(), 0 * real, 0 * fake) == 1


def test_perceptual_network():
    """The VGG16 distance (random weights) is 0 for equal pictures and has gradients otherwise."""
    network = stage_a.VGG16Perceptual(weights=None)
    a, b = torch.rand(1, 3, 32, 32, requires_grad=True), torch.rand(1, 3, 32, 32)
    assert network(b, b) == 0
    network(a, b).backward()
    assert a.grad.abs().max() > 0
    assert stage_a.perceptual_network("none") is None


def test_standardise():
    """standardise and unstandardise are inverse and have the published constants."""
    a = stage_a.StageA(replace(TINY_A, latent_mean=0.0, latent_std=0.3764))
    assert_close(a.standardise(torch.tensor([0.3764])), torch.tensor([1.0]))
    with torch.device("meta"):
        compressor = semantic_compressor.SemanticCompressor(semantic_compressor.PRESETS["released"])
    z = torch.tensor([-1.0, 41.0])
    assert_close(compressor.standardise(z), torch.tensor([0.0, 1.0]))        # (z + 1) / 42
    assert_close(compressor.unstandardise(compressor.standardise(z)), z)
    assert stage_a.PRESETS["released"].latent_std == 0.3764
    images = torch.rand(16, 3, 32, 32)
    mean, std = stage_a.latent_scale(a, images)
    z = a.eval().encode(images)
    assert_close(torch.tensor([mean, std]), torch.stack([z.mean(), z.std()]).detach())


# ---- conditions of Stages B and C ----------------------------------------------------------------

def test_drop_and_noise():
    """5 % lose both, 5 % text, 5 % sem; 30 % of the rest are noised; zeros are zeros when raw."""
    torch.manual_seed(0)
    n = 20_000
    sem, text, null = torch.ones(n, 1, 1, 1), torch.ones(n, 1, 1), torch.zeros(1, 1, 1)
    out, words = stage_b.drop_and_noise(sem, text, null, stage_b.PRESETS["paper"])
    no_sem, no_text = (out == 0).flatten(), (words == 0).flatten()
    noised = ~no_sem & (out != 1).flatten()
    shares = [no_sem & no_text, no_text & ~no_sem, no_sem & ~no_text, noised, noised & no_text]
    assert_close(torch.tensor([share.float().mean() for share in shares]),
                 torch.tensor([0.05, 0.05, 0.05, 0.85 * 0.3, 0.0]), atol=0.006, rtol=0)
    clean = replace(stage_b.PRESETS["released"], noise_sem=0.0)
    out, _ = stage_b.drop_and_noise(sem, text, null, clean, mean=-1.0, std=42.0)
    assert set(out.unique().tolist()) == {0.0, 41.0}


def test_drop_text():
    """Each sample by itself gets the empty caption's tokens with the given rate."""
    torch.manual_seed(0)
    text, null = torch.ones(20_000, 2, 3), torch.zeros(1, 2, 3)
    out = stage_c.drop_text(text, null, 0.05)
    assert out.flatten(1).std(1).max() == 0                   # whole captions, never parts
    assert (out[:, 0, 0] == 0).float().mean().item() == pytest.approx(0.05, abs=0.006)


# ---- overfitting: the files' own loss ------------------------------------------------------------

def test_overfit_a():
    """Stage A reconstructs four pictures it trains on."""
    torch.manual_seed(0)
    # large patches of flat colour: what a two-stage encoder can learn in seconds
    images = torch.rand(4, 3, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3)
    model = stage_a.StageA(replace(TINY_A, widths=(16, 32), codebook_size=64))
    stage_a.revive_codes(model, model.encode(images).detach(), torch.zeros(64, dtype=torch.bool))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    first = last = None
    for _ in range(200):
        optimizer.zero_grad()
        record = {}
        stage_a.loss(model, images, record=record).backward()
        optimizer.step()
        first, last = first or record["mse"].item(), record["mse"].item()
    assert last < 0.01 < 10 * last < first, (first, last)


def test_overfit_c_two_captions():
    """After overfitting two captions, each samples its own x_0; swapped captions swap results."""
    torch.manual_seed(0)
    encoder = data.text_encoder("pocket")
    captions = ["a red star above a blue circle", "a blue circle above a red star"]
    text, null = encoder(captions), encoder([""])
    x_0 = torch.randn(2, 16, 3, 3)
    model = stage_c.StageC(replace(TINY_C, width=48))
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    for step in range(250):
        for group in optimizer.param_groups:
            group["lr"] = 4e-3 * min(1, (250 - step) / 125)
        optimizer.zero_grad()
        stage_c.loss(model, x_0.repeat(16, 1, 1, 1), text.repeat(16, 1, 1)).backward()
        optimizer.step()

    def draw(text):
        return stage_c.ddpm_sample(model.eval(), x_0.shape, text, null, steps=20, guidance=1,
                                   generator=sample.generators([3, 4]))
    for result, target in ((draw(text), x_0), (draw(text.flip(0)), x_0.flip(0))):
        right, wrong = (result - target).square().mean(), (result - target.flip(0)).square().mean()
        assert right < 0.3 and wrong > 3 * right, (right, wrong)


@pytest.mark.parametrize("head, cap, width, lr", [("released", 20.0, 16, 4e-3),
                                                  ("velocity", 1e4, 32, 8e-3)])
def test_overfit_b(head, cap, width, lr):
    """After overfitting two latents told apart by sem alone, each sem samples its own x_0."""
    torch.manual_seed(0)
    x_0 = torch.randn(2, 4, 4, 4).repeat_interleave(4, 2).repeat_interleave(4, 3)   # (2, 4, 16, 16)
    sem, text = torch.randn(2, 16, 3, 3), torch.zeros(2, *TEXT)
    model = stage_b.StageB(replace(TINY_B, widths=(width, 32, 32), cond_width=16, head=head,
                                   weight_cap=cap))
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    for step in range(250):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, (250 - step) / 125)
        optimizer.zero_grad()
        stage_b.loss(model, x_0.repeat(8, 1, 1, 1), sem.repeat(8, 1, 1, 1),
                     text.repeat(8, 1, 1)).backward()
        optimizer.step()

    def draw(sem):
        return stage_b.ddpm_sample(model.eval(), x_0.shape, sem, text, 0 * sem, text, guidance=1,
                                   generator=sample.generators([3, 4]))
    for result, target in ((draw(sem), x_0), (draw(sem.flip(0)), x_0.flip(0))):
        right, wrong = (result - target).square().mean(), (result - target.flip(0)).square().mean()
        assert right < 0.3 and wrong > 3 * right, (right, wrong)


# ---- copies and plumbing -------------------------------------------------------------------------

@pytest.mark.parametrize("name", [
    "alpha_bar", "draw_t", "diffuse", "randn", "LayerNorm2d", "TimestepBlock",
    "GlobalResponseNorm", "timestep_embedding", "Attention"])
def test_twins(name):
    """What stands in both stage_b.py and stage_c.py is the same to the letter."""
    assert inspect.getsource(getattr(stage_b, name)) == inspect.getsource(getattr(stage_c, name))


def test_stages_stand_alone():
    """Importing a stage imports torch alone: no data, no other stage, no open_clip."""
    for module in ("stage_a", "stage_b", "stage_c"):
        code = (f"import sys, {module}; print([m for m in sys.modules if m in ('data', 'sample', "
                "'open_clip', 'torchvision', 'semantic_compressor', 'plumbing') "
                "or m.startswith('stage_')])")
        assert command("-c", code).stdout.strip() == f"['{module}']"


def test_ema():
    """The average moves by 1 - min(limit, (1 + n) / (10 + n)); buffers are copied."""
    model, ema = nn.BatchNorm1d(1), nn.BatchNorm1d(1)
    with torch.no_grad():
        model.weight.fill_(2.0), model.running_mean.fill_(5.0), ema.weight.fill_(1.0)
    run.ema_update(ema, model, 0, 0.999)
    assert_close(ema.weight, torch.tensor([1.9]))             # decay 0.1
    assert ema.running_mean.item() == 5
    run.ema_update(ema, model, 10 ** 6, 0.999)
    assert_close(ema.weight, torch.tensor([1.9001]))


def test_learning_rate():
    """Linear warm-up, then constant, then (with a cooldown) linear decay to the last step."""
    config = replace(TINY_C, lr=1.0, warmup=10, steps=100, cooldown=0)
    assert [run.learning_rate(step, config) for step in (0, 9, 50, 99)] == [0.1, 1, 1, 1]
    config = replace(config, cooldown=50)
    assert [run.learning_rate(step, config) for step in (50, 75, 99)] == [1, 0.5, 0.02]


def test_nan_guard():
    """A step that is not finite is bad and counted; ten in a row end the run with a sentence."""
    guard = run.NanGuard()
    assert guard.is_bad(torch.tensor(float("nan")), 0) and not guard.is_bad(torch.tensor(1.0), 1)
    for step in range(9):
        assert guard.is_bad(torch.tensor(float("inf")), step)
    assert guard.skipped == 10
    with pytest.raises(SystemExit, match="10 times in a row"):
        guard.is_bad(torch.tensor(float("nan")), 9)


def test_loss_by_noise_level():
    """Errors fall into the right quarter of t, t = 1 into the last; an empty quarter is NaN."""
    record = [(torch.tensor([0.1, 0.25, 0.6]), torch.tensor([1.0, 3.0, 5.0])),
              (torch.tensor([1.0]), torch.tensor([7.0]))]
    levels = run.by_level(record)
    assert levels[0] == 2 and levels[2] == 5 and levels[3] == 7 and np.isnan(levels[1])


def test_checkpoint_errors(tmp_path):
    """Missing, damaged and mistaken checkpoints each give one sentence with the path."""
    with pytest.raises(run.CheckpointError, match="no such file"):
        stage_a.load(tmp_path / "none.pt")
    (tmp_path / "bad.pt").write_bytes(b"<html>not found</html>")
    with pytest.raises(run.CheckpointError, match="not a readable checkpoint"):
        stage_a.load(tmp_path / "bad.pt")
    run.save_checkpoint(tmp_path / "b.pt", dict(stage="B"))
    assert not list(tmp_path.glob("*.tmp"))
    with pytest.raises(run.CheckpointError,
                       match="found a checkpoint of 'B', expected one of stage 'A'"):
        stage_a.load(tmp_path / "b.pt")


# ---- training, resuming and sampling: the chain in small -----------------------------------------

@pytest.fixture(scope="module")
def drawings(tmp_path_factory):
    """24 drawings in tar shards."""
    folder = tmp_path_factory.mktemp("shards")
    command("data.py", "shapes", "--out", folder / "shapes", "--count", 24, "--workers", 1)
    return folder / "shapes"


@pytest.fixture(scope="module")
def chain(tmp_path_factory, drawings):
    """Folder of weights: A, B and C trained for four steps each, in this process."""
    folder = tmp_path_factory.mktemp("weights")
    a, b = folder / "stage_a/checkpoint.pt", folder / "stage_b/checkpoint.pt"
    stage_a.train(TINY_A, drawings, folder / "stage_a")
    stage_b.train(TINY_B, drawings, folder / "stage_b", a)
    stage_c.train(TINY_C, drawings, folder / "stage_c", a, b)
    return folder


def same(one, two, where):
    """Equal to the bit, whatever the nesting."""
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, two), where
    elif isinstance(one, dict):
        assert one.keys() == two.keys(), where
        for key in one:
            same(one[key], two[key], f"{where}.{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(two), where
        for index, pair in enumerate(zip(one, two)):
            same(*pair, f"{where}.{index}")
    else:
        assert one == two, where


def same_checkpoint(one, two):
    """Two checkpoints agree in all: weights, EMA, optimizers, random numbers, data position."""
    one, two = (torch.load(path, weights_only=True) for path in (one, two))
    same(one, two, "checkpoint")


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


def test_sigkill(chain, drawings, tmp_path):
    """A Stage C run killed with SIGKILL and started again equals one that was not, to the bit."""
    config = replace(TINY_C, steps=30, save_every=5)
    a, b = chain / "stage_a/checkpoint.pt", chain / "stage_b/checkpoint.pt"
    stage_c.train(config, drawings, tmp_path / "whole", a, b)
    arguments = ["stage_c.py", *flags(config, stage_c.PRESETS["pocket"]), "--data", drawings,
                 "--stage-a", a, "--stage-b", b, "--out", tmp_path / "killed"]
    process = subprocess.Popen([sys.executable, *map(str, arguments)], cwd=HERE,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    log = tmp_path / "killed/log.jsonl"
    while process.poll() is None and (not log.exists() or len(log.read_text().splitlines()) < 8):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    step = torch.load(tmp_path / "killed/checkpoint.pt", weights_only=True)["step"]
    assert 5 <= step < 30, "killed too late to test anything"
    done = command(*arguments)
    assert f"going on from {tmp_path}/killed/checkpoint.pt at step {step}" in done.stdout
    same_checkpoint(tmp_path / "killed/checkpoint.pt", tmp_path / "whole/checkpoint.pt")


KEYED = """
import itertools, json, sys, zlib
from dataclasses import replace
import torch, stage_c
steps, plain = itertools.count(1), stage_c.loss
def keyed(model, x_0, text, record=None):        # randomness by (step, sample), not by process
    step = next(steps)
    streams = [torch.Generator().manual_seed(zlib.crc32(row.numpy().tobytes()) + step)
               for row in x_0]
    t = torch.cat([torch.rand(1, generator=one) for one in streams])
    return plain(model, x_0, text, t, stage_c.randn(x_0.shape, streams), record=record)
stage_c.loss = keyed
stage_c.train(replace(stage_c.PRESETS["pocket"], **json.loads(sys.argv[1])), *sys.argv[2:])
"""


def test_two_processes_are_one_with_both_batches(chain, drawings, tmp_path):
    """torchrun with 2 x 2 images trains as one process with 4: same losses, same weights."""
    (tmp_path / "keyed.py").write_text(KEYED)
    weights = [str(chain / f"stage_{stage}/checkpoint.pt") for stage in "ab"]
    launchers = {1: [], 2: ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]}
    logs, states = [], []
    for world, launcher in launchers.items():
        config = {name: value for name, value in vars(replace(
            TINY_C, text_drop=0.0, batch_size=4 // world)).items()
            if value != getattr(stage_c.PRESETS["pocket"], name)}
        out = tmp_path / str(world)
        done = command(*launcher, tmp_path / "keyed.py", json.dumps(config), drawings, out,
                       *weights, env=dict(os.environ, PYTHONPATH=str(HERE), OMP_NUM_THREADS="1"))
        assert ("per process" in done.stdout) == (world == 2)
        logs.append([json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()])
        states.append(torch.load(out / "checkpoint.pt", weights_only=True))
    assert states[0]["position"] == states[1]["position"]
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
    with pytest.raises(SystemExit, match=r"--lr is 0.5, was 0.002"):
        stage_a.train(replace(TINY_A, lr=0.5), drawings, tmp_path)
    half = replace(TINY_A, steps=2, batch_size=TINY_A.batch_size // 2)
    with pytest.raises(SystemExit, match="--batch-size x accumulate is 2, was 4"):
        stage_a.train(half, drawings, tmp_path)
    stage_a.train(replace(half, accumulate=2), drawings, tmp_path)        # the same batch: allowed
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == 2


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


def test_settle():
    """settle() gives an averaged compressor statistics of its own: eval mode then standardises."""
    model = shake(semantic_compressor.SemanticCompressor(semantic_compressor.PRESETS["pocket"]))
    images = torch.rand(64, 3, 96, 96)
    before = model.eval()(images).detach()
    semantic_compressor.settle(model, images)
    mean, std = semantic_compressor.latent_scale(model, images)
    after = model(images).detach()
    assert abs(before.std() - 1) > 0.1 and abs(std - 1) < 0.05 and abs(mean) < 0.05
    assert not model.training
    assert_close(torch.tensor([mean, std]), torch.stack([after.mean(), after.std()]),
                 atol=1e-4, rtol=0)


def test_checkpoint_keeps_the_scale(chain):
    """A's and the compressor's measured (mean, std) are in the checkpoint and used by load()."""
    a = stage_a.load(chain / "stage_a/checkpoint.pt")
    assert a.config.latent_std != 1 and not a.training
    compressor = semantic_compressor.load(chain / "stage_b/checkpoint.pt")
    assert compressor.config.latent_std != 1
    assert not any("latent" in key for key in {**a.state_dict(), **compressor.state_dict()})


def test_sample_command_line(chain, tmp_path):
    """sample.py: one prompt at a non-square size -> a PNG of that size with its settings inside."""
    out = tmp_path / "one.png"
    command("sample.py", "a red star above a blue circle", "--weights", chain,
            "--size", "256x128", "--steps-c", 3, "--steps-b", 2, "--seed", 5, "--out", out)
    image = Image.open(out)
    assert image.size == (256, 128)
    about = json.loads(image.text["parameters"])
    assert about["prompts"] == ["a red star above a blue circle"]
    assert about["seed"] == 5 and about["steps_c"] == 3


def test_sample_in_process(chain, tmp_path, capsys):
    """--prompts, --n, --stages, --reconstruct and both starts each write their picture."""
    quick = ["--weights", str(chain), "--steps-c", "2", "--steps-b", "2",
             "--out", str(tmp_path / "x.png")]
    (tmp_path / "prompts.txt").write_text("a red star\n\na blue circle\n")
    sample.main(["--prompts", str(tmp_path / "prompts.txt"), "--n", "2",
                 "--start", "gaussian", *quick])
    assert Image.open(tmp_path / "x.png").size[0] == 2 * 132 + 4
    sample.main(["a red star", "--stages", *quick])
    Image.effect_noise((200, 130), 50).convert("RGB").save(tmp_path / "in.png")
    sample.main(["--reconstruct", str(tmp_path / "in.png"), *quick])
    assert "dB" in capsys.readouterr().out


def test_same_seed_same_picture(chain):
    """Picture i of a seed is the same alone and in a batch."""
    nets = sample.load_chain(*(chain / name / "checkpoint.pt"
                               for name in ("stage_a", "stage_b", "stage_c")))

    def draw(seeds):
        prompts = ["a red star"] * len(seeds)
        latents = sample.draw_latents(nets, prompts, seeds, 128, 128, steps=2)
        with torch.no_grad():
            return sample.draw_images(nets, latents, prompts, seeds, steps=2)
    assert_close(draw([3, 4, 5])[2:], draw([5]), atol=1e-3, rtol=1e-3)


def test_sample_refuses(chain, tmp_path):
    """Wrong sizes, missing weights and a C of another compressor are refused with a sentence."""
    with pytest.raises(Exception, match="1024x640 and 1024x768"):
        sample.read_size("1024x700")
    done = command("sample.py", "x", "--weights", tmp_path, check=False)
    assert done.returncode == 1 and "each with the checkpoint.pt" in done.stderr
    assert "Traceback" not in done.stderr
    state = torch.load(chain / "stage_c/checkpoint.pt", weights_only=True)
    run.save_checkpoint(tmp_path / "c.pt", dict(state, compressor="0"))
    with pytest.raises(run.CheckpointError, match="another compressor"):
        sample.load_chain(chain / "stage_a/checkpoint.pt", chain / "stage_b/checkpoint.pt",
                          tmp_path / "c.pt")


def test_small_weights(chain, tmp_path):
    """pocket/ship.py: three files that load as the checkpoints do, with their origin in them."""
    origin = ship.ship(sample.find(chain), tmp_path)
    before, after = (sample.load_chain(**sample.find(folder)) for folder in (chain, tmp_path))
    for part in ("a", "b", "c", "compressor"):
        one, two = getattr(before, part), getattr(after, part)
        assert one.config == two.config
        assert_close(one.state_dict(), two.state_dict(), rtol=1e-3, atol=1e-6)
    assert "--widths 8,16,16" in origin["b"]["command"] and origin["a"]["psnr_a"] > 0
    with safe_open(tmp_path / "stage_c.safetensors", "pt") as file:
        assert json.loads(file.metadata()["provenance"]) == origin["c"]
    with pytest.raises(run.CheckpointError, match="another Stage A"):
        sample.load_chain(chain / "stage_a/checkpoint.pt", tmp_path / "stage_b.safetensors")
    run.save_diffusers(tmp_path, {}, {"x": torch.zeros(1)})
    with pytest.raises(run.CheckpointError, match="not a readable checkpoint"):
        stage_c.load(tmp_path / "diffusion_pytorch_model.safetensors")


def test_missing_stage_is_explained(drawings, tmp_path):
    """Stage C without a Stage B checkpoint says what is needed and which command makes it."""
    done = command("stage_c.py", "--data", drawings, "--preset", "pocket",
                   "--stage-b", tmp_path / "b.pt", check=False)
    assert done.returncode == 1
    assert "Semantic Compressor" in done.stderr and "stage_b.py" in done.stderr


@pytest.mark.parametrize("file", ["stage_a.py", "stage_b.py", "stage_c.py", "sample.py"])
def test_help(file):
    """--help prints the docstring and every setting."""
    out = command(file, "--help").stdout
    assert ("Würstchen" in out) and ("--out" in out)


# ---- the paper's recipe: phases, ratios, interpolation, cached latents ---------------------------

@pytest.mark.parametrize("stage, phases", [
    (stage_a, {"paper": (500_000, 256, None)}),
    (stage_b, {"paper": (457_000, 512, 512), "paper-2": (300_000, 128, 1024)}),
    (stage_c, {"paper": (500_000, 1536, 512), "paper-2": (364_000, 1536, 1024),
               "paper-3": (4_000, 768, 1024), "paper-4": (50_000, 384, 1024)})])
def test_phases(stage, phases):
    """Each phase carries the numbers of E.1 to E.3: steps, batch and resolution."""
    for name, (steps, batch, size) in phases.items():
        config = stage.PRESETS[name]
        assert (config.steps, config.batch_size * config.accumulate) == (steps, batch)
        assert getattr(config, "image_size", None) == size and config.lr == 1e-4
        assert config.warmup < config.steps


def test_recipe_at_pocket_size(chain, drawings, tmp_path):
    """The paper's phases as commands, small: --init-from, three ratios, interpolation, a sample."""
    pocket = stage_c.PRESETS["pocket"]
    b = ["stage_b.py", *flags(replace(TINY_B, steps=2), stage_b.PRESETS["pocket"]), "--data",
         drawings, "--stage-a", chain / "stage_a/checkpoint.pt"]
    done = command(*b, "--image-size", 256, "--no-remember", "--init-from",
                   chain / "stage_b/checkpoint.pt", "--out", tmp_path / "stage_b")
    assert "a new run at step 0 with the weights of" in done.stdout
    assert "effective batch 4 x 1 accumulated x 1 process(es) = 4" in done.stdout
    weights = ["--stage-a", chain / "stage_a/checkpoint.pt",
               "--stage-b", tmp_path / "stage_b/checkpoint.pt"]
    c = ["stage_c.py", *flags(replace(TINY_C, steps=6, cooldown=0), pocket), "--data", drawings,
         *weights]
    command(*c, "--out", tmp_path / "c1")
    done = command(*c, "--init-from", tmp_path / "c1/checkpoint.pt", "--out", tmp_path / "c3",
                   "--no-remember", "--sizes", "96x160,160x96,96x96", "--accumulate", 2)
    assert "CPU process-hours" in done.stdout
    done = command(*c, "--init-from", tmp_path / "c3/checkpoint.pt", "--out", tmp_path / "c4",
                   "--min-size", 128, "--checkpoint-activations")
    runs = ",".join(str(tmp_path / name / "checkpoint.pt") for name in ("c3", "c4"))
    command("stage_c.py", "--interpolate", runs, "--out", tmp_path / "stage_c")
    one, two, middle = (torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)["ema"]
                        for name in ("c3", "c4", "stage_c"))
    for name, value in middle.items():
        assert_close(value, (one[name] + two[name]) / 2)
    assert not torch.equal(one["out.1.weight"], two["out.1.weight"])
    (tmp_path / "stage_a").symlink_to(chain / "stage_a")
    command("sample.py", "a red star", "--weights", tmp_path, "--steps-c", 2, "--steps-b", 2,
            "--size", "256x128", "--out", tmp_path / "out.png")
    assert Image.open(tmp_path / "out.png").size == (256, 128)
    done = command(*c, "--out", tmp_path / "stage_c", check=False)
    assert done.returncode == 1 and "cannot be continued" in done.stderr


def test_init_from_is_not_resuming(chain, drawings, tmp_path):
    """--init-from takes the weights and begins at step 0 with a new optimizer and schedule."""
    paths = [chain / "stage_a/checkpoint.pt", chain / "stage_b/checkpoint.pt"]
    stage_c.train(replace(TINY_C, steps=1, lr=0.0), drawings, tmp_path, *paths,
                  init_from=chain / "stage_c/checkpoint.pt")
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    before = torch.load(chain / "stage_c/checkpoint.pt", weights_only=True)
    same(state["model"], before["ema"], "model")
    assert state["step"] == 1 and state["optimizer"]["state"][0]["step"] == 1


def test_labels_of_drawings():
    """pocket/teach.py: each object is at the cell of its centre, two in one cell at two."""
    for index in range(200):
        scene = shapes.scene(index)
        answers, measures = teach.labels(scene)
        there = answers["there"].nonzero().flatten().tolist()
        assert len(there) == len(scene["objects"])
        homes = [int(thing["y"] * 3) * 3 + int(thing["x"] * 3) for thing in scene["objects"]]
        assert homes[0] in there and (homes[-1] in there or homes[0] == homes[-1])
        cell, thing = homes[0], scene["objects"][0]
        assert shapes.SHAPES[answers["shape"][cell]] == thing["shape"]
        assert list(shapes.COLOURS)[answers["colour"][cell]] == thing["colour"]
        assert abs((measures[cell, 0] / 3 + cell % 3 + 0.5) / 3 - thing["x"]) < 1e-5
        assert abs((measures[cell, 1] / 3 + cell // 3 + 0.5) / 3 - thing["y"]) < 1e-5
    # A head that says exactly what is there is right everywhere, one that errs in a shape is not.
    _, answers, measures = teach.batch(range(8), "train")
    scores = torch.cat([50 * nn.functional.one_hot(answers[name], len(teach.NAMES[name])).float()
                        for name in teach.NAMES] + [measures], dim=-1)
    latent = scores.transpose(1, 2).unflatten(2, (3, 3))
    value, right = teach.loss(torch.nn.Identity(), latent, answers, measures)
    assert value < 1e-3 and set(right.values()) == {1.0}
    answers["shape"] = (answers["shape"] + 1) % 6
    assert teach.loss(torch.nn.Identity(), latent, answers, measures)[1]["shape"] == 0


def test_taught_compressor(chain, drawings, tmp_path):
    """teach.py resumes exactly; with --compressor-share 0 Stage B leaves its result alone."""
    config = replace(TINY_B, steps=2, compressor_share=0.0)
    teach.teach(config, tmp_path / "whole")
    for steps in (1, 2):
        teach.teach(replace(config, steps=steps), tmp_path / "halves")
    whole, halves = (torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)
                     for name in ("whole", "halves"))
    same(whole["compressor_ema"], halves["compressor_ema"], "compressor")
    same(whole["ema"], halves["ema"], "the untrained Stage B")
    log = [json.loads(line) for line in open(tmp_path / "halves/log.jsonl")]
    assert [line["step"] for line in log] == [1, 2] and 0 <= log[1]["shape"] <= 1
    with pytest.raises(run.ConfigError, match="give the checkpoint with a trained one"):
        stage_b.train(config, drawings, tmp_path / "b", chain / "stage_a/checkpoint.pt")
    for remember in (True, False):
        stage_b.train(replace(config, steps=1, remember=remember), drawings,
                      tmp_path / f"b{remember}", chain / "stage_a/checkpoint.pt",
                      init_from=tmp_path / "whole/checkpoint.pt")
        state = torch.load(tmp_path / f"b{remember}/checkpoint.pt", weights_only=True)
        for name in ("compressor", "compressor_ema"):
            same(state[name], whole["compressor_ema"], name)
        assert not torch.equal(state["model"]["clf.1.weight"], whole["ema"]["clf.1.weight"])


def test_labels_of_captions():
    """pocket/teach_text.py: the left or upper object first, and only what the caption says."""
    scene = next(scene for scene in map(shapes.scene, range(1, 200, 2))
                 if scene["relation"] == "left of")
    answers = set()
    for number in range(60):
        caption = shapes.caption(scene, np.random.RandomState(number))
        said = {name: teach_text.NAMES[name][index]
                for name, index in teach_text.labels(scene, caption).items()}
        for i, thing in enumerate(scene["objects"], 1):
            assert (said[f"colour {i}"], said[f"shape {i}"]) == (thing["colour"], thing["shape"])
            assert said[f"size {i}"] in (None, thing["size"])
        assert (said["background"] is None) == (scene["background"] not in caption)
        assert said["axis"] == "across" and said["place"] is None
        answers.add((said["background"], said["size 1"], said["size 2"]))
    assert len(answers) > 3
    turned = dict(scene, relation="right of", objects=scene["objects"][::-1])
    assert teach_text.labels(turned, caption) == teach_text.labels(scene, caption)
    one = next(scene for scene in map(shapes.scene, range(0, 200, 2))
               if scene["objects"][0]["place"] == "top")
    labels = teach_text.labels(one, "a thing at the top")
    assert labels["place"] == 3 and labels["axis"] == labels["colour 2"] == labels["size 1"] == 0
    assert teach_text.labels(one, "a thing")["place"] == 0
    # A head that says exactly what is said is right everywhere, one that errs in a shape is not.
    _, answers = teach_text.batch(range(8), "train")
    scores = torch.cat([50 * nn.functional.one_hot(answers[name], len(values)).float()
                        for name, values in teach_text.NAMES.items()], dim=-1)
    value, right = teach_text.loss(torch.nn.Identity(), scores, answers)
    assert value < 1e-3 and set(right.values()) == {1.0}
    answers["shape 1"] = (answers["shape 1"] + 1) % 7
    assert teach_text.loss(torch.nn.Identity(), scores, answers)[1]["shape 1"] == 0


def test_taught_text_tower(tmp_path, monkeypatch):
    """teach_text.py resumes exactly, moves the layers alone, and data.py reads what it wrote."""
    config = replace(teach_text.CONFIG, steps=2, batch_size=4, cooldown=0)
    teach_text.teach(config, tmp_path / "whole")
    for steps in (1, 2):
        teach_text.teach(replace(config, steps=steps), tmp_path / "halves")
    whole, halves = (torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)
                     for name in ("whole", "halves"))
    same(whole["layers_ema"], halves["layers_ema"], "layers")
    log = [json.loads(line) for line in open(tmp_path / "halves/log.jsonl")]
    assert [line["step"] for line in log] == [1, 2] and 0 <= log[1]["shape 1"] <= 1
    monkeypatch.setattr(data, "POCKET_TEXT", str(tmp_path / "none"))
    untaught = data.text_encoder("pocket").tower.state_dict()
    monkeypatch.setattr(data, "POCKET_TEXT", str(tmp_path / "whole/text.safetensors"))
    for name, value in data.text_encoder("pocket").tower.state_dict().items():
        layer = name.removeprefix("transformer.")
        expected = whole["layers_ema"][layer].half() if layer != name else untaught[name]
        assert torch.equal(value, expected.float()), name
        if layer != name and value.dim() == 2:
            assert not torch.equal(value, untaught[name]), name


def test_unknown_names_are_refused(chain, drawings, tmp_path):
    """A name that Stage B does not know is refused with those that it knows."""
    for name, known in (("head", "released or velocity"), ("condition", "raw or standardised"),
                        ("compressor", "paper, released, pocket")):
        with pytest.raises(run.ConfigError, match=f"--{name} other: expected .*{known}"):
            stage_b.train(replace(TINY_B, **{name: "other"}), drawings, tmp_path / "b",
                          chain / "stage_a/checkpoint.pt")


def test_one_ratio_for_each_batch(shards):
    """Of several crops each batch has one; all are drawn equally often, and the same ones again."""
    sizes = [(24, 40), (40, 24), (24, 24)]
    dataset = data.CaptionedImages(shards, resize=24, crop=sizes, seed=3)
    shapes_ = [tuple(batch["images"].shape[2:]) for batch in take(data.stream(dataset, 3), 150)]
    assert set(shapes_) == set(sizes)
    assert all(30 < shapes_.count(size) < 70 for size in sizes)
    later = take(data.stream(dataset, 3, position=(1, 3)), 3)            # after five batches
    assert [tuple(batch["images"].shape[2:]) for batch in later] == shapes_[5:8]


@pytest.mark.parametrize("module, config", [(stage_b, TINY_B), (stage_c, TINY_C)])
def test_checkpointed_activations(module, config):
    """--checkpoint-activations changes no gradient."""
    gradients = []
    for on in (False, True):
        torch.manual_seed(0)
        model = (stage_b.StageB if module is stage_b else stage_c.StageC)(
            replace(config, checkpoint_activations=on))
        shake(model).train()
        sem = (torch.randn(2, 16, 3, 3),) if module is stage_b else ()
        x_0 = torch.randn(2, 4, 32, 32) if sem else torch.randn(2, 16, 3, 3)
        module.loss(model, x_0, *sem, torch.randn(2, *TEXT)).backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(*pair) for pair in zip(*gradients))


def test_filters(tmp_path):
    """Filters keep what is on the bound; a missing or null field counts only if it is asked for."""
    def meta(**fields):
        return {"original_width": 600, "original_height": 512, **fields}
    facts = [meta(aesthetic=6.0), meta(AESTHETIC_SCORE=5.0, pwatermark=0.9), meta(aesthetic=4.9),
             meta(aesthetic=None, AESTHETIC_SCORE=5.5), meta(aesthetic=None), {"aesthetic": 7}]
    make_tar(tmp_path / "0.tar", [part for i, fact in enumerate(facts) for part in (
        (f"{i}.png", encoded()), (f"{i}.txt", b"x"), (f"{i}.json", json.dumps(fact).encode()))])

    def keys(**given):
        config = replace(TINY_C, **given)
        found = data.CaptionedImages(tmp_path, filters=data.filters(config), report=False)
        return "".join(found.key(i) for i in range(len(found))), found.counts()
    assert keys() == ("012345", {})
    assert keys(min_aesthetic=5.0) == ("0135", {"aesthetic below 5.0": 1, "no aesthetic": 1})
    assert keys(min_size=512) == ("01234", {"no size": 1})
    assert keys(max_pwatermark=0.9) == ("1", {"no pwatermark": 5})
    with pytest.raises(data.DataError, match="no sample passes the filters; found 6 x no punsafe"):
        keys(max_punsafe=0.5)


def test_look_counts_duplicates(tmp_path, capsys):
    """`look` counts images that are there again, by sha256 or hash."""
    make_tar(tmp_path / "0.tar", [part for i, name in enumerate("aabca") for part in (
        (f"{i}.png", encoded()), (f"{i}.txt", b"x"), (f"{i}.json", b'{"sha256": "%s"}' %
                                                      name.encode()))])
    data.look(tmp_path, tmp_path / "look.png")
    assert "3 different images, 2 are there again" in capsys.readouterr().out


def test_cached_latents(chain, drawings, tmp_path):
    """Trained from cached latents, Stage C has the losses it has from images, sample by sample."""
    a, b = chain / "stage_a/checkpoint.pt", chain / "stage_b/checkpoint.pt"
    arguments = ("semantic_compressor.py", "--data", drawings, "--weights", b, "--out",
                 tmp_path / "latents")
    command(*arguments)
    dataset, images = data.CaptionedLatents(tmp_path / "latents"), data.CaptionedImages(drawings)
    assert len(dataset) == len(images) and dataset[0]["image"].dtype == torch.float16
    assert dataset.caption(3) == images.caption(3)
    assert dataset.meta(3) == {**images.meta(3), "source": images.key(3)}
    for source, out in ((drawings, "one"), (tmp_path / "latents", "two")):
        stage_c.train(TINY_C, source, tmp_path / out, a, b)
    one, two = ([json.loads(line)["loss"] for line in (tmp_path / out / "log.jsonl").open()]
                for out in ("one", "two"))
    assert len(one) == 4 and one == two
    # stopped and started again: the missing shard is made, the others are left as they are
    shards = sorted((tmp_path / "latents").glob("*.tar"))
    before = shards[0].read_bytes()
    shards[0].unlink()
    command(*arguments)
    assert shards[0].read_bytes() == before
    state = torch.load(b, weights_only=True)
    state["compressor_ema"]["mapper.0.weight"] *= 1.01
    run.save_checkpoint(tmp_path / "b.pt", state)
    done = command(*arguments[:4], tmp_path / "b.pt", *arguments[5:], check=False)
    assert done.returncode == 1 and "made with another compressor" in done.stderr
    with pytest.raises(data.DataError, match="latents of another compressor"):
        semantic_compressor.cached(tmp_path / "latents",
                                   semantic_compressor.load(tmp_path / "b.pt"))


# ---- data.py: making sources ---------------------------------------------------------------------

def encoded(size=(40, 30), colour=(200, 30, 40), mode="RGB", form="PNG", **options):
    file = io.BytesIO()
    Image.new("RGB", size, colour).convert(mode).save(file, form, **options)
    return file.getvalue()


def make_tar(path, members):
    """members: [(name, bytes)], in this order, names may repeat."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def members_of(n, start=0, suffix="png", **options):
    for i in range(start, start + n):
        yield f"{i:09d}.{suffix}", encoded(colour=(i % 256, 30, 40), **options)
        yield f"{i:09d}.txt", f"number {i}".encode()
        yield f"{i:09d}.json", json.dumps({"n": i}).encode()


def take(stream, n):
    return list(itertools.islice(stream, n))


@pytest.fixture
def shards(tmp_path):
    """Three shards of 5, 4 and 3 samples of 30 x 40 pixels."""
    for number, (start, n) in enumerate([(0, 5), (5, 4), (9, 3)]):
        make_tar(tmp_path / "shards" / f"{number:05d}.tar", members_of(n, start))
    return tmp_path / "shards"


# ---- sources -------------------------------------------------------------------------------------

def test_sources_of_tars(shards):
    """Folder, brace pattern, glob and single tar name the same samples, in the same order."""
    folder = data.CaptionedImages(shards)
    assert len(folder) == 12
    for source in (f"{shards}/{{00000..00002}}.tar", f"{shards}/*.tar",
                   f"{shards}/0000{{0,1,2}}.tar"):
        other = data.CaptionedImages(source)
        assert [other.key(i) for i in range(12)] == [folder.key(i) for i in range(12)]
    assert len(data.CaptionedImages(shards / "00001.tar")) == 4
    sample = folder[7]
    assert (sample["key"], sample["caption"], sample["meta"]) == ("000000007", "number 7", {"n": 7})
    assert sample["image"].shape == (3, 30, 40) and sample["image"].dtype == torch.uint8
    assert sample["image"][0, 0, 0] == 7


def test_missing_shards_are_counted(shards):
    """Gaps in the numbers of a brace pattern are counted; no shard at all is an error."""
    found = data.CaptionedImages(f"{shards}/{{00000..00005}}.tar")
    assert len(found) == 12 and found.counts() == {"missing shard": 3}
    with pytest.raises(data.DataError, match="nowhere.*missing shard.*expected"):
        data.CaptionedImages("nowhere/{0..3}.tar")


def test_keys_and_suffixes(tmp_path):
    """Key up to the first dot with its folder, suffix lower-cased, ._ and __x__ members passed."""
    make_tar(tmp_path / "a.tar", [
        ("./one/img.v2.JPG", encoded(form="JPEG")), ("./one/img.txt", b"first"),
        ("two/img.Webp", encoded(form="WEBP")), ("two/img.TXT", b"second"),
        ("two/img.mask.png", encoded()), ("two/._img.webp", b"mac"), ("__meta__", b"x"),
        ("__MACOSX/._b.jpg", b"mac"), ("three.JPEG", encoded(form="JPEG")), ("three.txt", b"third"),
    ])
    found = data.CaptionedImages(tmp_path)
    assert [found.key(i) for i in range(3)] == ["one/img", "two/img", "three"]
    assert [found.caption(i) for i in range(3)] == ["first", "second", "third"]
    assert found.counts() == {"duplicate member": 1} and len(found) == 3
    assert all("failed" not in found[i] for i in range(3))  # img.webp, not img.mask.png


def test_interleaved_and_duplicate_members(tmp_path):
    """Members of a sample may stand anywhere in the tar; a duplicate is counted, the first kept."""
    members = list(members_of(4))
    shuffled = [members[i] for i in np.random.RandomState(0).permutation(len(members))]
    make_tar(tmp_path / "a.tar", shuffled + [("000000001.txt", b"again")])
    found = data.CaptionedImages(tmp_path)
    texts = {found.key(i): found.caption(i) for i in range(len(found))}
    assert texts == {f"{i:09d}": f"number {i}" for i in range(4)}
    assert found.counts() == {"duplicate member": 1}


def test_folder_of_images(tmp_path):
    """A plain folder pairs NAME.jpg with NAME.txt, dots in names and sub-folders included."""
    (tmp_path / "sub").mkdir()
    for name in ("a.png", "b 2024.01.02.png", "b 2024.01.03.PNG", "sub/c.png", "lonely.png"):
        (tmp_path / name).write_bytes(encoded())
        if name != "lonely.png":
            (tmp_path / name).with_suffix(".txt").write_text(f"caption of {name}\n")
    found = data.CaptionedImages(tmp_path)
    keys = [found.key(i) for i in range(len(found))]
    assert keys == ["a", "b 2024.01.02", "b 2024.01.03", "sub/c"]
    assert found[2]["caption"] == "caption of b 2024.01.03.PNG"
    assert found[0]["image"].shape == (3, 30, 40)
    assert found.counts() == {"no caption": 1} and "lonely" in found.describe()


def test_folder_with_metadata_jsonl(tmp_path, capfd):
    """metadata.jsonl gives captions and extras; broken lines and missing images are counted."""
    for name in ("a.png", "b.png", "d.png", "not_listed.png"):
        (tmp_path / name).write_bytes(encoded())
    lines = ['{"file_name": "a.png", "text": "an a", "score": 3}',
             '{"file_name": "b.png", "text": "ä b"}', "", "{broken",
             '{"file_name": "c.png", "text": "c"}', '{"file_name": "d.png", "label": "d"}']
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
    found = data.CaptionedImages(tmp_path)
    assert [found.caption(i) for i in range(2)] == ["an a", "ä b"]
    assert found[0]["meta"]["score"] == 3
    assert found.counts() == {"unreadable line of metadata.jsonl": 1, "no image": 1,
                              "not in metadata.jsonl": 1}
    assert found[2]["failed"].startswith("no caption")
    assert "line 4" in capfd.readouterr().err


def test_unusable_sources(tmp_path):
    """Nothing usable, or mostly unusable: one sentence with path, found, expected."""
    (tmp_path / "empty").mkdir()
    make_tar(tmp_path / "texts" / "0.tar", [("a.txt", b"only a caption"), ("b.txt", b"b")])
    make_tar(tmp_path / "most" / "0.tar",
             [*members_of(2), ("x.png", b"1"), ("y.png", b"1"), ("z.png", b"1")])
    for name, reason in (("empty", "nothing"), ("texts", "2 x no image"),
                         ("most", "3 of the first 5"), ("gone", "missing shard")):
        with pytest.raises(data.DataError, match=rf"{name}.*{reason}.*expected"):
            data.CaptionedImages(tmp_path / name)


# ---- damaged tars --------------------------------------------------------------------------------

def damaged(path, how):
    content = bytearray(path.read_bytes())
    with tarfile.open(path) as archive:
        places = {member.name: member for member in archive}
    if how == "truncated":
        content = content[:places["000000005.png"].offset_data + 10]
    elif how in ("header", "last header"):
        offset = places["000000003.txt" if how == "header" else "000000009.json"].offset
        content[offset:offset + 512] = b"\xff" * 512
    elif how == "payload":
        member = places["000000003.png"]
        content[member.offset_data:member.offset_data + member.size] = b"\x55" * member.size
    elif how == "no end":
        last = places["000000009.json"]
        content = content[:last.offset_data + last.size]
    elif how == "empty":
        content = b""
    elif how == "html":
        content = b"<!DOCTYPE html><p>404 Not Found</p>" * 100
    path.write_bytes(content)


@pytest.mark.parametrize("how, usable, reason", [
    ("truncated", 5, "cut off"), ("header", 9, "damaged header"),
    ("last header", 10, "damaged header"), ("payload", 10, None),
    ("no end", 10, "no end mark"), ("empty", 0, "empty file"), ("html", 0, "not a tar")])
def test_damaged_tars(tmp_path, how, usable, reason):
    """Everything readable in a damaged tar is read, and the rest is counted and named."""
    damaged(make_tar(tmp_path / "00000.tar", members_of(10)), how)
    make_tar(tmp_path / "00001.tar", members_of(10, 10))
    found = data.CaptionedImages(tmp_path)
    assert len(found) == usable + 10
    assert (reason in found.counts()) if reason else not found.counts()
    assert not reason or "00000.tar" in found.describe()
    bad = [found[i] for i in range(len(found)) if "failed" in found[i]]
    assert [sample["key"] for sample in bad] == (["000000003"] if how == "payload" else [])
    again = data.CaptionedImages(tmp_path)  # from the cached index
    assert again.counts() == found.counts() and len(again) == len(found)


def test_damaged_extended_header(tmp_path):
    """A tar with long names loses only the samples whose headers are damaged."""
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        for name, content in members_of(6):
            member = tarfile.TarInfo("ü" * 120 + "/" + name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    with tarfile.open(path) as archive:
        offset = archive.getmember("ü" * 120 + "/000000002.png").offset_data - 512
    content = bytearray(path.read_bytes())
    content[offset:offset + 512] = b"\xff" * 512
    path.write_bytes(content)
    found = data.CaptionedImages(tmp_path)
    assert len(found) == 5 and found.counts()["damaged header"] >= 1
    assert found.key(0).endswith("ü/000000000")


def test_index_is_cached_and_renewed(shards, tmp_path, monkeypatch):
    """The index is cached by size and mtime, beside the shards or else in the cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    data.CaptionedImages(shards)
    assert len(list((shards / ".index").iterdir())) == 3
    with monkeypatch.context() as patch:
        patch.setattr(data, "scan_tar", None)  # would fail if it were called
        assert len(data.CaptionedImages(shards)) == 12
    make_tar(shards / "00002.tar", members_of(7, 9))
    assert len(data.CaptionedImages(shards)) == 16
    for file in (shards / ".index").iterdir():
        file.unlink()
    (shards / ".index").rmdir()
    (shards / ".index").write_text("in the way, like a read-only folder")
    assert len(data.CaptionedImages(shards)) == 16
    assert len(list((tmp_path / "cache").rglob("*.json"))) == 3


# ---- decoding ------------------------------------------------------------------------------------

def png16(values):
    file = io.BytesIO()
    Image.fromarray(np.asarray(values, dtype=np.uint16)).save(file, "PNG")
    return file.getvalue()


def with_alpha(mode, form, colour=(255, 0, 0), alpha=0, **options):
    file = io.BytesIO()
    Image.new("RGBA", (8, 8), (*colour, alpha)).convert(mode).save(file, form, **options)
    return file.getvalue()


@pytest.mark.parametrize("content, expected", [
    (encoded(mode="L", colour=(90, 90, 90)), (90, 90, 90)),
    (encoded(mode="1", colour=(255, 255, 255)), (255, 255, 255)),
    (encoded(mode="P", colour=(255, 0, 0)), (255, 0, 0)),
    (encoded(mode="CMYK", form="JPEG", colour=(0, 255, 255)), (0, 255, 255)),
    (with_alpha("RGBA", "PNG"), (255, 255, 255)),
    (with_alpha("RGBA", "WEBP", lossless=True), (255, 255, 255)),
    (with_alpha("RGBA", "PNG", alpha=128), (255, 127, 127)),
    (with_alpha("LA", "PNG"), (255, 255, 255)),
    (with_alpha("P", "PNG", transparency=0), (255, 255, 255)),
    (encoded(transparency=(200, 30, 40)), (255, 255, 255)),
    (png16(np.full((4, 4), 128 * 257)), (128, 128, 128)),
    (png16(np.full((4, 4), 65535)), (255, 255, 255)),
], ids=["grey", "1 bit", "palette", "CMYK", "RGBA png", "RGBA webp", "half transparent", "LA",
        "transparent palette", "key colour", "16 bits", "16 bits white"])
def test_image_modes(content, expected):
    """Grey, 1-bit, palette, CMYK, alpha on white, key colours and 16 bits become right RGB."""
    image = data.decode(content)
    assert image.mode == "RGB"
    assert np.abs(np.asarray(image)[2, 2].astype(int) - expected).max() <= 2


def test_exif_orientation():
    """A photograph taken with the camera turned comes out upright."""
    exif = Image.Exif()
    exif[0x0112] = 6
    image = data.decode(encoded(size=(40, 30), form="JPEG", exif=exif))
    assert image.size == (30, 40)


def test_jpeg_draft_mode_changes_little():
    """A large JPEG, decoded at a coarser scale, gives nearly the same small image."""
    x = np.linspace(0, 6 * np.pi, 1024)
    waves = (127 + 120 * np.sin(x)[:, None] * np.cos(x)[None, :]).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(waves).convert("RGB").save(file, "JPEG", quality=95)
    assert data.decode(file.getvalue(), 64).size == (128, 128)
    small = data.fit(data.decode(file.getvalue(), 64), 64)
    full = data.fit(data.decode(file.getvalue()), 64)
    assert np.abs(np.asarray(small).astype(int) - np.asarray(full)).mean() < 1


def test_undecodable_images(tmp_path, monkeypatch):
    """Truncated, oversized, huge and wrong files are failed samples with a reason."""
    (tmp_path / "bomb.png").write_bytes(encoded(size=(300, 300)))
    (tmp_path / "cut.jpg").write_bytes(encoded(form="JPEG", size=(200, 200))[:800])
    (tmp_path / "text.png").write_bytes(b"not an image")
    (tmp_path / "cutpng.png").write_bytes(encoded(size=(30, 30))[:70])
    for name in ("bomb", "cut", "text", "cutpng"):
        (tmp_path / f"{name}.txt").write_text(name)
    monkeypatch.setattr(data, "MAX_PIXELS", 299 * 299)
    found = data.CaptionedImages(tmp_path, report=False)
    (tmp_path / "text.png").rename(tmp_path / "moved")
    assert found[3]["failed"].startswith("cannot be read")
    (tmp_path / "moved").rename(tmp_path / "text.png")
    reasons = {found.key(i): found[i]["failed"].split(":")[0] for i in range(4)}
    assert reasons == {"bomb": "too many pixels", "cut": "cannot be decoded",
                       "cutpng": "cannot be decoded", "text": "cannot be decoded"}


def test_resize_and_crop(tmp_path):
    """The shorter side becomes `resize`; every crop fits, also of images that are too small."""
    for name, size in (("wide", (200, 50)), ("tiny", (9, 7))):
        (tmp_path / f"{name}.png").write_bytes(encoded(size=size))
        (tmp_path / f"{name}.txt").write_text(name)

    def shape(**options):
        found = data.CaptionedImages(tmp_path, **options)
        return [tuple(found[i]["image"].shape[1:]) for i in (0, 1)]
    assert shape() == [(7, 9), (50, 200)]
    assert shape(resize=32) == [(32, 41), (32, 128)]
    assert shape(resize=32, crop=32) == [(32, 32)] * 2
    assert shape(crop=(64, 96)) == [(64, 96)] * 2


def test_crops_are_seeded(tmp_path):
    """A crop follows from (seed, epoch, index) alone; center=True takes the middle."""
    file = io.BytesIO()
    pixels = np.arange(100 * 100 * 3).reshape(100, 100, 3).astype(np.uint8)
    Image.fromarray(pixels).save(file, "PNG")
    (tmp_path / "a.png").write_bytes(file.getvalue())
    (tmp_path / "a.txt").write_text("a")

    def crop(where, **options):
        return data.CaptionedImages(tmp_path, crop=20, **options)[where]["image"]
    torch.testing.assert_close(crop((3, 0)), crop((3, 0)), rtol=0, atol=0)
    assert not torch.equal(crop((3, 0)), crop((4, 0)))
    assert not torch.equal(crop((3, 0)), crop((3, 0), seed=1))
    whole = data.CaptionedImages(tmp_path)[0]["image"]
    torch.testing.assert_close(crop(0, center=True), whole[:, 40:60, 40:60], rtol=0, atol=0)


# ---- batches -------------------------------------------------------------------------------------

@pytest.mark.parametrize("workers", [0, 2])
def test_each_sample_once_per_epoch(tmp_path, workers):
    """With fewer shards than workers too, an epoch has every sample exactly once, shuffled."""
    make_tar(tmp_path / "0.tar", members_of(12))
    batches = take(data.stream(data.CaptionedImages(tmp_path), 4, workers=workers), 6)
    epochs = [sum((batch["indices"] for batch in batches[i:i + 3]), []) for i in (0, 3)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(12))
    assert epochs[0] != epochs[1] and epochs[0] != list(range(12))
    images = batches[0]["images"]
    assert images.shape == (4, 3, 30, 40) and images.dtype == torch.float32 and images.max() <= 1
    for batch in batches:  # images, captions and keys belong together
        assert batch["captions"] == [f"number {i}" for i in batch["indices"]]
        torch.testing.assert_close(batch["images"][:, 0, 0, 0] * 255,
                                   torch.tensor(batch["indices"]).float())


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_across_an_epoch_border(shards, workers):
    """A stream begun at a position gives exactly the batches that would have followed."""
    dataset = data.CaptionedImages(shards, crop=16, seed=3)
    whole = take(data.stream(dataset, 5, seed=7), 8)
    assert [batch["position"] for batch in whole[:3]] == [(0, 5), (0, 10), (1, 3)]
    for stopped in (1, 2, 4):
        rest = take(data.stream(dataset, 5, seed=7, position=whole[stopped]["position"],
                                workers=workers), 3)
        for one, other in zip(whole[stopped + 1:], rest):
            assert one["keys"] == other["keys"] and one["position"] == other["position"]
            torch.testing.assert_close(one["images"], other["images"], rtol=0, atol=0)


def test_batch_larger_than_dataset(shards):
    """A batch of more samples than there are takes them from several epochs."""
    batch = next(data.stream(data.CaptionedImages(shards), 30))
    assert len(batch["keys"]) == 30 and batch["position"] == (2, 6)
    assert min(np.bincount(batch["indices"])) == 2


def test_ranks_share_the_global_batch(shards):
    """Two ranks with batch 3 see the two halves of what one rank with batch 6 sees."""
    dataset = data.CaptionedImages(shards)
    one = take(data.stream(dataset, 6, seed=1), 5)
    two = [take(data.stream(dataset, 3, seed=1, rank=rank, world=2), 5) for rank in (0, 1)]
    for whole, left, right in zip(one, *two):
        assert whole["indices"] == left["indices"] + right["indices"]
        assert not set(left["keys"]) & set(right["keys"])
        assert whole["position"] == left["position"] == right["position"]


def test_global_random_state_is_left_alone(shards):
    """Streaming draws nothing from the random streams that the model uses."""
    torch.manual_seed(5)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    take(data.stream(data.CaptionedImages(shards, crop=16), 5, workers=1), 2)
    data.text_encoder()
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])


def test_failed_image_leaves_its_batch_smaller(tmp_path, capfd):
    """A bad image is left out, counted and named once, and shifts no other sample."""
    members = dict(members_of(8))
    members["000000003.png"] = b"broken"
    make_tar(tmp_path / "0.tar", members.items())
    batches = take(data.stream(data.CaptionedImages(tmp_path), 4), 6)
    sizes = [len(batch["keys"]) for batch in batches]
    assert [sum(sizes[i:i + 2]) for i in (0, 2, 4)] == [7, 7, 7]
    assert all(batch["images"].shape[0] == len(batch["captions"]) for batch in batches)
    failed = sum((batch["failed"] for batch in batches), [])
    assert [key for key, _ in failed] == ["000000003"] * 3 and "decoded" in failed[0][1]
    assert capfd.readouterr().err.count("000000003") == 1
    order = data.EpochBatches(8, 4)
    assert [i for i in order.order(0) if i != 3] == batches[0]["indices"] + batches[1]["indices"]


@pytest.mark.parametrize("workers", [0, 1])
def test_mostly_broken_images_stop_the_run(tmp_path, workers):
    """More than half unreadable stops with a sentence, instead of turning for ever."""
    members = dict(members_of(9))
    members.update({f"{i:09d}.png": b"broken" for i in range(5)})
    make_tar(tmp_path / "0.tar", members.items())
    with pytest.raises(data.DataError, match="of .* samples cannot be used .*cannot be decoded"):
        take(data.stream(data.CaptionedImages(tmp_path), 2, workers=workers), 10)


def test_different_sizes_need_a_crop(tmp_path):
    """Images of different sizes cannot be stacked, and the error says what to give."""
    make_tar(tmp_path / "0.tar", [*members_of(2), *members_of(2, 2, size=(20, 20))])
    with pytest.raises(data.DataError, match="give a crop"):
        next(data.stream(data.CaptionedImages(tmp_path), 4))


@pytest.mark.parametrize("workers", [0, 2])
def test_memory_equals_encoding_directly(tmp_path, workers):
    """remember() keeps what encode gives, in float16; streaming it is streaming the dataset."""
    members = dict(members_of(11))
    members["000000004.png"] = b"broken"
    make_tar(tmp_path / "0.tar", members.items())
    dataset = data.CaptionedImages(tmp_path)

    def encode(batch):
        return batch["images"].mean(dim=(2, 3)), torch.tensor(batch["indices"])

    memory = data.remember(dataset, encode, batch_size=4, workers=workers)
    assert len(memory) == 11 and memory.tensors[0].dtype == torch.float16
    for direct, kept in zip(take(data.stream(dataset, 4, seed=2), 6),
                            take(data.stream(memory, 4, seed=2, workers=workers), 6)):
        for name in ("keys", "captions", "indices", "position", "failed"):
            assert direct[name] == kept[name], name
        means, indices = kept["remembered"]
        assert means.dtype == torch.float32 and indices.tolist() == kept["indices"]
        torch.testing.assert_close(means, encode(direct)[0], rtol=1e-3, atol=1e-3)


def test_memory_refuses_what_float16_cannot_hold(shards):
    """Numbers beyond float16 are refused, not kept as infinity."""
    with pytest.raises(data.DataError, match="float16"):
        data.remember(data.CaptionedImages(shards), lambda batch: (batch["images"] * 1e6,))


# ---- text encoder --------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def encoder():
    return data.text_encoder("pocket")


def test_pocket_text_encoder(encoder):
    """24 un-pooled tokens; word order matters; '' works; alone or in a batch is the same."""
    captions = ["red star blue circle", "blue star red circle", "",
                "a red star above a blue circle"]
    tokens = encoder(captions)
    assert tokens.shape == (4, encoder.length, encoder.width) == (4, 24, 128)
    assert tokens.dtype == torch.float32 and not tokens.requires_grad
    changed = (tokens[0] - tokens[1]).abs().amax(dim=1)
    assert changed[0] == 0 and (changed[1:] > 1e-3).all()  # the start token, then all others
    assert not torch.allclose(tokens[2], tokens[3])
    for i, caption in enumerate(captions):
        torch.testing.assert_close(encoder([caption])[0], tokens[i], rtol=1e-4, atol=1e-5)


def test_pocket_text_encoder_is_the_same_everywhere(encoder, monkeypatch):
    """A known checksum, whatever was drawn before; without the taught layers, another one."""
    assert encoder.checksum == "a4876a0582811a9a19ce027954e69b5719db6b3e067912b963b7b58f876611ea"
    assert not any(p.requires_grad for p in encoder.parameters()) and not encoder.train().training
    monkeypatch.setattr(data, "POCKET_TEXT", "none")
    untaught = "9951c320d90751f38e777c6775c2a6870657b5b6183a86ec761edad8e65721ff"
    assert data.text_encoder("pocket").checksum == untaught


def test_pocket_text_encoder_knows_word_order(encoder):
    """Two captions of one picture are nearer to each other than either to that of its mirror."""
    right = 0
    for index in range(1, 200, 2):
        scene = shapes.scene(index)
        mirror = dict(scene, relation=shapes.RELATIONS[scene["relation"]])
        captions = [shapes.caption(one, np.random.RandomState(i))
                    for i, one in enumerate((scene, scene, mirror))]
        one, other, mirrored = teach_text.end_of_text(encoder, captions)
        right += (one - other).norm() < min((one - mirrored).norm(), (other - mirrored).norm())
    assert right >= 90, right


def test_bad_pocket_text_weights(tmp_path, monkeypatch):
    """A damaged file and one of another tower are named, with what was expected."""
    from safetensors.torch import load_file, save_file
    taught = load_file(data.POCKET_TEXT)
    path = tmp_path / "text.safetensors"
    monkeypatch.setattr(data, "POCKET_TEXT", str(path))
    path.write_bytes(b"no tensors")
    with pytest.raises(data.DataError, match="text.safetensors: not a readable text tower"):
        data.text_encoder("pocket")
    save_file({"transformer.other": torch.zeros(2)}, path)
    with pytest.raises(data.DataError, match="expected the 24 tensors"):
        data.text_encoder("pocket")
    name = "transformer.resblocks.0.ln_1.weight"
    save_file(taught | {name: torch.ones(64)}, path)
    with pytest.raises(data.DataError, match=rf"of {name} it has \(64,\), expected \(128,\)"):
        data.text_encoder("pocket")


@pytest.mark.parametrize("suffix, prefix", [
    (".safetensors", ""), (".pt", "module."), (".bin", "text.")])
def test_clip_weights_from_a_file(tmp_path, monkeypatch, suffix, prefix):
    """Of a whole CLIP checkpoint only the text tower is read, whatever the file's form."""
    from open_clip.transformer import TextTransformer
    from safetensors.torch import save_file
    size = {"width": 16, "heads": 2, "layers": 2, "length": 77}
    monkeypatch.setitem(data.TEXT_ENCODERS, "clip-h", {**data.TEXT_ENCODERS["clip-h"], **size})
    tower = TextTransformer(width=16, heads=2, layers=2, output_dim=8, output_tokens=True).eval()
    state = {prefix + k: v.half().clone() for k, v in tower.state_dict().items()}
    state |= {"visual.transformer.x": torch.zeros(3), "logit_scale": torch.tensor(1.0)}
    path = tmp_path / f"clip{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save({"state_dict": state}, path)
    encoder = data.text_encoder("clip-h", weights=path)
    captions = ["a red star", ""]
    expected = tower.half().float()(encoder.tokenizer(captions))[1]
    for i, real in enumerate(encoder.tokens(captions)[1]):     # open_clip pads in another way
        torch.testing.assert_close(encoder(captions)[i, real], expected[i, real].detach())
    assert encoder.width == 16 and encoder.length == 77
    monkeypatch.setitem(data.TEXT_ENCODERS["clip-h"], "width", 32)
    with pytest.raises(data.DataError, match="is not the text tower of clip-h"):
        data.text_encoder("clip-h", weights=path)


def test_clip_without_network(monkeypatch, capfd):
    """Without weights and network: one sentence that names the file, the flag and the way out."""
    import huggingface_hub
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: None)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", "/nonexistent")
    with pytest.raises(data.DataError) as caught:
        data.text_encoder("clip-h")
    said = str(caught.value)
    assert said.startswith("The CLIP weights of clip-h (ViT-H-14, laion2b_s32b_b79k)")
    assert "--clip /path" in said and "--preset pocket" in said and "\n" not in said
    assert capfd.readouterr() == ("", "")


def test_bad_clip_files(tmp_path):
    """A file that is no checkpoint, or a pickle that runs code, is refused with a sentence."""
    import pickle
    (tmp_path / "a.safetensors").write_bytes(b"<html>")
    (tmp_path / "b.bin").write_bytes(pickle.dumps({"x": subprocess.Popen}, protocol=2))
    (tmp_path / "c.pt").write_bytes(b"")
    torch.save([1, 2], tmp_path / "d.pt")
    for name in ("a.safetensors", "b.bin", "c.pt", "d.pt", "gone.pt"):
        with pytest.raises(data.DataError, match="--clip"):
            data.text_encoder("clip-h", weights=tmp_path / name)


# ---- experiments/efficiency.py -------------------------------------------------------------------

def test_work_of_the_recipe():
    """The floating-point operations of E.3 with the released Stage C, and the paper's share."""
    from experiments import efficiency
    found = efficiency.projection(0.4)
    assert found["flop"] == pytest.approx(2.71e21, rel=0.01)
    per_image = [phase["flop"] / phase["images"] / 1e12 for phase in found["phases"]]
    assert per_image[:2] == pytest.approx([0.91, 3.46], abs=0.01)
    assert found["paper_share_of_nominal"] == pytest.approx(0.098, abs=0.001)
    assert found["a100_hours"] == pytest.approx(2.71e21 / (0.4 * 312e12) / 3600, rel=0.01)


# ---- the checker of experiments/prompt_accuracy.py -----------------------------------------------

def drawn(scene, noise):
    from torchvision.transforms.functional import to_tensor
    picture = to_tensor(shapes.render(scene, 128))
    return picture + noise * torch.randn(picture.shape, generator=torch.Generator().manual_seed(1))


def test_checker_sees_what_is_drawn():
    """On true drawings, jittered and noised, at least 99 % of every attribute is judged right."""
    from experiments import prompt_accuracy as accuracy
    jobs = [job for split in ("train", "heldout") for job in accuracy.prompts(100, split, 3)]
    table = accuracy.tally([accuracy.compare(accuracy.look_at(drawn(scene, 0.05)), scene, caption)
                            for caption, scene in jobs])
    assert set(table) == set(accuracy.ATTRIBUTES)
    assert all(line["percent"] >= 99 and line["of"] > 15 for line in table.values()), table


def test_checker_sees_what_is_wrong():
    """A swapped colour, shape, order, place or background and a third object are noticed: 99 %."""
    from experiments import prompt_accuracy as accuracy
    caught = {name: [] for name in ("colour", "shape", "relation", "place", "background", "count",
                                    "size")}
    for caption, scene in accuracy.prompts(120, "train", 4):
        first = scene["objects"][0]
        others = {name: [one for one in table if one != first[name]] for name, table in (
            ("colour", shapes.COLOURS), ("shape", shapes.SHAPES))}
        rng = np.random.RandomState(len(caption))
        wrong = {name: {**scene, "objects": [{**first, name: rng.choice(others[name])},
                                             *scene["objects"][1:]]} for name in others}
        ground = rng.choice([one for one in shapes.BACKGROUNDS if one != scene["background"]])
        wrong["background"] = {**scene, "background": ground}
        if scene["relation"]:
            places = [{key: thing[key] for key in ("x", "y", "radius", "size")}
                      for thing in scene["objects"]]
            wrong["relation"] = {**scene, "objects": [
                {**thing, **place} for thing, place in zip(scene["objects"], places[::-1])]}
            wrong["count"] = {**scene, "objects": scene["objects"][:1]}
        elif first["place"]:
            far = 0.8 if first["x"] < 0.5 else 0.2
            wrong["place"] = {**scene, "objects": [{**first, "x": far, "y": far, "radius": 0.12}]}
        size = "large" if first["size"] == "small" else "small"
        if len(scene["objects"]) == 1 and first["size"] in caption:
            radius = sum(shapes.SIZES[size]) / 2
            wrong["size"] = {**scene, "objects": [{**first, "radius": radius, "x": .5, "y": .5}]}
        for name, other in wrong.items():
            right = accuracy.compare(accuracy.look_at(drawn(other, 0.03)), scene, caption)
            if name in right:                          # the caption may not mention it
                caught[name].append(not right[name] and not right["all"])
    for name, votes in caught.items():
        assert len(votes) > 10 and np.mean(votes) >= 0.99, (name, len(votes), np.mean(votes))


def test_prompt_accuracy_command(chain, tmp_path):
    """The study runs on any weights and writes its tables and the sheet of failures."""
    done = command("experiments/prompt_accuracy.py", "--weights", chain, "--n", 4, "--steps-c", 2,
                   "--steps-b", 2, "--out", tmp_path)
    report = json.loads((tmp_path / "accuracy.json").read_text())
    assert report["seen"]["the drawings"]["all"]["percent"] == 100
    assert report["held out"]["C+B+A"]["all"]["of"] == 4
    assert "| C+B+A, other text in B |" in done.stdout and (tmp_path / "failures.png").exists()


# ---- published weights: the same numbers as diffusers and transformers ---------------------------

PROMPTS = ["a red star above a blue circle", "An ASTRONAUT, riding a horse -- 4k; it's 35mm!"]


def worst(found, expected):
    """Largest difference, relative to the largest expected value."""
    assert found.shape == expected.shape and found.isfinite().all()
    return ((found - expected).abs().max() / expected.abs().max()).item()


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """(folder, networks): small random networks of diffusers and transformers, in the layout of
    warp-ai/wuerstchen and warp-ai/wuerstchen-prior, with every kind of block that these have.
    """
    from diffusers import DDPMWuerstchenScheduler
    from diffusers.pipelines.deprecated.wuerstchen import (PaellaVQModel, WuerstchenDiffNeXt,
                                                           WuerstchenPrior)
    from open_clip.tokenizer import SimpleTokenizer
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
    folder = tmp_path_factory.mktemp("published")
    torch.manual_seed(0)
    vqgan = PaellaVQModel(bottleneck_blocks=2, embed_dim=32, num_vq_embeddings=64)
    decoder = WuerstchenDiffNeXt(
        c_cond=24, clip_embd=32, c_hidden=[16, 32, 32, 48], nhead=[-1, 2, 4, 6],
        blocks=[1, 2, 2, 1], level_config=["CT", "CTA", "CTA", "CTA"],
        inject_effnet=[False, True, True, True])
    prior = WuerstchenPrior(c=32, c_cond=48, depth=2, nhead=2)
    networks = dict(vqgan=shake(vqgan, 0.2), decoder=shake(decoder), prior=shake(prior))
    with torch.no_grad():                          # the heads: a chain of random ones would explode
        for head in (decoder.clf[1], prior.out[1]):
            head.weight.mul_(0.02)
            head.bias.mul_(0.02)
        vqgan.down_blocks[3][1].running_var.fill_(0.1)
    clip = SimpleTokenizer()                       # of it the files of CLIPTokenizer
    special = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {special.get(word, word): number for word, number in clip.encoder.items()}
    merges = [" ".join(pair) for pair in sorted(clip.bpe_ranks, key=clip.bpe_ranks.get)]
    for name, width, heads in (("wuerstchen", 32, 2), ("wuerstchen-prior", 48, 3)):
        text = CLIPTextModel(CLIPTextConfig(
            vocab_size=49408, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2,
            num_attention_heads=heads, hidden_act="gelu", bos_token_id=49406, eos_token_id=49407))
        networks[f"text/{name}"] = shake(text, 0.3).eval()
        text.save_pretrained(folder / name / "text_encoder")
        files = folder / name / "tokenizer"
        files.mkdir()
        (files / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
        (files / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges), encoding="utf-8")
        tokens = dict(bos_token="<|startoftext|>", eos_token="<|endoftext|>",
                      unk_token="<|endoftext|>", pad_token="<|endoftext|>")
        (files / "special_tokens_map.json").write_text(json.dumps(tokens))
        (files / "tokenizer_config.json").write_text(
            json.dumps(dict(tokens, model_max_length=77, tokenizer_class="CLIPTokenizer")))
        networks[f"tokenizer/{name}"] = CLIPTokenizer.from_pretrained(files)
        networks[f"scheduler/{name}"] = DDPMWuerstchenScheduler()
    vqgan.save_pretrained(folder / "wuerstchen/vqgan")
    decoder.save_pretrained(folder / "wuerstchen/decoder")
    prior.save_pretrained(folder / "wuerstchen-prior/prior")
    for network in (vqgan, decoder, prior):
        network.eval()
    return folder, networks


def reference(networks, prompt, seed, height, width, levels, steps_b):
    """diffusers' two pipelines -> C's raw latents, B's latents, pixels before clamping."""
    from diffusers.pipelines.deprecated.wuerstchen import (WuerstchenDecoderPipeline,
                                                           WuerstchenPriorPipeline)
    names = {"prior": "wuerstchen-prior", "decoder": "wuerstchen"}
    parts = {stage: dict(tokenizer=networks[f"tokenizer/{name}"],
                         text_encoder=networks[f"text/{name}"],
                         scheduler=networks[f"scheduler/{name}"]) for stage, name in names.items()}
    first = WuerstchenPriorPipeline(prior=networks["prior"], **parts["prior"],
                                    latent_mean=networks.get("latent_mean", 42.0),
                                    latent_std=networks.get("latent_std", 1.0))
    second = WuerstchenDecoderPipeline(decoder=networks["decoder"], vqgan=networks["vqgan"],
                                       **parts["decoder"])
    for pipeline in (first, second):
        pipeline.set_progress_bar_config(disable=True)
    noise = sample.generators([seed, seed + 2 ** 31])
    raw = first(prompt, height, width, timesteps=list(levels), guidance_scale=4.0,
                generator=noise[0]).image_embeddings
    latents = second(raw, prompt, num_inference_steps=steps_b, generator=noise[1],
                     output_type="latent").images
    vqgan = networks["vqgan"]
    with torch.no_grad():
        return raw, latents, vqgan.decode(latents * vqgan.config.scale_factor).sample


def ours(chain, prompt, seed, height, width, levels, steps_b):
    """The same from sample.py's chain."""
    way = []
    latents = sample.draw_latents(chain, [prompt], [seed], height, width, levels)
    with torch.no_grad():
        images = sample.draw_images(chain, latents, [prompt], [seed], steps_b, history=way)
    mean, std = chain.scale
    return latents * std + mean, way[-1], images


def test_published_modules(published):
    """Stage A, B and C loaded from diffusers' folders give diffusers' numbers, to 1e-5."""
    folder, networks = published
    torch.manual_seed(1)
    a = stage_a.load(folder / "wuerstchen/vqgan")
    b = stage_b.load(folder / "wuerstchen/decoder")
    c = stage_c.load(folder / "wuerstchen-prior/prior")
    images, t = torch.rand(2, 3, 64, 96), torch.tensor([0.9, 0.2])
    x_b, x_c = torch.randn(2, 4, 32, 48), torch.randn(2, 16, 3, 5)
    sem, text_b, text_c = torch.randn(2, 16, 3, 5), torch.randn(2, 77, 32), torch.randn(2, 77, 48)
    with torch.no_grad():
        latents = networks["vqgan"].encode(images).latents
        assert worst(a.encode(images), latents) < 1e-5
        assert worst(a.decode(latents), networks["vqgan"].decode(latents).sample) < 1e-5
        quantised = networks["vqgan"].decode(latents, force_not_quantize=False).sample
        assert worst(a.decode(a.quantize(latents)[0]), quantised) < 1e-5
        assert worst(b(x_b, t, sem, text_b), networks["decoder"](x_b, t, sem, text_b)) < 1e-5
        assert worst(c(x_c, t, text_c), networks["prior"](x_c, t, text_c)) < 1e-5
    assert a.config.latent_std == 0.3764 and b.config.condition == "raw"


def test_published_text_towers(published):
    """Text tokens are those of transformers at all 77 positions, from folder and open_clip file."""
    folder, networks = published
    captions = [*PROMPTS, "", "ünïcode café 日本  spaces ", "word " * 100]
    for name, known in (("wuerstchen", "clip-h"), ("wuerstchen-prior", "clip-bigg")):
        encoder = data.text_encoder(known, folder / name / "text_encoder")
        query = networks[f"tokenizer/{name}"](captions, padding="max_length", max_length=77,
                                              truncation=True, return_tensors="pt")
        with torch.no_grad():
            expected = networks[f"text/{name}"](
                query.input_ids, attention_mask=query.attention_mask).last_hidden_state
        ids, real = encoder.tokens(captions)
        assert torch.equal(ids, query.input_ids)
        assert torch.equal(real, query.attention_mask.bool())
        assert expected.shape[1] == 77 and worst(encoder(captions), expected) < 1e-5


@pytest.mark.parametrize("size", [(128, 128), (256, 384), (512, 512)])
def test_published_chain(published, size):
    """The whole chain equals diffusers' two pipelines: C's and B's latents and pixels, to 1e-4.

    pytest -k published_chain -s shows the differences.
    """
    folder, networks = published
    chain = sample.load_chain(**sample.find(folder))
    levels = stage_c.RELEASED_LEVELS if size == (128, 128) else torch.linspace(1, 0, 5).tolist()
    job = (PROMPTS[size[0] > 128], 7, *size, levels, 3)
    found, expected = ours(chain, *job), reference(networks, *job)
    differences = [worst(one, other) for one, other in zip(found, expected)]
    print(f"{size}: C {differences[0]:.1e}, B {differences[1]:.1e}, pixels {differences[2]:.1e}")
    assert max(differences) < 1e-4
    assert expected[2].shape == (1, 3, *size) and expected[2].std() > 0.05


@pytest.mark.parametrize("part", ["vqgan", "decoder", "prior", "text/wuerstchen",
                                  "text/wuerstchen-prior"])
def test_published_chain_notices(published, part):
    """The comparison is no formality: 1 % more on one network's weights breaks its bound."""
    folder, networks = published
    chain = sample.load_chain(**sample.find(folder))
    job = (PROMPTS[0], 7, 128, 128, torch.linspace(1, 0, 5).tolist(), 3)
    expected = reference(networks, *job)
    network = {"vqgan": chain.a, "decoder": chain.b, "prior": chain.c,
               "text/wuerstchen": chain.text_b, "text/wuerstchen-prior": chain.text_c}[part]
    for parameter in network.parameters():
        parameter.mul_(1.01)
    found = ours(chain, *job)
    assert max(worst(one, other) for one, other in zip(found, expected)) > 1e-4


def to_official(tensors):
    """The names of diffusers' folders -> those of the official .pt files."""
    out = {}
    for name, value in tensors.items():
        name = name.replace("vquantizer.embedding", "vquantizer.codebook")
        name = name.replace("attention.to_out.0", "attention.attn.out_proj")
        if ".to_q." in name:
            parts = [tensors[name.replace(".to_q.", f".to_{one}.")] for one in "qkv"]
            name = name.replace("attention.to_q.", "attention.attn.in_proj_")
            value = torch.cat(parts)
        if ".to_k." not in name and ".to_v." not in name:
            out[name] = value
    return out


def test_official_files(published, tmp_path, monkeypatch):
    """The official .pt files, with names of their own, give the same picture as the folders."""
    folder, networks = published
    chain = sample.load_chain(**sample.find(folder))
    nets = (chain.a, chain.b, chain.c)
    for module, net in zip((stage_a, stage_b, stage_c), nets):
        monkeypatch.setitem(module.PRESETS, "released", net.config)
    compressor = shake(semantic_compressor.SemanticCompressor(
        semantic_compressor.PRESETS["released"]))
    a, b, c = (to_official(net.state_dict()) for net in nets)
    assert any("in_proj_weight" in name for name in b) and not any(".to_q." in name for name in b)
    torch.save({"state_dict": a}, tmp_path / "vqgan_f4_v1_500k.pt")
    torch.save({"state_dict": b, "effnet_state_dict": compressor.state_dict()},
               tmp_path / "model_v2_stage_b.pt")
    torch.save({"ema_state_dict": c}, tmp_path / "model_v2_stage_c.pt")
    clip = tmp_path / "clip"
    clip.mkdir()
    for name, short in (("wuerstchen", "clip-h"), ("wuerstchen-prior", "clip-bigg")):
        (clip / short).symlink_to(folder / name / "text_encoder")
    again = sample.load_chain(**sample.find(tmp_path), clip=clip)
    job = (PROMPTS[0], 7, 128, 128, 2, 2)
    for found, expected in zip(ours(again, *job), ours(chain, *job)):
        assert_close(found, expected)
    images = torch.rand(1, 3, 96, 96)
    assert_close(again.compressor(images), compressor.eval()(images))
    assert again.scale == (-1.0, 42.0)


def test_published_command_line(published, tmp_path):
    """sample.py --weights DIR writes a PNG from published weights; without network it says how."""
    folder, _ = published
    out = tmp_path / "one.png"
    command("sample.py", PROMPTS[0], "--weights", folder, "--size", "384x256", "--steps-c",
            "released", "--steps-b", 2, "--out", out)
    assert Image.open(out).size == (384, 256)
    done = command("sample.py", "x", "--weights", "released", check=False, env={
        **os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path / "empty")})
    assert done.returncode == 1 and "DIR/wuerstchen-prior" in done.stderr
    assert "Traceback" not in done.stderr and done.stderr.strip().count("\n") == 0


def test_wrong_published_files(published, tmp_path):
    """A folder of another class, a missing file and weights of another size: one sentence each."""
    import shutil
    folder, _ = published
    with pytest.raises(run.CheckpointError, match="found a WuerstchenPrior, expected PaellaVQ"):
        stage_a.load(folder / "wuerstchen-prior/prior")
    with pytest.raises(run.CheckpointError, match="config.json and"):
        stage_b.load(tmp_path)
    shutil.copytree(folder / "wuerstchen-prior/prior", tmp_path / "prior")
    path = tmp_path / "prior/config.json"
    path.write_text(path.read_text().replace('"c": 32', '"c": 64'))
    with pytest.raises(run.CheckpointError, match="does not hold the weights of StageC: size mis"):
        stage_c.load(tmp_path / "prior")


def test_export_and_back(published, tmp_path):
    """Stages trained here run in diffusers after --export, and load here again, unchanged."""
    from diffusers.pipelines.deprecated.wuerstchen import (PaellaVQModel, WuerstchenDiffNeXt,
                                                           WuerstchenPrior)
    folder, networks = published
    chain = sample.load_chain(**sample.find(folder))
    scale = dict(latent_mean=0.7, latent_std=2.5)
    chain.a = shake(stage_a.StageA(replace(chain.a.config, **scale)), 0.2).eval()
    chain.compressor = shake(semantic_compressor.SemanticCompressor(
        replace(semantic_compressor.PRESETS["paper"], latent_mean=0.3, latent_std=1.5))).eval()
    chain.scale = (0.3, 1.5)
    sample.export(chain, tmp_path / "out")
    out = tmp_path / "out"
    index = json.loads((out / "wuerstchen-prior/model_index.json").read_text())
    theirs = dict(networks, vqgan=PaellaVQModel.from_pretrained(out / "wuerstchen/vqgan"),
                  decoder=WuerstchenDiffNeXt.from_pretrained(out / "wuerstchen/decoder"),
                  prior=WuerstchenPrior.from_pretrained(out / "wuerstchen-prior/prior"),
                  latent_mean=index["latent_mean"], latent_std=index["latent_std"])
    for name in ("vqgan", "decoder", "prior"):
        theirs[name].eval()
    for name in ("wuerstchen", "wuerstchen-prior"):
        (out / name / "text_encoder").symlink_to(folder / name / "text_encoder")
    again = sample.load_chain(**sample.find(out))
    job = (PROMPTS[0], 7, 128, 128, torch.linspace(1, 0, 4).tolist(), 2)
    expected = ours(chain, *job)
    for found in (reference(theirs, *job), ours(again, *job)):
        for one, other in zip(found, expected):
            assert worst(one, other) < 1e-4
    images, pixels = torch.rand(1, 3, 64, 64), torch.rand(1, 3, 96, 96)
    assert_close(again.a.decode(again.a.encode(images)), chain.a.decode(chain.a.encode(images)),
                 rtol=1e-4, atol=1e-4)
    assert torch.equal(again.a.quantize(again.a.encode(images))[1],
                       chain.a.quantize(chain.a.encode(images))[1])
    assert_close(again.compressor.standardise(again.compressor(pixels)),
                 chain.compressor.standardise(chain.compressor(pixels)))
    for config in (replace(TINY_B, head="released"), replace(TINY_B, attend_to_sem=False)):
        chain.b = stage_b.StageB(config)
        with pytest.raises(run.ConfigError, match="--preset released"):
            sample.export(chain, tmp_path / "no")


def test_released_architecture_trains_and_leaves(published, chain, drawings, tmp_path):
    """Trained here as `released` with CLIP text, exported, sampled from the export: one picture."""
    folder, _ = published
    clip = tmp_path / "clip"
    clip.mkdir()
    for name, short in (("wuerstchen", "clip-h"), ("wuerstchen-prior", "clip-bigg")):
        (clip / short).symlink_to(folder / name / "text_encoder")
    runs = tmp_path / "runs"
    runs.mkdir()
    (runs / "stage_a").symlink_to(chain / "stage_a")
    a, b = runs / "stage_a/checkpoint.pt", runs / "stage_b/checkpoint.pt"
    stage_b.train(replace(TINY_B, attend_to_sem=False, head="released", condition="raw",
                          text_encoder="clip-h", text_width=32, guidance=1.0),
                  drawings, runs / "stage_b", a, clip)
    stage_c.train(replace(TINY_C, text_encoder="clip-bigg", text_width=48), drawings,
                  runs / "stage_c", a, b, clip)
    quick = ["a red star", "--steps-c", "2", "--steps-b", "2", "--size", "128x128"]
    sample.main([*quick, "--weights", str(runs), "--clip", str(clip), "--out",
                 str(tmp_path / "one.png")])
    sample.main(["--export", str(tmp_path / "out"), "--weights", str(runs), "--clip", str(clip)])
    for name in ("wuerstchen", "wuerstchen-prior"):
        (tmp_path / "out" / name / "text_encoder").symlink_to(folder / name / "text_encoder")
    sample.main([*quick, "--weights", str(tmp_path / "out"), "--out", str(tmp_path / "two.png")])
    one, two = (np.asarray(Image.open(tmp_path / name)).astype(int)
                for name in ("one.png", "two.png"))
    assert one.std() > 5 and np.abs(one - two).max() <= 1


# ---- the built-in drawings -----------------------------------------------------------------------

def things(scene):
    return [(thing["colour"], thing["shape"]) for thing in scene["objects"]]


def test_grammar_is_large_enough():
    """8 colours x 6 shapes x 3 sizes x 4 backgrounds, all of which occur in train."""
    scenes = [shapes.scene(i) for i in range(3000)]
    seen = [{f(s) for s in scenes} for f in (
        lambda s: s["background"], lambda s: s["relation"], lambda s: s["objects"][0]["size"],
        lambda s: s["objects"][0]["colour"], lambda s: s["objects"][0]["shape"],
        lambda s: s["objects"][0]["place"])]
    assert [len(x) for x in seen] == [4, 5, 3, 8, 6, 6]
    assert sum(len(s["objects"]) == 2 for s in scenes) == 1500


def test_held_out_of_train():
    """At least 10 % of objects and of ordered pairs never occur in train, always in heldout."""
    objects, pairs = shapes.HELD_OUT_OBJECTS, shapes.HELD_OUT_PAIRS
    assert len(objects) >= 0.10 * 48 and len(pairs) >= 0.10 * 48 * 48
    assert all((b, a) in pairs for a, b in pairs)
    train = [things(shapes.scene(i)) for i in range(2000)]
    for shown in train:
        assert not objects & set(shown) and tuple(shown) not in pairs
        assert len(set(shown)) == len(shown)
    kinds = set()
    for i in range(500):
        scene = shapes.scene(i, "heldout")
        shown = things(scene)
        assert objects & set(shown) or tuple(shown) in pairs
        assert scene["held_out"] and len(set(shown)) == len(shown)
        kinds |= set(scene["held_out"])
    assert kinds == {"object", "pair"}
    assert {thing for shown in train for thing in shown} == set(shapes.OBJECTS) - objects


def test_drawings_are_where_the_scene_says():
    """In the pixels: objects are inside, apart, of their colour, and the relation is true."""
    for i in range(120):
        scene = shapes.scene(i, seed=5)
        pixels = np.asarray(shapes.render(scene, 128)).astype(int)
        ground = np.clip(np.add(shapes.BACKGROUNDS[scene["background"]], scene["tint"]), 0, 255)
        drawn = np.abs(pixels - ground).sum(axis=2) > 24
        y, x = np.mgrid[:128, :128] / 128
        centres, covered = [], np.zeros_like(drawn)
        for thing in scene["objects"]:
            inside = (x - thing["x"]) ** 2 + (y - thing["y"]) ** 2 <= (thing["radius"] + 0.02) ** 2
            assert not (covered & inside & drawn).any()
            covered |= inside
            mine = drawn & inside
            assert mine.sum() > 0.25 * np.pi * (thing["radius"] * 128) ** 2
            fill = np.clip(np.add(shapes.COLOURS[thing["colour"]], thing["tint"]), 0, 255)
            assert np.abs(np.median(pixels[mine], axis=0) - fill).max() <= 1
            centres.append((y[mine].min(), y[mine].max(), x[mine].min(), x[mine].max()))
        assert not (drawn & ~covered).any()
        assert not (drawn[0].any() or drawn[-1].any() or drawn[:, 0].any() or drawn[:, -1].any())
        if scene["relation"]:
            a, b = centres
            gap = {"left of": b[2] - a[3], "right of": a[2] - b[3], "above": b[0] - a[1],
                   "below": a[0] - b[1]}[scene["relation"]]
            assert gap > 0.03


def test_colours_are_told_apart():
    """No two colours, nor a colour and a background, come near each other, tints included."""
    names = list(shapes.COLOURS.items()) + list(shapes.BACKGROUNDS.items())
    for (a, one), (b, other) in itertools.combinations(names, 2):
        assert np.linalg.norm(np.subtract(one, other)) > 60, (a, b)


def read_relation(text):
    """(first object, relation, second object) of a caption of two objects, read independently."""
    import re
    words = r"(?:small |medium |large )?(\w+) (\w+)"
    text = re.sub(r" on a \w+ background$|^on \w+: |^a \w+ background with ", "", text)
    say = {"to the left of": "left of", "to the right of": "right of", "under": "below"}
    relation = r"(to the left of|left of|to the right of|right of|above|below|under)"
    beside = r"(on its left|on its right|above it|below it)"
    if m := re.fullmatch(rf"an? {words} with an? {words} {beside}", text):
        other = {"on its left": "left of", "on its right": "right of",
                 "above it": "above", "below it": "below"}
        return (m[3], m[4]), other[m[5]], (m[1], m[2])
    if m := re.fullmatch(rf"{relation} an? {words} is an? {words}", text):
        return (m[4], m[5]), say.get(m[1], m[1]), (m[2], m[3])
    m = re.fullmatch(rf"an? {words} {relation} an? {words}", text)
    return (m[1], m[2]), say.get(m[3], m[3]), (m[4], m[5])


def test_captions_are_true_and_varied():
    """Each caption, parsed back, says what its scene shows; there are many ways of saying it."""
    forms = set()
    for i in range(1, 2001, 2):
        rng = shapes.scene_rng(0, "train", i)
        scene = shapes.draw_scene(rng, count=2)
        text = shapes.caption(scene, rng)
        first, relation, second = read_relation(text)
        shown = things(scene)
        assert (relation, first, second) in (
            (scene["relation"], *shown), (shapes.RELATIONS[scene["relation"]], *shown[::-1])), text
        for word in set(shapes.BACKGROUNDS) & set(text.split()):
            assert word == scene["background"]
        forms.add(" ".join("_" if w in shapes.COLOURS or w in shapes.SHAPES else w
                           for w in text.split()))
    assert len(forms) > 100
    for text, scene in shapes.prompts(20, seed=1):
        assert all(word in text.split() for thing in things(scene) for word in thing)


def test_captions_fit_the_context(encoder):
    """Every caption has at most 22 tokens of the 24, start and end included."""
    texts = []
    for i in range(3000):
        rng = shapes.scene_rng(0, "train", i)
        texts.append(shapes.caption(shapes.draw_scene(rng), rng))
    lengths = (encoder.tokenizer(texts, context_length=77) != 0).sum(dim=1)
    assert 5 <= lengths.min() and lengths.max() <= 22


def test_prompts_are_different_and_of_their_split():
    """prompts() are distinct, half of them of two objects, and seeded."""
    for split in ("train", "heldout"):
        some = shapes.prompts(64, seed=3, split=split)
        texts = [text for text, _ in some]
        assert len(set(texts)) == 64 and texts == [t for t, _ in shapes.prompts(64, 3, split)]
        assert sum(len(scene["objects"]) == 2 for _, scene in some) >= 32
        assert all(bool(shapes.held_out(scene)) == (split == "heldout") for _, scene in some)


# ---- commands ------------------------------------------------------------------------------------

def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.tar"))}


def test_shapes_do_not_depend_on_workers(tmp_path):
    """The same drawings for any number of workers, and after an interruption."""
    options = dict(count=23, size=32, per_shard=5)
    data.make_shapes(tmp_path / "one", workers=1, **options)
    data.make_shapes(tmp_path / "two", workers=2, **options)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert len(contents(tmp_path / "one")) == 5
    kept = (tmp_path / "two" / "00000.tar").stat().st_mtime_ns
    (tmp_path / "two" / "00003.tar").unlink()
    (tmp_path / "two" / "00003.tar.tmp").write_bytes(b"half")
    data.make_shapes(tmp_path / "two", workers=1, **options)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert (tmp_path / "two" / "00000.tar").stat().st_mtime_ns == kept
    with pytest.raises(data.DataError, match="holds other data"):
        data.make_shapes(tmp_path / "two", seed=1, **options)
    found = data.CaptionedImages(tmp_path / "one")
    assert len(found) == 23 and found[3]["meta"]["index"] == 3
    scene = {k: v for k, v in found[3]["meta"].items() if k in shapes.scene(3)}
    assert scene == shapes.scene(3)


def test_commands_shapes_and_look(tmp_path):
    """`shapes` writes heldout shards, `look` prints what they hold and draws a contact sheet."""
    done = command("data.py", "shapes", "--out", tmp_path / "s", "--count", 30,
                   "--split", "heldout", "--size", 48)
    assert done.returncode == 0, done.stderr
    done = command("data.py", "look", tmp_path / "s", "--out", tmp_path / "look.png")
    assert done.returncode == 0, done.stderr
    assert "30 samples" in done.stdout and "48 x 48 (30)" in done.stdout and "words" in done.stdout
    assert Image.open(tmp_path / "look.png").size[0] > 500
    assert all(data.CaptionedImages(tmp_path / "s")[i]["meta"]["held_out"] for i in range(30))
    for arguments in (["look", f"{tmp_path}/gone"], ["look", "a.tar", "b.tar"],
                      ["shapes", "--out", f"{tmp_path}/s", "--count", "31"],
                      ["shapes", "--out", f"{tmp_path}/t", "--count", "0"]):
        with pytest.raises(SystemExit, match="^error: .*(expected|quotes)"):
            data.main(arguments)


def test_command_pack(tmp_path):
    """`pack` copies jpg, png and webp byte for byte, is deterministic, overwrites nothing."""
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    files = {"a.jpg": encoded(form="JPEG"), "b.webp": encoded(form="WEBP"),
             "c.bmp": encoded(form="BMP"), "d.png": encoded(size=(64, 20)),
             "wrong.png": encoded(form="JPEG"), "broken.jpg": b"x"}
    for name, content in files.items():
        (pictures / name).write_bytes(content)
        (pictures / name).with_suffix(".txt").write_text(f"this is {name}", encoding="utf-8")
    done = command("data.py", "pack", pictures, "--out", tmp_path / "out" / "mine",
                   "--per-shard", 2)
    assert done.returncode == 0, done.stderr
    assert "5 samples in 3 shard(s); left out 1 x cannot be decoded" in done.stdout
    packed = data.CaptionedImages(tmp_path / "out" / "mine")
    samples = [packed[i] for i in range(5)]
    copied = {s["caption"]: packed.read(s["index"], 0) for s in samples
              if "bmp" not in s["caption"]}
    assert copied == {f"this is {name}": content for name, content in files.items()
                      if name not in ("c.bmp", "broken.jpg")}
    meta = next(s["meta"] for s in samples if s["caption"] == "this is d.png")
    assert (meta["width"], meta["original_height"], meta["source"]) == (64, 20, "d")
    with pytest.raises(SystemExit, match="nothing is overwritten"):
        data.main(["pack", str(pictures), "--out", f"{tmp_path}/out/mine"])
    data.pack(pictures, tmp_path / "again", per_shard=2)
    assert contents(tmp_path / "again") == contents(tmp_path / "out" / "mine")
