"""The table of the paper, line by line: every row names code, keys, metrics or a page; what they
name exists.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.unit.test_house_docs import resolves
from zppo_mm.observability.metrics import METRICS

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "algorithm.md").read_text(encoding="utf-8")
SECTION = PAGE.partition("## The paper, line by line\n")[2].partition("\n## ")[0]
ROWS = [
    tuple(cell.strip() for cell in line.strip("| ").split(" | "))
    for line in SECTION.splitlines()
    if line.startswith("| ") and not line.startswith("| the paper")
]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: str(row[0])[:60])
def test_every_row_says_where(row: tuple[str, ...]) -> None:
    statement, *where = row
    if statement.startswith("**") and (not where or where == ["|"]):
        return  # a heading
    (text,) = where
    named = re.findall(r"`([^`]+)`", text)
    assert named or "](" in text or "not here" in text
    missing = [
        name
        for name in named
        if not (name in METRICS or resolves(name) or (ROOT / name).exists())
        and name != "evaluation"
    ]
    assert missing == []


def test_the_table_has_all_that_is_recorded_every_step() -> None:
    # The names of the paper's figures, by our metrics.
    recorded = {name for _, *where in ROWS for cell in where for name in METRICS if name in cell}
    assert len(recorded) >= 25
    assert len(ROWS) >= 55
