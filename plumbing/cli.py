"""The command line of a program, and the one error that its user is shown."""

import argparse
import ast
import dataclasses
import functools
import inspect
import json
import re
import shlex
import sys
import traceback
from pathlib import Path
from typing import Literal, get_args, get_origin

import torch

ROOT = Path(__file__).resolve().parent.parent
CHOSEN = {"device": None}                                     # by --device
# Lowest and highest number that an option or a Config's field of this name may have, and what it is
# a multiple of. Others: integers from 1, floats from 0.
RANGES = {
    "seed": (0, 2 ** 32 - 1), "workers": (0, 1024), "steps_[bc]": (1, 10_000), "size": (1, 4096),
    "warmup|cooldown|min_size|adversarial_start|heads": (0, 2 ** 31), "per_shard": (1, 10_000),
    "depth|.*blocks": (1, 1000), "timestep_width": (4, 10_000, 2), "crop": (32, 2 ** 14, 4),
    "image_size": (128, 2 ** 14, 128), "guidance.*|latent_mean|min_aesthetic": (-1e9, 1e9),
    "sem_channels": (16, 16), ".*width.*|.*channels|codebook_size": (1, 10 ** 6),
    "patch_size": (1, 64), "t_power|latent_std": (1e-9, 1e9),
    "ema|.*(drop|noise|share|max_p).*": (0, 1)}


class UsageError(ValueError):
    """Something that the user can put right; the message is one sentence that says how."""


class Parser(argparse.ArgumentParser):
    """Of any command: numbers in RANGES; what the console's encoding lacks is printed as ?."""

    def __init__(self, description=None, **more):
        super().__init__(
            description=description, usage=argparse.SUPPRESS, **more,    # a line for an option
            formatter_class=functools.partial(argparse.RawDescriptionHelpFormatter, width=160,
                                              max_help_position=34))
        for stream in (sys.stdout, sys.stderr):
            getattr(stream, "reconfigure", dict)(errors="replace")

    def add_argument(self, *names, **more):
        if more.get("type") in (int, float):
            more["type"] = number(names[-1].lstrip("-").replace("-", "_"), more["type"])
        return super().add_argument(*names, **more)

    def error(self, message):
        hint = ": is this a pattern that the shell expanded? Then put it in quotes"
        super().error(message + hint * message.startswith("unrecognized"))


def parse(Config, presets, doc, argv=None, preset="paper", **paths):
    """The command line of a stage -> its Config, a namespace of `paths` and of the preset's name.

    Each field of Config is an option; the comment on its line, its meaning and source, is its help.
    A tuple is given with commas: `--widths 48,96`. paths: further options, name -> help.
    """
    parser = Parser(doc.partition("\n")[0] + " The top of the file says more.", allow_abbrev=False)
    parser.add_argument("--preset", choices=list(presets), default=preset, metavar="NAME",
                        help=f"a set of all that follows: {', '.join(presets)} ({preset})")
    for name, text in paths.items():
        parser.add_argument("--" + name.replace("_", "-"), help=text)
    parser.add_argument("--device", choices=("cuda", "mps", "cpu"), metavar="NAME",
                        help="cuda, mps or cpu (the first that is there)")
    comments, fields = field_comments(Config), dataclasses.fields(Config)
    for field in fields:
        value = getattr(presets[preset], field.name)
        if get_origin(field.type) is Literal:
            kind = dict(choices=get_args(field.type))
        elif isinstance(value, bool):
            kind = dict(action=argparse.BooleanOptionalAction, metavar="")
        elif isinstance(value, tuple):
            kind = dict(type=number(field.name, type((*value, "")[0]), True), metavar="A,B,…")
        else:
            kind = dict(type=type(value), metavar="X")
        parser.add_argument("--" + field.name.replace("_", "-"), default=argparse.SUPPRESS, **kind,
                            help=describe(field.name, presets, preset, comments[field.name]))
    others = vars(parser.parse_args(argv))
    CHOSEN["device"] = others.pop("device")
    changed = {one.name: others.pop(one.name) for one in fields if one.name in others}
    if others["preset"] != "pocket" and not torch.cuda.is_available():
        print(f"note: no GPU is visible and the preset {others['preset']!r} is made for one; "
              "--preset pocket is made for the CPU", file=sys.stderr, flush=True)
    return dataclasses.replace(presets[others["preset"]], **changed), argparse.Namespace(**others)


def command():
    """This process's command, as it is typed in the repository's folder."""
    path = Path(sys.argv[0]).resolve()
    path = path.relative_to(ROOT) if path.is_relative_to(ROOT) else Path(path.name)
    name = f"-m {'.'.join(path.with_suffix('').parts)}" if len(path.parts) > 1 else path.name
    return " ".join(["python", name, *map(shlex.quote, sys.argv[1:])])


def flags(config, preset):
    """The options that turn the Config `preset` into `config`: ["--steps", "24", "--no-muon"]."""
    out = []
    for name, value in vars(config).items():
        option = "--" + name.replace("_", "-")
        if value != getattr(preset, name):
            out += ([option if value else f"--no-{option[2:]}"] if isinstance(value, bool) else
                    [option, ",".join(map(str, value)) if isinstance(value, tuple) else str(value)])
    return out


@functools.cache
def field_comments(Config):
    """{field: the comment at the end of its line}, from the source of the dataclass."""
    lines = inspect.getsource(Config).splitlines()
    body = ast.parse(inspect.cleandoc("\n".join(lines))).body[0].body
    return {node.target.id: lines[node.lineno - 1].partition("  # ")[2].strip()
            for node in body if isinstance(node, ast.AnnAssign)}


def describe(name, presets, preset, comment):
    """"paper, E.3 (1280; released 1536, pocket 192)": source, default, where presets differ."""
    values = {key: getattr(one, name) for key, one in presets.items()}
    shown = {key: ",".join(map(str, value)) or "none" if isinstance(value, tuple) else str(value)
             for key, value in values.items()}
    differ = [f"{key} {shown[key]}" for key in values if values[key] != values[preset]]
    text = "; ".join([shown[preset], *[", ".join(differ)] * bool(differ)])
    return (f"{comment} ({text})" if comment else text).replace("%", "%%")


def number(name, kind, several=False):
    """An argparse type: text -> a number in the range of `name`; several: a tuple, with commas."""
    low, high, *step = next((limits for pattern, limits in RANGES.items()
                             if re.fullmatch(pattern, name)), (int(kind is int), 2 ** 31))

    def read(text):
        values = tuple(map(kind, text.split(",") if text else ())) if several else (kind(text),)
        for one in values if kind in (int, float) else ():
            if not low <= one <= high or step and one % step[0]:          # NaN is in no range
                raise argparse.ArgumentTypeError(
                    f"{text}: expected {low} to {high}" + f", a multiple of {step}" * bool(step))
        return values if several else values[0]
    read.__name__ = f"tuple of {kind.__name__}" if several else kind.__name__   # in its errors
    return read


def check_config(Config, found, path):
    """The config `found` in the file `path`, read as the command line is: a dict. Or UsageError."""
    out = dict(found)
    for field in [one for one in dataclasses.fields(Config) if one.name in found]:
        usual, value = field.default, found[field.name]
        choices = (True, False) if type(usual) is bool else get_args(field.type)
        several = isinstance(usual, tuple)
        read = number(field.name, type((*usual, "")[0] if several else usual), several)
        try:
            out[field.name] = (choices[choices.index(value)] if choices else
                               read(",".join(map(str, value)) if several else str(value)))
        except (TypeError, ValueError, RuntimeError, argparse.ArgumentTypeError):
            raise UsageError(f"{path}: found {field.name} {repr(value)[:60]}, expected one of "
                             f"{choices or 'its range in --help'}, such as {usual}") from None
    return out


def start(main, *arguments):
    """Run `main`; an error that its user can put right ends the program with one sentence.

    That is a UsageError, a ValueError that a stage file raises, whatever the system refuses, full
    memory, and --compile without a compiler. Any other keeps its traceback.
    """
    try:
        return main(*arguments)
    except KeyboardInterrupt:
        sys.exit("stopped; nothing more was saved, and the same command goes on from what was")
    except Exception as error:
        text, last = str(error).strip(), traceback.extract_tb(error.__traceback__)[-1]
        ours = Path(last.filename).resolve().parent == ROOT and "raise" in (last.line or "")
        if text.startswith("Caught ") and "DataLoader" in text:           # with its own traceback
            text = text.splitlines()[-1].partition(": ")[2]
        if isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)) or re.match(
                "DataLoader worker|.*DefaultCPUAllocator", text):
            text = (f"the memory is full ({' '.join(text.split())[:200]}); try half the "
                    "--batch-size with twice the --accumulate, a smaller --size, fewer --workers")
        elif re.search("InvalidCxxCompiler|CppCompileError", text):
            text = "--compile needs a C++ compiler that works, such as g++; get one or leave it out"
        elif not isinstance(error, (UsageError, OSError, torch.distributed.DistError)) and not (
                ours and isinstance(error, ValueError)):
            raise
        sys.exit(text)


def read_json(path, fields, content=None):
    """The JSON object in the file `path`, or in `content`, bytes or text that come from it: a dict
    that has all `fields`, {name: type or tuple of types}. A float may be written as an int, a bool
    is no number, and a number is finite. Raises UsageError.
    """
    kinds = {name: kind if isinstance(kind, tuple) else (kind,) for name, kind in fields.items()}
    try:
        found = json.loads(Path(path).read_bytes() if content is None else content)
        wrong = [] if isinstance(found, dict) else [type(found).__name__]
    except (OSError, ValueError, RecursionError) as error:
        found, wrong = None, [getattr(error, "strerror", None) or f"no JSON ({error})"]
    for name, some in kinds.items() if not wrong else ():
        value = found.get(name)
        number = type(value) in (int, float)
        if (name not in found or not (type(value) in some or number and float in some)
                or number and not abs(value) <= sys.float_info.max):
            wrong.append(f"{name} = {repr(value)[:60]}" if name in found else f"no {name}")
    if wrong:
        needs = [f"{name} ({' or '.join(kind.__name__ for kind in some)})"
                 for name, some in kinds.items()]
        raise UsageError(f"{path}: found {', '.join(wrong)}; expected a JSON object"
                         + f" with {', '.join(needs)}" * bool(needs))
    return found
