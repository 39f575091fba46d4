"""A zoo of files and folders: what is damaged, odd or foreign is read, or counted and named."""

import pytest

from plumbing import cli
from plumbing.cli import UsageError


@pytest.mark.parametrize("content, found", [
    (None, "No such file or directory"), (b"", "no JSON"), (b"\xff\xfe\x00", "no JSON"),
    (b'{"a": "\xe4"}', "no JSON"), (b"{", "no JSON"), (b"[" * 200_000, "no JSON"), (b"[]", "list"),
    (b"null", "NoneType"), (b"{}", "no a"), (b'{"a": "1", "b": 1}', "a = '1'"),
    (b'{"a": true, "b": 1}', "a = True"), (b'{"a": 1.0, "b": 1}', "a = 1.0"),
    (b'{"a": 1, "b": NaN}', "b = nan"), (b'{"a": 1, "b": -1e999}', "b = -inf"),
    (b'{"a": 1%s, "b": 1}' % (b"0" * 400), "a = 10000"),
    (b'{"a": 1%s, "b": 1}' % (b"0" * 5000), "no JSON"), (b'{"a": 1, "b": {}}', "b = {}")],
    ids=range(17))
def test_read_json_refuses(tmp_path, content, found):
    """A file that is not what it should be is named, with what was found and what was expected."""
    path = tmp_path / "x.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError) as error:
        cli.read_json(path, {"a": int, "b": (float, type(None))})
    said = str(error.value)
    assert said.startswith(f"{path}: found {found}") and "\n" not in said and len(said) < 400, said
    assert said.endswith("; expected a JSON object with a (int), b (float or NoneType)"), said


def test_read_json(tmp_path):
    """What fits is given back whole: an int for a float, null where it may be, after a BOM."""
    (tmp_path / "x.json").write_bytes(b'\xef\xbb\xbf{"a": 1, "b": null, "c": NaN}')
    fields = {"a": float, "b": (int, type(None))}
    found = cli.read_json(tmp_path / "x.json", fields)
    assert (found["a"], found["b"]) == (1, None) and "c" in found
    assert cli.read_json("log.jsonl, line 3", fields, '{"a": 2.5, "b": 7}') == {"a": 2.5, "b": 7}
