"""The specification, as tests: shapes, hand values, oracles, overfitting.

    pytest test_shapes.py            (or `make test`, which also makes the environment)

Each test's one-line docstring is its claim. docs/break_it.md names edits and the test that fails
for each. Data, training and commands are tested in tests/.
"""

import inspect
import re
from dataclasses import replace

import pytest
import torch
import torch.nn as nn
from torch.testing import assert_close

import semantic_compressor
import stage_a
import stage_b
import stage_c

# Small configurations of the same classes: what the tests train and sample.
TINY_A = replace(stage_a.PRESETS["pocket"], widths=(8, 16), decoder_blocks=1, codebook_size=32,
                 steps=4, batch_size=4, warmup=1, cooldown=0, workers=0, log_every=1,
                 preview_every=100, save_every=2)
TINY_B = replace(stage_b.PRESETS["pocket"], widths=(8, 16, 16), heads=(0, 2, 2), blocks=(1, 1, 2),
                 patch_size=2, cond_width=8, steps=4, batch_size=4, warmup=1, cooldown=0,
                 log_every=1, preview_every=100, save_every=2)
TINY_C = replace(stage_c.PRESETS["pocket"], width=32, depth=2, heads=4, steps=4, batch_size=4,
                 warmup=1, cooldown=0, log_every=1, preview_every=100, save_every=2,
                 muon=hasattr(torch.optim, "Muon"))
TEXT = (24, 128)                                            # tokens and width of the pocket encoder


@pytest.fixture(autouse=True)
def seeded():
    """Each test draws the same numbers whichever tests ran before it."""
    torch.manual_seed(0)


def close(found, expected, what, **tolerance):
    """assert_close that says `what` is not as expected, with the numbers where they are few."""
    few = [" ".join(f"{x:.4g}" for x in one.flatten().tolist()) for one in (found, expected)
           if found.numel() < 9]
    assert_close(found, expected, **tolerance, msg=lambda said: (
        f"{what}: found {few[0]}, expected {few[1]}" if few else f"{what}: {said}"))


def shake(model, size=0.05):
    """Move every parameter away from its initial value, so that no zero hides a dead path."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(size * torch.randn_like(parameter))
    return model


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
    found = sum(parameter.numel() for parameter in model.parameters())
    assert found == count, f"{name}, {preset}: {found:,} parameters, expected {count:,}"


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
    assert sem.shape == (batch, 16, 3, 6), f"128x256 px give a grid of {tuple(sem.shape[2:])}"
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
    with pytest.raises(ValueError, match="786"):        # else: the misprint's size goes unnoticed
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


@pytest.mark.parametrize("prediction", ["released", "v"])
def test_every_parameter_has_a_gradient(prediction):
    """One loss reaches every parameter of A, B, the compressor and C: none is made but unused."""
    a = shake(stage_a.StageA(TINY_A))
    b = shake(stage_b.StageB(replace(TINY_B, prediction=prediction)))
    c = shake(stage_c.StageC(TINY_C))
    compressor = semantic_compressor.SemanticCompressor(semantic_compressor.PRESETS["pocket"])
    stage_a.loss(a, torch.rand(4, 3, 32, 64))[0].backward()
    text = torch.randn(4, *TEXT)
    stage_b.loss(b, torch.randn(4, 4, 16, 32), compressor(torch.rand(4, 3, 96, 192)),
                 text)[0].backward()
    stage_c.loss(c, torch.randn(4, 16, 3, 5), text)[0].backward()
    for model in (a, b, compressor, c):
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, f"{name} is made but takes no part in the output"
            # a bias on all keys shifts every attention score alike: its true gradient is zero
            assert parameter.grad.abs().max() > 0 or name.endswith("to_k.bias"), (
                f"{name} has a gradient of zero: what it makes is multiplied away")


def test_initial_outputs():
    """At init eps_hat is x_t / (1 + 1e-5) in Stage C (§3.2), 2 x_t in Stage B (released head);
    with prediction v, v_hat is 0, so that x_0_hat is sqrt(alpha_bar) x_t."""
    x, t, text = torch.randn(2, 16, 3, 5), torch.rand(2), torch.randn(2, *TEXT)
    close(stage_c.StageC(TINY_C)(x, t, text), x / (1 + 1e-5), "C's eps_hat at init is not x_t")
    x = torch.randn(2, 4, 16, 32)
    sem = torch.randn(2, 16, 3, 6)
    model = stage_b.StageB(replace(TINY_B, prediction="released"))
    close(model(x, t, sem, text), 2 * x, "B's eps_hat at init is not 2 x_t")
    a = stage_b.alpha_bar(t).view(-1, 1, 1, 1)
    eps_hat = stage_b.StageB(replace(TINY_B, prediction="v"))(x, t, sem, text)
    assert_close((x - (1 - a).sqrt() * eps_hat) / a.sqrt(), a.sqrt() * x, atol=1e-4, rtol=1e-4)


def test_prediction_v():
    """eps_hat and x_0_hat of prediction v fit v_hat at every t."""
    model = shake(stage_b.StageB(replace(TINY_B, prediction="v"))).eval()
    x, sem, text = torch.randn(2, 4, 16, 16), torch.randn(2, 16, 3, 3), torch.randn(2, *TEXT)
    found = []
    model.clf.register_forward_hook(lambda *given: found.append(given[2]))
    for level in (0.0, 0.3, 0.7, 1.0):
        t = torch.full((2,), level)
        a = stage_b.alpha_bar(t[:1])
        eps_hat = model(x, t, sem, text)
        x_0_hat = (x - (1 - a).sqrt() * eps_hat) / a.sqrt()
        close(found[-1], a.sqrt() * eps_hat - (1 - a).sqrt() * x_0_hat, atol=1e-3, rtol=1e-3,
              what=f"eps_hat at t = {level} is not that of v_hat")


def test_zero_initialised_branches_are_the_identity():
    """Stage A's block, GlobalResponseNorm and TimestepBlock return their input at init."""
    x = torch.randn(2, 8, 5, 7)
    close(stage_a.ResBlock(8, 16)(x), x, "Stage A's block changes its input at init")
    block = stage_c.StageC(TINY_C).blocks[1]
    x = torch.randn(2, 32, 3, 5)
    close(block(x, torch.randn(2, 64)), x, "the noise level changes the features at init")
    x = torch.randn(2, 5, 7, 8)
    close(stage_c.GlobalResponseNorm(8)(x), x, "GlobalResponseNorm changes its input at init")


def test_text_matters_after_one_step():
    """After one optimizer step another text changes the output of B and C; before it does not."""
    torch.manual_seed(0)
    text, t, sem = torch.randn(2, *TEXT), torch.full((2,), 0.5), torch.randn(2, 16, 3, 3)
    for model, x, more in ((stage_c.StageC(TINY_C), torch.randn(2, 16, 3, 3), ()),
                           (stage_b.StageB(TINY_B), torch.randn(2, 4, 16, 16), (sem,))):
        module = stage_c if more == () else stage_b
        close(model(x, t, *more, text), model(x, t, *more, text.flip(0)), "text counts at init")
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        module.loss(model, x, *more, text)[0].backward()
        optimizer.step()
        change = (model(x, t, *more, text) - model(x, t, *more, text.flip(0))).abs().max().item()
        assert change > 1e-6, f"another text changes the output of {type(model).__name__} by 0"


def test_ab_head():
    """eps_hat = (x - A) / (|1 - B| + 1e-5), on values worked out by hand, B beyond 1 included."""
    x, a = torch.tensor([3.0, 3.0, 3.0, -1.0]), torch.tensor([0.0, 1.0, 1.0, 1.0])
    b = torch.tensor([0.0, 0.5, 1.5, 3.0])
    expected = torch.tensor([3 / 1.00001, 2 / 0.50001, 2 / 0.50001, -2 / 2.00001])
    close(stage_c.ab_to_eps(x, a, b), expected, "eps_hat for B = 0, .5, 1.5, 3")
    one, zero = torch.tensor(1.0), torch.tensor(0.0)
    assert_close(stage_c.ab_to_eps(one, zero, one), torch.tensor(1e5))


def test_p2_weight():
    """p2 at t = .25, .5, .75: (1 - a) / (1 + a) as in §3.2, 1 - a as released, 1 for none."""
    t = torch.tensor([0.25, 0.5, 0.75])
    for form, expected in (("paper", [0.0832, 0.3387, 0.7477]), ("none", [1.0, 1.0, 1.0]),
                           ("released", [0.1535, 0.5060, 0.8556])):
        close(stage_c.p2_weight(t, form), torch.tensor(expected), f"p2 of form {form!r} at t = .25,"
              " .5, .75", atol=1e-3, rtol=0)
    with pytest.raises(ValueError, match="paper, released or none"):
        stage_c.p2_weight(t, "p3")


def test_loss_is_weighted_by_p2():
    """Stage C's loss is the mean of p2(t) times the error of each sample, by hand."""
    class Fixed(nn.Module):
        def forward(self, x_t, t, text):
            return torch.zeros_like(x_t)
    x_0, noise, t = torch.zeros(2, 16, 3, 3), torch.ones(2, 16, 3, 3), torch.tensor([0.25, 0.75])
    value, _, error = stage_c.loss(Fixed(), x_0, None, t, noise, p2="paper")
    close(value, stage_c.p2_weight(t).mean(), "the loss of two samples with an error of 1 each")
    assert_close(error, torch.ones(2))                       # and the errors are not weighted


def test_stage_b_loss():
    """Stage B's loss is the error of the noise; with prediction v, the error of v."""
    class Fixed(nn.Module):
        config = replace(TINY_B, prediction="released")

        def forward(self, x_t, t, sem, text):
            return torch.zeros_like(x_t)
    model, x_0, t = Fixed(), torch.zeros(3, 4, 4, 4), torch.tensor([0.05, 0.5, 0.99])
    assert_close(stage_b.loss(model, x_0, None, None, t, torch.ones_like(x_0))[0], torch.ones(()))
    model.config = replace(TINY_B, prediction="v")
    x_0, noise = torch.randn(2, 3, 4, 4, 4)
    a = stage_b.alpha_bar(t)[:, None, None, None]
    # eps_hat = 0 says x_0_hat = x_t / sqrt(a)
    v_hat = -(1 - a).sqrt() * stage_b.diffuse(x_0, t, noise) / a.sqrt()
    v = a.sqrt() * noise - (1 - a).sqrt() * x_0
    assert_close(stage_b.loss(model, x_0, None, None, t, noise)[0], (v_hat - v).square().mean(),
                 msg=lambda said: f"the loss is not the squared error of v: {said}")


@pytest.mark.parametrize("module", [stage_b, stage_c])
def test_schedule(module):
    """alpha_bar falls from .9999 to .0001, flat at the clamp; noised variance is 1; draw_t fits."""
    t = torch.linspace(0, 1, 1001)
    a = module.alpha_bar(t)
    close(a[[0, -1]], torch.tensor([0.9999, 1e-4]), "alpha_bar at t = 0 and 1")
    assert (a.diff() <= 0).all() and (a[10:-10].diff() < 0).all()
    assert_close(module.alpha_bar(torch.tensor([0.5])), torch.tensor([0.4939]), atol=1e-3, rtol=0)
    torch.manual_seed(0)
    x_0, noise, t = torch.randn(64, 4, 16, 16), torch.randn(64, 4, 16, 16), torch.rand(64)
    variance = module.diffuse(x_0, t, noise).var()
    close(variance, torch.tensor(1.0), "x_t's variance", atol=0.02, rtol=0)
    drawn = module.draw_t(200_000)
    assert 0.001 <= drawn.min() < 0.002 and drawn.max() == 1 and drawn.dtype == torch.float32
    share = (drawn == 1).float().mean()
    close(share, torch.tensor(0.075), "share of t = 1, where sampling starts", atol=2e-3, rtol=0)


class Oracle(nn.Module):
    """Knows x_0 and returns the exact noise; with text it can be told to return other things."""

    def __init__(self, module, x_0):
        super().__init__()
        self.module, self.x_0, self.weight = module, x_0, nn.Parameter(torch.zeros(()))

    def precompute(self, *conditions):
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
    close(out, x_0, "the sampler does not end at x_0, though eps_hat is exact", atol=0.05, rtol=0)


class Conditional(nn.Module):
    """eps_hat is the mean of the text, on every channel: shows which branch the sampler used."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def precompute(self, *conditions):
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
    for guidance in (1.0 + 1e-9, 0, 4):
        strong = end(text, null, guidance)
        close(strong, unconditional + guidance * (conditional - unconditional), atol=1e-4,
              rtol=1e-4, what=f"guidance {guidance:.0f} is not null + w (conditional - null)")
    assert (strong - unconditional).abs().amin((0, 2, 3)).min() > 0.01    # no channel left out


each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])


@each_dtype
def test_vq_is_the_nearest_code(dtype):
    """The index is the arg min of the Euclidean distance to all codes, by brute force."""
    a = stage_a.StageA(TINY_A).to(dtype)
    nn.init.normal_(a.vquantizer.embedding.weight)
    latents, codes = torch.randn(3, 4, 5, 6, dtype=dtype), a.vquantizer.embedding.weight
    quantised, indices, _ = a.quantize(latents)
    rows = latents.permute(0, 2, 3, 1).reshape(-1, 1, 4)
    distances = (rows.double() - codes.double()).square().sum(2)          # (B*h*w, K)
    close(indices.flatten(), distances.argmin(1), "the code chosen is not the nearest")
    assert_close(quantised, codes[indices].permute(0, 3, 1, 2), atol=4 * torch.finfo(dtype).eps,
                 rtol=0)


@each_dtype
def test_vq_gradients(dtype):
    """Straight-through gradient is 1; the commitment factor .25 is on the encoder's term alone."""
    a = stage_a.StageA(replace(TINY_A, codebook_size=1)).to(dtype)
    weight = nn.init.constant_(a.vquantizer.embedding.weight, 2.0)
    latents = torch.zeros(1, 4, 1, 1, dtype=dtype, requires_grad=True)
    quantised, _, vq_loss = a.quantize(latents)
    quantised.sum().backward()
    assert latents.grad is not None, "no gradient passes the quantiser: is it straight-through?"
    close(latents.grad, torch.ones_like(latents), "straight-through gradient")
    latents.grad = None
    a.quantize(latents)[2].backward()               # mean over 4 of (0 - 2)^2: derivative 2 * 2 / 4
    assert latents.grad.flatten().tolist() == [-0.25] * 4, "commitment is not .25 * (z - code)^2"
    assert weight.grad.flatten().tolist() == [1.0] * 4, "the codebook's term is not (z - code)^2"
    assert vq_loss == 5, "the VQ loss is not codebook + .25 * commitment"     # 4 + .25 * 4


def test_weights_of_stage_a():
    """The loss is 1.0 * MSE + VQ loss + 0.1 * perceptual - 0.01 * the judge's logits (E.1)."""
    class Fixed:
        config = stage_a.PRESETS["paper"]

        def encode(self, images):
            return torch.zeros(2, 4, 8, 8)

        def quantize(self, latents):
            return latents, None, torch.tensor(5.0)

        def decode(self, latents):
            return torch.zeros(2, 3, 32, 32)
    images = torch.full((2, 3, 32, 32), 0.5)                              # so the MSE is .25

    def value(**others):
        return stage_a.loss(Fixed(), images, **others)[0].item()
    assert value() == 5.25, "MSE and VQ loss do not both count 1.0"
    with_distance = value(perceptual=lambda one, two: torch.tensor(7.0))
    assert with_distance == pytest.approx(5.95), "the perceptual distance does not count 0.1"
    with_judge = value(discriminator=lambda one: torch.tensor([2.0, 4.0]))
    assert with_judge == pytest.approx(5.22), "the discriminator's logits do not count 0.01"


def test_quantisation_drop():
    """Samples named by `drop` skip the quantiser, the others do not; 10 % are drawn by default."""
    a = stage_a.StageA(replace(TINY_A, decoder_blocks=0)).eval()
    nn.init.normal_(a.vquantizer.embedding.weight)
    images = torch.rand(2, 3, 16, 16)
    _, found = stage_a.loss(a, images, drop=torch.tensor([True, False]))
    latents = a.encode(images)
    close(found["decoded"][0], a.decode(latents)[0].detach(), "a dropped sample is quantised")
    close(found["decoded"][1], a.decode(a.quantize(latents)[0])[1].detach(), "a sample that is not"
          " dropped skips the quantiser")
    assert not torch.allclose(found["decoded"][1], a.decode(latents)[1])
    assert stage_a.PRESETS["paper"].quantise_drop == 0.1


def test_codebook_does_not_collapse():
    """From the released initialisation few codes win; after a revival most are used."""
    torch.manual_seed(0)
    a = stage_a.StageA(replace(TINY_A, codebook_size=512))
    latents = a.encode(torch.rand(8, 3, 64, 64))
    before = a.quantize(latents)[1].unique().numel()
    usage = stage_a.CodeUsage(512)
    usage.revive(a.vquantizer.embedding.weight, latents)
    after = a.quantize(latents)[1].unique().numel()
    assert before < 0.3 * 512 < 0.8 * 512 < after, (
        f"of 512 codes {before} are used at init and {after} after a revival, expected most")
    kept = a.vquantizer.embedding.weight.clone()
    usage.used[:] = True
    usage.revive(a.vquantizer.embedding.weight, latents)
    assert_close(a.vquantizer.embedding.weight, kept)


def test_hinge_loss():
    """Real logits above 1 and decoded ones below -1 cost nothing; 0 everywhere costs 1."""
    class Judge(nn.Module):
        def forward(self, images):
            return images.mean((1, 2, 3))
    real, fake = torch.full((2, 3, 4, 4), 2.0), torch.full((2, 3, 4, 4), -2.0)
    for one, other, expected in ((real, fake, 0.0), (fake, real, 3.0), (0 * real, 0 * fake, 1.0)):
        close(stage_a.discriminator_loss(Judge(), one, other), torch.tensor(expected),
              f"logits {one.mean():.0f} of real and {other.mean():.0f} of decoded patches cost")


def test_discriminator_sends_gradients():
    """The adversarial term adds its weight times the discriminator's gradient to the decoder's."""
    torch.manual_seed(0)
    a, images = shake(stage_a.StageA(TINY_A)), torch.rand(2, 3, 64, 64)
    drop = torch.zeros(2, dtype=torch.bool)
    judge = stage_a.PatchDiscriminator(8)
    weight = a.up_blocks[0][0].weight

    def gradient(discriminator):
        a.zero_grad()
        stage_a.loss(a, images, None, discriminator, drop)[0].backward()
        return weight.grad.clone()
    without, with_judge = gradient(None), gradient(judge)
    a.zero_grad()
    (-judge(a.decode(a.quantize(a.encode(images))[0])).mean()).backward()
    close(with_judge - without, TINY_A.adversarial_weight * weight.grad, atol=1e-6, rtol=1e-2,
          what="the decoder's gradient does not lead towards what the discriminator calls real")
    assert weight.grad.abs().max() > 0


def test_standardise():
    """standardise and unstandardise are inverse and have the published constants."""
    a, z = stage_a.StageA(replace(TINY_A, latent_mean=0.2, latent_std=0.3764)), torch.randn(9)
    close(a.standardise(torch.tensor([0.5764])), torch.tensor([1.0]), "(.5764 - .2) / .3764")
    assert_close(a.unstandardise(a.standardise(z)), z)
    with torch.device("meta"):
        compressor = semantic_compressor.SemanticCompressor(semantic_compressor.PRESETS["released"])
    assert_close(compressor.standardise(torch.tensor([-1.0, 41.0])),         # (z + 1) / 42
                 torch.tensor([0.0, 1.0]))
    assert stage_a.PRESETS["released"].latent_std == 0.3764
    images = torch.rand(16, 3, 32, 32)
    mean, std = stage_a.latent_scale(a, images)
    z = a.eval().encode(images)
    assert_close(torch.tensor([mean, std]), torch.stack([z.mean(), z.std()]).detach())


def test_drop_and_noise():
    """Each share loses what its name says, some of the rest is noised; zeros are zeros, raw, too.

    The paper's sizes: 5 % lose both, 5 % the text, 5 % sem; 30 % of the rest are noised.
    """
    torch.manual_seed(0)
    n = 20_000
    sem, text, null = torch.ones(n, 1, 1, 1), torch.ones(n, 1, 1), torch.zeros(1, 1, 1)
    paper = stage_b.PRESETS["paper"]
    other = replace(paper, drop_both=0.02, drop_text=0.5, drop_sem=0.08, noise_sem=0.1)
    for config, expected in ((paper, [0.05, 0.05, 0.05, 0.85 * 0.3, 0.0]),
                             (other, [0.02, 0.5, 0.08, 0.4 * 0.1, 0.0])):
        out, words = stage_b.drop_and_noise(sem, text, null, config, (0.0, 1.0))
        no_sem, no_text = (out == 0).flatten(), (words == 0).flatten()
        noised = ~no_sem & (out != 1).flatten()
        shares = [no_sem & no_text, no_text & ~no_sem, no_sem & ~no_text, noised, noised & no_text]
        close(torch.tensor([share.float().mean() for share in shares]), torch.tensor(expected),
              "shares without both, text, sem; noised; noised and textless", atol=0.008, rtol=0)
    clean = replace(stage_b.PRESETS["released"], noise_sem=0.0)
    out, _ = stage_b.drop_and_noise(42 * sem - 1, text, null, clean, (-1.0, 42.0))
    close(out.unique(), torch.tensor([0.0, 41.0]), "dropped and kept sem of value 41, raw")
    out, _ = stage_b.drop_and_noise(5 + 3 * torch.randn(n, 1, 1, 1), text, null, paper)
    kept = out[out != 0]                                # without a scale: the batch's own
    assert abs(kept.mean()) < 0.02 and abs(kept.std() - 1) < 0.02


def test_drop_text():
    """Each sample by itself gets the empty caption's tokens with the given rate."""
    torch.manual_seed(0)
    text, null = torch.ones(20_000, 2, 3), torch.zeros(1, 2, 3)
    out = stage_c.drop_text(text, null, 0.05)
    assert out.flatten(1).std(1).max() == 0                   # whole captions, never parts
    share = (out[:, 0, 0] == 0).float().mean().item()
    assert share == pytest.approx(0.05, abs=0.006), (
        f"{share:.1%} of 20,000 texts are dropped, expected about 5 %, each by itself")


def test_overfit_a():
    """Stage A reconstructs four pictures it trains on."""
    torch.manual_seed(0)
    # large patches of flat colour: what a two-stage encoder can learn in seconds
    images = torch.rand(4, 3, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3)
    model = stage_a.StageA(replace(TINY_A, widths=(16, 32), codebook_size=64))
    stage_a.CodeUsage(64).revive(model.vquantizer.embedding.weight, model.encode(images))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    first = last = None
    for _ in range(200):
        optimizer.zero_grad()
        value, found = stage_a.loss(model, images)
        value.backward()
        optimizer.step()
        first, last = first or found["mse"].item(), found["mse"].item()
    assert last < 0.01 < 10 * last < first, (first, last)


def overfit_c(text, null):
    """Two texts (2, L, E), overfitted: each samples its own x_0, swapped ones the other one's."""
    x_0 = torch.randn(2, 16, 3, 3)
    model = stage_c.StageC(replace(TINY_C, width=48))
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    for step in range(250):
        for group in optimizer.param_groups:
            group["lr"] = 4e-3 * min(1, (250 - step) / 125)
        optimizer.zero_grad()
        stage_c.loss(model, x_0.repeat(16, 1, 1, 1), text.repeat(16, 1, 1))[0].backward()
        optimizer.step()

    def draw(text):
        return stage_c.ddpm_sample(model.eval(), x_0.shape, text, null, steps=20, guidance=1,
                                   generator=stage_b.generators([3, 4]))
    for result, target in ((draw(text), x_0), (draw(text.flip(0)), x_0.flip(0))):
        right, wrong = (result - target).square().mean(), (result - target.flip(0)).square().mean()
        assert right < 0.3 and wrong > 3 * right, (
            f"a text samples the x_0 of another one: error {right:.2f} to its own, {wrong:.2f} to "
            "the other's")


def test_overfit_c_two_captions():
    """Two texts, overfitted, each sample their own x_0."""
    overfit_c(torch.randn(2, *TEXT), torch.zeros(1, *TEXT))


@pytest.mark.parametrize("prediction, width, lr", [("released", 32, 8e-3), ("v", 32, 8e-3)])
def test_overfit_b(prediction, width, lr):
    """After overfitting two latents told apart by sem alone, each sem samples its own x_0."""
    x_0 = torch.randn(2, 4, 4, 4).repeat_interleave(4, 2).repeat_interleave(4, 3)   # (2, 4, 16, 16)
    sem, text = torch.randn(2, 16, 3, 3), torch.zeros(2, *TEXT)
    model = stage_b.StageB(replace(TINY_B, widths=(width, 32, 32), cond_width=16,
                                   prediction=prediction, sem_init=1.0, t_power=1.5))
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    for step in range(250):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, (250 - step) / 125)
        optimizer.zero_grad()
        stage_b.loss(model, x_0.repeat(8, 1, 1, 1), sem.repeat(8, 1, 1, 1),
                     text.repeat(8, 1, 1))[0].backward()
        optimizer.step()

    def draw(sem):
        return stage_b.ddpm_sample(model.eval(), x_0.shape, sem, text, 0 * sem, text, guidance=1,
                                   generator=stage_b.generators([3, 4]))
    for result, target in ((draw(sem), x_0), (draw(sem.flip(0)), x_0.flip(0))):
        right, wrong = (result - target).square().mean(), (result - target.flip(0)).square().mean()
        assert right < 0.3 and wrong > 3 * right, (right, wrong)


def verbatim(module):
    """{name: source} of what stands under the banners "verbatim in stage_b.py and stage_c.py"."""
    parts = re.split(r"^# ---- (.*?) -+$", inspect.getsource(module), flags=re.M)
    text = "".join(part for banner, part in zip(parts[1::2], parts[2::2]) if "verbatim" in banner)
    return {name: inspect.getsource(getattr(module, name))
            for name in re.findall(r"^(?:def|class) (\w+)", text, re.M)}


def test_twins():
    """What stands in both stage_b.py and stage_c.py is the same to the letter."""
    b, c = verbatim(stage_b), verbatim(stage_c)
    assert {"alpha_bar", "Attention"} < b.keys() | c.keys(), "no banner says what is verbatim"
    for name in b | c:
        assert b.get(name) == c.get(name), (
            f"stage_b.py and stage_c.py differ in {name}: copy it over from the one you edited")
