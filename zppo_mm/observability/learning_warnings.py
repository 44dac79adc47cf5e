"""Warnings of a run from which nothing can be learned: what its steps have in common, and which
key decides it.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from zppo_mm.config.schema import DistillConfig, RolloutConfig

logger = logging.getLogger(__name__)

NUM_STEPS = 3
"""Steps in a row that must agree before a warning."""
MOST = 0.5


@dataclass(frozen=True, slots=True)
class Finding:
    """What keeps a run from learning.

    Attributes:
        name: Of its kind, for which a run warns once per spell.
        text: Cause, numbers, and keys.
    """

    name: str
    text: str


class LearningWatch:
    """Checks the metrics of every step, and warns. Implements `MetricsSink`."""

    def __init__(self, rollout: RolloutConfig, distill: DistillConfig) -> None:
        self._rollout = rollout
        self._distill = distill
        self._recent: list[Mapping[str, float]] = []
        self._known: set[str] = set()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Log the warnings of a step."""
        for text in self.find_new(values):
            logger.warning("%s", text)

    def close(self) -> None:
        """Nothing is held."""

    def find_new(self, values: Mapping[str, float]) -> list[str]:
        """Return the warnings of a step: each cause when it begins, and again only after
        it was gone.
        """
        self._recent = [*self._recent, values][-NUM_STEPS:]
        if len(self._recent) < NUM_STEPS:
            return []
        findings = find_causes(self._rollout, self._distill, self._recent)
        fresh = [finding.text for finding in findings if finding.name not in self._known]
        self._known = {finding.name for finding in findings}
        return fresh


def find_causes(
    rollout: RolloutConfig, distill: DistillConfig, steps: Sequence[Mapping[str, float]]
) -> list[Finding]:
    """Return what keeps a run from learning in every one of these steps; a cause comes before what
    follows from it.
    """
    where = f"in the last {len(steps)} steps"
    findings = _bad_answers(rollout, steps, where)
    if distill.source == "none":
        findings += _equal_rewards(rollout, steps, where)
    if all(
        step.get("policy/updates") == 0 and step.get("policy/skipped_updates", 0) > 0
        for step in steps
    ):
        findings.append(
            Finding(
                "skipped",
                f"learning: every update {where} was skipped, got a loss or a gradient that is not "
                "finite, expected finite ones; lower train.lr, or try model.params_dtype=float32",
            )
        )
    if _most(steps, "policy/lr") == 0:
        findings.append(
            Finding(
                "rate", f"learning: the learning rate is 0 {where}, expected more; raise train.lr"
            )
        )
    return findings


def warn_of_few_questions(num_new_questions: int, num_samples: int) -> None:
    """Warn if a step asks more questions than there are, so that it asks some twice."""
    if num_samples < num_new_questions:
        logger.warning(
            "learning: fewer questions than a step takes, got %d in data.train, expected at least "
            "train.num_new_questions=%d: some come twice in a step; give more data or lower that "
            "key",
            num_samples,
            num_new_questions,
        )


def _bad_answers(
    rollout: RolloutConfig, steps: Sequence[Mapping[str, float]], where: str
) -> list[Finding]:
    findings = []
    truncated, unparsed = _least(steps, "response/truncated"), _least(steps, "response/unparsed")
    if truncated > MOST:
        findings.append(
            Finding(
                "truncated",
                f"learning: most responses reach the length limit, got at least {truncated:.0%} "
                f"{where}, expected few; raise rollout.max_response_tokens (now "
                f"{rollout.max_response_tokens}), or look in transcripts/ whether the model "
                "ever ends its answers (stop tokens in its generation_config.json, its chat "
                "template)",
            )
        )
    if unparsed > MOST:
        cause = "because they are cut off" if truncated > MOST else "though they end by themselves"
        findings.append(
            Finding(
                "unboxed",
                f"learning: most responses have no boxed answer, {cause}, got at least "
                f"{unparsed:.0%} {where}, expected few; they count as wrong: look in transcripts/ "
                "what they look like, and give zone.templates another closing.txt if the model "
                "does not follow it",
            )
        )
    if _least(steps, "rollout/failed_groups") > MOST * max(_most(steps, "batch/questions"), 1):
        findings.append(
            Finding(
                "failed",
                f"learning: most prompts have no group {where}, got at least "
                f"{_least(steps, 'rollout/failed_groups'):.0f} that failed, expected few; the log "
                "says why for each: media limits under data, or the judge (reward.judge_endpoints)",
            )
        )
    return findings


def _equal_rewards(
    rollout: RolloutConfig, steps: Sequence[Mapping[str, float]], where: str
) -> list[Finding]:
    if _most(steps, "advantage/nontrivial_groups") > 0:
        return []
    accuracy = _most(steps, "accuracy/plain")
    if accuracy == 0:
        advice = (
            "every response is wrong: take easier questions (data.train), raise "
            "rollout.num_rollouts, or look in transcripts/ whether the answers in the data are "
            "such as the grader expects"
        )
    elif _least(steps, "accuracy/plain") == 1:
        advice = "every response is right: take harder questions (data.train)"
    else:
        advice = (
            "the responses to a question are all alike: raise rollout.temperature (now "
            f"{rollout.temperature:g})"
        )
    return [
        Finding(
            "equal",
            "learning: all rewards of each group are equal, got no group with different ones "
            f"{where}, expected some: all advantages are 0 and nothing is learned; {advice}",
        )
    ]


def _least(steps: Sequence[Mapping[str, float]], name: str) -> float:
    """Return the smallest value of a metric, 0 where a step has none."""
    return min(step.get(name) or 0.0 for step in steps)


def _most(steps: Sequence[Mapping[str, float]], name: str) -> float:
    return max(step.get(name) or 0.0 for step in steps)
