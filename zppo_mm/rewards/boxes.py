"""The final answer of a response: what is boxed last."""

from __future__ import annotations

import re

from zppo_mm.rewards.notation import closing_brace

MAX_CHARS_BETWEEN_BOXES = 60

_BRACE = re.compile(r"\s*\{")
_LAYOUT = re.compile(r"\\[()\[\],;: ]|\\q?quad(?![a-zA-Z])|\\text\s*\{([^{}]*)\}|[$\s~]+")
_JOINT = re.compile(r" ?(?:[,;]|[,;]? ?(?:and|or)) ?(?:\\?[A-Za-z]+(?:_\{?\w+\}?)? ?= ?)?")


def last_boxed(text: str) -> str | None:
    r"""Return the content of the last `\boxed{}`, `None` if there is none, it is empty, or its
    brace is never closed.
    """
    start = text.rfind("\\boxed")
    if start < 0:
        return None
    brace = _BRACE.match(text, start + len("\\boxed"))
    if brace is None:
        return None
    end = text.find("}", brace.end())
    if end >= 0 and ("{" in text[brace.end() : end] or "\\" in text[brace.end() : end]):
        end = closing_brace(text, brace.end() - 1)
    return _content(text[brace.end() : end]) or None if end > 0 else None


def final_answer(text: str) -> str | None:
    r"""Return what a response answers: the content of the last `\boxed{}`, or of the last ones as a
    list.

    Boxes belong together if nothing but a comma, a semicolon, "and" or "or" joins them, with a name
    at most: `\boxed{2}` and `\boxed{3}` answer "2, 3". Boxes that say the same are one. `None` as
    by `last_boxed`.
    """
    content = last_boxed(text)
    if content is None or text.find("\\boxed") == text.rfind("\\boxed"):
        return content
    boxes: list[str] = [content]
    following = text.rfind("\\boxed")
    while True:
        start = text.rfind("\\boxed", 0, following)
        brace = _BRACE.match(text, start + len("\\boxed")) if start >= 0 else None
        end = closing_brace(text, brace.end() - 1) if brace else -1
        if brace is None or not 0 < end < following or following - end > MAX_CHARS_BETWEEN_BOXES:
            break
        between = _LAYOUT.sub(lambda match: f" {match[1] or ''} ", text[end + 1 : following])
        if not _JOINT.fullmatch(" ".join(between.split())):
            break
        boxes.append(_content(text[brace.end() : end]))
        following = start
    return ", ".join(dict.fromkeys(box for box in reversed(boxes) if box))


def _content(inside: str) -> str:
    r"""Return what is between the braces of a box, without space around it.

    A control space ("\ ") at the end goes whole: its backslash alone would escape a closing brace.
    """
    text = inside.strip()
    backslashes = len(text) - len(text.rstrip("\\"))
    return text[:-1].rstrip() if backslashes % 2 else text
