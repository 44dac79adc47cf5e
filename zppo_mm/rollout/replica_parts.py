"""Which replica samples which instances."""

from __future__ import annotations

from collections.abc import Sequence

from zppo_mm.experience import PromptInstance
from zppo_mm.methods import PLAIN_KINDS


def split_instances(instances: Sequence[PromptInstance], num_replicas: int) -> list[list[int]]:
    """Deal instances to replicas, as even in number as possible.

    Plain ones go in order, as the question feed dealt them, so that a replica finds their media
    open already. The others go from the longest text to the shortest: in their own order BCQ and
    NCQ alternate, and one replica would get all the long ones.

    Returns:
        Ascending indices per replica.
    """
    plain = [index for index, instance in enumerate(instances) if instance.kind in PLAIN_KINDS]
    reformulated = [
        index for index, instance in enumerate(instances) if instance.kind not in PLAIN_KINDS
    ]
    reformulated.sort(key=lambda index: (-len(instances[index].text), index))
    order = [*plain, *reformulated]
    return [sorted(order[replica::num_replicas]) for replica in range(num_replicas)]
