"""The rows of experiments/break_it.py: each edit can be made, and its test notices it."""

import pytest

from experiments import break_it
from tests.common import HERE


def test_each_edit_has_one_place():
    """The text that a row edits occurs exactly once in its file, and its test has a claim."""
    for name, row in break_it.ROWS.items():
        count = (HERE / row.file).read_text(encoding="utf-8").count(row.old)
        assert count == 1, (f"row {name} of experiments/break_it.py: {row.file} has {row.old!r} "
                            f"{count} times, expected once: edit the row as the file was edited")
        assert break_it.claim(row.test) and row.where and row.old != row.new, name
    assert len(break_it.ROWS) >= 30


def test_the_page_has_the_rows():
    """docs/break_it.md holds the table that experiments/break_it.py makes of its rows."""
    assert break_it.PAGE.read_text(encoding="utf-8") == break_it.page(), (
        "the rows were edited: python -m experiments.break_it --page")


@pytest.mark.slow
@pytest.mark.parametrize("name", break_it.ROWS)
def test_edit_is_noticed(name, capsys):
    """With the edit the test named in its row fails, and says in words why."""
    assert break_it.show(name), f"{break_it.ROWS[name].test} passes with the edit {name}"
    said = capsys.readouterr().out
    assert "it fails:\n  " in said and break_it.claim(break_it.ROWS[name].test) in said
