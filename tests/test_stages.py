"""What must not change a stage's numbers: caches, memory formats, compiling, recomputation."""

import copy
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

import semantic_compressor
import stage_a
import stage_b
import stage_c
from test_shapes import TEXT, TINY_B, TINY_C, shake


@pytest.mark.parametrize("module", [stage_b, stage_c])
def test_conditions_are_precomputed_once(module, monkeypatch):
    """`precompute` is called once per sampling; what it returns gives the same as the tokens."""
    config = {stage_b: TINY_B, stage_c: TINY_C}[module]
    model = shake({stage_b: stage_b.StageB, stage_c: stage_c.StageC}[module](config)).eval()
    x, t = torch.randn(2, *((4, 16, 16) if module is stage_b else (16, 3, 3))), torch.rand(2)
    text = torch.randn(2, *TEXT)
    sem = (torch.randn(2, 16, 3, 3),) if module is stage_b else ()
    with torch.no_grad():
        out, precompute = model(x, t, *sem, text), model.precompute
        assert torch.equal(out, model(x, t, *sem, text, precompute(*sem, text)))
        assert not torch.equal(out, model(x, t, *sem, text, precompute(*sem, -text)))
    calls = []
    monkeypatch.setattr(model, "precompute", lambda *given: (
        calls.append(len(given[0])) or precompute(*given)))
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
    given = []                                          # is what the ResBlocks get channels-last?
    for block in model.modules():
        if isinstance(block, module.ResBlock):
            block.register_forward_pre_hook(lambda _, inputs: given[-1].extend(
                one.is_contiguous(memory_format=CHANNELS_LAST)
                for one in (inputs[0], *(inputs[1:] and inputs[1]))))
    for memory_format in (CHANNELS_LAST, torch.contiguous_format):
        given.append([])
        monkeypatch.setattr(torch, "channels_last", memory_format)
        model.zero_grad()
        out = model(x, t, *sem, text)
        out.square().mean().backward()
        found.append((out.detach(), [p.grad.clone() for p in model.parameters()]))
    assert all(given[0]) and not all(given[1])
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
                                  guidance=2, generator=stage_b.generators(seeds))
    together, alone = draw([5, 6, 7]), draw([7])
    assert_close(together[2:], alone, atol=1e-3, rtol=1e-3)
    assert not torch.allclose(together[0], together[1], atol=0.1)


def test_perceptual_network():
    """The VGG16 distance (random weights) is 0 for equal pictures and has gradients otherwise."""
    network = stage_a.VGG16Perceptual(weights=None)
    a, b = torch.rand(1, 3, 32, 32, requires_grad=True), torch.rand(1, 3, 32, 32)
    assert network(b, b) == 0
    network(a, b).backward()
    assert a.grad.abs().max() > 0
    assert stage_a.perceptual_network("none") is None


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
        module.loss(model, x_0, *sem, torch.randn(2, *TEXT))[0].backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(*pair) for pair in zip(*gradients))


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
