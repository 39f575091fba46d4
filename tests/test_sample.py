"""The chain C -> B -> A as a command and in a process."""

import json

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from torch.testing import assert_close

import sample
import stage_b
import stage_c
from plumbing import checkpoint
from plumbing.cli import UsageError
from pocket import ship
from published import weights
from tests.common import command


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


def test_sample_in_process(chain, tmp_path, capsys):
    """--prompts, --n, --stages, --reconstruct and both starts each write their picture."""
    quick = ["--weights", str(chain), "--steps-c", "2", "--steps-b", "2",
             "--out", str(tmp_path / "x.png")]
    (tmp_path / "prompts.txt").write_text("a red star\n\na blue circle\n")
    sample.main(["--prompts", str(tmp_path / "prompts.txt"), "--n", "2",
                 "--start", "gaussian", *quick])
    assert Image.open(tmp_path / "x.png").size[0] == 2 * 132 + 4
    sample.main(["a red star", "--stages", *quick])
    Image.effect_noise((200, 130), 50).convert("RGB").save(tmp_path / "in.png")
    sample.main(["--reconstruct", str(tmp_path / "in.png"), *quick])
    assert "dB" in capsys.readouterr().out


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


def test_sample_refuses(chain, tmp_path):
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


def test_small_weights(chain, tmp_path):
    """pocket/ship.py: three files that load as the checkpoints do, with their origin in them."""
    origin = ship.ship(sample.find(chain), tmp_path)
    before, after = (sample.load_chain(**sample.find(folder)) for folder in (chain, tmp_path))
    for part in ("a", "b", "c", "compressor"):
        one, two = getattr(before, part), getattr(after, part)
        assert one.config == two.config
        assert_close(one.state_dict(), two.state_dict(), rtol=1e-3, atol=1e-6)
    assert "--widths 8,16,16" in origin["b"]["command"] and origin["a"]["psnr_a"] > 0
    with safe_open(tmp_path / "stage_c.safetensors", "pt") as file:
        assert json.loads(file.metadata()["provenance"]) == origin["c"]
    with pytest.raises(UsageError, match="another Stage A"):
        sample.load_chain(chain / "stage_a/checkpoint.pt", tmp_path / "stage_b.safetensors")
    weights.write_folder(tmp_path, {}, {"x": torch.zeros(1)})
    with pytest.raises(UsageError, match="not a readable checkpoint"):
        stage_c.load(tmp_path / "diffusion_pytorch_model.safetensors")
