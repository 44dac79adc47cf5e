"""Numbers that were read from a picture, right within a tolerance."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from data.question import Question

TOLERANCE = 0.05
_NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?(?:[eE][-+]?\d+)?")
_AROUND = re.compile(r"\\(?:[%$ ]|text\{[^{}]*\}|,)|[$€£%\s]")


def within_tolerance(question: Question, parsed: str | None, metadata: Any, **others: Any) -> float:
    """Return 1 for a number p with |p - g| <= t |g|, g the reference and t 0.05, or
    `metadata["tolerance"]`; without a number as reference, for the same text without case.

    Currency and percent signs and spaces are left out.

    Source: ChartQA (arXiv 2203.10244), relaxed accuracy.
    """
    given = metadata.get("tolerance") if isinstance(metadata, Mapping) else None
    tolerance = TOLERANCE if given is None else given
    answer, gold = number(parsed or ""), number(question.answer)
    if gold is None:
        return float((parsed or "").strip().casefold() == question.answer.strip().casefold())
    return float(answer is not None and abs(answer - gold) <= tolerance * abs(gold))


def number(text: str) -> float | None:
    """Return a text as a number; `None` if it is none."""
    plain = _AROUND.sub("", text)
    if not (_NUMBER.fullmatch(plain) and any(each.isdigit() for each in plain)):
        return None
    return float(plain.replace(",", ""))
