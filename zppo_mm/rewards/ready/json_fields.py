"""The fields of a JSON object, as from a form or a receipt. The reference is the question's answer,
a JSON object.
"""

from __future__ import annotations

import json
import re
from typing import Any

from data.json_text import load_json
from data.question import Question

_FENCED = re.compile(r"```(?:json)?\s*(\{.*?\})\s*```", re.DOTALL)


def fields(
    question: Question, response: str, parsed: str | None, **others: Any
) -> dict[str, float | tuple[float, float]]:
    """Reward an object by the F1 of its fields; it is right if all are and no other is there.

    F1 = 2 m / (a + r) with m fields of the same name and value among a of the answer and r of the
    reference. Values are the same as JSON, texts without case and spacing around them. The object
    is what is boxed, or else the last one in a block of code.
    """
    gold = load_json(question.answer.encode())
    if not isinstance(gold, dict) or not gold:
        raise ValueError(
            f"question {question.id!r}: the reference is no JSON object, got {question.answer!r}, "
            "expected one with fields; correct the sample"
        )
    answer = _object(parsed or "")
    for block in reversed(_FENCED.findall(response)) if answer is None else ():
        answer = _object(block)
        break
    if answer is None:
        return {"accuracy": (0.0, 0.0), "f1": 0.0}
    same = sum(name in answer and _plain(answer[name]) == _plain(gold[name]) for name in gold)
    f1 = 2 * same / (len(answer) + len(gold))
    return {"accuracy": (float(f1 == 1), 0.0), "f1": f1}


def _object(text: str) -> dict[str, Any] | None:
    try:
        found = load_json(text.encode(errors="replace"))
    except ValueError:  # a field twice, too deep, or no JSON at all
        return None
    return found if isinstance(found, dict) else None


def _plain(value: Any) -> Any:
    """Return a value that equals another one's if the two are the same: true is not 1."""
    if isinstance(value, str):
        return value.strip().casefold()
    if isinstance(value, list):
        return [_plain(each) for each in value]
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    if isinstance(value, bool) or value is None:
        return json.dumps(value)
    return value  # numbers: 12.50 is 12.5
