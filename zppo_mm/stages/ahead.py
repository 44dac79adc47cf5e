"""The plain prompts of a step, asked before it begins; see `zppo_mm.stages.overlap`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from zppo_mm.experience import VersionSpan
from zppo_mm.observability.metrics import Mean, StepMetrics, Sum
from zppo_mm.rollout.engine import Generation
from zppo_mm.rollout.pending_groups import PendingGroups
from zppo_mm.stages.overlap import Ahead
from zppo_mm.stages.round import Round, plain_prompts, take_questions, update_buffer
from zppo_mm.stages.stages import Stages


def sync_weights(stages: Stages, step: int, metrics: StepMetrics) -> Ahead | None:
    """Give the engine the weights of a step; returns the part of the step that was started before,
    if any.

    Raises:
        StopRequested: On every rank, if the run is to end.
    """
    overlap = stages.overlap
    if overlap is not None:
        with metrics.phase("plain_rollout"):
            overlap.settle()
    with metrics.phase("weight_sync"):
        stages.update_weights(step)
    if overlap is None:
        return None
    if overlap.saved is not None and overlap.saved.step == step:
        overlap.ahead = _start(stages, step, overlap.saved.version, overlap.saved.generations)
        overlap.saved = None
    return overlap.ahead


def start_next(stages: Stages, rounds: Sequence[Round], step: int, metrics: StepMetrics) -> None:
    """Take the questions of the next step and start their plain rollouts, with the weights that the
    engine has now, if the run overlaps steps.

    Called when the groups of the step are known and nothing was changed by them.

    Args:
        stages: The parts.
        rounds: Of the step.
        step: The one that runs.
        metrics: Of the step.

    Raises:
        StopRequested: On every rank, if the run is to end.
    """
    if stages.overlap is None or step >= stages.overlap.last_step:
        return
    # The buffer as it will be at the end of this step.
    replay = stages.replay.copy()
    update_buffer(replay, stages.zone, rounds, step)
    with metrics.phase("data"):
        stages.overlap.following = _start(replace(stages, replay=replay), step + 1, step)


def complete_step(stages: Stages, rounds: Sequence[Round], step: int, metrics: StepMetrics) -> None:
    """Go on to what was started for the next step, and measure what overlapped in this one: how old
    the weights were that sampled, and what time was gained by it.

    Args:
        stages: The parts.
        rounds: Of the step.
        step: Rollout step, which is complete.
        metrics: Of the step.
    """
    if stages.overlap is None:
        return
    groups = [group for each in rounds for group in each.groups]
    for rollout in (rollout for group in groups for rollout in group.rollouts):
        num_tokens = len(rollout.response_ids)
        spans = rollout.versions or (VersionSpan(rollout.policy_version, num_tokens),)
        behind = sum((step - span.version) * span.num_tokens for span in spans)
        metrics.add("rollout/staleness", Mean(behind, num_tokens))
    waves = stages.overlap.ahead.waves if stages.overlap.ahead is not None else ()
    waited = sum(wave.waited_seconds for wave in waves)
    # All were started together.
    pending = max((wave.pending_seconds for wave in waves), default=0.0)
    metrics.add("rollout/wait_seconds", Sum(waited))
    metrics.add("rollout/overlapped", Mean(pending - waited, pending))
    stages.overlap.advance()


def _start(
    stages: Stages,
    step: int,
    version: int,
    saved: Mapping[str, Sequence[Generation]] | None = None,
) -> Ahead:
    """Take the questions of a step and start their plain rollouts, but for those that are saved."""
    overlap = stages.overlap
    assert overlap is not None
    position = overlap.stream.state_dict()
    new, replayed = take_questions(stages, (), step)
    prompts = plain_prompts(stages, new, replayed, step, 0)
    waves: list[PendingGroups] = []
    try:
        for wave in stages.schedule.waves(prompts, step):
            waves.append(
                overlap.sampler.start(wave, stages.sampling, stages.num_rollouts, version, saved)
            )
    except BaseException:
        for each in waves:
            each.cancel()
        raise
    return Ahead(step, version, new, replayed, position, tuple(waves))
