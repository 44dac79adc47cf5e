"""Format directives in the questions of benchmarks, which say how to write the answer down.

A prompt says that itself, in its closing instruction, and always the same.
"""

from __future__ import annotations

import re

MAX_DIRECTIVE_CHARS = 300
"""More than any of them has; what is before is not searched."""
# Each is a whole sentence about the form of the answer and nothing else. What the answer depends
# on ("Round to two decimals", "in cm", "Answer yes or no") stays.
_FORM = (
    r"(?:only )?(?:(?:the )?(?:correct |right )?(?:option|choice)(?:['\u2019]s)? letter"
    r"|(?:the )?letter of the (?:correct |right )?(?:option|choice|answer)"
    r"|a single (?:word|phrase|letter)(?: or (?:a )?(?:short )?(?:word|phrase|number))?)"
    r"(?: (?:from|of|among) the (?:given |provided )?(?:choices|options))?"
    r"(?: directly| only| and nothing else)?"
)
_BOXED = (
    r"(?:put|place|write|give|provide|return|state|enclose|box) (?:your|the) (?:final )?answer"
    r" (?:in|inside|within|using|with)(?: a| the)? \$?\\boxed(?:\{[^{}]*\})?\$?"
)
_STEPS = (
    r"(?:let's |let us )?(?:think|reason|solve (?:it|this|the problem)|answer)(?: it)?"
    r" step[ -]by[ -]step"
)
_SENTENCES = (
    rf"(?:answer|respond)(?: the question)?(?: directly)? (?:with|using|by giving) {_FORM}",
    rf"(?:provide|give|output|write|return) {_FORM}",
    _BOXED,
    rf"{_STEPS}(?:,? and (?:then )?{_BOXED})?",
)
_LAST = re.compile(
    r"(?<=[.?!:\n)])\s*"
    rf"(?:please,? )?(?:{'|'.join(_SENTENCES)})\s*[.!]?\Z",
    re.IGNORECASE,
)
# MathVista and others put it before the question.
_FIRST = re.compile(
    r"\AHint: Please answer the question[^\n]*at the end\.\s*\n\s*Question:\s*", re.IGNORECASE
)


def without_directives(text: str) -> str:
    """Return a question without the format directives that begin or end it; unchanged if nothing
    else is in it.
    """
    left = _FIRST.sub("", text, count=1).rstrip()
    while match := _LAST.search(left, max(0, len(left) - MAX_DIRECTIVE_CHARS)):
        left = left[: match.start()].rstrip()
    return left if left and left != text.rstrip() else text
