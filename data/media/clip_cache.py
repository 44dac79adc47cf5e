"""The frames of videos as a model sees them, kept on a local disk: a clip is decoded once on a
machine, whichever rank, epoch or run asks for it.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import numpy.typing as npt

from data.media.array_file import Stored
from data.media.disk_cache import DiskCache
from data.media.opening import Frames
from data.media.store import MediaStore
from data.question import MediaRef

FORMAT = 1
"""To be raised when the same clip and settings are to give other frames."""
DECODERS = ("decord2", "pillow")
"""Another version of one of these may decode or resize to other pixels."""

Pixels = npt.NDArray[np.uint8]


class ClipCache:
    """Opens videos and keeps their frames. Safe to use from several threads and processes.

    They go by the content of the file, not by its name, and by all that decides what becomes of it.
    A clip that cannot be decoded is not kept.

    Args:
        store: Reads and decodes files.
        folder: Of the kept frames, on a disk of this machine; made if needed.
        max_bytes: Most bytes of them.

    Raises:
        OSError: The folder cannot be made or written to.
    """

    def __init__(self, store: MediaStore, folder: Path, max_bytes: int) -> None:
        self._store = store
        # Who decodes a clip may have to wait for a worker too.
        wait_seconds = 2 * store.limits.decode_timeout_seconds
        self._disk = DiskCache(folder, max_bytes, wait_seconds)
        decoders = {name: _version(name) for name in DECODERS}
        self._settings = json.dumps([FORMAT, asdict(store.frame_limits), decoders])

    @property
    def counts(self) -> Counter[str]:
        """What this process found and made so far; see `DiskCache`."""
        return self._disk.counts

    @property
    def max_bytes(self) -> int:
        """Most bytes that are kept."""
        return self._disk.max_bytes

    def num_bytes(self) -> int:
        """Return the bytes of all kept frames of this machine."""
        return self._disk.num_bytes()

    def open(self, ref: MediaRef, settings: str, resize: Callable[[Pixels], Pixels]) -> Frames:
        """Return the resized frames of a video.

        Args:
            ref: The video.
            settings: All that `resize` depends on.
            resize: Returns `[frames, height, width, 3]` of such pixels.

        Raises:
            MediaError: As `MediaOpener.open_ref`.
            DataError: As `MediaOpener.open_ref`.
            ValueError: What `resize` raises.
        """
        content = self._store.read(ref)

        def make() -> Stored:
            frames = self._store.decode(ref, content)
            times = {"timestamps": frames.timestamps, "seconds_per_frame": frames.seconds_per_frame}
            return times, resize(frames.pixels)

        header, pixels = self._disk.get(self._key(content, settings), make)
        return Frames(pixels, tuple(header["timestamps"]), header["seconds_per_frame"])

    def _key(self, content: bytes, settings: str) -> str:
        digest = hashlib.blake2b(digest_size=16)
        for part in (self._settings, settings):
            digest.update(hashlib.blake2b(part.encode()).digest())
        digest.update(content)
        return digest.hexdigest()


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return ""
