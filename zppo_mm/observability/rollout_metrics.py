"""Measurements of a step's groups: accuracy, lengths, advantages, teacher and match audit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from zppo_mm.experience import BufferFates, Group, Rollout
from zppo_mm.observability.audit import audit_matches
from zppo_mm.observability.metrics import Max, Mean, StepMetrics, Sum


def group_metrics(groups: Sequence[Group], tau: float) -> StepMetrics:
    """Measure all groups that the student sampled in a step.

    Args:
        groups: Plain and reformulated groups.
        tau: A plain question is hard while its accuracy is below this.
    """
    metrics = StepMetrics()
    for group in groups:
        part = "plain" if group.is_plain else group.kind
        accuracies = [rollout.accuracy for rollout in group.rollouts]
        for name in {part, group.kind}:
            metrics.add(f"accuracy/{name}", Mean(sum(accuracies), len(accuracies)))
        if group.is_plain:
            metrics.merge(reward_metrics(group.rollouts))
        metrics.add(f"prompt/tokens/{part}", Mean(len(group.prompt.token_ids)))
        metrics.merge(response_metrics(group.rollouts, part))
        metrics.add(
            "response/tokens_max", Max(max(len(rollout.response_ids) for rollout in group.rollouts))
        )
    metrics.add(
        "rollout/tokens",
        Sum(sum(len(rollout.response_ids) for group in groups for rollout in group.rollouts)),
    )
    metrics.add("rollout/ungraded", Sum(sum(len(group.ungraded) for group in groups)))
    plain = [group for group in groups if group.is_plain]
    num_hard = sum(group.accuracy < tau for group in plain)
    metrics.add("batch/questions", Sum(len(plain)))
    metrics.add("batch/hard", Sum(num_hard))
    metrics.add("batch/easy", Sum(len(plain) - num_hard))
    metrics.merge(audit_metrics(groups))
    return metrics


class SelectedGroups(Protocol):
    """What a step trains on."""

    @property
    def groups(self) -> Sequence[Group]: ...

    @property
    def num_dropped_questions(self) -> int: ...

    @property
    def num_injected(self) -> int: ...


def selection_metrics(
    selected: SelectedGroups, advantages: Mapping[str, Sequence[float]]
) -> StepMetrics:
    """Measure what a step trains on.

    Args:
        selected: Its groups.
        advantages: One advantage per rollout, by group uid.
    """
    metrics = StepMetrics()
    for group in selected.groups:
        metrics.add(f"batch/groups/{group.kind}", Sum(1))
        metrics.add(
            "advantage/nontrivial_groups",
            Mean(group.rewards_differ),
        )
        metrics.add(
            "advantage/positive",
            Mean(sum(value > 0 for value in advantages[group.uid]), len(group.rollouts)),
        )
    metrics.add("batch/dropped_questions", Sum(selected.num_dropped_questions))
    metrics.add("batch/injected_rollouts", Sum(selected.num_injected))
    return metrics


def response_metrics(rollouts: Sequence[Rollout], part: str) -> StepMetrics:
    """Measure the student's responses to one kind of prompt."""
    metrics = StepMetrics()
    num_tokens = sum(len(rollout.response_ids) for rollout in rollouts)
    num_truncated = sum(rollout.finish_reason == "length" for rollout in rollouts)
    for suffix in ("", f"/{part}"):
        metrics.add(f"response/tokens{suffix}", Mean(num_tokens, len(rollouts)))
        metrics.add(f"response/truncated{suffix}", Mean(num_truncated, len(rollouts)))
    metrics.add(
        "response/unparsed",
        Mean(sum(rollout.parsed is None for rollout in rollouts), len(rollouts)),
    )
    return metrics


def reward_metrics(rollouts: Sequence[Rollout]) -> StepMetrics:
    """Measure rewards, and the parts that reward functions name."""
    metrics = StepMetrics()
    for rollout in rollouts:
        metrics.add("reward/mean", Mean(rollout.reward))
        for name, value in rollout.parts.items():
            metrics.add(f"reward/part/{name}", Mean(value))
    return metrics


def teacher_metrics(answers: Sequence[Sequence[Rollout]]) -> StepMetrics:
    """Measure the teacher's rollouts on the questions that it was asked in a step, one sequence per
    question, empty if it has none.
    """
    metrics = StepMetrics()
    metrics.add("teacher/failed_questions", Sum(sum(not rollouts for rollouts in answers)))
    metrics.add(
        "teacher/tokens",
        Sum(sum(len(rollout.response_ids) for rollouts in answers for rollout in rollouts)),
    )
    for rollouts in answers:
        accuracies = [rollout.accuracy for rollout in rollouts]
        metrics.add("teacher/accuracy", Mean(sum(accuracies), len(accuracies)))
        metrics.add("teacher/solved", Mean(any(rollout.is_correct for rollout in rollouts)))
        metrics.add(
            "response/tokens/teacher",
            Mean(sum(len(rollout.response_ids) for rollout in rollouts), len(rollouts)),
        )
        metrics.add(
            "response/truncated/teacher",
            Mean(sum(rollout.finish_reason == "length" for rollout in rollouts), len(rollouts)),
        )
    return metrics


def sampling_speed(groups: Sequence[Group], step: StepMetrics) -> StepMetrics:
    """Measure tokens per second of the sampling phases, whose seconds the step's metrics have."""
    metrics, seconds = StepMetrics(), step.values()
    num_tokens = sum(len(rollout.response_ids) for group in groups for rollout in group.rollouts)
    sampling_seconds = sum(
        seconds.get(f"seconds/{phase}", 0.0) for phase in ("plain_rollout", "reformulated_rollout")
    )
    metrics.add("throughput/rollout_tokens_per_second", Mean(num_tokens, sampling_seconds))
    return metrics


def audit_metrics(groups: Sequence[Group]) -> StepMetrics:
    """Measure how often BCQ and NCQ answers repeat a candidate's."""
    audit = audit_matches(groups)
    metrics = StepMetrics()
    metrics.add("audit/bcq_right", Mean(audit.bcq_right, audit.num_bcq))
    metrics.add("audit/bcq_wrong", Mean(audit.bcq_wrong, audit.num_bcq))
    metrics.add("audit/ncq_listed", Mean(audit.ncq_listed, audit.num_ncq))
    return metrics


def buffer_metrics(occupancy: Mapping[float, int], fates: BufferFates) -> StepMetrics:
    """Name the buffer's counts; accuracies at admission become percent.

    Args:
        occupancy: Questions in the buffer by accuracy at admission.
        fates: Counts since the start of the run.
    """
    metrics = StepMetrics()
    metrics.add("buffer/size", Sum(sum(occupancy.values())))
    by_accuracy = {
        "occupancy": occupancy,
        "admitted": fates.admitted_by_accuracy,
        "graduated": fates.graduated_by_accuracy,
        "evicted": fates.evicted_by_accuracy,
    }
    for name, counts in by_accuracy.items():
        for accuracy, count in counts.items():
            metrics.add(f"buffer/{name}/{100 * accuracy:g}", Sum(count))
    for name, by_visits in (
        ("graduated_visits", fates.graduated_by_visits),
        ("evicted_visits", fates.evicted_by_visits),
    ):
        for visits, count in by_visits.items():
            metrics.add(f"buffer/{name}/{visits}", Sum(count))
    return metrics
