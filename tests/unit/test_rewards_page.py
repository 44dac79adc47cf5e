"""The tables of docs/rewards.md say what the grader does."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from data.question import Question
from zppo_mm.rewards.verify import Verifier

PAGE = Path(__file__).parents[2] / "docs" / "rewards.md"
LINE = re.compile(r"\| `(.+?)` \| `(.+?)` \| (right|wrong) \|")
MIN_LINES = 70


@pytest.mark.medium
def test_every_line_holds() -> None:
    lines = LINE.findall(PAGE.read_text(encoding="utf-8"))
    assert len(lines) >= MIN_LINES
    with Verifier(timeout_seconds=60.0, budget_seconds=600.0) as verifier:
        verdicts = verifier.verify_all(
            [
                (Question("q", "?", (), gold, "math"), f"\\boxed{{{answer}}}")
                for answer, gold, _ in lines
            ]
        )
    words = {1.0: "right", 0.0: "wrong"}
    found = [
        (answer, gold, words.get(each.reward, each.reason))
        for (answer, gold, _), each in zip(lines, verdicts, strict=True)
    ]
    assert [line for line, said in zip(found, lines, strict=True) if line != said] == []
