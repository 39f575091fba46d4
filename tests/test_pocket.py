"""The drawings, their captions, and what the small networks are taught with."""

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn as nn

import data
import stage_b
from plumbing import text
from plumbing.cli import UsageError
from pocket import shapes, teach, teach_text
from test_shapes import TINY_B, overfit_c
from tests.common import contents, same


def test_labels_of_drawings():
    """pocket/teach.py: each object is at the cell of its centre, two in one cell at two."""
    for index in range(200):
        scene = shapes.scene(index)
        answers, measures = teach.labels(scene)
        there = answers["there"].nonzero().flatten().tolist()
        assert len(there) == len(scene["objects"])
        homes = [int(thing["y"] * 3) * 3 + int(thing["x"] * 3) for thing in scene["objects"]]
        assert homes[0] in there and (homes[-1] in there or homes[0] == homes[-1])
        cell, thing = homes[0], scene["objects"][0]
        assert shapes.SHAPES[answers["shape"][cell]] == thing["shape"]
        assert list(shapes.COLOURS)[answers["colour"][cell]] == thing["colour"]
        assert abs((measures[cell, 0] / 3 + cell % 3 + 0.5) / 3 - thing["x"]) < 1e-5
        assert abs((measures[cell, 1] / 3 + cell // 3 + 0.5) / 3 - thing["y"]) < 1e-5
    # A head that says exactly what is there is right everywhere, one that errs in a shape is not.
    _, answers, measures = teach.batch(range(8), "train")
    scores = torch.cat([50 * nn.functional.one_hot(answers[name], len(teach.NAMES[name])).float()
                        for name in teach.NAMES] + [measures], dim=-1)
    latent = scores.transpose(1, 2).unflatten(2, (3, 3))
    value, right = teach.loss(torch.nn.Identity(), latent, answers, measures)
    assert value < 1e-3 and set(right.values()) == {1.0}
    answers["shape"] = (answers["shape"] + 1) % 6
    assert teach.loss(torch.nn.Identity(), latent, answers, measures)[1]["shape"] == 0


@pytest.mark.slow
def test_taught_compressor(chain, drawings, tmp_path):
    """teach.py resumes exactly; with --compressor-share 0 Stage B leaves its result alone."""
    config = replace(TINY_B, steps=2, compressor_share=0.0)
    teach.teach(config, tmp_path / "whole")
    for steps in (1, 2):
        teach.teach(replace(config, steps=steps), tmp_path / "halves")
    whole, halves = (torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)
                     for name in ("whole", "halves"))
    same(whole["compressor_ema"], halves["compressor_ema"], "compressor")
    same(whole["ema"], halves["ema"], "the untrained Stage B")
    log = [json.loads(line) for line in open(tmp_path / "halves/log.jsonl")]
    assert [line["step"] for line in log] == [1, 2] and 0 <= log[1]["shape"] <= 1
    with pytest.raises(UsageError, match="give the checkpoint with a trained one"):
        stage_b.train(config, drawings, tmp_path / "b", chain / "stage_a/checkpoint.pt")
    for remember in (True, False):
        stage_b.train(replace(config, steps=1, remember=remember), drawings,
                      tmp_path / f"b{remember}", chain / "stage_a/checkpoint.pt",
                      init_from=tmp_path / "whole/checkpoint.pt")
        state = torch.load(tmp_path / f"b{remember}/checkpoint.pt", weights_only=True)
        for name in ("compressor", "compressor_ema"):
            same(state[name], whole["compressor_ema"], name)
        assert not torch.equal(state["model"]["clf.1.weight"], whole["ema"]["clf.1.weight"])


def test_labels_of_captions():
    """pocket/teach_text.py: the left or upper object first, and only what the caption says."""
    scene = next(scene for scene in map(shapes.scene, range(1, 200, 2))
                 if scene["relation"] == "left of")
    answers = set()
    for number in range(60):
        caption = shapes.caption(scene, np.random.RandomState(number))
        said = {name: teach_text.NAMES[name][index]
                for name, index in teach_text.labels(scene, caption).items()}
        for i, thing in enumerate(scene["objects"], 1):
            assert (said[f"colour {i}"], said[f"shape {i}"]) == (thing["colour"], thing["shape"])
            assert said[f"size {i}"] in (None, thing["size"])
        assert (said["background"] is None) == (scene["background"] not in caption)
        assert said["axis"] == "across" and said["place"] is None
        answers.add((said["background"], said["size 1"], said["size 2"]))
    assert len(answers) > 3
    turned = dict(scene, relation="right of", objects=scene["objects"][::-1])
    assert teach_text.labels(turned, caption) == teach_text.labels(scene, caption)
    one = next(scene for scene in map(shapes.scene, range(0, 200, 2))
               if scene["objects"][0]["place"] == "top")
    labels = teach_text.labels(one, "a thing at the top")
    assert labels["place"] == 3 and labels["axis"] == labels["colour 2"] == labels["size 1"] == 0
    assert teach_text.labels(one, "a thing")["place"] == 0
    # A head that says exactly what is said is right everywhere, one that errs in a shape is not.
    _, answers = teach_text.batch(range(8), "train")
    scores = torch.cat([50 * nn.functional.one_hot(answers[name], len(values)).float()
                        for name, values in teach_text.NAMES.items()], dim=-1)
    value, right = teach_text.loss(torch.nn.Identity(), scores, answers)
    assert value < 1e-3 and set(right.values()) == {1.0}
    answers["shape 1"] = (answers["shape 1"] + 1) % 7
    assert teach_text.loss(torch.nn.Identity(), scores, answers)[1]["shape 1"] == 0


def test_taught_text_tower(tmp_path, monkeypatch):
    """teach_text.py resumes exactly, moves the layers alone, and text.py reads what it wrote."""
    config = replace(teach_text.CONFIG, steps=2, batch_size=4, cooldown=0)
    teach_text.teach(config, tmp_path / "whole")
    for steps in (1, 2):
        teach_text.teach(replace(config, steps=steps), tmp_path / "halves")
    whole, halves = (torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)
                     for name in ("whole", "halves"))
    same(whole["layers_ema"], halves["layers_ema"], "layers")
    log = [json.loads(line) for line in open(tmp_path / "halves/log.jsonl")]
    assert [line["step"] for line in log] == [1, 2] and 0 <= log[1]["shape 1"] <= 1
    monkeypatch.setattr("pocket.text.TAUGHT", str(tmp_path / "none"))
    untaught = text.text_encoder("pocket").tower.state_dict()
    monkeypatch.setattr("pocket.text.TAUGHT", str(tmp_path / "whole/text.safetensors"))
    for name, value in text.text_encoder("pocket").tower.state_dict().items():
        layer = name.removeprefix("transformer.")
        expected = whole["layers_ema"][layer].half() if layer != name else untaught[name]
        assert torch.equal(value, expected.float()), name
        if layer != name and value.dim() == 2:
            assert not torch.equal(value, untaught[name]), name


def things(scene):
    return [(thing["colour"], thing["shape"]) for thing in scene["objects"]]


def test_grammar_is_large_enough():
    """8 colours x 6 shapes x 3 sizes x 4 backgrounds, all of which occur in train."""
    scenes = [shapes.scene(i) for i in range(3000)]
    seen = [{f(s) for s in scenes} for f in (
        lambda s: s["background"], lambda s: s["relation"], lambda s: s["objects"][0]["size"],
        lambda s: s["objects"][0]["colour"], lambda s: s["objects"][0]["shape"],
        lambda s: s["objects"][0]["place"])]
    assert [len(x) for x in seen] == [4, 5, 3, 8, 6, 6]
    assert sum(len(s["objects"]) == 2 for s in scenes) == 1500


def test_held_out_of_train():
    """At least 10 % of objects and of ordered pairs never occur in train, always in heldout."""
    objects, pairs = shapes.HELD_OUT_OBJECTS, shapes.HELD_OUT_PAIRS
    assert len(objects) >= 0.10 * 48 and len(pairs) >= 0.10 * 48 * 48
    assert all((b, a) in pairs for a, b in pairs)
    train = [things(shapes.scene(i)) for i in range(2000)]
    for shown in train:
        assert not objects & set(shown) and tuple(shown) not in pairs
        assert len(set(shown)) == len(shown)
    kinds = set()
    for i in range(500):
        scene = shapes.scene(i, "heldout")
        shown = things(scene)
        assert objects & set(shown) or tuple(shown) in pairs
        assert scene["held_out"] and len(set(shown)) == len(shown)
        kinds |= set(scene["held_out"])
    assert kinds == {"object", "pair"}
    assert {thing for shown in train for thing in shown} == set(shapes.OBJECTS) - objects


def test_drawings_are_where_the_scene_says():
    """In the pixels: objects are inside, apart, of their colour, and the relation is true."""
    for i in range(120):
        scene = shapes.scene(i, seed=5)
        pixels = np.asarray(shapes.render(scene, 128)).astype(int)
        ground = np.clip(np.add(shapes.BACKGROUNDS[scene["background"]], scene["tint"]), 0, 255)
        drawn = np.abs(pixels - ground).sum(axis=2) > 24
        y, x = np.mgrid[:128, :128] / 128
        centres, covered = [], np.zeros_like(drawn)
        for thing in scene["objects"]:
            inside = (x - thing["x"]) ** 2 + (y - thing["y"]) ** 2 <= (thing["radius"] + 0.02) ** 2
            assert not (covered & inside & drawn).any()
            covered |= inside
            mine = drawn & inside
            assert mine.sum() > 0.25 * np.pi * (thing["radius"] * 128) ** 2
            fill = np.clip(np.add(shapes.COLOURS[thing["colour"]], thing["tint"]), 0, 255)
            assert np.abs(np.median(pixels[mine], axis=0) - fill).max() <= 1
            centres.append((y[mine].min(), y[mine].max(), x[mine].min(), x[mine].max()))
        assert not (drawn & ~covered).any()
        assert not (drawn[0].any() or drawn[-1].any() or drawn[:, 0].any() or drawn[:, -1].any())
        if scene["relation"]:
            a, b = centres
            gap = {"left of": b[2] - a[3], "right of": a[2] - b[3], "above": b[0] - a[1],
                   "below": a[0] - b[1]}[scene["relation"]]
            assert gap > 0.03


def test_colours_are_told_apart():
    """No two colours, nor a colour and a background, come near each other, tints included."""
    names = list(shapes.COLOURS.items()) + list(shapes.BACKGROUNDS.items())
    for (a, one), (b, other) in itertools.combinations(names, 2):
        assert np.linalg.norm(np.subtract(one, other)) > 60, (a, b)


def read_relation(text):
    """(first object, relation, second object) of a caption of two objects, read independently."""
    import re
    words = r"(?:small |medium |large )?(\w+) (\w+)"
    text = re.sub(r" on a \w+ background$|^on \w+: |^a \w+ background with ", "", text)
    say = {"to the left of": "left of", "to the right of": "right of", "under": "below"}
    relation = r"(to the left of|left of|to the right of|right of|above|below|under)"
    beside = r"(on its left|on its right|above it|below it)"
    if m := re.fullmatch(rf"an? {words} with an? {words} {beside}", text):
        other = {"on its left": "left of", "on its right": "right of",
                 "above it": "above", "below it": "below"}
        return (m[3], m[4]), other[m[5]], (m[1], m[2])
    if m := re.fullmatch(rf"{relation} an? {words} is an? {words}", text):
        return (m[4], m[5]), say.get(m[1], m[1]), (m[2], m[3])
    m = re.fullmatch(rf"an? {words} {relation} an? {words}", text)
    return (m[1], m[2]), say.get(m[3], m[3]), (m[4], m[5])


def test_captions_are_true_and_varied():
    """Each caption, parsed back, says what its scene shows; there are many ways of saying it."""
    forms = set()
    for i in range(1, 2001, 2):
        rng = shapes.scene_rng(0, "train", i)
        scene = shapes.draw_scene(rng, count=2)
        text = shapes.caption(scene, rng)
        first, relation, second = read_relation(text)
        shown = things(scene)
        assert (relation, first, second) in (
            (scene["relation"], *shown), (shapes.RELATIONS[scene["relation"]], *shown[::-1])), text
        for word in set(shapes.BACKGROUNDS) & set(text.split()):
            assert word == scene["background"]
        forms.add(" ".join("_" if w in shapes.COLOURS or w in shapes.SHAPES else w
                           for w in text.split()))
    assert len(forms) > 100
    for text, scene in shapes.prompts(20, seed=1):
        assert all(word in text.split() for thing in things(scene) for word in thing)


def test_captions_fit_the_context():
    """Every caption has at most 22 tokens of the 24, start and end included."""
    texts = []
    for i in range(3000):
        rng = shapes.scene_rng(0, "train", i)
        texts.append(shapes.caption(shapes.draw_scene(rng), rng))
    lengths = [2 + len(text.ids_of(caption)) for caption in texts]
    assert 5 <= min(lengths) and max(lengths) <= 22


def test_prompts_are_different_and_of_their_split():
    """prompts() are distinct, half of them of two objects, and seeded."""
    for split in ("train", "heldout"):
        some = shapes.prompts(64, seed=3, split=split)
        texts = [text for text, _ in some]
        assert len(set(texts)) == 64 and texts == [t for t, _ in shapes.prompts(64, 3, split)]
        assert sum(len(scene["objects"]) == 2 for _, scene in some) >= 32
        assert all(bool(shapes.held_out(scene)) == (split == "heldout") for _, scene in some)


def test_shapes_do_not_depend_on_workers(tmp_path):
    """The same drawings for any number of workers, and after an interruption."""
    options = dict(count=23, size=32, per_shard=5)
    shapes.make_shapes(tmp_path / "one", workers=1, **options)
    shapes.make_shapes(tmp_path / "two", workers=2, **options)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert len(contents(tmp_path / "one")) == 5
    kept = (tmp_path / "two" / "00000.tar").stat().st_mtime_ns
    (tmp_path / "two" / "00003.tar").unlink()
    (tmp_path / "two" / "00003.tar.tmp").write_bytes(b"half")
    shapes.make_shapes(tmp_path / "two", workers=1, **options)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert (tmp_path / "two" / "00000.tar").stat().st_mtime_ns == kept
    with pytest.raises(UsageError, match="holds other data"):
        shapes.make_shapes(tmp_path / "two", seed=1, **options)
    found = data.CaptionedImages(tmp_path / "one")
    assert len(found) == 23 and found[3]["meta"]["index"] == 3
    scene = {k: v for k, v in found[3]["meta"].items() if k in shapes.scene(3)}
    assert scene == shapes.scene(3)


@pytest.mark.slow
def test_word_order_reaches_stage_c():
    """Two captions of the same words in another order, overfitted, each sample their own x_0."""
    encoder = text.text_encoder("pocket")
    overfit_c(encoder(["a red star above a blue circle", "a blue circle above a red star"]),
              encoder([""]))
