"""Which questions the gate asks: some of every modality, from the position of the run's stream,
without moving it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from data.health import SampleHealth
from data.question import Question
from data.stream import QuestionStream
from zppo_mm.rollout.feed import QuestionFeed

MODALITIES = ("text", "image", "video", "mixed")
"""Kinds of questions in the order in which they are shown; `mixed` ones have images and videos."""
SEARCHED_QUESTIONS = 256
"""Questions of the stream that are searched; a modality that none of them has is not compared."""
CANDIDATES_PER_QUESTION = 4
"""Candidates kept for each question that is asked, in case some cannot be."""
LOST_MEDIA = "placeholders"
"""Reason of a refusal that says that a prompt does not show its sample's media: the folder is wrong
then, not the sample.
"""


class UncountedHealth(SampleHealth):
    """Neither counts nor names the samples that are read: the run will read them itself."""

    def good(self, n: int = 1) -> None:
        """Count nothing."""

    def bad(self, sample_id: str, reason: str, detail: str, *, was_good: bool = False) -> None:
        """Count nothing."""

    def too_long(self, sample_id: str, detail: str) -> None:
        """Count nothing."""


@dataclass(frozen=True, slots=True)
class Chosen:
    """What the gate asks; the same on every rank.

    Attributes:
        questions: By modality; fewer than asked for where there are no more.
        refused: By modality of which no question can be asked, why not the last one.
        lost: Descriptions of questions whose prompt does not show their media.
    """

    questions: dict[str, list[Question]] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    lost: list[str] = field(default_factory=list)


def choose_questions(stream: QuestionStream, feed: QuestionFeed, num_questions: int) -> Chosen:
    """Return questions that can be asked; every rank calls this.

    Args:
        stream: One of its own, at the position of the run's.
        feed: The run's, which knows what can be asked.
        num_questions: Of each modality.
    """
    candidates = _candidates(stream, num_questions * CANDIDATES_PER_QUESTION)
    chosen = Chosen({name: [] for name in candidates})
    while batch := _next_batch(candidates, chosen.questions, num_questions):
        refusals = {refusal.index: refusal for refusal in feed.refusals(batch)}
        for index, question in enumerate(batch):
            name, refusal = question.modality, refusals.get(index)
            if refusal is None:
                chosen.questions[name].append(question)
                continue
            chosen.refused[name] = f"{refusal.reason}: {refusal.detail}"
            if refusal.reason == LOST_MEDIA:
                chosen.lost.append(
                    f"parity: {name}: the media of a question do not reach its prompt: "
                    f"{refusal.detail}"
                )
    for name, questions in chosen.questions.items():
        if questions:
            chosen.refused.pop(name, None)
    return chosen


def _candidates(stream: QuestionStream, num_wanted: int) -> dict[str, list[Question]]:
    """Return the next questions by modality, each once, in the order of `MODALITIES`."""
    found: dict[str, dict[str, Question]] = {}
    for _ in range(min(SEARCHED_QUESTIONS, stream.num_samples)):
        [question] = stream.take(1)
        kind = found.setdefault(question.modality, {})
        if len(kind) < num_wanted:
            kind.setdefault(question.id, question)
        if len(found) == len(MODALITIES) and all(
            len(questions) == num_wanted for questions in found.values()
        ):
            break
    return {name: list(found[name].values()) for name in MODALITIES if name in found}


def _next_batch(
    candidates: dict[str, list[Question]], questions: dict[str, list[Question]], num_questions: int
) -> Sequence[Question]:
    """Take as many candidates of each modality as are missing."""
    batch: list[Question] = []
    for name, waiting in candidates.items():
        missing = num_questions - len(questions[name])
        batch += waiting[:missing]
        del waiting[:missing]
    return batch
