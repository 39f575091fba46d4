"""The command line of a program, and the one error that its user is shown."""

import argparse
import ast
import dataclasses
import errno
import inspect
import sys
import traceback
from pathlib import Path
from typing import Literal, get_args, get_origin

import torch

ROOT = Path(__file__).resolve().parent.parent


class UsageError(ValueError):
    """Something that the user can put right; the message is one sentence that says how."""


def parse(Config, presets, doc, argv=None, preset="paper", **paths):
    """Make the command line of a stage from the fields of its Config.

    paths: further options, name -> (default, help). Returns (config, namespace of the paths and of
    the preset's name). A tuple is given with commas: `--widths 48,96`; a Literal has choices. The
    comment of a field, its meaning and source, is its help.
    """
    parser = argparse.ArgumentParser(description=doc.partition("\n")[0] + " The top of the file "
                                     "says more.", formatter_class=Help, allow_abbrev=False)
    parser.add_argument("--preset", choices=list(presets), default=preset, metavar="NAME",
                        help=f"a set of all that follows: {', '.join(presets)} ({preset})")
    for name, (default, text) in paths.items():
        parser.add_argument("--" + name.replace("_", "-"), default=default, help=text)
    comments = field_comments(Config)
    for field in dataclasses.fields(Config):
        flag, value = "--" + field.name.replace("_", "-"), getattr(presets[preset], field.name)
        options = dict(help=describe(field.name, presets, preset, comments.get(field.name, "")),
                       default=argparse.SUPPRESS)
        if get_origin(field.type) is Literal:
            parser.add_argument(flag, choices=get_args(field.type), **options)
        elif isinstance(value, bool):
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, metavar="", **options)
        elif isinstance(value, tuple):
            parser.add_argument(flag, type=tuple_of(type((*value, "")[0])), metavar="A,B,…",
                                **options)
        else:
            parser.add_argument(flag, type=type(value), metavar="X", **options)
    given = vars(parser.parse_args(argv))
    fields = {field.name for field in dataclasses.fields(Config)}
    changed = {name: value for name, value in given.items() if name in fields}
    others = {name: value for name, value in given.items() if name not in fields}
    if others["preset"] != "pocket" and not torch.cuda.is_available():
        print(f"note: no GPU is visible and the preset {others['preset']!r} is made for one; "
              "--preset pocket is made for the CPU", file=sys.stderr, flush=True)
    return dataclasses.replace(presets[others["preset"]], **changed), argparse.Namespace(**others)


class Help(argparse.RawDescriptionHelpFormatter):
    """One line for each option where it fits: a wide help column."""

    def __init__(self, prog):
        super().__init__(prog, max_help_position=32, width=160)

    def add_usage(self, usage, actions, groups, prefix=None):
        """The list of options says it all."""


def field_comments(Config):
    """{field: the comment at the end of its line}, from the source of the dataclass."""
    lines = inspect.getsource(Config).splitlines()
    found = {}
    for node in ast.parse(inspect.cleandoc("\n".join(lines))).body[0].body:
        if isinstance(node, ast.AnnAssign):
            found[node.target.id] = lines[node.lineno - 1].partition("  # ")[2].strip()
    return found


def describe(name, presets, preset, comment):
    """"paper, E.3 (1280; released 1536, pocket 192)": source, default, where presets differ."""
    value = getattr(presets[preset], name)
    others = ", ".join(f"{key} {show(getattr(one, name))}" for key, one in presets.items()
                       if getattr(one, name) != value)
    values = f"{show(value)}{'; ' if others else ''}{others}"
    text = f"{comment} ({values})" if comment else values
    return text.replace("%", "%%")


def show(value):
    """A value as the command line takes it."""
    return ",".join(map(str, value)) or "none" if isinstance(value, tuple) else str(value)


def tuple_of(kind):
    """An argparse type that reads "48,96" as a tuple of `kind`."""
    def read(text):
        return tuple(kind(part) for part in text.split(","))
    read.__name__ = f"tuple of {kind.__name__}"
    return read


def start(main, *arguments):
    """Run `main`; an error whose message is for the user ends the program with that sentence alone.

    That is a UsageError, a plain ValueError that a file of this project raised itself (the stage
    files above their banner know no other), a file that cannot be read or written, or a full disk;
    any other is a fault and keeps its traceback.
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
    """Whether a `raise ValueError` of this project made the error, not a library or a built-in."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    path = Path(last.filename)
    return path.is_relative_to(ROOT) and ".venv" not in path.parts and "raise" in (last.line or "")
