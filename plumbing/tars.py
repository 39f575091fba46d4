"""Where the samples of a source lie: files and (offset, size) of each image, caption and json.

The headers of a tar are read once and kept in .index/ beside it, or in the user's cache folder.
What is damaged is reported as (reason, where), and all that is readable around it is found.
"""

import collections
import contextlib
import glob
import hashlib
import io
import json
import os
import re
import sys
import tarfile

from tqdm import tqdm

from plumbing.cli import UsageError

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
FOLDER_SUFFIXES = IMAGE_SUFFIXES + ("bmp", "gif", "tif", "tiff")  # tools.pack makes them png
INDEX_VERSION = 3  # ours: written into each cached index; another number is scanned again
OPEN_FILES = 32  # ours: handles kept open per process, for sources of many shards
PER_SHARD = 10_000  # ours: at most so many samples, which four digits of a key can count


def find_samples(source, suffixes=IMAGE_SUFFIXES):
    """-> files, rows, problems, whether the files are tars.

    source: as data.py says. rows: [(key, image, txt, json)] of the usable samples; a part is
    (number of its file, offset, size), (-1, -1, 0) where there is none. problems: [(reason, where)]
    of all that is left out. Raises UsageError if that is most of it.
    """
    tars, problems = list_tars(source)
    files, rows = ([], []) if tars is not None else list_pictures(source, problems)
    for path in tqdm(tars or [], desc="index of the shards", unit="shard", delay=1, leave=False):
        samples, found = index_tar(path, suffixes)
        problems += found if samples or found else [("no samples", path)]
        if samples:
            rows += [(key, *((len(files), *part) if part[0] >= 0 else (-1, -1, 0)
                             for part in parts)) for key, *parts in samples]
            files.append(path)
    reasons = ["no image" if image[0] < 0 else "no caption" if txt[0] < 0 else
               "empty image" if image[2] == 0 else None for _, image, txt, _ in rows]
    problems += [(reason, key) for reason, (key, *_) in zip(reasons, rows) if reason]
    rows, first = [row for row, reason in zip(rows, reasons) if not reason], reasons[:1000]
    bad = len(first) - first.count(None)
    if not rows or 2 * bad > len(first):
        raise unusable(source, "no sample is usable" if not rows else
                       f"{bad:,} of the first {len(first):,} samples are unusable", problems)
    return files, rows, problems, tars is not None


def unusable(source, what, problems):
    """A UsageError that says what was found in a source and what is expected."""
    counts = collections.Counter(reason for reason, _ in problems)
    found = ", ".join(f"{n} x {reason}" for reason, n in counts.items()) or "nothing"
    example = f" (such as {problems[0][1]})" if problems else ""
    return UsageError(
        f"{source}: {what}; found {found}{example}; expected a folder of "
        "tars, a quoted pattern such as \"shards/{00000..00099}.tar\" (in them "
        "KEY.jpg|jpeg|png|webp and KEY.txt), a folder of images each with NAME.txt, or one with "
        "metadata.jsonl (file_name, text).")


class Reader:
    """Reads parts (number of the file, offset, size) of `files`, a few of which stay open."""

    def __init__(self, files):
        self.files, self.handles = files, {}

    def __getstate__(self):
        return {"files": self.files, "handles": {}}  # open files do not travel to workers

    def read(self, number, offset, size):
        """The bytes of a part, None where there is none. Raises OSError."""
        if number < 0:
            return None
        if number not in self.handles:
            while len(self.handles) >= OPEN_FILES:
                self.handles.pop(next(iter(self.handles))).close()
            self.handles[number] = open(self.files[number], "rb")
        found = os.pread(self.handles[number].fileno(), size, offset)  # moves no shared position
        if len(found) != size:
            raise OSError(f"file ended early: {self.files[number]}")
        return found


def list_tars(source):
    """-> the paths of the tars that a source means, None if it is a folder without; problems."""
    if os.path.isdir(source):
        here, deeper = (sorted(glob.glob(os.path.join(glob.escape(source), pattern)))
                        for pattern in ("*.tar", "*/*.tar"))
        return here or None, [("tar in a sub-folder", path) for path in deeper if here]
    if os.path.exists(source):
        return [source], []
    tars = expand_braces(source)
    if any(mark in source for mark in "*?["):
        tars = sorted(path for pattern in tars for path in glob.glob(pattern))
    return tars, []


def expand_braces(pattern):
    """'a{08..10}.tar' -> ['a08.tar', 'a09.tar', 'a10.tar']; '{a,b}' works too."""
    match = re.search(r"\{([^{}]*)\}", pattern)
    if match is None:
        return [pattern]
    span = re.fullmatch(r"(\d+)\.\.(\d+)", match[1])
    if span:
        first, last = span.groups()
        parts = [f"{n:0{len(first)}d}" for n in range(int(first), int(last) + 1)]
    else:
        parts = match[1].split(",")
    return [done for part in parts
            for done in expand_braces(pattern[:match.start()] + part + pattern[match.end():])]


def index_tar(path, suffixes=IMAGE_SUFFIXES):
    """-> (samples, problems) of one tar, from the cached index where that is up to date."""
    if not os.path.isfile(path):
        return [], [("missing shard", path)]
    state, full = os.stat(path), os.path.abspath(path)
    stamp = [INDEX_VERSION, state.st_size, state.st_mtime_ns, *suffixes]
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    digest = hashlib.sha256(full.encode()).hexdigest()[:24]
    places = (f"{os.path.dirname(full)}/.index/{os.path.basename(full)}.json",
              f"{home}/captioned_shards/{digest}.json")
    for place in places:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # not there, not ours
            with open(place, encoding="utf-8") as file:
                cached = json.load(file)
            if cached["stamp"] == stamp:
                return cached["samples"], [tuple(problem) for problem in cached["problems"]]
    members, problems = scan_tar(path)
    samples = group_members(path, members, suffixes, problems)
    for place in places:
        with contextlib.suppress(OSError):  # read-only: the next place, or no cache at all
            os.makedirs(os.path.dirname(place), exist_ok=True)
            with open(f"{place}.{os.getpid()}", "w", encoding="utf-8") as file:
                json.dump({"stamp": stamp, "samples": samples, "problems": problems}, file)
            os.replace(file.name, place)
            break
    return samples, problems


def scan_tar(path):
    """Read the headers of one tar -> its files [(name, offset, size)], problems [(reason, where)].

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
                                          errors="replace")
                found.extend(archive)
                break
            except (tarfile.TarError, ValueError, OverflowError):
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
                members.append((member.name, member.offset_data, member.size))
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


def group_members(path, members, suffixes, problems):
    """Members of a tar, in any order -> [key, image, txt, json]; a part is (offset, size), (-1, 0)
    where there is none.
    """
    samples = {}
    for name, offset, size in members:
        folder, _, base = name.removeprefix("./").rpartition("/")
        stem, dot, extension = base.partition(".")
        if not stem or (base.startswith("__") and base.endswith("__")):
            continue  # "._a.jpg" that macOS adds, ".DS_Store", webdataset's own "__x__"
        suffix = extension.lower().rpartition(".")[2]
        kind = 0 if suffix in suffixes else {"txt": 1, "json": 2}.get(suffix)
        if kind is None or not dot:
            problems.append(("other member", f"{path}: {name}"))
            continue
        sample = samples.setdefault(f"{folder}/{stem}" if folder else stem, {})
        exact = suffix == extension.lower()  # a.jpg comes before a.mask.jpg
        if kind in sample:
            problems.append(("duplicate member", f"{path}: {name}"))
        if kind not in sample or (exact and not sample[kind][2]):
            sample[kind] = (offset, size, exact)
    return [[key, *(parts.get(kind, (-1, 0))[:2] for kind in range(3))]
            for key, parts in samples.items()]


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
                 "json": json.dumps(facts, ensure_ascii=False).encode()}


def list_pictures(folder, problems):
    """A folder of images -> (files, samples); the parts of a sample are whole files."""
    files, rows = {}, []  # path -> its number

    def part(path):
        if not os.path.isfile(path):
            return (-1, -1, 0)
        return (files.setdefault(path, len(files)), 0, os.path.getsize(path))

    pictures = []
    for where, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        pictures += [os.path.join(where, name) for name in sorted(names)
                     if not name.startswith(".")
                     and os.path.splitext(name)[1][1:].lower() in FOLDER_SUFFIXES]
    listing = os.path.join(folder, "metadata.jsonl")
    if not os.path.isfile(listing):
        for path in pictures:
            base = os.path.splitext(path)[0]
            rows.append((os.path.relpath(base, folder).replace(os.sep, "/"), part(path),
                         part(f"{base}.txt"), part(f"{base}.json")))
        return list(files), rows
    place, end = part(listing)[0], 0
    with open(listing, "rb") as file:
        for number, line in enumerate(file, 1):
            span, end = (place, end, len(line)), end + len(line)
            if not line.strip():
                continue
            try:
                name = json.loads(line)["file_name"]
                image = part(os.path.join(folder, name))
            except (ValueError, KeyError, TypeError) as error:
                problems.append(("unreadable line of metadata.jsonl",
                                 f"{listing}, line {number}: {error!r}"))
                continue
            # The line itself is the sample's json, and its "text" the caption.
            rows.append((os.path.splitext(name)[0], image, span, span))
    listed = set(map(os.path.normpath, files))
    problems += [("not in metadata.jsonl", path) for path in map(os.path.normpath, pictures)
                 if path not in listed]
    return list(files), rows


class FailureCounter:
    """Counts unreadable samples by reason and names each once. Stops a run in which more than half
    of the first 1000 fail, or 1000 in a row.
    """

    def __init__(self, dataset):
        self.source, self.trial = dataset.source, min(1000, len(dataset))
        self.seen, self.in_a_row, self.named = 0, 0, set()
        self.counts = collections.Counter()

    def note(self, batch):
        """Count a batch, of which `keys` and `failed` are read. Raises UsageError."""
        on_trial = self.seen < self.trial
        self.seen += len(batch["keys"]) + len(batch["failed"])
        self.in_a_row = 0 if batch["keys"] else self.in_a_row + len(batch["failed"])
        for key, failed in batch["failed"]:
            self.counts[failed.partition(":")[0]] += 1
            if key not in self.named:
                self.named.add(key)
                if len(self.named) <= 20 or len(self.named) % 1000 == 0:  # ours: no flood
                    tqdm.write(f"{self.source}: left out {key}: {failed} "
                               f"({len(self.named)} so far)", file=sys.stderr)
        bad = sum(self.counts.values())
        if (on_trial and bad > self.trial / 2) or self.in_a_row >= 1000:
            reasons = ", ".join(f"{n} x {reason}" for reason, n in self.counts.most_common())
            raise UsageError(f"{self.source}: {bad} of {self.seen} samples cannot be used "
                             f"({reasons}), such as {batch['failed'][-1][0]}; expected at most "
                             "half (python -m tools.look shows what is there).")
