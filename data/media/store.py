"""The media of sources, by reference."""

from __future__ import annotations

from data.files import LOCAL, LocalFiles
from data.media.decoder import FrameLimits
from data.media.opening import Frames, MediaLimits, MediaOpener
from data.question import MediaRef
from data.sources.reader import SourceReader, TableFiles


class MediaStore:
    """Opens any media reference of a run's sources. Safe to use from several threads.

    Args:
        limits: What is opened.
        files: Open what holds the media; by default those of this machine.
    """

    def __init__(self, limits: MediaLimits, files: LocalFiles = LOCAL) -> None:
        self.limits, self.files = limits, files
        self._reader = SourceReader(TableFiles(files))
        self._opener = MediaOpener(limits)

    @property
    def frame_limits(self) -> FrameLimits:
        """What of a file is decoded."""
        return self._opener.frame_limits

    def open(self, ref: MediaRef) -> Frames:
        """Return the sampled frames of a media file; raises as `MediaOpener.open_ref`."""
        return self._opener.open_ref(ref, self._reader)

    def read(self, ref: MediaRef) -> bytes:
        """Return a media file as it is, within the size limit; raises as `MediaOpener.read_ref`."""
        return self._opener.read_ref(ref, self._reader)

    def decode(self, ref: MediaRef, content: bytes) -> Frames:
        """Return the sampled frames of a file that was read; raises as `MediaOpener.decode_ref`."""
        return self._opener.decode_ref(ref, content)

    def close(self) -> None:
        """End the decoding workers and close the files."""
        self._opener.close()
        self._reader.close()
