"""A zoo of files and folders: what is damaged, odd or foreign is read, or counted and named."""

import json
import os
import signal
import subprocess
import sys
import time
import types

import numpy as np
import pytest
import torch
from PIL import Image

import data
import sample
import semantic_compressor
from plumbing import cli, pictures
from plumbing.cli import UsageError
from pocket import shapes
from sources import listing
from tests.common import HERE, contents, encoded, make_tar, members_of, take
from tests.test_tars import counts
from tools import cache_latents, look, pack


@pytest.mark.parametrize("content, found", [
    (None, "No such file or directory"), (b"", "no JSON"), (b"\xff\xfe\x00", "no JSON"),
    (b'{"a": "\xe4"}', "no JSON"), (b"{", "no JSON"), (b"[" * 200_000, "no JSON"), (b"[]", "list"),
    (b"null", "NoneType"), (b"{}", "no a"), (b'{"a": "1", "b": 1}', "a = '1'"),
    (b'{"a": true, "b": 1}', "a = True"), (b'{"a": 1.0, "b": 1}', "a = 1.0"),
    (b'{"a": 1, "b": NaN}', "b = nan"), (b'{"a": 1, "b": -1e999}', "b = -inf"),
    (b'{"a": 1%s, "b": 1}' % (b"0" * 400), "a = 10000"),
    (b'{"a": 1%s, "b": 1}' % (b"0" * 5000), "no JSON"), (b'{"a": 1, "b": {}}', "b = {}")],
    ids=range(17))
def test_read_json_refuses(tmp_path, content, found):
    """A file that is not what it should be is named, with what was found and what was expected."""
    path = tmp_path / "x.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError) as error:
        cli.read_json(path, {"a": int, "b": (float, type(None))})
    said = str(error.value)
    assert said.startswith(f"{path}: found {found}") and "\n" not in said and len(said) < 400, said
    assert said.endswith("; expected a JSON object with a (int), b (float or NoneType)"), said


def test_read_json(tmp_path):
    """What fits is given back whole: an int for a float, null where it may be, after a BOM."""
    (tmp_path / "x.json").write_bytes(b'\xef\xbb\xbf{"a": 1, "b": null, "c": NaN}')
    fields = {"a": float, "b": (int, type(None))}
    found = cli.read_json(tmp_path / "x.json", fields)
    assert (found["a"], found["b"]) == (1, None) and "c" in found
    assert cli.read_json("log.jsonl, line 3", fields, '{"a": 2.5, "b": 7}') == {"a": 2.5, "b": 7}


# ---- nothing is lost in silence ------------------------------------------------------------------

def files_of(found):
    """What becomes of each file of a source: {name: "sample" or the reason why it is none}."""
    fate = {}
    for index in range(len(found)):
        here = found[index]
        for number, *_ in found.parts[index].tolist():
            file = found._reader.files[number] if number >= 0 else b""
            if not isinstance(file, bytes):
                fate[os.path.relpath(file, found.source)] = here.get("failed", "sample")
    return fate


def test_every_file_of_a_folder_is_accounted_for(tmp_path):
    """Samples and everything that is counted are the files that are there: none is lost unsaid."""
    picture, folder = encoded(), tmp_path / "zoo"
    outside = tmp_path / "secret.txt"
    outside.write_text("a password")
    zoo = {
        "plain.png": picture, "plain.txt": b"a", "upper.PNG": picture, "upper.TXT": b"b",
        "said.png": picture, "said.caption": b"c", "facts.png": picture,
        "facts.json": b'{"caption": "d"}', "list.png": picture,
        "list.json": b'{"text": ["e", "other"]}', "laion.png": picture,
        "laion.json": b'{"TEXT": "f"}', "new.jfif": encoded(form="JPEG"), "new.txt": b"g",
        "K\u0061\u0308se.png": picture, "K\u00e4se.txt": b"h", "sub/deep.png": picture,
        "sub/deep.txt": b"i", "date.2024.01.png": picture, "date.2024.01.txt": b"j",
        "date.2024.02.png": picture, "date.2024.02.txt": b"k", "part.jpg": encoded(form="JPEG"),
        "part.seg.png": picture, "part.txt": b"l",
        # what cannot be used
        "lonely.png": picture, "orphan.txt": b"no picture", "latin.png": picture,
        "latin.txt": "Käse".encode("latin-1"), "empty.png": picture, "empty.txt": b" \n",
        "broken.png": b"x", "broken.txt": b"m", "zero.png": b"", "zero.txt": b"n",
        "deep.png": picture, "deep.json": b"[" * 100_000, "odd.png": picture,
        "half.png": picture, "half.json": b'{"text": "\\ud83d"}',
        "odd.json": b'{"text": [5]}', "double.png": picture, "double.jpg": picture,
        "double.txt": b"o", "a.heic": b"x", "a.svg": b"<svg/>", "README": b"", "list.md": b"",
        "metadata.json1": b"{}", "film.mp4": b"", "clip.tar.gz": b""}
    for name, content in zoo.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    (folder / "spy.png").write_bytes(picture)
    (folder / "spy.txt").symlink_to(outside)
    (folder / "gone.txt").symlink_to(folder / "nowhere")
    (folder / "away").symlink_to(tmp_path)
    os.mkfifo(folder / "pipe.png")
    with open(os.fsencode(folder) + b"/K\xe4se.png", "wb") as file:
        file.write(picture)
    with open(os.fsencode(folder) + b"/K\xe4se.txt", "wb") as file:
        file.write(b"p")
    names = {os.path.relpath(os.path.join(where, name), folder) for where, folders, files
             in os.walk(folder) for name in files + [one for one in folders if one == "away"]}
    found = data.CaptionedImages(folder, report=False)
    captions = sorted(found[i]["caption"] for i in range(len(found)) if "failed" not in found[i])
    assert captions == list("abcdefghijkl") + ["o"]
    fate, said = files_of(found), dict(found.problems[::-1])
    for name in names - set(fate):          # named as a file, or by the key of its sample
        plain = listing.shown(name)
        fate[name] = next((reason for reason, where in found.problems if
                           where.endswith(plain) or where == os.path.splitext(plain)[0]), "silence")
    assert not [name for name, what in fate.items() if what == "silence"]
    assert fate["latin.png"] == "caption is not UTF-8: as latin-1 it would be 'Käse'"
    assert fate["empty.txt"] == "empty caption" and fate["odd.json"].startswith("no caption")
    assert fate["half.json"] == "caption is not UTF-8: half of a letter is escaped"
    assert fate["deep.png"].startswith("json cannot be read")
    assert counts(found) == {
        "part of another sample": 1, "no caption": 3, "no image": 1, "empty image": 1,
        ".heic is not read": 1, ".svg is not read": 1,
        "README is not read": 1, ".md is not read": 1, ".json1 is not read": 1,
        ".mp4 is not read": 1, ".gz is not read": 1, "link to what is outside": 2,
        "not a file": 2, "name is not UTF-8": 1}, said
    found.describe().encode()                                   # can be printed


@pytest.mark.parametrize("suffix", ["png", "avif", "jp2", "jfif", "bmp", "tga", "ppm", "mpo"])
def test_whatever_pillow_decodes_is_taken(tmp_path, suffix):
    """A picture in any format that this Pillow decodes is a sample, in a folder and in a tar."""
    Image.init()
    form = Image.registered_extensions().get(f".{suffix}")
    if form not in Image.OPEN and suffix != "mpo":
        pytest.skip(f"this Pillow does not decode {suffix}")
    content = encoded(form=form)
    (tmp_path / "folder").mkdir()
    (tmp_path / f"folder/a.{suffix}").write_bytes(content)
    (tmp_path / "folder/a.txt").write_text("a")
    make_tar(tmp_path / "tar/0.tar", [(f"a.{suffix}", content), ("a.txt", b"a")])
    for source in ("folder", "tar"):
        assert data.CaptionedImages(tmp_path / source)[0]["image"].shape == (3, 30, 40)


def both(tmp_path, members):
    """The same files as a folder and as a tar -> {key: caption or reason}, which has to agree."""
    for name, content in members:
        path = tmp_path / "folder" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    make_tar(tmp_path / "tar/0.tar", members)
    found = [data.CaptionedImages(tmp_path / one, report=False) for one in ("folder", "tar")]
    folder, tar = ({one["key"]: one.get("failed", one.get("caption"))
                    for one in map(source.__getitem__, range(len(source)))} for source in found)
    assert folder == tar, "a folder and a tar of the same files give other samples"
    return folder, [counts(one) for one in found]


@pytest.mark.parametrize("names, samples", [
    ([f"IMG.2024.0{i}.{end}" for i in range(1, 9) for end in ("png", "txt")],
     {f"IMG.2024.0{i}": f"IMG.2024.0{i}.txt" for i in range(1, 9)}),
    (["x.png", "x.seg.png", "x.depth.png", "x.txt"], {"x": "x.txt"}),       # webdataset's parts
    (["x.rgb.png", "x.txt"], {"x": "x.txt"}), (["x.png", "x.en.txt"], {"x": "x.en.txt"}),
    (["x.png", "x.txt", "x.en.txt", "x.de.txt", "x.fr.txt"], {"x": "x.txt"}),
    (["x.png", "x.caption", "x.txt"], {"x": "x.txt"}),
    (["x.PNG", "x.TXT", "y.Png", "y.Caption"], {"x": "x.TXT", "y": "y.Caption"}),
    (["Ka\u0308se.png", "K\u00e4se.txt"], {"K\u00e4se": "K\u00e4se.txt"}),
    # never another picture's caption
    (["a.png", "a.txt", "IMG.1.png", "IMG.2.txt"], {"a": "a.txt"}),
    (["a.png", "a.txt", "b.png", "b.txt", "IMG.1.png", "IMG.2.png", "IMG.2.txt", "IMG.3.txt"],
     {"a": "a.txt", "b": "b.txt", "IMG.2": "IMG.2.txt"}),
    (["a.b/x.png", "a.b/x.txt", "a.c/x.png", "a.c/x.txt"],
     {"a.b/x": "a.b/x.txt", "a.c/x": "a.c/x.txt"})])
def test_pairs(tmp_path, names, samples):
    """One rule for folders and tars: up to the first dot, but never two pictures in one sample."""
    found, _ = both(tmp_path, [(name, encoded() if name.lower().endswith("png") else
                                name.encode()) for name in names])
    assert found == samples


def test_what_a_merge_would_lose_can_stop(tmp_path):
    """A tar in which all samples have one name is refused, not read as one sample."""
    make_tar(tmp_path / "0.tar", [one for i in range(8) for one in (
        ("image.png", encoded()), ("image.txt", b"%d" % i))])
    with pytest.raises(UsageError, match="7 of 8 samples are unusable; .*7 x no caption"):
        data.CaptionedImages(tmp_path)


@pytest.mark.parametrize("encoding, text", [
    ("latin-1", "Käse für Jörg"), ("cp1252", "“Käse” – 3 €"), ("gb18030", "一只红色的猫"),
    ("utf-16", "a red cat"), ("utf-16-le", "a red cat")])
def test_captions_that_are_not_utf8(tmp_path, encoding, text):
    """Such a sample is left out, counted and named with what its bytes mean, also by `pack`."""
    for name, content in (("good", b"good"), ("fine", "Käse".encode("utf-8-sig")),
                          ("bad", text.encode(encoding))):
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / f"in/{name}.png").write_bytes(encoded())
        (tmp_path / f"in/{name}.txt").write_bytes(content)
    (tmp_path / "in/metadata.csv").write_bytes(
        b"file_name,text\ngood.png,good\nfine.png,\"K\xc3\xa4se\"\nbad.png,K\xe4se\n")
    for listed in (True, False):
        if not listed:
            (tmp_path / "in/metadata.csv").unlink()
        found = data.CaptionedImages(tmp_path / "in", report=False)
        samples = {found.key(i): found[i] for i in range(3)}
        assert [samples[name]["caption"] for name in ("good", "fine")] == ["good", "Käse"]
        assert samples["bad"]["failed"].startswith("caption is not UTF-8: as "), samples["bad"]
    guess = encoding.removesuffix("-le")
    assert f"as {guess} it would be" in samples["bad"]["failed"]
    assert text[:6] in samples["bad"]["failed"] or encoding == "utf-16-le"
    pack.pack(tmp_path / "in", tmp_path / "out")
    packed = data.CaptionedImages(tmp_path / "out")
    assert sorted(packed.caption(i) for i in range(len(packed))) == ["Käse", "good"]


def test_listings(tmp_path, capfd):
    """metadata.jsonl and metadata.csv are read in any folder, by the names as they stand there."""
    for name in ("train/a.png", "train/b.png", "test/Ka\u0308se.png", "test/d.png", "e.png"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(encoded())
    (tmp_path / "in/e.txt").write_text("of its own file")
    (tmp_path / "secret.png").write_bytes(encoded())
    lines = ['{"file_name": "a.png", "text": ["first", "second"]}', "null", "[" * 100_000,
             '{"file_name": 5}', '{"file_name": null, "text": "x"}', "\u2028",
             '{"file_name": "../../secret.png", "text": "outside"}',
             '{"file_name": "%s", "text": "outside"}' % (tmp_path / "secret.png"),
             '{"file_name": "b.png", "caption": "a \u2028 b"}', '{"file_name": "c.png"}']
    (tmp_path / "in/train/metadata.jsonl").write_text("\n".join(lines), encoding="utf-8-sig")
    (tmp_path / "in/test/metadata.csv").write_text(
        'file_name,text,score\r\nK\u00e4se.png,"two\r\nlines, one ""caption""",3\r\nd.png\r\n',
        encoding="utf-8-sig", newline="")
    found = data.CaptionedImages(tmp_path / "in")
    samples = {found.key(i): found[i] for i in range(len(found))}
    assert {key: one.get("caption") for key, one in samples.items()} == {
        "train/a": "first", "train/b": "a b", "test/K\u00e4se": 'two lines, one "caption"',
        "test/d": None, "e": "of its own file"}
    assert samples["test/K\u00e4se"]["meta"]["score"] == "3"
    assert counts(found) == {"unreadable line of metadata.jsonl": 4, "outside the folder": 2,
                             "no image": 1}
    assert "secret" in capfd.readouterr().err
    look.look(tmp_path / "in", tmp_path / "look.png")
    assert "lists of captions, of which the first is read: 1" in capfd.readouterr().out


def test_beside_shards(shards, capfd):
    """What lies beside shards is named; a link in place of a shard is followed."""
    (shards / "loose.png").write_bytes(encoded())
    (shards / "sub").mkdir()
    (shards / "00002.tar").rename(shards / "sub/00002.tar")
    (shards / "00002.TAR").symlink_to(shards / "sub/00002.tar")
    (shards / "shapes.json").write_text("{}")
    found = data.CaptionedImages(shards)
    assert len(found) == 12 and counts(found) == {"beside the shards": 2}
    assert "loose.png" in capfd.readouterr().err


# ---- shards that change --------------------------------------------------------------------------

def other(path, members):
    """Put another tar of the same size and time in place of `path`."""
    before = path.stat()
    make_tar(path, members)
    assert path.stat().st_size == before.st_size
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("how", ["other", "shrunk", "gone", "replaced", "touched"])
def test_a_shard_changes_under_a_stream(shards, capfd, how):
    """It is said, and what is still given is right; a changed mode alone changes nothing."""
    found = data.CaptionedImages(shards)
    stream = data.stream(found, 4)
    right = {found.key(i): found.caption(i) for i in range(12)}
    path = shards / "00001.tar"
    if how in ("gone", "replaced"):
        found._reader.handles.clear()                           # as where there are many shards
        path.unlink()
    if how == "replaced":
        make_tar(path, members_of(4, 100))
    elif how == "other":
        other(path, [(name.replace("0000000", "1000000"), content)
                     for name, content in members_of(4, 5)])
    elif how == "shrunk":
        path.write_bytes(path.read_bytes()[:5000])
    elif how == "touched":
        path.chmod(0o600)
    batches = take(stream, 3)
    given = {key: said for one in batches for key, said in zip(one["keys"], one["captions"])}
    assert given.items() <= right.items() and len(given) == (12 if how == "touched" else 8)
    said = capfd.readouterr().err
    assert ("left out 000000005: cannot be read" in said) == (how != "touched"), said


def test_a_shard_changes_between_two_runs(shards):
    """The index is made anew, and a run that goes on refuses samples that are other ones."""
    config = types.SimpleNamespace(batch_size=2, accumulate=1, seed=0, workers=0)
    state = data.Stream(data.CaptionedImages(shards), config).state_dict()
    data.Stream(data.CaptionedImages(shards), config).load_state_dict(state)
    (shards / "00001.tar").touch()                              # a copy, say
    data.Stream(data.CaptionedImages(shards), config).load_state_dict(state)
    other(shards / "00001.tar", [(name.replace("0000000", "1000000"), content)
                                 for name, content in members_of(4, 5)])
    found = data.CaptionedImages(shards)
    assert found.key(5) == "100000005"                          # not as the cached index had it
    for dataset in (found, data.remember(found, lambda batch: (batch["images"],))):
        with pytest.raises(UsageError, match="holds other samples than when this run began"):
            data.Stream(dataset, config).load_state_dict(state)
    del state["data"]                                           # of an older checkpoint
    data.Stream(found, config).load_state_dict(state)


def test_a_damaged_index_is_not_used(shards):
    """Whatever happens to a cached index, the samples are those of the shard."""
    whole = [data.CaptionedImages(shards)[i] for i in range(12)]
    path = shards / ".index/00001.tar.json"
    content = path.read_bytes()
    rng = np.random.RandomState(0)
    damages = [b"", b"[]", b"null", b"\xff", content[:-20], b"[" * 100_000, b"{}" + content]
    for _ in range(40):
        place, bit = rng.randint(len(content)), 1 << rng.randint(8)
        damages.append(content[:place] + bytes([content[place] ^ bit]) + content[place + 1:])
    for damaged in damages:
        path.write_bytes(damaged)
        found = data.CaptionedImages(shards, report=False)
        assert [(found.key(i), found.caption(i)) for i in range(12)] == [
            (one["key"], one["caption"]) for one in whole], damaged[:50]


# ---- false stops, odd sizes, long captions -------------------------------------------------------

@pytest.mark.parametrize("n, broken, batch", [(4, 1, 128), (20, 3, 64), (9, 4, 6), (2, 1, 16)])
def test_few_broken_samples_do_not_stop(tmp_path, n, broken, batch):
    """The share that stops a run is one of different samples, however often each is drawn."""
    members = dict(members_of(n))
    members.update({f"{i:09d}.png": b"broken" for i in range(broken)})
    make_tar(tmp_path / "0.tar", members.items())
    dataset = data.CaptionedImages(tmp_path)
    for one in (dataset, data.remember(dataset, lambda batch: (batch["images"],))):
        assert all(len(found["keys"]) > 0 for found in take(data.stream(one, batch), 6))


def test_images_too_long_to_enlarge(tmp_path):
    """A line of pixels that would be huge at the size of training is left out, not tried."""
    (tmp_path / "a.png").write_bytes(encoded(size=(880_000, 1)))
    (tmp_path / "a.txt").write_text("a line")
    (tmp_path / "b.png").write_bytes(encoded())
    (tmp_path / "b.txt").write_text("b")
    found = data.CaptionedImages(tmp_path, resize=128, crop=128)
    assert found[0]["failed"] == "too many pixels: 880000 x 1 enlarged 128 times"
    with pytest.raises(data.BadSample, match="88000000 x 1 enlarged 1.02e"):
        data.fit(types.SimpleNamespace(size=(88_000_000, 1)), 1024, 1024)
    assert found[1]["image"].shape == (3, 128, 128)
    look.look(tmp_path, tmp_path / "look.png")


def test_long_captions(tmp_path, capsys, encoder):
    """A caption of a megabyte is read, cut and drawn at once; `look` counts those that are cut."""
    for name, said in (("a", "w" * 1_000_000), ("b", "word " * 200_000), ("c", "short"),
                       ("d", "red " * 23), ("e", "red " * 22)):
        (tmp_path / f"{name}.png").write_bytes(encoded())
        (tmp_path / f"{name}.txt").write_text(said)
    found = data.CaptionedImages(tmp_path)
    captions = [found.caption(i) for i in range(5)]
    begun = time.perf_counter()
    encoder.told = False
    encoder(captions)
    encoder(captions)
    drawn = pictures.grid(list(torch.rand(5, 3, 64, 64)), 5, captions)
    assert drawn.height < 1200 and time.perf_counter() - begun < 20
    said = capsys.readouterr().err
    assert said.count("3 of 5 texts are longer than the 24 tokens of the text encoder pocket") == 1
    assert "at word 23, 'word'" in said and "at word 23, 'red'" in said and "at word 1, 'ww" in said
    look.look(tmp_path, tmp_path / "look.png")
    said = capsys.readouterr().out
    assert "longer than the 24 tokens of pocket, and cut there: 3" in said
    assert "longer than the 77 tokens of clip, and cut there: 2" in said and len(said) < 6000


def test_odd_json_does_not_stop_anything(tmp_path):
    """.json of odd types, not finite numbers, deep nests: filters, `look` and `pack` go on."""
    odd = [b'{"sha256": ["x"], "aesthetic": true}',
           b'{"hash": {}, "aesthetic": 1%s}' % (b"0" * 400),
           b'{"aesthetic": NaN, "x": "\\ud800"}', b"[]", b"5", b'{"aesthetic": "7"}',
           b'{"aesthetic": 7, "a": ' + b"[" * 900 + b"]" * 900 + b"}"]
    (tmp_path / "in").mkdir()
    for i, content in enumerate(odd):
        (tmp_path / f"in/{i}.png").write_bytes(encoded())
        (tmp_path / f"in/{i}.txt").write_text("x")
        (tmp_path / f"in/{i}.json").write_bytes(content)
    found = data.CaptionedImages(tmp_path / "in", filters={"min_aesthetic": 5.0}, report=False)
    assert [found.key(i) for i in range(len(found))] in (["1", "6"], ["6"])
    look.look(tmp_path / "in", tmp_path / "look.png")
    pack.pack(tmp_path / "in", tmp_path / "out")
    assert len(data.CaptionedImages(tmp_path / "out")) >= 6


# ---- commands ------------------------------------------------------------------------------------

@pytest.mark.parametrize("pattern", ["{0..99999999999}.tar", pytest.param(
    "{0..99999}/{0..99999}.tar", marks=pytest.mark.slow)])
def test_a_pattern_without_end(tmp_path, pattern):
    """A brace pattern of very many shards is refused at once, nested ones too."""
    with pytest.raises(UsageError, match="found a million shards, expected fewer"):
        data.CaptionedImages(f"{tmp_path}/{pattern}")


@pytest.mark.parametrize("content", [b"", b"[]", b"null", b"{", b"\xff", b"[" * 100_000,
                                     b'{"compressor": 5, "image_size": 128}',
                                     b'{"compressor": "x", "image_size": true}',
                                     b'{"compressor": "x", "image_size": "128"}'])
def test_damaged_notes_beside_shards(chain, drawings, tmp_path, content):
    """A damaged latents.json or shapes.json is one sentence that names it."""
    for name in ("latents.json", "shapes.json"):
        (tmp_path / name).write_bytes(content)
    compressor = semantic_compressor.load(chain / "stage_b/checkpoint.pt")
    for call in (lambda: semantic_compressor.cached(tmp_path, compressor),
                 lambda: cache_latents.cache(drawings, chain / "stage_b/checkpoint.pt", tmp_path),
                 lambda: shapes.make_shapes(tmp_path, 2, workers=1)):
        with pytest.raises(UsageError, match=r"(latents|shapes)\.json: found|holds other data"):
            call()


def test_a_left_over_note_does_not_lock(chain, drawings, tmp_path):
    """A kill between the two lines that write latents.json leaves a folder that can be used; what
    is there already is kept with the samples it was made of."""
    (tmp_path / "latents.json.tmp").write_text('{"compr')
    made = dict(weights=chain / "stage_b/checkpoint.pt", out=tmp_path, workers=0, per_shard=10)
    cache_latents.cache(drawings, **made)
    assert len(data.CaptionedLatents(tmp_path)) == 24
    note = tmp_path / "latents.json"
    note.write_text(note.read_text().replace('"data": "', '"data": "0'))
    with pytest.raises(UsageError, match="made with another data"):
        cache_latents.cache(drawings, **made)


@pytest.mark.parametrize("group, number", [
    (True, signal.SIGTERM), pytest.param(False, signal.SIGTERM, marks=pytest.mark.slow),
    pytest.param(True, signal.SIGINT, marks=pytest.mark.slow)])
def test_shapes_end_without_words(tmp_path, group, number):
    """SIGTERM or Ctrl-C, to the command or to all of its processes, is one sentence; the same
    command goes on."""
    code = ("import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
            "from plumbing import cli; from pocket import shapes; cli.start(shapes.main, {!r})")
    flags = ["--out", str(tmp_path / "s"), "--count", "100000", "--workers", "2"]
    process = subprocess.Popen([sys.executable, "-c", code.format(flags)], cwd=HERE, text=True,
                               stderr=subprocess.PIPE, start_new_session=True)
    limit = time.monotonic() + 100
    while not list(tmp_path.glob("s/*.tar")) and time.monotonic() < limit:
        time.sleep(0.1)
    (os.killpg if group else os.kill)(process.pid, number)
    said = process.communicate(timeout=100)[1]
    assert process.returncode == 1 and said.rstrip().splitlines()[-1].startswith("stopped"), said
    assert "Traceback" not in said and "Broken" not in said, said
    with pytest.raises(ProcessLookupError):                     # no worker is left
        os.killpg(process.pid, 0)


def test_workers_of_shapes(tmp_path):
    """Workers give what one process gives; an error of a worker is the command's."""
    for workers in (1, 3):
        shapes.make_shapes(tmp_path / str(workers), 10, size=16, workers=workers, per_shard=2)
    assert contents(tmp_path / "1") == contents(tmp_path / "3")
    (tmp_path / "full/00001.tar.tmp").mkdir(parents=True)
    with pytest.raises(IsADirectoryError):
        shapes.make_shapes(tmp_path / "full", 10, size=16, workers=2, per_shard=2)


def test_prompt_files(chain, tmp_path, capsys):
    """A prompt stands on a line as editors show lines: U+2028 and \\x0b are spaces in it, a BOM is
    nothing; one that is too long is said to be cut, and where."""
    (tmp_path / "p.txt").write_bytes("\ufeffa red\u2028star\r\n\r\na\x0bb\x85c\n".encode() +
                                     b"blue " * 30)
    sample.main(["--prompts", str(tmp_path / "p.txt"), "--out", str(tmp_path / "x.png"),
                 "--weights", str(chain), "--steps-c", "1", "--steps-b", "1"])
    about = json.loads(Image.open(tmp_path / "x.png").info["parameters"])
    assert about["prompts"] == ["a red\u2028star", "a\x0bb\x85c", ("blue " * 30).strip()]
    said = capsys.readouterr().err
    assert said.count("1 of 4 texts are longer than the 24 tokens") == 1, said
    assert "at word 23, 'blue'" in said
