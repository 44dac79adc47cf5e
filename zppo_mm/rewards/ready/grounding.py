"""Boxes and points in a picture.

A box is `x1, y1, x2, y2`, whatever stands between the numbers, in the coordinates that the question
asks for. The reference is the question's answer, or the best of `metadata["boxes"]`, a list of such
lists.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from data.question import Question

RIGHT_IOU = 0.5
# Between two numbers a dash is no sign: 10-20-30-40.
_NUMBER = re.compile(r"(?:(?<!\d)-)?\d+(?:\.\d+)?")

Box: TypeAlias = Sequence[float]


def iou(
    question: Question, parsed: str | None, metadata: Any, **others: Any
) -> dict[str, float | tuple[float, float]]:
    """Reward a box by its intersection over union with the closest reference; it is right from
    0.5 on.

    With i the area that both have, IoU(a, b) = i / (|a| + |b| - i). An answer without exactly four
    numbers is no box.

    Source: The Pascal Visual Object Classes Challenge (IJCV 2010), section 4.2.
    """
    box = numbers(parsed or "")
    best = 0.0
    if len(box) == 4:
        best = max(box_iou(box, each) for each in references(question, metadata))
    return {"accuracy": (float(best >= RIGHT_IOU), 0.0), "iou": best}


def pointing(question: Question, parsed: str | None, metadata: Any, **others: Any) -> float:
    """Return 1 for a point `x, y` inside a reference box or on its edge.

    Source: Top-down Neural Attention by Excitation Backprop (arXiv 1608.00507), the pointing game.
    """
    point = numbers(parsed or "")
    if len(point) != 2:
        return 0.0
    x, y = point
    boxes = references(question, metadata)
    return float(any(x1 <= x <= x2 and y1 <= y <= y2 for x1, y1, x2, y2 in boxes))


def box_iou(one: Box, other: Box) -> float:
    """Return the intersection over union; 0 for a box without an area."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    if width <= 0 or height <= 0 or _area(one) <= 0 or _area(other) <= 0:
        return 0.0
    return width * height / (_area(one) + _area(other) - width * height)


def references(question: Question, metadata: Any) -> list[Box]:
    """Return the boxes that are right.

    Raises:
        ValueError: There is none.
    """
    several = metadata.get("boxes") if isinstance(metadata, Mapping) else None
    boxes = several or [numbers(question.answer)]
    wrong = next((box for box in boxes if len(box) != 4), None)
    if wrong is not None:
        raise ValueError(
            f"question {question.id!r}: the reference is no box, got {wrong}, expected x1, y1, x2, "
            "y2 in the answer or in metadata.boxes; correct the sample"
        )
    return list(boxes)


def numbers(text: str) -> list[float]:
    """Return all numbers of a text."""
    return [float(each) for each in _NUMBER.findall(text)]


def _area(box: Box) -> float:
    return max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1])
