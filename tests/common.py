"""What several test files use: commands, comparing checkpoints, making tars."""

import io
import itertools
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import torch
from PIL import Image

from plumbing import cli

HERE = Path(__file__).parent.parent


def flags(config, preset):
    """The command line that turns the preset `pocket` into `config`."""
    return ["--preset", "pocket", *cli.flags(config, preset)]


def command(*arguments, check=True, **options):
    """Run a command of the README; on failure show what it printed."""
    done = subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True,
                          **{"cwd": HERE, "timeout": 200, **options})
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def same(one, two, where):
    """Equal to the bit, whatever the nesting."""
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, two), where
    elif isinstance(one, dict):
        assert one.keys() == two.keys(), where
        for key in one:
            same(one[key], two[key], f"{where}.{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(two), where
        for index, pair in enumerate(zip(one, two)):
            same(*pair, f"{where}.{index}")
    else:
        assert one == two, where


def same_checkpoint(one, two):
    """Two checkpoints agree in all: weights, EMA, optimizers, random numbers, data position. Their
    commands name another --out."""
    one, two = (torch.load(path, weights_only=True) | {"command": ""} for path in (one, two))
    same(one, two, "checkpoint")


def encoded(size=(40, 30), colour=(200, 30, 40), mode="RGB", form="PNG", **options):
    file = io.BytesIO()
    Image.new("RGB", size, colour).convert(mode).save(file, form, **options)
    return file.getvalue()


def make_tar(path, members):
    """members: [(name, bytes)], in this order, names may repeat."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def members_of(n, start=0, suffix="png", **options):
    for i in range(start, start + n):
        yield f"{i:09d}.{suffix}", encoded(colour=(i % 256, 30, 40), **options)
        yield f"{i:09d}.txt", f"number {i}".encode()
        yield f"{i:09d}.json", json.dumps({"n": i}).encode()


def take(stream, n):
    return list(itertools.islice(stream, n))


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.tar"))}
