"""Objects of stores and files of servers, by address; fsspec speaks to them."""

from __future__ import annotations

import errno
import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

from data.errors import DataError

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

EXTRAS = {"s3": "s3", "gs": "gs", "gcs": "gs", "http": "http", "https": "http"}
"""Extras of this package by the scheme of an address that they are for."""
VERSIONS = (
    "md5Hash",
    "ETag",
    "etag",
    "blob_id",
    "Content-MD5",
    "Digest",
    "Last-Modified",
    "LastModified",
    "mtime",
    "created",
)
"""What stores say of an object that another content changes, the best first."""
READ_TIMEOUT_SECONDS = 60
NUM_ATTEMPTS = 5
BACKOFF_SECONDS = 1.0
"""Before the second attempt; twice as long before each further one."""


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """One object.

    Attributes:
        address: Where it is.
        size: In bytes.
        version: Another content has another one; empty if its store says nothing of the kind.
    """

    address: str
    size: int
    version: str


@dataclass(frozen=True, slots=True)
class Listing:
    """What lies directly in a remote folder.

    Attributes:
        files: By name; `None` where the store's listing has no size.
        folders: Names.
    """

    files: Mapping[str, RemoteFile | None]
    folders: frozenset[str]


class RemoteObjects:
    """Lists, describes, downloads, uploads and removes objects; what fails is tried again, a few
    times.

    Args:
        num_attempts: At every request.
        backoff_seconds: Before the second one.

    Attributes:
        counts: `retried` (requests that were repeated).
    """

    def __init__(
        self, num_attempts: int = NUM_ATTEMPTS, backoff_seconds: float = BACKOFF_SECONDS
    ) -> None:
        self._num_attempts, self._backoff_seconds = num_attempts, backoff_seconds
        self._stores: dict[str, Any] = {}
        self.counts: Counter[str] = Counter()

    def listing(self, address: str) -> Listing:
        """Return what lies in a remote folder.

        Raises:
            DataError: It cannot be listed.
        """
        entries = self._retried(address, lambda store: store.ls(address, detail=True))
        own = self._store(address)._strip_protocol(address).rstrip("/")
        files: dict[str, RemoteFile | None] = {}
        folders = set()
        for entry in entries:
            full = str(entry["name"]).rstrip("/")
            name = full.rsplit("/", 1)[-1]
            if full == own or not name or set(name) & {"?", "#"}:  # links of a page that sort it
                continue
            if entry["type"] == "directory":
                folders.add(name)
            else:
                files[name] = _described(f"{address}/{name}", entry)
        return Listing(files, frozenset(folders))

    def matching(self, pattern: str) -> list[str]:
        """Return the addresses that fit a pattern; raises as `listing`."""
        scheme = pattern.split("://")[0]
        found = self._retried(pattern, lambda store: store.glob(pattern))
        return sorted(
            str(name) if "://" in name else f"{scheme}://{name.lstrip('/')}" for name in found
        )

    def describe(self, address: str) -> RemoteFile | None:
        """Return what a store says of an object now, `None` if there is none.

        Raises:
            DataError: It does not answer, or does not say how large the object is.
        """
        try:
            entry = self._retried(address, lambda store: store.info(address))
        except MissingObjectError:
            return None
        found = _described(address, entry)
        if found is None:
            raise DataError(
                f"{address}: its server does not say how large it is, got no Content-Length, "
                "expected one; download it"
            )
        return found

    def download(self, address: str, path: Path) -> None:
        """Write an object to a path.

        Raises:
            DataError: It cannot be fetched.
        """
        self._retried(address, lambda store: store.get_file(address, str(path)))

    def tree(self, address: str) -> dict[str, RemoteFile]:
        """Return all objects below an address, by their path there; raises as `listing`."""
        entries = self._retried(address, lambda store: store.find(address, detail=True))
        own = self._store(address)._strip_protocol(address).rstrip("/")
        found = {}
        for full, entry in entries.items():
            name = str(full).removeprefix(own).lstrip("/")
            described = _described(f"{address}/{name}", entry)
            # No name may lead out of a folder.
            if described is not None and not {"", ".", ".."} & set(name.split("/")):
                found[name] = described
        return found

    def upload(self, path: Path, address: str) -> RemoteFile:
        """Make an object of a file, in place of one that is there, and return what its store then
        says of it.

        Raises:
            FileNotFoundError: There is no such file.
            DataError: It cannot be uploaded, or its store has less of it.
        """
        size = path.stat().st_size
        try:
            self._retried(address, lambda store: store.put_file(str(path), address), "uploaded")
        except MissingObjectError:
            path.stat()  # the file may be what is missing
            raise
        found = self.describe(address)
        if found is None or found.size < size:
            got = "nothing" if found is None else f"{found.size} bytes"
            raise DataError(
                f"{address}: the object is not what was uploaded, got {got}, expected {size} "
                "bytes; check the store"
            )
        return found

    def remove(self, address: str) -> None:
        """Remove an object, if it is there.

        Raises:
            DataError: It cannot be removed.
        """
        try:
            self._retried(address, lambda store: store.rm_file(address), "removed")
        except MissingObjectError:
            return

    def _store(self, address: str) -> Any:
        scheme = address.split("://")[0]
        if scheme not in self._stores:
            self._stores[scheme] = _open_store(scheme, address)
        return self._stores[scheme]

    def _retried(
        self, address: str, request: Callable[[Any], Result], done: str = "fetched"
    ) -> Result:
        """Return what a request gives, or raise why it does not, after some attempts; `done` is
        what is not done then.
        """
        store = self._store(address)
        for attempt in range(1, self._num_attempts + 1):
            try:
                # Listings that fsspec remembers would hide that an object was changed.
                store.invalidate_cache()
                return request(store)
            except Exception as error:  # every store has exceptions of its own
                status = _status(error)
                detail = f"{type(error).__name__}: {error.__cause__ or error!s:.300}"
                if status in (404, 410):
                    raise MissingObjectError(
                        f"{address}: no such object, got {detail}, expected a file or folder; "
                        "correct the address"
                    ) from error
                if status in (401, 403):
                    raise DataError(
                        f"{address}: cannot be {done}, got {detail}, expected an answer; set the "
                        "credentials of its store, see docs/data.md"
                    ) from error
                if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
                    raise DataError(
                        f"{address}: no room for it here ({detail}); free some"
                    ) from error
                if attempt == self._num_attempts:
                    raise DataError(
                        f"{address}: cannot be {done}, got {detail} at each of {attempt} "
                        "attempts, expected an answer; check network, address and credentials"
                    ) from error
                wait = self._backoff_seconds * 2 ** (attempt - 1)
                self.counts["retried"] += 1
                logger.warning("%s: %s; trying again in %.1f s", address, detail, wait)
                time.sleep(wait)
        raise AssertionError("there is at least one attempt")


def _status(error: Exception) -> int:
    """Return what an error is among those of HTTP; 0 if it may pass."""
    if isinstance(error, PermissionError):
        return 403
    # fsspec says that there is no such file whatever a server answered, unless it is looked into.
    cause = error.__cause__ if isinstance(error, FileNotFoundError) else None
    is_of_http = isinstance(cause, TimeoutError) or type(cause).__module__.startswith("aiohttp")
    if isinstance(error, FileNotFoundError) and not is_of_http:
        return 404
    return int(getattr(cause or error, "status", 0))


class MissingObjectError(DataError):
    """There is no object at an address."""


def _open_store(scheme: str, address: str) -> Any:
    import fsspec

    options: dict[str, Any] = {}
    try:
        if scheme in ("http", "https"):
            from aiohttp import ClientTimeout

            # By default a whole file has to come within five minutes.
            timeout = ClientTimeout(total=None, sock_connect=30, sock_read=READ_TIMEOUT_SECONDS)
            options["client_kwargs"] = {"timeout": timeout}
        elif scheme in ("file", "local"):
            options["auto_mkdir"] = True  # as object stores, which have no folders
        return fsspec.filesystem(scheme, skip_instance_cache=True, **options)
    except ImportError as error:
        extra = EXTRAS.get(scheme)
        advice = f"pip install 'zppo-mm[{extra}]'" if extra else "install it"
        raise DataError(
            f"{address}: {scheme}:// needs a package that cannot be imported ({error}); {advice}"
        ) from error
    except ValueError as error:
        raise DataError(
            f"{address}: unknown kind of address, got {scheme}://, expected one that fsspec knows, "
            f"such as s3://, gs://, hf:// or https:// ({error}); correct it"
        ) from error


def _described(address: str, entry: Mapping[str, Any]) -> RemoteFile | None:
    size = entry.get("size")
    if size is None:
        return None
    version = next((entry[name] for name in VERSIONS if entry.get(name)), "")
    if isinstance(version, datetime):  # of which listings have the number
        version = version.timestamp()
    return RemoteFile(address, int(size), str(version))
