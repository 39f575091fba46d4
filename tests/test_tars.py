"""Where samples lie: tars, folders, damage, the cached index."""

import collections
import io
import pickle
import tarfile

import numpy as np
import pytest
import torch

import data
from plumbing.cli import UsageError
from sources import listing, tars
from tests.common import encoded, make_tar, members_of


def counts(found):
    """{reason: number} of all that was left out."""
    return collections.Counter(reason for reason, _ in found.problems)


def test_sources_of_tars(shards):
    """Folder, brace pattern, glob and single tar name the same samples, in the same order."""
    folder = data.CaptionedImages(shards)
    assert len(folder) == 12
    for source in (f"{shards}/{{00000..00002}}.tar", f"{shards}/*.tar",
                   f"{shards}/0000{{0,1,2}}.tar"):
        other = data.CaptionedImages(source)
        assert [other.key(i) for i in range(12)] == [folder.key(i) for i in range(12)]
    assert len(data.CaptionedImages(shards / "00001.tar")) == 4
    sample = folder[7]
    assert (sample["key"], sample["caption"], sample["meta"]) == ("000000007", "number 7", {"n": 7})
    assert sample["image"].shape == (3, 30, 40) and sample["image"].dtype == torch.uint8
    assert sample["image"][0, 0, 0] == 7


def test_missing_shards_are_counted(shards):
    """Gaps in the numbers of a brace pattern are counted; no shard at all is an error."""
    found = data.CaptionedImages(f"{shards}/{{00000..00005}}.tar")
    assert len(found) == 12 and counts(found) == {"missing shard": 3}
    with pytest.raises(UsageError, match="nowhere.*missing shard.*expected"):
        data.CaptionedImages("nowhere/{0..3}.tar")


def test_keys_and_suffixes(tmp_path):
    """Key up to the first dot with its folder, suffix lower-cased, ._ and __x__ members passed."""
    make_tar(tmp_path / "a.tar", [
        ("./one/img.v2.JPG", encoded(form="JPEG")), ("./one/img.txt", b"first"),
        ("two/img.Webp", encoded(form="WEBP")), ("two/img.TXT", b"second"),
        ("two/img.mask.png", encoded()), ("two/._img.webp", b"mac"), ("__meta__", b"x"),
        ("__MACOSX/._b.jpg", b"mac"), ("three.JPEG", encoded(form="JPEG")), ("three.txt", b"third"),
    ])
    found = data.CaptionedImages(tmp_path)
    assert [found.key(i) for i in range(3)] == ["one/img", "two/img", "three"]
    assert [found.caption(i) for i in range(3)] == ["first", "second", "third"]
    assert counts(found) == {"part of another sample": 1} and len(found) == 3
    assert all("failed" not in found[i] for i in range(3))  # img.webp, not img.mask.png


def test_interleaved_and_duplicate_members(tmp_path):
    """Members of a sample may stand anywhere in the tar; a duplicate is counted, the first kept."""
    members = list(members_of(4))
    shuffled = [members[i] for i in np.random.RandomState(0).permutation(len(members))]
    make_tar(tmp_path / "a.tar", shuffled + [("000000001.txt", b"again")])
    found = data.CaptionedImages(tmp_path)
    texts = {found.key(i): found.caption(i) for i in range(len(found))}
    assert texts == {f"{i:09d}": f"number {i}" for i in range(4)}
    assert counts(found) == {"duplicate member": 1}


def test_folder_of_images(tmp_path):
    """A plain folder pairs NAME.jpg with NAME.txt, dots in names and sub-folders included."""
    (tmp_path / "sub").mkdir()
    for name in ("a.png", "b 2024.01.02.png", "b 2024.01.03.PNG", "sub/c.png", "lonely.png"):
        (tmp_path / name).write_bytes(encoded())
        if name != "lonely.png":
            (tmp_path / name).with_suffix(".txt").write_text(f"caption of {name}\n")
    found = data.CaptionedImages(tmp_path)
    keys = [found.key(i) for i in range(len(found))]
    assert keys == ["a", "b 2024.01.02", "b 2024.01.03", "sub/c"]
    assert found[2]["caption"] == "caption of b 2024.01.03.PNG"
    assert found[0]["image"].shape == (3, 30, 40)
    assert counts(found) == {"no caption": 1} and "lonely" in found.describe()


def test_folder_with_metadata_jsonl(tmp_path, capfd):
    """metadata.jsonl gives captions and extras; broken lines and missing images are counted."""
    for name in ("a.png", "b.png", "d.png", "not_listed.png"):
        (tmp_path / name).write_bytes(encoded())
    lines = ['{"file_name": "a.png", "text": "an a", "score": 3}',
             '{"file_name": "b.png", "text": "ä b"}', "", "{broken",
             '{"file_name": "c.png", "text": "c"}', '{"file_name": "d.png", "label": "d"}']
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
    found = data.CaptionedImages(tmp_path)
    assert [found.caption(i) for i in range(2)] == ["an a", "ä b"]
    assert found[0]["meta"]["score"] == 3
    assert counts(found) == {"unreadable line of metadata.jsonl": 1, "no image": 1,
                              "no caption": 1}
    assert found[2]["failed"].startswith("no caption")
    assert "line 4" in capfd.readouterr().err


def test_unusable_sources(tmp_path):
    """Nothing usable, or mostly unusable: one sentence with path, found, expected."""
    (tmp_path / "empty").mkdir()
    make_tar(tmp_path / "texts" / "0.tar", [("a.txt", b"only a caption"), ("b.txt", b"b")])
    make_tar(tmp_path / "most" / "0.tar",
             [*members_of(2), ("x.png", b"1"), ("y.png", b"1"), ("z.png", b"1")])
    for name, reason in (("empty", "nothing"), ("texts", "2 x no image"),
                         ("most", "3 of 5"), ("gone", "missing shard")):
        with pytest.raises(UsageError, match=rf"{name}.*{reason}.*expected"):
            data.CaptionedImages(tmp_path / name)


def damaged(path, how):
    content = bytearray(path.read_bytes())
    with tarfile.open(path) as archive:
        places = {member.name: member for member in archive}
    if how == "truncated":
        content = content[:places["000000005.png"].offset_data + 10]
    elif how in ("header", "last header"):
        offset = places["000000003.txt" if how == "header" else "000000009.json"].offset
        content[offset:offset + 512] = b"\xff" * 512
    elif how == "payload":
        member = places["000000003.png"]
        content[member.offset_data:member.offset_data + member.size] = b"\x55" * member.size
    elif how == "no end":
        last = places["000000009.json"]
        content = content[:last.offset_data + last.size]
    elif how == "empty":
        content = b""
    elif how == "html":
        content = b"<!DOCTYPE html><p>404 Not Found</p>" * 100
    path.write_bytes(content)


@pytest.mark.parametrize("how, usable, reason", [
    ("truncated", 5, "cut off"), ("header", 10, "damaged header"),
    ("last header", 10, "damaged header"), ("payload", 10, None),
    ("no end", 10, "no end mark"), ("empty", 0, "empty file"), ("html", 0, "not a tar")])
def test_damaged_tars(tmp_path, how, usable, reason):
    """Everything readable in a damaged tar is read, and the rest is counted and named."""
    damaged(make_tar(tmp_path / "00000.tar", members_of(10)), how)
    make_tar(tmp_path / "00001.tar", members_of(10, 10))
    found = data.CaptionedImages(tmp_path)
    assert len(found) == usable + 10
    assert (reason in counts(found)) if reason else not counts(found)
    assert not reason or "00000.tar" in found.describe()
    bad = [found[i] for i in range(len(found)) if "failed" in found[i]]
    assert [sample["key"] for sample in bad] == (
        ["000000003"] if how in ("header", "payload") else [])  # its caption, or its image
    again = data.CaptionedImages(tmp_path)  # from the cached index
    assert counts(again) == counts(found) and len(again) == len(found)


def test_damaged_extended_header(tmp_path):
    """A tar with long names loses only the samples whose headers are damaged."""
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        for name, content in members_of(6):
            member = tarfile.TarInfo("ü" * 120 + "/" + name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    with tarfile.open(path) as archive:
        offset = archive.getmember("ü" * 120 + "/000000002.png").offset_data - 512
    content = bytearray(path.read_bytes())
    content[offset:offset + 512] = b"\xff" * 512
    path.write_bytes(content)
    found = data.CaptionedImages(tmp_path)
    assert len(found) == 5 and counts(found)["damaged header"] >= 1
    assert found.key(0).endswith("ü/000000000")


def test_index_is_cached_and_renewed(shards, tmp_path, monkeypatch):
    """The index is cached by size and mtime, beside the shards or else in the cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    data.CaptionedImages(shards)
    assert len(list((shards / ".index").iterdir())) == 3
    with monkeypatch.context() as patch:
        patch.setattr(tars, "scan_tar", None)  # would fail if it were called
        assert len(data.CaptionedImages(shards)) == 12
    make_tar(shards / "00002.tar", members_of(7, 9))
    assert len(data.CaptionedImages(shards)) == 16
    for file in (shards / ".index").iterdir():
        file.unlink()
    (shards / ".index").rmdir()
    (shards / ".index").write_text("in the way, like a read-only folder")
    assert len(data.CaptionedImages(shards)) == 16
    assert len(list((tmp_path / "cache").rglob("*.json"))) == 3


def test_reader(shards):
    """Few files stay open, workers get none of them, and a file that lost its end is named."""
    found = data.CaptionedImages(shards)
    reader = found._reader
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(listing, "OPEN_FILES", 2)
        assert [found.caption(i) for i in (0, 5, 9, 0)] == [f"number {i}" for i in (0, 5, 9, 0)]
    assert len(reader.handles) == 2 and not pickle.loads(pickle.dumps(found))._reader.handles
    last = shards / "00002.tar"
    last.write_bytes(last.read_bytes()[:2000])
    assert found[11]["failed"] == (
        f"cannot be read: the file has changed since it was listed: {last}")
