"""
Captioned images in, batches out; and the frozen text encoder.

A source is one of
    shards/                          a folder of tars, such as img2dataset writes
    "shards/{00000..00099}.tar"      a brace pattern (quoted, or the shell expands it), a glob
                                     or one tar
    pictures/                        a folder of images, each with its caption in NAME.txt
    pictures/                        ... or all captions in metadata.jsonl, one line per image:
                                     {"file_name": "cat.png", "text": "a cat on a mat"}
and a tar holds, for each sample, members that share everything up to their first dot:
    000000007.jpg     the image: .jpg .jpeg .png or .webp
    000000007.txt     its caption, UTF-8
    000000007.json    optional: anything else that is known about it

The headers of all tars are read once and remembered in shards/.index/, so every sample can be
reached directly. An epoch is one seeded permutation of all samples: no shuffle buffer, no
sample twice or never, any number of shards with any number of workers, and a position
(epoch, sample) from which a stopped run goes on exactly. What cannot be read is left out,
counted by reason and named; a source that is mostly unreadable stops the run.

    B  batch      H W  height and width in pixels      L  text tokens      D  width of a token

    python data.py shapes --out shards/shapes            the built-in drawings (pocket/shapes.py)
    python data.py look shards/shapes                    what is in there, as text and as a PNG
    python data.py pack my_pictures --out shards/mine    your own pictures -> shards
"""

import argparse
import collections
import copy
import functools
import glob
import hashlib
import io
import itertools
import json
import math
import multiprocessing
import os
import pickle
import re
import signal
import struct
import sys
import tarfile
import textwrap
import urllib.error
import urllib.request
import warnings
import zlib

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageOps, UnidentifiedImageError
from torch import nn
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm import tqdm

from plumbing.cli import UsageError
from pocket import shapes

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
FOLDER_SUFFIXES = IMAGE_SUFFIXES + ("bmp", "gif", "tif", "tiff")  # packed as png
MAX_PIXELS = 89_000_000  # ours: just below the size at which Pillow itself begins to warn
INDEX_VERSION = 2        # ours: written into each cached index; another number is scanned again
OPEN_FILES = 32          # ours: file handles kept open per process, for sources of many shards


class BadSample(Exception):
    """One sample cannot be used: 'reason' or 'reason: detail'."""


# ---- Index: source -> files and (offset, size) of every image, caption and json ------------------

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


# ---- Decoding: bytes -> RGB image, scaled and cropped --------------------------------------------

def decode(data, resize=None):
    """Encoded bytes -> upright RGB image on white; large JPEGs are decoded at a coarser scale."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # MAX_PIXELS judges
            image = Image.open(io.BytesIO(data))
        if image.width * image.height > MAX_PIXELS:
            raise BadSample(f"too many pixels: {image.width} x {image.height}")
        if resize is not None and image.format in ("JPEG", "MPO"):        # MPO: many phones
            # 1/2, 1/4 or 1/8 while still twice the final size, so that no sharpness is lost
            ratio = 2 * resize / min(image.size)
            image.draft("RGB", (int(image.width * ratio), int(image.height * ratio)))
        image.load()
        return _to_rgb(ImageOps.exif_transpose(image))
    except UnidentifiedImageError:  # its own message holds an address, different each time
        raise BadSample("cannot be decoded: not an image") from None
    except Image.DecompressionBombError as error:
        raise BadSample(f"too many pixels: {error}") from None
    except (OSError, ValueError, TypeError, SyntaxError, EOFError, IndexError, KeyError,
            struct.error, zlib.error) as error:  # what Pillow raises for damaged files
        raise BadSample(f"cannot be decoded: {error}") from None


def _to_rgb(image):
    if image.mode.startswith("I"):  # 16 bits per pixel: Pillow's own conversion would clip
        grey = np.asarray(image).astype(np.float32) / 257
        image = Image.fromarray(grey.clip(0, 255).round().astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def fit(image, resize=None, crop=None, rng=None):
    """Scale the shorter side to `resize`, then crop; rng=None crops the centre."""
    width, height = image.size
    scale = resize / min(width, height) if resize else 1.0
    if crop:
        crop_height, crop_width = (crop, crop) if isinstance(crop, int) else crop
        scale = max(scale, crop_width / width, crop_height / height)  # the crop always fits
    if scale != 1.0:
        width, height = max(1, round(width * scale)), max(1, round(height * scale))
        if crop:
            width, height = max(width, crop_width), max(height, crop_height)
        image = image.resize((width, height), Image.Resampling.BICUBIC)  # Pillow antialiases
    if crop:
        free = (width - crop_width, height - crop_height)
        left, top = ((n // 2 for n in free) if rng is None else
                     (int(rng.integers(n + 1)) for n in free))
        image = image.crop((left, top, left + crop_width, top + crop_height))
    return image


# ---- Filters: by what the .json of a sample says -------------------------------------------------

NO_FILTERS = {"min_size": 0, "min_aesthetic": 0.0, "max_pwatermark": 1.0, "max_punsafe": 1.0}
FIELDS = {  # names in LAION's tables, as img2dataset copies them; the first that is there counts
    "aesthetic": ("aesthetic", "AESTHETIC_SCORE"), "pwatermark": ("pwatermark",),
    "punsafe": ("punsafe",)}


def filters(config):
    """The filters that a stage's Config sets: {name: bound}, without those that let all pass."""
    return {name: getattr(config, name) for name, off in NO_FILTERS.items()
            if getattr(config, name) != off}


def rejected(meta, filters):
    """Why a sample with this .json does not pass the filters, or None. Bounds themselves pass."""
    for name, bound in filters.items():
        kind, _, field = name.partition("_")
        if field == "size":  # the shorter side of the original; width and height are resized ones
            values = [meta.get("original_width"), meta.get("original_height")]
        else:
            values = [value for value in map(meta.get, FIELDS[field]) if value is not None][:1]
        if not values or not all(isinstance(value, (int, float)) and math.isfinite(value)
                                 for value in values):
            return f"no {field}"
        if min(values) < bound if kind == "min" else max(values) > bound:
            return f"{field} {'below' if kind == 'min' else 'above'} {bound}"
    return None


# ---- The dataset ---------------------------------------------------------------------------------

class CaptionedImages(Dataset):
    """All samples of a source, by number.

    resize: the shorter side is brought to it (None: kept). crop: int or (H, W), at a place that
    follows from (seed, epoch, index), or in the middle with center=True; an image too small for
    its crop is enlarged. Of a list of crops each batch has one, drawn for all its samples.
    filters: see filters(). dataset[index] or dataset[epoch, index] is a dict of
        image    uint8 (3, H, W)          caption  str          meta  dict, from the .json
        key      str                      index    int
    or, when this sample cannot be read, of index, key and failed="reason: detail".
    """

    suffixes = IMAGE_SUFFIXES

    def __init__(self, source, resize=None, crop=None, seed=0, center=False, filters=None,
                 report=True):
        self.source, self.resize, self.crop = os.fspath(source), resize, crop
        self.seed, self.center = seed, center
        self.problems = []  # [(reason, where)] of all that was left out
        self.shards = []    # tars that could be read; none for a folder of images
        self.files, rows = self._read_index()
        self._handles = (None, {})
        self._keep_usable(rows)
        if filters:
            self._filter(filters)
        if report and self.problems:  # nothing is lost in silence
            tqdm.write(self.describe(), file=sys.stderr)

    def _read_index(self):
        """-> files, [(key, image, txt, json)] with parts (file number, offset, size)."""
        source = self.source
        if os.path.isdir(source):
            tars = sorted(glob.glob(os.path.join(glob.escape(source), "*.tar")))
            if not tars:
                files, rows, self.problems = list_pictures(source)
                return files, rows
            deeper = sorted(glob.glob(os.path.join(glob.escape(source), "*", "*.tar")))
            self.problems += [("tar in a sub-folder", path) for path in deeper]
        elif os.path.exists(source):
            tars = [source]
        else:
            tars = expand_braces(source)
            if any(mark in source for mark in "*?["):
                tars = sorted(path for pattern in tars for path in glob.glob(pattern))
        files, rows = [], []
        for path in tqdm(tars, desc="index of the shards", unit="shard", delay=1, leave=False):
            if not os.path.isfile(path):
                self.problems.append(("missing shard", path))
                continue
            samples, problems = index_tar(path, self.suffixes)
            self.problems += problems if samples or problems else [("no samples", path)]
            if samples:
                number = len(files)
                files.append(path)
                rows += [(key, *((number if parts[i] >= 0 else -1, parts[i], parts[i + 1])
                                 for i in (0, 2, 4))) for key, *parts in samples]
        self.shards = list(files)
        if not files:
            self._stop("there is no readable tar there")
        return files, rows

    def _keep_usable(self, rows):
        """Leave out samples without image or caption; keep the others as compact arrays."""
        good, first = [], []
        for key, image, txt, extra in rows:
            reason = ("no image" if image[0] < 0 else "no caption" if txt[0] < 0 else
                      "empty image" if image[2] == 0 else None)
            if reason is None:
                good.append((key, image, txt, extra))
            else:
                self.problems.append((reason, key))
            if len(first) < 1000:
                first.append(reason)
        bad = sum(reason is not None for reason in first)
        if not good:
            self._stop("no sample is usable")
        if bad > len(first) / 2:
            self._stop(f"{bad:,} of the first {len(first):,} samples are unusable")
        # Arrays, not lists: workers share them with the main process without copying.
        self.keys = np.array([key.encode() for key, *_ in good])                     # (N,)
        self.parts = np.array([parts for _, *parts in good], dtype=np.int64)         # (N, 3, 3)

    def _filter(self, filters):
        passed = []
        for index in tqdm(range(len(self)), desc="filters", unit="json", delay=1, leave=False):
            try:
                reason = rejected(self.meta(index), filters)
            except BadSample as error:
                reason = str(error).partition(":")[0]
            passed.append(reason is None)
            if reason is not None:
                self.problems.append((reason, self.key(index)))
        self.keys, self.parts = self.keys[passed], self.parts[passed]
        if not any(passed):
            self._stop("no sample passes the filters")

    def _stop(self, what):
        found = ", ".join(f"{n} x {reason}" for reason, n in self.counts().items())
        example = f" (such as {self.problems[0][1]})" if self.problems else ""
        raise UsageError(
            f"{self.source}: {what}; found {found or 'nothing'}{example}; expected a folder of "
            "tars, a quoted pattern such as \"shards/{00000..00099}.tar\" (in them KEY.jpg|jpeg|"
            "png|webp and KEY.txt), a folder of images each with NAME.txt, or one with "
            "metadata.jsonl (file_name, text).")

    def counts(self):
        """-> {reason: number} of all that the index left out."""
        return dict(collections.Counter(reason for reason, _ in self.problems))

    def describe(self):
        """What was found, and what was left out and why, in a few lines."""
        kind = f"{len(self.shards):,} shard(s)" if self.shards else "a folder of images"
        lines = [f"{self.source}: {kind}, {len(self):,} samples"]
        for reason, number in self.counts().items():
            names = [where for what, where in self.problems if what == reason][:3]
            lines.append(f"  {number:,} x {reason}: {', '.join(names)}"
                         + (", ..." if number > 3 else ""))
        return "\n".join(lines)

    def __len__(self):
        return len(self.keys)

    def key(self, index):
        return self.keys[index].decode()

    def read(self, index, kind):
        """The bytes of one part of a sample (0 image, 1 txt, 2 json), or None."""
        number, offset, size = (int(n) for n in self.parts[index, kind])
        if number < 0:
            return None
        owner, handles = self._handles
        if owner != os.getpid():  # each process opens its own: a shared one shares its position
            handles = {}
            self._handles = (os.getpid(), handles)
        path = self.files[number]
        try:
            if path not in handles:
                while len(handles) >= OPEN_FILES:
                    handles.pop(next(iter(handles))).close()
                handles[path] = open(path, "rb")
            handles[path].seek(offset)
            data = handles[path].read(size)
        except OSError as error:
            raise BadSample(f"cannot be read: {error}") from None
        if len(data) != size:
            raise BadSample(f"file ended early: {path}")
        return data

    def __getstate__(self):
        return {**self.__dict__, "_handles": (None, {})}  # open files do not travel to workers

    def caption(self, index):
        data = self.read(index, 1)
        text = data.decode("utf-8-sig", errors="replace")
        if self.parts[index, 1, 0] == self.parts[index, 2, 0] and not self.shards:
            text = json.loads(text).get("text")  # this "txt" is a line of metadata.jsonl
            if not isinstance(text, str):
                raise BadSample('no caption: no "text" in its line of metadata.jsonl')
        return " ".join(text.split())

    def meta(self, index):
        data = self.read(index, 2)
        try:
            found = json.loads(data) if data else {}
        except ValueError as error:
            raise BadSample(f"json cannot be read: {error}") from None
        return found if isinstance(found, dict) else {}

    def __getitem__(self, where):
        return self._sample(where, self._crop(where))

    def _crop(self, where):
        """The crop of a batch whose first sample is at `where`."""
        if not isinstance(self.crop, list):
            return self.crop
        epoch, index = where if isinstance(where, tuple) else (0, where)
        rng = np.random.default_rng((self.seed, epoch, index, 1))  # 1: not the place of the crop
        return self.crop[rng.integers(len(self.crop))]

    def _sample(self, where, crop):
        epoch, index = where if isinstance(where, tuple) else (0, where)
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        index = int(index) % len(self)
        try:
            return {"image": torch.from_numpy(self.load(epoch, index, crop)),
                    "caption": self.caption(index), "key": self.key(index), "index": index,
                    "meta": self.meta(index)}
        except BadSample as error:
            return {"index": index, "key": self.key(index), "failed": str(error)}

    def load(self, epoch, index, crop):
        """The image as a uint8 array (3, H, W)."""
        image = decode(self.read(index, 0), self.resize)
        rng = None if self.center else np.random.default_rng((self.seed, epoch, index))
        pixels = np.asarray(fit(image, self.resize, crop, rng))                      # (H, W, 3)
        # Turned in numpy: torch would wake its threads for each image, slow on a busy CPU.
        return np.ascontiguousarray(pixels.transpose(2, 0, 1))                       # (3, H, W)

    def __getitems__(self, wheres):
        """A whole batch at once (DataLoader calls this): failed samples leave it smaller."""
        crop = self._crop(wheres[0])
        samples = [self._sample(where, crop) for where in wheres]
        good = [sample for sample in samples if "failed" not in sample]
        sizes = {tuple(sample["image"].shape[1:]) for sample in good}
        if len(sizes) > 1:
            raise UsageError(f"{self.source}: one batch holds images of different sizes "
                            f"{sorted(sizes)[:3]}; give a crop, so that they can be stacked.")
        return {
            "images": torch.stack([sample["image"] for sample in good]) if good else None,
            "captions": [sample["caption"] for sample in good],
            "keys": [sample["key"] for sample in good],
            "indices": [sample["index"] for sample in good],
            "failed": [(sample["key"], sample["failed"])
                       for sample in samples if "failed" in sample],
        }


class CaptionedLatents(CaptionedImages):
    """Shards that `python semantic_compressor.py` wrote: KEY.npy, a latent, in place of an image.

    dataset[index]["image"] is float16 (16, h, w), standardised; resize and crop have no effect.
    """

    suffixes = ("npy",)

    def load(self, epoch, index, crop):
        try:
            return np.load(io.BytesIO(self.read(index, 0)), allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise BadSample(f"cannot be decoded: {error}") from None


# ---- Batches -------------------------------------------------------------------------------------

class EpochBatches(Sampler):
    """Endless lists of (epoch, index): a rank's slices of the global batches from `position`.

    Epochs follow each other without a seam, so a global batch may hold the end of one and the
    beginning of the next, and every batch is full.
    """

    def __init__(self, length, batch_size, seed=0, position=(0, 0), rank=0, world=1):
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.rank, self.world = rank, world
        self.position = divmod(position[0] * length + position[1], length)

    def order(self, epoch):
        return np.random.default_rng((self.seed, epoch)).permutation(self.length)

    def after(self, batches):
        """The position (epoch, sample) when so many batches have been taken."""
        epoch, sample = self.position
        return divmod(epoch * self.length + sample + batches * self.batch_size * self.world,
                      self.length)

    def __iter__(self):
        def all_samples():
            first, begin = self.position
            for epoch in itertools.count(first):
                for index in self.order(epoch)[begin if epoch == first else 0:]:
                    yield epoch, int(index)

        samples = all_samples()
        while True:
            batch = list(itertools.islice(samples, self.batch_size * self.world))
            yield batch[self.rank * self.batch_size:(self.rank + 1) * self.batch_size]


class Failures:
    """Counts unreadable samples by reason, names each once, and stops a hopeless run."""

    def __init__(self, dataset):
        self.source, self.trial = dataset.source, min(1000, len(dataset))
        self.seen, self.bad, self.in_a_row, self.named = 0, 0, 0, set()
        self.counts = collections.Counter()

    def note(self, batch):
        on_trial = self.seen < self.trial
        self.seen += len(batch["keys"]) + len(batch["failed"])
        self.bad += len(batch["failed"])
        self.in_a_row = 0 if batch["keys"] else self.in_a_row + len(batch["failed"])
        for key, failed in batch["failed"]:
            self.counts[failed.partition(":")[0]] += 1
            if key not in self.named:
                self.named.add(key)
                if len(self.named) <= 20 or len(self.named) % 1000 == 0:  # ours: no flood
                    tqdm.write(f"{self.source}: left out {key}: {failed} "
                               f"({len(self.named)} so far)", file=sys.stderr)
        if (on_trial and self.bad > self.trial / 2) or self.in_a_row >= 1000:
            reasons = ", ".join(f"{n} x {reason}" for reason, n in self.counts.most_common())
            raise UsageError(f"{self.source}: {self.bad} of {self.seen} samples cannot be used "
                            f"({reasons}), such as {batch['failed'][-1][0]}; expected at most "
                            "half (python data.py look shows what is there).")


def ignore_interrupt(worker):
    """Ctrl-C is for the main process: it saves first."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _loader(dataset, batch_sampler, workers):
    # Its own generator: without one, DataLoader draws a seed from the global random stream, and
    # a run would depend on how often it was resumed.
    return DataLoader(dataset, batch_sampler=batch_sampler, num_workers=workers,
                      collate_fn=_as_it_is, worker_init_fn=ignore_interrupt,
                      generator=torch.Generator().manual_seed(0))


def _as_it_is(batch):
    return batch  # __getitems__ has stacked it already


def _finish(batch):
    """Workers send bytes (a quarter of the traffic); the model gets floats in [0, 1]."""
    images = batch.get("images")
    if images is not None:                                                           # (B, C, H, W)
        batch["images"] = images.float() / 255 if images.dtype == torch.uint8 else images.float()
    return batch


def stream(dataset, batch_size, seed=0, position=(0, 0), rank=0, world=1, workers=0):
    """Batches without end: dicts of
        images    float32 (B, 3, H, W) in [0, 1]; from a Memory instead `remembered`, its tensors
        captions  [str], keys [str], indices [int], failed [(key, reason)]
        position  (epoch, sample) after this batch: a stream begun there goes on with the next.
    A batch without any usable sample is passed over.
    """
    batches = EpochBatches(len(dataset), batch_size, seed, tuple(position), rank, world)
    failures = Failures(dataset)
    for taken, batch in enumerate(_loader(dataset, batches, workers), 1):
        failures.note(batch)
        if batch["keys"]:
            yield {**_finish(batch), "position": batches.after(taken)}


def preview_batch(dataset, n, device="cpu"):
    """The first n samples of the dataset's stream as a batch, each the middle of its image."""
    centred = copy.copy(dataset)
    centred.center = True
    batch = next(stream(centred, n, dataset.seed))
    return {**batch, "images": batch["images"].to(device)}


class Stream:
    """stream() with a position that a checkpoint keeps: has state_dict() and load_state_dict().

    config: a stage's Config, of which batch_size, seed and workers count. Each process of a
    distributed run gets its own slice of every global batch.
    """

    def __init__(self, dataset, config):
        self.dataset, self.config, self.position, self.batches = dataset, config, (0, 0), None

    def __iter__(self):
        return self

    def __next__(self):
        if self.batches is None:                          # not before a checkpoint could be read
            ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
            workers = 0 if isinstance(self.dataset, Memory) else self.config.workers
            self.batches = stream(self.dataset, self.config.batch_size, self.config.seed,
                                  self.position, *ranks, workers)
        batch = next(self.batches)
        self.position = batch["position"]
        return batch

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.position = tuple(state["position"])


class Memory(Dataset):
    """What remember() made of a dataset: one tensor per result of encode, in index order."""

    def __init__(self, dataset):
        self.source, self.length = dataset.source, len(dataset)
        self.tensors = None                        # tuple of (N, ...)
        self.captions = [""] * self.length
        self.keys = [dataset.key(i) for i in range(self.length)]
        self.failed = {}                           # index -> reason

    def put(self, batch, results):
        results = [x.detach().half() if x.is_floating_point() else x.detach() for x in results]
        rows = torch.tensor(batch["indices"])
        if self.tensors is None:
            self.tensors = tuple(torch.zeros(self.length, *x.shape[1:], dtype=x.dtype)
                                 for x in results)
        for kept, x in zip(self.tensors, results):
            if x.is_floating_point() and not torch.isfinite(x).all():
                raise UsageError(f"{self.source}: encoding {batch['keys'][0]} and those after it "
                                "gave numbers that float16 cannot hold; expected up to 65,504.")
            kept[rows] = x.to("cpu")
        for index, caption in zip(batch["indices"], batch["captions"]):
            self.captions[index] = caption

    def key(self, index):
        return self.keys[index]

    def caption(self, index):
        return self.captions[index]

    def __len__(self):
        return self.length

    def __getitem__(self, where):
        return self.__getitems__([where])

    def __getitems__(self, wheres):
        indices = [where[1] if isinstance(where, tuple) else where for where in wheres]
        good = [i for i in indices if i not in self.failed]
        rows = torch.tensor(good, dtype=torch.long)
        taken = (kept.index_select(0, rows) for kept in self.tensors)
        return {
            "remembered": tuple(x.float() if x.is_floating_point() else x for x in taken),
            "captions": [self.captions[i] for i in good], "keys": [self.keys[i] for i in good],
            "indices": good,
            "failed": [(self.keys[i], self.failed[i]) for i in indices if i in self.failed],
        }


def remember(dataset, encode, batch_size=64, workers=0, label="encode"):
    """Run encode(batch) -> tuple of tensors (B, ...) once over everything, keep it in memory.

    For what does not change while a stage trains. Images come with the crops of epoch 0, or
    centred where the dataset has center=True. Floats are kept as float16, half the memory;
    -> a Memory, which stream() takes in place of dataset.
    """
    memory, failures = Memory(dataset), Failures(dataset)
    with tqdm(total=len(dataset), desc=label, unit="img") as bar:
        for indices, batch in once(dataset, range(len(dataset)), batch_size, workers):
            failures.note(batch)
            reasons = iter(batch["failed"])
            memory.failed.update((i, next(reasons)[1])
                                 for i in indices if i not in set(batch["indices"]))
            if batch["keys"]:
                with torch.no_grad():
                    memory.put(batch, encode(batch))
            bar.update(len(indices))
    return memory


def once(dataset, indices, batch_size, workers=0):
    """(indices, batch) for all of `indices`, in order, once; batches as from stream()."""
    parts = [list(indices[i:i + batch_size]) for i in range(0, len(indices), batch_size)]
    for part, batch in zip(parts, _loader(dataset, parts, workers)):
        yield part, _finish(batch)


# ---- Text encoder: captions -> un-pooled tokens after the final layer norm -----------------------

POCKET_TEXT = os.path.join(os.path.dirname(os.path.abspath(shapes.__file__)), "text.safetensors")
END_OF_TEXT = 49407  # CLIP's vocabulary; laion's tokenizers for H-14 and bigG-14 also pad with it

TEXT_ENCODERS = {
    # ours: small enough for a CPU; 24 positions hold every caption of pocket/shapes.py
    "pocket": {"width": 128, "heads": 4, "layers": 2, "length": 24},
    # open_clip's model configs; Stage B and the paper's Stage C, then the released Stage C
    "clip-h": {"width": 1024, "heads": 16, "layers": 24, "length": 77,
               "hub": ("ViT-H-14", "laion2b_s32b_b79k", "3.9 GB")},
    "clip-bigg": {"width": 1280, "heads": 20, "layers": 32, "length": 77,
                  "hub": ("ViT-bigG-14", "laion2b_s39b_b160k", "10.2 GB")},
}


class TextEncoder(nn.Module):
    """Frozen: encoder(["a red star", ""]) -> float32 (B, L, D), after the final layer norm.

    Padded as the released models were trained (Hugging Face's CLIP tokenizer and text model): up
    to L with the token `pad`, and nothing attends to a padded position. What comes out at those
    positions still goes on to Stages B and C, which attend to all L. (pocket/teach_text.py alone
    unfreezes layers: then what comes out has a gradient.)
    """

    def __init__(self, name, tower, tokenizer, pad):
        super().__init__()
        self.name, self.tower, self.tokenizer, self.pad = name, tower, tokenizer, pad
        self.width, self.length = tower.width, tower.context_length
        self.eval().requires_grad_(False)

    def train(self, mode=True):
        return super().train(False)  # frozen: stays in eval mode inside a model that trains

    @functools.cached_property
    def checksum(self):
        """sha256 of weights and padding: a checkpoint keeps it, so that sampling uses the same."""
        digest = hashlib.sha256(f"padded with {self.pad}, masked".encode())
        for name, parameter in sorted(self.tower.state_dict().items()):
            digest.update(name.encode())
            digest.update(parameter.float().cpu().numpy().astype("<f4").tobytes())
        return digest.hexdigest()

    def tokens(self, captions):
        """[str] -> ids (B, L) int64; real (B, L) bool, False where there is padding."""
        ids = self.tokenizer(list(captions), context_length=self.length)
        ends = ids == END_OF_TEXT
        real = ends.cumsum(1) - ends.long() == 0  # up to and with the first end of text
        return torch.where(real, ids, self.pad), real

    def forward(self, captions):
        tower = self.tower
        ids, real = (x.to(tower.positional_embedding.device) for x in self.tokens(captions))
        mask = tower.attn_mask.masked_fill(~real[:, None], float("-inf"))            # (B, L, L)
        x = tower.token_embedding(ids) + tower.positional_embedding                  # (B, L, D)
        x = tower.transformer(x, attn_mask=mask.repeat_interleave(tower.heads, 0))
        return tower.ln_final(x).float()


def text_encoder(name="pocket", weights=None, device="cpu", expected_width=None):
    """The text encoder of that name: pocket (built in), clip-h or clip-bigg.

    weights: for CLIP, None for the hub, or a local path: an open_clip checkpoint, a folder
    text_encoder/ as transformers writes it (its size is read from config.json, its padding from the
    folder tokenizer/ beside it), or a folder that holds either under the encoder's name.
    Raises UsageError.
    """
    if name not in TEXT_ENCODERS:
        raise UsageError(f"text encoder {name!r} is not known; expected one of "
                        f"{', '.join(TEXT_ENCODERS)}.")
    size, pad = TEXT_ENCODERS[name], END_OF_TEXT
    if name != "pocket" and weights and os.path.isdir(weights):
        named = sorted(glob.glob(os.path.join(glob.escape(weights), f"{name}*")))
        weights = named[0] if named else weights
    folder = name != "pocket" and weights and os.path.isdir(weights)
    if folder:
        size, pad = _transformers_config(weights)
    # Imported here: it takes seconds, and most commands never need it.
    from open_clip.tokenizer import SimpleTokenizer
    from open_clip.transformer import TextTransformer

    with torch.device("meta"):  # no memory and no random numbers for what is replaced at once
        tower = TextTransformer(context_length=size["length"], width=size["width"],
                                heads=size["heads"], layers=size["layers"], output_dim=None,
                                mlp_ratio=size.get("mlp_ratio", 4.0))
    state = (_pocket_weights(tower) if name == "pocket" else
             _transformers_weights(weights) if folder else _clip_weights(name, weights, size))
    try:
        tower.load_state_dict(state, assign=True)
    except RuntimeError as error:
        detail = str(error).splitlines()[-1].strip()[:160]
        raise UsageError(f"{weights}: is not the text tower of {name}, {size['width']} wide with "
                        f"{size['layers']} layers: {detail}.") from None
    tower.attn_mask = tower.build_causal_mask()  # not part of the state, so still on "meta"
    if expected_width not in (None, tower.width):
        raise UsageError(f"--text-encoder {name} gives tokens {tower.width} wide, expected "
                         f"--text-width {expected_width}")
    return TextEncoder(name, tower.float(), SimpleTokenizer(), pad).to(device)


def _pocket_weights(tower):
    """The random weights below; in its layers those that pocket/teach_text.py taught, if there."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    state = random_text_weights(tower)
    if os.path.exists(POCKET_TEXT):
        try:
            taught = {name: value.float() for name, value in load_file(POCKET_TEXT).items()}
        except (OSError, SafetensorError) as error:
            raise UsageError(f"{POCKET_TEXT}: not a readable text tower ({error}).") from None
        expected, found = ({name: tuple(value.shape) for name, value in tensors.items()
                            if tensors is taught or name.startswith("transformer.")}
                           for tensors in (state, taught))
        if expected != found:
            name = sorted(name for name, _ in expected.items() ^ found.items())[0]
            raise UsageError(f"{POCKET_TEXT}: expected the {len(expected)} tensors of the pocket "
                            f"tower's layers; of {name} it has {found.get(name)}, expected "
                            f"{expected.get(name)}.")
        state |= taught
    return state


def random_text_weights(tower):
    """Random weights that are the same on every machine: a fixed code for captions, not CLIP.

    Uniform numbers of a given standard deviation: RandomState's stream is frozen for good, and
    a uniform draw needs no logarithm, whose last digit may differ between machines.
    """
    rng, state = np.random.RandomState(24), {}
    for name, parameter in sorted(tower.state_dict().items()):
        if parameter.ndim == 1:  # layer norms and biases
            value = np.full(parameter.shape, float(name.endswith("weight")))
        else:
            std = {"token_embedding.weight": 1.0, "positional_embedding": 0.5}.get(name)
            if std is None:
                std = 1 / np.sqrt(parameter.shape[1])  # fan-in
                if name.endswith(("out_proj.weight", "c_proj.weight")):
                    std *= 0.5  # branches add to the words, they do not drown them
            value = (rng.random_sample(tuple(parameter.shape)) * 2 - 1) * (np.sqrt(3) * std)
        state[name] = torch.from_numpy(value.astype(np.float32))
    return state


def _clip_weights(name, weights, size):
    """The text tower's part of an open_clip checkpoint, from the file or from the hub."""
    from safetensors import SafetensorError, safe_open

    model, tag, download = size["hub"]
    wanted = ("positional_embedding", "token_embedding.", "transformer.", "ln_final.")
    try:
        path = os.fspath(weights or _from_hub(model, tag))
        if not os.path.isfile(path):
            raise FileNotFoundError(f"there is no file {path}")
        if path.endswith(".safetensors"):
            with safe_open(path, framework="pt") as file:  # only what is asked for
                names = {key: _short(key) for key in file.keys()}
                return {short: file.get_tensor(key) for key, short in names.items()
                        if short.startswith(wanted)}
        state = torch.load(path, map_location="cpu", weights_only=True)
        state = state.get("state_dict", state)
        return {_short(key): x for key, x in state.items() if _short(key).startswith(wanted)}
    except (OSError, RuntimeError, ValueError, AttributeError, EOFError,
            SafetensorError, pickle.UnpicklingError) as error:
        reason = str(error).partition("\n")[0].partition(". ")[0][:160].rstrip(". ")
        raise UsageError(
            f"The CLIP weights of {name} ({model}, {tag}) could not be loaded ({reason}): give "
            "their file with --clip /path/open_clip_model.safetensors, or go online once "
            f"({download}), or use --preset pocket, which needs no CLIP.") from None


def _transformers_config(folder):
    """config.json of a CLIPTextModel -> (sizes as in TEXT_ENCODERS, id of the padding token)."""
    path = os.path.join(folder, "config.json")
    try:
        with open(path, encoding="utf-8") as file:
            config = json.load(file)
        size = {"width": config["hidden_size"], "heads": config["num_attention_heads"],
                "layers": config["num_hidden_layers"], "length": config["max_position_embeddings"],
                "mlp_ratio": config["intermediate_size"] / config["hidden_size"]}
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(f"{path}: expected the configuration of a CLIPTextModel, as transformers "
                        f"writes it ({error!r}).") from None
    if config.get("hidden_act", "gelu") != "gelu":
        raise UsageError(f"{path}: hidden_act is {config['hidden_act']!r}, expected gelu, as in "
                        "the CLIP towers of laion.")
    token, ids = "<|endoftext|>", {"<|endoftext|>": END_OF_TEXT, "!": 0}
    beside = os.path.join(os.path.dirname(os.path.normpath(folder)), "tokenizer")
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        path = os.path.join(beside, name)
        if os.path.isfile(path):
            with open(path, encoding="utf-8") as file:
                found = json.load(file).get("pad_token") or token
            token = found["content"] if isinstance(found, dict) else found
            break
    if token not in ids:
        raise UsageError(f"{path}: pads with {token!r}, expected one of {', '.join(ids)}.")
    return size, ids[token]


def _transformers_weights(folder):
    """The weights of a CLIPTextModel, by the names that open_clip gives them."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = os.path.join(folder, "model.safetensors")
    try:
        if os.path.isfile(path):
            found = load_file(path)
        else:
            path = os.path.join(folder, "pytorch_model.bin")
            found = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, SafetensorError,
            pickle.UnpicklingError) as error:
        raise UsageError(f"{folder}: expected a model.safetensors (or pytorch_model.bin) that can "
                        f"be read: {str(error).splitlines()[0][:160]}.") from None
    state = {}
    for name, value in found.items():
        name = name.removeprefix("text_model.")
        for theirs, ours in (
                ("embeddings.token_embedding.", "token_embedding."),
                ("embeddings.position_embedding.weight", "positional_embedding"),
                ("encoder.layers.", "transformer.resblocks."), ("layer_norm1.", "ln_1."),
                ("layer_norm2.", "ln_2."), ("self_attn.out_proj.", "attn.out_proj."),
                ("mlp.fc1.", "mlp.c_fc."), ("mlp.fc2.", "mlp.c_proj."),
                ("final_layer_norm.", "ln_final.")):
            name = name.replace(theirs, ours)
        state[name] = value
    for name in [name for name in state if ".self_attn.q_proj." in name]:  # q, k, v: one matrix
        parts = [state.pop(name.replace(".q_proj.", f".{part}_proj.")) for part in "qkv"]
        state[name.replace("self_attn.q_proj.", "attn.in_proj_")] = torch.cat(parts)
    return {name: value for name, value in state.items()
            if name != "embeddings.position_ids"}  # a buffer of older transformers


def _short(key):
    """Names of a model in DistributedDataParallel, or with a separate text tower, as in CLIP."""
    return key.removeprefix("module.").removeprefix("text.")


def _from_hub(model, tag):
    """-> path of the checkpoint in the hub's cache, downloaded first if it is not there."""
    import huggingface_hub
    from open_clip.pretrained import download_pretrained, get_pretrained_cfg

    config = get_pretrained_cfg(model, tag)
    for file in ("open_clip_model.safetensors", "open_clip_pytorch_model.bin"):
        found = huggingface_hub.try_to_load_from_cache(config["hf_hub"].strip("/"), file)
        if isinstance(found, str):
            return found
    check_hub()
    return download_pretrained(config)


def check_hub():
    """FileNotFoundError with a sentence if Hugging Face's hub is out of reach."""
    from huggingface_hub import constants

    hub = constants.ENDPOINT
    if constants.HF_HUB_OFFLINE:
        raise FileNotFoundError("they are not in the cache and HF_HUB_OFFLINE is set")
    try:  # the hub's own client retries for a minute before it says that there is no network
        urllib.request.urlopen(hub, timeout=10).close()
    except urllib.error.HTTPError:
        pass  # it answered, so it is there
    except OSError as error:
        raise FileNotFoundError(f"they are not in the cache and {hub} cannot be reached: "
                                f"{getattr(error, 'reason', error)}") from None


# ---- Commands: shapes, pack, look ----------------------------------------------------------------

def write_tar(path, samples):
    """samples: [(key, {suffix: bytes})] -> one tar; the same samples give the same bytes."""
    with tarfile.open(f"{path}.tmp", "w", format=tarfile.USTAR_FORMAT) as archive:
        for key, parts in samples:
            for suffix, data in parts.items():
                member = tarfile.TarInfo(f"{key}.{suffix}")  # time 0, owner 0
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    os.replace(f"{path}.tmp", path)  # a shard is there whole or not at all


def _sample(key, suffix, image_bytes, size, caption, extra):
    """The three members of one sample, in the layout of img2dataset."""
    width, height = size
    facts = {**extra, "caption": caption, "key": key, "width": width, "height": height,
             "original_width": width, "original_height": height}
    return key, {suffix: image_bytes, "txt": caption.encode(),
                 "json": json.dumps(facts, ensure_ascii=False).encode()}


def _draw_shard(job):
    """Draw one shard of the built-in data (runs in a worker process) -> number of samples."""
    path, number, indices, split, seed, size = job
    samples = []
    for place, index in enumerate(indices):
        rng = shapes.scene_rng(seed, split, index)
        scene = shapes.draw_scene(rng, split, count=1 + index % 2)
        caption = shapes.caption(scene, rng)
        png = io.BytesIO()
        shapes.render(scene, size).save(png, "PNG", compress_level=1)  # ours: fast, small enough
        samples.append(_sample(f"{number:05d}{place:04d}", "png", png.getvalue(), (size, size),
                               caption, {**scene, "split": split, "seed": seed, "index": index}))
    write_tar(path, samples)
    return len(samples)


def make_shapes(out, count=20_000, split="train", size=128, seed=0, workers=2, per_shard=500):
    """Write the built-in drawings as shards; a run that was stopped goes on where it was."""
    os.makedirs(out, exist_ok=True)
    settings = {"count": count, "split": split, "size": size, "seed": seed,
                "per_shard": per_shard, "grammar": shapes.VERSION}
    note, found = os.path.join(out, "shapes.json"), None
    if os.path.isfile(note):
        with open(note, encoding="utf-8") as file:
            found = json.load(file)
    if found != settings and (found or glob.glob(os.path.join(glob.escape(out), "*.tar"))):
        raise UsageError(f"{out}: holds other data ({found or 'tars without a shapes.json'}), "
                        f"expected an empty folder or the drawings of {settings}.")
    with open(f"{note}.tmp", "w", encoding="utf-8") as file:
        json.dump(settings, file)
    os.replace(f"{note}.tmp", note)
    jobs = []
    for number, first in enumerate(range(0, count, per_shard)):
        path = os.path.join(out, f"{number:05d}.tar")
        if not os.path.exists(path):
            indices = range(first, min(first + per_shard, count))
            jobs.append((path, number, indices, split, seed, size))
    missing = sum(len(job[2]) for job in jobs)
    quiet = (signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent alone
    with tqdm(total=count, initial=count - missing, desc=f"{split} drawings", unit="img") as bar:
        if workers > 1:
            with multiprocessing.Pool(workers, signal.signal, quiet) as pool:
                for drawn in pool.imap_unordered(_draw_shard, jobs):
                    bar.update(drawn)
        else:
            for job in jobs:
                bar.update(_draw_shard(job))
    print(f"{out}: {count:,} drawings of {size} px, split {split}, "
          f"in {-(-count // per_shard)} shards; see them with: python data.py look {out}")


def pack(folder, out, per_shard=1000):
    """A folder of captioned images -> shards; jpg, png and webp are copied byte for byte."""
    if os.path.exists(out) and (not os.path.isdir(out) or os.listdir(out)):
        raise UsageError(f"{out}: is there already and not empty; expected a new folder "
                        "(nothing is overwritten).")
    dataset = CaptionedImages(folder, report=False)
    if dataset.shards:
        raise UsageError(f"{folder}: holds shards already; expected a folder of images.")
    print(dataset.describe())
    part = f"{os.path.normpath(out)}.part"  # takes the final name only when all is written
    os.makedirs(part, exist_ok=True)
    for old in glob.glob(os.path.join(glob.escape(part), "*.tar*")):
        os.remove(old)
    failures, shard, written = Failures(dataset), [], 0
    for index in tqdm(range(len(dataset)), desc="pack", unit="img"):
        try:
            data = dataset.read(index, 0)
            image = decode(data)  # all of it, so that no broken file gets into a shard
            caption, extra = dataset.caption(index), dataset.meta(index)
        except BadSample as error:
            failures.note({"keys": [], "failed": [(dataset.key(index), str(error))]})
            continue
        failures.note({"keys": [dataset.key(index)], "failed": []})
        suffix = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}.get(
            Image.open(io.BytesIO(data)).format)
        if suffix is None:
            png = io.BytesIO()
            image.save(png, "PNG")
            suffix, data = "png", png.getvalue()
        number, place = divmod(written, per_shard)
        shard.append(_sample(f"{number:05d}{place:04d}", suffix, data, image.size, caption,
                             {**extra, "source": dataset.key(index)}))
        written += 1
        if len(shard) == per_shard:
            write_tar(os.path.join(part, f"{number:05d}.tar"), shard)
            shard = []
    if shard:
        write_tar(os.path.join(part, f"{written // per_shard:05d}.tar"), shard)
    if os.path.isdir(out):
        os.rmdir(out)
    os.makedirs(os.path.dirname(os.path.abspath(out)), exist_ok=True)
    os.rename(part, out)
    left = "".join(f"; left out {n} x {reason}" for reason, n in failures.counts.items())
    print(f"{out}: {written:,} samples in {-(-written // per_shard)} shard(s){left}; "
          f"see them with: python data.py look {out}")


def look(source, out="look.png", pictures=24, check=1000):
    """Print what a source holds, and write a contact sheet of some of it."""
    dataset = CaptionedImages(source, report=False)
    print(dataset.describe())
    spread = np.linspace(0, len(dataset) - 1, min(check, len(dataset))).round().astype(int)
    good, bad, sizes, words = [], collections.Counter(), collections.Counter(), []
    for index in tqdm(spread, desc="decode", unit="img", delay=1, leave=False):
        sample = dataset[int(index)]
        if "failed" in sample:
            reason = sample["failed"]
            bad[reason.partition(":")[0]] += 1
            if sum(bad.values()) <= 5:
                print(f"  unreadable: {sample['key']}: {reason}")
            continue
        sizes[tuple(sample["image"].shape[:0:-1])] += 1
        words.append(len(sample["caption"].split()))
        good.append(int(index))
    part = "all" if len(spread) == len(dataset) else f"{len(spread):,} of {len(dataset):,}"
    print(f"  decoded {part}: {len(good):,} readable"
          + "".join(f", {n:,} x {reason}" for reason, n in bad.items()))
    if not good:
        raise UsageError(f"{source}: none of {len(spread):,} samples can be decoded.")
    print("  sizes (width x height): "
          + ", ".join(f"{w} x {h} ({n:,})" for (w, h), n in sizes.most_common(5))
          + (f" and {len(sizes) - 5:,} others" if len(sizes) > 5 else ""))
    print(f"  captions: {min(words)} to {max(words)} words, on average {np.mean(words):.1f}")
    known, twice = set(), 0
    for index in tqdm(range(len(dataset)), desc="json", unit="img", delay=1, leave=False):
        try:
            meta = dataset.meta(index)
        except BadSample:
            continue
        name = meta.get("sha256") or meta.get("hash")
        twice += name in known
        known |= {name} - {None}
    if known:
        print(f"  by sha256 or hash: {len(known):,} different images, {twice:,} are there again")
    chosen = [good[i] for i in np.linspace(0, len(good) - 1, min(pictures, len(good))).astype(int)]
    for index in chosen[:5]:
        print(f"    {dataset.key(index)}: {dataset.caption(index)}")
    contact_sheet(dataset, chosen).save(out)
    print(f"  contact sheet: {out}")


def contact_sheet(dataset, indices, cell=160, columns=6):
    """Thumbnails with their captions below, as one image."""
    rows = -(-len(indices) // columns)
    sheet = Image.new("RGB", (columns * (cell + 8), rows * (cell + 62)), "white")
    draw = ImageDraw.Draw(sheet)
    for place, index in enumerate(indices):
        left, top = place % columns * (cell + 8) + 4, place // columns * (cell + 62) + 4
        image = decode(dataset.read(index, 0))
        image.thumbnail((cell, cell))
        sheet.paste(image, (left + (cell - image.width) // 2, top))
        lines = textwrap.wrap(dataset.caption(index), 27)[:4]
        text = "\n".join(lines).encode("latin-1", "replace").decode("latin-1")
        draw.text((left, top + cell + 2), text, fill="black")
    return sheet


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("look", help="print what a source holds, write a contact sheet")
    command.add_argument("source", nargs="+", help="folder, tar, or quoted pattern")
    command.add_argument("--out", default="look.png", help="contact sheet (default: %(default)s)")
    command = commands.add_parser("pack", help="a folder of captioned images -> shards")
    command.add_argument("folder", help="images with NAME.txt, or with metadata.jsonl")
    command.add_argument("--out", required=True, help="new folder for the shards")
    command.add_argument("--per-shard", type=int, default=1000)
    command = commands.add_parser("shapes", help="write the built-in drawings as shards")
    command.add_argument("--out", required=True, help="folder for the shards")
    command.add_argument("--count", type=int, default=20_000)
    command.add_argument("--split", choices=("train", "heldout"), default="train")
    command.add_argument("--size", type=int, default=128, help="pixels")
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--workers", type=int, default=2)
    command.add_argument("--per-shard", type=int, default=500)
    given = vars(parser.parse_args(arguments))
    chosen = given.pop("command")
    try:
        for name in ("count", "size", "per_shard"):
            if given.get(name, 1) < 1 or (name == "per_shard" and given.get(name, 1) > 10_000):
                raise UsageError(f"--{name.replace('_', '-')} {given[name]}: expected a number "
                                "from 1 (a shard holds at most 10,000).")
        if chosen == "look":
            if len(given["source"]) > 1:
                raise UsageError(f"look: takes one source but got {len(given['source'])}, as when "
                                "the shell expands a pattern; put it in quotes.")
            look(given["source"][0], given["out"])
        else:
            (pack if chosen == "pack" else make_shapes)(**given)
    except (UsageError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("\nstopped; the same command goes on (shapes) or begins again (pack)")


if __name__ == "__main__":
    main()
