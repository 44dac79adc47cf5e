"""Which files of a folder are shards, and which only look like shards and would be passed over."""

from __future__ import annotations

import re
from collections.abc import Set
from pathlib import Path

from data.errors import DataError, shown
from data.files import LOCAL, LocalFiles
from data.tar_index import SIDECAR_SUFFIX
from data.text import is_valid_text

SHARD_SUFFIX = ".tar"
UNFINISHED_SUFFIX = ".tmp"
COMPRESSED = re.compile(
    r"(?i)\.(?:tar\.(?:gz|bz2|xz|zstd?|lz4|lzo?|lzma|br|z|zip|7z|gpg|age|enc)|tgz|tbz2?|txz|tzst|tlz)\Z"
)
# Of this writer, of browsers and download tools, of split, and of rsync, whose files are hidden.
UNFINISHED = re.compile(
    r"\.tar\.(?:.*\.)?(?:tmp|(?:file)?part[\w-]*|incomplete|(?:cr|op)?download|aria2|\d{1,4}|a{1,2}[a-z])(?:\.idx\.json)?\Z"
    r"|\A\..*\.tar\.\w{6}\Z",
    re.IGNORECASE,
)
# What a writer that was killed leaves behind.
OWN_LEFTOVER = re.compile(r"shard-[0-9]{6,}\.tar(?:\.tmp|\.tmp\.idx\.json|\.idx\.json)")
EXPECTED_SHARDS = (
    "expected *.tar, or *.jsonl, *.parquet, *.arrow; write shards with tools/make_shards.py"
)


def list_shards(folder: Path, files: LocalFiles = LOCAL) -> tuple[list[Path], dict[str, str]]:
    """Return the shards of a folder, and why other files that look like shards are not read, by
    name.

    Raises:
        DataError: There is no such folder, or it cannot be listed.
    """
    try:
        names = sorted(files.names(folder))
    except OSError as error:
        got = f"got no folder ({error.strerror})"
        raise DataError(f"{folder}: no shards, {got}, {EXPECTED_SHARDS}") from error
    if not is_valid_text(str(folder)):
        raise DataError(f"{shown(str(folder))}: the path of the folder is not UTF-8; rename it")
    shards: list[Path] = []
    unread: dict[str, str] = {}
    present = frozenset(names)
    for name in names:
        if name.startswith("._") and name[2:] in present:
            continue  # what macOS keeps about the file beside it
        problem = _unread_because(name, present)
        if problem is not None:
            unread[name] = f"{folder}/{shown(name)}: {problem}"
        elif name.endswith(SHARD_SUFFIX):
            shards.append(folder / name)
    return shards, unread


def _unread_because(name: str, present: Set[str]) -> str | None:
    """Return why a file that looks like a shard, or part of one, is not read."""
    if name.endswith(SHARD_SUFFIX):
        return None if is_valid_text(name) else "the name of the shard is not UTF-8; rename it"
    if name.endswith(SHARD_SUFFIX + SIDECAR_SUFFIX):
        if name.removesuffix(SIDECAR_SUFFIX) in present:
            return None
        return "an index without its shard; restore the shard or remove the index"
    if COMPRESSED.search(name):
        return "a compressed shard is not read; unpack it, or move it out of the folder"
    if UNFINISHED.search(name):
        return "not written or copied to its end; write or copy it again, and remove this file"
    is_upper = name.lower().endswith(SHARD_SUFFIX)
    return "a shard is read by its suffix .tar in lower case; rename it" if is_upper else None
