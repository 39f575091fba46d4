"""The command line of a program, and the one error that its user is shown."""

import argparse
import ast
import dataclasses
import errno
import functools
import inspect
import json
import sys
import traceback
from pathlib import Path
from typing import Literal, get_args, get_origin

import torch

ROOT = Path(__file__).resolve().parent.parent
# of a parser: one line for each option where it fits, and no list of them before it
STYLE = dict(formatter_class=functools.partial(argparse.RawDescriptionHelpFormatter, width=160,
                                               max_help_position=32), usage=argparse.SUPPRESS)


class UsageError(ValueError):
    """Something that the user can put right; the message is one sentence that says how."""


def parse(Config, presets, doc, argv=None, preset="paper", **paths):
    """The command line of a stage -> its Config, a namespace of `paths` and of the preset's name.

    Each field of Config is an option; the comment on its line, its meaning and source, is its help.
    A tuple is given with commas: `--widths 48,96`. paths: further options, name -> help.
    """
    parser = argparse.ArgumentParser(
        description=doc.partition("\n")[0] + " The top of the file says more.",
        allow_abbrev=False, **STYLE)
    parser.add_argument("--preset", choices=list(presets), default=preset, metavar="NAME",
                        help=f"a set of all that follows: {', '.join(presets)} ({preset})")
    for name, text in paths.items():
        parser.add_argument("--" + name.replace("_", "-"), help=text)
    comments, fields = field_comments(Config), dataclasses.fields(Config)
    for field in fields:
        value = getattr(presets[preset], field.name)
        if get_origin(field.type) is Literal:
            kind = dict(choices=get_args(field.type))
        elif isinstance(value, bool):
            kind = dict(action=argparse.BooleanOptionalAction, metavar="")
        elif isinstance(value, tuple):
            kind = dict(type=tuple_of(type((*value, "")[0])), metavar="A,B,…")
        else:
            kind = dict(type=type(value), metavar="X")
        parser.add_argument("--" + field.name.replace("_", "-"), default=argparse.SUPPRESS, **kind,
                            help=describe(field.name, presets, preset, comments[field.name]))
    others = vars(parser.parse_args(argv))
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


def tuple_of(kind):
    """An argparse type that reads "48,96" as a tuple of `kind`."""
    def read(text):
        return tuple(kind(part) for part in text.split(","))
    read.__name__ = f"tuple of {kind.__name__}"               # argparse's name for it in an error
    return read


def start(main, *arguments):
    """Run `main`; an error whose message is for the user ends the program with that sentence alone.

    For the user are a UsageError, a ValueError that a stage file raises above its banner, a file
    that cannot be read or written and a full disk; any other keeps its traceback.
    """
    try:
        return main(*arguments)
    except ValueError as error:
        if not isinstance(error, UsageError) and not raised_here(error):
            raise
        sys.exit(str(error))
    except OSError as error:
        if error.filename is None and error.errno != errno.ENOSPC:
            raise
        sys.exit(str(error))
    except torch.cuda.OutOfMemoryError as error:
        sys.exit(f"the GPU's memory is full ({str(error).partition('.')[0]}); try half the "
                 "--batch-size with twice the --accumulate")
    except KeyboardInterrupt:
        sys.exit("stopped; nothing more was saved, and the same command goes on from what was")


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
