"""What comes back for one prompt."""

from __future__ import annotations

from dataclasses import dataclass, field

from zppo_mm.rollout.engine import Generation
from zppo_mm.serving.servers import RequestOutcome


@dataclass(slots=True)
class GenerateOutcome(RequestOutcome):
    """What came of one `ServedRequest`.

    Attributes:
        generations: All that were asked for, or none.
        is_client_lost: Whether it was lost with the process here that speaks with the servers.
    """

    generations: tuple[Generation, ...] = field(default_factory=tuple)
    is_client_lost: bool = False
