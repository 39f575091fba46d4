"""The page to play with: its data from a small chain; each control, in a browser."""

import base64
import io
import itertools
import json
import re
import shutil

import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import to_tensor

import sample
from experiments import play
from plumbing import pictures
from plumbing.cli import UsageError
from pocket import shapes


def data_of(text):
    return json.loads(re.search(r"const DATA = (.*);\n", text).group(1))


def test_page(chain, tmp_path, monkeypatch, capsys):
    """Prompts, seeds, guidance and steps in this order, each with what the chain draws of it."""
    for name, value in dict(PROMPTS={"a red star": "", "</script>": "held"}, SEEDS=(0, 4),
                            GUIDANCE=(1, 30), STEPS_C=(1, 2)).items():
        monkeypatch.setattr(play, name, value)
    out = tmp_path / "play.html"
    play.main(["--weights", str(chain), "--out", str(out)])
    text, said = out.read_text("utf-8"), capsys.readouterr().out
    assert f"16 pictures, WebP quality 90, {len(text.encode()) / 1e6:.2f} MB" in said
    assert len(text.encode()) < play.LIMIT and text.count("</script>") == 1
    assert not re.search(r"https?:|//\w+\.|@import|(src|href)=(?!\"data:)", text), "the network"
    data, nets = data_of(text), sample.load_chain(**sample.find(chain))
    assert data["prompts"] == [["a red star", ""], ["</script>", "held"]] and data["stepsB"]
    assert (data["seed"], data["guidance"], data["steps"]) == ([0, 4], [1, 30], [1, 2])
    assert data["shape"] == [16, 3, 3] and len(data["latents"]) == len(data["sheets"]) == 4
    prompts, seeds = zip(*itertools.product(play.PROMPTS, play.SEEDS))
    for row, (guidance, steps) in enumerate(itertools.product((1, 30), (1, 2))):
        way_c, way_b = [], []
        drawn = nets.draw(prompts, seeds, None, steps, guidance, history_c=way_c, history_b=way_b)
        with torch.no_grad():
            after = nets.a.decode(nets.a.unstandardise(way_b[play.STEPS_B[2] - 1]))
        for i in range(4):
            sheet = Image.open(io.BytesIO(base64.b64decode(data["sheets"][i])))
            assert sheet.size == (256, 4 * 128)
            for name, box, expected in (("picture", (128, 0, 256, 128), drawn[i]), (
                    "third step shown", (0, 64, 64, 128), pictures.to_pil(after[i]).reduce(2))):
                box = (box[0], box[1] + row * 128, box[2], box[3] + row * 128)
                found, expected = to_tensor(sheet.crop(box).convert("RGB")), to_tensor(expected)
                error = pictures.psnr(found[None], expected[None])
                assert error > 20, f"{name} of prompt and seed {i}, setting {row}: {error:.1f} dB"
            levels = torch.tensor(list(base64.b64decode(data["latents"][i]))).view(4, 16, 3, 3)
            error = (levels / 255 * 6 - 3 - way_c[-1][i].clamp(-3, 3)).abs().amax((1, 2, 3))
            assert error[row] < .02 and (error < .02).sum() == 1, (i, row, error)


def test_limit(monkeypatch, tmp_path):
    """Too large for the limit: a lower quality, then a sentence; so with what cannot be written."""
    sheets = [Image.effect_noise((256, 128), 99).convert("RGB")]
    latents = torch.zeros(1, 1, 1, 16, 3, 3)
    text, quality = play.page(latents, sheets)
    monkeypatch.setattr(play, "LIMIT", len(text.encode()) - 1)
    less, lower = play.page(latents, sheets)
    assert (quality, lower) == play.QUALITIES[:2] and len(less) < len(text)
    monkeypatch.setattr(play, "LIMIT", 1000)
    with pytest.raises(UsageError, match="expected at most 1,000"):
        play.page(latents, sheets)
    for out in (tmp_path, tmp_path / "play.txt", tmp_path / "none/play.html"):
        with pytest.raises(UsageError, match=f"--out {out}: expected a file"):
            play.main(["--out", str(out)])


def test_prompts_say_what_is_held_out():
    """A prompt has a note if, and only if, training leaves an object or pair of it out."""
    for prompt, note in play.PROMPTS.items():
        objects = re.findall(rf"({'|'.join(shapes.COLOURS)}) ({'|'.join(shapes.SHAPES)})", prompt)
        out = shapes.held_out(dict(objects=[dict(colour=colour, shape=shape)
                                            for colour, shape in objects]))
        assert objects and bool(out) == bool(note), (prompt, out)
    assert any(play.PROMPTS.values())


@pytest.mark.slow
def test_each_control_in_a_browser(tmp_path):
    """Keys move each control to each of its values, and latent, steps and picture are those."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if not browser:
        pytest.skip("no browser: `apt-get install chromium`")
    sizes = dict(prompt=len(play.PROMPTS), seed=len(play.SEEDS), guidance=len(play.GUIDANCE))
    sizes["steps-c"] = len(play.STEPS_C)
    latents, sheets = torch.zeros(*sizes.values(), 16, 3, 3).flatten(2, 3), []

    def colour(prompt, seed, guidance, steps, place):         # of one tile, different in each
        return 30 * prompt, 80 * seed + 15 * place, 60 * guidance + 20 * steps
    for prompt, seed in itertools.product(range(sizes["prompt"]), range(sizes["seed"])):
        rows = list(itertools.product(range(sizes["guidance"]), range(sizes["steps-c"])))
        sheets.append(Image.new("RGB", (256, 128 * len(rows))))
        for row, setting in enumerate(rows):
            latents[prompt, seed, row, row % 16, 1, 2] = 3
            for place, box in enumerate([(x, y, x + 64, y + 64) for y in (0, 64) for x in (0, 64)]
                                        + [(128, 0, 256, 128)]):
                sheets[-1].paste(colour(prompt, seed, *setting, place), (
                    box[0], box[1] + 128 * row, box[2], box[3] + 128 * row))
    (tmp_path / "play.html").write_text(play.page(latents, sheets)[0], "utf-8")

    with playwright.sync_playwright() as tool:
        page = tool.chromium.launch(executable_path=browser, args=["--no-sandbox"]).new_page()
        errors, asked = [], []
        page.on("pageerror", lambda error: errors.append(error))
        page.on("request", lambda request: asked.append(request.url))
        page.goto((tmp_path / "play.html").as_uri())
        at = dict(prompt=0, seed=0, guidance=play.GUIDANCE.index(4), **{"steps-c": 2})

        def check():
            text = (f"“{list(play.PROMPTS)[at['prompt']]}”, guidance "
                    f"{play.GUIDANCE[at['guidance']]}, {play.STEPS_C[at['steps-c']]} steps, seed "
                    f"{play.SEEDS[at['seed']]}")
            page.wait_for_selector(f"#picture[aria-label='The picture of {text}']")
            assert page.get_attribute("#latent", "aria-label") == f"Stage C’s latent of {text}"
            found = page.evaluate(
                "[...document.querySelectorAll('#steps canvas, #picture')].map(one => [...one"
                ".getContext('2d').getImageData(one.width / 2, one.height / 2, 1, 1).data])")
            for place, pixel in enumerate(found):
                expected = colour(*(at[name] for name in ("prompt", "seed", "guidance", "steps-c")),
                                  place)
                assert max(abs(a - b) for a, b in zip(pixel, expected)) <= 8, (text, place, pixel)
            assert len(found) == 5
            row = at["guidance"] * sizes["steps-c"] + at["steps-c"]
            red, _, blue, _ = page.evaluate(
                "([x, y]) => [...document.getElementById('latent').getContext('2d')"
                ".getImageData(x, y, 1, 1).data]", [row % 4 * 4 + 2, row % 16 // 4 * 4 + 1])
            assert red > 2 * blue, f"{text}: the latent's channel {row} is not red where it is 3"
        check()
        for name, size in sizes.items():
            page.focus(f"#{name}")
            for key, change in [("ArrowDown", -1)] * size + [("ArrowUp", 1)] * size:
                change *= -1 if name == "prompt" else 1       # a list goes down, a slider up
                page.keyboard.press(key)
                at[name] = min(max(at[name] + change, 0), size - 1)
                check()
        assert not errors and asked == [(tmp_path / "play.html").as_uri()], (errors, asked)
