"""Captioned images in, batches out.

A source is one of
    shards/                          a folder of tars, such as img2dataset writes
    "shards/{00000..00099}.tar"      a brace pattern (quoted, or the shell expands it), a glob
                                     or one tar
    pictures/                        a folder of images, each with its caption in NAME.txt
    pictures/                        ... or all captions in metadata.csv or metadata.jsonl, as
                                     {"file_name": "cat.png", "text": "a cat on a mat"} on a line
and a tar or a folder holds, for each sample, files that share everything up to their first dot,
or, where that would put several pictures together, up to their last:
    000000007.jpg     the image: whatever Pillow decodes
    000000007.txt     its caption, UTF-8; or .caption
    000000007.json    optional: anything else that is known about it. Without a .txt its "text" or
                      "caption" is the caption, the first one of a list

An epoch is one seeded permutation of all samples, whatever the numbers of shards and workers, and a
position (epoch, sample) in it is where a stopped run goes on exactly. What cannot be read is left
out, counted by reason and named; a source of which most cannot be read stops the run.
    B  batch      H W  height and width in pixels
"""

import copy
import hashlib
import io
import itertools
import json
import math
import os
import signal
import struct
import sys
import types
import warnings
import zlib

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from plumbing import training
from plumbing.cli import UsageError
from sources import listing, tars
from sources.captions import BadSample, caption_of, to_text

MAX_PIXELS = 89_000_000  # ours: just below the size at which Pillow itself begins to warn


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
        return to_rgb(ImageOps.exif_transpose(image))
    except UnidentifiedImageError:  # its own message holds an address, different each time
        raise BadSample("cannot be decoded: not an image") from None
    except Image.DecompressionBombError as error:
        raise BadSample(f"too many pixels: {error}") from None
    except (OSError, ValueError, TypeError, SyntaxError, EOFError, IndexError, KeyError,
            struct.error, zlib.error) as error:  # what Pillow raises for damaged files
        raise BadSample(f"cannot be decoded: {error}") from None


def to_rgb(image):
    if image.mode.startswith("I"):  # 16 bits per pixel: Pillow's own conversion would clip
        grey = np.asarray(image).astype(np.float32) / 257
        image = Image.fromarray(grey.clip(0, 255).round().astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert("RGB")


def fit(image, resize=None, crop=None, rng=None):
    """Scale the shorter side to `resize`, then crop; rng=None crops the centre."""
    width, height = image.size
    crop_height, crop_width = (crop, crop) if isinstance(crop, int) else crop or (1, 1)
    scale = max(resize / min(width, height) if resize else 1.0,
                crop_width / width, crop_height / height)  # so that the crop always fits
    if width * height * scale ** 2 > MAX_PIXELS:
        raise BadSample(f"too many pixels: {width} x {height} enlarged {scale:.3g} times")
    if scale != 1.0:
        width = max(crop_width, round(width * scale))
        height = max(crop_height, round(height * scale))
        image = image.resize((width, height), Image.Resampling.BICUBIC)  # Pillow antialiases
    if crop:
        free = (width - crop_width, height - crop_height)
        left, top = ((n // 2 for n in free) if rng is None else
                     (int(rng.integers(n + 1)) for n in free))
        image = image.crop((left, top, left + crop_width, top + crop_height))
    return image


# ---- Filters: by what the .json of a sample says -------------------------------------------------

NO_FILTERS = {"min_size": 0, "min_aesthetic": 0.0, "max_pwatermark": 1.0, "max_punsafe": 1.0}


def filters(config):
    """The filters that a stage's Config sets: {name: bound}, without those that let all pass."""
    return {name: getattr(config, name) for name, off in NO_FILTERS.items()
            if getattr(config, name) != off}


def rejected(meta, filters):
    """Why a sample with this .json does not pass the filters, or None. Bounds themselves pass."""
    score = meta.get("aesthetic")
    facts = {  # by LAION's names, as img2dataset copies them; width and height are resized ones
        "size": [meta.get("original_width"), meta.get("original_height")],
        "aesthetic": [meta.get("AESTHETIC_SCORE") if score is None else score],
        "pwatermark": [meta.get("pwatermark")], "punsafe": [meta.get("punsafe")]}
    for name, bound in filters.items():
        kind, field = name.split("_")
        if not all(type(one) in (int, float) and abs(one) < math.inf for one in facts[field]):
            return f"no {field}"
        if min(facts[field]) < bound if kind == "min" else max(facts[field]) > bound:
            return f"{field} {'below' if kind == 'min' else 'above'} {bound}"
    return None


# ---- The dataset ---------------------------------------------------------------------------------

class CaptionedImages(Dataset):
    """All samples of a source, by number. Raises UsageError if most of them cannot be used.

    resize: the shorter side in pixels (None: kept). crop: int or (H, W), at a place that follows
    from (seed, epoch, index), or in the middle with center=True; an image too small for its crop is
    enlarged. Of a list of crops each step of training has one, which follows from (seed, step).
    filters: see filters(). dataset[index] or dataset[epoch, index, step] is a dict of
        image    uint8 (3, H, W)          caption  str          meta  dict, from the .json
        key      str                      index    int
    or, when this sample cannot be read, of index, key and failed="reason: detail".
    """

    suffixes = tars.PICTURES

    def __init__(self, source, resize=None, crop=None, seed=0, center=False, filters=None,
                 report=True):
        self.source, self.resize, self.crop = os.fspath(source), resize, crop
        self.seed, self.center = seed, center
        # problems: [(reason, where)] of all that is left out
        files, rows, self.problems, self.stamps = listing.find_samples(self.source, self.suffixes)
        self.shards, self._reader = files if self.stamps else [], listing.Reader(files, self.stamps)
        # Arrays, not lists: workers share them with the main process without copying.
        self.keys = np.array([key.encode(errors="replace") for key, *_ in rows])     # (N,)
        self.parts = np.array([parts for _, *parts in rows], dtype=np.int64)         # (N, 3, 3)
        if filters:
            self.apply(filters)
        if report and self.problems:  # nothing is lost in silence
            tqdm.write(self.describe(), file=sys.stderr)
        content = [*(ends.encode() for *_, ends in self.stamps), self.keys.tobytes()]
        self.checksum = hashlib.sha256(b"".join([*content, self.parts.tobytes()])).hexdigest()

    def apply(self, filters):
        reasons = []
        for index in tqdm(range(len(self)), desc="filters", unit="json", delay=1, leave=False):
            try:
                reasons.append(rejected(self.meta(index), filters))
            except BadSample as error:
                reasons.append(str(error).partition(":")[0])
        self.problems += [(why, self.key(index)) for index, why in enumerate(reasons) if why]
        passed = [why is None for why in reasons]
        self.keys, self.parts = self.keys[passed], self.parts[passed]
        if not any(passed):
            raise listing.unusable(self.source, "no sample passes the filters", self.problems)

    def describe(self):
        """What was found, and what was left out and why, in a few lines."""
        kind = f"{len(self.shards):,} shard(s)" if self.shards else "a folder of images"
        lines = [f"{self.source}: {kind}, {len(self):,} samples"]
        for reason in dict(self.problems):
            names = [where for why, where in self.problems if why == reason]
            some = ", ".join(names[:3]) + ", ..." * (len(names) > 3)
            lines.append(f"  {len(names):,} x {reason}: {some}")
        return "\n".join(lines)

    def __len__(self):
        return len(self.keys)

    def key(self, index):
        return self.keys[index].decode()

    def bytes_of(self, index, part):
        """The bytes of one part of a sample (0 image, 1 txt, 2 json), or None. Raises BadSample."""
        try:
            return self._reader.read(*self.parts[index, part].tolist())
        except OSError as error:
            raise BadSample(f"cannot be read: {error}") from None

    def caption(self, index):
        """The caption of a sample: str. Raises BadSample."""
        if (self.parts[index, 1] == self.parts[index, 2]).all():
            found = caption_of(self.meta(index))
            found = found[0] if isinstance(found, list) else found
            if not isinstance(found, str):
                raise BadSample('no caption: no "text" or "caption" in its json')
            try:
                return to_text(found.encode("utf-8", "surrogateescape"))
            except UnicodeEncodeError:
                raise BadSample("caption is not UTF-8: half of a letter is escaped") from None
        return to_text(self.bytes_of(index, 1))

    def meta(self, index):
        """What the .json of a sample says: a dict, empty where there is none."""
        data = self.bytes_of(index, 2)
        try:
            found = json.loads(data) if data else {}
        except (ValueError, RecursionError) as error:
            raise BadSample(f"json cannot be read: {error}") from None
        return found if isinstance(found, dict) else {}

    def load(self, epoch, index, crop):
        """The tensors of a sample: "image", uint8 (3, H, W)."""
        image = decode(self.bytes_of(index, 0), self.resize)
        rng = None if self.center else np.random.default_rng((self.seed, epoch, index))
        pixels = np.asarray(fit(image, self.resize, crop, rng))                      # (H, W, 3)
        # Turned in numpy: torch would wake its threads for each image, slow on a busy CPU.
        return {"image": torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))}

    def __getitem__(self, place):
        epoch, index, step = place if isinstance(place, tuple) else (0, place, 0)
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        index, crop = int(index) % len(self), self.crop
        if isinstance(crop, list):  # 1: not the random numbers of a crop's place
            crop = crop[np.random.default_rng((self.seed, step, 0, 1)).integers(len(crop))]
        try:
            return {**self.load(epoch, index, crop), "caption": self.caption(index),
                    "key": self.key(index), "index": index, "meta": self.meta(index)}
        except BadSample as error:
            return {"index": index, "key": self.key(index), "failed": str(error)}

    def __getitems__(self, places):
        """A whole batch at once (DataLoader calls this): failed samples leave it smaller."""
        samples = [self[place] for place in places]
        good = [sample for sample in samples if "failed" not in sample]
        sizes = {tuple(sample["image"].shape[1:]) for sample in good}
        if len(sizes) > 1:
            raise UsageError(f"{self.source}: one batch holds images of different sizes "
                             f"{sorted(sizes)[:3]}; give a crop, so that they can be stacked.")
        tokens = [one["tokens"] for one in good if "tokens" in one]
        return {
            **({"tokens": torch.stack(tokens)} if tokens else {}),
            "images": torch.stack([one["image"] for one in good]) if good else None,
            "captions": [one["caption"] for one in good], "keys": [one["key"] for one in good],
            "indices": [one["index"] for one in good],
            "failed": {one["index"]: (one["key"], one["failed"])
                       for one in samples if "failed" in one}}


class CaptionedLatents(CaptionedImages):
    """Shards of tools.cache_latents: in place of an image KEY.npy, a standardised latent, float16
    (16, h, w), on which resize and crop have no effect. Where `tokens`, a shape (L, E), is set, the
    next array of the file is the caption's tokens, float16, and a sample has them as `tokens`.
    """

    suffixes, tokens = ("npy",), None

    def load(self, epoch, index, crop):
        file = io.BytesIO(self.bytes_of(index, 0))
        try:
            found = {name: torch.from_numpy(np.load(file, allow_pickle=False))
                     for name in ("image", "tokens")[:1 + bool(self.tokens)]}
        except (ValueError, EOFError, TypeError) as error:
            raise BadSample(f"cannot be decoded: {error}") from None
        if self.tokens and found["tokens"].shape != self.tokens:
            raise BadSample(f"tokens are {tuple(found['tokens'].shape)}, expected {self.tokens}")
        return found


# ---- Batches -------------------------------------------------------------------------------------

def places(length, config, rank, world, taken=0, given=0):
    """Endless lists of (epoch, index, step): the slices of process `rank` of the global batches.

    All are full: one that begins at the end of an epoch goes on with the next. taken: samples that
    came before; given: batches, of which a step has config.accumulate.
    """
    size = config.batch_size
    first, begin = divmod(taken, length)
    samples = ((epoch, int(index)) for epoch in itertools.count(first) for index in
               np.random.default_rng((config.seed, epoch)).permutation(length)[
                   begin if epoch == first else 0:])
    for step in (given // config.accumulate for given in itertools.count(given)):
        batch = list(itertools.islice(samples, size * world))
        yield [(*place, step) for place in batch[rank * size:(rank + 1) * size]]


class Stream:
    """Batches without end, from a position that a checkpoint keeps: dicts of
        images    float32 (B, 3, H, W) in [0, 1], on `device`
                  from a Memory instead `remembered`, its tensors, on the CPU
        tokens    float32 (B, L, E), on `device`, where CaptionedLatents have them
        captions  [str], keys [str], indices [int], failed {index: (key, reason)}
        position  (epoch, sample) after this batch: a stream begun there goes on with the next.
    config: a stage's Config, of which batch_size, accumulate, seed and workers count. A batch
    without any usable sample is passed over. Raises UsageError if most are unusable.
    """

    def __init__(self, dataset, config, device="cpu"):
        self.dataset, self.config, self.device, self.batches = dataset, config, device, None
        self.rank, self.world = training.rank(), training.world()
        self.taken, self.given = 0, 0  # samples; batches, of which a step has config.accumulate
        self.failures = listing.FailureCounter(dataset)

    def __iter__(self):
        return self

    def __next__(self):
        while True:
            if self.batches is None:
                self.batches = iter(loader(self.dataset, places(
                    len(self.dataset), self.config, self.rank, self.world, self.taken, self.given),
                    self.config.workers))
            batch = next(self.batches)
            self.failures.note(batch)
            self.taken += self.config.batch_size * self.world
            if batch["keys"]:
                self.given += 1
                batch["position"] = divmod(self.taken, len(self.dataset))
                return to_float(batch, self.device)
            self.batches = None  # begun anew, so that the next batch has this one's place in a step

    def state_dict(self):
        return {"position": divmod(self.taken, len(self.dataset)),
                "step": self.given // self.config.accumulate, "data": self.dataset.checksum}

    def load_state_dict(self, state):
        if state.get("data", self.dataset.checksum) != self.dataset.checksum:
            raise UsageError(f"{self.dataset.source}: holds other samples than when this run began"
                             "; expected the same shards or files, or another --out")
        (epoch, sample), accumulate = state["position"], self.config.accumulate
        self.taken = epoch * len(self.dataset) + sample
        step = self.taken // (self.config.batch_size * self.world * accumulate)
        self.given = state.get("step", step) * accumulate


def stream(dataset, batch_size, seed=0, position=(0, 0), workers=0):
    """A Stream without a Config; its steps have one batch each."""
    made = Stream(dataset, types.SimpleNamespace(batch_size=batch_size, accumulate=1, seed=seed,
                                                 workers=workers))
    made.load_state_dict({"position": position})
    return made


def preview_batch(dataset, n, device="cpu"):
    """The first n samples of the dataset's stream as a batch, each the middle of its image."""
    centred = copy.copy(dataset)
    centred.center = True
    batch = next(stream(centred, n, dataset.seed))
    return {**batch, "images": batch["images"].to(device)}


def batches_in_order(dataset, indices, batch_size, workers=0):
    """(indices, batch) for all of `indices`, in order, once; batches as those of a Stream."""
    parts = [list(indices[i:i + batch_size]) for i in range(0, len(indices), batch_size)]
    for part, batch in zip(parts, loader(dataset, parts, workers)):
        yield part, to_float(batch)


def loader(dataset, batches, workers):
    # Its own generator: without one, DataLoader draws a seed from the global random stream, and
    # a run would depend on how often it was resumed.
    return DataLoader(dataset, batch_sampler=batches, collate_fn=dict,  # __getitems__ stacks them
                      num_workers=0 if isinstance(dataset, Memory) else workers,
                      pin_memory=torch.cuda.is_available(),       # copied while the GPU computes
                      worker_init_fn=ignore_interrupt, generator=torch.Generator().manual_seed(0))


def ignore_interrupt(worker):
    """Ctrl-C is for the main process: it saves first."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def to_float(batch, device="cpu"):
    """Bytes are sent, a quarter of the traffic; floats in [0, 1] are made of them on `device`."""
    for name in ("images", "tokens"):                                # (B, C, H, W), (B, L, E)
        if batch.get(name) is not None:
            most = 255 if batch[name].dtype == torch.uint8 else 1
            batch[name] = batch[name].to(device, non_blocking=True).float() / most
    return batch


# ---- Memory: what does not change while a stage trains -------------------------------------------

def remember(dataset, encode, batch_size=64, workers=0, label="encode"):
    """Run encode(batch) -> tuple of tensors (B, ...) once over everything: -> a Memory, which a
    Stream takes in place of dataset. Images come with the crops of epoch 0, or centred where the
    dataset has center=True. Floats are kept as float16, half the memory.
    """
    memory, failures = Memory(dataset), listing.FailureCounter(dataset)
    with tqdm(total=len(dataset), desc=label, unit="img") as bar, torch.no_grad():
        for indices, batch in batches_in_order(dataset, range(len(dataset)), batch_size, workers):
            failures.note(batch)
            memory.failed.update(batch["failed"])
            kept = [x.half().cpu() if x.is_floating_point() else x.cpu()
                    for x in (encode(batch) if batch["keys"] else ())]
            if not all(torch.isfinite(x).all() for x in kept):
                raise UsageError(f"{dataset.source}: encoding {batch['keys'][0]} and those after "
                                 "it gave numbers that float16 cannot hold; expected up to 65,504.")
            rows = zip(batch["keys"], batch["captions"], zip(*kept))
            memory.rows.update(zip(batch["indices"], rows))
            bar.update(len(indices))
    return memory


class Memory(Dataset):
    """What remember() made of a dataset."""

    def __init__(self, dataset):
        self.source, self.length, self.checksum = dataset.source, len(dataset), dataset.checksum
        self.rows, self.failed = {}, {}  # index -> (key, caption, tensors); index -> (key, reason)

    def __len__(self):
        return self.length

    def __getitems__(self, places):
        indices = [index for _, index, _ in places]
        good = [self.rows[index] for index in indices if index in self.rows]
        columns = map(torch.stack, zip(*(tensors for _, _, tensors in good)))
        return {"remembered": tuple(x.float() if x.is_floating_point() else x for x in columns),
                "keys": [key for key, _, _ in good], "captions": [text for _, text, _ in good],
                "indices": [index for index in indices if index in self.rows],
                "failed": {index: self.failed[index] for index in indices if index in self.failed}}
