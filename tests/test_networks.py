"""What Stages B and C are made of: values worked out by hand, or an independent reference."""

from dataclasses import replace

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.testing import assert_close

import stage_a
import stage_b
import stage_c
from test_shapes import TEXT, TINY_A, TINY_B, TINY_C, shake

both = pytest.mark.parametrize("module", [stage_b, stage_c])
FIVE = replace(TINY_B, widths=(8, 8, 8, 8, 8), heads=(0, 2, 2, 2, 2), blocks=(1, 1, 1, 1, 1))


def built(module, **changes):
    """A small Stage B or C."""
    return (stage_b.StageB(replace(TINY_B, **changes)) if module is stage_b else
            stage_c.StageC(replace(TINY_C, **changes)))


def all_of(model, kind):
    """[(name, layer)] of one kind; there must be some."""
    found = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, kind)]
    assert found, kind
    return found


# ---- how they start ------------------------------------------------------------------------------

def spread(weight):
    """Standard deviation of a uniform or normal weight."""
    return weight.detach().std().item()


@both
def test_all_residuals_start_with_the_variance_of_one(module):
    """A block's last layer starts as Xavier's, over the square root of the number of blocks.

    Xavier: deviation sqrt(2 / (inputs + outputs)), and a ResBlock has 4c inputs, c outputs.
    """
    model = (built(stage_b, widths=(32, 32), heads=(0, 2), blocks=(3, 6)) if module is stage_b else
             built(stage_c, width=32, depth=9))
    for name, block in all_of(model, module.ResBlock):
        expected = (2 / (5 * 32)) ** 0.5 / 3                              # 9 blocks in all
        assert spread(block.channelwise[-1].weight) == pytest.approx(expected, rel=0.06), (
            f"{name}: the last layer is not scaled by 1 / sqrt(9)")
        c_in = block.channelwise[0].in_features
        assert spread(block.channelwise[0].weight) == pytest.approx((2 / (c_in + 128)) ** 0.5,
                                                                    rel=0.06), (
            f"{name}: the first layer does not start as Xavier's")


@both
def test_time_and_attention_start_as_in_the_official_code(module):
    """TimestepBlocks start as the identity; q, k, v as Xavier's of one (3c, c) matrix."""
    model = built(module, **(dict(widths=(32, 32), heads=(0, 2), blocks=(1, 1))
                             if module is stage_b else {}))
    for name, block in all_of(model, module.TimestepBlock):
        x = torch.randn(2, block.mapper.out_features // 2, 3, 5)
        assert torch.equal(block(x, torch.randn(2, 64)), x), f"{name} is not the identity at init"
    for name, block in all_of(model, module.Attention):
        for layer in (block.to_q, block.to_k, block.to_v):
            assert spread(layer.weight) == pytest.approx((2 / 128) ** 0.5, rel=0.1), (
                f"{name}: q, k, v do not start as one (3c, c) matrix would")
        assert spread(block.to_out[0].weight) == pytest.approx((2 / 64) ** 0.5, rel=0.1), (
            f"{name}: the output does not start as Xavier's")


def test_first_and_last_layers_start_as_in_the_official_code():
    """B's embedding has Xavier's gain .02, maps of text N(0, .02), those of sem N(0, sem_init);
    all of C's first layers N(0, .02); both heads are zero."""
    for std in (stage_b.PRESETS["paper"].sem_init, 1.0):
        model = built(stage_b, sem_init=std, cond_width=64)
        largest = model.embedding[1].weight.abs().max().item()
        bound = 0.02 * (6 / (16 + 8)) ** 0.5                              # 16 channels in, 8 out
        assert 0.8 * bound < largest <= bound, "the embedding's gain is not .02"
        assert spread(model.clip_mapper.weight) == pytest.approx(0.02, rel=0.06), (
            "B's map of the text does not start as N(0, .02)")
        for mapper in filter(None, model.effnet_mappers):
            assert spread(mapper.weight) == pytest.approx(std, rel=0.1), (
                f"the maps of sem do not start as N(0, {std})")
        assert not model.clf[1].weight.any() and not model.clf[1].bias.any(), "B's head is not zero"
    model = built(stage_c)
    for layer in (model.projection, model.cond_mapper[0], model.cond_mapper[2]):
        assert spread(layer.weight) == pytest.approx(0.02, rel=0.1), (
            "C's first layers do not start as N(0, .02)")
    assert not model.out[1].weight.any() and not model.out[1].bias.any(), "C's head is not zero"


def test_betas(chain):
    """B's AdamW has the official code's betas .9, .95, for the compressor, too; C's has torch's."""
    for stage, betas in (("b", (0.9, 0.95)), ("c", (0.9, 0.999))):
        state = torch.load(chain / f"stage_{stage}/checkpoint.pt", weights_only=True)
        adamw = state["optimizer"].get(0, state["optimizer"])             # the other is Muon's
        for group in adamw["param_groups"]:
            assert tuple(group["betas"]) == betas, f"betas of Stage {stage}: {group['betas']}"


# ---- what they compute ---------------------------------------------------------------------------

@both
def test_global_response_norm(module):
    """gamma (x * share) + beta + x, share a channel's norm over the mean norm of all, by hand."""
    norm = module.GlobalResponseNorm(2)
    with torch.no_grad():
        norm.gamma.fill_(2), norm.beta.fill_(1)
    x = torch.tensor([[[[3.0, 9.0], [4.0, 12.0]]]])       # norms 5 and 15, mean 10: shares .5, 1.5
    expected = torch.tensor([[[[7.0, 37.0], [9.0, 49.0]]]])
    assert_close(norm(x), expected, msg="GlobalResponseNorm is not 2 (x * share) + 1 + x, where a "
                                        "share is a channel's norm over the mean of all norms")
    assert_close(norm(torch.cat([x, 7 * x])), torch.cat([expected, 7 * expected - 6]),
                 msg="a sample's norms depend on the batch")


@both
def test_dropout_is_where_the_official_code_has_it(module, monkeypatch):
    """In a ResBlock after GlobalResponseNorm; in attention on the weights; nowhere else; only
    while training."""
    model = built(module, dropout=0.1).train()
    for name, block in all_of(model, module.ResBlock):
        kinds = [type(layer) for layer in block.channelwise]
        assert kinds == [nn.Linear, nn.GELU, module.GlobalResponseNorm, nn.Dropout, nn.Linear], (
            f"{name}: {kinds}")
    layers = all_of(model, nn.Dropout)
    assert len(layers) == len(all_of(model, module.ResBlock)), "a Dropout outside of ResBlocks"
    assert {layer.p for _, layer in layers} == {0.1}
    rates, plain = [], F.scaled_dot_product_attention

    def spy(*given, dropout_p=0.0):
        rates.append(dropout_p)
        return plain(*given, dropout_p=dropout_p)
    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    inputs = ((torch.randn(2, 4, 16, 16), torch.rand(2), torch.randn(2, 16, 3, 3))
              if module is stage_b else (torch.randn(2, 16, 3, 3), torch.rand(2)))
    for training, rate in ((True, 0.1), (False, 0.0)):
        shake(model).train(training)
        rates.clear()
        one, two = (model(*inputs, torch.ones(2, *TEXT)) for _ in range(2))
        assert set(rates) == {rate}, f"attention drops {set(rates)} of its weights, not {rate}"
        assert torch.equal(one, two) != training


def test_attention_is_softmax_over_own_and_conditions():
    """softmax(q k / sqrt(width of a head)) v over x's tokens and the condition's, by loops."""
    block = shake(stage_c.Attention(6, 2, 0.0), 0.5)
    x, text = torch.randn(1, 3, 6), torch.randn(1, 4, 6)
    tokens = torch.cat([x, text], dim=1)[0]
    q, k, v = block.to_q(x)[0], block.to_k(tokens), block.to_v(tokens)
    heads = []
    for part in (slice(0, 3), slice(3, 6)):
        weights = (q[:, part] @ k[:, part].T / 3 ** 0.5).exp()
        heads.append(weights / weights.sum(1, keepdim=True) @ v[:, part])
    assert_close(block(x, *block.keys_values(text))[0], block.to_out[0](torch.cat(heads, dim=1)),
                 msg="attention is not softmax(q k / sqrt(3)) v over both")


def clf_of(model, x, sem, text):
    """What Stage B's output layer makes: eps_hat itself holds x_t whatever the U-Net does."""
    found = []
    handle = model.clf.register_forward_hook(lambda _, given, out: found.append(out))
    with torch.no_grad():
        model(x, torch.full((len(x),), 0.5), sem, text)
    handle.remove()
    return found[0]


@pytest.mark.parametrize("level", [0, 1, 2])
def test_unet_skips(level):
    """x_t reaches the output through each level's skip alone: what comes up from below is cut."""
    model = shake(stage_b.StageB(replace(
        TINY_B, widths=(8, 8, 8, 8), heads=(0, 2, 2, 2), blocks=(1, 1, 1, 1)))).eval()
    up = model.up_blocks[2 - level][-1][1]                   # from level + 1 up to this level
    nn.init.zeros_(up.weight)
    for other in range(level):                               # and the skips of the finer levels
        first, c = model.up_blocks[3 - other][0].channelwise[0], 8
        first.weight.data[:, c:2 * c] = 0                    # [ own | skip | sem ]
    x, sem, text = torch.randn(2, 4, 32, 32), torch.randn(2, 16, 3, 3), torch.randn(2, *TEXT)
    change = (clf_of(model, x, sem, text) - clf_of(model, x.flip(0), sem, text)).abs().max().item()
    assert change > 1e-4, f"the U-Net skip of level {level} carries nothing: {change:.1e}"
    first = model.up_blocks[3 - level][0].channelwise[0]
    first.weight.data[:, 8:16] = 0
    change = (clf_of(model, x, sem, text) - clf_of(model, x.flip(0), sem, text)).abs().max().item()
    assert change == 0, f"the way down is not at channels c to 2c of what level {level} takes"


# ---- sem at the size of each level ---------------------------------------------------------------

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


def keys(x):
    """Keys' cubic with a = -1/2."""
    x = abs(x)
    return (1.5 * x ** 3 - 2.5 * x ** 2 + 1 if x < 1 else
            -0.5 * x ** 3 + 2.5 * x ** 2 - 4 * x + 2 if x < 2 else 0.0)


def test_sem_is_resized_as_in_the_official_code():
    """Bicubic with antialias and align_corners: sums with Keys' cubic, written out.

    A step is (inputs - 1) / (outputs - 1) inputs long, as align_corners has it, and the cubic that
    much wider where it is above 1, as antialias has it. From 12x12 to 16x16 … 1x1.
    """
    sem = torch.randn(1, 16, 12, 12)
    for level, found in resized(stage_b.StageB(replace(FIVE, heads=(2, 2, 2, 2, 2))), sem, 32, 32):
        n = 16 // 2 ** level
        step = 11 / (n - 1) if n > 1 else 0.0
        rows = torch.zeros(n, 12)
        for i in range(n):
            for j in range(12):
                rows[i, j] = keys((j + 0.5 - step * (i + 0.5)) / max(step, 1.0))
        rows = rows / rows.sum(1, keepdim=True)
        expected = rows @ sem @ rows.T
        off = (found - expected).abs().max().item()
        assert off < 1e-4, f"sem is not resized bicubically to {n}x{n}: off by {off:.2g}"


# ---- sampling ------------------------------------------------------------------------------------

class Sum(nn.Module):
    """eps_hat is the sum of the means of all conditions, everywhere."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def precompute(self, *conditions):
        return sum(one.mean(tuple(range(1, one.dim()))) for one in conditions)

    def forward(self, x_t, t, *conditions):
        return torch.ones_like(x_t) * conditions[-1].view(-1, 1, 1, 1)


@both
def test_guidance_formula(module):
    """eps_hat = null + w (conditional - null), and null has no text and, in B, no sem: by hand."""
    conditional, null = (([torch.full((2, 16, 3, 3), 2.0), torch.full((2, *TEXT), 0.5)],
                          [torch.zeros(2, 16, 3, 3), torch.full((1, *TEXT), 0.2)])
                         if module is stage_b else
                         ([torch.full((2, *TEXT), 0.5)], [torch.full((1, *TEXT), 0.2)]))
    one, zero = (2.5, 0.2) if module is stage_b else (0.5, 0.2)
    for w in (0, 1, 2.5, 4):
        out = module.ddpm_sample(Sum(), (2, 4, 3, 3), *conditional, *null, 1, w,
                                 x=torch.zeros(2, 4, 3, 3))
        # one step from alpha_bar 1e-4 to .9999: alpha = 1.0001e-4, and from x = 0 the mean is
        # -(1 - alpha) / sqrt(1 - 1e-4) / sqrt(alpha) eps_hat = -99.99 eps_hat
        eps_hat = (out / -99.99).mean().item()
        expected = zero + w * (one - zero)
        assert eps_hat == pytest.approx(expected, rel=1e-3), (
            f"guidance {w}: eps_hat is {eps_hat:.4f}, null + w (conditional - null) {expected:.4f}")


@pytest.mark.parametrize("condition, start", [("raw", "gaussian"), ("standardised", "tokens")])
def test_preview_starts_as_sampling_does(condition, start, tmp_path, monkeypatch):
    """Stage B's preview: codebook tokens (§3.3), Gaussian noise with condition raw (released)."""
    from semantic_compressor import PRESETS, SemanticCompressor
    from plumbing.text import text_encoder
    a = shake(stage_a.StageA(TINY_A)).eval()
    b = shake(stage_b.StageB(replace(TINY_B, condition=condition))).eval()
    compressor = SemanticCompressor(PRESETS["pocket"]).eval()
    encoder, given, plain = text_encoder("pocket"), [], stage_b.ddpm_sample

    def spy(model, shape, sem, text, null_sem, null_text, steps, guidance, x, *more):
        given.append((x, sem))
        return plain(model, shape, sem, text, null_sem, null_text, steps, guidance, x, *more)
    monkeypatch.setattr(stage_b, "ddpm_sample", spy)
    batch = {"images": torch.rand(9, 3, 128, 128), "captions": ["a red star"] * 9}
    stage_b.preview(b, compressor, a, encoder, batch, tmp_path / "preview.png")
    decoder = stage_b.Decoder(a, b, compressor.scale, encoder, None)
    sem = torch.randn(8, 16, 3, 3)
    for named in (None, start):
        stage_b.draw_images(decoder, sem, ["a red star"] * 8, range(8), start=named)
    starts = [x for x, _ in given]
    if start == "gaussian":
        assert starts == [None] * 3, "the preview of a raw Stage B does not start from noise"
    else:
        assert all(torch.equal(x, starts[1]) for x in starts), "preview and sampling start apart"
        codes = a.standardise(a.vquantizer.embedding.weight)
        rows = starts[0].permute(0, 2, 3, 1).reshape(-1, 1, 4)
        assert (rows - codes).abs().amax(2).amin(1).max() < 1e-5, "the start is no codebook tokens"
