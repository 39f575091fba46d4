"""Where the samples of a source lie: files and (offset, size) of each image, caption and json.

A source is tars, or a folder of pictures with captions beside them.
"""

import collections
import csv
import glob
import itertools
import json
import os
import re
import sys
import unicodedata
from posixpath import basename, dirname, join, normpath, splitext

from tqdm import tqdm

from plumbing.cli import UsageError
from sources.tars import NOWHERE, PICTURES, group_members, index_tar, stamp_of

OPEN_FILES = 32  # ours: handles kept open per process, for sources of many shards


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
