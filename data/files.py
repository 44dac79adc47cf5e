"""How the files of a source are listed and opened, wherever they lie."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from data.errors import DataError
from data.tar_members import open_regular


class LocalFiles:
    """Files of this machine's file systems; `data.remote_files.RemoteFiles` has others beside."""

    @property
    def counts(self) -> Mapping[str, int]:
        """Return what fetching took so far in this process, by name."""
        return {}

    def path_of(self, address: str) -> Path:
        """Return the path that stands for an address.

        Raises:
            DataError: There are only local files.
        """
        raise DataError(
            f"{address}: an address, got no cache for files of other machines, expected a path; "
            "download it"
        )

    def names(self, folder: Path) -> list[str]:
        """Return what lies in a folder.

        Raises:
            OSError: It cannot be listed.
        """
        return os.listdir(folder)

    def exists(self, path: Path) -> bool:
        """Return whether something lies at a path, whatever it is."""
        return os.path.lexists(path)

    def size_without_opening(self, path: Path) -> int | None:
        """Return the size of a file that would have to be fetched; `None` of one that is here."""
        return None

    def open(self, path: str | Path, what: str = "shard") -> int:
        """Return a descriptor of a regular file, for `close`.

        Raises:
            DataError: It cannot be opened.
        """
        return open_regular(path, what)

    def close(self, descriptor: int) -> None:
        """Close what `open` returned."""
        os.close(descriptor)

    def hold(self, path: str) -> OpenFile:
        """Open a file that is read again and again; raises as `open`."""
        return OpenFile(self, self.open(path))

    def is_current(self, held: OpenFile) -> bool:
        """Return whether what is held open is still what `hold` would open."""
        return True

    def keep(self, path: str) -> None:
        """Have a file lie at its path until these files are released."""

    def release(self) -> None:
        """Let go of the files that are kept."""

    @contextmanager
    def at_hand(self, folder: str, path: str) -> Iterator[None]:
        """Have a file that a table names lie at its path during the block, if there is one."""
        yield


class OpenFile:
    """A descriptor that is closed when the last thread that reads from it lets go of it.

    Args:
        files: Close it.
        descriptor: What they opened.
        stays_open: Whether it may be held between reads.
    """

    def __init__(self, files: LocalFiles, descriptor: int, *, stays_open: bool = True) -> None:
        self._files, self.descriptor, self.stays_open = files, descriptor, stays_open

    def __del__(self) -> None:
        self._files.close(self.descriptor)


LOCAL = LocalFiles()
