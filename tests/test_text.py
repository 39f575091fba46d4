"""The text towers: pocket's and CLIP's."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from plumbing import text
from plumbing.cli import UsageError
from pocket import shapes, teach_text
from tests.common import command


def test_pocket_text_encoder(encoder):
    """24 un-pooled tokens; word order matters; '' works; alone or in a batch is the same."""
    captions = ["red star blue circle", "blue star red circle", "",
                "a red star above a blue circle"]
    tokens = encoder(captions)
    assert tokens.shape == (4, encoder.length, encoder.width) == (4, 24, 128)
    assert tokens.dtype == torch.float32 and not tokens.requires_grad
    changed = (tokens[0] - tokens[1]).abs().amax(dim=1)
    assert changed[0] == 0 and (changed[1:] > 1e-3).all()  # the start token, then all others
    assert not torch.allclose(tokens[2], tokens[3])
    for i, caption in enumerate(captions):
        torch.testing.assert_close(encoder([caption])[0], tokens[i], rtol=1e-4, atol=1e-5)


def test_pocket_text_encoder_is_the_same_everywhere(encoder, monkeypatch):
    """A known checksum, whatever was drawn before; without the taught layers, another one."""
    assert encoder.checksum == "a4876a0582811a9a19ce027954e69b5719db6b3e067912b963b7b58f876611ea"
    assert not any(p.requires_grad for p in encoder.parameters()) and not encoder.train().training
    monkeypatch.setattr(text, "POCKET_TEXT", "none")
    untaught = "9951c320d90751f38e777c6775c2a6870657b5b6183a86ec761edad8e65721ff"
    assert text.text_encoder("pocket").checksum == untaught


def test_pocket_text_encoder_knows_word_order(encoder):
    """Two captions of one picture are nearer to each other than either to that of its mirror."""
    right = 0
    for index in range(1, 200, 2):
        scene = shapes.scene(index)
        mirror = dict(scene, relation=shapes.RELATIONS[scene["relation"]])
        captions = [shapes.caption(one, np.random.RandomState(i))
                    for i, one in enumerate((scene, scene, mirror))]
        one, other, mirrored = teach_text.end_of_text(encoder, captions)
        right += (one - other).norm() < min((one - mirrored).norm(), (other - mirrored).norm())
    assert right >= 90, right


def test_bad_pocket_text_weights(tmp_path, monkeypatch):
    """A damaged file and one of another tower are named, with what was expected."""
    from safetensors.torch import load_file, save_file
    taught = load_file(text.POCKET_TEXT)
    path = tmp_path / "text.safetensors"
    monkeypatch.setattr(text, "POCKET_TEXT", str(path))
    path.write_bytes(b"no tensors")
    with pytest.raises(UsageError, match="text.safetensors: not a readable text tower"):
        text.text_encoder("pocket")
    save_file({"transformer.other": torch.zeros(2)}, path)
    with pytest.raises(UsageError, match="expected the 24 tensors"):
        text.text_encoder("pocket")
    name = "transformer.resblocks.0.ln_1.weight"
    save_file(taught | {name: torch.ones(64)}, path)
    with pytest.raises(UsageError, match=rf"of {name} it has \(64,\), expected \(128,\)"):
        text.text_encoder("pocket")


@pytest.mark.parametrize("suffix, prefix", [
    (".safetensors", ""), (".pt", "module."), (".bin", "text.")])
def test_clip_weights_from_a_file(tmp_path, monkeypatch, suffix, prefix):
    """Of a whole CLIP checkpoint only the text tower is read, whatever the file's form."""
    from open_clip.transformer import TextTransformer
    from safetensors.torch import save_file
    size = {"width": 16, "heads": 2, "layers": 2, "length": 77}
    monkeypatch.setitem(text.TEXT_ENCODERS, "clip-h", {**text.TEXT_ENCODERS["clip-h"], **size})
    tower = TextTransformer(width=16, heads=2, layers=2, output_dim=8, output_tokens=True).eval()
    state = {prefix + k: v.half().clone() for k, v in tower.state_dict().items()}
    state |= {"visual.transformer.x": torch.zeros(3), "logit_scale": torch.tensor(1.0)}
    path = tmp_path / f"clip{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save({"state_dict": state}, path)
    encoder = text.text_encoder("clip-h", weights=path)
    captions = ["a red star", ""]
    expected = tower.half().float()(encoder.tokenizer(captions))[1]
    for i, real in enumerate(encoder.tokens(captions)[1]):     # open_clip pads in another way
        torch.testing.assert_close(encoder(captions)[i, real], expected[i, real].detach())
    assert encoder.width == 16 and encoder.length == 77
    monkeypatch.setitem(text.TEXT_ENCODERS["clip-h"], "width", 32)
    with pytest.raises(UsageError, match="is not the text tower of clip-h"):
        text.text_encoder("clip-h", weights=path)


def test_clip_without_network(monkeypatch, capfd):
    """Without weights and network: one sentence that names the file, the flag and the way out."""
    import huggingface_hub
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: None)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", "/nonexistent")
    with pytest.raises(UsageError) as caught:
        text.text_encoder("clip-h")
    said = str(caught.value)
    assert said.startswith("The CLIP weights of clip-h (ViT-H-14, laion2b_s32b_b79k)")
    assert "--clip /path" in said and "--preset pocket" in said and "\n" not in said
    assert capfd.readouterr() == ("", "")


def test_bad_clip_files(tmp_path):
    """A file that is no checkpoint, or a pickle that runs code, is refused with a sentence."""
    import pickle
    (tmp_path / "a.safetensors").write_bytes(b"<html>")
    (tmp_path / "b.bin").write_bytes(pickle.dumps({"x": subprocess.Popen}, protocol=2))
    (tmp_path / "c.pt").write_bytes(b"")
    torch.save([1, 2], tmp_path / "d.pt")
    for name in ("a.safetensors", "b.bin", "c.pt", "d.pt", "gone.pt"):
        with pytest.raises(UsageError, match="--clip"):
            text.text_encoder("clip-h", weights=tmp_path / name)


def test_without_published(tmp_path, monkeypatch):
    """Without the folder published/ the pocket tower and local files of open_clip still load."""
    for name in ("published", "published.text", "published.hub"):
        monkeypatch.setitem(sys.modules, name, None)
    text.text_encoder("pocket")
    with pytest.raises(UsageError, match="there is no file"):
        text.text_encoder("clip-h", tmp_path / "clip.safetensors")


def test_imports_are_late():
    """data.py and plumbing/text.py start without open_clip, torchvision and transformers."""
    command("-c", "import sys, data, plumbing.text; "
                  "assert not {'open_clip', 'torchvision', 'transformers'} & set(sys.modules)")
