"""Foreign weights: diffusers' and the official formats, against diffusers itself."""

import hashlib
import http.server
import json
import os
import pickle
import shutil
import subprocess
import sys
import threading
import time
from copy import deepcopy
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.testing import assert_close

import sample
import semantic_compressor
import stage_a
import stage_b
import stage_c
from plumbing.cli import UsageError
from plumbing.text import text_encoder
from published import export, weights
from published import hub as published_hub
from test_shapes import TINY_A, TINY_B, TINY_C, shake
from tests.common import HERE, command


def test_published_names():
    """State-dict keys are those of the published checkpoints."""
    c = stage_c.StageC(TINY_C).state_dict()
    for key in ("projection.weight", "cond_mapper.0.weight", "cond_mapper.2.bias",
                "blocks.0.depthwise.weight", "blocks.0.channelwise.0.weight",
                "blocks.0.channelwise.2.gamma", "blocks.0.channelwise.4.weight",
                "blocks.1.mapper.weight", "blocks.2.attention.to_q.weight",
                "blocks.2.attention.to_out.0.bias", "blocks.2.kv_mapper.1.weight",
                "out.1.weight"):
        assert key in c
    b = stage_b.StageB(replace(TINY_B, attend_to_sem=False, prediction="released")).state_dict()
    for key in ("clip_mapper.weight", "effnet_mappers.1.weight", "effnet_mappers.4.bias",
                "embedding.1.weight", "down_blocks.1.0.1.weight",
                "down_blocks.1.3.attention.to_v.weight", "up_blocks.0.6.1.weight", "clf.1.weight"):
        assert key in b
    assert not any("sem_mapper" in key for key in b)
    a = stage_a.StageA(TINY_A).state_dict()
    for key in ("in_block.1.weight", "down_blocks.0.gammas", "down_blocks.0.depthwise.1.weight",
                "down_blocks.0.channelwise.2.bias", "down_blocks.3.0.weight",
                "down_blocks.3.1.running_var", "vquantizer.embedding.weight",
                "up_blocks.0.0.weight", "out_block.0.weight"):
        assert key in a
    with torch.device("meta"):
        model = semantic_compressor.SemanticCompressor(semantic_compressor.PRESETS["released"])
    keys = {"backbone.1.0.block.0.0.weight", "mapper.0.weight", "mapper.1.bias"}
    assert keys <= set(model.state_dict())


PROMPTS = ["a red star above a blue circle", "An ASTRONAUT, riding a horse -- 4k; it's 35mm!"]


def worst(found, expected):
    """Largest difference, relative to the largest expected value."""
    assert found.shape == expected.shape and found.isfinite().all()
    return ((found - expected).abs().max() / expected.abs().max()).item()


def clip_tokenizer(folder):
    """transformers' CLIPTokenizer from files in `folder`, made of the vocabulary of open_clip."""
    from open_clip.tokenizer import SimpleTokenizer
    from transformers import CLIPTokenizer
    clip, marks = SimpleTokenizer(), {"<start_of_text>": "<|startoftext|>",
                                      "<end_of_text>": "<|endoftext|>"}
    vocabulary = {marks.get(word, word): number for word, number in clip.encoder.items()}
    merges = [" ".join(pair) for pair in sorted(clip.bpe_ranks, key=clip.bpe_ranks.get)]
    folder.mkdir(exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges), encoding="utf-8")
    tokens = dict(bos_token="<|startoftext|>", eos_token="<|endoftext|>",
                  unk_token="<|endoftext|>", pad_token="<|endoftext|>")
    (folder / "special_tokens_map.json").write_text(json.dumps(tokens))
    (folder / "tokenizer_config.json").write_text(
        json.dumps(dict(tokens, model_max_length=77, tokenizer_class="CLIPTokenizer")))
    return CLIPTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """(folder, networks): small random networks of diffusers and transformers, in the layout of
    warp-ai/wuerstchen and warp-ai/wuerstchen-prior, with every kind of block that these have.
    """
    from diffusers import DDPMWuerstchenScheduler
    from diffusers.pipelines.deprecated.wuerstchen import (
        PaellaVQModel,
        WuerstchenDiffNeXt,
        WuerstchenPrior,
    )
    from transformers import CLIPTextConfig, CLIPTextModel
    folder = tmp_path_factory.mktemp("published")
    torch.manual_seed(0)
    vqgan = PaellaVQModel(bottleneck_blocks=2, embed_dim=32, num_vq_embeddings=64)
    decoder = WuerstchenDiffNeXt(
        c_cond=24, clip_embd=32, c_hidden=[16, 32, 32, 48], nhead=[-1, 2, 4, 6],
        blocks=[1, 2, 2, 1], level_config=["CT", "CTA", "CTA", "CTA"],
        inject_effnet=[False, True, True, True])
    prior = WuerstchenPrior(c=32, c_cond=48, depth=2, nhead=2)
    networks = dict(vqgan=shake(vqgan, 0.2), decoder=shake(decoder), prior=shake(prior))
    with torch.no_grad():                          # the heads: a chain of random ones would explode
        for head in (decoder.clf[1], prior.out[1]):
            head.weight.mul_(0.02)
            head.bias.mul_(0.02)
        vqgan.down_blocks[3][1].running_var.fill_(0.1)
    for name, width, heads in (("wuerstchen", 32, 2), ("wuerstchen-prior", 48, 3)):
        text = CLIPTextModel(CLIPTextConfig(
            vocab_size=49408, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2,
            num_attention_heads=heads, hidden_act="gelu", bos_token_id=49406, eos_token_id=49407))
        networks[f"text/{name}"] = shake(text, 0.3).eval()
        text.save_pretrained(folder / name / "text_encoder")
        networks[f"tokenizer/{name}"] = clip_tokenizer(folder / name / "tokenizer")
        networks[f"scheduler/{name}"] = DDPMWuerstchenScheduler()
    vqgan.save_pretrained(folder / "wuerstchen/vqgan")
    decoder.save_pretrained(folder / "wuerstchen/decoder")
    prior.save_pretrained(folder / "wuerstchen-prior/prior")
    for network in (vqgan, decoder, prior):
        network.eval()
    return folder, networks


def reference(networks, prompt, seed, height, width, levels, steps_b):
    """diffusers' two pipelines -> C's raw latents, B's latents, pixels before clamping."""
    from diffusers.pipelines.deprecated.wuerstchen import (
        WuerstchenDecoderPipeline,
        WuerstchenPriorPipeline,
    )
    names = {"prior": "wuerstchen-prior", "decoder": "wuerstchen"}
    parts = {stage: dict(tokenizer=networks[f"tokenizer/{name}"],
                         text_encoder=networks[f"text/{name}"],
                         scheduler=networks[f"scheduler/{name}"]) for stage, name in names.items()}
    first = WuerstchenPriorPipeline(prior=networks["prior"], **parts["prior"],
                                    latent_mean=networks.get("latent_mean", 42.0),
                                    latent_std=networks.get("latent_std", 1.0))
    second = WuerstchenDecoderPipeline(decoder=networks["decoder"], vqgan=networks["vqgan"],
                                       **parts["decoder"])
    for pipeline in (first, second):
        pipeline.set_progress_bar_config(disable=True)
    noise = stage_b.generators([seed, seed + 2 ** 31])
    raw = first(prompt, height, width, timesteps=list(levels), guidance_scale=4.0,
                generator=noise[0]).image_embeddings
    latents = second(raw, prompt, num_inference_steps=steps_b, generator=noise[1],
                     output_type="latent").images
    vqgan = networks["vqgan"]
    with torch.no_grad():
        return raw, latents, vqgan.decode(latents * vqgan.config.scale_factor).sample


def ours(chain, prompt, seed, height, width, levels, steps_b):
    """The same from sample.py's chain."""
    way = []
    latents = sample.draw_latents(chain, [prompt], [seed], height, width, levels)
    with torch.no_grad():
        images = stage_b.draw_images(chain, latents, [prompt], [seed], steps_b, history=way)
    mean, std = chain.scale
    return latents * std + mean, way[-1], images


def test_published_modules(published):
    """Stage A, B and C loaded from diffusers' folders give diffusers' numbers, to 1e-5."""
    folder, networks = published
    torch.manual_seed(1)
    a = stage_a.load(folder / "wuerstchen/vqgan")
    b = stage_b.load(folder / "wuerstchen/decoder")
    c = stage_c.load(folder / "wuerstchen-prior/prior")
    images, t = torch.rand(2, 3, 64, 96), torch.tensor([0.9, 0.2])
    x_b, x_c = torch.randn(2, 4, 32, 48), torch.randn(2, 16, 3, 5)
    sem, text_b, text_c = torch.randn(2, 16, 3, 5), torch.randn(2, 77, 32), torch.randn(2, 77, 48)
    with torch.no_grad():
        latents = networks["vqgan"].encode(images).latents
        assert worst(a.encode(images), latents) < 1e-5
        assert worst(a.decode(latents), networks["vqgan"].decode(latents).sample) < 1e-5
        quantised = networks["vqgan"].decode(latents, force_not_quantize=False).sample
        assert worst(a.decode(a.quantize(latents)[0]), quantised) < 1e-5
        assert worst(b(x_b, t, sem, text_b), networks["decoder"](x_b, t, sem, text_b)) < 1e-5
        assert worst(c(x_c, t, text_c), networks["prior"](x_c, t, text_c)) < 1e-5
    assert a.config.latent_std == 0.3764 and b.config.condition == "raw"


@pytest.mark.parametrize("height, width", [(640, 128), (128, 640), (128, 128)])
def test_published_decoder_at_extreme_ratios(tmp_path, height, width):
    """A Stage B of five levels, the deepest one column or one row, gives diffusers' numbers."""
    from diffusers.pipelines.deprecated.wuerstchen import WuerstchenDiffNeXt
    decoder = shake(WuerstchenDiffNeXt(
        c_cond=24, clip_embd=32, c_hidden=[16] * 5, nhead=[-1, 2, 2, 2, 2], blocks=[1] * 5,
        level_config=["CT"] + ["CTA"] * 4, inject_effnet=[False] + [True] * 4)).eval()
    decoder.save_pretrained(tmp_path)
    b, t = stage_b.load(tmp_path), torch.tensor([0.9, 0.2])
    x, text = torch.randn(2, 4, height // 4, width // 4), torch.randn(2, 77, 32)
    sem = 42 * torch.randn(2, 16, height * 3 // 128, width * 3 // 128)
    with torch.no_grad():
        off = worst(b(x, t, sem, text), decoder(x, t, sem, text))
    assert off < 1e-5, f"Stage B at {height}x{width} pixels is off by {off:.1e} from diffusers"


def test_published_text_towers(published):
    """Text tokens are those of transformers at all 77 positions, from folder and open_clip file."""
    folder, networks = published
    captions = [*PROMPTS, "", "ünïcode café 日本  x", "word " * 100, "it’s &amp; <|endoftext|> x"]
    for name, known in (("wuerstchen", "clip-h"), ("wuerstchen-prior", "clip-bigg")):
        encoder = text_encoder(known, folder / name / "text_encoder")
        query = networks[f"tokenizer/{name}"](captions, padding="max_length", max_length=77,
                                              truncation=True, return_tensors="pt")
        with torch.no_grad():
            expected = networks[f"text/{name}"](
                query.input_ids, attention_mask=query.attention_mask).last_hidden_state
        ids, real = encoder.tokens(captions)
        assert torch.equal(ids, query.input_ids)
        assert torch.equal(real, query.attention_mask.bool())
        assert expected.shape[1] == 77 and worst(encoder(captions), expected) < 1e-5


@pytest.mark.parametrize("size", [(128, 128), (256, 384), (512, 512)])
def test_published_chain(published, size):
    """The whole chain equals diffusers' two pipelines: C's and B's latents and pixels, to 1e-4.

    pytest -k published_chain -s shows the differences.
    """
    folder, networks = published
    chain = sample.load_chain(**sample.find(folder))
    levels = stage_c.RELEASED_LEVELS if size == (128, 128) else torch.linspace(1, 0, 5).tolist()
    job = (PROMPTS[size[0] > 128], 7, *size, levels, 3)
    found, expected = ours(chain, *job), reference(networks, *job)
    differences = [worst(one, other) for one, other in zip(found, expected)]
    print(f"{size}: C {differences[0]:.1e}, B {differences[1]:.1e}, pixels {differences[2]:.1e}")
    assert max(differences) < 1e-4
    assert expected[2].shape == (1, 3, *size) and expected[2].std() > 0.05


@pytest.mark.parametrize("part", ["vqgan", "decoder", "prior", "text/wuerstchen",
                                  "text/wuerstchen-prior"])
def test_published_chain_notices(published, part):
    """The comparison is no formality: 1 % more on one network's weights breaks its bound."""
    folder, networks = published
    chain = sample.load_chain(**sample.find(folder))
    job = (PROMPTS[0], 7, 128, 128, torch.linspace(1, 0, 5).tolist(), 3)
    expected = reference(networks, *job)
    network = {"vqgan": chain.a, "decoder": chain.b, "prior": chain.c,
               "text/wuerstchen": chain.text_b, "text/wuerstchen-prior": chain.text_c}[part]
    for parameter in network.parameters():
        parameter.mul_(1.01)
    found = ours(chain, *job)
    assert max(worst(one, other) for one, other in zip(found, expected)) > 1e-4


def to_official(tensors):
    """The names of diffusers' folders -> those of the official .pt files."""
    out = {}
    for name, value in tensors.items():
        name = name.replace("vquantizer.embedding", "vquantizer.codebook")
        name = name.replace("attention.to_out.0", "attention.attn.out_proj")
        if ".to_q." in name:
            parts = [tensors[name.replace(".to_q.", f".to_{one}.")] for one in "qkv"]
            name = name.replace("attention.to_q.", "attention.attn.in_proj_")
            value = torch.cat(parts)
        if ".to_k." not in name and ".to_v." not in name:
            out[name] = value
    return out


def test_official_files(published, tmp_path, monkeypatch):
    """The official .pt files, with names of their own, give the same picture as the folders."""
    folder, networks = published
    chain = sample.load_chain(**sample.find(folder))
    nets = (chain.a, chain.b, chain.c)
    for module, net in zip((stage_a, stage_b, stage_c), nets):
        monkeypatch.setitem(module.PRESETS, "released", net.config)
    compressor = shake(semantic_compressor.SemanticCompressor(
        semantic_compressor.PRESETS["released"]))
    a, b, c = (to_official(net.state_dict()) for net in nets)
    assert any("in_proj_weight" in name for name in b) and not any(".to_q." in name for name in b)
    torch.save({"state_dict": a}, tmp_path / "vqgan_f4_v1_500k.pt")
    torch.save({"state_dict": b, "effnet_state_dict": compressor.state_dict()},
               tmp_path / "model_v2_stage_b.pt")
    torch.save({"ema_state_dict": c}, tmp_path / "model_v2_stage_c.pt")
    clip = tmp_path / "clip"
    clip.mkdir()
    for name, short in (("wuerstchen", "clip-h"), ("wuerstchen-prior", "clip-bigg")):
        (clip / short).symlink_to(folder / name / "text_encoder")
    again = sample.load_chain(**sample.find(tmp_path), clip=clip)
    job = (PROMPTS[0], 7, 128, 128, 2, 2)
    for found, expected in zip(ours(again, *job), ours(chain, *job)):
        assert_close(found, expected)
    images = torch.rand(1, 3, 96, 96)
    assert_close(again.compressor(images), compressor.eval()(images))
    assert again.scale == (-1.0, 42.0)


@pytest.mark.slow
def test_published_command_line(published, tmp_path):
    """sample.py --weights DIR writes a PNG from published weights; without network it says how."""
    folder, _ = published
    out = tmp_path / "one.png"
    command("sample.py", PROMPTS[0], "--weights", folder, "--size", "384x256", "--steps-c",
            "released", "--steps-b", 2, "--out", out)
    assert Image.open(out).size == (384, 256)
    done = command("sample.py", "x", "--weights", "released", check=False, env={
        **os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path / "empty")})
    assert done.returncode == 1 and "DIR/wuerstchen/decoder" in done.stderr
    assert "Traceback" not in done.stderr and done.stderr.strip().count("\n") == 0


@pytest.mark.slow
def test_nothing_needs_published(drawings, tmp_path):
    """Without the folder published/ A, B and C train from nothing and are sampled from; and
    published/weights.py imports no stage.
    """
    for name in ("plumbing", "pocket", "sources"):
        shutil.copytree(HERE / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for file in HERE.glob("*.py"):
        shutil.copy(file, tmp_path)
    done = command("-c", f"""
import importlib.util
from pathlib import Path

import sample, stage_a, stage_b, stage_c
from test_shapes import TINY_A, TINY_B, TINY_C

assert importlib.util.find_spec("published") is None
assert Path(stage_c.__file__).parent == Path.cwd()
a, b = "runs/stage_a/checkpoint.pt", "runs/stage_b/checkpoint.pt"
stage_a.train(TINY_A, {str(drawings)!r}, "runs/stage_a")
stage_b.train(TINY_B, {str(drawings)!r}, "runs/stage_b", a)
stage_c.train(TINY_C, {str(drawings)!r}, "runs/stage_c", a, b)
sample.main(["a red star", "--weights", "runs", "--steps-c", "2", "--steps-b", "2"])
try:
    sample.find("nowhere")
except sample.UsageError as error:
    print(error)
""", cwd=tmp_path, timeout=600)
    assert "expected stage_a/" in done.stdout and Image.open(tmp_path / "sample.png").width == 128
    command("-c", "import sys, published.weights; "
            "assert not {'stage_a', 'stage_b', 'stage_c', 'data', 'sample'} & set(sys.modules)")


def test_wrong_published_files(published, tmp_path):
    """A folder of another class, a missing file, code in a .bin, weights of another size, a network
    that is not built here: one sentence each."""
    folder, _ = published
    with pytest.raises(UsageError, match="found a WuerstchenPrior, expected PaellaVQ"):
        stage_a.load(folder / "wuerstchen-prior/prior")
    with pytest.raises(UsageError, match="config.json and"):
        stage_b.load(tmp_path)
    shutil.copytree(folder / "wuerstchen-prior/prior", tmp_path / "prior")
    path = tmp_path / "prior/config.json"
    path.write_text(path.read_text().replace('"c": 32', '"c": 64'))
    with pytest.raises(UsageError, match="does not hold the weights of StageC: size mis"):
        stage_c.load(tmp_path / "prior")
    shutil.copytree(folder / "wuerstchen/decoder", tmp_path / "decoder")
    path = tmp_path / "decoder/config.json"
    theirs = json.loads(path.read_text())
    for changed, match in (
            (dict(theirs, kernel_size=5), "kernel_size is 5, expected 3"),
            (dict(theirs, inject_effnet=[True] * 4), "inject_effnet is"),
            (dict(theirs, c_out=8), "c_out is 8, expected 4"),
            (dict(theirs, c_r=63), "c_r is 63, expected an even number"),
            (dict(theirs, c_r=2), "c_r is 2, expected an even number from 4"),
            (dict(theirs, dropout=[0.0, 0.0, 0.1, 0.1]), r"dropout is \[0.0, 0.0, 0.1, 0.1\], exp"),
            ({"_class_name": theirs["_class_name"]}, "built here .it has no entry 'nhead'")):
        path.write_text(json.dumps(changed))
        with pytest.raises(UsageError, match=match):
            stage_b.load(tmp_path / "decoder")
    path.write_text(json.dumps(dict(theirs, dropout=[0.2] * 4)))
    assert stage_b.load(tmp_path / "decoder").config.dropout == 0.2
    path = tmp_path / "prior/config.json"
    path.write_text(json.dumps(dict(json.loads(path.read_text()), c=32, c_r=63)))
    with pytest.raises(UsageError, match="c_r is 63, expected an even number"):
        stage_c.load(tmp_path / "prior")
    (tmp_path / "prior/diffusion_pytorch_model.safetensors").unlink()
    (tmp_path / "prior/diffusion_pytorch_model.bin").write_bytes(
        pickle.dumps({"x": subprocess.Popen}, protocol=2))
    with pytest.raises(UsageError, match="expected a folder in diffusers' layout"):
        stage_c.load(tmp_path / "prior")


def test_other_forms_of_published_folders(published, tmp_path):
    """float16 variants, several files with an index, and torch's .bin load as the one file does:
    of Stages A, B and C and of the text towers."""
    folder, networks = published
    parts = {"wuerstchen/vqgan": ("vqgan", stage_a.load),
             "wuerstchen/decoder": ("decoder", stage_b.load),
             "wuerstchen-prior/prior": ("prior", stage_c.load),
             "wuerstchen/text_encoder": ("text/wuerstchen", partial(text_encoder, "clip-h"))}
    forms = {"fp16": dict(variant="fp16"), "sharded": dict(max_shard_size="60KB"),
             "fp16 sharded": dict(variant="fp16", max_shard_size="40KB")}
    for place, (name, load) in parts.items():
        expected = load(folder / place).state_dict()
        for form, options in forms.items():
            path = tmp_path / form / place
            copy = deepcopy(networks[name]).half() if "fp16" in form else networks[name]
            copy.save_pretrained(path, **options)
            files = sorted(file.name for file in path.iterdir())
            assert (len(files) > 3) == ("sharded" in form), files
            assert all(("fp16" in file) == ("fp16" in form) for file in files if "model" in file)
            assert_close(load(path).state_dict(), expected,
                         **(dict(rtol=1e-3, atol=1e-3) if "fp16" in form else dict(rtol=0, atol=0)))
        path = tmp_path / "bin" / place
        shutil.copytree(folder / place, path)
        safe, = path.glob("*.safetensors")
        stem = "pytorch_model" if "text" in place else "diffusion_pytorch_model"
        for zipped in (True, False):                           # torch's form of today, that of 2019
            torch.save(load_file(folder / place / safe.name), path / f"{stem}.bin",
                       _use_new_zipfile_serialization=zipped)
            safe.unlink(missing_ok=True)
            assert_close(load(path).state_dict(), expected, rtol=0, atol=0)
    shards = sorted((tmp_path / "sharded/wuerstchen-prior/prior").glob("*.safetensors"))
    shards[-1].unlink()
    with pytest.raises(UsageError, match=f"layout.*{shards[-1].name}"):
        stage_c.load(tmp_path / "sharded/wuerstchen-prior/prior")


def test_export_and_back(published, tmp_path):
    """Stages trained here run in diffusers after published.export, and load here again, equal."""
    from diffusers.pipelines.deprecated.wuerstchen import (
        PaellaVQModel,
        WuerstchenDiffNeXt,
        WuerstchenPrior,
    )
    folder, networks = published
    chain = sample.load_chain(**sample.find(folder))
    scale = dict(latent_mean=0.7, latent_std=2.5)
    chain.a = shake(stage_a.StageA(replace(chain.a.config, **scale)), 0.2).eval()
    chain.compressor = shake(semantic_compressor.SemanticCompressor(
        replace(semantic_compressor.PRESETS["paper"], latent_mean=0.3, latent_std=1.5))).eval()
    chain.scale = (0.3, 1.5)
    export.export(chain, tmp_path / "out")
    out = tmp_path / "out"
    index = json.loads((out / "wuerstchen-prior/model_index.json").read_text())
    theirs = dict(networks, vqgan=PaellaVQModel.from_pretrained(out / "wuerstchen/vqgan"),
                  decoder=WuerstchenDiffNeXt.from_pretrained(out / "wuerstchen/decoder"),
                  prior=WuerstchenPrior.from_pretrained(out / "wuerstchen-prior/prior"),
                  latent_mean=index["latent_mean"], latent_std=index["latent_std"])
    for name in ("vqgan", "decoder", "prior"):
        theirs[name].eval()
    for name in ("wuerstchen", "wuerstchen-prior"):
        (out / name / "text_encoder").symlink_to(folder / name / "text_encoder")
    again = sample.load_chain(**sample.find(out))
    job = (PROMPTS[0], 7, 128, 128, torch.linspace(1, 0, 4).tolist(), 2)
    expected = ours(chain, *job)
    for found in (reference(theirs, *job), ours(again, *job)):
        for one, other in zip(found, expected):
            assert worst(one, other) < 1e-4
    images, pixels = torch.rand(1, 3, 64, 64), torch.rand(1, 3, 96, 96)
    assert_close(again.a.decode(again.a.encode(images)), chain.a.decode(chain.a.encode(images)),
                 rtol=1e-4, atol=1e-4)
    assert torch.equal(again.a.quantize(again.a.encode(images))[1],
                       chain.a.quantize(chain.a.encode(images))[1])
    assert_close(again.compressor.standardise(again.compressor(pixels)),
                 chain.compressor.standardise(chain.compressor(pixels)))
    for config in (replace(TINY_B, prediction="released"), replace(TINY_B, attend_to_sem=False)):
        chain.b = stage_b.StageB(config)
        with pytest.raises(UsageError, match="--preset released"):
            export.export(chain, tmp_path / "no")


def test_released_architecture_trains_and_leaves(published, chain, drawings, tmp_path):
    """Trained here as `released` with CLIP text, exported, sampled from the export: one picture."""
    folder, _ = published
    clip = tmp_path / "clip"
    clip.mkdir()
    for name, short in (("wuerstchen", "clip-h"), ("wuerstchen-prior", "clip-bigg")):
        (clip / short).symlink_to(folder / name / "text_encoder")
    runs = tmp_path / "runs"
    runs.mkdir()
    (runs / "stage_a").symlink_to(chain / "stage_a")
    a, b = runs / "stage_a/checkpoint.pt", runs / "stage_b/checkpoint.pt"
    stage_b.train(replace(TINY_B, attend_to_sem=False, prediction="released", condition="raw",
                          text_encoder="clip-h", text_width=32, guidance=1.0),
                  drawings, runs / "stage_b", a, clip)
    stage_c.train(replace(TINY_C, text_encoder="clip-bigg", text_width=48), drawings,
                  runs / "stage_c", a, b, clip)
    quick = ["a red star", "--steps-c", "2", "--steps-b", "2", "--size", "128x128"]
    sample.main([*quick, "--weights", str(runs), "--clip", str(clip), "--out",
                 str(tmp_path / "one.png")])
    export.main([str(runs), "--out", str(tmp_path / "out"), "--clip", str(clip)])
    for name in ("wuerstchen", "wuerstchen-prior"):
        (tmp_path / "out" / name / "text_encoder").symlink_to(folder / name / "text_encoder")
    sample.main([*quick, "--weights", str(tmp_path / "out"), "--out", str(tmp_path / "two.png")])
    one, two = (np.asarray(Image.open(tmp_path / name)).astype(int)
                for name in ("one.png", "two.png"))
    assert one.std() > 5 and np.abs(one - two).max() <= 1


class Hub(http.server.ThreadingHTTPServer):
    """A folder as the hub serves it: /warp-ai/REPOSITORY/resolve/main/FILE, in parts, with hashes.

    asked: (method, file, its Range). stop_at: bytes after which a large file comes no further.
    damage: every large file comes with another last byte than its hash says.
    """
    daemon_threads = True

    def __init__(self, folder):
        super().__init__(("127.0.0.1", 0), Answer)
        self.folder, self.asked, self.stop_at, self.damage = folder, [], None, False
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def environment(self, cache):
        return {**os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{self.server_port}",
                "HF_HUB_CACHE": str(cache)}


class Answer(http.server.BaseHTTPRequestHandler):
    def do_HEAD(self):
        hub = self.server
        repository, _, name = self.path.partition("/resolve/main/")
        file = hub.folder / repository.removeprefix("/warp-ai/") / name
        if not name or not file.is_file():
            return self.send_error(404)
        hub.asked.append((self.command, f"{file.parent.name}/{file.name}", self.headers["Range"]))
        content, first = file.read_bytes(), int((self.headers["Range"] or "bytes=0-")[6:-1])
        large = len(content) > 9999
        self.send_response(206 if first else 200)
        git = hashlib.sha1(b"blob %d\0" % len(content) + content)
        self.send_header("ETag", f'"{(hashlib.sha256(content) if large else git).hexdigest()}"')
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("Content-Length", str(len(content) - first))
        if first:
            self.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        if self.command == "GET":
            if large and hub.damage:
                content = content[:-1] + bytes([content[-1] ^ 1])
            self.wfile.write(content[first:hub.stop_at if large else None])
            if large and hub.stop_at:
                time.sleep(60)

    do_GET = do_HEAD

    def log_message(self, *_):
        pass


def write_compressor(folder):
    """A small random compressor as warp-ai/EfficientNetEncoder has one."""
    config = replace(semantic_compressor.PRESETS["released"], backbone="narrow")
    net = shake(semantic_compressor.SemanticCompressor(config))
    weights.write_folder(folder, *weights.to_diffusers("compressor", config, net.state_dict()))


ASK = """
from huggingface_hub import constants
from published import hub

constants.DOWNLOAD_CHUNK_SIZE = 2 ** 16            # not 10 MB, as files are small here
print(hub.released("compressor"))
"""


def test_downloads(tmp_path, monkeypatch, capsys):
    """A download says name and size first, goes on where it was killed, is compared with the hub's
    hash, and is not asked for again; a damaged one is refused and not kept."""
    from huggingface_hub import constants
    write_compressor(tmp_path / "hub/EfficientNetEncoder")
    hub, name = Hub(tmp_path / "hub"), "diffusion_pytorch_model.safetensors"
    true, env = tmp_path / "hub/EfficientNetEncoder" / name, hub.environment(tmp_path / "cache")
    hub.stop_at = 10 ** 6
    first = subprocess.Popen([sys.executable, "-c", ASK], cwd=HERE, env=env, text=True,
                             stdout=subprocess.PIPE)
    found, until = [], time.time() + 60
    while not any(path.stat().st_size > 5e5 for path in found) and time.time() < until:
        time.sleep(0.05)
        found = [path for path in tmp_path.glob("cache/*/blobs/*.part") if len(path.stem) == 64]
    first.kill()
    said = first.communicate()[0]
    assert f"downloading {name}, {true.stat().st_size / 1e6:.1f} MB" in said, said
    here, hub.stop_at, hub.asked = found[0].stat().st_size, None, []
    url = env["HF_ENDPOINT"]
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE",
                        url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    ask = published_hub.released.__wrapped__               # without its memory of this process
    folder = ask("compressor")
    said = capsys.readouterr().out
    assert f"going on at {here / 1e6:,.1f} MB" in said, said
    asked = [one for one in hub.asked if one[0] == "GET" and one[1].endswith(name)]
    assert asked == [("GET", f"EfficientNetEncoder/{name}", f"bytes={here}-")], asked
    assert true.read_bytes() == (folder / name).read_bytes()
    hub.asked, hub.damage = [], True
    assert ask("compressor") == folder and not hub.asked, f"asked for what is there: {hub.asked}"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "others"))
    with pytest.raises(UsageError, match="its hash is not the one that the hub names"):
        ask("compressor")
    left = [path for path in (tmp_path / "others").glob("*/blobs/*") if len(path.stem) == 64]
    assert not [path for path in left if path.suffix != ".lock"], f"damaged, and kept: {left}"
    hub.shutdown()


@pytest.mark.slow
def test_fine_tuning_by_the_word(published, drawings, tmp_path, monkeypatch):
    """The commands of docs/published.md on small networks that a local hub serves: Stage C learns
    from the published one, previews through B and A, is sampled, mixed, exported, predicted, and
    draws the same picture in diffusers' own pipelines."""
    from diffusers import DiffusionPipeline, pipelines
    from diffusers.pipelines.deprecated import wuerstchen
    # diffusers 0.42 looks here for the networks that a published model_index.json names
    monkeypatch.setattr(pipelines, "wuerstchen", wuerstchen, raising=False)
    folder, _ = published
    shutil.copytree(folder, tmp_path / "hub")
    write_compressor(tmp_path / "hub/EfficientNetEncoder")
    hub, runs, out = Hub(tmp_path / "hub"), tmp_path / "runs", tmp_path / "out"
    run = partial(command, env=hub.environment(tmp_path / "cache"), timeout=600)
    small = ["--width", 32, "--depth", 2, "--heads", 2, "--text-width", 48, "--image-size", 128,
             "--steps", 20, "--warmup", 5, "--batch-size", 4, "--accumulate", 1, "--workers", 0,
             "--preview-every", 10, "--log-every", 10, "--lr", 1e-3]
    train = ["stage_c.py", "--data", drawings, "--preset", "finetune", "--out", runs / "stage_c",
             *small]
    done = run(*train, check=False)
    assert done.returncode == 1 and not hub.asked, f"downloaded without the word: {hub.asked}"
    assert done.stderr.index("--compressor released") < done.stderr.index("stage_a.py")
    words = [f"--{name}=released" for name in ("init-from", "compressor", "stage-a", "stage-b",
                                               "clip")]
    said = run(*train, *words).stdout
    assert "a new run at step 0 with the weights of released" in said
    assert "warp-ai/wuerstchen-prior: downloading prior/diffusion_pytorch_model.safetensors" in said
    hub.asked = []
    preview = Image.open(runs / "stage_c/preview_0000020.png")
    assert preview.width > 4 * 128, f"a preview of latents, not of pictures: {preview.size}"
    begin, end = stage_c.load(folder / "wuerstchen-prior/prior"), stage_c.load(
        runs / "stage_c/checkpoint.pt")
    moved = [worst(two, one) for one, two in zip(begin.parameters(), end.parameters())]
    assert 0 < sorted(moved)[len(moved) // 2] < 0.2, f"not trained, or not from them: {moved}"

    quick = ["--steps-c", 4, "--steps-b", 3, "--size", "128x128"]
    run("sample.py", PROMPTS[0], *quick, "--weights", runs, "--out", tmp_path / "1.png")
    run("sample.py", PROMPTS[0], *quick, "--weights", "released", "--stage-c",
            runs / "stage_c/checkpoint.pt", "--out", tmp_path / "2.png")
    run("-m", "published.export", runs, "--out", out)
    demo = run("-m", "experiments.predict", "--weights", runs, "--prompt", PROMPTS[0], "--width",
               128, "--height", 128, "--steps_c", 4, "--steps_b", 3).stdout.split()
    assert not hub.asked, f"downloaded again: {hub.asked}"
    hub.shutdown()
    for name in ("wuerstchen", "wuerstchen-prior"):
        for part in ("text_encoder", "tokenizer"):
            (out / name / part).symlink_to(folder / name / part)
    prior, decoder = (DiffusionPipeline.from_pretrained(out / name)
                      for name in ("wuerstchen-prior", "wuerstchen"))
    noise = stage_b.generators([0, 2 ** 31])
    latents = prior(PROMPTS[0], 128, 128, timesteps=torch.linspace(1, 0, 5).tolist(),
                    guidance_scale=4.0, generator=noise[0]).image_embeddings
    drawn = decoder(latents, PROMPTS[0], num_inference_steps=3, guidance_scale=0.0,
                     generator=noise[1], output_type="np").images[0]
    one = np.asarray(Image.open(tmp_path / "1.png")).astype(float)
    assert one.std() > 5
    for name, other in (("mixed", Image.open(tmp_path / "2.png")), ("predicted", Image.open(
            demo[-1])), ("diffusers", 255 * drawn)):
        off = np.abs(one - np.asarray(other)).max()
        assert off <= 1, f"{name}: another picture than sample.py's, by up to {off} of 255"
