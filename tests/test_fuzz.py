"""Random arguments for every command, and random prompts: a result or a sentence, no traceback."""

import functools
import importlib
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

import sample
import stage_a
import stage_b
import stage_c
from plumbing import cli, training
from test_shapes import TINY_A, TINY_B, TINY_C
from tests.common import HERE

VALUES = ("-1", "0", "1", "2", "7", "1,2,3", "8,16", "nan", "inf", "-inf", "1e400", "1" + "0" * 30,
          "", "x", "🙂", "0.5", "1e-3", "-0.0", "None", "True", "128", "100", "128x128", "3x-1",
          "../..", "a b", "--", "=", "-", "ä", "1_0", "0x10", "٣")


class Stop(Exception):
    """All checks that need no data were passed."""


def flags_of(parser):
    return sorted({flag for action in parser._actions for flag in action.option_strings
                   if flag.startswith("--") and flag != "--help"})


def arguments(rng, flags, required=()):
    """A list of some flags with good and bad values, now and then without a value or twice."""
    out = list(required)
    for flag in rng.choice(flags, rng.integers(0, 5)):
        out += [str(flag), *([] if rng.random() < 0.1 else [str(rng.choice(VALUES))])]
    return out + [str(rng.choice(VALUES))] * (rng.random() < 0.1)


def ends_well(run, given):
    """Run it; whatever is not an end by a sentence is an error of the program."""
    try:
        run()
    except (Stop, SystemExit) as end:
        code = getattr(end, "code", 0)
        assert code in (0, 2) or isinstance(code, str) and "Traceback" not in code, (given, code)
    except Exception as error:
        raise AssertionError(f"{given} ends with {error!r}") from error


@pytest.mark.parametrize("stage", ["a", "b", "c"])
def test_fuzz_training(stage, monkeypatch, tmp_path, capsys):
    """300 lists: the command line, and the model that it describes, built without memory."""
    module, Model, tiny = {"a": (stage_a, stage_a.StageA, TINY_A),
                           "b": (stage_b, stage_b.StageB, TINY_B),
                           "c": (stage_c, stage_c.StageC, TINY_C)}[stage]
    monkeypatch.chdir(tmp_path)
    rng, accepted = np.random.default_rng(ord(stage)), []

    @functools.wraps(module.train)
    def train(config, *given, **more):
        if len(accepted) % 4 == 0:
            with torch.device("meta"):
                Model(config)
        accepted.append(config)
    names = ["--" + name.replace("_", "-") for name in module.Config.__dataclass_fields__]
    for _ in range(300):
        given = ["--data=x", *arguments(rng, [*names, "--device", "--out"])]
        monkeypatch.setattr(sys, "argv", [f"stage_{stage}.py", *given])
        ends_well(lambda: training.command(stage, train, module.Config, {"paper": tiny}, "doc",
                                           lambda args: args.data), given)
    assert 10 < len(accepted) < 290, f"{len(accepted)} of 300 lists were accepted"


def argparse_of(monkeypatch, kept):
    """Every parser that is made from here on is kept, so that its flags are known."""
    plain = cli.Parser.parse_args

    def parse_args(self, *given, **more):
        kept.append(self)
        return plain(self, *given, **more)
    monkeypatch.setattr(cli.Parser, "parse_args", parse_args)


COMMANDS = {  # module: the function that does the work, what must be given
    "sample": ("find", ("x",)), "tools.look": ("look", ("x",)),
    "tools.pack": ("pack", ("x", "--out=y")),
    "tools.cache_latents": ("cache", ("x", "--weights=y", "--out=z")),
    "tools.interpolate": ("interpolate", ("x", "y", "--out=z")),
    "pocket.shapes": ("make_shapes", ("--out=y",)), "pocket.teach": ("teach", ()),
    "pocket.teach_text": ("teach", ()), "pocket.ship": ("ship", ("--weights=pocket",))}


@pytest.mark.parametrize("name", COMMANDS)
def test_fuzz_commands(name, monkeypatch, tmp_path, capsys):
    """300 lists for each other command, up to where its work would begin."""
    module, (work, required) = importlib.import_module(name), COMMANDS[name]
    monkeypatch.chdir(tmp_path)
    begun, kept, rng = [], [], np.random.default_rng(len(name))

    def begin(*given, **more):
        begun.append(given)
        raise Stop
    monkeypatch.setattr(module, work, begin)
    argparse_of(monkeypatch, kept)
    monkeypatch.setattr(sys, "argv", [name, "--no-such-flag"])
    with pytest.raises(SystemExit):
        module.main()
    for _ in range(300):
        given = arguments(rng, flags_of(kept[0]), required)
        monkeypatch.setattr(sys, "argv", [name, *given])
        try:
            ends_well(lambda: cli.start(module.main), given)
        except Stop:
            pass
    assert begun, "no list was accepted: the test tests nothing"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["stage_a.py", "stage_b.py", "stage_c.py", "sample.py"])
def test_fuzz_started(name, drawings, tmp_path):
    """Ten lists for each of the large commands, really started; those that train are stopped."""
    rng, module = np.random.default_rng(7), importlib.import_module(name[:-3])
    flags = ([f"--{one.replace('_', '-')}" for one in module.Config.__dataclass_fields__]
             if name != "sample.py" else flags_of(sample.options()))
    always = (["--preset", "pocket", "--data", str(drawings)] if name != "sample.py" else
              ["a red star", "--steps-c", "1", "--steps-b", "1"])
    for number in range(10):
        given = [*always, *arguments(rng, flags)]
        process = subprocess.Popen(
            [sys.executable, str(HERE / name), *given], cwd=tmp_path, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, env=dict(os.environ, OMP_NUM_THREADS="1",
                                             PYTHONPATH=str(HERE), HF_HUB_OFFLINE="1"))
        try:
            said = process.communicate(timeout=15)[1].decode(errors="replace")
        except subprocess.TimeoutExpired:
            process.kill()
            said = process.communicate()[1].decode(errors="replace")
        assert "Traceback" not in said, f"{name} {given}:\n{said}"


LETTERS = ("a red star", "日本語", "ä ö ü ß é", "👩‍👩‍👧 🇩🇪", "\x00", "\x07\x1b[31m", "\u2028",
           "\x0b", "\u200b\ufeff", "e\u0301\u0301\u0301", "<|endoftext|>", "<|startoftext|>",
           "&amp;&lt;", "%s %d {0} {x}", "\\n\\u0000", "'\"`", "x" * 50, "🙂" * 9,
           "\U0010ffff", "ﷺ", "İ", " ",
           "\t", "../../etc", "٣٤", "a\u0300\u0300\u0300")


@pytest.mark.parametrize("count", [100, pytest.param(500, marks=pytest.mark.slow)])
def test_fuzz_prompts(count, monkeypatch, tmp_path, encoder):
    """Prompts of odd letters through a tiny chain, with captions and settings in the file."""
    a, b, c = (Model(config).eval().requires_grad_(False) for Model, config in (
        (stage_a.StageA, TINY_A), (stage_b.StageB, TINY_B), (stage_c.StageC, TINY_C)))
    chain = sample.Chain(a=a, b=b, scale=(0.0, 1.0), text_b=encoder, compressor_file=None, c=c,
                         text_c=encoder)
    monkeypatch.setattr(sample, "find", lambda *given, **more: {})
    monkeypatch.setattr(sample, "load_chain", lambda *given, **more: chain)
    rng, quick = np.random.default_rng(0), ["--steps-c", "1", "--steps-b", "1", "--guidance-c", "1",
                                            "--guidance-b", "1", "--batch-size", "64"]
    prompts = ["".join(rng.choice(LETTERS, rng.integers(1, 4))) for _ in range(count)]
    for number in range(0, count, 50):
        (tmp_path / "prompts.txt").write_text("\n".join(prompts[number:number + 50]), "utf-8")
        suffix = ("png", "jpg", "webp")[number // 50 % 3]
        sample.main(["--prompts", str(tmp_path / "prompts.txt"), *quick,
                     "--out", str(tmp_path / f"{number}.{suffix}")])
        assert (tmp_path / f"{number}.{suffix}").stat().st_size > 1000
