"""In which parts the plain prompts of a step are sampled, so that the teacher hears of hard
questions early.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest

from zppo_mm.experience import PromptInstance
from zppo_mm.zone.hard import count_of_share, pre_cap_draw


@dataclass(frozen=True, slots=True)
class PlainSchedule:
    """Divides plain prompts.

    Most hard questions tie at accuracy 0, and the pre-cap takes the first of them by a draw.
    Sampled in the order of that draw, those that will be reformulated come early, and the answers
    to those that come last are seldom waited for. The order changes no rollout.

    Attributes:
        seed: The run's seed.
        size: Prompts of a replica in one part; 0 leaves all in one.
        num_replicas: Replicas that share the sampling. Every one keeps the places that the question
            feed dealt it, since it has their media open.
        ahead_share: Of the parts, the last ones, that the teacher is asked about before they are
            sampled.
    """

    seed: int
    size: int = 0
    num_replicas: int = 1
    ahead_share: float = 0.0

    def divide(
        self, instances: Sequence[PromptInstance], step: int
    ) -> list[Sequence[PromptInstance]]:
        """Return the parts, one after the other; nothing of nothing."""
        if not instances:
            return []
        if not self.size:
            return [instances]

        def draw(instance: PromptInstance) -> float:
            return pre_cap_draw(self.seed, step, instance.question.id)

        lanes = [
            sorted(instances[lane :: self.num_replicas], key=draw)
            for lane in range(self.num_replicas)
        ]
        ordered = [
            instance
            for instance in chain.from_iterable(zip_longest(*lanes))
            if instance is not None
        ]
        size = self.size * self.num_replicas
        return [ordered[first : first + size] for first in range(0, len(ordered), size)]

    def ahead(
        self, parts: Sequence[Sequence[PromptInstance]]
    ) -> Sequence[Sequence[PromptInstance]]:
        """Return the parts that the teacher is asked about before they are sampled."""
        # Rounded up: where all fits into one part, a share of it is asked about as a whole.
        return parts[count_of_share(1.0 - self.ahead_share, len(parts)) :]
