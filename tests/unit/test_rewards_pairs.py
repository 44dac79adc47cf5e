"""Pairs of answers of every kind: everyday notation that has to be right, and near misses of which
none may be.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from data.question import Question
from zppo_mm.rewards.verify import Verifier

MIN_WRONG = 400
MIN_PEER_SHARE = 0.95
"""Of another project's right answers, those that are accepted; docs/rewards.md names the others."""


def read_pairs(name: str) -> dict[str, list[tuple[str, str]]]:
    """Return (answer, reference) by kind; a line is `answer <> reference`, a kind stands in square
    brackets.
    """
    pairs: dict[str, list[tuple[str, str]]] = {}
    kind = ""
    for line in (Path(__file__).parent / name).read_text(encoding="utf-8").splitlines():
        answer, separator, reference = line.partition(" <> ")
        if separator:
            pairs[kind].append((answer, reference))
        else:
            kind = line.strip("[]")
            pairs[kind] = []
    return pairs


RIGHT, WRONG = read_pairs("answers_right.txt"), read_pairs("answers_wrong.txt")


@pytest.fixture(scope="module")
def verifier() -> Iterator[Verifier]:
    with Verifier(timeout_seconds=60.0, budget_seconds=600.0) as made:
        yield made


def judged(verifier: Verifier, pairs: list[tuple[str, str]]) -> list[tuple[str, str, str]]:
    verdicts = verifier.verify_all(
        [(Question("q", "?", (), gold, "math"), f"\\boxed{{{parsed}}}") for parsed, gold in pairs]
    )
    return [(*pair, verdict.reason) for pair, verdict in zip(pairs, verdicts, strict=True)]


@pytest.mark.parametrize("kind", RIGHT)
@pytest.mark.medium
def test_everyday_notation_is_right(verifier: Verifier, kind: str) -> None:
    assert [pair for pair in judged(verifier, RIGHT[kind]) if pair[2] != "match"] == []


@pytest.mark.parametrize("kind", WRONG)
@pytest.mark.medium
def test_near_misses_are_wrong_in_both_directions(verifier: Verifier, kind: str) -> None:
    both = [
        *WRONG[kind],
        *((gold, parsed) for parsed, gold in WRONG[kind]),
    ]
    assert [
        pair for pair in judged(verifier, both) if pair[2] not in ("mismatch", "not_boxed")
    ] == []


@pytest.mark.medium
def test_another_projects_wrong_answers_are_wrong_and_most_right_ones_are_right(
    verifier: Verifier,
) -> None:
    """Verdicts are those of math-verify's tests (github.com/huggingface/Math-Verify, 5d148cf)."""
    peer = read_pairs("answers_peer.txt")
    accepted = {
        kind: [pair for pair in judged(verifier, pairs) if pair[2] == "match"]
        for kind, pairs in peer.items()
    }
    assert accepted["wrong"] == []
    assert len(accepted["right"]) >= MIN_PEER_SHARE * len(peer["right"])


@pytest.mark.medium
def test_there_are_enough_near_misses() -> None:
    right, wrong = (
        {pair for pairs in table.values() for pair in pairs} for table in (RIGHT, WRONG)
    )
    assert len(wrong) >= MIN_WRONG
    assert not right & wrong
