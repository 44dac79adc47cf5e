"""Messages between a `PoolProcess` and its process."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from data.media.opening import MediaLimits
from zppo_mm.config.schema import TeacherConfig
from zppo_mm.teacher.served.chat_api import ChatRequest
from zppo_mm.teacher.served.servers import RetryPolicy


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolSettings:
    """The arguments of an `EndpointPool`.

    Attributes:
        limits: What is opened of media; `None` if no message has any.
    """

    urls: tuple[str, ...]
    model: str
    config: TeacherConfig
    api_key: str = field(default="", repr=False)
    max_concurrency: int = 0
    first: int = 0
    limits: MediaLimits | None = None
    batch_size: int = 0


@dataclass(frozen=True, slots=True)
class Work:
    """What is to be done: send `requests`, or probe the servers if there is no policy."""

    requests: tuple[ChatRequest, ...] = ()
    policy: RetryPolicy | None = None


@dataclass(frozen=True, slots=True)
class Done:
    """What came of a piece of work.

    Attributes:
        value: Result of the pool's future, unless it raised.
        error: What it raised.
        counts: What the pool counted since the last one.
    """

    value: Any
    error: Exception | None
    counts: Counter[str]
