"""
Where the samples of a source lie: files and (offset, size) of each image, caption and json.

The headers of a tar are read once and remembered in .index/ beside it (or in the user's cache
folder, where that cannot be written), so that every sample is reached directly. What is damaged is
reported as (reason, where), and all that is readable around it is found.
"""

import collections
import glob
import hashlib
import io
import json
import os
import re
import tarfile

from tqdm import tqdm

from plumbing.cli import UsageError

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
FOLDER_SUFFIXES = IMAGE_SUFFIXES + ("bmp", "gif", "tif", "tiff")  # tools.pack makes them png
INDEX_VERSION = 2  # ours: written into each cached index; another number is scanned again
OPEN_FILES = 32  # ours: handles kept open per process, for sources of many shards
PER_SHARD = 10_000  # ours: at most so many samples, which four digits of a key can count


def find_samples(source, suffixes=IMAGE_SUFFIXES):
    """-> files, rows, problems, whether the files are tars.

    source: a folder of tars or of images, one tar, a brace pattern or a glob (see data.py).
    rows: [(key, image, txt, json)] of the usable samples; a part is (number of its file, offset,
    size), (-1, -1, 0) where there is no json. problems: [(reason, where)] of all that is left out.
    Raises UsageError if that is most of it.
    """
    files, rows, problems, in_tars = _all_samples(source, suffixes)
    if in_tars and not files:
        raise unusable(source, "there is no readable tar there", problems)
    reasons = ["no image" if image[0] < 0 else "no caption" if txt[0] < 0 else
               "empty image" if image[2] == 0 else None for _, image, txt, _ in rows]
    problems += [(reason, row[0]) for reason, row in zip(reasons, rows) if reason]
    first = reasons[:1000]
    bad = len(first) - first.count(None)
    if not any(reason is None for reason in reasons):
        raise unusable(source, "no sample is usable", problems)
    if bad > len(first) / 2:
        raise unusable(source, f"{bad:,} of the first {len(first):,} samples are unusable",
                       problems)
    return files, [row for reason, row in zip(reasons, rows) if not reason], problems, in_tars


def unusable(source, what, problems):
    """A UsageError that says what was found in a source and what is expected."""
    counts = collections.Counter(reason for reason, _ in problems)
    found = ", ".join(f"{n} x {reason}" for reason, n in counts.items()) or "nothing"
    example = f" (such as {problems[0][1]})" if problems else ""
    return UsageError(
        f"{source}: {what}; found {found}{example}; expected a folder of tars, a quoted pattern "
        "such as \"shards/{00000..00099}.tar\" (in them KEY.jpg|jpeg|png|webp and KEY.txt), a "
        "folder of images each with NAME.txt, or one with metadata.jsonl (file_name, text).")


def describe(source, shards, samples, problems):
    """What a source holds (numbers of shards and samples), what is left out and why: few lines."""
    kind = f"{shards:,} shard(s)" if shards else "a folder of images"
    lines, by_reason = [f"{source}: {kind}, {samples:,} samples"], {}
    for reason, where in problems:
        by_reason.setdefault(reason, []).append(where)
    for reason, names in by_reason.items():
        more = ", ..." if len(names) > 3 else ""
        lines.append(f"  {len(names):,} x {reason}: {', '.join(names[:3])}{more}")
    return "\n".join(lines)


class Reader:
    """Reads parts (number of the file, offset, size) of `files`, a few of which stay open."""

    def __init__(self, files):
        self.files, self.handles = files, {}

    def __getstate__(self):
        return {"files": self.files, "handles": {}}  # open files do not travel to workers

    def read(self, number, offset, size):
        """The bytes of a part, None where there is none. Raises OSError or EOFError."""
        if number < 0:
            return None
        where = os.getpid(), self.files[number]  # forks would move each other's position in it
        if where not in self.handles:
            while len(self.handles) >= OPEN_FILES:
                self.handles.pop(next(iter(self.handles))).close()
            self.handles[where] = open(self.files[number], "rb")
        self.handles[where].seek(offset)
        found = self.handles[where].read(size)
        if len(found) != size:
            raise EOFError(f"file ended early: {self.files[number]}")
        return found


def _all_samples(source, suffixes):
    """As find_samples, with the samples that cannot be used."""
    problems = []
    if os.path.isdir(source):
        tars = sorted(glob.glob(os.path.join(glob.escape(source), "*.tar")))
        if not tars:
            return *list_pictures(source), False
        deeper = sorted(glob.glob(os.path.join(glob.escape(source), "*", "*.tar")))
        problems += [("tar in a sub-folder", path) for path in deeper]
    elif os.path.exists(source):
        tars = [source]
    else:
        tars = expand_braces(source)
        if any(mark in source for mark in "*?["):
            tars = sorted(path for pattern in tars for path in glob.glob(pattern))
    files, rows = [], []
    for path in tqdm(tars, desc="index of the shards", unit="shard", delay=1, leave=False):
        if not os.path.isfile(path):
            problems.append(("missing shard", path))
            continue
        samples, found = index_tar(path, suffixes)
        problems += found if samples or found else [("no samples", path)]
        if samples:
            rows += [(key, *((len(files) if parts[i] >= 0 else -1, parts[i], parts[i + 1])
                             for i in (0, 2, 4))) for key, *parts in samples]
            files.append(path)
    return files, rows, problems, True


def expand_braces(pattern):
    """'a{08..10}.tar' -> ['a08.tar', 'a09.tar', 'a10.tar']; '{a,b}' works too."""
    match = re.search(r"\{([^{}]*)\}", pattern)
    if match is None:
        return [pattern]
    span = re.fullmatch(r"(\d+)\.\.(\d+)", match[1])
    if span:
        first, last = int(span[1]), int(span[2])
        width = len(span[1]) if len(span[1]) == len(span[2]) or span[1].startswith("0") else 0
        parts = [f"{n:0{width}d}" for n in range(first, last + 1)]
    else:
        parts = match[1].split(",")
    head, tail = pattern[:match.start()], pattern[match.end():]
    return [done for part in parts for done in expand_braces(head + part + tail)]


def scan_tar(path):
    """Read the headers of one tar -> (members, problems).

    members: [(name, offset, size)] of its files; problems: [(reason, where)].
    Python's tarfile, left alone, ends in silence at a damaged header. ignore_zeros=True makes it
    search on, 512 bytes at a time; and since every member says where it begins and ends, bytes
    that belong to none and are not zero are found, and reported.
    """
    size = os.path.getsize(path)
    if size == 0:
        return [], [("empty file", path)]
    found, problems, start = [], [], 0
    with open(path, "rb") as handle:
        while start < size:
            handle.seek(start)
            archive = None
            try:
                archive = tarfile.TarFile(fileobj=handle, ignore_zeros=True, encoding="utf-8",
                                          errors="replace")
                for member in archive:
                    found.append(member)
                break
            except (tarfile.TarError, ValueError, OverflowError):
                # An extended header that is damaged stops tarfile all the same: go on after it.
                start = max(start, archive.offset if archive is not None else start) + 512
        if not found:
            handle.seek(0)
            return [], [("not a tar", f"{path} begins with {handle.read(15)!r}")]
        members, end = [], 0
        for member in sorted(found, key=lambda member: member.offset):
            _report_gap(handle, end, min(member.offset, size), path, problems)
            stop = member.offset_data + (member.size if member.isreg() else 0)
            end = max(end, stop + -stop % 512)
            if stop > size:
                problems.append(("cut off", f"{path}: {member.name} goes on after the end"))
            elif member.isreg():
                members.append((member.name, member.offset_data, member.size))
            elif not member.isdir():
                problems.append(("link or device", f"{path}: {member.name}"))
        _report_gap(handle, end, size, path, problems)
    if size < end + 512 and not any(reason == "cut off" for reason, _ in problems):
        problems.append(("no end mark", f"{path}: more samples may have been meant to follow"))
    return members, problems


def _report_gap(handle, start, end, path, problems):
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


def group_members(path, members, suffixes=IMAGE_SUFFIXES):
    """Members of one tar -> (samples, problems); sample = [key, (offset, size) x 3, flattened].

    The three are image, txt and json; (-1, 0) stands for none. Grouping is by name over the
    whole tar, so members of a sample need not stand next to each other.
    """
    samples, problems = {}, []
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
    rows = [[key, *(part.get(kind, (-1, 0))[i] for kind in range(3) for i in range(2))]
            for key, part in samples.items()]
    return rows, problems


def index_tar(path, suffixes=IMAGE_SUFFIXES):
    """-> (samples, problems) of one tar, from the cached index where that is up to date."""
    state = os.stat(path)
    stamp = [INDEX_VERSION, state.st_size, state.st_mtime_ns, *suffixes]
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    full = os.path.abspath(path)
    places = (
        os.path.join(os.path.dirname(full), ".index", os.path.basename(full) + ".json"),
        os.path.join(home, "captioned_shards",
                     hashlib.sha256(full.encode()).hexdigest()[:24] + ".json"),
    )
    for place in places:
        try:
            with open(place, encoding="utf-8") as file:
                cached = json.load(file)
            if cached["stamp"] == stamp:
                return cached["samples"], [tuple(problem) for problem in cached["problems"]]
        except (OSError, ValueError, KeyError, TypeError):
            continue  # not there, or not ours: it is made anew
    members, problems = scan_tar(path)
    samples, more = group_members(path, members, suffixes)
    problems += more
    for place in places:
        try:
            os.makedirs(os.path.dirname(place), exist_ok=True)
            with open(f"{place}.{os.getpid()}", "w", encoding="utf-8") as file:
                json.dump({"stamp": stamp, "samples": samples, "problems": problems}, file)
            os.replace(file.name, place)
            break
        except OSError:
            continue  # read-only: the next place, or no cache at all
    return samples, problems


def list_pictures(folder):
    """A folder of images -> (files, samples, problems); each sample's parts are whole files."""
    files, rows, problems, whole = [], [], [], {}

    def part(path):  # -> (number of the file, 0, its size)
        if path is None or not os.path.isfile(path):
            return (-1, -1, 0)
        if path not in whole:
            whole[path] = len(files)
            files.append(path)
        return (whole[path], 0, os.path.getsize(path))

    listing = os.path.join(folder, "metadata.jsonl")
    if os.path.isfile(listing):
        place = part(listing)[0]
        with open(listing, "rb") as file:
            offset = 0
            for number, line in enumerate(file, 1):
                span = (place, offset, len(line))
                offset += len(line)
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
        listed = set(map(os.path.normpath, whole))
        problems += [("not in metadata.jsonl", path) for path in sorted(
            os.path.normpath(os.path.join(where, name))
            for where, _, names in os.walk(folder) for name in names
            if os.path.splitext(name)[1][1:].lower() in FOLDER_SUFFIXES) if path not in listed]
        return files, rows, problems
    for where, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            stem, suffix = os.path.splitext(name)
            if name.startswith(".") or suffix[1:].lower() not in FOLDER_SUFFIXES:
                continue
            base = os.path.join(where, stem)
            rows.append((os.path.relpath(base, folder).replace(os.sep, "/"),
                         part(os.path.join(where, name)),
                         part(f"{base}.txt"), part(f"{base}.json")))
    return files, rows, problems


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
