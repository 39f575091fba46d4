"""The pages: links lead somewhere, what they name exists, old spellings are gone."""

import re
import shlex
import sys
from pathlib import Path

import pytest

from tests.limits import README_LINES

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
CODE = [path for folder in (".", "plumbing", "published", "tools", "pocket", "experiments", "tests")
        for path in sorted((ROOT / folder).glob("*.py")) if path != Path(__file__).resolve()]
LAB = ("stage_c.py", "sample.py", "experiments/start.py", "experiments/prompt_accuracy.py")
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)

OLD = [      # a spelling that is gone, and the one to write instead
    (r'data\.py"?,? "?(shapes|look|pack)\b', "-m pocket.shapes, -m tools.look, -m tools.pack"),
    (r'(python|with) semantic_compressor\.py|"semantic_compressor\.py", "?-',
     "-m tools.cache_latents"),
    (r"--interpolate\b", "-m tools.interpolate"),
    (r"--export\b", "-m published.export"),
    (r'python pocket/\w+\.py|command\("pocket/', "-m pocket.NAME"),
    (r'python experiments/\w+\.py|command\("experiments/', "-m experiments.NAME"),
    (r"--head\b(?![,-])|config\.head\b|--prediction velocity|velocity[- ]head", "--prediction, v"),
    (r"plumbing/run\.py|plumbing\.run\b", "the file of plumbing/ that has it now"),
    (r"test_shapes\.py -k published", "tests/test_published.py -k"),
]


def name_of(path):
    return str(path.relative_to(ROOT))


def anchors(page):
    """The anchors that GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def commands(page):
    """The commands of a page's bash blocks, as lists of words; `\\` goes on in the next line."""
    for block in re.findall(r"^```bash\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S):
        for line in re.sub(r"\\\n\s*", "", block).splitlines():
            for part in line.split("&&"):
                yield shlex.split(part, comments=True)


@each_page
def test_links_lead_somewhere(page):
    """Every relative link and picture of a page exists, and so does the heading it points at."""
    missing = []
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        if not re.match(r"\w+:", link) and not (
                target.exists() and (not anchor or anchor in anchors(target))):
            missing.append(link)
    assert not missing, f"{name_of(page)}: no such file or heading: {', '.join(missing)}"


@pytest.mark.parametrize("old, new", OLD, ids=[new for _, new in OLD])
def test_old_spellings_are_gone(old, new):
    """No page, no make rule and no file of code names a command or field that was renamed."""
    found = [f"{name_of(path)}:{number}: {line.strip()}"
             for path in (*PAGES, ROOT / "Makefile", *CODE)
             for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
             if re.search(old, line)]
    assert not found, f"write {new} in\n" + "\n".join(found)


def test_readme_stays_short():
    """The README is read in one go: what is long stands in docs/."""
    lines = len((ROOT / "README.md").read_text(encoding="utf-8").splitlines())
    assert lines <= README_LINES, f"README.md has {lines} lines, at most {README_LINES}"


@each_page
def test_commands_of_the_pages_exist(page):
    """`python X.py --flag`, `python -m X --flag`, torchrun, pytest: file and flags exist."""
    wrong = []
    for words in commands(page):
        if words[:2] == ["python", "-m"] and words[2] not in sys.stdlib_module_names:
            script, rest = words[2].replace(".", "/") + ".py", words[3:]
        elif words and words[0] in ("python", "torchrun", "pytest") and words[1] != "-m":
            script = next(word for word in words if word.endswith(".py"))
            rest = words[words.index(script) + 1:] if words[0] != "pytest" else []
        else:
            continue
        if not (ROOT / script).is_file():
            wrong.append(f"there is no {script}: {' '.join(words)}")
            continue
        more = LAB if script == "experiments/lab.py" else ()               # runs one of these
        source = "".join((ROOT / path).read_text(encoding="utf-8") for path in (
            script, "plumbing/cli.py", "plumbing/training.py", *more))
        for flag in rest:                          # "--flag", a field of Config, or of PATHS
            field = flag.removeprefix("--").removeprefix("no-").replace("-", "_")
            if flag.startswith("--") and f'"{flag}"' not in source and not re.search(
                    rf'\b{field}\s*[:=]|"{field}"', source):
                wrong.append(f"{script} has no {flag}: {' '.join(words)}")
    assert not wrong, f"{name_of(page)}:\n" + "\n".join(wrong)


@each_page
def test_tests_named_in_pages_exist(page):
    """Every test that a page names is there under this name."""
    sources = [ROOT / "test_shapes.py", *sorted((ROOT / "tests").glob("test_*.py"))]
    tests = {name for path in sources
             for name in re.findall(r"^def (test_\w+)", path.read_text(encoding="utf-8"), re.M)}
    for name in re.findall(r"`(test_\w+)`", page.read_text(encoding="utf-8")):
        assert name in tests, f"{name_of(page)} names {name}: there is no such test"
