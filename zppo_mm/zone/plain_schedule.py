"""The waves in which the plain prompts of a step are sampled, so that the teacher is asked about
hard questions early.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest

from zppo_mm.experience import PromptInstance
from zppo_mm.zone.hard import pre_cap_draw


@dataclass(frozen=True, slots=True)
class PlainSchedule:
    """Divides plain prompts into waves.

    Most hard questions tie at accuracy 0, and the pre-cap takes the first of them by a draw.
    Sampled in the order of that draw, those that will be reformulated come early, and the answers
    to those that come last are seldom waited for. The order changes no rollout.

    Attributes:
        seed: The run's seed.
        wave_size: Prompts of a replica in one wave; 0 samples all in one.
        num_replicas: Replicas that share the sampling. Each keeps the prompts that the question
            feed gave it, because it has their media open.
    """

    seed: int
    wave_size: int = 0
    num_replicas: int = 1

    def waves(
        self, instances: Sequence[PromptInstance], step: int
    ) -> list[Sequence[PromptInstance]]:
        """Return the waves in their order; none without prompts."""
        if not instances:
            return []
        if not self.wave_size:
            return [instances]

        def draw(instance: PromptInstance) -> float:
            return pre_cap_draw(self.seed, step, instance.question.id)

        by_replica = [
            sorted(instances[replica :: self.num_replicas], key=draw)
            for replica in range(self.num_replicas)
        ]
        ordered = [
            instance
            for instance in chain.from_iterable(zip_longest(*by_replica))
            if instance is not None
        ]
        size = self.wave_size * self.num_replicas
        return [ordered[first : first + size] for first in range(0, len(ordered), size)]
