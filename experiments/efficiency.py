"""How much work, and how fast on this machine: the questions of the paper's Table 2 and Figure 4.

    python -m experiments.efficiency [--size pocket] [--parts train,sample] [--out runs/efficiency]
    python -m experiments.efficiency --size bench --against diffusers
    python -m experiments.efficiency --parts loader
    python -m experiments.efficiency --parts recipe [--size pocket]
    python -m experiments.efficiency --size released --batch-size 64          on a GPU

Networks are random: speed does not depend on what they have learned. All that is compared runs in
one process in alternating turns; reported are the median, the least and the most.

    train    one optimizer step of Stage C (pocket: of A, B and C), eager and compiled: images/s,
             memory, share of the matrix-product peak that the same run measures (and, on an A100,
             of its nominal 312 TFLOP/s), and what the recipe of E.3 would take at that share
    sample   the chain C -> B -> A without the text tower, by batch size, eager and compiled
    loader   JPEGs from tars: samples per core-second here, and with webdataset and Pillow
    recipe   counted operations of whole trainings (experiments/price.py); nothing is measured

--against diffusers puts diffusers' modules with the same weights beside ours; --against sd adds the
U-Nets and VAEs of SD 2.1 and SDXL to `sample`, 50 steps, as in Figure 4 (`pip install diffusers
webdataset matplotlib`: requirements-dev.txt). Writes efficiency.json, efficiency.md and
efficiency.png into --out; a later run adds to what is there. After --minutes (8) no further turn
begins, and no other grid, batch size or picture size; what is left out is named.
"""

import copy
import gc
import io
import json
import math
import platform
import statistics
import sys
import tarfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from PIL import Image
from tqdm import tqdm

import data
import semantic_compressor
import stage_a
import stage_b
import stage_c
from experiments import price
from plumbing import cli, training
from published import weights

A100 = 312e12                    # nominal FLOP/s of its bf16 matrix products
KG_PER_A100_HOUR = 2276 / 24602  # the paper's Table 2 (as 250 W x 0.37 kg/kWh, PUE 1: Lacoste 2019)
SIZES = {                        # Stage C; A and B: the preset beside it, None: not part of it
    "pocket": (stage_c.PRESETS["pocket"], "pocket"),
    "bench": (replace(stage_c.PRESETS["paper"], width=1024, depth=12, dropout=0.0), None),
    "paper": (stage_c.PRESETS["paper"], "paper"),
    "released": (stage_c.PRESETS["released"], "released")}


# ---- measuring -----------------------------------------------------------------------------------

def fresh():
    """Forget compiled code and freed networks: one group of measurements must not know another."""
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def seconds(functions, device, turns, warm=2, until=math.inf):
    """{name: function} -> {name: [seconds of each turn]}; the functions take turns.

    until: by time.perf_counter(); from then on no other turn begins, but for the first.
    """
    def once(function):
        if device.type == "cuda":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - begin
    for name, function in functions.items():               # compiles, chooses kernels, fills caches
        for _ in range(warm):
            once(function)
    found = {name: [] for name in functions}
    for _ in tqdm(range(turns), desc=" / ".join(functions), unit="turn", leave=False):
        for name, function in functions.items():
            found[name].append(once(function))
        if time.perf_counter() > until:
            break
    return found


def late(settings, what):
    """Whether --minutes are over; then `what` is left out, and this says so."""
    over = time.perf_counter() > settings.until
    if over:
        print(f"{what}: left out, the {settings.minutes:g} minutes (--minutes) are over")
    return over


def summary(times, per=1):
    """Median, least and most of `times` in seconds; per: images in each of them."""
    middle = statistics.median(times)
    return dict(seconds=middle, least=min(times), most=max(times), images_per_second=per / middle)


def peak(device):
    """FLOP/s of the best of a few large matrix products: bf16 on a GPU, fp32 on a CPU."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    best = 0.0
    for n in (4096, 8192) if device.type == "cuda" else (1024, 2048):
        x, y = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
        times = seconds({"matrix product": lambda: x @ y}, device, 10)["matrix product"]
        best = max(best, 2 * n ** 3 / min(times))
    return best


def name_of(device):
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    return f"{torch.get_num_threads()} CPU cores, {platform.machine()}"


# ---- the networks and their steps ----------------------------------------------------------------

def shaken(model):
    """Add noise to all parameters: at init the output layer is zero and hides what is before it."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model


def trainer(model, loss, device, averaged=True):
    """A function that does one training step as the stages do: loss, backward, clip, AdamW, EMA."""
    model.train()
    ema = copy.deepcopy(model).eval().requires_grad_(False) if averaged else None
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)

    def step():
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            value, *_ = loss()
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if averaged:
            training.ema_update(ema, model, 10_000, 0.999)
    return step


def stage_c_inputs(config, grid, batch, device):
    """x_0 (B, 16, h, w) and text (B, L, E); L as the text encoder gives: 77, pocket 24."""
    tokens = 24 if config.text_encoder == "pocket" else 77
    return (torch.randn(batch, config.latent_channels, *grid, device=device),
            torch.randn(batch, tokens, config.text_width, device=device))


class Theirs(nn.Module):
    """diffusers' WuerstchenPrior with the weights of a StageC, in the form that our code calls.

    fused: with scaled_dot_product_attention. As its constructor leaves it, it multiplies matrices.
    """

    def __init__(self, model, fused=True):
        from diffusers.models.attention_processor import AttnProcessor2_0
        from diffusers.pipelines.deprecated.wuerstchen.modeling_wuerstchen_prior import (
            WuerstchenPrior)
        super().__init__()
        settings = {name: value for name, value in weights.to_diffusers(
            "C", model.config, {})[0].items() if not name.startswith("_")}
        self.prior = WuerstchenPrior(**settings).to(next(model.parameters()).device)
        self.prior.load_state_dict(model.state_dict())
        if fused:
            self.prior.set_attn_processor(AttnProcessor2_0())

    def precompute(self, text):                         # it makes keys and values at every step
        return None

    def forward(self, x_t, t, text, precomputed=None):
        return self.prior(x_t, t, text)


def compiled(model):
    """A copy of `model`, compiled for the shapes it will see."""
    twin = copy.deepcopy(model)
    twin.compile(dynamic=False)
    return twin


def variants(model, against):
    """{label: model}: eager and compiled, ours and, if asked for, diffusers'."""
    found = {"eager": model, "compiled": compiled(model)}
    if against == "diffusers":
        found["diffusers eager"] = Theirs(model)
        found["diffusers eager, as it comes"] = Theirs(model, fused=False)
        found["diffusers compiled"] = compiled(found["diffusers eager"])
    return found


# ---- parts of the study --------------------------------------------------------------------------

def train_stage_c(config, grid, batch, device, settings, best):
    """Images/s of one training step, eager and compiled; and how much of the peak that is."""
    fresh()
    x_0, text = stage_c_inputs(config, grid, batch, device)
    t, noise = torch.rand(batch, device=device), torch.randn_like(x_0)
    model = shaken(stage_c.StageC(config).to(device))
    rows = {}

    def step(model):
        return trainer(model, lambda: stage_c.loss(model, x_0, text, t, noise, p2=config.p2),
                       device)
    if device.type == "cuda":                           # what one eager training needs, alone
        torch.cuda.reset_peak_memory_stats()
        step(copy.deepcopy(model))()
        rows["memory_gib"] = torch.cuda.max_memory_allocated() / 2 ** 30
        fresh()
    models = variants(model, settings.against)
    if settings.against == "diffusers":                 # the same function, before it is timed
        with torch.no_grad():
            ours, its = (models[name].eval()(x_0, t, text) for name in ("eager", "diffusers eager"))
        rows["worst_difference"] = ((ours - its).abs().max() / ours.abs().max()).item()
    times = seconds({name: step(one) for name, one in models.items()}, device, settings.turns,
                    until=settings.until)
    for name, one in times.items():
        flop = 3 * batch * price.of_c(config, grid)
        rows[name] = dict(summary(one, batch), share_of_peak=flop / statistics.median(one) / best)
    return rows


def train_pocket(device, settings):
    """Images/s of one training step of each stage at pocket size, batch as in its preset."""
    found = {}

    def timed(steps, batch):
        return {name: summary(times, batch)
                for name, times in seconds(steps, device, settings.turns,
                                           until=settings.until).items()}
    a, b = stage_a.PRESETS["pocket"], stage_b.PRESETS["pocket"]
    c = stage_c.PRESETS["pocket"]
    images = torch.rand(a.batch_size, 3, a.crop, a.crop, device=device)
    vqgan = stage_a.StageA(a).to(device)
    fresh()
    found["A"] = timed({"eager": trainer(vqgan, lambda: stage_a.loss(vqgan, images), device,
                                         averaged=False)}, a.batch_size)

    x_0 = torch.randn(b.batch_size, 4, b.image_size // 4, b.image_size // 4, device=device)
    pixels = semantic_compressor.resize(
        torch.rand(b.batch_size, 3, b.image_size, b.image_size, device=device))
    text = torch.randn(b.batch_size, 24, b.text_width, device=device)

    def both():
        return nn.ModuleDict(dict(model=stage_b.StageB(b), compressor=semantic_compressor.
                                  SemanticCompressor(semantic_compressor.PRESETS["pocket"])))

    def step_b(nets):
        def value():
            sem = nets["compressor"](pixels).float()
            sem = (sem - sem.detach().mean()) / sem.detach().std()
            sem, tokens = stage_b.drop_and_noise(sem, text, text[:1], b)
            return stage_b.loss(nets["model"], x_0, sem, tokens)
        return trainer(nets, value, device)
    eager, fast = both().to(device), both().to(device)
    for net in fast.values():
        net.compile(dynamic=False)
    fresh()
    found["compressor + B"] = timed({"eager": step_b(eager), "compiled": step_b(fast)},
                                    b.batch_size)

    side = c.image_size * 3 // 128
    x_c, text_c = stage_c_inputs(c, (side, side), c.batch_size, device)
    fresh()
    found["C"] = timed({
        name: trainer(model, lambda model=model: stage_c.loss(model, x_c, text_c, p2=c.p2), device)
        for name, model in variants(stage_c.StageC(c).to(device), settings.against).items()},
        c.batch_size)
    return found


@torch.no_grad()
def sample_stages(config, preset, device, settings):
    """Seconds of C (60 steps, guidance 4), B (12 steps) and A for one batch, by batch size."""
    found = {}
    image = settings.image_size or (128 if preset == "pocket" else 1024)
    side = image * 3 // 128
    model = stage_c.StageC(config).to(device).eval().requires_grad_(False)
    if preset:
        b = stage_b.StageB(stage_b.PRESETS[preset]).to(device).eval().requires_grad_(False)
        a = stage_a.StageA(stage_a.PRESETS[preset]).to(device).eval().requires_grad_(False)
    for batch in settings.batches:
        if late(settings, f"sampling in batches of {batch}"):
            break
        fresh()
        chains = {name: dict(C=one) for name, one in variants(model, settings.against).items()}
        if preset:
            chains["eager"]["B"], chains["compiled"]["B"] = b, compiled(b)
        x_0, text = stage_c_inputs(config, (side, side), batch, device)
        jobs = {}
        for name, nets in chains.items():
            def draw_c(net=nets["C"]):
                stage_c.ddpm_sample(net, x_0.shape, text, text[:1], settings.steps_c)
            jobs[f"C {name}"] = draw_c
            if "B" in nets:
                text_b = torch.randn(batch, text.shape[1], nets["B"].config.text_width,
                                     device=device)
                shape = (batch, 4, image // 4, image // 4)

                def draw_b(net=nets["B"], text_b=text_b, shape=shape):
                    stage_b.ddpm_sample(net, shape, x_0, text_b, 0 * x_0, text_b[:1],
                                        guidance=net.config.guidance)
                jobs[f"B {name}"] = draw_b
        if preset:
            latents = torch.randn(batch, 4, image // 4, image // 4, device=device)
            jobs["A eager"] = lambda: a.decode(latents)
        if settings.against == "sd":
            nets, vae = rivals(device)
            for name, net in nets.items():
                for how, one in (("eager", net), ("compiled", compiled(net))):
                    jobs[f"{name} {how}"] = drawer(one, vae, batch, image, device)
        times = seconds(jobs, device, settings.turns, warm=1, until=settings.until)
        rows = {name: summary(one, batch) for name, one in times.items()}
        for name in ("eager", "compiled") if preset else ():
            rows[f"all {name}"] = dict(seconds=sum(
                rows[job]["seconds"] for job in (f"C {name}", f"B {name}", "A eager")))
            rows[f"all {name}"]["images_per_second"] = batch / rows[f"all {name}"]["seconds"]
        found[f"{image} px, batch {batch}"] = rows
    return found


def rivals(device):
    """{name: U-Net} of SD 2.1 and SDXL, and the VAE, with random weights."""
    from diffusers import UNet2DConditionModel
    flat, crossed = ("DownBlock2D", "UpBlock2D"), ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D")

    def unet(attends, **settings):
        kinds = [crossed if one else flat for one in attends]
        return UNet2DConditionModel(
            down_block_types=[kind[0] for kind in kinds], use_linear_projection=True,
            up_block_types=[kind[1] for kind in reversed(kinds)], **settings)
    with device:
        found = {
            "SD 2.1": unet((1, 1, 1, 0), block_out_channels=(320, 640, 1280, 1280),
                           attention_head_dim=(5, 10, 20, 20), cross_attention_dim=1024),
            "SDXL": unet((0, 1, 1), block_out_channels=(320, 640, 1280), cross_attention_dim=2048,
                         attention_head_dim=(5, 10, 20), transformer_layers_per_block=(1, 2, 10),
                         addition_embed_type="text_time", addition_time_embed_dim=256,
                         projection_class_embeddings_input_dim=2816)}
        return {name: net.eval() for name, net in found.items()}, price.vae().eval()


def drawer(net, vae, batch, side, device):
    """A function: 50 steps of a U-Net of diffusers with guidance, then the VAE's decoder."""
    x = torch.randn(batch, 4, side // 8, side // 8, device=device)
    text = torch.randn(2 * batch, 77, net.config.cross_attention_dim, device=device)
    more = dict(text_embeds=torch.randn(2 * batch, 1280, device=device),
                time_ids=torch.ones(2 * batch, 6, device=device))

    def draw():
        latents = x
        for t in torch.linspace(999, 0, 50, device=device):
            out = net(torch.cat([latents, latents]), t, text, added_cond_kwargs=more).sample
            null, conditional = out.chunk(2)
            latents = latents - 0.02 * (null + 4 * (conditional - null))
        vae.decode(latents)
    return draw


def write_jpegs(folder, side, count):
    """Two tars of photograph-like JPEGs (smooth noise, quality 90) with captions."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.RandomState(0)
    for shard in range(2):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for index in range(count // 2):
                coarse = Image.fromarray(rng.randint(0, 256, (24, 24, 3), dtype=np.uint8))
                fine = rng.randint(-12, 13, (side, side, 3))
                pixels = np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC))
                file = io.BytesIO()
                Image.fromarray(np.clip(pixels + fine, 0, 255).astype(np.uint8)).save(
                    file, "JPEG", quality=90)
                for ending, content in (("jpg", file.getvalue()), ("txt", b"a picture")):
                    info = tarfile.TarInfo(f"{shard:05d}{index:04d}.{ending}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))


def loader(out, settings):
    """Samples per second of one core from JPEG tars: ours, and webdataset with Pillow."""
    from torchvision.transforms import functional as tv
    torch.set_num_threads(1)
    found = {}
    for side in (512, 768):
        if late(settings, f"reading at {side} px"):
            break
        folder, batch = out / f"jpegs_{side}", 32
        count = 8 * batch
        if not (folder / "00001.tar").exists():
            write_jpegs(folder, side, count)
        source = data.CaptionedImages(str(folder), resize=side, crop=side)
        stream = data.stream(source, batch, workers=0)

        def ours(stream=stream):
            for _ in range(4):
                next(stream)
        jobs = {"here": ours}
        try:
            import webdataset
        except ImportError:
            print("webdataset is not installed: `pip install webdataset` to compare with it")
        else:
            def prepared(sample, side=side):
                image = sample[0].convert("RGB")
                scale = side / min(image.size)
                image = image.resize([round(s * scale) for s in image.size],
                                     Image.Resampling.BICUBIC)
                return tv.to_tensor(tv.center_crop(image, [side, side])), sample[1]
            tars = [str(path) for path in sorted(folder.glob("*.tar"))]
            dataset = webdataset.WebDataset(tars, shardshuffle=False).repeat().shuffle(64).decode(
                "pil").to_tuple("jpg", "txt").map(prepared).batched(batch)
            other = iter(dataset)

            def its(other=other):
                for _ in range(4):
                    next(other)
            jobs["webdataset"] = its
        times = seconds(jobs, torch.device("cpu"), settings.turns, warm=1, until=settings.until)
        found[f"{side} px"] = {name: summary(one, 4 * batch) for name, one in times.items()}
    return found


# ---- the recipe, projected -----------------------------------------------------------------------

def projection(share_of_nominal=None):
    """FLOP of E.3's phases with the released Stage C, the one that took the paper 24,602 hours;
    A100-hours and kg CO2 eq. at a share of 312 TFLOP/s.
    """
    total = price.training_of_c("released")[1]
    found = dict(flop=total, paper_share_of_nominal=total / (24602 * 3600 * A100))
    if share_of_nominal:
        hours = total / (share_of_nominal * A100) / 3600
        found.update(a100_hours=hours, kg_co2=hours * KG_PER_A100_HOUR)
    return found


# ---- report --------------------------------------------------------------------------------------

def markdown(report):
    """The report as tables."""
    lines = []
    for key, entry in report.items():
        lines.append(f"\n**{key}** ({entry['machine']}, torch {entry['torch']}, "
                     f"{entry['date']}, {entry['minutes']:.1f} minutes)\n")
        if "peak_tflops" in entry:
            lines.append(f"Largest matrix product: {entry['peak_tflops']:.3f} TFLOP/s.\n")
        for part in ("train", "sample", "loader"):
            if part in entry:
                lines += [f"| {part} | seconds, median (least – most) | images/s | share of peak |",
                          "|---|---|---|---|"]
                for group, rows in entry[part].items():
                    for name, row in rows.items():
                        if not isinstance(row, dict):
                            lines.append(f"| {group}, {name} | {row:.3g} | | |")
                            continue
                        spread = (f" ({row['least']:.3f} – {row['most']:.3f})" if "least" in row
                                  else "")
                        share = f"{row['share_of_peak']:.0%}" if "share_of_peak" in row else ""
                        lines.append(f"| {group}, {name} | {row['seconds']:.3f}{spread} | "
                                     f"{row['images_per_second']:.4g} | {share} |")
                lines.append("")
        if "price" in entry:
            lines.append(entry["price"])
        if "recipe" in entry:
            recipe = entry["recipe"]
            lines.append(f"Stage C's recipe (E.3): {recipe['flop']:.3g} FLOP; the paper's 24,602 "
                         f"A100-hours are {recipe['paper_share_of_nominal']:.1%} of nominal. " + (
                             f"At the share measured here: {recipe['a100_hours']:,.0f} A100-hours, "
                             f"{recipe['kg_co2']:,.0f} kg CO2 eq." if "a100_hours" in recipe
                             else "Hours on an A100: unmeasured."))
    return "\n".join(lines) + "\n"


def plot(report, path):
    """Bars: images/s of training and reading. Lines: seconds per picture by batch size."""
    try:
        import matplotlib
    except ImportError:
        print("matplotlib is not installed: no efficiency.png (`pip install matplotlib`)")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot
    bars = [(f"{group}, {name}", row["images_per_second"])
            for entry in report.values() for part in ("train", "loader")
            for group, rows in entry.get(part, {}).items()
            for name, row in rows.items() if isinstance(row, dict)]
    lines = {}
    for entry in report.values():
        for group, rows in entry.get("sample", {}).items():
            size, _, batch = group.partition(", batch ")
            for name, row in rows.items():
                lines.setdefault(f"{size}: {name}", []).append(
                    (int(batch), 1 / row["images_per_second"]))
    figure, (left, right) = pyplot.subplots(
        1, 2, figsize=(13, max(4, 1 + 0.25 * len(bars))), layout="constrained")
    left.barh([name for name, _ in bars], [value for _, value in bars], color="#888")
    left.invert_yaxis()
    left.set(xscale="log" if bars else "linear",        # a log axis needs something on it
             xlabel="images/s (more is better)", title="training and reading")
    for name, points in lines.items():
        batches, seconds_each = zip(*sorted(points))
        right.plot(batches, seconds_each, marker="o", label=name,
                   linestyle="--" if "compiled" in name else "-")
    right.set(xscale="log", yscale="log", xlabel="pictures at once",
              ylabel="seconds per picture (less is better)", title="sampling")
    if lines:
        right.legend(fontsize=8)
    figure.savefig(path, dpi=100)


def main():
    parser = cli.Parser(__doc__)
    parser.add_argument("--size", choices=SIZES, default="pocket")
    parser.add_argument("--parts", default="train,sample", help="of train, sample, loader, recipe")
    parser.add_argument("--against", choices=("diffusers", "sd"))
    parser.add_argument("--batch-size", type=int, default=4, help="of Stage C's step (4)")
    several = dict(type=cli.number("several", int, True))
    parser.add_argument("--grids", default="12,24", **several, help="of Stage C's latents (12,24)")
    parser.add_argument("--batches", default="1,4,16", **several, help="sampled at once (1,4,16)")
    parser.add_argument("--image-size", type=int, help="sampled (pocket 128, else 1024)")
    parser.add_argument("--steps-c", type=int, default=60)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--minutes", type=float, default=8,
                        help="after them no further turn, grid or size begins (8)")
    parser.add_argument("--out", default="runs/efficiency", type=Path)
    settings = parser.parse_args()
    parts = settings.parts.split(",")
    if wrong := set(parts) - {"train", "sample", "loader", "recipe"}:
        raise cli.UsageError(f"--parts: found {', '.join(sorted(wrong))}, expected some of train, "
                             "sample, loader, recipe")
    device = training.setup(0)
    settings.out.mkdir(parents=True, exist_ok=True)
    path = settings.out / "efficiency.json"
    report = cli.read_json(path, {}) if path.exists() else {}
    config, preset = SIZES[settings.size]
    begin = time.time()
    settings.until = time.perf_counter() + 60 * settings.minutes
    entry = dict(machine=name_of(device), torch=torch.__version__.partition("+")[0],
                 date=time.strftime("%Y-%m-%d"), command=" ".join(sys.argv))
    if "train" in parts:
        best = peak(device)
        entry["peak_tflops"] = best / 1e12
        if settings.size == "pocket":
            entry["train"] = train_pocket(device, settings)
        else:
            entry["train"] = {}
            for side in settings.grids:
                if entry["train"] and late(settings, f"training on {side}x{side} latents"):
                    break
                grid = (side, side)
                entry["train"][f"C {side}x{side}, batch {settings.batch_size}"] = train_stage_c(
                    config, grid, settings.batch_size, device, settings, best)
        if settings.size == "released":
            last = list(entry["train"].values())[-1]["compiled"]["share_of_peak"] * best / A100
            entry["recipe"] = projection(last if "A100" in entry["machine"] else None)
    if "sample" in parts:
        entry["sample"] = sample_stages(config, preset, device, settings)
    if "loader" in parts:
        entry["loader"] = loader(settings.out, settings)
    if "recipe" in parts:
        entry["price"] = price.report(settings.size, entry.get("train"))
    entry["minutes"] = (time.time() - begin) / 60
    given = dict(size=settings.size, parts=settings.parts, against=settings.against)
    if "train" in parts and settings.size != "pocket":
        given.update(batch=settings.batch_size, grids=",".join(map(str, settings.grids)))
    if "sample" in parts:
        given.update(steps_c=settings.steps_c, batches=list(settings.batches),
                     image=settings.image_size)
    report[", ".join(f"{name} {value}" for name, value in given.items() if value)] = entry
    path.write_text(json.dumps(report, indent=1) + "\n")
    text = markdown(report)
    (settings.out / "efficiency.md").write_text(text)
    plot(report, settings.out / "efficiency.png")
    print(text)
    print(f"{path}, efficiency.md, efficiency.png")


if __name__ == "__main__":
    cli.start(main)
