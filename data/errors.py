"""Errors that a user's data can cause."""

from __future__ import annotations

MEDIA_REASONS = (
    "empty",
    "missing",
    "oversized",
    "unsupported_container",
    "truncated",
    "unreadable",
    "timeout",
    "decoder_died",
)


class DataError(ValueError):
    """A sample, a shard or a media file is not what it must be."""


class ReasonedError(DataError):
    """An error that is counted by its reason.

    Attributes:
        reason: Short fixed name to count by.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason

    def __reduce__(self) -> tuple[type[ReasonedError], tuple[str, str]]:
        return type(self), (self.reason, str(self))


class SampleError(ReasonedError):
    """One sample breaks a rule of the format; its reason is one of `data.sample.REASONS`, or of
    those of tables in docs/data.md.
    """


class MediaError(ReasonedError):
    """One image or video cannot be opened within the limits; its reason is one of
    `MEDIA_REASONS`.
    """


def shown(name: str, limit: int = 120) -> str:
    """Return a name from outside as a log can hold it: unprintable characters escaped, cut after
    `limit`.
    """
    letters = (
        each if each.isprintable() else each.encode("unicode_escape").decode()
        for each in name[:limit]
    )
    text = "".join(letters)
    return text if len(name) <= limit else f"{text}… ({len(name)} characters)"
