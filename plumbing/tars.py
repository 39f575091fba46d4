"""Where the samples of a source lie: files and (offset, size) of each image, caption and json.

The headers of a tar are read once and kept in .index/ beside it, or in the user's cache folder.
What is damaged, foreign or lost is reported as (reason, where); all that is readable is found.
"""

import collections
import contextlib
import csv
import glob
import hashlib
import io
import itertools
import json
import os
import re
import sys
import tarfile
import unicodedata
from posixpath import basename, dirname, join, normpath, split, splitext

from PIL import Image
from tqdm import tqdm

from plumbing.cli import UsageError

# The suffixes of what this Pillow decodes by itself: jpg, png, webp, avif, jp2, …
PICTURES = {suffix[1:] for suffix, name in Image.registered_extensions().items() if name in
            {*Image.OPEN, "MPO"} - {"BUFR", "EPS", "GRIB", "HDF5", "IPTC", "MPEG", "WMF"}}
CAPTIONS = {"txt": 1, "caption": 1, "json": 2}  # the part in which each is; 0 is the image
NOWHERE = (-1, -1, 0)  # a part that a sample does not have
INDEX_VERSION = 4  # ours: of a cached index; one of another version is made anew
ENDS = 1 << 16  # ours: so many bytes at both ends of a shard tell it from another
OPEN_FILES = 32  # ours: handles kept open per process, for sources of many shards
PER_SHARD = 10_000  # ours: at most so many samples, which four digits of a key can count


def find_samples(source, suffixes=PICTURES):
    """-> files, rows, problems, stamps.

    source: as data.py says. files: paths, or the JSON of one entry of a listing. rows: [(key,
    image, txt, json)] of the usable samples; a part is (number of its file, offset, size). stamps:
    of the tars, none for a folder of images. problems: [(reason, where)] of all that is left out.
    Raises UsageError if that is most of it.
    """
    files, rows, stamps, problems = [], [], [], []
    found = walk(source, problems) if os.path.isdir(source) else {}
    tars = {name: path for name, path in found.items()
            if "/" not in name and name.lower().endswith(".tar")}
    if tars:
        others = set(found) - set(tars) - {"latents.json", "shapes.json"}
        problems += [("beside the shards", found[name]) for name in sorted(others)]
    elif os.path.isdir(source):
        files, rows = list_pictures(found, suffixes, problems)
    tars = list(tars.values()) if os.path.isdir(source) else expand(source)
    for path in tqdm(tars, desc="index of the shards", unit="shard", delay=1, leave=False):
        samples, wrong, stamp = index_tar(path, suffixes)
        problems += wrong if samples or wrong else [("no samples", path)]
        rows += [(key, *((len(files), *part[1:]) if part[0] == 0 else part for part in parts))
                 for key, *parts in samples]
        if samples:
            files.append(path)
            stamps.append(stamp)
    # A caption may stand in the json alone. data.py sees it when it reads that.
    rows = [(key, image, facts if txt[0] < 0 else txt, facts) for key, image, txt, facts in rows]
    reasons = ["name is not UTF-8" if shown(key) != key else "no image" if image[0] < 0 else
               "no caption" if txt[0] < 0 else "empty image" if image[2] == 0 else None
               for key, image, txt, _ in rows]
    problems += [(reason, key) for reason, (key, *_) in zip(reasons, rows) if reason]
    problems = [(reason, shown(where)) for reason, where in problems]
    usable = [row for row, reason in zip(rows, reasons) if not reason]
    if 2 * len(usable) < len(rows) or not usable:
        raise unusable(source, f"{len(rows) - len(usable):,} of {len(rows):,} samples are unusable"
                       if usable else "no sample is usable", problems)
    return files, usable, problems, stamps


def shown(name):
    """A file's name that can be printed: bytes that are no UTF-8 become \\udc80 to \\udcff."""
    return name.encode("utf-8", "backslashreplace").decode()


def unusable(source, what, problems):
    """A UsageError that says what was found in a source and what is expected."""
    counts, such = collections.Counter(reason for reason, _ in problems), dict(problems[::-1])
    found = ", ".join(f"{n} x {reason} (such as {such[reason]})"
                      for reason, n in counts.most_common(8)) or "nothing"
    return UsageError(
        f"{source}: {what}; found {found}; expected a folder of tars, a quoted pattern such as "
        "\"shards/{00000..00099}.tar\" (in them KEY.jpg and KEY.txt), a folder of images each with "
        "NAME.txt, or one with metadata.jsonl or metadata.csv (file_name, text).")


class Reader:
    """Reads parts (number of the file, offset, size) of `files`, a few of which stay open. A tar
    that has another stamp than in `stamps`, or another file that has another size, is not read.
    """

    def __init__(self, files, stamps):
        self.files, self.stamps, self.handles, self.seen = files, stamps, {}, {}

    def __getstate__(self):
        return {**vars(self), "handles": {}}  # open files do not travel to workers

    def read(self, number, offset, size):
        """The bytes of a part, None where there is none. Raises OSError."""
        if number < 0 or isinstance(self.files[number], bytes):
            return self.files[number] if number >= 0 else None
        if number not in self.handles:
            while len(self.handles) >= OPEN_FILES:
                self.handles.pop(next(iter(self.handles))).close()
            self.handles[number] = open(self.files[number], "rb")
        now = os.fstat(self.handles[number].fileno())
        state = (now.st_ino, now.st_size, now.st_ctime_ns)  # no program can set its ctime back
        same = self.seen.get(number) == state or (
            stamp_of(self.handles[number]) == self.stamps[number] if self.stamps else
            now.st_size == size)
        found = os.pread(self.handles[number].fileno(), size, offset)  # moves no shared position
        if not same or len(found) != size:
            raise OSError(f"the file has changed since it was listed: {self.files[number]}")
        self.seen[number] = state
        return found


def walk(folder, problems):
    """-> {name below the folder, with slashes and composed letters: path} of its files, in order.
    Hidden files and folders are none of it. What a link brings in from outside is refused, but for
    tars, whose headers say what they are.
    """
    found, inside = {}, os.path.join(os.path.realpath(folder), "")
    for where, folders, names in os.walk(folder, onerror=lambda error: problems.append(
            ("unreadable folder", error.filename))):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for path in (os.path.join(where, name) for name in sorted(names) + folders):
            name = os.path.relpath(path, folder).replace(os.sep, "/")
            away = os.path.islink(path) and not os.path.realpath(path).startswith(inside)
            if basename(name).startswith(".") or (os.path.isdir(path) and not away):
                pass
            elif away and not (name.lower().endswith(".tar") and os.path.isfile(path)):
                problems.append(("link to what is outside", path))
            elif not os.path.isfile(path):
                problems.append(("not a file", path))
            else:
                found[unicodedata.normalize("NFC", name)] = path
    return found


def expand(source):
    """-> the paths of the tars that a source which is no folder means."""
    if os.path.exists(source):
        return [source]
    tars = list(itertools.islice(braces(source), 10 ** 6))
    if len(tars) == 10 ** 6:
        raise UsageError(f"{source}: found a million shards, expected fewer")
    if any(mark in source for mark in "*?["):
        tars = sorted(path for pattern in tars for path in glob.glob(pattern))
    return tars


def braces(pattern):
    """'a{08..10}.tar' -> 'a08.tar', 'a09.tar', 'a10.tar'; '{a,b}' works too."""
    match = re.search(r"\{([^{}]*)\}", pattern)
    if match is None:
        yield pattern
        return
    span = re.fullmatch(r"(\d+)\.\.(\d+)", match[1])
    for part in (f"{n:0{len(span[1])}d}" for n in range(int(span[1]), int(span[2]) + 1)
                 ) if span else match[1].split(","):
        yield from braces(pattern[:match.start()] + part + pattern[match.end():])


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


def list_pictures(found, suffixes, problems):
    """The {name: path} of a folder -> files, rows; a part is a whole file."""
    files, rows, listed = {}, [], set()  # path or JSON -> its number

    def part(file):
        size = len(file) if isinstance(file, bytes) else os.path.getsize(file)
        return (files.setdefault(file, len(files)), 0, size)

    for listing in [name for name in found if basename(name) in ("metadata.jsonl", "metadata.csv")]:
        for name, entry in entries(found.pop(listing), problems):
            name = normpath(join(dirname(listing), name))
            if name.startswith(("../", "/")):
                problems.append(("outside the folder", f"{listing}: {name}"))
                continue
            # The entry is the sample's json, and its "text" the caption.
            image = part(found[name]) if name in found else NOWHERE
            rows.append((splitext(name)[0], image, part(entry), part(entry)))
            listed.add(name)
    members = [(name, part(path)) for name, path in found.items() if name not in listed]
    return list(files), rows + group_members(members, suffixes, problems)


def entries(path, problems):
    """Yield (file_name, the whole entry as JSON) of a metadata.jsonl or metadata.csv."""
    table = path.endswith("csv")
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        lines = csv.DictReader(file) if table else file
        for number in itertools.count(1 + table):
            try:
                line = next(lines, "")
                if not line:
                    return
                if table or line.strip():
                    entry = line if table else json.loads(line)
                    yield (unicodedata.normalize("NFC", entry["file_name"]),
                           json.dumps(entry).encode())
            except (ValueError, KeyError, TypeError, RecursionError, csv.Error) as error:
                problems.append((f"unreadable line of {basename(path)}",
                                 f"{path}, line {number}: {error!r}"))


class FailureCounter:
    """Counts unreadable samples by reason and names each once. Stops a run if more than half of the
    first 1000 samples are unreadable, or 1000 in a row.
    """

    def __init__(self, dataset):
        self.source, self.trial = dataset.source, min(1000, len(dataset))
        self.seen, self.in_a_row, self.reasons = 0, 0, {}  # index -> why

    def note(self, batch):
        """Count a batch, of which `keys` and `failed` are read. Raises UsageError."""
        on_trial = self.seen < self.trial
        self.seen += len(batch["keys"]) + len(batch["failed"])
        self.in_a_row = 0 if batch["keys"] else self.in_a_row + len(batch["failed"])
        for index, (key, failed) in batch["failed"].items():
            if index not in self.reasons:
                self.reasons[index], bad = failed.partition(":")[0], len(self.reasons) + 1
                if bad <= 20 or bad % 1000 == 0:  # ours: no flood
                    tqdm.write(f"{self.source}: left out {key}: {failed} ({bad} so far)",
                               file=sys.stderr)
        if (on_trial and len(self.reasons) > self.trial / 2) or self.in_a_row >= 1000:
            raise UsageError(f"{self.source}: {len(self.reasons)} of {min(self.seen, self.trial)} "
                             f"samples cannot be used ({self.counts()}), such as {key}; expected "
                             "at most half (python -m tools.look shows what is there).")

    def counts(self):
        """"2 x cannot be decoded, 1 x empty caption": how many samples were lost, and why."""
        return ", ".join(f"{n} x {reason}" for reason, n in
                         collections.Counter(self.reasons.values()).most_common())
