"""Metrics: reductions, documented names, and what groups, teacher and buffer say in numbers."""

from __future__ import annotations

from collections import Counter

import pytest

from tests.support.simulated_run import make_group, make_question, make_rollout
from zppo_mm.experience import Candidate
from zppo_mm.observability.audit import audit_matches, comparable_answer
from zppo_mm.observability.metrics import (
    METRICS,
    Max,
    Mean,
    StepMetrics,
    Sum,
    is_documented,
)
from zppo_mm.observability.process_memory import process_memory
from zppo_mm.observability.rollout_metrics import (
    buffer_metrics,
    group_metrics,
    selection_metrics,
    teacher_metrics,
)
from zppo_mm.zone.replay import BufferFates
from zppo_mm.zone.selection import Selected

RIGHT = Candidate("a", "teacher", True, "7")
WRONG = Candidate("b", "student", False, "8")
WRONG_WITHOUT_ANSWER = Candidate("c", "student", False, None)


def test_reductions_over_calls_and_ranks() -> None:
    here, there = StepMetrics(), StepMetrics()
    for metrics, loss, count in ((here, 2.0, 1), (there, 9.0, 3)):
        metrics.add("policy/loss", Mean(loss, count))
        metrics.add("policy/updates", Sum(count))
        metrics.add("policy/grad_norm_max", Max(-loss))
    here.add("policy/updates", Sum(4))
    here.merge(there)
    # (2 + 9) / (1 + 3) = 2.75, not the mean of the means 2.5; 1 + 4 + 3 = 8.
    assert here.values() == {
        "policy/grad_norm_max": -2.0,
        "policy/loss": 2.75,
        "policy/updates": 8.0,
    }


def test_mean_over_nothing_has_no_value() -> None:
    metrics = StepMetrics()
    metrics.add("accuracy/bcq", Mean(0, 0))
    assert metrics.values() == {}
    metrics.add("accuracy/bcq", Mean(1, 2))
    assert metrics.values() == {"accuracy/bcq": 0.5}


def test_undocumented_and_mixed_names_are_refused() -> None:
    metrics = StepMetrics()
    with pytest.raises(AssertionError, match="accuracy/plian: not documented"):
        metrics.add("accuracy/plian", Sum(1))
    metrics.add("buffer/size", Sum(1))
    with pytest.raises(AssertionError, match="buffer/size: reduced as Mean and as Sum"):
        metrics.add("buffer/size", Mean(1))


def test_patterns_stand_for_one_last_part() -> None:
    assert is_documented("data/skipped/truncated")
    assert not is_documented("data/skipped")
    assert all(is_documented(name) and meaning.endswith(".") for name, meaning in METRICS.items())


def test_phase_adds_up_and_counts_a_failing_block() -> None:
    metrics = StepMetrics()
    with metrics.phase("update"):
        pass
    first = metrics.values()["seconds/update"]
    with pytest.raises(RuntimeError), metrics.phase("update"):
        raise RuntimeError
    assert metrics.values()["seconds/update"] > first >= 0


def test_process_memory_is_that_of_a_python_process() -> None:
    values = process_memory().values()
    assert 10 * 2**20 < values["system/rss_bytes"] < 100 * 2**30
    # The kernel counts the peak in pages that it samples, so it may lie a little below the present
    # size.
    assert values["system/rss_peak_bytes"] > 0.9 * values["system/rss_bytes"]


def test_group_metrics_by_hand() -> None:
    question = make_question(0)
    groups = [
        make_group(
            question,
            "new",
            [make_rollout("7", 1.0, num_tokens=10), make_rollout("8", 0.0, num_tokens=20)],
        ),
        make_group(
            make_question(1),
            "replayed",
            [make_rollout("8", 0.0, num_tokens=30), make_rollout(None, 0.0, num_tokens=40)],
        ),
        make_group(
            question,
            "bcq",
            [make_rollout("7", 1.0, num_tokens=50), make_rollout("8", 0.0, num_tokens=50)],
            candidates=(WRONG, RIGHT),
        ),
        make_group(
            question,
            "ncq",
            [make_rollout("8", 0.0, num_tokens=60), make_rollout("9", 0.0, num_tokens=60)],
            candidates=(WRONG,),
        ),
    ]
    advantages = {
        groups[0].uid: [0.5, -0.5],
        groups[1].uid: [0.0, 0.0],
        groups[2].uid: [0.5, -0.5],
        groups[3].uid: [0.0, 0.0],
    }
    metrics = group_metrics(groups, tau=0.5)
    metrics.merge(
        selection_metrics(
            Selected(tuple(groups), num_dropped_questions=3, num_injected=2), advantages
        )
    )
    values = metrics.values()
    expected = {
        "accuracy/plain": 1 / 4,
        "accuracy/new": 1 / 2,
        "accuracy/replayed": 0.0,
        "accuracy/bcq": 1 / 2,
        "accuracy/ncq": 0.0,
        "advantage/positive": 2 / 8,
        "advantage/nontrivial_groups": 2 / 4,
        "batch/questions": 2,
        "batch/easy": 1,  # accuracy 0.5 is not below tau
        "batch/hard": 1,
        "batch/groups/new": 1,
        "batch/groups/replayed": 1,
        "batch/groups/bcq": 1,
        "batch/groups/ncq": 1,
        "batch/dropped_questions": 3,
        "batch/injected_rollouts": 2,
        "response/tokens": 320 / 8,
        "response/tokens/plain": 100 / 4,
        "response/tokens/bcq": 50,
        "response/tokens_max": 60,
        "response/truncated": 1 / 8,
        "response/truncated/plain": 1 / 4,
        "response/unparsed": 1 / 8,
        "audit/bcq_right": 1 / 2,
        "audit/bcq_wrong": 1 / 2,
        "audit/ncq_listed": 1 / 2,
    }
    assert {name: values[name] for name in expected} == expected


def test_teacher_metrics_by_hand() -> None:
    solved = [
        make_rollout("7", 1.0, num_tokens=10),
        make_rollout("8", 0.0, num_tokens=20),
        make_rollout(None, 0.0, num_tokens=30),
    ]
    values = teacher_metrics([solved, [make_rollout("8", 0.0, num_tokens=40)], []]).values()
    # A question that could not be asked counts as unsolved.
    assert values == {
        "response/tokens/teacher": 25.0,
        "response/truncated/teacher": 0.25,
        "teacher/accuracy": 0.25,
        "teacher/failed_questions": 1.0,
        "teacher/solved": pytest.approx(1 / 3),
        "teacher/tokens": 100.0,
    }


def test_buffer_metrics_name_their_bins_in_percent() -> None:
    fates = BufferFates(
        Counter({0.0: 3, 0.125: 2}),
        Counter({0.125: 1}),
        Counter({0.0: 1}),
        Counter({2: 1}),
        Counter({0: 1}),
    )
    assert buffer_metrics({0.0: 2, 0.125: 1}, fates).values() == {
        "buffer/size": 3,
        "buffer/occupancy/0": 2,
        "buffer/occupancy/12.5": 1,
        "buffer/admitted/0": 3,
        "buffer/admitted/12.5": 2,
        "buffer/graduated/12.5": 1,
        "buffer/evicted/0": 1,
        "buffer/graduated_visits/2": 1,
        "buffer/evicted_visits/0": 1,
    }


def test_audit_counts_only_equal_answers() -> None:
    question = make_question(0)
    rollouts = [
        make_rollout(" 7. ", 1.0),
        make_rollout("$8$", 0.0),
        make_rollout("9", 0.0),
        make_rollout(None, 0.0),
    ]
    audit = audit_matches(
        [
            make_group(question, "new", rollouts),
            make_group(question, "bcq", rollouts, candidates=(RIGHT, WRONG)),
            make_group(question, "ncq", rollouts, candidates=(WRONG, WRONG_WITHOUT_ANSWER)),
        ]
    )
    assert (audit.num_bcq, audit.bcq_right, audit.bcq_wrong, audit.num_ncq, audit.ncq_listed) == (
        4,
        1,
        1,
        4,
        1,
    )


def test_comparable_answer_keeps_what_has_a_meaning() -> None:
    assert comparable_answer(" $X  =  1$. ") == "x = 1"
    assert comparable_answer("0.5") != comparable_answer("05")
    assert comparable_answer("-1") != comparable_answer("1")
