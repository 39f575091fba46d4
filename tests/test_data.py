"""Pictures and captions: decoding, fitting, filters, batches, memory."""

import gc
import io
import json
import re
import types
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import data
from plumbing import cli
from plumbing.cli import UsageError
from plumbing.text import text_encoder
from pocket import shapes
from test_shapes import TINY_C
from tests.common import HERE, command, contents, encoded, make_tar, members_of, take
from tests.test_tars import counts
from tools import look, pack


def test_filters(tmp_path):
    """Filters keep what is on the bound; a missing or null field counts only if it is asked for."""
    def meta(**fields):
        return {"original_width": 600, "original_height": 512, **fields}
    facts = [meta(aesthetic=6.0), meta(AESTHETIC_SCORE=5.0, pwatermark=0.9), meta(aesthetic=4.9),
             meta(aesthetic=None, AESTHETIC_SCORE=5.5), meta(aesthetic=None), {"aesthetic": 7}]
    make_tar(tmp_path / "0.tar", [part for i, fact in enumerate(facts) for part in (
        (f"{i}.png", encoded()), (f"{i}.txt", b"x"), (f"{i}.json", json.dumps(fact).encode()))])

    def keys(**given):
        config = replace(TINY_C, **given)
        found = data.CaptionedImages(tmp_path, filters=data.filters(config), report=False)
        return "".join(found.key(i) for i in range(len(found))), counts(found)
    assert keys() == ("012345", {})
    assert keys(min_aesthetic=5.0) == ("0135", {"aesthetic below 5.0": 1, "no aesthetic": 1})
    assert keys(min_size=512) == ("01234", {"no size": 1})
    assert keys(max_pwatermark=0.9) == ("1", {"no pwatermark": 5})
    with pytest.raises(UsageError, match="no sample passes the filters; found 6 x no punsafe"):
        keys(max_punsafe=0.5)


def test_filters_are_not_the_released_ones(tmp_path):
    """What the released scripts drop passes here: sides above 4096, scores of exactly 0, samples
    without .json where no filter asks for one. So no page may call these filters "released"."""
    facts = {"original_width": 5000, "original_height": 600, "aesthetic": 6.0, "pwatermark": 0.0,
             "punsafe": 0.0}
    make_tar(tmp_path / "0.tar", [
        ("a.png", encoded()), ("a.txt", b"x"), ("a.json", json.dumps(facts).encode()),
        ("b.png", encoded()), ("b.txt", b"x")])
    bounds = dict(min_size=512, min_aesthetic=5.0, max_pwatermark=0.5, max_punsafe=0.99)
    found = data.CaptionedImages(tmp_path, filters=bounds, report=False)
    assert [found.key(i) for i in range(len(found))] == ["a"]
    assert len(data.CaptionedImages(tmp_path, filters=data.filters(TINY_C))) == 2
    for path in [*HERE.glob("*.*"), *HERE.glob("*/*.*")]:
        if path.suffix in (".py", ".md") and path.parent.name != "tests":
            text = " ".join(path.read_text(encoding="utf-8").split())
            assert not re.search(r"filters of the released|released filters", text), path


def test_look_counts_duplicates(tmp_path, capsys):
    """`look` counts images that are there again, by sha256 or hash."""
    make_tar(tmp_path / "0.tar", [part for i, name in enumerate("aabca") for part in (
        (f"{i}.png", encoded()), (f"{i}.txt", b"x"), (f"{i}.json", b'{"sha256": "%s"}' %
                                                      name.encode()))])
    look.look(tmp_path, tmp_path / "look.png")
    assert "3 different images, 2 are there again" in capsys.readouterr().out


def png16(values):
    file = io.BytesIO()
    Image.fromarray(np.asarray(values, dtype=np.uint16)).save(file, "PNG")
    return file.getvalue()


def with_alpha(mode, form, colour=(255, 0, 0), alpha=0, **options):
    file = io.BytesIO()
    Image.new("RGBA", (8, 8), (*colour, alpha)).convert(mode).save(file, form, **options)
    return file.getvalue()


@pytest.mark.parametrize("content, expected", [
    (encoded(mode="L", colour=(90, 90, 90)), (90, 90, 90)),
    (encoded(mode="1", colour=(255, 255, 255)), (255, 255, 255)),
    (encoded(mode="P", colour=(255, 0, 0)), (255, 0, 0)),
    (encoded(mode="CMYK", form="JPEG", colour=(0, 255, 255)), (0, 255, 255)),
    (with_alpha("RGBA", "PNG"), (255, 255, 255)),
    (with_alpha("RGBA", "WEBP", lossless=True), (255, 255, 255)),
    (with_alpha("RGBA", "PNG", alpha=128), (255, 127, 127)),
    (with_alpha("LA", "PNG"), (255, 255, 255)),
    (with_alpha("P", "PNG", transparency=0), (255, 255, 255)),
    (encoded(transparency=(200, 30, 40)), (255, 255, 255)),
    (png16(np.full((4, 4), 128 * 257)), (128, 128, 128)),
    (png16(np.full((4, 4), 65535)), (255, 255, 255)),
], ids=["grey", "1 bit", "palette", "CMYK", "RGBA png", "RGBA webp", "half transparent", "LA",
        "transparent palette", "key colour", "16 bits", "16 bits white"])
def test_image_modes(content, expected):
    """Grey, 1-bit, palette, CMYK, alpha on white, key colours and 16 bits become right RGB."""
    image = data.decode(content)
    assert image.mode == "RGB"
    assert np.abs(np.asarray(image)[2, 2].astype(int) - expected).max() <= 2


def test_exif_orientation():
    """A photograph taken with the camera turned comes out upright."""
    exif = Image.Exif()
    exif[0x0112] = 6
    image = data.decode(encoded(size=(40, 30), form="JPEG", exif=exif))
    assert image.size == (30, 40)


def test_jpeg_draft_mode_changes_little():
    """A large JPEG, decoded at a coarser scale, gives nearly the same small image."""
    x = np.linspace(0, 6 * np.pi, 1024)
    waves = (127 + 120 * np.sin(x)[:, None] * np.cos(x)[None, :]).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(waves).convert("RGB").save(file, "JPEG", quality=95)
    assert data.decode(file.getvalue(), 64).size == (128, 128)
    small = data.fit(data.decode(file.getvalue(), 64), 64)
    full = data.fit(data.decode(file.getvalue()), 64)
    assert np.abs(np.asarray(small).astype(int) - np.asarray(full)).mean() < 1


def test_undecodable_images(tmp_path, monkeypatch):
    """Truncated, oversized, huge and wrong files are failed samples with a reason."""
    (tmp_path / "bomb.png").write_bytes(encoded(size=(300, 300)))
    (tmp_path / "cut.jpg").write_bytes(encoded(form="JPEG", size=(200, 200))[:800])
    (tmp_path / "text.png").write_bytes(b"not an image")
    (tmp_path / "cutpng.png").write_bytes(encoded(size=(30, 30))[:70])
    for name in ("bomb", "cut", "text", "cutpng"):
        (tmp_path / f"{name}.txt").write_text(name)
    monkeypatch.setattr(data, "MAX_PIXELS", 299 * 299)
    found = data.CaptionedImages(tmp_path, report=False)
    (tmp_path / "text.png").rename(tmp_path / "moved")
    assert found[3]["failed"].startswith("cannot be read")
    (tmp_path / "moved").rename(tmp_path / "text.png")
    reasons = {found.key(i): found[i]["failed"].split(":")[0] for i in range(4)}
    assert reasons == {"bomb": "too many pixels", "cut": "cannot be decoded",
                       "cutpng": "cannot be decoded", "text": "cannot be decoded"}


def test_resize_and_crop(tmp_path):
    """The shorter side becomes `resize`; every crop fits, also of images that are too small."""
    for name, size in (("wide", (200, 50)), ("tiny", (9, 7))):
        (tmp_path / f"{name}.png").write_bytes(encoded(size=size))
        (tmp_path / f"{name}.txt").write_text(name)

    def shape(**options):
        found = data.CaptionedImages(tmp_path, **options)
        return [tuple(found[i]["image"].shape[1:]) for i in (0, 1)]
    assert shape() == [(7, 9), (50, 200)]
    assert shape(resize=32) == [(32, 41), (32, 128)]
    assert shape(resize=32, crop=32) == [(32, 32)] * 2
    assert shape(crop=(64, 96)) == [(64, 96)] * 2


def test_crops_are_seeded(tmp_path):
    """A crop follows from (seed, epoch, index) alone; center=True takes the middle."""
    file = io.BytesIO()
    pixels = np.arange(100 * 100 * 3).reshape(100, 100, 3).astype(np.uint8)
    Image.fromarray(pixels).save(file, "PNG")
    (tmp_path / "a.png").write_bytes(file.getvalue())
    (tmp_path / "a.txt").write_text("a")

    def crop(where, **options):
        return data.CaptionedImages(tmp_path, crop=20, **options)[where]["image"]
    torch.testing.assert_close(crop((3, 0, 0)), crop((3, 0, 0)), rtol=0, atol=0)
    assert not torch.equal(crop((3, 0, 0)), crop((4, 0, 0)))
    assert not torch.equal(crop((3, 0, 0)), crop((3, 0, 0), seed=1))
    whole = data.CaptionedImages(tmp_path)[0]["image"]
    torch.testing.assert_close(crop(0, center=True), whole[:, 40:60, 40:60], rtol=0, atol=0)


@pytest.mark.parametrize("workers", [0, 2])
def test_each_sample_once_per_epoch(tmp_path, workers):
    """With fewer shards than workers too, an epoch has every sample exactly once, shuffled."""
    make_tar(tmp_path / "0.tar", members_of(12))
    batches = take(data.stream(data.CaptionedImages(tmp_path), 4, workers=workers), 6)
    epochs = [sum((batch["indices"] for batch in batches[i:i + 3]), []) for i in (0, 3)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(12))
    assert epochs[0] != epochs[1] and epochs[0] != list(range(12))
    images = batches[0]["images"]
    assert images.shape == (4, 3, 30, 40) and images.dtype == torch.float32 and images.max() <= 1
    for batch in batches:  # images, captions and keys belong together
        assert batch["captions"] == [f"number {i}" for i in batch["indices"]]
        torch.testing.assert_close(batch["images"][:, 0, 0, 0] * 255,
                                   torch.tensor(batch["indices"]).float())


def test_workers_end_with_their_stream(shards):
    """A stream that is let go ends its workers at once: no cycle keeps it until the collector."""
    stream = data.stream(data.CaptionedImages(shards, crop=16), 2, workers=1)
    next(stream)
    workers = weakref.ref(stream.batches)
    gc.disable()
    try:
        del stream
        assert workers() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_across_an_epoch_border(shards, workers):
    """A stream begun at a position gives exactly the batches that would have followed."""
    dataset = data.CaptionedImages(shards, crop=16, seed=3)
    whole = take(data.stream(dataset, 5, seed=7), 8)
    assert [batch["position"] for batch in whole[:3]] == [(0, 5), (0, 10), (1, 3)]
    for stopped in (1, 2, 4):
        rest = take(data.stream(dataset, 5, seed=7, position=whole[stopped]["position"],
                                workers=workers), 3)
        for one, other in zip(whole[stopped + 1:], rest):
            assert one["keys"] == other["keys"] and one["position"] == other["position"], (
                f"after {stopped + 1} batches the run goes on with other samples than without stop")
            torch.testing.assert_close(one["images"], other["images"], rtol=0, atol=0)


def test_batch_larger_than_dataset(shards):
    """A batch of more samples than there are takes them from several epochs."""
    batch = next(data.stream(data.CaptionedImages(shards), 30))
    assert len(batch["keys"]) == 30 and batch["position"] == (2, 6)
    assert min(np.bincount(batch["indices"])) == 2


def of_rank(rank, world, stream):
    """A stream as process `rank` of `world` has it."""
    stream.rank, stream.world = rank, world
    return stream


def test_ranks_share_the_global_batch(shards):
    """Two ranks with batch 3 see the two halves of what one rank with batch 6 sees."""
    dataset = data.CaptionedImages(shards)
    one = take(data.stream(dataset, 6, seed=1), 5)
    two = [take(of_rank(rank, 2, data.stream(dataset, 3, seed=1)), 5) for rank in (0, 1)]
    for whole, left, right in zip(one, *two):
        assert whole["indices"] == left["indices"] + right["indices"], (
            "two processes do not see the two halves of the batch that one process sees")
        assert not set(left["keys"]) & set(right["keys"])
        assert whole["position"] == left["position"] == right["position"]


@pytest.mark.parametrize("broken", [False, True])
def test_one_size_for_all_of_a_step(tmp_path, broken):
    """Of several crops a step has one, in all its micro-batches and in every process; all are drawn
    equally often; a stream that begins at a saved position goes on with the same ones. That holds,
    too, where a micro-batch has no usable sample and the next one takes its place."""
    members = dict(members_of(7, size=(8, 8)))
    if broken:
        members["000000003.png"] = b"broken"
    make_tar(tmp_path / "0.tar", members.items())
    dataset = data.CaptionedImages(tmp_path, crop=[(8, 4), (4, 8), (6, 6)], seed=5)

    def sizes(stream, steps):
        """-> for each step the sizes of its micro-batches."""
        found = [tuple(batch["images"].shape[2:]) for batch in
                 take(stream, steps * stream.config.accumulate)]
        return [set(found[i:i + stream.config.accumulate])
                for i in range(0, len(found), stream.config.accumulate)]

    def stream(rank, batch_size=1, accumulate=3):
        return of_rank(rank, 2, data.Stream(dataset, types.SimpleNamespace(
            batch_size=batch_size, accumulate=accumulate, seed=1, workers=0)))
    first, second = stream(0), stream(1)
    drawn, other = sizes(first, 150), sizes(second, 150)
    assert drawn == other and all(len(step) == 1 for step in drawn)
    drawn = [step.pop() for step in drawn]
    assert all(35 < drawn.count(size) < 65 for size in dataset.crop)
    state = first.state_dict()
    assert state["step"] == 150
    later = stream(0)
    later.load_state_dict(state)
    assert sizes(later, 40) == sizes(first, 40)
    for (batch_size, accumulate) in ((3, 1), (1, 3)):       # the same global batch, cut otherwise
        later = stream(1, batch_size, accumulate)
        later.load_state_dict({"position": (0, 6 * 10 % 7)} | {"step": 10})
        assert [step.pop() for step in sizes(later, 20)] == drawn[10:30]
    if not broken:                      # a checkpoint without the number: it follows from the place
        later.load_state_dict({"position": divmod(6 * 10, 7)})
        later.batches = None
        assert [step.pop() for step in sizes(later, 20)] == drawn[10:30]


def test_global_random_state_is_left_alone(shards):
    """Streaming draws nothing from the random streams that the model uses."""
    torch.manual_seed(5)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    take(data.stream(data.CaptionedImages(shards, crop=16), 5, workers=1), 2)
    text_encoder()
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])


def test_failed_image_leaves_its_batch_smaller(tmp_path, capfd):
    """A bad image is left out, counted and named once, and shifts no other sample."""
    members = dict(members_of(8))
    members["000000003.png"] = b"broken"
    make_tar(tmp_path / "0.tar", members.items())
    batches = take(data.stream(data.CaptionedImages(tmp_path), 4), 6)
    sizes = [len(batch["keys"]) for batch in batches]
    assert [sum(sizes[i:i + 2]) for i in (0, 2, 4)] == [7, 7, 7]
    assert all(batch["images"].shape[0] == len(batch["captions"]) for batch in batches)
    failed = [one for batch in batches for one in batch["failed"].values()]
    assert [key for key, _ in failed] == ["000000003"] * 3 and "decoded" in failed[0][1]
    assert capfd.readouterr().err.count("000000003") == 1
    config = types.SimpleNamespace(batch_size=4, accumulate=1, seed=0)
    order = [index for batch in take(data.places(8, config, 0, 1), 2) for _, index, _ in batch]
    assert sorted(order) == list(range(8))
    assert [i for i in order if i != 3] == batches[0]["indices"] + batches[1]["indices"]


@pytest.mark.parametrize("workers", [0, 1])
def test_mostly_broken_images_stop_the_run(tmp_path, workers):
    """More than half unreadable stops with a sentence, instead of turning for ever."""
    members = dict(members_of(9))
    members.update({f"{i:09d}.png": b"broken" for i in range(5)})
    make_tar(tmp_path / "0.tar", members.items())
    with pytest.raises(UsageError, match="of .* samples cannot be used .*cannot be decoded"):
        take(data.stream(data.CaptionedImages(tmp_path), 2, workers=workers), 10)


def test_different_sizes_need_a_crop(tmp_path):
    """Images of different sizes cannot be stacked, and the error says what to give."""
    make_tar(tmp_path / "0.tar", [*members_of(2), *members_of(2, 2, size=(20, 20))])
    with pytest.raises(UsageError, match="give a crop"):
        next(data.stream(data.CaptionedImages(tmp_path), 4))


@pytest.mark.parametrize("workers", [0, 2])
def test_memory_equals_encoding_directly(tmp_path, workers):
    """remember() keeps what encode gives, in float16; streaming it is streaming the dataset."""
    members = dict(members_of(11))
    members["000000004.png"] = b"broken"
    make_tar(tmp_path / "0.tar", members.items())
    dataset = data.CaptionedImages(tmp_path)

    def encode(batch):
        return batch["images"].mean(dim=(2, 3)), torch.tensor(batch["indices"])

    memory = data.remember(dataset, encode, batch_size=4, workers=workers)
    assert len(memory) == 11 and list(memory.failed) == [4]
    assert [x.dtype for x in memory.rows[0][2]] == [torch.float16, torch.int64]
    for direct, kept in zip(take(data.stream(dataset, 4, seed=2), 6),
                            take(data.stream(memory, 4, seed=2, workers=workers), 6)):
        for name in ("keys", "captions", "indices", "position", "failed"):
            assert direct[name] == kept[name], name
        means, indices = kept["remembered"]
        assert means.dtype == torch.float32 and indices.tolist() == kept["indices"]
        torch.testing.assert_close(means, encode(direct)[0], rtol=1e-3, atol=1e-3)


def test_memory_refuses_what_float16_cannot_hold(shards):
    """Numbers beyond float16 are refused, not kept as infinity."""
    with pytest.raises(UsageError, match="float16"):
        data.remember(data.CaptionedImages(shards), lambda batch: (batch["images"] * 1e6,))


def test_commands_shapes_and_look(tmp_path):
    """`pocket.shapes` writes heldout shards, `tools.look` prints and draws what they hold."""
    done = command("-m", "pocket.shapes", "--out", tmp_path / "s", "--count", 30,
                   "--split", "heldout", "--size", 48)
    assert f"python -m tools.look {tmp_path / 's'}" in done.stdout
    done = command("-m", "tools.look", tmp_path / "s", "--out", tmp_path / "look.png")
    assert "30 samples" in done.stdout and "48 x 48 (30)" in done.stdout and "words" in done.stdout
    assert Image.open(tmp_path / "look.png").size[0] > 500
    assert all(data.CaptionedImages(tmp_path / "s")[i]["meta"]["held_out"] for i in range(30))


@pytest.mark.parametrize("main, arguments, sentence", [
    (look.main, ["{}/gone"], "found 1 x missing shard.*expected"),
    (look.main, ["a.tar", "b.tar"], "put it in quotes"),
    (look.main, ["{}", "--out", "{}/no/look.png"], "no/look.png: expected a folder/, or a file"),
    (look.main, ["{}", "--out", "{}/look.unknown"], "look.unknown: expected .* ends in .png"),
    (look.main, ["{}", "--out", "{}"], "is a folder, expected a file"),
    (pack.main, ["{}", "--out", "{}/new", "--per-shard", "10001"], "10001: expected 1 to 10000"),
    (pack.main, ["{}", "--out", "{}/new"], "holds shards already.*expected"),
    (shapes.main, ["--out", "{}", "--count", "31"], "holds other data.*expected"),
    (shapes.main, ["--out", "{}/t", "--count", "0"], "--count: 0: expected 1 to")])
def test_commands_end_with_one_sentence(tmp_path, capsys, main, arguments, sentence):
    """What the user can put right ends a command with one line that says how, no traceback."""
    make_tar(tmp_path / "0.tar", members_of(2))
    with pytest.raises(SystemExit) as stopped:
        cli.start(main, [part.format(tmp_path) for part in arguments])
    said = str(stopped.value)
    if stopped.value.code == 2:                                 # argparse's, after the usage
        said = capsys.readouterr().err.splitlines()[-1]
    assert re.search(sentence, said) and "\n" not in said, said


def test_contact_sheet(tmp_path):
    """Pictures of all shapes get cells of one size, whole; long captions and words are broken."""
    for name, size, said in (("a", (400, 50), "w" * 300), ("b", (9, 7), "short"),
                             ("c", (90, 500), "long " * 300)):
        (tmp_path / f"{name}.png").write_bytes(encoded(size=size, colour=(255, 0, 0)))
        (tmp_path / f"{name}.txt").write_text(said)
    sheet = np.asarray(look.contact_sheet(data.CaptionedImages(tmp_path), range(3))).astype(int)
    red = (sheet[..., 0] > 200) & (sheet[..., 1] < 50)
    dark, cells = (sheet < 100).all(-1), [slice(x, x + look.CELL) for x in (4, 168, 332)]
    found = [(red[:, cell].any(0).sum(), red[:, cell].any(1).sum()) for cell in cells]
    assert found == [(160, 20), (9, 7), (29, 160)]                              # width, height
    lines = [dark[166:, cell].any(1).sum() for cell in cells]       # rows of pixels with letters
    assert lines[0] > 45 and 5 < lines[1] < 15 and lines[2] > 30, lines
    assert not dark[:, [0, 1, 2, 3, 164, 328]].any() and not dark[-2:].any()    # nothing is cut


def test_command_pack(tmp_path):
    """`pack` copies jpg, png and webp byte for byte, is deterministic, overwrites nothing."""
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    files = {"a.jpg": encoded(form="JPEG"), "b.webp": encoded(form="WEBP"),
             "c.bmp": encoded(form="BMP"), "d.png": encoded(size=(64, 20)),
             "wrong.png": encoded(form="JPEG"), "broken.jpg": b"x"}
    for name, content in files.items():
        (pictures / name).write_bytes(content)
        (pictures / name).with_suffix(".txt").write_text(f"this is {name}", encoding="utf-8")
    done = command("-m", "tools.pack", pictures, "--out", tmp_path / "out" / "mine",
                   "--per-shard", 2)
    assert done.returncode == 0, done.stderr
    assert "5 samples in 3 shard(s); left out 1 x cannot be decoded" in done.stdout
    packed = data.CaptionedImages(tmp_path / "out" / "mine")
    samples = [packed[i] for i in range(5)]
    copied = {s["caption"]: packed.bytes_of(s["index"], 0) for s in samples
              if "bmp" not in s["caption"]}
    assert copied == {f"this is {name}": content for name, content in files.items()
                      if name not in ("c.bmp", "broken.jpg")}
    meta = next(s["meta"] for s in samples if s["caption"] == "this is d.png")
    assert (meta["width"], meta["original_height"], meta["source"]) == (64, 20, "d")
    with pytest.raises(UsageError, match="nothing is overwritten"):
        pack.pack(pictures, tmp_path / "out" / "mine")
    pack.pack(pictures, tmp_path / "again", per_shard=2)
    assert contents(tmp_path / "again") == contents(tmp_path / "out" / "mine")
