"""The teacher as a frozen Megatron model on the student's ranks."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from data.question import Question
from zppo_mm.experience import PromptInstance, Rollout
from zppo_mm.models.vision_language import VisionLanguageModel
from zppo_mm.rollout.engine import SamplingParams
from zppo_mm.rollout.sampler import GroupSampler


@dataclass(frozen=True, slots=True)
class ReadyAnswers:
    """Answers that were sampled when they were asked for. Implements `Answers`."""

    rollouts: Mapping[str, tuple[Rollout, ...]]
    seconds: float

    def is_ready(self) -> bool:
        """Return that the answers are there."""
        return True

    def wait(self) -> Mapping[str, tuple[Rollout, ...]]:
        """Return the answers."""
        return self.rollouts


@dataclass(slots=True)
class MegatronTeacher:
    """Answers hard questions with its own weights, tokenizer and processor. Implements `Teacher`.

    Attributes:
        model: Its network, frozen.
        sampler: Samples and verifies with its engine and prompt encoder.
        sampling: Its temperature, limits and stop tokens.
        num_rollouts: Rollouts per question (G_T).
        plain_text: Renders the original question with the closing format instruction.
        num_ungraded: Its rollouts that could not be graded so far, the same on every rank.
    """

    model: VisionLanguageModel
    sampler: GroupSampler
    sampling: SamplingParams
    num_rollouts: int
    plain_text: Callable[[Question], str]
    num_ungraded: int = 0

    def submit(self, questions: Sequence[Question], step: int) -> ReadyAnswers:
        """Sample fresh, verified rollouts per question at once: the ranks that ask are the
        teacher's.
        """
        started = time.perf_counter()
        instances = [
            PromptInstance(
                uid=f"{step}/teacher/{question.id}",
                question=question,
                kind="new",
                text=self.plain_text(question),
            )
            for question in questions
        ]
        groups = self.sampler.sample(instances, self.sampling, self.num_rollouts, step)
        self.num_ungraded += sum(len(group.ungraded) for group in groups)
        by_question = {group.question.id: group.rollouts for group in groups}
        rollouts = {question.id: by_question.get(question.id, ()) for question in questions}
        return ReadyAnswers(rollouts, time.perf_counter() - started)

    def rewrite(self, texts: Sequence[str], step: int, attempt: int) -> Sequence[str | None]:
        """Return one response per user text, for the compressor; another attempt samples again."""
        return self.sampler.respond(texts, self.sampling, f"{step}/rewrite/{attempt}")
