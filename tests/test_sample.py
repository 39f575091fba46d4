"""The chain C -> B -> A as a command and in a process."""

import io
import json
import re

import pytest
import torch
from PIL import Image, ImageChops
from safetensors import safe_open
from torch.testing import assert_close
from torchvision.transforms.functional import to_tensor

import sample
import stage_b
import stage_c
from experiments import predict
from plumbing import checkpoint, pictures, training
from plumbing.cli import UsageError
from pocket import ship
from published import weights
from test_shapes import TINY_C
from tests.common import HERE, command, same


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


def test_sample_in_process(chain, tmp_path):
    """--prompts, --n, --stages and both starts each write their picture."""
    quick = ["--weights", str(chain), "--steps-c", "2", "--steps-b", "2",
             "--out", str(tmp_path / "x.png")]
    (tmp_path / "prompts.txt").write_text("a red star\n\na blue circle\n")
    sample.main(["--prompts", str(tmp_path / "prompts.txt"), "--n", "2",
                 "--start", "gaussian", *quick])
    assert Image.open(tmp_path / "x.png").size[0] == 2 * 132 + 4
    sample.main(["a red star", "--stages", *quick])
    assert Image.open(tmp_path / "x.png").size[0] == 5 * 132 + 4


def test_reconstruct(chain, tmp_path, capsys, monkeypatch):
    """--reconstruct: a row for each image, with bytes and PSNR through A, through compressor, B and
    A at guidance 1, and as JPEG, whose bytes are those of Pillow's smallest file."""
    files, guided, draw = [], [], stage_b.draw_images
    for size in (256, 128), (128, 128):
        files.append(str(tmp_path / f"{size[0]}.png"))
        Image.effect_noise(size, 50).convert("RGB").save(files[-1])
    monkeypatch.setattr(stage_b, "draw_images",
                        lambda *given: guided.append(given[5]) or draw(*given))
    sample.main(["--reconstruct", *files, "--weights", str(chain), "--steps-b", "2", "--out",
                 str(tmp_path / "x.png")])
    lines = [line for line in capsys.readouterr().out.splitlines() if "dB" in line]
    sizes = [[int(one.replace(",", "")) for one in re.findall(r"([\d,]+) bytes", line)]
             for line in lines]
    for path, found, squares in zip(files, sizes, (2, 1)):
        file = io.BytesIO()
        Image.open(path).save(file, "JPEG", quality=1, optimize=True)
        assert found == [squares * 2 * 4 * 32 * 32, squares * 2 * 16 * 3 * 3, file.tell()]
    sheet = Image.open(tmp_path / "x.png")
    assert guided == [1, 1] and sheet.width >= 4 * 256 and sheet.height >= 2 * 128, sheet.size


def test_same_seed_same_picture(chain):
    """Picture i of a seed is the same alone and in a batch."""
    nets = sample.load_chain(*(chain / name / "checkpoint.pt"
                               for name in ("stage_a", "stage_b", "stage_c")))

    def draw(seeds):
        prompts = ["a red star"] * len(seeds)
        latents = sample.draw_latents(nets, prompts, seeds, 128, 128, steps=2)
        with torch.no_grad():
            return stage_b.draw_images(nets, latents, prompts, seeds, steps=2)
    assert_close(draw([3, 4, 5])[2:], draw([5]), atol=1e-3, rtol=1e-3)


def test_draw(chain, tmp_path):
    """Chain.draw gives the pictures of the command line, each of its own size, prompt and seed; a
    folder as --out gets one file a picture, with that picture's prompt and seed."""
    sample.main(["a red star", "a blue circle", "--n", "2", "--seed", "3", "--size", "256x128",
                 "--weights", str(chain), "--steps-c", "2", "--steps-b", "2", "--out",
                 f"{tmp_path}/new/"])
    files = sorted((tmp_path / "new").iterdir())
    assert [file.name for file in files] == ["0000.png", "0001.png", "0002.png", "0003.png"]
    nets = sample.load_chain(**sample.find(chain))
    image, = nets.draw(["a blue circle"], seeds=[5], size=(256, 128), steps_c=2, steps_b=2)
    third = Image.open(files[2])
    about = json.loads(third.text["parameters"])
    assert about["prompts"] == ["a blue circle"] and about["seed"] == 5 and about["n"] == 1
    assert image.size == third.size == (256, 128)
    off = ImageChops.difference(image, third).getextrema()
    assert max(high for _, high in off) <= 1, f"not the command line's picture, by {off} of 255"
    assert [one.size for one in nets.draw(["x", "y"], steps_c=1, steps_b=1)] == [(128, 128)] * 2
    with pytest.raises(UsageError, match="expected multiples of 128"):
        nets.draw(["x"], size=(100, 128))


def test_python_of_the_readme(tmp_path, monkeypatch):
    """The README's lines of Python run as they stand and write a picture of each prompt."""
    code = (HERE / "README.md").read_text().split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    exec(code, {})                                            # as a reader pastes it
    sizes = {file.name: Image.open(file).size for file in tmp_path.iterdir()}
    assert set(sizes.values()) == {(128, 128)} and len(sizes) == 2, sizes
    assert "a red star above a blue circle.png" in sizes, sizes


def test_mixing(chain, tmp_path):
    """Parts that are named come before those of --weights; a Stage B brings its compressor. What
    does not fit is refused with the file that does."""
    b, c = (chain / f"stage_{name}/checkpoint.pt" for name in "bc")
    assert sample.find("released", b=b, c="") == dict(a="released", b=b, c="released")
    assert sample.find("pocket", "ab")["compressor"] == sample.POCKET["b"]
    mixed = sample.find("pocket", a=chain / "stage_a/checkpoint.pt", b=b, c=c)
    nets, whole = sample.load_chain(**mixed), sample.load_chain(**sample.find(chain))
    for part in ("a", "b", "c", "compressor"):
        same(getattr(nets, part).state_dict(), getattr(whole, part).state_dict(), part)
    with pytest.raises(UsageError, match=f"another compressor .*the --stage-b {b} fits"):
        sample.load_chain(**sample.find("pocket", c=c))
    with pytest.raises(UsageError, match="trained with another compressor than the one in"):
        sample.load_chain(**sample.find(chain, compressor=sample.POCKET["b"]))
    (tmp_path / "stage_c").mkdir()
    (tmp_path / "stage_c/checkpoint.pt").write_bytes(c.read_bytes())
    with pytest.raises(UsageError, match="--stage-b of its own training fits"):
        sample.load_chain(**sample.find(tmp_path))


def test_bfloat16():
    """experiments/predict.py: pictures of the pocket weights in bfloat16 have at least 40 dB
    against those in float32, and Stage C, which divides, stays float32."""
    found, kinds = [], []
    for dtype in ("float32", "bfloat16"):
        demo = predict.Predictor()
        demo.setup("pocket", dtype)
        for part, layer in (("C", demo.chain.c.out[1]), ("A", demo.chain.a.out_block[0])):
            layer.register_forward_hook(
                lambda _, inputs, output, part=part: kinds.append((part, output.dtype)))
        paths = demo.predict("a red star above a blue circle", seed=3, steps_c=20, n=2)
        found.append(torch.stack([to_tensor(Image.open(path)) for path in paths]))
    assert set(kinds) == {("C", torch.float32), ("A", torch.float32), ("A", torch.bfloat16)}
    psnr = pictures.psnr(*found).item()
    assert 40 < psnr < 90, f"PSNR of bfloat16 against float32 is {psnr:.1f} dB"


def test_sample_refuses(chain, tmp_path, monkeypatch):
    """Wrong sizes, missing weights and a C of another compressor are refused with a sentence."""
    with pytest.raises(Exception, match="1024x640 and 1024x768"):
        sample.width_x_height("1024x700")
    done = command("sample.py", "x", "--weights", tmp_path, check=False)
    assert done.returncode == 1 and "each with the checkpoint.pt" in done.stderr
    assert "Traceback" not in done.stderr
    state = torch.load(chain / "stage_c/checkpoint.pt", weights_only=True)
    checkpoint.save_checkpoint(tmp_path / "c.pt", dict(state, compressor="0"))
    with pytest.raises(UsageError, match="another compressor"):
        sample.load_chain(chain / "stage_a/checkpoint.pt", chain / "stage_b/checkpoint.pt",
                          tmp_path / "c.pt")
    monkeypatch.setattr(sample, "find", None)                  # before it looks for weights
    for said, more in (("2 prompts", "x y --stages"), ("--n 3", "x --n 3 --stages"),
                       ("one of the two", "--reconstruct x.png --stages")):
        with pytest.raises(UsageError, match=f"--stages and --reconstruct: .*{said}"):
            sample.main([*more.split(), "--out", str(tmp_path / "x.png")])


def test_small_weights(chain, tmp_path):
    """pocket/ship.py: three files that load as the checkpoints do, with their origin in them."""
    origin = ship.ship(sample.find(chain), tmp_path)
    before, after = (sample.load_chain(**sample.find(folder)) for folder in (chain, tmp_path))
    for part in ("a", "b", "c", "compressor"):
        one, two = getattr(before, part), getattr(after, part)
        assert one.config == two.config
        assert_close(one.state_dict(), two.state_dict(), rtol=1e-3, atol=1e-6)
    assert origin["b"]["command"].startswith("python ") and origin["a"]["psnr_a"] > 0
    assert not origin["c"]["before"], "trained from nothing"
    for weights_c in (chain / "stage_c/checkpoint.pt", tmp_path / "stage_c.safetensors"):
        begun = training.Run("C", TINY_C, tmp_path / "new", torch.device("cpu"), weights_c)
        assert begun.before == [{name: origin["c"][name] for name in ("command", "steps")}], (
            "a run keeps the commands of those whose weights it began with")
    with safe_open(tmp_path / "stage_c.safetensors", "pt") as file:
        assert json.loads(file.metadata()["provenance"]) == origin["c"]
    with pytest.raises(UsageError, match="another Stage A"):
        sample.load_chain(chain / "stage_a/checkpoint.pt", tmp_path / "stage_b.safetensors")
    weights.write_folder(tmp_path, {}, {"x": torch.zeros(1)})
    with pytest.raises(UsageError, match="not a readable checkpoint"):
        stage_c.load(tmp_path / "diffusion_pytorch_model.safetensors")
