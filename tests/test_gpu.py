"""The path on a GPU, as far as it can be known without one: fake CUDA tensors, bf16 on the CPU."""

import json
import subprocess
import sys
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from unittest import mock

import pytest
import torch
from torch._dynamo.utils import counters

import semantic_compressor
import stage_a
import stage_b
import stage_c
from experiments import fakegpu, fit
from plumbing import training
from plumbing.cli import UsageError
from test_shapes import TINY_A, TINY_B, TINY_C
from tests.common import HERE

HALF = partial(torch.autocast, "cpu", torch.bfloat16)
CONFIGS = {"a": TINY_A, "b": replace(TINY_B, remember=False), "c": replace(TINY_C, remember=False)}

# ---- tries, each in a process of its own, as fake CUDA may end it badly --------------------------

def step(name):
    with fakegpu.pretend() as gpu:
        return fit.step(name, "pocket", CONFIGS[name], gpu)


FAULTS = {"device": lambda x, w: x @ w, "float64": lambda x, w: x.double(),
          "dtype": lambda x, w: x.bfloat16() @ x, "wait": lambda x, w: float(x.sum()),
          "wait for a copy": lambda x, w: w.to("cuda"), "none": lambda x, w: x @ x}


def fault(name):
    with fakegpu.pretend() as gpu:
        x, w = torch.ones(4, 4, device="cuda"), torch.ones(4, 4)
        FAULTS[name](x, w)
        w.pin_memory().to("cuda", non_blocking=True)
        return sum(gpu.waits.values())


def samplers():
    with fakegpu.pretend(), fit.stand_ins("pocket"), torch.no_grad():
        device = training.setup(0)
        decoder = stage_b.load_decoder(device=device)
        model = stage_c.StageC(stage_c.PRESETS["pocket"]).to(device).eval()
        with training.autocast(device):
            text, null = decoder.text_b(["a red star"] * 2), decoder.text_b([""])
            latents = stage_c.ddpm_sample(model, (2, 16, 3, 3), text, null)
            images = stage_b.draw_images(decoder, latents, ["a red star"] * 2, [0, 1])
        return [str(latents.dtype), str(latents.device), str(images.device), *images.shape]


def counts():
    def forward():
        x = torch.ones(256, 1024, device="cuda")
        y = layer(x).sum()
        counted.extend([gpu.now - weights, sum(gpu.flops.values())])
        y.backward()
    with fakegpu.pretend() as gpu:
        layer = torch.nn.Linear(1024, 512, bias=False).to("cuda")
        conv = torch.nn.Conv2d(64, 64, 3, padding=1, groups=64, bias=False).to("cuda")
        weights = gpu.now
        counted = [weights]
        forward()
        counted.append(gpu.now - weights)                         # its gradient
        gpu.flops.clear()
        conv(torch.ones(2, 64, 8, 8, device="cuda", requires_grad=True)).sum().backward()
        return [*counted, sum(gpu.flops.values())]


TRIES = {**{name: partial(step, name) for name in "abc"},
         **{name: partial(fault, name) for name in FAULTS},
         "samplers": samplers, "counts": counts}
FORKS = """
import json, os, sys
from tests import test_gpu
for name, one in test_gpu.TRIES.items():
    sys.stdout.flush()
    if not os.fork():                                    # of a process that has imported all
        try:
            found = one()
        except Exception as error:
            found = f"{type(error).__name__}: {error}"
        print("RESULT", json.dumps([name, found]), flush=True)
        os._exit(0)
    os.wait()
"""


@pytest.fixture(scope="module")
def found():
    """{name of a try: what it returns; an exception: its words}."""
    done = subprocess.run([sys.executable, "-c", FORKS], cwd=HERE, capture_output=True, text=True)
    found = dict(json.loads(line.partition("RESULT ")[2])
                 for line in done.stdout.splitlines() if "RESULT " in line)
    assert list(found) == list(TRIES), done.stderr[-2000:]
    return found


# ---- devices, dtypes, waits ----------------------------------------------------------------------

@pytest.mark.parametrize("name", "abc")
def test_gpu_path_is_consistent(found, name):
    """Step, preview and samplers of each stage on fake CUDA tensors: one device, no float64 but for
    the distances to codes, no two dtypes in a product, and one wait of the host for the GPU in each
    step but for the log line.
    """
    step = found[name]
    assert isinstance(step, dict), f"Stage {name.upper()} on a GPU: {step}"
    allowed = {"bfloat16", "float64" if name == "a" else "float32"}
    assert set(step["flops"]) <= allowed and step["aside"] > 0, step
    waits = [place for kind, place, times in step["waits"] for _ in range(times)
             if "numbers.update" not in place]                            # the log line's own
    assert len(waits) == 1 and "flags.tolist()" in waits[0], (
        f"Stage {name.upper()}: a step waits for the GPU at {waits}")


def test_samplers_under_autocast(found):
    """C's and B's sampler and A's decoder under bf16: float32 comes out of those that divide."""
    assert found["samplers"] == ["torch.float32", "cuda:0", "cuda:0", 2, 3, 128, 128]


def test_faults_are_seen(found):
    """Planted faults: a tensor left on the CPU, a float64, two dtypes in a product, a wait."""
    seen = [found[name] for name in FAULTS]
    assert [isinstance(one, str) for one in seen] == [True] * 3 + [False] * 3, seen
    assert seen[3:] == [1, 1, 0], seen


def test_fake_gpu_counts(found):
    """Bytes and operations of small networks by hand: a layer, a grouped convolution, its step."""
    weights, kept, forward, left, grouped = found["counts"]
    assert weights == 4 * 1024 * 512 + -(-4 * 64 * 9 // 512) * 512
    assert kept == 4 * 256 * 1024 + 512, "the input, which backward needs, and the sum"
    assert forward == 2 * 256 * 1024 * 512 and left == 4 * 1024 * 512
    assert grouped == 3 * 2 * 9 * (2 * 64 * 8 * 8), "forward, and backward by input and weight"


# ---- bf16 ----------------------------------------------------------------------------------------

def tiny(stage):
    """A small model of B or C, and inputs of a loss."""
    torch.manual_seed(0)
    if stage is stage_b:
        return (stage_b.StageB(replace(TINY_B, dropout=0.0, prediction="released")),
                (torch.randn(2, 4, 8, 8), torch.randn(2, 16, 3, 3), torch.randn(2, 5, 128)))
    return stage_c.StageC(replace(TINY_C, dropout=0.0)), (torch.randn(2, 16, 3, 3),
                                                          torch.randn(2, 5, 128))


@pytest.mark.parametrize("stage", [stage_b, stage_c])
def test_what_stays_float32(stage):
    """Under bf16 autocast alpha_bar, the output layer, the division, the loss and EMA are float32,
    and a matrix product of the blocks is not.
    """
    model, inputs = tiny(stage)
    seen, last = {}, (model.clf if stage is stage_b else model.out)[1]
    block = next(one for one in model.modules() if isinstance(one, stage.Attention)).to_q
    for name, layer in (("last", last), ("block", block), ("model", model)):
        layer.register_forward_hook(lambda _, args, out, name=name: seen.update({name: out.dtype}))
    with HALF():
        value, t, error = stage.loss(model, *inputs)
        assert stage.alpha_bar(t).dtype is torch.float32
    assert seen == dict(last=torch.float32, block=torch.bfloat16, model=torch.float32), seen
    assert value.dtype is error.dtype is torch.float32
    value.backward()
    assert {one.grad.dtype for one in model.parameters() if one.grad is not None} == {torch.float32}
    ema, _ = tiny(stage)
    training.ema_update(ema, model, 0, 0.999)
    assert {one.dtype for one in ema.parameters()} == {torch.float32}


class HalfLayer(torch.nn.Module):
    """The output layer as autocast would run it."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        with HALF():
            return self.layer(x.bfloat16()).float()


def test_small_t_in_bf16():
    """Where |1 - B| is .01, at t = .001, bf16 does not raise the error; a bf16 output layer does.

    The model is brought there: it learns one latent, constant over the grid, at small t alone.
    """
    torch.manual_seed(0)
    model = stage_c.StageC(replace(TINY_C, depth=1, text_width=16, p2="none", dropout=0.0))
    x_0, text = torch.randn(16, 1, 1).expand(64, 16, 3, 3), torch.randn(1, 4, 16).expand(64, 4, 16)
    with torch.no_grad():                                     # A is the latent, |1 - B| is .04
        model.out[1].bias.copy_(torch.cat([x_0[0, :, 0, 0], torch.full((16,), 0.96)]))
    optimizer = torch.optim.Adam(model.parameters())
    for step in range(300):
        optimizer.param_groups[0]["lr"] = 2e-3 * (1 - step / 300)
        stage_c.loss(model, x_0, text, torch.rand(64) * 0.03 + 0.001)[0].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    t, noise, layer = torch.full((64,), 0.001), torch.randn(64, 16, 3, 3), model.out
    seen, errors = [], {}
    layer.register_forward_hook(lambda _, args, out: seen.append(out.chunk(2, 1)[1]))
    for name, half, out in (("fp32", False, layer), ("bf16", True, layer),
                            ("all bf16", True, HalfLayer(layer))):
        model.out = out
        with HALF(enabled=half), torch.no_grad():
            errors[name] = stage_c.loss(model, x_0, text, t, noise)[2].mean().item()
    size = (1 - seen[0]).abs().median().item()
    assert 0.008 < size < 0.0125, f"|1 - B| is {size}: the test does not visit the region"
    assert errors["bf16"] < 2 * errors["fp32"] < 0.01, errors
    assert errors["all bf16"] > 20 * errors["bf16"], errors


def test_frozen_encoders_in_bf16(encoder):
    """What C and B are trained on, made under bf16 autocast, is that of float32 up to 2 %."""
    torch.manual_seed(0)
    compressor = semantic_compressor.load(HERE / "pocket/stage_b.safetensors")
    vqgan = stage_a.load(HERE / "pocket/stage_a.safetensors")
    from pocket import shapes
    from torchvision.transforms.functional import to_tensor
    scenes = [shapes.scene(index) for index in range(8)]
    images = torch.stack([to_tensor(shapes.render(one, 128)) for one in scenes])
    makers = {"text": lambda: encoder([shapes.caption(one) for one in scenes]),
              "compressor": lambda: compressor(semantic_compressor.resize(images)).float(),
              "Stage A": lambda: vqgan.encode(images).float()}
    for name, make in makers.items():
        with torch.no_grad():
            whole = make()
            with HALF():
                off = (make() - whole).std() / whole.std()
        assert off < 0.02, f"{name}: bf16 is off by {off:.2%} of the standard deviation"


@contextmanager
def bf16_on_the_cpu():
    with mock.patch.object(training, "autocast", lambda device: HALF()):
        yield


@pytest.mark.slow
def test_gpu_bf16_learns_alike(tmp_path, drawings):
    """100 steps of A, B and C of pocket's size in bf16: by noise level, no farther from float32
    than twice what two seeds of float32 differ, in the middle one of ten lines of the log.
    """
    # the middle one: a single sample near |1 - B| = 0 makes one line ten times another
    small = dict(steps=100, batch_size=4, workers=0, log_every=10, preview_every=1000,
                 save_every=1000, warmup=10, cooldown=0)
    a, b = HERE / "pocket/stage_a.safetensors", HERE / "pocket/stage_b.safetensors"
    runs = {"a": (stage_a, lambda config, out: stage_a.train(config, drawings, out)),
            "b": (stage_b, lambda config, out: stage_b.train(config, drawings, out, a)),
            "c": (stage_c, lambda config, out: stage_c.train(config, drawings, out, a, b))}
    for name, (stage, train) in runs.items():
        curves = []
        for seed, half in ((0, False), (1, False), (0, True)):
            out = tmp_path / f"{name}{seed}{half}"
            keep = {} if name == "a" else {"remember": False}
            config = replace(stage.PRESETS["pocket"], seed=seed, **small, **keep)
            with bf16_on_the_cpu() if half else nullcontext(), mock.patch.object(stage, "preview"):
                train(config, out)
            lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
            errors = [[line["mse"]] if name == "a" else line["mse_by_t"] for line in lines]
            curves.append(torch.tensor([[float("nan") if one is None else one for one in levels]
                                        for levels in errors]).log())              # (lines, levels)
        one, two, bf16 = curves
        spread, off = ((curve - one).abs().nanmedian(0).values for curve in (two, bf16))
        assert (off <= 2 * spread).all(), (
            f"Stage {name.upper()}: the log of the error by noise level differs by {off.tolist()} "
            f"in bf16 and by {spread.tolist()} with another seed")


# ---- what fits -----------------------------------------------------------------------------------

def test_pair_that_fits():
    """By the peaks of two micro-batches: the most that fit, and the divisor of the whole batch."""
    runs = {96: dict(step=1000), 48: dict(step=520)}          # 40 + 10 an image
    assert fit.largest(runs, 96, 690) == 65 and fit.largest(runs, 96, 30) == 0
    assert fit.pair(1536, 65) == "--batch-size 64 --accumulate 24"
    assert fit.pair(1536, 0) == "nothing fits"


def test_out_of_memory_names_what_fits(monkeypatch, tmp_path, capsys):
    """A run that fills the GPU ends with what fits it: the pair of flags to go on with."""
    def train(config, source, out):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory.")

    def counted(command, **options):
        assert command[1:8] == ["-m", "experiments.fit", "--preset", "paper", "--stages", "c",
                                "--cards"] and "batch_size=96" in command, command
        assert command[8:9] == ["24.0"]
        return mock.Mock(stdout="  24 GB: --batch-size 48 --accumulate 32")
    monkeypatch.setattr(torch.cuda, "get_device_properties",
                        lambda device: mock.Mock(total_memory=int(23.6 * 2 ** 30)))
    monkeypatch.setattr(training.subprocess, "run", counted)
    monkeypatch.setattr(sys, "argv", ["stage_c.py", "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as stop:
        training.command("c", train, stage_c.Config, stage_c.PRESETS, "C", lambda args: "")
    assert "--batch-size 48 --accumulate 32" in str(stop.value), stop.value
    assert "memory is full" in capsys.readouterr().err


def job(name, preset, **changes):
    return dict(stage=name, preset=preset, previews=False,
                config=dict(vars(fit.STAGES[name].PRESETS[preset]), **changes))


@pytest.mark.slow
@pytest.mark.parametrize("name, preset", [
    ("a", "paper"), ("b", "paper"), ("b", "paper-2"), ("c", "paper"), ("c", "paper-2"),
    ("c", "paper-3"), ("c", "released"), ("c", "finetune")])   # C's paper-4: as paper-2
def test_gpu_presets_fit_40_gb(name, preset):
    """The step of each preset, as it is, takes no more of a 40 GB card than fit.py allows."""
    peak = fit.run(job(name, preset))["step"]
    room = (fit.USABLE[40] * 0.9 - 0.6) * fit.GIB
    assert peak < room, f"Stage {name.upper()} {preset}: {peak / fit.GIB:.1f} GiB, expected less"


@pytest.mark.slow
def test_gpu_counts_agree_with_memory():
    """fit.py --check: what is counted is within a tenth of what the CPU really takes, C in fp32."""
    counted, real = (fit.run(dict(name="c", half=False, real=real)) for real in (False, True))
    assert abs(counted / real - 1) < 0.1, (counted, real)


def test_measured_steps(monkeypatch):
    """`fit --measure`: two steps warm up, then the clock starts; an image counts in each
    micro-batch; and without a GPU it says so."""
    class Card(fit.Card):
        turns, now, ticks, settled = 2, 0, 0, []
        peak = property(lambda self: 7, lambda self, _: self.settled.append(self.ticks))

        def wait(self):
            self.ticks += 1
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: 9)
    config = replace(TINY_C, batch_size=2, accumulate=3)
    found = fit.step("c", "pocket", config, card := Card(), previews=False)
    assert (card.settled[:2], card.ticks) == ([0, 2], 4), "two steps before the clock, two under it"
    assert (found["images"], found["step"], found["reserved"]) == (6, 7, 9)
    assert 0 < found["seconds"] < 60
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match="expected a GPU"):
        fit.measured("c", "pocket", config)


# ---- torch.compile -------------------------------------------------------------------------------

@pytest.mark.parametrize("arguments, said", [
    ("--stages d", "letters of abc"), ("--cards 24GB", "--cards 24GB: expected GB"),
    ("--share 0", "a share above 0"), ("--preset none", "no stage of abc has it")])
def test_fit_refuses(arguments, said, monkeypatch):
    """What it cannot count is one sentence."""
    monkeypatch.setattr("sys.argv", ["fit", *arguments.split()])
    with pytest.raises(UsageError, match=said):
        fit.main()


@pytest.mark.slow
@pytest.mark.parametrize("name, kind", [
    ("c", "plain"), ("c", "checkpointed"), ("c", "keys and values given"),
    ("b", "checkpointed"), ("b", "keys and values given")])
def test_gpu_compile_has_no_breaks(name, kind):
    """Under torch.compile a model is one graph, and sizes seen once compile nothing further."""
    torch.compiler.reset()
    counters.clear()
    stage, tiny, scale = (stage_b, TINY_B, 16 / 3) if name == "b" else (stage_c, TINY_C, 1)
    model = getattr(stage, f"Stage{name.upper()}")(replace(
        tiny, dropout=0.1, checkpoint_activations=kind == "checkpointed"))
    given = kind == "keys and values given"
    model.train(not given).compile(backend="aot_eager", dynamic=False)

    def once(h, w):
        sem = [torch.randn(2, 16, h, w)] if name == "b" else []
        x = torch.randn(2, model.config.latent_channels, int(h * scale), int(w * scale))
        conditions = (*sem, torch.randn(2, 24, 128))
        with torch.set_grad_enabled(not given):
            out = model(x, torch.rand(2), *conditions,
                        *([model.precompute(*conditions)] if given else []))
        if not given:
            out.sum().backward()

    sizes = ((6, 9), (9, 6), (6, 6))                  # as paper-3's: two ratios and a square
    for size in sizes:
        once(*size)
    assert not counters["graph_break"], f"Stage {name.upper()}: {dict(counters['graph_break'])}"
    seen = counters["stats"]["unique_graphs"]
    for size in (*sizes[::-1], *sizes):
        once(*size)
    assert counters["stats"]["unique_graphs"] == seen <= len(sizes), "sizes seen compile anew"
