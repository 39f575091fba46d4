"""What must not change a stage's numbers: caches, memory formats, compiling, recomputation."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn as nn
from torch.testing import assert_close

import semantic_compressor
import stage_a
import stage_b
import stage_c
from test_shapes import TEXT, TINY_A, TINY_B, TINY_C, shake


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


@pytest.mark.slow
@pytest.mark.parametrize("module", [stage_b, stage_c])
def test_compiled_changes_nothing(module):
    """`--compile` is speed, not arithmetic: outputs and gradients agree to rounding."""
    config = {stage_b: replace(TINY_B, widths=(8, 16), heads=(0, 2), blocks=(1, 1)),
              stage_c: replace(TINY_C, depth=1)}[module]
    model = shake({stage_b: stage_b.StageB, stage_c: stage_c.StageC}[module](config))
    fast = copy.deepcopy(model)
    fast.compile(dynamic=False)                         # in place, as the stages do
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
    """The VGG16 distance (random weights) is 0 for equal pictures and has gradients otherwise.

    By hand: five layers that do nothing, features at an angle of 60 degrees: 2 - 2 cos = 1 each.
    """
    network = stage_a.VGG16Perceptual(weights=None)
    layers = [type(layer) for layer in network.features] + [nn.MaxPool2d]      # the last: cut off
    for depth in network.depths:
        assert layers[depth:depth + 2] == [nn.ReLU, nn.MaxPool2d], f"no ReLU to pool at {depth}"
    a, b = torch.rand(1, 3, 32, 32, requires_grad=True), torch.rand(1, 3, 32, 32)
    assert network(b, b) == 0
    network(a, b).backward()
    assert a.grad.abs().max() > 0
    network.features = nn.Sequential(*[nn.Identity() for _ in range(30)])
    # ImageNet's mean, and one standard deviation above it in two channels: (1, 1, 0) and (0, 1, 1)
    a, b = (torch.tensor(colour).view(1, 3, 1, 1)
            for colour in ([0.714, 0.680, 0.406], [0.485, 0.680, 0.631]))
    assert network(a, b).item() == pytest.approx(5, abs=1e-4), (
        "the distance is not that of features of unit length at five depths, of colours that are "
        "standardised with ImageNet's mean and deviation")


def test_discriminator_of_esser(chain):
    """Its initial weights, and the betas of its AdamW, are those of Esser et al."""
    judge = stage_a.PatchDiscriminator()
    assert judge(torch.rand(2, 3, 64, 96)).shape == (2, 1, 6, 10)
    for layer in judge.layers:
        if isinstance(layer, nn.Conv2d):
            assert_close(layer.weight.std(), torch.tensor(0.02), rtol=0.1, atol=0,
                         msg="convolutions of the discriminator do not start as N(0, .02)")
        if isinstance(layer, nn.BatchNorm2d):
            mean, std = layer.weight.mean().item(), layer.weight.std().item()
            assert abs(mean - 1) < 0.01 and 0.015 < std < 0.025 and not layer.bias.any(), (
                f"its BatchNorm's gamma starts as N({mean:.3f}, {std:.3f}), not N(1, .02)")
    state = torch.load(chain / "stage_a/checkpoint.pt", weights_only=True)
    betas = {name: tuple(state[name]["param_groups"][0]["betas"])
             for name in ("optimizer", "optimizer_d")}
    assert betas == {"optimizer": (0.9, 0.999), "optimizer_d": (0.5, 0.9)}, (
        "the discriminator's betas are those of Esser et al., the VQGAN's are torch's")


def test_batchnorm_ends_both_encoders():
    """Whatever the weights, each channel of a latent has mean 0 and variance 1 in training."""
    a = stage_a.StageA(TINY_A)
    compressor = semantic_compressor.SemanticCompressor(semantic_compressor.PRESETS["pocket"])
    for convolution in (a.down_blocks[3][0], compressor.mapper[0]):
        nn.init.normal_(convolution.weight, 1, 9)
    for name, latents in (("Stage A", a.encode(torch.rand(8, 3, 32, 32))),
                          ("the compressor", compressor(torch.rand(8, 3, 96, 96)))):
        mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3), correction=0)
        assert mean.abs().max() < 1e-3 and (std - 1).abs().max() < 1e-2, (
            f"no BatchNorm at the end of {name}: {mean.tolist()}, {std.tolist()}")


def test_compressor_standardises_with_imagenet():
    """Black and white reach the backbone as ImageNet's mean and deviation make them, by hand."""
    model = semantic_compressor.SemanticCompressor(semantic_compressor.PRESETS["pocket"])
    model.backbone = model.mapper = nn.Identity()
    for value, expected in ((0.0, [-2.1179, -2.0357, -1.8044]), (1.0, [2.2489, 2.4286, 2.6400])):
        found = model(torch.full((1, 3, 32, 32), value))[0, :, 0, 0]
        assert_close(found, torch.tensor(expected), atol=1e-4, rtol=0,
                     msg=f"(pixel - mean) / std of ImageNet is {expected}, not {found.tolist()}")


def test_resize_is_bicubic_with_antialias():
    """One bright column among grey ones becomes what Keys' cubic, 4/3 as wide, gives by hand."""
    image = torch.full((1, 3, 128, 256), 0.5)
    image[..., 46] = 0.9
    # output column i has its centre at 4/3 (i + 1/2); distances times 3/4 from the column at 46.5
    # are 1.375, .375, .625 for i = 33, 34, 35, the cubic there -.0732, .7275, .3896; the weights of
    # all columns sum to 1.3272, 1.3457, 1.3272
    expected = 0.5 + 0.4 * torch.tensor([-0.0552, 0.5406, 0.2936])
    for found in (semantic_compressor.resize(image)[0, 0, 50],
                  semantic_compressor.resize(image.transpose(2, 3))[0, 0, :, 50]):
        assert found.shape == (192,)
        assert_close(found[33:36], expected, atol=2e-4, rtol=0,
                     msg=f"resize is not bicubic with antialias (§3.1): {found[33:36].tolist()}, "
                         f"expected {expected.tolist()}")
    image = torch.zeros(1, 3, 128, 128)
    image[..., 40:80] = 1                               # a cubic overshoots at an edge
    found = semantic_compressor.resize(image)
    assert found.min() == 0 and found.max() == 1, "resize leaves [0, 1]"


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


def test_measure():
    """An averaged compressor gets statistics of its own: eval mode then standardises. The Config
    has mean and deviation of its latents; frozen statistics stay as they are."""
    model = shake(semantic_compressor.SemanticCompressor(semantic_compressor.PRESETS["pocket"]))
    images = torch.rand(64, 3, 96, 96)
    before = model.eval()(images).detach()
    kept = semantic_compressor.measure(model, images, True)
    assert_close(torch.tensor([kept.latent_mean, kept.latent_std]),
                 torch.stack([before.mean(), before.std()]), atol=1e-4, rtol=1e-4)
    assert torch.equal(model(images), before), "frozen statistics were measured"
    found = semantic_compressor.measure(model, images)
    after = model(images).detach()
    assert abs(before.std() - 1) > 0.1 and abs(after.std() - 1) < 0.05 and abs(after.mean()) < 0.05
    assert not model.training
    assert_close(torch.tensor([found.latent_mean, found.latent_std]),
                 torch.stack([after.mean(), after.std()]), atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="not finite any more, so nothing was saved"):
        semantic_compressor.measure(model, images * float("nan"), True)


def test_measure_batchnorm():
    """With a backbone that has stochastic depth, eval mode gives each channel unit variance.

    Only BatchNorm, also the synchronised one, is in training mode meanwhile; afterwards modes and
    momenta are as before, no weight has changed and no random number was drawn.
    """
    model = semantic_compressor.SemanticCompressor(semantic_compressor.PRESETS["pocket"]).train()
    drops = [layer for layer in model.modules() if type(layer).__name__ == "StochasticDepth"]
    for layer in drops:
        layer.p = 0.5
    images = torch.rand(64, 3, 96, 96)
    assert len(drops) > 6 and not torch.equal(model(images), model(images))
    model.backbone[1].eval()
    sync = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model))
    modes = [layer.training for layer in model.modules()]
    weights, state = copy.deepcopy(dict(model.named_parameters())), torch.get_rng_state()
    for one in (model, sync):
        semantic_compressor.measure_batchnorm(one, images)
    assert torch.equal(torch.get_rng_state(), state), "measuring drew random numbers"
    assert [layer.training for layer in model.modules()] == modes, "measuring changed a mode"
    for one, two in zip(model.modules(), sync.modules()):
        if isinstance(one, nn.BatchNorm2d):
            assert isinstance(two, nn.SyncBatchNorm) and one.momentum == two.momentum == 0.1
            assert_close(one.running_var, two.running_var,
                         msg="measuring leaves a synchronised BatchNorm out")
    assert all(torch.equal(parameter, weights[name])
               for name, parameter in model.named_parameters()), "measuring changed a weight"
    with torch.no_grad():
        latents = model.eval()(images)
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    assert mean.abs().max() < 0.02 and (std - 1).abs().max() < 0.02, (
        f"BatchNorm was measured with stochastic depth on: deviations {std.tolist()}")
