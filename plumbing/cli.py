"""The command line of a program, and the one error that its user is shown."""

import argparse
import ast
import dataclasses
import functools
import inspect
import json
import os
import re
import sys
import traceback
from pathlib import Path
from typing import Literal, get_args, get_origin

import torch

ROOT = Path(__file__).resolve().parent.parent
CHOSEN = {"device": None}                                     # by --device, for training.setup
# The lowest and highest number that an option or a field of a Config may have, and what it is a
# multiple of, by its name. All others: integers from 1, floats from 0.
RANGES = {
    "seed": (0, 2 ** 32 - 1), "workers": (0, 1024), "steps_[bc]": (1, 10_000),
    "warmup|cooldown|min_size|adversarial_start|heads": (0, 10 ** 9),
    "depth|.*blocks": (1, 1000), "timestep_width": (4, 10 ** 4, 2), "crop": (32, 2 ** 14, 4),
    "image_size": (128, 2 ** 14, 128), "size": (1, 2 ** 12), "per_shard": (1, 10_000),
    "guidance.*|latent_mean|min_aesthetic": (-1e9, 1e9),
    "t_power|latent_std": (1e-9, 1e9), "ema|.*(drop|noise|share|max_p).*": (0, 1)}


class UsageError(ValueError):
    """Something that the user can put right; the message is one sentence that says how."""


class Parser(argparse.ArgumentParser):
    """Of any command: one line for an option where it fits, and numbers in their RANGES."""

    def __init__(self, description, **more):
        super().__init__(description=description, usage=argparse.SUPPRESS, formatter_class=(
            functools.partial(argparse.RawDescriptionHelpFormatter, width=160,
                              max_help_position=32)), **more)

    def add_argument(self, *names, **more):
        if more.get("type") in (int, float):
            more["type"] = number(names[-1].lstrip("-").replace("-", "_"), more["type"])
        return super().add_argument(*names, **more)

    def error(self, message):
        first, *more = message.removeprefix("unrecognized arguments: ").split()
        if first != message.split()[0] and os.path.exists(first):
            message = (f"found {first} and {len(more)} more after an option that takes one, as "
                       "when the shell expands a pattern; put it in quotes")
        super().error(message)


def parse(Config, presets, doc, argv=None, preset="paper", **paths):
    """The command line of a stage -> its Config, a namespace of `paths` and of the preset's name.

    Each field of Config is an option; the comment on its line, its meaning and source, is its help.
    A tuple is given with commas: `--widths 48,96`. paths: further options, name -> help.
    """
    show_all()
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
            kind = dict(type=number(field.name, type((*value, "")[0]), ","), metavar="A,B,…")
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


def number(name, kind, comma=None):
    """An argparse type: reads a number for the option `name`, or with a comma a tuple of them."""
    def read(text):
        value = tuple(map(kind, text.split(comma))) if comma else kind(text)
        if out_of_range(name, value):
            raise argparse.ArgumentTypeError(f"{text}: expected {out_of_range(name, value)}")
        return value
    read.__name__ = f"tuple of {kind.__name__}" if comma else kind.__name__     # for its errors
    return read


def out_of_range(name, value):
    """What was expected of a number of that name, or of each in a tuple; None if it is so."""
    if isinstance(value, tuple):
        return next(filter(None, (out_of_range(name, one) for one in value)), None)
    if not isinstance(value, (int, float)):
        return None
    usual = (1, 2 ** 31) if type(value) is int else (0, 1e9)
    low, high, *step = next((limits for pattern, limits in RANGES.items()
                             if re.fullmatch(pattern, name)), usual)
    if low <= value <= high and not (step and value % step[0]):           # NaN is in no range
        return None
    return "".join(f"a multiple of {one} from " for one in step) + f"{low:g} to {high:g}"


def check_config(Config, found, path):
    """Raise UsageError if a value of the dict `found`, a config in the file `path`, is of another
    type than the field of Config or out of range.
    """
    for field in dataclasses.fields(Config):
        usual, value = field.default, found.get(field.name, field.default)
        several, expected = isinstance(usual, tuple), out_of_range(field.name, value)
        kind = type((*usual, "")[0] if several else usual)
        if get_origin(field.type) is Literal and value not in get_args(field.type):
            expected = " or ".join(get_args(field.type))
        elif several != isinstance(value, tuple) or not all(
                type(one) in (kind, int if kind is float else kind)
                for one in (value if several else [value])):
            expected = f"{'a tuple of ' * several}{kind.__name__}"
        if expected:
            raise UsageError(f"{path}: found {field.name} {repr(value)[:60]}, expected {expected}")


def show_all():
    """What the console's encoding lacks is printed as ?, and is no error."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def start(main, *arguments):
    """Run `main`; an error that the user can put right ends the program with one sentence."""
    show_all()
    try:
        return main(*arguments)
    except KeyboardInterrupt:
        sys.exit("stopped; nothing more was saved, and the same command goes on from what was")
    except Exception as error:
        if sentence(error) is None:
            raise
        sys.exit(sentence(error))


def sentence(error):
    """What the user is told of an error. None: of any other kind, which keeps its traceback.

    For the user are a UsageError, a ValueError that a stage file raises above its banner, files
    that cannot be read or written, full memory, and --compile without a compiler.
    """
    text = str(error)
    if text.startswith("Caught ") and "DataLoader worker" in text:        # its own traceback
        text = text.strip().splitlines()[-1].partition(": ")[2]
    if isinstance(error, (UsageError, OSError)) or isinstance(error, ValueError) and raised_here(
            error):
        return text
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return (f"the GPU's memory is full ({text.partition('.')[0]}); try half the --batch-size "
                "with twice the --accumulate")
    if isinstance(error, MemoryError) or "DefaultCPUAllocator" in text or (
            text.startswith("DataLoader worker")):
        return (f"the memory does not suffice ({text.splitlines()[0] if text else 'it is full'}); "
                "try a smaller --batch-size or --size, or fewer --workers")
    if re.search("InvalidCxxCompiler|CppCompileError", text):
        return "--compile needs a C++ compiler that works, such as g++; install one or leave it out"
    return None


def raised_here(error):
    """Whether a `raise` in this project made the error, not a library or a built-in."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    path = Path(last.filename)
    return path.is_relative_to(ROOT) and ".venv" not in path.parts and "raise" in (last.line or "")


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
