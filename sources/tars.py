"""Tars of samples: which members belong together, what is damaged, and how one is written.

The headers of a tar are read once and kept in .index/ beside it, or in the user's cache folder.
What is damaged, foreign or lost is reported as (reason, where); all that is readable is found.
"""

import contextlib
import hashlib
import io
import json
import os
import tarfile
import unicodedata
from posixpath import basename, dirname, join, split

from PIL import Image

# The suffixes of what this Pillow decodes by itself: jpg, png, webp, avif, jp2, …
PICTURES = {suffix[1:] for suffix, name in Image.registered_extensions().items() if name in
            {*Image.OPEN, "MPO"} - {"BUFR", "EPS", "GRIB", "HDF5", "IPTC", "MPEG", "WMF"}}
CAPTIONS = {"txt": 1, "caption": 1, "json": 2}  # the part in which each is; 0 is the image
NOWHERE = (-1, -1, 0)  # a part that a sample does not have
INDEX_VERSION = 4  # ours: of a cached index; one of another version is made anew
ENDS = 1 << 16  # ours: so many bytes at both ends of a shard tell it from another
PER_SHARD = 10_000  # ours: at most so many samples, which four digits of a key can count


def index_tar(path, suffixes):
    """-> samples, problems, stamp of one tar, from the cached index where that is up to date."""
    if not os.path.isfile(path) or not os.access(path, os.R_OK):
        return [], [("unreadable shard" if os.path.exists(path) else "missing shard", path)], None
    with open(path, "rb") as handle:
        stamp = stamp_of(handle)
    full, about = os.path.abspath(path), repr((INDEX_VERSION, stamp, sorted(suffixes)))
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    places = (f"{dirname(full)}/.index/{basename(full)}.json",
              f"{home}/captioned_shards/{sha256(full)[:24]}.json")
    for place in places:
        with contextlib.suppress(OSError, ValueError):  # not there, not ours
            with open(place, encoding="utf-8") as file:
                signed, body = file.read().split("\n", 1)
            if signed == sha256(about + body):  # it is whole, and of this very tar
                return *json.loads(body), stamp
    members, problems = scan_tar(path)
    samples = group_members(members, suffixes, problems, f"{path}: ")
    body = json.dumps([samples, problems])
    for place in places:
        with contextlib.suppress(OSError):  # read-only: the next place, or no cache at all
            os.makedirs(dirname(place), exist_ok=True)
            with open(f"{place}.{os.getpid()}", "w", encoding="utf-8") as file:
                file.write(f"{sha256(about + body)}\n{body}")
            os.replace(file.name, place)
            break
    return samples, problems, stamp


def sha256(text):
    return hashlib.sha256(os.fsencode(text)).hexdigest()


def stamp_of(handle):
    """[size, mtime in ns, sha256 of both ends] of an open file: what tells a tar from another."""
    state = os.fstat(handle.fileno())
    ends = [os.pread(handle.fileno(), ENDS, at) for at in (0, max(0, state.st_size - ENDS))]
    return [state.st_size, state.st_mtime_ns, hashlib.sha256(b"".join(ends)).hexdigest()]


def scan_tar(path):
    """Read the headers of one tar -> its files [(name, part)], problems [(reason, where)].

    By default Python's tarfile ends in silence at a damaged header; ignore_zeros=True makes it
    search on, 512 bytes at a time. Bytes that belong to no member and are not zero are reported.
    """
    found, problems, start, size = [], [], 0, os.path.getsize(path)
    with open(path, "rb") as handle:
        while start < size:
            handle.seek(start)
            archive = None
            try:
                archive = tarfile.TarFile(fileobj=handle, ignore_zeros=True, encoding="utf-8",
                                          errors="surrogateescape")
                found.extend(archive)
                break
            except (tarfile.TarError, ValueError, OverflowError, RecursionError):
                # An extended header that is damaged stops tarfile all the same: go on after it.
                start = max(start, archive.offset if archive is not None else start) + 512
        if not found:
            handle.seek(0)
            return [], [("not a tar", f"{path} begins with {handle.read(15)!r}") if size else
                        ("empty file", path)]
        members, end = [], 0
        for member in sorted(found, key=lambda member: member.offset):
            report_gap(handle, end, min(member.offset, size), path, problems)
            stop = member.offset_data + (member.size if member.isreg() else 0)
            end = max(end, stop + -stop % 512)
            if stop > size:
                problems.append(("cut off", f"{path}: {member.name} goes on after the end"))
            elif member.isreg():
                members.append((member.name, (0, member.offset_data, member.size)))
            elif not member.isdir():
                problems.append(("link or device", f"{path}: {member.name}"))
        report_gap(handle, end, size, path, problems)
    if size < end + 512 and "cut off" not in dict(problems):
        problems.append(("no end mark", f"{path}: more samples may have been meant to follow"))
    return members, problems


def report_gap(handle, start, end, path, problems):
    """Note bytes from start to end that belong to no member, unless they are padding."""
    handle.seek(min(start, end))
    lost = 0
    for at in range(start, end, 1 << 20):
        block = handle.read(min(1 << 20, end - at))
        if at == start and block[156:157] == b"g" and block[257:262] == b"ustar":
            return  # a global header, such as `git archive` writes: no sample is lost
        lost += len(block) - block.count(0)
    if lost:
        problems.append(("damaged header", f"{path}: bytes {start:,} to {end:,} are unreadable"))


def group_members(members, suffixes, problems, where=""):
    """Members [(name, part)] of a tar or a folder -> samples [(key, image, txt, json)].

    A key goes up to the first dot, as webdataset has it: x.jpg, x.en.txt and x.json are a sample.
    Where several pictures, or a picture and the caption of another one, share that, it goes up to
    the last: IMG.2024.01.jpg and IMG.2024.01.txt.
    """
    groups, samples, kinds = {}, [], {**dict.fromkeys(suffixes, 0), **CAPTIONS}
    for name, part in members:
        folder, base = split(unicodedata.normalize("NFC", name.removeprefix("./")))
        stem, dot, suffix = base.rpartition(".")
        kind = kinds.get(suffix.lower()) if dot else None
        if base.startswith(".") or (base.startswith("__") and base.endswith("__")):
            pass  # "._a.jpg" that macOS adds, ".DS_Store", webdataset's own "__x__"
        elif kind is None:
            problems.append((f"{dot}{suffix} is not read", where + name))
        else:
            groups.setdefault(join(folder, base.partition(".")[0]), []).append(
                (join(folder, stem), suffix.lower() == "caption", kind, part, name))
    for first, group in groups.items():
        pictures = {stem for stem, _, kind, *_ in group if kind == 0}
        whole = len(pictures) == 1 and {stem for stem, *_ in group} <= {first, *pictures}
        whole, found = whole or pictures == {first}, {}
        for stem, _, kind, part, name in sorted(group, key=lambda one: (one[0] != first, one[1])):
            parts = found.setdefault(first if whole else stem, [NOWHERE] * 3)
            if parts[kind] == NOWHERE:
                parts[kind] = part
            elif kind or stem != first and whole:
                problems.append(("duplicate member", where + name))
            else:
                samples.append((name, part, NOWHERE, NOWHERE))  # counts as one without caption
        for key, parts in found.items():
            if first in pictures and key != first and parts[1:] == [NOWHERE] * 2:
                problems.append(("part of another sample", where + key))
            elif parts[0] == NOWHERE:
                problems.append(("no image", where + key))
            else:
                samples.append((key, *parts))
    return samples


def write_tar(path, samples):
    """samples: [(key, {suffix: bytes})] -> one tar; the same samples give the same bytes."""
    with tarfile.open(f"{path}.tmp", "w", format=tarfile.USTAR_FORMAT) as archive:
        for key, parts in samples:
            for suffix, data in parts.items():
                member = tarfile.TarInfo(f"{key}.{suffix}")  # time 0, owner 0
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    os.replace(f"{path}.tmp", path)  # a shard is there whole or not at all


def sample(key, suffix, image_bytes, size, caption, extra):
    """(key, its three members), in the layout of img2dataset; size: (width, height) in pixels."""
    width, height = size
    facts = {**extra, "caption": caption, "key": key, "width": width, "height": height,
             "original_width": width, "original_height": height}
    return key, {suffix: image_bytes, "txt": caption.encode(),
                 "json": json.dumps(facts, ensure_ascii=False).encode(errors="replace")}
