"""The paper's recipe in small: its phases, its ratios, cached latents, its price."""

import json
from dataclasses import replace

import pytest
import torch
from PIL import Image
from torch.testing import assert_close

import data
import semantic_compressor
import stage_a
import stage_b
import stage_c
from plumbing import checkpoint
from plumbing.cli import UsageError
from plumbing.text import TextEncoder
from test_shapes import TINY_B, TINY_C
from tests.common import command, flags, same_checkpoint, take
from tools import cache_latents


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


@pytest.mark.slow
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
    command("-m", "tools.interpolate", *(tmp_path / name / "checkpoint.pt" for name in
                                         ("c3", "c4")), "--out", tmp_path / "stage_c")
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


def test_one_ratio_for_each_batch(shards):
    """Of several crops each batch has one; all are drawn equally often, and the same ones again."""
    sizes = [(24, 40), (40, 24), (24, 24)]
    dataset = data.CaptionedImages(shards, resize=24, crop=sizes, seed=3)
    shapes_ = [tuple(batch["images"].shape[2:]) for batch in take(data.stream(dataset, 3), 150)]
    assert set(shapes_) == set(sizes)
    assert all(30 < shapes_.count(size) < 70 for size in sizes)
    later = take(data.stream(dataset, 3, position=(1, 3)), 3)            # after five batches
    assert [tuple(batch["images"].shape[2:]) for batch in later] == shapes_[5:8]


def test_one_ratio_for_each_step(chain, drawings, tmp_path, monkeypatch):
    """All micro-batches of an optimizer step have one ratio (E.3: 768), stopped or not."""
    config = replace(TINY_C, sizes=("96x160", "160x96", "96x96"), remember=False, accumulate=3,
                     batch_size=2, workers=0)
    found, plain = [], stage_c.loss

    def spy(model, x_0, text):
        found.append(tuple(x_0.shape[2:]))
        return plain(model, x_0, text)
    monkeypatch.setattr(stage_c, "loss", spy)
    for steps, out in ((12, "whole"), (5, "stopped"), (12, "stopped")):
        stage_c.train(replace(config, steps=steps), drawings, tmp_path / out, tmp_path / "no_a",
                      chain / "stage_b/checkpoint.pt")
    steps = [found[i:i + 3] for i in range(0, len(found), 3)]
    assert len(steps) == 24 and all(len(set(step)) == 1 for step in steps), (
        f"the micro-batches of a step differ in their ratio: {steps}")
    assert steps[:12] == steps[12:], "a run that was stopped has other ratios"
    assert set(found) == {(3, 5), (5, 3), (3, 3)}


def test_cached_latents(chain, drawings, tmp_path):
    """Trained from cached latents, Stage C has the losses it has from images, sample by sample."""
    a, b = chain / "stage_a/checkpoint.pt", chain / "stage_b/checkpoint.pt"
    arguments = ("-m", "tools.cache_latents", drawings, "--weights", b, "--out",
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
    checkpoint.save_checkpoint(tmp_path / "b.pt", state)
    done = command(*arguments[:4], tmp_path / "b.pt", *arguments[5:], check=False)
    assert done.returncode == 1 and "made with another compressor" in done.stderr
    with pytest.raises(UsageError, match="latents of another compressor"):
        semantic_compressor.cached(tmp_path / "latents",
                                   semantic_compressor.load(tmp_path / "b.pt"))


def test_cached_tokens(chain, drawings, encoder, tmp_path, monkeypatch, capsys):
    """With the captions' tokens kept, too, Stage C has the losses it has from images and encodes no
    batch; it goes on as if not stopped, and refuses tokens of another encoder or of none."""
    a, b = tmp_path / "no_a", chain / "stage_b/checkpoint.pt"            # previews of latents alone
    made = dict(weights=b, workers=0, tokens=True, text_encoder="pocket")
    out, note = tmp_path / "tokens", tmp_path / "tokens/latents.json"
    cache_latents.cache(drawings, out=out, **made)
    size = sum(path.stat().st_size for path in out.glob("*.tar")) / 24
    assert f"and tokens of 24 images at 128 px, {size / 1e9 * 1e6:.1f} GB a million" in (
        capsys.readouterr().out) and size > 24 * 128 * 2
    with pytest.raises(UsageError, match="another text_encoder"):
        cache_latents.cache(drawings, out=out, **{**made, "tokens": False})
    cache_latents.cache(drawings, out=tmp_path / "latents", **{**made, "tokens": False})
    dataset = data.CaptionedLatents(out)
    dataset.tokens = (24, 64)
    assert dataset[3]["failed"] == "tokens are (24, 128), expected (24, 64)"
    dataset.tokens = (24, 128)
    assert_close(dataset[3]["tokens"].float(), encoder([dataset.caption(3)])[0], rtol=1e-3,
                 atol=1e-3)
    texts, plain = [], TextEncoder.forward
    monkeypatch.setattr(TextEncoder, "forward",
                        lambda self, captions: texts.append(len(captions)) or plain(self, captions))
    config = replace(TINY_C, workers=0, remember=False, log_every=1)
    losses = {}
    for source in (drawings, tmp_path / "latents", out):
        texts.clear()
        stage_c.train(config, source, tmp_path / "runs" / source.name, a, b)
        losses[source] = [json.loads(line)["loss"]
                          for line in (tmp_path / "runs" / source.name / "log.jsonl").open()]
        assert texts.count(config.batch_size) == (0 if source == out else config.steps)
        assert_close(losses[source], losses[drawings], rtol=1e-3, atol=0)
    assert len(losses[out]) == config.steps
    assert_close(losses[out], losses[tmp_path / "latents"], rtol=1e-4, atol=0)
    for steps in (config.steps - 1, config.steps):
        stage_c.train(replace(config, steps=steps), out, tmp_path / "stopped", a, b)
    same_checkpoint(tmp_path / "runs/tokens/checkpoint.pt", tmp_path / "stopped/checkpoint.pt")
    about = json.loads(note.read_text())
    assert about["text_encoder"] == encoder.identity
    note.write_text(json.dumps({**about, "text_encoder": {"name": "pocket", "checksum": "0"}}))
    with pytest.raises(UsageError, match="tokens of another text encoder, .*'checksum': '0'"):
        stage_c.train(config, out, tmp_path / "other", a, b)


def test_work_of_the_recipe():
    """The floating-point operations of E.3 with the released Stage C, and the paper's share."""
    from experiments import efficiency, price
    found = efficiency.projection(0.4)
    assert found["flop"] == pytest.approx(2.71e21, rel=0.01)
    per_image = [3 * price.of_c(stage_c.PRESETS["released"], grid) / 1e12
                 for grid in ((12, 12), (24, 24))]
    assert per_image == pytest.approx([0.91, 3.46], abs=0.01)
    parts = [[3 * price.of_c(stage_c.PRESETS["paper"], grid) / 1e12,
              price.of_compressor("paper", *grid) / 1e12, price.of_text("clip-h") / 1e12]
             for grid in ((12, 12), (24, 24))]                          # those that learn, frozen
    assert parts[0] == pytest.approx([0.318, 0.017, 0.047], abs=0.001)
    assert parts[1] == pytest.approx([1.218, 0.067, 0.047], abs=0.001)
    assert found["paper_share_of_nominal"] == pytest.approx(0.098, abs=0.001)
    assert found["a100_hours"] == pytest.approx(2.71e21 / (0.4 * 312e12) / 3600, rel=0.01)
