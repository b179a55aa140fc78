"""Plain-text tables."""

import pytest

from mmgraph.utils.text_table import text_table

ROWS = [("name", "count", "note"), ("a", "1,000", "long text"), ("longer", "7", "x")]


def test_alignment_of_columns() -> None:
    assert text_table(ROWS, "<>-") == [
        "name    count  note",
        "a       1,000  long text",
        "longer      7  x",
    ]
    assert text_table(ROWS, ">><")[2] == "longer      7  x        "


def test_one_column_and_no_rows() -> None:
    assert text_table([("what",), ("tables",)], "<") == ["what  ", "tables"]
    assert text_table([("what",), ("tables",)], "-") == ["what", "tables"]
    assert text_table([], "") == []


def test_rows_that_do_not_match_the_alignment_are_an_error() -> None:
    for rows, alignment in ((ROWS, "<>"), ([*ROWS, ("short",)], "<>-")):
        with pytest.raises(ValueError):
            text_table(rows, alignment)
