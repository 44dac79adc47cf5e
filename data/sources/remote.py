"""Which files an address names; those of tables are fetched, shards when they are read."""

from __future__ import annotations

import glob
import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from data.errors import DataError
from data.files import LocalFiles
from data.remote_files import RemoteFiles, is_address
from data.shard_names import SHARD_SUFFIX
from data.sources.listing import CACHED, EXPECTED, SPLITS, STATE, TABLES, TableListing, list_tables

logger = logging.getLogger(__name__)

_READ = re.compile(
    rf"(?i)(?!\.).*({'|'.join(map(re.escape, TABLES))})|{re.escape(STATE)}|{re.escape(SPLITS)}"
)
"""Names of the files that say what the questions of a folder are."""


@dataclass(frozen=True, slots=True)
class SourceListing:
    """What a source's path names.

    Attributes:
        path: Of the source on this machine.
        tables: Its table files; `None` for a folder of shards.
    """

    path: str | Path
    tables: TableListing | None


def list_source(path: str | Path, files: LocalFiles) -> SourceListing:
    """Return what a path or an address names; table files of an address are fetched and kept.

    Raises:
        DataError: It names nothing that can be read.
    """
    if not is_address(str(path)):
        return SourceListing(path, list_tables(str(path)))
    target = files.path_of(str(path))
    assert isinstance(files, RemoteFiles), "others have no path of an address"
    if glob.has_magic(str(path)):
        return _listed_tables(target, files.matching(str(path)), files)
    if target.suffix.lower() in TABLES:
        return _listed_tables(target, [target], files)
    names = files.names(target)
    if any(name.endswith(SHARD_SUFFIX) for name in names):
        if any(Path(name).suffix.lower() in TABLES for name in names):
            raise DataError(
                f"{path}: files of several kinds, got shards and tables, expected one; name the "
                f"tables, such as {path}/*.jsonl, or move the shards"
            )
        _check_sizes(str(path), target, names, files)
        return SourceListing(target, None)
    below = [target, *((target / "data",) if "data" in files.folders(target) else ())]
    for folder in below:
        files.forget(folder, _READ)
    found = [folder / name for folder in below for name in files.names(folder)]
    return _listed_tables(target, found, files)


def _listed_tables(target: Path, found: Iterable[Path], files: RemoteFiles) -> SourceListing:
    wanted = [path for path in found if _READ.fullmatch(path.name) and not CACHED.match(path.name)]
    address = files.address_of(target)
    if not wanted:
        raise DataError(
            f"{address}: nothing to read there, got no such file, {EXPECTED}; correct it"
        )
    for path in wanted:
        files.keep(str(path))
    listed = list_tables(str(target))
    assert listed is not None, "there is one at least"
    # Beside them there may be cached files whose objects are gone.
    return SourceListing(
        target, replace(listed, files=[path for path in listed.files if path in wanted])
    )


def _check_sizes(address: str, folder: Path, names: Iterable[str], files: RemoteFiles) -> None:
    """Say before the first step what of a folder of shards does not fit into the cache.

    Raises:
        DataError: One of them does not.
    """
    sizes = {
        name: files.size_without_opening(folder / name) or 0
        for name in names
        if name.endswith(SHARD_SUFFIX)
    }
    files.expect_shards(folder, sum(sizes.values()))
    name = max(sizes, key=lambda name: sizes[name])
    if sizes[name] > files.max_bytes:
        raise DataError(
            f"{address}/{name}: larger than the cache, got {sizes[name]} bytes, expected at most "
            f"remote.cache_bytes={files.max_bytes}; raise it or write smaller shards"
        )
    if sum(sizes.values()) > files.max_bytes:
        logger.warning(
            "%s: its shards have %d bytes, the cache remote.cache_bytes=%d; questions are "
            "drawn from all of them in turn, so shards are fetched again and again: raise it",
            address,
            sum(sizes.values()),
            files.max_bytes,
        )
