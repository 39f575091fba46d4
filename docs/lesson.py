# %% [markdown]
# # Würstchen in ten figures
# Three stages draw a picture. Stage C draws a tiny latent from text, Stage B draws from it the
# latent of a VQGAN, and Stage A decodes that to pixels. The weights are the small ones of
# pocket/, which know drawings of one or two coloured shapes. Every figure is also written to
# docs/figures/.
#
#     make lesson                  runs all cells: about three minutes of one CPU core
#     make notebook                lesson.ipynb, with the figures in it
#
# The cells run in their order.

# %%
import copy
import os
import sys
import textwrap
import time
from pathlib import Path

# A notebook starts in docs/. Nothing else in this project changes the path.
os.chdir(next(one for one in (Path.cwd(), *Path.cwd().parents) if (one / "stage_c.py").exists()))
sys.path.insert(0, os.getcwd())

import torch
from matplotlib import pyplot

import sample
import stage_b
import stage_c
from experiments.ablate_b import encoded
from plumbing import pictures, training
from tools.explain import as_jpeg

begun = time.perf_counter()
FIGURES = Path("docs/figures")
FIGURES.mkdir(exist_ok=True)
torch.set_grad_enabled(False)
chain = sample.load_chain(**sample.find("pocket"))            # .a .b .c .compressor .text_c
drawings = encoded(1500, seed=0, keep_images=True)            # x_0 of B, sem, text; and the images
images, sem, text = drawings["images"], drawings["sem"], drawings["text"].float()
null_text = drawings["null"]                                  # the empty caption's (1, L, E)
captions = ["a red star above a blue circle", "a green square", "a pink cross left of a cyan star"]


def save(figure, name):
    """Write docs/figures/NAME.png; a notebook shows the figure itself."""
    figure.savefig(FIGURES / f"{name}.png", dpi=80, bbox_inches="tight")
    print(f"{time.perf_counter() - begun:4.0f} s: {FIGURES}/{name}.png")


def sheet(rows, titles, name, side=1.5):
    """Rows of pictures, [(label, [(3, H, W)])], with a title over each column."""
    columns = max(len(row) for _, row in rows)
    figure, panels = pyplot.subplots(len(rows), columns, squeeze=False, layout="constrained",
                                     figsize=(side * columns + 1.2, (side + 0.2) * len(rows) + 0.4))
    for (label, row), line in zip(rows, panels):
        line[0].set_ylabel(label, rotation=0, ha="right", va="center")
        for panel in line:
            panel.set(xticks=[], yticks=[], frame_on=False)
        for panel, image in zip(line, row):
            panel.imshow(pictures.to_pil(image))
    for panel, title in zip(panels[0], titles):
        panel.set_title(title, fontsize=9)
    save(figure, name)


def draw(prompts, seed=0, steps=60, guidance=4.0, prompts_b=None, history=None):
    """Stages C, B and A: prompts -> pictures (B, 3, 128, 128), all from the same seed."""
    seeds = [seed] * len(prompts)
    latents = sample.draw_latents(chain, prompts, seeds, 128, 128, steps, guidance,
                                  history=history)
    return stage_b.draw_images(chain, latents, prompts_b or prompts, seeds)


# %% [markdown]
# ## 1. Sizes
# At 1024 px the picture has 3 x 1024 x 1024 numbers, Stage A's latent 4 x 256 x 256, Stage C's 16
# x 24 x 24. A side of the last is 42.67 times smaller than the picture's, and it has 341 times
# fewer numbers. Only Stage C has to understand text, and it works on 24 x 24 positions.

# %%
sizes = [("picture", 3, 1024), ("Stage A's latent", 4, 256), ("Stage C's latent", 16, 24)]
figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
for x, (name, channels, side) in zip((0, 1300, 2000), sizes):
    left.add_patch(pyplot.Rectangle((x, 0), side, side, color="C0"))
    left.text(x + side / 2, -50, f"{name}\n{channels} x {side} x {side}".replace("'s ", "'s\n"),
              ha="center", va="top")
left.set(xlim=(-60, 2400), ylim=(-450, 1040), aspect="equal", title="sides, to scale")
left.axis("off")
numbers = [channels * side ** 2 for _, channels, side in sizes]
right.barh([name for name, *_ in sizes], numbers)
for y, number in enumerate(numbers):
    right.text(number, y, f" {number:,}, one in {numbers[0] / number:.0f}" if y else
               f" {number:,}", va="center")
right.set(xlim=(0, 1.4 * numbers[0]), xticks=[], title="how many numbers")
right.invert_yaxis()
save(figure, "1_sizes")

# %% [markdown]
# ## 2. What is lost
# Stage A's latent has 12 times fewer numbers than the picture. The compressor keeps 144 numbers,
# 288 bytes as float16: what B draws from them has the right things at the right places, with edges
# that B made up. JPEG is good at flat drawings: its best quality takes fewer bytes than A's latent.
# But no JPEG is as small as 288 bytes, and the smallest is farther from this drawing, in blocks.
# `python sample.py --reconstruct a.png b.png` makes this figure of your pictures.

# %%
image = images[7:8]
by_a = chain.a.decode(chain.a.encode(image))
by_b = stage_b.draw_images(chain, sem[7:8], [""], [0], guidance=1.0)
small, small_bytes = as_jpeg(image[0])
large, large_bytes = as_jpeg(image[0], 2 * 4 * 32 * 32)       # within the bytes of A's latent
shown = [image[0], by_a[0], by_b[0], large, small]
names = ("the drawing", "Stage A", "compressor + B + A", "JPEG, best", "JPEG, smallest")
sizes = (image.numel(), 2 * 4 * 32 * 32, 2 * 16 * 3 * 3, large_bytes, small_bytes)
titles = [f"{name}\n{size:,} bytes" + f"\n{pictures.psnr(one[None], image):.1f} dB" * (i > 0)
          for i, (name, size, one) in enumerate(zip(names, sizes, shown))]
sheet([("", shown)], titles, "2_what_is_lost", side=2)

# %% [markdown]
# ## 3. Noise
# x_t = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) noise. In pixels and in A's latent the circle can
# still be made out at t = .8, because neighbours are alike and the eye averages them. In C's latent
# neighbours are not alike: at t = .8 its cells have the colours that they have at t = 1, which is
# noise.

# %%
levels = [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
torch.manual_seed(0)
rows = []
for label, x_0, decode in (
        ("pixels", image * 2 - 1, lambda x: x / 2 + 0.5),
        ("A's latent,\ndecoded", drawings["x_0"][7:8],
         lambda x: chain.a.decode(chain.a.unstandardise(x))),
        ("C's latent", sem[7:8], pictures.latent_picture)):
    noise = torch.randn_like(x_0)
    rows.append((label, [decode(stage_c.diffuse(x_0, torch.tensor([t]), noise))[0]
                         for t in levels]))
sheet(rows, [f"t = {t}\nalpha_bar {stage_c.alpha_bar(torch.tensor(t)):.4f}" for t in levels],
      "3_noise")

# %% [markdown]
# ## 4. The A/B head
# eps_hat = (x_t - A) / |1 - B| starts at eps_hat = x_t. Its error then is (1 - sqrt(1 - a))^2 +
# a, with a = alpha_bar; a head that starts at eps_hat = 0 has 1, one that starts at v_hat = 0 has
# a. So A/B starts far better than eps at high noise and worse at low noise; v starts below A/B at
# every t. The dashed lines are these formulas, the others the same small network after 140 steps
# with each head: A/B and v differ only at t near 1 by then, and eps is behind from t = .3 on.

# %%
t_axis = torch.linspace(0.02, 1, 25)


class V(stage_c.StageC):
    """The head predicts v: what comes out of the layers, turned into eps_hat."""

    def forward(self, x_t, t, *conditions):
        a_bar = stage_c.alpha_bar(t).view(-1, 1, 1, 1)
        return (1 - a_bar).sqrt() * x_t + a_bar.sqrt() * super().forward(x_t, t, *conditions)


def error_by_level(model):
    """Mean error of eps_hat at each of t_axis, on the last 200 drawings."""
    x_0, noise = sem[-200:], torch.randn(200, 16, 3, 3, generator=torch.Generator().manual_seed(1))
    return [stage_c.loss(model, x_0, text[-200:], t.repeat(200), noise)[2].mean() for t in t_axis]


@torch.enable_grad()
def train(model, steps, each_step=None):
    """Stage C's training in ten lines: the loss of stage_c.py on the latents of the drawings."""
    optimizer = training.Muon([dict(params=[*model.parameters()])], lr=4e-3)
    torch.manual_seed(0)
    for step in range(steps):
        i = torch.randint(len(sem) - 200, (64,))
        for group in optimizer.param_groups:
            group["lr"] = 4e-3 * min(1, (step + 1) / 20, (steps - step) / (steps / 3))
        optimizer.zero_grad()
        value, t, error = stage_c.loss(model, sem[i], stage_c.drop_text(text[i], null_text, 0.05))
        value.backward()
        optimizer.step()
        if each_step:
            each_step(step, t, error)


config = stage_c.Config(**vars(stage_c.PRESETS["pocket"]) | dict(width=96, depth=2))
a = stage_c.alpha_bar(t_axis)
starts = {"A/B": (1 - (1 - a).sqrt()) ** 2 + a, "eps": torch.ones_like(a), "v": a}
ab_to_eps, figure = stage_c.ab_to_eps, pyplot.figure(figsize=(7, 4), layout="constrained")
for colour, (name, start) in enumerate(starts.items()):       # A/B wide: v lies upon it
    stage_c.ab_to_eps = ab_to_eps if name == "A/B" else lambda x_t, a, b: b
    torch.manual_seed(0)
    model = (V if name == "v" else stage_c.StageC)(config)
    train(model, 140)
    pyplot.plot(t_axis, start, "--", color=f"C{colour}", alpha=0.6)
    pyplot.plot(t_axis, error_by_level(model), color=f"C{colour}", label=name,
                linewidth=4 if name == "A/B" else 1.5)
stage_c.ab_to_eps = ab_to_eps
pyplot.gca().set(yscale="log", xlabel="t", ylabel="error of eps_hat",
                 title="at initialisation (dashed) and after 140 steps")
pyplot.legend()
save(figure, "4_heads")

# %% [markdown]
# ## 5. p2
# The loss is weighted by p2(t), as a function of the signal-to-noise ratio. The paper's form is 1
# / (1 + 2 SNR), the released code's 1 / (1 + SNR). As draw_t draws t, its quarters carry the
# shares on the right: with the paper's form the last quarter, where the subject is decided, has
# 62 %. Without a weight it has 31 %, because draw_t draws t = 1 for 7.5 % of the samples.

# %%
t = stage_c.draw_t(400_000)
t_sorted = torch.linspace(0, 1, 400)
snr = stage_c.alpha_bar(t_sorted) / (1 - stage_c.alpha_bar(t_sorted))
figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
for place, form in enumerate(("paper", "released", "none")):
    left.plot(snr, stage_c.p2_weight(t_sorted, form), label=form)
    weight = stage_c.p2_weight(t, form)
    shares = [weight[(t > low) & (t <= low + 0.25)].sum() / weight.sum()
              for low in (0, 0.25, 0.5, 0.75)]
    bars = right.bar(torch.arange(4) + 0.28 * (place - 1), shares, width=0.26, label=form)
    right.bar_label(bars, [f"{share:.0%}" for share in shares], fontsize=9)
left.set(xscale="log", xlabel="SNR = alpha_bar / (1 - alpha_bar)", ylabel="p2")
right.set(xticks=range(4), xticklabels=["t < .25", "< .5", "< .75", "to 1"],
          ylabel="share of the loss's weight")
right.set_ylim(0, 0.7)
left.legend()
save(figure, "5_p2")

# %% [markdown]
# ## 6. Guidance and steps
# One prompt, one seed. Guidance 0 does not know the text, 1 is the model's conditional prediction,
# 4 is the paper's. The steps are Stage C's; B always takes 12. Another number of steps is another
# picture, because each step adds noise; few steps and much guidance do not go together.

# %%
rows = [(f"{steps} steps", [draw(captions[:1], 3, steps, guidance)[0]
                            for guidance in (0, 1, 4, 10)])
        for steps in (5, 15, 60)]
sheet(rows, [f"guidance {guidance}" for guidance in (0, 1, 4, 10)], "6_guidance_and_steps")

# %% [markdown]
# ## 7. Who reads the text
# The first row changes the text that C gets, and B gets the true one; the second row the other
# way round. What changes in the first row is C's work; with shuffled words this seed still has the
# red star above the blue circle. In the second next to nothing changes: B draws what the latent
# says.

# %%
prompt = captions[0]
texts = {"as it is": prompt, "dropped": "", "shuffled": "circle star a blue red above a",
         "another's": captions[2]}
sheet([("to C", [draw([one], 1, prompts_b=[prompt])[0] for one in texts.values()]),
       ("to B", [draw([prompt], 1, prompts_b=[one])[0] for one in texts.values()])],
      texts, "7_text")

# %% [markdown]
# ## 8. Who draws what
# Above: C's latent on its way, and what B would draw from it. Below: one latent of C and three
# seeds of B, then three latents of C and one seed of B. C decides what is where and how large, B
# the pixels.

# %%
way = []
latent = sample.draw_latents(chain, [prompt], [0], 128, 128, history=way)
three = sample.draw_latents(chain, [prompt] * 3, [0, 1, 2], 128, 128)
seeds_of_b = stage_b.draw_images(chain, latent.expand(3, -1, -1, -1), [prompt] * 3, [0, 1, 2])
seeds_of_c = stage_b.draw_images(chain, three, [prompt] * 3, [0, 0, 0])
some = torch.cat([way[i] for i in (0, 14, 29, 44, 52, 59)])
drawn = stage_b.draw_images(chain, some, [prompt] * 6, [0] * 6)
sheet([("C's latent", pictures.latent_picture(some)), ("drawn by B", drawn),
       ("3 seeds of B,\n3 of C", [*seeds_of_b, *seeds_of_c])],
      [f"step {i}" for i in (1, 15, 30, 45, 53, 60)], "8_who_draws_what")

# %% [markdown]
# ## 9. A training of Stage C
# A Stage C with a seventh of pocket's parameters, 1,500 steps. Its average (EMA) draws the same
# three prompts from the same noise at five moments. The colours are the prompt's by step 300 or
# 700, which thing has which colour and stands where by step 1,500. How many things there are is
# not learned yet, as the second green square says, nor are shapes.

# %%
torch.manual_seed(0)
model, strip, record = stage_c.StageC(config), [], []
ema, MOMENTS = copy.deepcopy(model), (10, 100, 300, 700, 1500)


def look(step, t, error):
    """Keep the errors; move the average; at MOMENTS draw with it."""
    record.append((step, t, error))
    training.ema_update(ema, model, step, 0.97)
    if step + 1 in MOMENTS:
        with torch.no_grad():
            latents = stage_c.ddpm_sample(
                ema, (3, 16, 3, 3), chain.text_c(captions), null_text,
                generator=stage_b.generators([0, 1, 2]))
            strip.append(stage_b.draw_images(chain, latents, captions, [0, 1, 2]))


train(model, MOMENTS[-1], look)
sheet([(textwrap.fill(prompt, 14), [moment[i] for moment in strip])
       for i, prompt in enumerate(captions)],
      [f"step {moment}" for moment in MOMENTS], "9_training")

# %% [markdown]
# ## 10. Its loss by noise level
# The A/B head starts with eps_hat = x_t. At t below .25 that is signal, so the error starts above
# 1; near t = 1 it is noise, so the error starts at .04, and rises before it falls. In the middle it
# falls most, to a tenth. In the last third all fall faster, because the learning rate does. The
# mean of the four says little: it is most of all the highest line's.

# %%
figure = pyplot.figure(figsize=(7, 4), layout="constrained")
for quarter, label in enumerate(("t < .25", "< .5", "< .75", "to 1")):
    points = [training.by_level([(t, error) for _, t, error in record[i:i + 10]])[quarter]
              for i in range(0, len(record), 10)]
    pyplot.plot(range(10, len(record) + 1, 10), points, label=label)
pyplot.gca().set(xscale="log", yscale="log", xlabel="step", ylabel="error of eps_hat")
pyplot.legend(loc="center left", bbox_to_anchor=(1, 0.5))
save(figure, "10_loss_by_level")
