"""The reward functions that come with the project, against naive formulas and hand numbers."""

from __future__ import annotations

import json
import random
from functools import cache
from typing import Any

import pytest

from data.question import Question
from zppo_mm.rewards.boxes import final_answer
from zppo_mm.rewards.function_process import load_function, read_reward
from zppo_mm.rewards.ready import grounding, json_fields, readings, tags, texts
from zppo_mm.rewards.verify import Verifier


def graded(function: Any, answer: str, response: str, metadata: Any = None) -> tuple[float, float]:
    """Return reward and accuracy of a response, as a run would read them."""
    asked = Question("q", "?", (), answer, "own")
    returned = function(
        question=asked, response=response, parsed=final_answer(response), metadata=metadata
    )
    reward, parts = read_reward(returned)
    return reward, parts.get("accuracy", reward)


@cache
def naive_distance(one: str, other: str) -> int:
    if not one or not other:
        return len(one) + len(other)
    return min(
        naive_distance(one[1:], other[1:]) + (one[0] != other[0]),
        naive_distance(one[1:], other) + 1,
        naive_distance(one, other[1:]) + 1,
    )


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [("kitten", "sitting", 3), ("intention", "execution", 5), ("flaw", "lawn", 2), ("", "abc", 3)],
)
def test_distances_of_textbooks(one: str, other: str, expected: int) -> None:
    assert texts.distance(one, other) == texts.distance(other, one) == expected


def test_similarity_is_the_formula() -> None:
    rng = random.Random(0)
    for _ in range(300):
        one, other = ("".join(rng.choices("ab ", k=rng.randrange(1, 8))) for _ in range(2))
        normalised = naive_distance(one, other) / max(len(one), len(other))
        assert texts.similarity(one, other) == (1 - normalised if normalised < 0.5 else 0.0)


@pytest.mark.parametrize(
    ("answer", "response", "metadata", "expected"),
    [
        ("Paris", "\\boxed{paris}", None, 1),
        ("sitting", "\\boxed{kitten}", None, 1 - 3 / 7),
        ("abcd", "\\boxed{abxy}", None, 0),  # a half differs
        ("Coca  Cola", "\\boxed{ coca cola }", None, 1),
        ("x", "\\boxed{kitten}", {"answers": ["far", "mitten"]}, 1 - 1 / 6),
        ("Paris", "Paris", None, 0),  # nothing boxed
    ],
)
def test_anls(answer: str, response: str, metadata: Any, expected: float) -> None:
    assert graded(texts.anls, answer, response, metadata)[0] == pytest.approx(expected, abs=1e-15)
    assert graded(texts.exact, answer, response, metadata)[0] == (expected == 1)


@pytest.mark.parametrize(
    ("answer", "response", "tolerance", "right"),
    [
        ("100", "\\boxed{104.9}", None, True),
        ("100", "\\boxed{105}", None, True),  # |105 - 100| = 0.05 * 100
        ("100", "\\boxed{105.1}", None, False),
        ("-40", "\\boxed{-41.9}", None, True),
        ("-40", "\\boxed{41}", None, False),
        ("1,250", "\\boxed{\\$1250}", 0, True),
        ("12.5%", "\\boxed{12.5}", 0, True),
        ("2e3", "\\boxed{2,000}", 0, True),
        ("0", "\\boxed{0.001}", None, False),
        ("100", "\\boxed{about 100}", None, False),
        ("100", "\\boxed{100 or 300}", None, False),
        ("100", "100", None, False),
        ("Brazil", "\\boxed{ brazil}", None, True),
        ("Brazil", "\\boxed{5}", None, False),
    ],
)
def test_a_reading_within_tolerance(
    answer: str, response: str, tolerance: float | None, right: bool
) -> None:
    metadata = {"tolerance": tolerance}
    assert graded(readings.within_tolerance, answer, response, metadata)[0] == right


def pixels(box: list[int]) -> set[tuple[int, int]]:
    return {(x, y) for x in range(box[0], box[2]) for y in range(box[1], box[3])}


def test_iou_is_that_of_the_pixels() -> None:
    rng = random.Random(1)
    for _ in range(300):
        one, other = ([rng.randrange(9) for _ in range(4)] for _ in range(2))
        both, all_ = pixels(one) & pixels(other), pixels(one) | pixels(other)
        expected = len(both) / len(all_) if both else 0.0
        assert grounding.box_iou(one, other) == pytest.approx(expected, abs=1e-12)
        found = graded(grounding.iou, str(other), f"\\boxed{{{one}}}")
        assert found == (pytest.approx(expected, abs=1e-12), expected >= 0.5)


def test_a_dash_between_numbers_is_no_sign() -> None:
    assert grounding.numbers("10-20-30-40") == [10, 20, 30, 40]
    assert grounding.numbers("(-1.5, -2) - 3") == [-1.5, -2, 3]


def test_the_closest_of_several_boxes_counts() -> None:
    metadata = {"boxes": [[0, 0, 2, 2], [10, 10, 14, 12]]}
    # 4 x 1 of 4 x 2
    assert graded(grounding.iou, "-", "\\boxed{(10, 10), (14, 11)}", metadata) == (0.5, 1)
    assert graded(grounding.iou, "-", "\\boxed{10, 10, 14}", metadata) == (0, 0)
    assert graded(grounding.iou, "-", "10 10 14 11", metadata) == (0, 0)
    for point, inside in (("1, 2", 1), ("12.5, 11", 1), ("3, 1", 0), ("1", 0), ("1, 1, 1", 0)):
        assert graded(grounding.pointing, "-", f"\\boxed{{{point}}}", metadata)[0] == inside
    with pytest.raises(ValueError, match=r"'q': the reference is no box, got \[1.0, 2.0\], expect"):
        graded(grounding.iou, "1, 2", "\\boxed{1, 2, 3, 4}")


RECEIPT = json.dumps({"shop": "Lidl", "total": 12.5, "items": ["a", "b"], "paid": True})


@pytest.mark.parametrize(
    ("answer", "f1"),
    [
        ({"paid": True, "items": ["A", "b"], "total": 12.50, "shop": " lidl"}, 1),
        ({"paid": True, "items": ["a", "b"], "total": 12.5}, 2 * 3 / 7),
        ({"paid": 1, "items": ["b", "a"], "total": "12.5", "shop": "Lidl", "x": 0}, 2 * 1 / 9),
        ({}, 0),
        ([1], 0),
    ],
)
def test_fields_of_an_object(answer: Any, f1: float) -> None:
    for response in (
        f"\\boxed{{{json.dumps(answer)}}}",
        f"So:\n```json\n{json.dumps(answer)}\n```",
    ):
        assert graded(json_fields.fields, RECEIPT, response) == (pytest.approx(f1), f1 == 1)
    huge = json.dumps({"shop": 10**400})
    assert graded(json_fields.fields, RECEIPT, f"\\boxed{{{huge}}}") == (0, 0)
    assert graded(json_fields.fields, RECEIPT, "```json\n{broken}\n```") == (0, 0)
    with pytest.raises(ValueError, match=r"the reference is no JSON object, got '\[\]'"):
        graded(json_fields.fields, "[]", "")


@pytest.mark.parametrize(
    ("response", "is_tagged"),
    [
        ("<think>a</think>So \\boxed{5}", True),
        ("a</think>So \\boxed{5}", True),  # the prompt opened it
        ("So \\boxed{5}", False),
        ("<think>a</think>So 5", False),
        ("<think>\\boxed{4}</think>\\boxed{5}", True),
        ("<think>a</think>\\boxed{4} \\boxed{5}", False),
        ("<think>a</think><think>b</think>\\boxed{5}", False),
        ("a <think>b</think>\\boxed{5}", False),
        ("<think>a <think>b</think>\\boxed{5}", False),
    ],
)
def test_the_form_of_a_response(response: str, is_tagged: bool) -> None:
    assert tags.is_tagged(response) == is_tagged


def test_a_right_answer_in_form_is_right_by_the_same_rules() -> None:
    name = "zppo_mm.rewards.ready.tags:right_and_tagged"
    items = [
        (Question("a", "?", (), "\\frac{x}{2}", "math"), "t</think>\\boxed{0.5x}"),
        (Question("a", "?", (), "\\boxed{7}", "math"), "\\boxed{7}"),
        (Question("a", "?", (), "7", "math"), "t</think>\\boxed{8}"),
        (Question("a", "?", (), "B", "choice", ("red", "blue")), "t</think>\\boxed{blue}"),
        (Question("a", "?", (), "B", "choice", ("red", "blue")), "no idea"),
    ]
    with Verifier(60, 1, functions={"math": name, "choice": name}) as verifier, Verifier() as ours:
        graded = verifier.verify_all(items)
        expected = [verdict.reward for verdict in ours.verify_all(items)]
    assert [verdict.parts["accuracy"] for verdict in graded] == expected == [1, 1, 0, 1, 0]
    assert [verdict.reward for verdict in graded] == pytest.approx([1, 0.9, 0.1, 1, 0])


@pytest.mark.parametrize(
    "name",
    [
        "texts:exact",
        "texts:anls",
        "readings:within_tolerance",
        "grounding:iou",
        "grounding:pointing",
        "json_fields:fields",
        "tags:right_and_tagged",
    ],
)
def test_each_can_be_named(name: str) -> None:
    assert load_function(f"zppo_mm.rewards.ready.{name}").__doc__
