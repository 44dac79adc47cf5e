"""Time of grading: answers that are decided by text, by kind, and a burst of answers that hang.
Before it, how many of the right and wrong answers of tests/unit/answers_*.txt are accepted.

python benchmarks/grading.py
"""

from __future__ import annotations

import time

from data.question import Question
from tests.unit.test_rewards_pairs import read_pairs
from zppo_mm.rewards.verify import Verifier
from zppo_mm.rewards.workers import GradingPool

NUM_ANSWERS, NUM_ROUNDS = 500, 5
OPTIONS = ("red", "blue", "green", "x")
REASONING = "reason " * 300


def answers(number: int) -> dict[str, tuple[Question, str]]:
    """Return one answer of every kind, of which no two are equal."""
    other = (number * 7 + 3) % 1000
    pairs = {
        "integer": (str(number), f"{REASONING}\\boxed{{{other}}}"),
        "fraction": (
            f"\\frac{{{number}}}{{{other + 1}}}",
            f"\\boxed{{\\dfrac{{{number}}}{{{other + 1}}}}}",
        ),
        "with a unit": (f"{number}.5", f"\\boxed{{{number}.5\\text{{ cm}}}}"),
        "degrees": (f"{number}^\\circ", f"\\boxed{{{other}°}}"),
        "words": (f"no answer {number}", f"\\boxed{{\\text{{No answer {number}}}}}"),
        "pair": (f"({number}, {other})", f"\\boxed{{({number},{other})}}"),
    }
    asked = {
        kind: (Question("q", "?", (), gold, "math"), text) for kind, (gold, text) in pairs.items()
    }
    choice = Question("q", "?", (), "B", "choice", (*OPTIONS, str(number)))
    return {
        **asked,
        "choice, a letter": (choice, "\\boxed{B}"),
        "choice, a text": (choice, "\\boxed{blue}"),
    }


def count_accepted() -> None:
    """Print of each list of answers how many are accepted."""
    with Verifier(timeout_seconds=60.0, budget_seconds=600.0) as verifier:
        for name in ("right", "wrong", "peer"):
            for kind, pairs in merged(name).items():
                items = [
                    (Question("q", "?", (), gold, "math"), f"\\boxed{{{answer}}}")
                    for answer, gold in pairs
                ]
                reasons = [verdict.reason for verdict in verifier.verify_all(items)]
                print(f"answers_{name}.txt {kind}: {reasons.count('match')} of {len(pairs)}")


def merged(name: str) -> dict[str, list[tuple[str, str]]]:
    """Return the pairs of a list; those of our own lists, which have many kinds, as one."""
    pairs = read_pairs(f"answers_{name}.txt")
    return pairs if name == "peer" else {name: [pair for some in pairs.values() for pair in some]}


def main() -> None:
    count_accepted()
    rows = [answers(number) for number in range(NUM_ANSWERS)]
    with Verifier() as verifier:
        for kind in rows[0]:
            seconds = []
            for _ in range(NUM_ROUNDS):
                started = time.process_time()
                verifier.verify_all([row[kind] for row in rows])
                seconds.append(time.process_time() - started)
            print(f"{kind}: {min(seconds) / NUM_ANSWERS * 1e6:.1f} µs")
    pool = GradingPool(5.0, 2)
    for name, pairs in {
        "start and one": [("x+1", "1+x")],
        "100 by algebra": [
            (f"(x+{number})^2", f"x^2+{2 * number}x+{number**2}") for number in range(100)
        ],
        "24 that hang": [(f"9^{{9^{{9^9}}}}+{number}x", "x") for number in range(24)],
        "one after them": [("x+2", "2+x")],
    }.items():
        started = time.monotonic()
        outcomes = pool.compare_all(pairs)
        print(f"{name}: {time.monotonic() - started:.2f} s, {len(pairs)} {sorted(set(outcomes))}")
    pool.close()


if __name__ == "__main__":
    main()
