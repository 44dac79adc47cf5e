"""Media files that a table names: only plain files inside of the media root, and none larger than
the limit is read.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from data.errors import MediaError, SampleError
from data.text import is_valid_text

MAX_SAMPLE_BYTES = 1 << 30
"""Of all media of one question, which are in memory together; one of the largest size is always let
through.
"""
_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


class MediaFolder:
    """The folder that relative paths start from and that no path leaves."""

    def __init__(self, root: str | Path, max_bytes: int, *, follow_links: bool = False) -> None:
        """Remember the rules.

        Args:
            root: The folder.
            max_bytes: Largest file that is read.
            follow_links: Read files outside of the folder if a link inside of it leads there.
        """
        self.root = Path(root)
        self.max_bytes = max_bytes
        self.follow_links = follow_links

    def read(self, where: str, path: str) -> bytes:
        """Return the content of one file.

        Args:
            where: Row that names it, for messages.
            path: From the folder, or absolute.

        Raises:
            SampleError: `bad_text`, `outside_root`, or `missing_media`: it is not there, cannot be
                read, or is not a regular file.
            MediaError: `empty` or `oversized`.
        """
        with self._found(where, path) as (shown, found):
            return self._plain_file(where, shown, found)

    def size(self, where: str, path: str) -> int:
        """Return the bytes of one file; raises as `read`."""
        with self._found(where, path) as (shown, found):
            return self._check(where, shown, found.stat())

    @contextmanager
    def _found(self, where: str, path: str) -> Iterator[tuple[str, Path]]:
        """Yield a path for messages, and where it leads."""
        if not is_valid_text(path):
            raise SampleError(
                "bad_text", f"{where}: path is not valid text, got {ascii(path)[:200]}; correct it"
            )
        shown = f"{self.root / path!s:.300}"
        try:
            inside = self._inside(path)
            if inside is not None:
                yield shown, inside
                return
        except OSError as error:
            message = (
                f"{where}: {shown} cannot be read ({error.strerror}); add it or set the media root"
            )
            raise SampleError("missing_media", message) from error
        expected = (
            "expected a file inside; copy it there, set the media root, or for links convert the "
            "file with --follow-links"
        )
        raise SampleError(
            "outside_root",
            f"{where}: path leaves the media root, got {path!r:.200} from {self.root}, {expected}",
        )

    def check_total(self, where: str, media: Sequence[tuple[str, bytes]]) -> None:
        """Refuse a question whose media take too much together, before the next is read.

        Raises:
            MediaError: `oversized`.
        """
        total, most = (
            sum(len(content) for _, content in media),
            max(MAX_SAMPLE_BYTES, self.max_bytes),
        )
        if total > most:
            got = f"got {total} bytes in the first {len(media)}"
            raise MediaError(
                "oversized",
                f"{where}: its media are too large together, {got}, expected at most {most}; use "
                "smaller ones",
            )

    def holds(self, path: str) -> bool:
        """Return whether something lies at a path, whatever it is.

        Raises:
            OSError: The name is not possible.
        """
        try:
            (self.root / path).lstat()
        except (FileNotFoundError, NotADirectoryError):
            return False
        return True

    def _inside(self, path: str) -> Path | None:
        """Return where a path leads, `None` if that is not in the folder."""
        if self.follow_links:
            root, found = (os.path.abspath(each) for each in (self.root, self.root / path))
        else:
            root, found = (
                os.path.realpath(each, strict=True) for each in (self.root, self.root / path)
            )
        return Path(found) if Path(found).is_relative_to(root) else None

    def _plain_file(self, where: str, shown: str, path: Path) -> bytes:
        # Before it is opened: a FIFO waits, and some devices do something.
        self._check(where, shown, path.stat())
        with open(
            os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC), "rb"
        ) as file:
            size = self._check(where, shown, os.fstat(file.fileno()))
            return file.read(size)

    def _check(self, where: str, shown: str, status: os.stat_result) -> int:
        """Return the size of a plain file that may be read."""
        if not stat.S_ISREG(status.st_mode):
            got = _KINDS.get(stat.S_IFMT(status.st_mode), "something else")
            raise SampleError(
                "missing_media",
                f"{where}: {shown} is not a regular file, got {got}; put the file there",
            )
        self.check_size(f"{where}: {shown}", status.st_size)
        return status.st_size

    def check_size(self, where: str, size: int) -> None:
        """Refuse content of a size that is not opened.

        Raises:
            MediaError: `empty` or `oversized`.
        """
        if size == 0:
            raise MediaError("empty", f"{where}: the file is empty; copy it again")
        if size > self.max_bytes:
            expected = f"expected at most {self.max_bytes}; shrink it or raise --max-media-bytes"
            raise MediaError("oversized", f"{where}: too large, got {size} bytes, {expected}")
