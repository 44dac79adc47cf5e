"""Errors that a user's data can cause."""

from __future__ import annotations


class DataError(ValueError):
    """A sample, a shard or a media file is not what it must be."""


class SampleError(DataError):
    """One sample breaks a rule of the format.

    Attributes:
        reason: Short fixed name to count by, one of `data.sample.REASONS`.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class MediaError(DataError):
    """One image or video cannot be opened within the limits.

    Attributes:
        reason: Short fixed name to count by, one of `data.media.MEDIA_REASONS`.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason

    def __reduce__(self) -> tuple[type[MediaError], tuple[str, str]]:
        return type(self), (self.reason, str(self))
