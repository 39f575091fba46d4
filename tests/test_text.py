"""The text towers: pocket's and CLIP's."""

import random
import subprocess
import sys
import unicodedata

import numpy as np
import pytest
import torch

from plumbing import checkpoint, text
from plumbing.cli import UsageError
from pocket import shapes, teach_text
from tests.common import command
from tests.test_published import clip_tokenizer


@pytest.fixture(scope="module")
def published_tokenizer(tmp_path_factory):
    """transformers' CLIPTokenizer with the vocabulary that open_clip brings."""
    return clip_tokenizer(tmp_path_factory.mktemp("tokenizer"))


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
    monkeypatch.setattr("pocket.text.TAUGHT", "none")
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
    taught = load_file(checkpoint.POCKET / "text.safetensors")
    path = tmp_path / "text.safetensors"
    monkeypatch.setattr("pocket.text.TAUGHT", str(path))
    path.write_bytes(b"no tensors")
    with pytest.raises(UsageError, match="text.safetensors: is not the text tower of pocket"):
        text.text_encoder("pocket")
    save_file({"transformer.other": torch.zeros(2)}, path)
    with pytest.raises(UsageError, match="expected the 24 tensors .* found 1; .*transformer.other"):
        text.text_encoder("pocket")
    name = "transformer.resblocks.0.ln_1.weight"
    save_file(taught | {name: torch.ones(64)}, path)
    with pytest.raises(UsageError, match=rf"text.safetensors: .*{name}.*\[64\].*\[128\]"):
        text.text_encoder("pocket")


@pytest.mark.parametrize("suffix, prefix", [
    (".safetensors", ""), (".pt", "module."), (".bin", "text.")])
def test_clip_weights_from_a_file(tmp_path, monkeypatch, suffix, prefix):
    """Of a whole CLIP checkpoint only the text tower is read, whatever the file's form."""
    from open_clip.tokenizer import tokenize
    from open_clip.transformer import TextTransformer
    from safetensors.torch import save_file
    size = {"width": 16, "heads": 2, "layers": 2, "context_length": 77}
    monkeypatch.setitem(text.TEXT_ENCODERS, "clip-h", size)
    tower = TextTransformer(width=16, heads=2, layers=2, output_dim=8, output_tokens=True).eval()
    state = {prefix + k: v.half().clone() for k, v in tower.state_dict().items()}
    state |= {"visual.transformer.x": torch.zeros(3), "logit_scale": torch.tensor(1.0)}
    path = tmp_path / f"clip{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save({"state_dict": state}, path)
    encoder = text.text_encoder("clip-h", weights=path)
    captions = ["a red star", ""]
    expected = tower.half().float()(tokenize(captions))[1]
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
    with pytest.raises(UsageError, match="No such file"):
        text.text_encoder("clip-h", tmp_path / "clip.safetensors")


def test_imports_are_late(tmp_path):
    """data.py and plumbing/text.py start without open_clip, torchvision and transformers; a picture
    is drawn without these and without torch's compiler, which take seconds to import."""
    command("-c", "import sys, data, plumbing.text; "
                  "assert not {'open_clip', 'torchvision', 'transformers'} & set(sys.modules)")
    command("-c", "import sys, sample; sample.main(['a red star', '--steps-c', '2', '--steps-b', "
                  f"'2', '--out', {str(tmp_path / 'a.png')!r}]); assert not "
                  "{'open_clip', 'torchvision', 'transformers', 'torch._dynamo'} & "
                  "set(sys.modules)")


def test_tower_is_that_of_open_clip(encoder):
    """Our tower computes, to the bit, what open_clip's TextTransformer computes."""
    from open_clip.transformer import TextTransformer
    theirs = TextTransformer(**text.TEXT_ENCODERS["pocket"], output_dim=None).eval()
    theirs.load_state_dict(encoder.tower.state_dict())
    captions = [shapes.caption(shapes.scene(i), np.random.RandomState(i)) for i in range(20)]
    ids, real = encoder.tokens(["", *captions])
    hidden = ~real[:, None].expand(-1, encoder.length, -1).tril()
    mask = torch.zeros(hidden.shape).masked_fill(hidden, float("-inf"))
    with torch.no_grad():
        x = theirs.token_embedding(ids) + theirs.positional_embedding
        x = theirs.transformer(x, attn_mask=mask.repeat_interleave(theirs.heads, 0))
        assert torch.equal(encoder(["", *captions]), theirs.ln_final(x))


# What captions hold that tokenizers treat in different ways.
PIECES = ["a red star", "It’s", "IT'S", "“curly” ‘quotes’", "&amp;", "&lt;b&gt; &#39;", "ﬁne ﬂuﬀ",
          "ＦＵＬＬ １２", "<|endoftext|>", "<|startoftext|>", "!!<|endoftext|>!!",
          "<start_of_text>", "ΟΔΟΣ", "İstanbul", "e\u0301 é", "'ſ", "Kelvin", "ñ n\u0303",
          "日本語 テスト",
          "٣٤ ²½ Ⅷ", "👩‍👩‍👧 🇩🇪", "\ufeff", "\u200b", "\x1c\x1d", "\x85\u2028\u00a0\u3000",
          "\x00\x07",
          "don't we'll I'd", "2023-01-02", "l’été à 5 €", "Ｉ’ｍ", "…", "#tag @you",
          "_under_score_",
          "🙂" * 5, "word " * 90]


def test_ids_are_those_of_the_published_tokenizer(published_tokenizer):
    """600 captions, unicode included, have the ids that transformers' CLIPTokenizer gives them."""
    letters = [chr(code) for code in range(0x30000) if unicodedata.category(chr(code))[0] != "C"]
    rng, captions = random.Random(0), PIECES + [a + b for a, b in zip(PIECES, PIECES[1:])]
    while len(captions) < 600:
        captions.append("".join(rng.choice(letters) if rng.random() < 0.5 else rng.choice(PIECES)
                                for _ in range(rng.randint(1, 12))))
    encoder = text.TextEncoder("clip-h", text.text_encoder().tower, text.END_OF_TEXT)
    encoder.length = 77
    ids, real = encoder.tokens(captions)
    expected = published_tokenizer(captions, padding="max_length", max_length=77, truncation=True,
                                   return_tensors="pt")
    wrong = [one for one, mine, its in zip(captions, ids, expected.input_ids)
             if not torch.equal(mine, its)]
    assert not wrong, f"{len(wrong)} of {len(captions)}, such as {wrong[:3]}"
    assert torch.equal(real, expected.attention_mask.bool())


def test_ids_of_the_drawings_are_open_clips():
    """The captions of the drawings have the ids of open_clip's own tokenizer."""
    from open_clip.tokenizer import tokenize
    captions = [shapes.caption(shapes.scene(i), np.random.RandomState(i)) for i in range(500)]
    ids, real = text.text_encoder().tokens(captions)
    assert torch.equal(ids * real, tokenize(captions)[:, :24])
