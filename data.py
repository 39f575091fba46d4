"""
Captioned images in, batches out.

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

An epoch is one seeded permutation of all samples: no shuffle buffer, no sample twice or never, any
number of shards with any number of workers, and a position (epoch, sample) from which a stopped run
goes on exactly. What cannot be read is left out, counted by reason and named; a source that is
mostly unreadable stops the run.

    B  batch      H W  height and width in pixels

    python -m pocket.shapes --out shards/shapes            the built-in drawings
    python -m tools.look shards/shapes                     what is in there, as text and as a PNG
    python -m tools.pack my_pictures --out shards/mine     your own pictures -> shards
"""

import collections
import copy
import io
import itertools
import json
import math
import os
import signal
import struct
import sys
import warnings
import zlib

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageOps, UnidentifiedImageError
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm import tqdm

from plumbing import tars
from plumbing.cli import UsageError

MAX_PIXELS = 89_000_000  # ours: just below the size at which Pillow itself begins to warn


class BadSample(Exception):
    """One sample cannot be used: 'reason' or 'reason: detail'."""


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
    """All samples of a source, by number. Raises UsageError if most of them cannot be used.

    resize: the shorter side in pixels (None: kept). crop: int or (H, W), at a place that follows
    from (seed, epoch, index), or in the middle with center=True; an image too small for its crop is
    enlarged. Of a list of crops each batch has one, drawn for all its samples.
    filters: see filters(). dataset[index] or dataset[epoch, index] is a dict of
        image    uint8 (3, H, W)          caption  str          meta  dict, from the .json
        key      str                      index    int
    or, when this sample cannot be read, of index, key and failed="reason: detail".
    """

    suffixes = tars.IMAGE_SUFFIXES

    def __init__(self, source, resize=None, crop=None, seed=0, center=False, filters=None,
                 report=True):
        self.source, self.resize, self.crop = os.fspath(source), resize, crop
        self.seed, self.center = seed, center
        # problems: [(reason, where)] of all that is left out
        files, rows, self.problems, in_tars = tars.find_samples(self.source, self.suffixes)
        self.shards, self._reader = files if in_tars else [], tars.Reader(files)
        # Arrays, not lists: workers share them with the main process without copying.
        self.keys = np.array([key.encode(errors="replace") for key, *_ in rows])     # (N,)
        self.parts = np.array([parts for _, *parts in rows], dtype=np.int64)         # (N, 3, 3)
        if filters:
            self._filter(filters)
        if report and self.problems:  # nothing is lost in silence
            tqdm.write(self.describe(), file=sys.stderr)

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
            raise tars.unusable(self.source, "no sample passes the filters", self.problems)

    def counts(self):
        """-> {reason: number} of all that is left out."""
        return dict(collections.Counter(reason for reason, _ in self.problems))

    def describe(self):
        """What was found, and what was left out and why, in a few lines."""
        return tars.describe(self.source, len(self.shards), len(self), self.problems)

    def __len__(self):
        return len(self.keys)

    def key(self, index):
        return self.keys[index].decode()

    def bytes_of(self, index, part):
        """The bytes of one part of a sample (0 image, 1 txt, 2 json), or None.

        Raises BadSample if its file cannot be read.
        """
        try:
            return self._reader.read(*self.parts[index, part].tolist())
        except OSError as error:
            raise BadSample(f"cannot be read: {error}") from None
        except EOFError as error:
            raise BadSample(str(error)) from None

    def caption(self, index):
        text = self.bytes_of(index, 1).decode("utf-8-sig", errors="replace")
        if self.parts[index, 1, 0] == self.parts[index, 2, 0] and not self.shards:
            text = json.loads(text).get("text")  # this "txt" is a line of metadata.jsonl
            if not isinstance(text, str):
                raise BadSample('no caption: no "text" in its line of metadata.jsonl')
        return " ".join(text.split())

    def meta(self, index):
        """What the .json of a sample says: a dict, empty where there is none."""
        data = self.bytes_of(index, 2)
        try:
            found = json.loads(data) if data else {}
        except ValueError as error:
            raise BadSample(f"json cannot be read: {error}") from None
        return found if isinstance(found, dict) else {}

    def load(self, epoch, index, crop):
        """The image as a uint8 array (3, H, W)."""
        image = decode(self.bytes_of(index, 0), self.resize)
        rng = None if self.center else np.random.default_rng((self.seed, epoch, index))
        pixels = np.asarray(fit(image, self.resize, crop, rng))                      # (H, W, 3)
        # Turned in numpy: torch would wake its threads for each image, slow on a busy CPU.
        return np.ascontiguousarray(pixels.transpose(2, 0, 1))                       # (3, H, W)

    def _crop(self, where):
        """The crop of a batch whose first sample is at `where`."""
        if not isinstance(self.crop, list):
            return self.crop
        rng = np.random.default_rng((self.seed, *_place(where), 1))  # 1: not the place of the crop
        return self.crop[rng.integers(len(self.crop))]

    def _sample(self, where, crop):
        epoch, index = _place(where)
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        index = int(index) % len(self)
        try:
            return {"image": torch.from_numpy(self.load(epoch, index, crop)),
                    "caption": self.caption(index), "key": self.key(index), "index": index,
                    "meta": self.meta(index)}
        except BadSample as error:
            return {"index": index, "key": self.key(index), "failed": str(error)}

    def __getitem__(self, where):
        return self._sample(where, self._crop(where))

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


def _place(where):
    """A place in a dataset as (epoch, index); a plain index is of epoch 0."""
    return where if isinstance(where, tuple) else (0, where)


class CaptionedLatents(CaptionedImages):
    """Shards that tools.cache_latents wrote: KEY.npy, a latent, in place of an image.

    dataset[index]["image"] is float16 (16, h, w), standardised; resize and crop have no effect.
    """

    suffixes = ("npy",)

    def load(self, epoch, index, crop):
        try:
            return np.load(io.BytesIO(self.bytes_of(index, 0)), allow_pickle=False)
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
        first, begin = self.position
        samples = ((epoch, int(index)) for epoch in itertools.count(first)
                   for index in self.order(epoch)[begin if epoch == first else 0:])
        while True:
            batch = list(itertools.islice(samples, self.batch_size * self.world))
            yield batch[self.rank * self.batch_size:(self.rank + 1) * self.batch_size]


def stream(dataset, batch_size, seed=0, position=(0, 0), rank=0, world=1, workers=0):
    """Batches without end: dicts of
        images    float32 (B, 3, H, W) in [0, 1]; from a Memory instead `remembered`, its tensors
        captions  [str], keys [str], indices [int], failed [(key, reason)]
        position  (epoch, sample) after this batch: a stream begun there goes on with the next.
    A batch without any usable sample is passed over. Raises UsageError if most are unusable.
    """
    batches = EpochBatches(len(dataset), batch_size, seed, tuple(position), rank, world)
    failures = FailureCounter(dataset)
    for taken, batch in enumerate(_loader(dataset, batches, workers), 1):
        failures.note(batch)
        if batch["keys"]:
            yield {**to_float(batch), "position": batches.after(taken)}


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
        if self.batches is None:  # a checkpoint that is loaded first sets the position
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


def batches_in_order(dataset, indices, batch_size, workers=0):
    """(indices, batch) for all of `indices`, in order, once; batches as from stream()."""
    parts = [list(indices[i:i + batch_size]) for i in range(0, len(indices), batch_size)]
    for part, batch in zip(parts, _loader(dataset, parts, workers)):
        yield part, to_float(batch)


def _loader(dataset, batch_sampler, workers):
    # Its own generator: without one, DataLoader draws a seed from the global random stream, and
    # a run would depend on how often it was resumed.
    return DataLoader(dataset, batch_sampler=batch_sampler, num_workers=workers,
                      collate_fn=already_collated, worker_init_fn=ignore_interrupt,
                      generator=torch.Generator().manual_seed(0))


def already_collated(batch):
    return batch  # __getitems__ stacks it


def ignore_interrupt(worker):
    """Ctrl-C is for the main process: it saves first."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def to_float(batch):
    """Workers send bytes (a quarter of the traffic); the model gets floats in [0, 1]."""
    images = batch.get("images")
    if images is not None:                                                           # (B, C, H, W)
        batch["images"] = images.float() / 255 if images.dtype == torch.uint8 else images.float()
    return batch


class FailureCounter:
    """Counts unreadable samples by reason, names each once, and stops a hopeless run.

    Hopeless: more than half of the first 1000 samples fail, or 1000 in a row.
    """

    def __init__(self, dataset):
        self.source, self.trial = dataset.source, min(1000, len(dataset))
        self.seen, self.bad, self.in_a_row, self.named = 0, 0, 0, set()
        self.counts = collections.Counter()

    def note(self, batch):
        """Count a batch, of which `keys` and `failed` are read. Raises UsageError."""
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
                             "half (python -m tools.look shows what is there).")


# ---- Memory: what does not change while a stage trains -------------------------------------------

def remember(dataset, encode, batch_size=64, workers=0, label="encode"):
    """Run encode(batch) -> tuple of tensors (B, ...) once over everything, keep it in memory.

    Images come with the crops of epoch 0, or centred where the dataset has center=True. Floats are
    kept as float16, half the memory; -> a Memory, which stream() takes in place of dataset.
    """
    memory, failures = Memory(dataset), FailureCounter(dataset)
    with tqdm(total=len(dataset), desc=label, unit="img") as bar:
        for indices, batch in batches_in_order(dataset, range(len(dataset)), batch_size, workers):
            failures.note(batch)
            reasons = iter(batch["failed"])
            memory.failed.update((i, next(reasons)[1])
                                 for i in indices if i not in set(batch["indices"]))
            if batch["keys"]:
                with torch.no_grad():
                    memory.put(batch, encode(batch))
            bar.update(len(indices))
    return memory


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

    def __len__(self):
        return self.length

    def __getitems__(self, wheres):
        indices = [_place(where)[1] for where in wheres]
        good = [i for i in indices if i not in self.failed]
        rows = torch.tensor(good, dtype=torch.long)
        taken = (kept.index_select(0, rows) for kept in self.tensors)
        return {
            "remembered": tuple(x.float() if x.is_floating_point() else x for x in taken),
            "captions": [self.captions[i] for i in good], "keys": [self.keys[i] for i in good],
            "indices": good,
            "failed": [(self.keys[i], self.failed[i]) for i in indices if i in self.failed],
        }
