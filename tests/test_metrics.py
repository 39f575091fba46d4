"""Distances and scores of folders of pictures, against hand values and other libraries."""

import math
import socket

import numpy as np
import pytest
import torch
from PIL import Image

from experiments import metrics
from plumbing.cli import UsageError


def normal(n, mean, deviations, seed):
    """n samples of a normal distribution, whitened: mean and covariance are exact."""
    x = torch.randn(n, len(deviations), generator=torch.Generator().manual_seed(seed)).double()
    x = (x - x.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(x.T.cov()).T)
    return x * torch.tensor(deviations).double() + torch.tensor(mean).double()


def test_frechet_distance_by_hand():
    """Independent coordinates: the sum of (mean difference)^2 + (deviation difference)^2."""
    a, b = normal(50, [0, 0, 1], [1, 2, 3], 1), normal(80, [2, 0, 1], [1, 5, 2], 2)
    assert metrics.frechet(a, b) == pytest.approx(2 ** 2 + 3 ** 2 + 1 ** 2)
    assert metrics.frechet(a, a) == pytest.approx(0, abs=1e-9)


def test_frechet_distance_against_scipy():
    """With correlated features, and with fewer pictures than features."""
    linalg = pytest.importorskip("scipy.linalg", reason="scipy is not installed")
    for n, tolerance in ((200, 1e-8), (6, 1e-3)):             # the singular root is less exact
        a, b = (torch.randn(n, 10).double() @ torch.randn(10, 10).double() for _ in range(2))
        cov_a, cov_b = (np.cov(one.numpy().T) for one in (a, b))
        root = linalg.sqrtm(cov_a @ cov_b).real
        expected = ((a.mean(0) - b.mean(0)).square().sum().item()
                    + np.trace(cov_a + cov_b - 2 * root))
        assert metrics.frechet(a, b) == pytest.approx(expected, rel=tolerance)


def test_inception_score_by_hand():
    """Certain of one of K classes each time, all equally often: K. Never certain: 1."""
    certain = 100 * torch.eye(4).repeat(10, 1).double()
    assert metrics.inception_score(certain)[0] == pytest.approx(4)
    assert metrics.inception_score(torch.zeros(40, 7).double())[0] == pytest.approx(1)


def test_manipulations():
    """Each of Table 3's rows changes a picture, keeps its size, and does what its name says."""
    x, y = np.meshgrid(np.arange(96), np.arange(96))
    picture = Image.fromarray(np.stack((x * 2, y * 2, 99 + 0 * x), 2).astype(np.uint8))
    before = np.asarray(metrics.square(picture, 64)).astype(float)
    after = {name: np.asarray(change(picture, 64)).astype(float)
             for name, _, _, change in metrics.TABLE_3}
    assert len(after) == 13
    for name, pixels in after.items():
        assert pixels.shape == (64, 64, 3) and not np.array_equal(pixels, before), name
    assert after["brightness +10 %"].mean() / before.mean() == pytest.approx(1.1, abs=0.01)
    assert after["brightness -10 %"].mean() / before.mean() == pytest.approx(0.9, abs=0.01)
    assert after["contrast +10 %"].std((0, 1))[0] > before.std((0, 1))[0] > (
        after["contrast -10 %"].std((0, 1))[0])
    loss = [abs(after[f"JPEG quality {quality}"] - before).mean() for quality in (95, 80, 50)]
    assert loss == sorted(loss), "a lower JPEG quality changes less"
    assert len(np.unique(after["8-bit colour palette"].reshape(-1, 3), axis=0)) <= 256


@pytest.fixture
def folders(tmp_path):
    """Two folders of drawings and one of noise, 12 pictures each."""
    from experiments import study
    for name, seed in (("real", 6), ("other", 7)):
        study.main(["draw", "--out", str(tmp_path / name), "--scenes", "12", "--real",
                    "--seed", str(seed)])
    (tmp_path / "noise").mkdir()
    for i in range(12):
        pixels = np.random.RandomState(i).randint(0, 256, (128, 128, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"noise/{i:05d}.png")
    (tmp_path / "noise/prompts.txt").write_text((tmp_path / "other/prompts.txt").read_text())
    return [str(tmp_path / name) for name in ("real", "other", "noise")]


def distances(text):
    """{folder: distance} of the printed table."""
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| /")]
    return {row[0].split("/")[-1]: float(row[2]) for row in rows}


def test_pocket_features(folders, tmp_path, capsys):
    """Offline: noise is farther from drawings than other drawings are; few pictures: a warning; a
    damaged one is named."""
    metrics.main(folders)
    text = capsys.readouterr().out
    found = distances(text)
    assert found["noise"] > 2 * found["other"] > 0, text
    assert "floor, two halves" in text and "n = 12" in text and "warning" in text, text
    assert "FID" not in text, "the distance of other features is called FID"
    (tmp_path / "noise/00003.png").write_bytes(b"<html>")
    with pytest.raises(UsageError, match="noise/00003.png: cannot be decoded"):
        metrics.main(folders)


def test_offline_says_which_file_goes_where(folders, tmp_path, monkeypatch):
    """Inception's weights are not there and there is no network: one sentence."""
    pytest.importorskip("torch_fidelity", reason="torch-fidelity is not installed")

    def unreachable(*_, **__):
        raise socket.gaierror("no network")
    monkeypatch.setattr(socket, "getaddrinfo", unreachable)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(UsageError, match=r"weights-inception-.*\.pth into .*/hub/checkpoints/"):
        metrics.main([*folders, "--features", "inception"])
    with pytest.raises(UsageError, match="found 0 pictures"):
        metrics.main([str(tmp_path / "nowhere")])


@pytest.mark.slow
def test_inception_against_torchmetrics(folders, tmp_path, monkeypatch, capsys):
    """With random weights where the cache keeps Inception's: FID and Inception Score agree."""
    fidelity = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3",
                                   reason="torch-fidelity is not installed")
    theirs = pytest.importorskip("torchmetrics.image", reason="torchmetrics is not installed")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    path = tmp_path / "hub/checkpoints" / fidelity.URL_INCEPTION_V3.split("/")[-1]
    path.parent.mkdir(parents=True)
    with monkeypatch.context() as patch:               # the network has no constructor without file
        patch.setattr(fidelity, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(torch.nn.Module, "load_state_dict", lambda *_, **__: None)
        net = fidelity.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    torch.save(net.state_dict(), path)
    net = metrics.network("inception", "cpu")

    class First(torch.nn.Module):                      # 64 of the 2,048 numbers: faster roots
        num_features = 64

        def forward(self, images):
            return net(images)[0][:, :64]
    monkeypatch.setattr(metrics, "network", lambda *_: lambda images: (
        First()(images), net(images)[1]))
    metrics.main([folders[0], folders[2], "--features", "inception"])
    row = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if "| /" in line][0]
    real, noise = (torch.stack([
        metrics.pil_to_tensor(metrics.square(Image.open(file).convert("RGB"), 256))
        for file in metrics.files_in(folder)]) for folder in (folders[0], folders[2]))
    fid, score = theirs.FrechetInceptionDistance(feature=First()), theirs.InceptionScore(splits=10)
    fid.update(real, real=True)
    fid.update(noise, real=False)
    assert float(row[2]) == pytest.approx(fid.compute().item(), rel=1e-3, abs=1e-3)
    score.update(noise)
    monkeypatch.setattr(torch, "randperm", lambda n, **_: torch.arange(n))    # its order: ours
    assert row[3] == "{:.2f} ± {:.2f}".format(*(one.item() for one in score.compute())), row


@pytest.mark.slow
def test_text_scores(folders, tmp_path, monkeypatch, capsys):
    """CLIP score and PickScore with a small CLIP: both folders get one, the share adds up."""
    tools = pytest.importorskip("transformers")
    sides = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    model = tools.CLIPModel(tools.CLIPConfig(
        text_config=dict(sides, vocab_size=49408), projection_dim=16,
        vision_config=dict(sides, image_size=32, patch_size=16)))
    model.save_pretrained(tmp_path / "clip")
    words = [f"{chr(97 + i)}</w>" for i in range(26)]
    vocabulary = {word: i for i, word in enumerate(
        [chr(97 + i) for i in range(26)] + words + ["<|startoftext|>", "<|endoftext|>"])}
    tokenizer = tools.CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77)
    tools.CLIPProcessor(tools.CLIPImageProcessor(size=32, crop_size=32), tokenizer
                        ).save_pretrained(tmp_path / "clip")
    monkeypatch.setattr(metrics, "CLIP", str(tmp_path / "clip"))
    monkeypatch.setattr(metrics, "PICKSCORE", str(tmp_path / "clip"))
    metrics.main([*folders, "--text"])
    text = capsys.readouterr().out
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| /")]
    clip = [float(row[4].strip(" |")) for row in rows[:2]]
    prompts = (tmp_path / "other/prompts.txt").read_text().splitlines()
    cosines = metrics.likeness(str(tmp_path / "clip"), metrics.files_in(folders[1]), prompts, "cpu")
    assert clip[0] == pytest.approx(100 * cosines.clamp_min(0).mean().item(), abs=0.01), text
    assert sum(int(cell) for cell in rows[2][1:4]) == 12 and math.isfinite(clip[1]), text
    monkeypatch.setattr(metrics, "CLIP", "nobody/nothing")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)       # at once
    with pytest.raises(UsageError, match="go online once"):
        metrics.main([*folders, "--text"])
