"""The prompt replay buffer: hard questions come back until they are mastered.

It holds questions by reference and bookkeeping, never a rollout. Source: ZPPO (arXiv 2606.18216),
Algorithm 1, steps 1 and 6.
"""

from __future__ import annotations

import copy
import logging
import math
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import numpy as np

from data.question import Question, check_same_question, question_of
from zppo_mm.errors import CheckpointError, ConfigError
from zppo_mm.experience import BufferFates, BufferUpdate, Group

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class BufferEntry:
    """A question in the buffer.

    Attributes:
        question: The question, its media by reference.
        accuracy_at_admission: Mean accuracy of the rollouts that admitted it, of partial ones the
            whole part of their sum.
        admitted_step: Rollout step of its admission; what FIFO goes by.
        visits: Times it was asked again since.
        last_accuracy: Mean accuracy when it was last asked.
    """

    question: Question
    accuracy_at_admission: float
    admitted_step: int
    visits: int
    last_accuracy: float


class ReplayBuffer:
    """At most `capacity` hard questions, first in first out by admission.

    Args:
        capacity: B_max, at least 1.

    Raises:
        ConfigError: If the capacity is not positive.
    """

    def __init__(self, capacity: int) -> None:
        if capacity < 1:
            raise ConfigError(
                f"zone.buffer_capacity: out of range, got {capacity}, expected at least 1; to go "
                "without, set zone.replay=false"
            )
        self.capacity = capacity
        self.fates = BufferFates()
        self._entries: dict[str, BufferEntry] = {}  # in the order of admission

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, question_id: str) -> bool:
        return question_id in self._entries

    def copy(self) -> ReplayBuffer:
        """Return a buffer with the same content, which can be updated by itself."""
        other = copy.copy(self)
        other._entries, other.fates = dict(self._entries), copy.deepcopy(self.fates)
        return other

    def content(self) -> list[str]:
        """Return the question ids, oldest admission first."""
        return list(self._entries)

    def entries(self) -> list[BufferEntry]:
        """Return what is known of every question, oldest admission first."""
        return list(self._entries.values())

    def occupancy(self) -> dict[float, int]:
        """Return the number of questions in the buffer by accuracy at admission, ascending."""
        return dict(
            sorted(Counter(entry.accuracy_at_admission for entry in self._entries.values()).items())
        )

    def draw(
        self, count: int, rng: np.random.Generator, exclude: Collection[str] = ()
    ) -> list[Question]:
        """Return up to `count` questions, uniformly and without replacement; the buffer stays as it
        is.

        Args:
            count: Questions wanted; fewer are returned while the buffer is small.
            rng: The stream of this draw.
            exclude: Ids that the step has already among its new questions.

        Source: ZPPO, Algorithm 1, step 1.
        """
        eligible = [
            entry.question for entry in self._entries.values() if entry.question.id not in exclude
        ]
        if not eligible:
            return []
        return [
            eligible[index]
            for index in rng.choice(len(eligible), size=min(count, len(eligible)), replace=False)
        ]

    def update(self, groups: Iterable[Group], tau: float, step: int) -> BufferUpdate:
        """Admit, graduate and evict by the plain groups of a step; other groups are ignored.

        A hard question (accuracy below tau) that is not in the buffer is admitted at its end; one
        that is in it stays where it is. A question in the buffer at or above tau graduates, however
        it came to be asked: any plain group of it is a visit. Then the oldest are evicted while
        there are more than the capacity. Several plain groups of one question count as one larger
        group.

        Raises:
            DataError: A question has the id of another one that is asked here or in the buffer.

        Source: ZPPO, Algorithm 1, step 6.
        """
        admitted: list[str] = []
        graduated: list[str] = []
        for question, accuracies in _accuracies(groups):
            accuracy = sum(accuracies) / len(accuracies)
            entry = self._entries.get(question.id)
            if entry is None:
                if accuracy < tau:
                    # Counted by this, so that partial accuracies make no more counts than others.
                    known = math.floor(sum(accuracies)) / len(accuracies)
                    self._entries[question.id] = BufferEntry(question, known, step, 0, accuracy)
                    self.fates.admitted_by_accuracy[known] += 1
                    admitted.append(question.id)
                continue
            check_same_question(entry.question, question)
            entry = replace(entry, visits=entry.visits + 1, last_accuracy=accuracy)
            self._entries[question.id] = entry
            if accuracy >= tau:
                del self._entries[question.id]
                self.fates.graduated_by_accuracy[entry.accuracy_at_admission] += 1
                self.fates.graduated_by_visits[entry.visits] += 1
                graduated.append(question.id)
        evicted = tuple(self._evict())
        return BufferUpdate(tuple(admitted), tuple(graduated), evicted, tuple(self._entries))

    def state_dict(self) -> dict[str, Any]:
        """Return everything as JSON types; `load_state_dict` restores it exactly."""
        return {
            "entries": [_saved(entry) for entry in self._entries.values()],
            "fates": {
                each.name: [list(pair) for pair in sorted(getattr(self.fates, each.name).items())]
                for each in fields(BufferFates)
            },
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a saved buffer, also after a trip through JSON.

        A buffer that was saved with a larger capacity is cut to this one's; what goes is counted as
        evicted.

        Raises:
            CheckpointError: If the state is not one that `state_dict` returns.
        """
        try:
            entries = [_entry(saved) for saved in state["entries"]]
            fates = BufferFates(
                **{name: Counter(dict(pairs)) for name, pairs in state["fates"].items()}
            )
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                "ReplayBuffer.load_state_dict: the saved buffer cannot be read, got "
                f"{type(error).__name__}: {error}, expected entries and fates as state_dict writes "
                "them; use a checkpoint of this version"
            ) from error
        self._entries = {entry.question.id: entry for entry in entries}
        self.fates = fates
        evicted = self._evict()
        if evicted:
            logger.warning(
                "replay buffer: capacity is now %d, evicted the %d oldest questions",
                self.capacity,
                len(evicted),
            )

    def _evict(self) -> list[str]:
        evicted = self.content()[: max(0, len(self._entries) - self.capacity)]
        for question_id in evicted:
            entry = self._entries.pop(question_id)
            self.fates.evicted_by_accuracy[entry.accuracy_at_admission] += 1
            self.fates.evicted_by_visits[entry.visits] += 1
        return evicted


def _accuracies(groups: Iterable[Group]) -> list[tuple[Question, list[float]]]:
    """Return every question with plain rollouts once, in order of appearance, with the accuracies
    of all of them.
    """
    accuracies: dict[str, list[float]] = {}
    questions: dict[str, Question] = {}
    for group in groups:
        if group.is_plain:
            check_same_question(
                questions.setdefault(group.question.id, group.question), group.question
            )
            accuracies.setdefault(group.question.id, []).extend(
                rollout.accuracy for rollout in group.rollouts
            )
    return [(questions[question_id], values) for question_id, values in accuracies.items()]


def _saved(entry: BufferEntry) -> dict[str, Any]:
    saved = asdict(entry)
    for name in ("media", "choices", "earlier"):
        saved["question"][name] = list(saved["question"][name])
    return saved


def _entry(saved: dict[str, Any]) -> BufferEntry:
    return BufferEntry(**{**saved, "question": question_of(saved["question"])})
