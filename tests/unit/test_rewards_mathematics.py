"""Which answers are the same: the table of pairs, the boxed answer, and what must cost nothing."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from data.question import Question
from zppo_mm.rewards.boxes import last_boxed
from zppo_mm.rewards.choice import matches_choice
from zppo_mm.rewards.mathematics import MAX_ANSWER_CHARS, Undecided, compare
from zppo_mm.rewards.notation import normalise
from zppo_mm.rewards.verify import Verifier

SAME_BY_RULE = [
    ("7", "7"), ("007", "7"), ("+5", "5"), ("-5", "\u22125"), ("5.", "5"), (".5", "0.5"),
    ("1.0", "1"), ("(5)", "5"), ("{5}", "5"),
    ("1/2", "0.5"), ("\\frac12", "1/2"), ("\\frac{1}{2}", "0.50"), ("\\dfrac{1}{2}", "\\tfrac12"),
    ("-\\frac{1}{2}", "-1/2"),
    ("2/4", "1/2"),
    ("3 1/2", "7/2"), ("3\\frac{1}{2}", "3.5"), ("-3 1/2", "-7/2"),
    ("1,000", "1000"), ("1 000", "1000"), ("1{,}000", "1000"), ("5 000 000", "5,000,000"),
    ("1\\,000", "1000"),
    ("3e2", "300"), ("5 \\times 10^3", "5000"), ("5 \\cdot 10^{3}", "5000"), ("2^{10}", "1024"),
    ("2^3", "8"),
    ("75\\%", "75"), ("75", "75%"), ("75%", "75\\%"), ("75 percent", "75"), ("30^\\circ", "30"),
    ("30\u00b0", "30^{\\circ}"),
    ("30 degrees", "30"), ("12 cm", "12"), ("12", "12\\text{ cm}"),
    ("12\\text{cm}", "12\\,\\mathrm{cm}"), ("12 centimeters", "12 cm"),
    ("5 apples", "5"), ("\\$5", "5 dollars"), ("$5$", "5"), ("9 square meters", "9 m^2"),
    ("9 m\u00b2", "9 m^{2}"), ("5 km/h", "5 kmh"),
    ("1/2 cm", "0.5 cm"), ("30\u00b0C", "30"), ("1:2", "1 : 2"), ("x=5", "5"), ("x = 5", "x=5.0"),
    ("Yes", "yes"), ("\\text{East}", "east"), ("no solution", "No  solution."),
    ("(1, 2)", "\\left(1,2\\right)"), ("\\sqrt 2", "\\sqrt2"),
    ("12,5", "12.5"), ("\\{1,2\\}", "\\{2, 1\\}"), ("y=2x+1", "2x+1"),
    ("\\sqrt{2}\\text{ cm}", "\\sqrt{2}"),
    ("50\\sqrt{2}\\%", "50\\sqrt{2}"),
]  # fmt: skip
DIFFERENT_BY_RULE = [
    ("7", "8"), ("3/4", "75\\%"), ("0.75", "75%"), ("30\u00b0", "30%"), ("12 cm", "12 m"),
    ("9 m^2", "9 m^3"), ("5 apples", "5 pears"),
    ("30\u00b0C", "30\u00b0F"), ("$5", "5 \u20ac"), ("1:2", "1/2"), ("1/2", "1:2"), ("1:2", "2:4"),
    ("0.3333333333", "1/3"),
    ("5 million", "5"),
    ("listen", "silent"), ("on", "no"), ("two", "2"),
    ("\\sqrt{2}\\text{ cm}", "\\sqrt{2}\\text{ m}"), ("1.41421356", "1.4142"),
    ("east", "west"), ("__import__('os').system('true')", "5"), ("5", "five"), ("99%", "1%"),
    ("5 or 6", "5"), ("(1,2)", "(2,1)"), ("1e999", "5"), ("", "5"),
]  # fmt: skip
SAME_BY_ALGEBRA = [
    ("x^2+2x+1", "(x+1)^2"), ("\\frac{\\sqrt2}{2}", "\\frac{1}{\\sqrt{2}}"), ("10!", "3628800"),
    ("1.5\\pi", "\\frac{3\\pi}{2}"), ("4-3", "1"),
]  # fmt: skip
DIFFERENT_BY_ALGEBRA = [
    ("1.41421356", "\\sqrt{2}"), ("1 0", "10"), ("x = 5", "y = 5"), ("5x", "5"),
    ("-\\infty", "\\infty"), ("\\frac{1}{0}", "5"),
    ("\\frac{", "5"), ("]][[", "5"),
]  # fmt: skip
MAX_FAST_SECONDS = 0.002  # ten times what a comparison takes on a busy core


@pytest.fixture(scope="module")
def verifier() -> Iterator[Verifier]:
    with Verifier(timeout_seconds=60.0) as made:
        yield made


def question(gold: str) -> Question:
    return Question("q", "?", (), gold, "math")


@pytest.mark.parametrize(("parsed", "gold"), SAME_BY_RULE)
def test_same_by_rule_in_both_directions(parsed: str, gold: str) -> None:
    assert compare(parsed, gold) is True
    assert compare(gold, parsed) is True


@pytest.mark.parametrize(("parsed", "gold"), DIFFERENT_BY_RULE)
def test_different_by_rule_in_both_directions(parsed: str, gold: str) -> None:
    assert compare(parsed, gold) is False
    assert compare(gold, parsed) is False


def test_algebra_decides_the_rest(verifier: Verifier) -> None:
    pairs = [*SAME_BY_ALGEBRA, *DIFFERENT_BY_ALGEBRA]
    assert [pair for pair in pairs if not isinstance(compare(*pair), Undecided)] == []
    verdicts = verifier.verify_all(
        [
            (question(gold), f"so \\boxed{{{parsed}}}")
            for parsed, gold in pairs
            if parsed.count("{") == parsed.count("}")
        ]
    )
    assert [int(v.reward) for v in verdicts] == [1] * len(SAME_BY_ALGEBRA) + [0] * (
        len(verdicts) - len(SAME_BY_ALGEBRA)
    )
    assert (verifier.num_timeouts, verifier.num_errors) == (0, 0)


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("\\boxed{1} then \\boxed{2}", "2"),
        ("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
        ("\\boxed {\n 3 }", "3"),
        ("\\boxed{\\boxed{5}}", "5"),
        ("\\boxed{5\\ }", "5"),
        ("\\boxed{5\\\\ }", "5\\\\"),
        ("\\boxed{\\left\\{1\\right.}", "\\left\\{1\\right."),
        ("\\boxed{1} and \\boxed{2", None),
        ("\\boxed{}", None),
        ("give the answer in \\boxed{}", None),
        ("boxed{5}", None),
        ("\\boxed 5", None),
        ("", None),
        ("<think>\\boxed{1}</think>so 2", "1"),
        ("\\boxed{" * 20000, None),
    ],
)
def test_last_boxed(text: str, parsed: str | None) -> None:
    assert last_boxed(text) == parsed


def test_normalise_by_hand() -> None:
    assert normalise(" $\\displaystyle \\left( 1,\\; 2\\right)$. ") == "( 1, 2)"
    assert normalise("\\text{5 cm}\u00b2") == "5 cm ^{2}"


@pytest.mark.parametrize(
    "answer",
    [
        "9" * 999,
        "(" * 999,
        "1/" * 499,
        "-" * 999,
        "9 " * 499,
        "1,000" * 199,
        "{" * 999,
        "a " * 499,
        "^" * 999,
        "1e" + "9" * 900,
        ":" * 999,
        "\\frac" * 190,
    ],
)
def test_hostile_answers_are_read_in_no_time(answer: str) -> None:
    started = time.thread_time()
    compare(answer, "1/3")
    assert time.thread_time() - started < 25 * MAX_FAST_SECONDS


# Repeated up to the length limit: whatever a pattern could match in two ways makes the time explode
# when the end does not fit.
HOSTILE_UNITS = (
    "1 : ", "1:", " : ", "1/", "1 / ", "1, ", "1,000 ", "1 000", " ", "- 1", "(1)", "{1}",
    "\\frac{1}", "\\frac{", "\\frac12",
    "1 "
    "\\frac12", "1x10^1", "1*10^{1}", "2^2", "a_", "a_{", "_", "x =", "1a", "1 a", "1a/", "1 a ^2",
    "a ", "a", "A. ", "(A) ", "option ",
    "the answer is ", "\\text{", "\\text{1}", "\\begin{", "\\left", "\\quad", "$", "\\$", "1\u20ac",
    "%", " per cent", "^\\circ",
    "^ "
    "{", "30 degrees ", " .", "1.", "1e9", "\\\\", "~", "\u2212", "\u00b0", "\u03c0", "\n", "1\t",
    "\\boxed{", "}",
)  # fmt: skip
MAX_HOSTILE_SECONDS = (
    1.0  # measured below 0.1 on a busy core; a pattern that backtracks takes longer than the run
)


@pytest.mark.timeout(100)  # a pattern that explodes cannot be interrupted otherwise
@pytest.mark.parametrize("tail", ["", "1:", "!"])
def test_every_rule_takes_little_time_for_any_answer_within_the_limit(tail: str) -> None:
    options = Question("q", "?", (), "A", "choice", ("1/3", "7 cm", "red", "x" * 900))
    slow = []
    for unit in HOSTILE_UNITS:
        answer = (unit * MAX_ANSWER_CHARS)[: MAX_ANSWER_CHARS - len(tail)] + tail
        rules = {
            "compare": lambda text=answer: compare(text, "1/3"),
            "normalise": lambda text=answer: normalise(text),
            "matches_choice": lambda text=answer: matches_choice(text, options),
            "last_boxed": lambda text=answer: last_boxed("\\boxed{" + text + "}"),
        }
        for name, rule in rules.items():
            started = time.thread_time()
            rule()
            seconds = time.thread_time() - started
            slow += [(name, unit, seconds)] if seconds > MAX_HOSTILE_SECONDS else []
    assert slow == []


def test_a_long_ratio_is_still_one() -> None:
    terms = [str(index) for index in range(1, 120)]
    assert compare(" : ".join(terms), ":".join(terms)) is True
    assert compare(" : ".join(terms), ":".join([*terms[:-1], "7"])) is False


@pytest.mark.medium
def test_plain_answers_need_no_worker_and_no_time() -> None:
    with Verifier() as verifier:
        started = time.thread_time()
        for _ in range(200):
            assert verifier.verify(question("1/2"), "some reasoning\n\\boxed{0.5}").reward == 1
        assert (time.thread_time() - started) / 200 < MAX_FAST_SECONDS
        assert verifier._pool._workers == []
