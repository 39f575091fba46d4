"""The layout: what a file may import, how long it may be, and that a stage stands alone."""

import ast
import re
import subprocess
import sys

import pytest

from tests import limits
from tests.common import HERE, command

PROJECT = {path.stem if path.suffix else path.name for path in HERE.iterdir()
           if path.suffix == ".py" or (path / "__init__.py").exists()}


def sources(floor):
    """The files of a floor: one file, or all of a folder."""
    path = HERE / floor
    return sorted(path.glob("*.py")) if path.is_dir() else [path]


def imports(path):
    """[(module of the project, whether inside a function)] of all that a file imports."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inside = {id(node) for function in ast.walk(tree)
              if isinstance(function, (ast.FunctionDef, ast.Lambda)) for node in ast.walk(function)}
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" if (HERE / node.module).is_dir() else node.module
                     for alias in node.names]
        for name in names:
            if name.split(".")[0] in PROJECT:
                yield name, id(node) in inside


def lines(path):
    return len(path.read_text(encoding="utf-8").splitlines())


@pytest.mark.parametrize("floor", limits.FLOORS)
def test_no_arrow_runs_back_up(floor):
    """A file imports what stands below it, nothing beside or above it."""
    for path in sources(floor):
        name = path.relative_to(HERE).as_posix()
        for module, inside in imports(path):
            allowed = limits.FLOORS[floor] | (limits.LAZY.get(name, set()) if inside else set())
            assert module in allowed or module.split(".")[0] in allowed, (
                f"{name} imports {module}, which does not stand below it; tests/limits.py says "
                "what may be imported where")


def test_top_level_is_seven_files():
    """Seven Python files and a README, nothing beside them; no file but a notebook's first cell
    (docs/lesson.py) changes sys.path."""
    assert sorted(path.name for path in HERE.glob("*.py")) == sorted(
        [*limits.SIX_FILES, "test_shapes.py"])
    for path in HERE.glob("*/*.py"):
        if path.parent.name not in ("tests", "docs"):
            assert "sys.path" not in path.read_text(encoding="utf-8"), path
            assert "noqa" not in path.read_text(encoding="utf-8"), path


def test_sizes():
    """The files stay as small as tests/limits.py says."""
    six = {name: lines(HERE / name) for name in limits.SIX_FILES}
    assert sum(six.values()) <= limits.SIX_FILES_LINES, six
    for folder, limit in limits.FOLDER_LINES.items():
        found = {path.name: lines(path) for path in sources(folder)}
        assert sum(found.values()) <= limit, f"{folder}: {found}"
    assert lines(HERE / "test_shapes.py") <= limits.TEST_SHAPES_LINES
    for path in [*HERE.glob("*.py"), *HERE.glob("*/*.py")]:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            assert len(line) <= limits.COLUMNS, f"{path}, line {number}: {len(line)} columns"


@pytest.mark.parametrize("name", limits.TRAIN_LINES)
def test_train_fits_a_screen(name):
    """train() is one flat function that can be read at once."""
    tree = ast.parse((HERE / name).read_text(encoding="utf-8"))
    train = next(node for node in tree.body if getattr(node, "name", None) == "train")
    length = train.end_lineno - train.lineno + 1
    assert length <= limits.TRAIN_LINES[name], f"{name}: train() has {length} lines"


@pytest.mark.parametrize("name", limits.TRAIN_LINES)
def test_help(name):
    """--help prints the docstring's first line and every setting with its source, briefly."""
    said = command(name, "--help").stdout
    assert said.startswith("Stage") and "--out" in said and "(paper, " not in said
    assert re.search(r"--steps X +paper, E.*\d", said), said
    assert len(said.splitlines()) <= limits.HELP_LINES, said


ALONE = """
import sys
class Refuse:
    def find_spec(name, path=None, target=None):
        if name.split(".")[0] in {refused}:
            raise ImportError(f"{name} may not be imported above the banner")
sys.meta_path.insert(0, Refuse)
sys.path[:] = [one for one in sys.path if one not in ("", "{here}")]
with open("{file}", encoding="utf-8") as file:
    above, banner, below = file.read().partition("\\n# ---- training")
assert banner
exec(compile(above, "{file}", "exec"), globals())      # as a notebook cell would: no module
from dataclasses import replace
torch.manual_seed(0)
"""
TRY = {
    "stage_a.py": """
model = StageA(replace(PRESETS["pocket"], widths=(8, 16), decoder_blocks=1, codebook_size=32))
images, judge = torch.rand(2, 3, 32, 32), PatchDiscriminator(8)
value, found = loss(model, images, None, judge)
(value + discriminator_loss(judge, images, found["decoded"])).backward()
CodeUsage(32).revive(model.vquantizer.embedding.weight, found["latents"])
drawn, shape = model.decode(model.unstandardise(model.random_tokens((2, 4, 8, 8)))), (2, 3, 32, 32)
""",
    "stage_b.py": """
model = StageB(replace(PRESETS["pocket"], widths=(8, 16), heads=(0, 2), blocks=(1, 1)))
shape, sem, text = (2, 4, 8, 8), torch.randn(2, 16, 3, 3), torch.randn(2, 24, 128)
value, t, error = loss(model, torch.randn(shape), *drop_and_noise(sem, text, text[:1],
                                                                  model.config))
value.backward()
drawn = ddpm_sample(model, shape, sem, text, 0 * sem, text[:1], steps=2, guidance=2)
""",
    "stage_c.py": """
model = StageC(replace(PRESETS["pocket"], width=32, depth=1, heads=2))
shape, text = (2, 16, 3, 3), torch.randn(2, 24, 128)
value, t, error = loss(model, torch.randn(shape), drop_text(text, text[:1], 0.5))
value.backward()
drawn = ddpm_sample(model, shape, text, text[:1], steps=2, guidance=2)
""",
    "semantic_compressor.py": """
model = SemanticCompressor(PRESETS["pocket"])
images, shape = resize(torch.rand(8, 3, 128, 128)), (8, 16, 3, 3)
(model(images) * torch.randn(shape)).sum().backward()
measured = measure(model, images)
assert abs(measured.latent_std - 1) < 0.2
drawn = model.standardise(model(images))
"""}


@pytest.mark.parametrize("name", TRY)
def test_above_the_banner_torch_is_enough(name):
    """Model, loss, one backward and the sampler run in a process that refuses all else.

    So the part of a stage file above "# ---- training" can be copied into a notebook as it is.
    """
    refused = PROJECT | {"PIL", "tqdm", "open_clip", "safetensors", "torchvision"}
    if name == "semantic_compressor.py":                # its backbone
        refused -= {"torchvision", "PIL", "tqdm"}     # torchvision imports these two
    code = ALONE.replace("{refused}", repr(refused)).replace("{here}", str(HERE)).replace(
        "{file}", str(HERE / name)) + TRY[name] + (
        "assert drawn.shape == shape and drawn.isfinite().all()\n"
        "assert any(one.grad is not None and one.grad.any() for one in model.parameters())\n")
    done = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True)
    assert done.returncode == 0, f"{name}, above its banner: {done.stderr.splitlines()[-1]}"
