"""Reward functions that test_rewards_functions.py names by file; workers import this."""

from __future__ import annotations

import os
import sys
from typing import Any

from data.question import Question


def overlap(question: Question, response: str, parsed: str | None, metadata: Any) -> float:
    """Return the share of the reference's words that the boxed answer has."""
    words = set(question.answer.split())
    return len(words & set((parsed or "").split())) / len(words)


def parts(question: Question, response: str, parsed: str | None, metadata: Any) -> Any:
    """Reward accuracy thrice as much as brevity; length is recorded alone."""
    return {
        "accuracy": (parsed == question.answer, 3),
        "brief": 1 - min(1, len(response) / 100),
        "length": (len(response) / 1000, 0),
    }


def stated(question: Question, response: str, **others: Any) -> Any:
    """Return what the response says, as Python, with the question and the rest as names."""
    return eval(response, {"question": question, "os": os, "sys": sys, **others})


def needs_nothing() -> float:
    """Take none of the arguments."""
    return 1.0


NUMBER = 3
