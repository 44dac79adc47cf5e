"""What a pool of chat servers in a process of its own is made of."""

from __future__ import annotations

from dataclasses import dataclass, field

from data.files import LOCAL, LocalFiles
from data.media.opening import MediaLimits
from data.media.store import MediaStore
from zppo_mm.config.schema import TeacherConfig
from zppo_mm.teacher.served.pool import EndpointPool
from zppo_mm.teacher.served.servers import Outcome


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolSettings:
    """The arguments of an `EndpointPool`.

    Attributes:
        limits: What is opened of media; `None` if no message has any.
        files: Open what holds the media.
    """

    urls: tuple[str, ...]
    model: str
    config: TeacherConfig
    api_key: str = field(default="", repr=False)
    max_concurrency: int = 0
    first: int = 0
    limits: MediaLimits | None = None
    files: LocalFiles = LOCAL
    batch_size: int = 0

    @property
    def who(self) -> str:
        """Whose servers they are."""
        return "teacher"

    def open_pool(self) -> EndpointPool:
        """Return the pool."""
        return EndpointPool(
            self.urls,
            self.model,
            self.config,
            self.api_key,
            max_concurrency=self.max_concurrency,
            first=self.first,
            media=MediaStore(self.limits, self.files) if self.limits is not None else None,
            batch_size=self.batch_size,
        )

    def lost(self, problem: str) -> Outcome:
        """Return what comes of a question if the process ends."""
        return Outcome(problem=problem)
