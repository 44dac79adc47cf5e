"""Grading of whole responses: reasons, multiple choice, the judge, and workers that hang, die and
come back.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence

import psutil
import pytest

from data.errors import DataError
from data.question import AnswerType, Question
from zppo_mm.errors import ConfigError
from zppo_mm.rewards.boxes import final_answer
from zppo_mm.rewards.grading_process import is_equal
from zppo_mm.rewards.mathematics import MAX_ANSWER_CHARS
from zppo_mm.rewards.verify import JudgedResponse, Verdict, Verifier
from zppo_mm.rewards.workers import GradingPool

LIMIT_SECONDS = 2.0
# Killing and reaping a worker on a loaded machine.
MARGIN_SECONDS = 30.0
HANGING = {
    "tower": "9^{9^{9^9}}", "ten": "10^{10^{10}}", "factorial": "(10^9)!",
    "binomial": "\\binom{10^9}{10^8}",
    "parentheses": "(" * 2000 + "1+x" + ")" * 2000,
    "sum": "+".join(f"\\sqrt{{{i}}}" for i in range(300)),
    "set": "\\{" + ",".join(f"\\sqrt{{{i}}}" for i in range(3000)) + "\\}",
}  # fmt: skip


def question(gold: str, answer_type: AnswerType = "math", choices: Sequence[str] = ()) -> Question:
    return Question("q7", "?", (), gold, answer_type, tuple(choices))


HANGING_OWNER = """
import threading
from zppo_mm.rewards.workers import GradingPool
pool = GradingPool(600.0, 1, budget_seconds=600.0)
pool.compare_all([("1+x", "x+1")])
threading.Timer(1.0, lambda: print(pool._workers[0].process.pid, flush=True)).start()
pool.compare_all([("9^{9^{9^9}}+x", "7")])
"""


@pytest.fixture(scope="module")
def pool() -> Iterator[GradingPool]:
    made = GradingPool(LIMIT_SECONDS, 1)
    yield made
    made.close()


def test_reasons() -> None:
    with Verifier() as verifier:
        items = [
            (question("5"), text)
            for text in [
                "\\boxed{5}",
                "\\boxed{6}",
                "5",
                "\\boxed{}",
                "\\boxed{5",
                f"\\boxed{{{'5' * 3000}}}",
            ]
        ]
        assert verifier.verify_all(items) == [
            Verdict("5", 1.0, "match"),
            Verdict("6", 0.0, "mismatch"),
            Verdict(None, 0.0, "not_boxed"),
            Verdict(None, 0.0, "not_boxed"),
            Verdict(None, 0.0, "not_boxed"),
            Verdict("5" * 3000, 0.0, "too_long"),
        ]
        assert verifier.verify(question("5" * 3000), f"\\boxed{{{'5' * 3000}}}").reason == "match"
        assert verifier.verify_all([]) == []


@pytest.mark.parametrize("name", HANGING)
@pytest.mark.medium
def test_hanging_inputs_end_in_time_and_the_next_answer_is_right(
    pool: GradingPool, name: str
) -> None:
    pool.compare_all([("1+x", "x+1")])  # the worker is warm, so that only the answer is timed
    started = time.monotonic()
    (outcome,) = pool.compare_all([(HANGING[name], "\\frac{x}{3}")])
    assert time.monotonic() - started < LIMIT_SECONDS + MARGIN_SECONDS
    assert outcome in ("different", "timeout", "error")
    assert pool.compare_all([("1+x", "x+1"), ("2+x", "x+1")]) == ["equal", "different"]


@pytest.mark.medium
def test_a_timeout_is_named_and_counted_and_harms_no_neighbour() -> None:
    with Verifier(LIMIT_SECONDS, num_workers=2) as verifier:
        hang = (question("x"), "\\boxed{9^{9^{9^9}}+x}")
        fine = (question("x+1"), "\\boxed{1+x}")
        verdicts = verifier.verify_all([hang, fine, hang, fine, (question("2x"), "\\boxed{x+x}")])
        assert [v.reason for v in verdicts] == ["timeout", "match", "timeout", "match", "match"]
        assert [v.reward for v in verdicts] == [None, 1.0, None, 1.0, 1.0]
        assert verifier.num_timeouts == 1  # equal comparisons are made once


def test_works_off_the_main_thread_and_leaves_the_alarm_alone() -> None:
    results: list[str] = []
    handler = signal.getsignal(signal.SIGALRM)
    signal.setitimer(signal.ITIMER_REAL, 500)
    with Verifier(60.0) as verifier:

        def grade() -> None:
            results.append(verifier.verify(question("x+1"), "\\boxed{1+x}").reason)

        threads = [threading.Thread(target=grade) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert results == ["match"] * 3
    assert signal.setitimer(signal.ITIMER_REAL, 0)[0] > 0
    assert signal.getsignal(signal.SIGALRM) == handler


@pytest.mark.medium
def test_a_worker_that_died_is_replaced_and_none_is_left_behind() -> None:
    pool = GradingPool(60.0, 1)
    assert pool.compare_all([("1+x", "x+1")]) == ["equal"]
    process = pool._workers[0].process
    assert process is not None
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert pool.compare_all([("1+x", "x+1"), ("x", "y")]) == ["equal", "different"]
    last = pool._workers[0].process
    assert last is not None
    pool.close()
    assert last.poll() is not None
    assert pool.compare_all([("1+x", "x+1")]) == ["equal"]
    last = pool._workers[0].process
    assert last is not None
    del pool
    assert last.wait(60) == -signal.SIGKILL


def test_a_worker_that_cannot_start_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(
        RuntimeError,
        match=(
            r"a grading worker ended with exit status 1 before it was ready.*"
            r"check that math-verify is installed"
        ),
    ):
        GradingPool(1.0, 1).compare_all([("x", "y")])


def test_algebra_itself() -> None:
    assert is_equal("\\frac{2x}{4}", "x/2")
    assert not is_equal("1.414214", "\\sqrt{2}")


CHOICES = ("7 cm", "8 cm", "red", "7.5")


@pytest.mark.parametrize(
    ("parsed", "gold", "right"),
    [
        ("B", "B", True), ("b", "B", True), ("(B)", "B", True), ("B.", "B", True),
        ("B)", "B", True), ("\\text{B}", "B", True),
        ("option B", "B", True),
        ("The answer is B", "B", True), ("Answer: (B)", "B", True), ("B. 8 cm", "B", True),
        ("(B) 8 cm", "B", True),
        ("8 cm", "B", True), ("8", "B", True), ("Red", "C", True), ("\\frac{15}{2}", "D", True),
        ("B. eight", "B", True),
        ("A", "B", False), ("B. 7 cm", "B", False), ("A. 8 cm", "B", False),
        ("A and B", "B", False), ("AB", "B", False), ("E", "B", False),
        ("7 cm", "B", False), ("", "B", False), ("blue", "C", False), ("A, B", "B", False),
        ("7", "A", True),
    ],
)  # fmt: skip
def test_multiple_choice(parsed: str, gold: str, right: bool) -> None:
    with Verifier() as verifier:
        assert verifier.verify(
            question(gold, "choice", CHOICES), f"\\boxed{{{parsed}}}"
        ).reward == float(right)


def test_choice_text_must_be_unique_and_the_reference_a_letter() -> None:
    with Verifier() as verifier:
        assert verifier.verify(question("A", "choice", ["1/2", "0.5"]), "\\boxed{0.5}").reward == 0
        assert (
            verifier.verify(question("B", "choice", ["1/2", "0.5"]), "\\boxed{0.5}").reward == 1
        )  # spelled so
        assert (
            verifier.verify(question("B", "choice", ["1/2", "0.5"]), "\\boxed{0.50}").reward == 0
        )  # means both
        assert (
            verifier.verify(
                question("B", "choice", ["paradox", "choice paradox"]), "\\boxed{Choice paradox}"
            ).reward
            == 1
        )
        assert verifier.verify(question("C", "choice"), "\\boxed{C}").reward == 1
        with pytest.raises(
            DataError,
            match=(
                r"question 'q7': the reference answer is no option's letter, got 'E', expected one "
                r"of A, B, C, D"
            ),
        ):
            verifier.verify(question("E", "choice", CHOICES), "\\boxed{A}")


class ContainsJudge:
    """Calls a response right that contains the reference; remembers what it was shown."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, bool]] = []

    def judge(self, items: Sequence[JudgedResponse]) -> list[bool]:
        self.asked += [(item.text, item.is_final_answer) for item in items]
        return [item.question.answer in item.text for item in items]


def test_open_questions_go_to_the_judge() -> None:
    items = [
        (question("a cat", "open"), text)
        for text in ["\\boxed{it is a cat}", "\\boxed{a dog}", "No, a bird.", "So a cat."]
    ]
    judge = ContainsJudge()
    with Verifier(judge=judge) as verifier:
        assert [v.reason for v in verifier.verify_all([*items, (question("5"), "\\boxed{5}")])] == [
            "match",
            "mismatch",
            "mismatch",
            "match",
            "match",
        ]
    # What boxes nothing is shown whole; what rules decide is not shown.
    assert judge.asked == [
        ("it is a cat", True),
        ("a dog", True),
        ("No, a bird.", False),
        ("So a cat.", False),
    ]
    with (
        Verifier() as verifier,
        pytest.raises(
            ConfigError, match=r"question 'q7' has answer_type 'open' and there is no judge"
        ),
    ):
        verifier.verify_all(items)


MODE_ITEMS = [
    (question("5"), "\\boxed{5}"),
    (question("5"), "\\boxed{five, that is 5}"),
    (question("5"), "It must be 5."),
    (question("5"), "\\boxed{6}"),
    (question("A", "choice", ["red", "blue"]), "\\boxed{A}"),
    (question("A", "choice", ["red", "blue"]), "\\boxed{B. blue}"),
    (question("A", "choice", ["red", "blue"]), "\\boxed{A colour}"),
    (question("A", "choice", ["red", "blue"]), "A, clearly"),
    (question("a cat", "open"), "a cat"),
    (question("5"), "\\boxed{" + "5 " * MAX_ANSWER_CHARS + "}"),
]


@pytest.mark.parametrize(
    ("mode", "asked"),
    [("never", []), ("open", [8]), ("fallback", [1, 2, 3, 6, 7, 8])],
)
def test_what_the_judge_decides(mode: str, asked: list[int]) -> None:
    judge = ContainsJudge()
    items = [item for item in MODE_ITEMS if mode != "never" or item[0].answer_type != "open"]
    with Verifier(judge=judge, judge_mode=mode) as verifier:
        verdicts = verifier.verify_all(items)
        assert verifier.with_judge_mode("never").can_grade(question("a", "open")) is False
        assert verifier.can_grade(question("a", "open")) is (mode != "never")
    shown = [final_answer(text) or text for _, text in (items[index] for index in asked)]
    assert [text for text, _ in judge.asked] == shown
    right = {0, 4} | {index for index in asked if index != 3}
    expected = [float(index in right) for index in range(len(items))]
    assert [verdict.reward for verdict in verdicts] == expected


def test_a_comparison_that_does_not_finish_is_left_to_a_fallback() -> None:
    hanging = (question("x"), "\\boxed{9^{9^{9^{9}}} + x}")
    with Verifier(0.05, judge=ContainsJudge(), budget_seconds=0.05) as verifier:
        assert verifier.verify(*hanging).reason in ("timeout", "error")
        assert verifier.with_judge_mode("fallback").verify(*hanging).reason == "match"


class ConstantReward:
    """Gives every answer the same reward."""

    def __init__(self, reward: float) -> None:
        self._reward = reward

    def grade_all(self, items: Sequence[tuple[Question, str]]) -> list[Verdict]:
        return [Verdict(parsed, self._reward, "mismatch") for _, parsed in items]


def test_a_reward_is_chosen_by_answer_type_and_may_be_partial() -> None:
    items = [(question("a cat", "open"), "\\boxed{a dog}"), (question("5"), "\\boxed{5}")]
    with Verifier(rewards={"open": ConstantReward(0.25)}) as verifier:
        assert [verdict.reward for verdict in verifier.verify_all(items)] == [0.25, 1.0]
    with (
        Verifier(rewards={"open": ConstantReward(1.5)}) as verifier,
        pytest.raises(ValueError, match=r"'open' is out of range, got 1\.5, expected a number"),
    ):
        verifier.verify_all(items)


def test_it_says_beforehand_what_it_can_grade() -> None:
    kinds: tuple[AnswerType, ...] = ("math", "choice", "open")
    with Verifier() as alone, Verifier(judge=ContainsJudge()) as judging:
        assert [alone.can_grade(question("A", kind)) for kind in kinds] == [True, True, False]
        assert [judging.can_grade(question("A", kind)) for kind in kinds] == [True, True, True]


def test_wrong_settings_are_named() -> None:
    with pytest.raises(
        ConfigError, match=r"reward: out of range, got timeout_seconds=0, budget_seconds=60.0"
    ):
        Verifier(0)


@pytest.mark.medium
def test_workers_end_in_the_middle_of_a_comparison_when_their_owner_is_killed() -> None:
    """A run that is killed cannot kill its workers."""
    with subprocess.Popen(
        [sys.executable, "-c", HANGING_OWNER], stdout=subprocess.PIPE, text=True
    ) as owner:
        assert owner.stdout is not None
        worker = psutil.Process(int(owner.stdout.readline()))
        processes = [worker, *worker.children()]
        assert len(processes) == 2
        owner.kill()
    _, alive = psutil.wait_procs(processes, timeout=60)
    assert all(process.status() == psutil.STATUS_ZOMBIE for process in alive)
