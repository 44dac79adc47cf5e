"""Tables of text."""

from __future__ import annotations

from zppo_mm.text_table import text_table


def test_names_are_left_and_numbers_right() -> None:
    assert text_table(["", "seconds", "note"], [["update", "2", "x"], ["all", "10", ""]]) == (
        "        seconds  note\n------  -------  ----\nupdate        2     x\nall          10"
    )


def test_all_columns_may_be_left() -> None:
    assert text_table(["a", "long"], [["value", "b"]], num_left=2).splitlines() == [
        "a      long",
        "-----  ----",
        "value  b",
    ]
