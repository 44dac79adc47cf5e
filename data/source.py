"""What the stream asks of a source of questions, and media of whoever reads them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from data.question import MediaRef, Question


class Source(Protocol):
    """Questions that any rank reads by their place, in a fixed order."""

    @property
    def path(self) -> Path:
        """Return the source's path as the user gave it."""
        ...

    def __len__(self) -> int:
        """Return the number of samples, bad ones included."""
        ...

    def keys(self) -> Sequence[tuple[str, str]]:
        """Return `(file, key)` of every sample."""
        ...

    def question(self, shard: str, key: str) -> Question:
        """Return the question of one sample.

        Raises:
            SampleError: The sample breaks a rule of the format.
            DataError: The file is missing or was changed.
        """
        ...

    def fingerprint(self) -> str:
        """Return a digest: another one means that the questions were changed."""
        ...


class ReadsMedia(Protocol):
    """Reads a media file by reference; one thread does not disturb another."""

    def media_bytes(self, ref: MediaRef) -> bytes:
        """Return the file, undecoded.

        Raises:
            SampleError: There is no such file.
            DataError: What holds it is missing or was changed.
        """
        ...

    def media_size(self, ref: MediaRef) -> int:
        """Return the bytes of the file; raises as `media_bytes`."""
        ...
