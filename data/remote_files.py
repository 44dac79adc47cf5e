"""Files behind addresses (`s3://`, `gs://`, `hf://`, `https://`), read through a cache on this
machine.

A file of an address has a path below the cache's folder, `s3://bucket/set/a.tar` the path
`FOLDER/s3/bucket/set/a.tar`, and lies there while it is cached. References name this path.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import posixpath
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from data.errors import DataError, shown
from data.file_cache import FileCache, NoRoomError
from data.file_lock import unlock_and_close
from data.files import LocalFiles, OpenFile
from data.remote_objects import (
    BACKOFF_SECONDS,
    NUM_ATTEMPTS,
    Listing,
    MissingObjectError,
    RemoteFile,
    RemoteObjects,
)

_ADDRESS = re.compile(r"([a-z][a-z0-9+.-]*)://(.*)", re.DOTALL)


def is_address(path: str) -> bool:
    """Return whether a path is an address, such as `s3://bucket/folder`."""
    return _ADDRESS.match(path) is not None


class RemoteFiles(LocalFiles):
    """Files of this machine, and of others through a cache. Safe to use from several threads.

    What a store says of an object is asked for once: an object that is changed later is an error
    where it is fetched.

    Args:
        folder: Of the cache; all runs and processes of a machine may use one.
        max_bytes: Most bytes of its files.
        num_attempts: At every request.
        backoff_seconds: Before the second one.
    """

    def __init__(
        self,
        folder: str | Path,
        max_bytes: int,
        num_attempts: int = NUM_ATTEMPTS,
        backoff_seconds: float = BACKOFF_SECONDS,
    ) -> None:
        self._options = folder, max_bytes, num_attempts, backoff_seconds
        self._root = Path(os.path.abspath(os.path.expanduser(folder)))
        self._prefix = f"{self._root}{os.sep}"
        self._cache = FileCache(self._root, max_bytes)
        self._objects = RemoteObjects(num_attempts, backoff_seconds)
        self._listings: dict[str, Listing] = {}
        self._known: dict[str, RemoteFile | None] = {}
        self._kept: dict[str, int] = {}
        self._shard_bytes: dict[str, int] = {}
        self._fetched: Counter[str] = Counter()

    def __reduce__(self) -> tuple[type[RemoteFiles], tuple[str | Path, int, int, float]]:
        return type(self), self._options

    @property
    def max_bytes(self) -> int:
        """Return the most bytes of the cache."""
        return self._cache.max_bytes

    @property
    def counts(self) -> Counter[str]:
        """Return the counts of this process, once an address was asked for: `fetched` (files),
        `fetched_bytes`, `retried` (requests), `evicted` (files).
        """
        if not (self._known or self._listings):
            return Counter()
        return Counter(
            fetched=self._fetched["fetched"],
            fetched_bytes=self._fetched["fetched_bytes"],
            retried=self._objects.counts["retried"],
            evicted=self._cache.counts["evicted"],
        )

    def path_of(self, address: str) -> Path:
        """Return the path that stands for an address.

        Raises:
            DataError: It has parts that no path can have.
        """
        match = _ADDRESS.fullmatch(address)
        parts = match[2].strip("/").split("/") if match else []
        if match is None or any(part in ("", ".", "..") or "\0" in part for part in parts):
            raise DataError(
                f"{shown(address)}: not an address of a file or folder, got empty parts or dots, "
                "expected SCHEME://BUCKET/FOLDER; correct it"
            )
        return self._root / match[1] / "/".join(parts)

    def address_of(self, path: str | Path) -> str | None:
        """Return the address that a path stands for, `None` of a path outside of the cache."""
        text = str(path)
        if not text.startswith(self._prefix):
            return None
        scheme, _, rest = text.removeprefix(self._prefix).partition("/")
        return f"{scheme}://{rest}"

    def matching(self, pattern: str) -> list[Path]:
        """Return the paths of the files that fit a pattern of addresses.

        Raises:
            DataError: They cannot be listed.
        """
        return [self.path_of(address) for address in self._objects.matching(pattern)]

    def folders(self, folder: Path) -> frozenset[str]:
        """Return the names of the folders in a remote folder; raises as `names`."""
        return self._listing(folder).folders

    def names(self, folder: Path) -> list[str]:
        """Return what lies in a folder, of a remote one the files.

        Raises:
            OSError: It cannot be listed.
            DataError: A remote one cannot.
        """
        if self.address_of(folder) is None:
            return super().names(folder)
        return list(self._listing(folder).files)

    def exists(self, path: Path) -> bool:
        """Return whether a file is there; see `LocalFiles.exists`."""
        if self.address_of(path) is None:
            return super().exists(path)
        return self._find(str(path)) is not None

    def size_without_opening(self, path: Path) -> int | None:
        """Return the size of a remote file; see `LocalFiles.size_without_opening`."""
        return None if self.address_of(path) is None else self._file(str(path)).size

    def open(self, path: str | Path, what: str = "shard") -> int:
        """Return a descriptor of a file, which is fetched if it is remote and not here.

        Raises:
            DataError: It cannot be opened or fetched, or was changed.
        """
        if not str(path).startswith(self._prefix):
            return super().open(path, what)
        file = self._file(str(path))
        stamp = _stamp(file)
        try:
            return self._cache.open(Path(path), file.size, stamp, partial(self._fetch, file))
        except NoRoomError as error:
            raise DataError(
                f"{file.address}: no room in the cache, {error}; raise remote.cache_bytes"
            ) from error
        except OSError as error:
            raise DataError(
                f"{file.address}: cannot be kept in {self._root} ({error.strerror or error}); free "
                "some room or set remote.cache_folder"
            ) from error

    def close(self, descriptor: int) -> None:
        """Close what `open` returned; the file may make way for others."""
        unlock_and_close(descriptor)

    def hold(self, path: str) -> OpenFile:
        """Open a file that is read again and again; see `LocalFiles.hold`.

        Where all shards of the run fit into the cache, a shard is held without its lock, so that it
        makes way for others, if need be; else it is opened for each read.
        """
        if not path.startswith(self._prefix):
            return super().hold(path)
        descriptor = self.open(path)
        stays_open = 0 < sum(self._shard_bytes.values()) <= self.max_bytes
        if stays_open:
            fcntl.flock(descriptor, fcntl.LOCK_UN)
        return OpenFile(self, descriptor, stays_open=stays_open)

    def is_current(self, held: OpenFile) -> bool:
        """Return whether a file that is held open has not made way; see `LocalFiles.is_current`."""
        return os.fstat(held.descriptor).st_nlink > 0

    def expect_shards(self, folder: Path, num_bytes: int) -> None:
        """Take note of how large the shards of a folder are together."""
        self._shard_bytes[str(folder)] = num_bytes

    def keep(self, path: str) -> None:
        """Have a file lie at its path until these files are released; raises as `open`."""
        if path.startswith(self._prefix) and path not in self._kept:
            descriptor = self.open(path, "file")
            if self._kept.setdefault(path, descriptor) != descriptor:
                self.close(descriptor)

    def release(self) -> None:
        """Let go of the files that are kept."""
        while self._kept:
            self.close(self._kept.popitem()[1])

    def forget(self, folder: Path, is_wanted: re.Pattern[str]) -> None:
        """Remove cached files of a remote folder whose objects are gone.

        Args:
            folder: Below the cache's.
            is_wanted: Names that matter.

        Raises:
            DataError: One is in use.
        """
        present = set(self.names(folder))
        for name in os.listdir(folder) if folder.is_dir() else ():
            if name in present or not is_wanted.fullmatch(name):
                continue
            if not self._cache.remove(folder / name):
                raise DataError(
                    f"{self.address_of(folder / name)}: the object is gone, got a file in use by "
                    "another run, expected none; end that run or set another remote.cache_folder"
                )

    @contextmanager
    def at_hand(self, folder: str, path: str) -> Iterator[None]:
        """Have a file that a table names lie at its path during the block, if there is one."""
        found = posixpath.normpath(posixpath.join(folder, path))
        inside = found.startswith(posixpath.normpath(folder) + "/")
        if not inside or not found.startswith(self._prefix) or self._find(found) is None:
            yield
            return
        descriptor = self.open(found, "file")
        try:
            yield
        finally:
            self.close(descriptor)

    def _listing(self, folder: Path) -> Listing:
        address = self.address_of(folder)
        assert address is not None
        if str(folder) not in self._listings:
            self._listings[str(folder)] = self._objects.listing(address)
        return self._listings[str(folder)]

    def _file(self, path: str) -> RemoteFile:
        found = self._find(path)
        if found is None:
            raise MissingObjectError(
                f"{self.address_of(path)}: no such object, expected a file; correct the address, "
                "or restore the object"
            )
        return found

    def _find(self, path: str) -> RemoteFile | None:
        """Return what the store said of an object when it was first asked; `None` if there was
        none.
        """
        if path not in self._known:
            folder, _, name = path.rpartition("/")
            listed = self._listings.get(folder)
            address = self.address_of(path)
            assert address is not None
            if listed is not None and (name not in listed.files or listed.files[name]):
                self._known[path] = listed.files.get(name)
            else:
                self._known[path] = self._objects.describe(address)
        return self._known[path]

    def _fetch(self, file: RemoteFile, target: Path) -> None:
        self._objects.download(file.address, target)
        now, size = self._objects.describe(file.address), target.stat().st_size
        if size != file.size or (now != file and not self._is_listed(file)):
            got = f"version {now.version!r} of {now.size} bytes" if now else "nothing"
            raise DataError(
                f"{file.address}: the object was changed, got {got} and {size} bytes, expected "
                f"version {file.version!r} of {file.size} bytes as at the start; restore it, or "
                "start again"
            )
        self._fetched.update({"fetched": 1, "fetched_bytes": size})

    def _is_listed(self, file: RemoteFile) -> bool:
        """Return whether a listing has an object as it was; some stores describe an object in other
        words than they list it.
        """
        folder, _, name = file.address.rpartition("/")
        if str(self.path_of(folder)) not in self._listings:
            return False
        return self._objects.listing(folder).files.get(name) == file


def _stamp(file: RemoteFile) -> int:
    """Return a time of modification that stands for the version of a file."""
    named = f"{file.size}\0{file.version}".encode()
    return int.from_bytes(hashlib.blake2b(named, digest_size=4).digest(), "big") >> 1
