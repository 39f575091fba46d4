"""The preference study: the page, in a browser, and the count of votes."""

import json
import shutil

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from experiments import study
from plumbing.cli import UsageError


def call(*arguments):
    study.main(list(map(str, arguments)))


@pytest.fixture
def folders(tmp_path):
    """Two folders of ten pictures, red and blue, whose metadata name their model."""
    for name, colour in (("red", (200, 0, 0)), ("blue", (0, 0, 200))):
        (tmp_path / name).mkdir()
        about = PngInfo()
        about.add_text("parameters", f"model {name}")
        for i in range(10):
            picture = Image.new("RGB", (32, 32), colour)
            picture.putpixel((i, 0), (255, 255, 255))
            picture.save(tmp_path / name / f"{i:05d}.png", pnginfo=about)
        (tmp_path / name / "prompts.txt").write_text("".join(f"</script> {i}\n" for i in range(10)))
    return tmp_path / "red", tmp_path / "blue"


@pytest.fixture
def made(folders, tmp_path):
    call("make", *folders, "--out", tmp_path / "study", "--goal", 8)
    return tmp_path / "study"


def test_nothing_that_voters_get_unblinds(folders, made):
    """Neither page nor file names, ages or metadata say which model drew which; the key does."""
    known, page = json.loads((made / "key.json").read_text()), made / "page"
    text = (page / "index.html").read_text()
    assert not any(word in text for word in (str(folders[0]), "red", "first", "second", "blue")), (
        "the page names a model")
    files = sorted((page / "pictures").iterdir())
    assert len(files) == 20 and sorted(one.stem for one in files) == sorted(known["key"])
    for file in files:
        with Image.open(file) as picture:
            assert not picture.info, f"{file} keeps metadata: {picture.info}"
            assert (picture.getpixel((20, 20))[0] > 100) == (known["key"][file.stem] == 0), (
                "the key names the wrong model")
    ages = sorted(files, key=lambda one: one.stat().st_mtime_ns)
    assert ages == files, "pictures are written in another order than that of their random names"
    assert sum(known["key"][one.stem] for one in files[::2]) not in (0, 10), (
        "the models' pictures alternate when sorted by name")


@pytest.mark.parametrize("arguments, said", [
    ("", "prompts of one kind"), ("star --scenes 2", "prompts of one kind"),
    ("--scenes 2 --prompts p.txt", "prompts of one kind"), ("star --real", "--real needs --scenes"),
    ("star --baseline run --steps-c 5", "found --steps-c, expected --guidance-c alone"),
    ("star --baseline run", "expected a checkpoint of the baseline"),
    ("star --n 2", "no --n")])
def test_what_cannot_be_drawn_is_refused(arguments, said, tmp_path):
    """Prompts of two kinds or of none, and options that would do nothing: one sentence."""
    with pytest.raises(UsageError, match=said):
        call("draw", "--out", tmp_path / "drawn", *arguments.split())
    if not arguments:
        with pytest.raises(UsageError, match="expected --out"):
            call("draw", "--scenes", 2)


def test_what_cannot_be_a_study_is_refused(folders, made, tmp_path):
    """A missing picture, sizes or prompts that differ, an --out in use and foreign votes or keys:
    one sentence."""
    def refused(said, *arguments):
        with pytest.raises(UsageError, match=said):
            call(*arguments)
    refused("another --out", "make", *folders, "--out", made)
    Image.new("RGB", (16, 16)).save(folders[1] / "00003.png")
    refused("different sizes", "make", *folders, "--out", tmp_path / "new")
    (folders[1] / "00003.png").unlink()
    refused("00003.png: missing", "make", *folders, "--out", tmp_path / "new")
    for votes, said in (({"study": "other", "voter": "v", "votes": []}, "votes of study other"),
                        ({"study": 1}, "as the page saves"), ([], "as the page saves")):
        (tmp_path / "votes").write_text(json.dumps(votes))
        refused(said, "count", made, tmp_path / "votes")
    refused("about.json", "judge", *folders)
    (folders[1] / "prompts.txt").write_text("another\n")
    refused("other prompts than in .*red", "make", *folders, "--out", tmp_path / "new")
    (made / "key.json").write_text('{"study": "s"')
    refused("key.json: found no JSON", "count", made, tmp_path / "votes")


def voted(tmp_path, known, voter, *choices):
    """A file of votes: "first", "second" or "equal", each with the side the chosen one stood on."""
    names = {number: [one for one in known["key"] if known["key"][one] == number][0]
             for number in (0, 1)}
    votes = []
    for pair, (choice, side) in enumerate(choices):
        left = names[0] if (choice == "first") == (side == "left") else names[1]
        right = names[1] if left == names[0] else names[0]
        votes.append(dict(pair=pair, left=left, right=right, choice=side))
    path = tmp_path / f"{voter}.json"
    path.write_text(json.dumps(dict(study=known["study"], voter=voter, votes=votes)))
    return path


def test_count(tmp_path):
    """By vote, by voter of the median or more, and the side; a file sent twice counts once."""
    known = dict(study="s", models=["x", "y"], key={"aa": 0, "bb": 1})
    many = voted(tmp_path, known, "many", *[("second", "left")] * 9, ("first", "right"))
    some = voted(tmp_path, known, "some", *[("first", "right")] * 3, ("second", "equal"))
    few = voted(tmp_path, known, "few", ("first", "left"))
    text = study.count(known, [many, some, few, some])
    assert "15 votes of 3 voters (10, 4, 1)" in text, text
    assert "| by vote | 5 | 9 | 1 | 35.7 (" in text, text
    assert "| by voter, of 4 votes or more | 1 | 1 | 0 | 50.0 (9–91) |" in text, text     # Wilson
    assert "| left against right | 10 | 4 | 1 | 71.4 (" in text, text
    assert "(one voter)" in study.count(known, [many])
    with pytest.raises(UsageError, match="no votes"):
        study.count(known, [])


def test_interval_resamples_voters():
    """Ten voters of ten votes each who agree with themselves: as wide as ten votes, not a hundred.

    The share's deviation is sqrt(.5 * .5 / 10) = .158, so 95 % are about .19 to .81.
    """
    low, high = study.resampled([10] * 5 + [0] * 5, [0] * 5 + [10] * 5)
    assert 10 <= low <= 30 and 70 <= high <= 90, (low, high)


@pytest.mark.slow
def test_clicking_through_ten_pairs(made, tmp_path):
    """In a browser: clicks and keys vote, a reload loses nothing, the saved file is counted."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if not browser:
        pytest.skip("no browser: `apt-get install chromium`")
    known = json.loads((made / "key.json").read_text())
    with playwright.sync_playwright() as tool:
        context = tool.chromium.launch(executable_path=browser, args=["--no-sandbox"]).new_context()
        page, errors = context.new_page(), []
        page.on("pageerror", lambda error: errors.append(error))
        page.goto((made / "page/index.html").as_uri())
        expected = []
        for number in range(10):
            page.wait_for_function("['left', 'right'].every(one => document.getElementById(one)"
                                   ".complete && document.getElementById(one).naturalWidth == 32)")
            assert f"{number} of 8 pairs judged" in page.inner_text("#count")
            assert page.inner_text("#prompt").startswith("</script> ")
            left, right = (page.get_attribute(f"#{side}", "src").split("/")[-1][:-4]
                           for side in ("left", "right"))
            models = [known["key"][one] for one in (left, right)]
            assert sorted(models) == [0, 1], "a pair shows one model twice"
            if number == 4:
                page.reload()                          # another pair, the votes are still there
                assert "4 of 8" in page.inner_text("#count")
                page.wait_for_function("document.getElementById('right').complete")
                models = [known["key"][page.get_attribute("#left", "src").split("/")[-1][:-4]]]
                models.append(1 - models[0])
            how = number % 5
            if how in (0, 1):
                page.click("#left" if how == 0 else "#right")
            elif how == 2:
                page.click("#equal")
            else:
                page.keyboard.press("ArrowLeft" if how == 3 else "ArrowDown")
            expected.append({0: models[0], 1: models[-1], 3: models[0]}.get(how, "equal"))
        assert "10 of 8 pairs judged" in page.inner_text("#count")
        page.keyboard.press("ArrowLeft")               # nothing is left to vote on
        with page.expect_download() as download:
            page.click("#save")
        download.value.save_as(tmp_path / "votes.json")
        assert download.value.suggested_filename.startswith("votes-") and not errors, errors
    saved = json.loads((tmp_path / "votes.json").read_text())
    assert sorted(vote["pair"] for vote in saved["votes"]) == list(range(10))
    found = ["equal" if vote["choice"] == "equal" else known["key"][vote[vote["choice"]]]
             for vote in saved["votes"]]
    assert found == expected, "the file does not say what was clicked"
    text = study.count(known, [tmp_path / "votes.json"])
    assert f"| by vote | {expected.count(0)} | {expected.count(1)} | 4 | " in text, text


@pytest.mark.slow
def test_draw_and_judge(chain, tmp_path):
    """A call that was stopped goes on; the checker prefers the drawings to noise."""
    call("draw", "--out", tmp_path / "real", "--scenes", 6, "--real")
    options = ["draw", "--out", tmp_path / "drawn", "--scenes", 6, "--weights", chain,
               "--steps-c", 1, "--steps-b", 1]
    call(*options)
    before = (tmp_path / "drawn/00002.png").read_bytes()
    (tmp_path / "drawn/00002.png").unlink()
    call(*options)
    assert (tmp_path / "drawn/00002.png").read_bytes() == before, "another picture the second time"
    values = study.judge(tmp_path / "real", tmp_path / "drawn")
    assert values == [1] * 6, f"the drawings themselves against noise: {values}"
    with pytest.raises(UsageError, match="other settings"):
        call(*options, "--seed", 5)
