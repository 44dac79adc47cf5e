"""Where every member of a tar shard lies: scan, sidecar file, and whether both say the same."""

from __future__ import annotations

import json
import logging
import os
import re
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from data.errors import DataError, shown
from data.files import LOCAL, LocalFiles
from data.tar_members import (
    BLOCK,
    END_BYTES,
    MAX_END_BYTES,
    check_end,
    read_at,
    rounded,
    tar_members,
)

logger = logging.getLogger(__name__)

SIDECAR_SUFFIX = ".idx.json"
SIDECAR_VERSION = 2
MAX_SIDECAR_BYTES = 1 << 28
# What a header takes in a sidecar at most: 255 bytes of name, escaped, and three numbers.
SIDECAR_BYTES_PER_BLOCK = 4 * BLOCK
# The rules of plain webdataset: the key ends at the first dot of the base name; files without a
# dot, and those whose whole name or first folder is `__like_this__`, are skipped.
MEMBER_NAME = re.compile(r"(?!__[^/]*__(?:\Z|/))((?:.*/)?[^./]+)\.([^/]*)\Z", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Member:
    """One file of a sample.

    Attributes:
        extension: In lower case.
        offset: Of its content, in bytes.
        size: Of its content, in bytes.
        crc32: Of its content as it was written, `None` without a sidecar.
    """

    extension: str
    offset: int
    size: int
    crc32: int | None = None


@dataclass(frozen=True, slots=True)
class TarIndex:
    """Members of a shard by sample key, in the order of the shard.

    Attributes:
        tar_size: Size of the shard in bytes when it was indexed.
        samples: Sample key to its members.
        is_plain: Name and size of every member are in its own header, none in an extended one.
    """

    tar_size: int
    samples: Mapping[str, tuple[Member, ...]]
    is_plain: bool = True


def split_name(name: str) -> tuple[str, str] | None:
    """Return key and extension of a member, `None` if it belongs to no sample."""
    match = MEMBER_NAME.fullmatch(name)
    return None if match is None else (match[1], match[2].lower())


def scan_tar(path: Path, files: LocalFiles = LOCAL) -> TarIndex:
    """Index a shard by reading its headers.

    Args:
        path: The shard.
        files: Open it.

    Raises:
        DataError: The file is not a complete tar archive, or it breaks a rule of webdataset shards.
    """
    descriptor = files.open(path)
    try:
        return _scan(path, descriptor, os.fstat(descriptor).st_size)
    finally:
        files.close(descriptor)


def _scan(path: Path, descriptor: int, tar_size: int) -> TarIndex:
    samples: dict[str, dict[str, Member]] = {}
    last_key: str | None = None
    num_skipped, first_skipped = 0, ""
    is_plain = True
    for file in tar_members(path, descriptor, tar_size):
        named = split_name(file.name)
        if named is None:
            num_skipped, first_skipped = num_skipped + 1, first_skipped or shown(file.name)
            continue
        key, extension = named
        where = f"{path}:{shown(key)}"
        members = samples.setdefault(key, {})
        if members and key != last_key:
            expected = "expected them side by side"
            raise DataError(
                f"{where}: files of one sample are apart, {expected}; write the shard again"
            )
        if extension in members:
            got = f"got {shown(extension)} twice"
            raise DataError(
                f"{where}: two files have the same extension, {got}; write the shard again"
            )
        members[extension] = Member(extension, file.offset, file.size)
        last_key = key
        is_plain = is_plain and file.is_plain
    if num_skipped:
        logger.warning(
            "%s: skipped %d files that have no extension, the first is %s",
            path,
            num_skipped,
            first_skipped,
        )
    if not samples:
        expected = "expected files named KEY.json"
        raise DataError(f"{path}: the shard holds no sample, {expected}; remove or write it again")
    in_order = {key: tuple(members.values()) for key, members in samples.items()}
    return TarIndex(tar_size, in_order, is_plain)


def sidecar_path(shard: Path) -> Path:
    """Return where the index of a shard lies."""
    return shard.with_name(shard.name + SIDECAR_SUFFIX)


def write_sidecar(shard: Path, index: TarIndex) -> None:
    """Write the index beside its shard, which nobody reads yet."""
    samples = {
        key: {member.extension: [member.offset, member.size, member.crc32] for member in members}
        for key, members in index.samples.items()
    }
    stored = {"version": SIDECAR_VERSION, "tar_size": index.tar_size, "samples": samples}
    sidecar_path(shard).write_text(json.dumps(stored, separators=(",", ":")))


def load_index(shard: Path, files: LocalFiles = LOCAL) -> TarIndex:
    """Return the index of a shard: from its sidecar, or by a scan if that is missing or unreadable.

    A sidecar is believed when its entries fill the shard from the first byte to the end of the
    archive. Where they do not, the shard is scanned, and both must agree. What the entries say of
    names is held against the headers when a sample is read. A shard that would have to be fetched
    is not, if its size alone fits the sidecar.

    Args:
        shard: The shard.
        files: Open it.

    Raises:
        DataError: The shard is missing, not a complete tar archive, or not what its sidecar says.
    """
    away = files.size_without_opening(shard)
    index = None if away is None else _sidecar_of_size(shard, away, files)
    if away is not None and index is not None and _has_end(_end(index), away):
        return index
    descriptor = files.open(shard)
    try:
        tar_size = os.fstat(descriptor).st_size
        index = index or _sidecar_of_size(shard, tar_size, files)
        if index is None:
            return _scan(shard, descriptor, tar_size)
        if _fills(index, shard, descriptor):
            return index
        found = _scan(shard, descriptor, tar_size)
        if not same_entries(found, index):
            raise _contradiction(shard, _extent(found), _extent(index))
        return replace(index, is_plain=found.is_plain)
    finally:
        files.close(descriptor)


def _sidecar_of_size(shard: Path, tar_size: int, files: LocalFiles) -> TarIndex | None:
    """Return what the sidecar of a shard of this size says, `None` if there is none or it is
    unreadable.
    """
    try:
        index = read_sidecar(shard, tar_size, files)
    except DataError as error:
        # It contradicts nothing, and the shard speaks for itself.
        logger.warning("%s", error)
        return None
    if index is not None and index.tar_size != tar_size:
        expected = f"{index.tar_size} bytes with {len(index.samples)} samples"
        raise _contradiction(shard, f"{tar_size} bytes", expected)
    return index


def same_entries(one: TarIndex, other: TarIndex) -> bool:
    """Return whether two indexes name the same members of the same samples in the same order."""
    return _entries(one) == _entries(other)


def _entries(index: TarIndex) -> list[tuple[str, list[tuple[str, int, int]]]]:
    return [
        (key, [(member.extension, member.offset, member.size) for member in members])
        for key, members in index.samples.items()
    ]


def _extent(index: TarIndex) -> str:
    return f"{len(index.samples)} samples with {sum(map(len, index.samples.values()))} files"


def _contradiction(shard: Path, got: str, expected: str) -> DataError:
    sidecar = sidecar_path(shard)
    return DataError(
        f"{shard}: the shard and its index differ, got {got} in the shard, expected {expected} as "
        f"in {sidecar.name}; copy the shard again, or remove {sidecar} if the shard is right"
    )


def _fills(index: TarIndex, shard: Path, descriptor: int) -> bool:
    """Return whether the members, each behind one header, fill a shard to the end of the
    archive.
    """
    end = _end(index)
    if end is None:
        return False
    try:
        check_end(shard, descriptor, end, index.tar_size)
    except DataError:
        return False  # the scan finds out which of both is wrong
    return True


def _end(index: TarIndex) -> int | None:
    """Return where the last member ends; `None` where they are not one behind the other."""
    end = 0
    for members in index.samples.values():
        for member in members:
            if member.offset != end + BLOCK:
                return None
            end = member.offset + rounded(member.size)
    return end


def _has_end(end: int | None, tar_size: int) -> bool:
    return end is not None and END_BYTES <= tar_size - end <= MAX_END_BYTES


def read_sidecar(shard: Path, tar_size: int, files: LocalFiles = LOCAL) -> TarIndex | None:
    """Return what the sidecar of a shard says, `None` if there is none.

    Raises:
        DataError: It cannot be read or understood.
    """
    path = sidecar_path(shard)
    if not files.exists(path):
        return None
    descriptor = files.open(path, "index")
    try:
        size = os.fstat(descriptor).st_size
        limit = min(MAX_SIDECAR_BYTES, SIDECAR_BYTES_PER_BLOCK * (tar_size // BLOCK + 1))
        if size > limit:
            raise ValueError(f"got {size} bytes, expected at most {limit}")
        return _parse_sidecar(json.loads(read_at(path, descriptor, size, 0)))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        detail = f"{type(error).__name__}: {shown(str(error))}"
        advice = "remove it, then the shard is scanned"
        raise DataError(f"{path}: the index is unreadable ({detail}); {advice}") from error
    finally:
        files.close(descriptor)


def _parse_sidecar(stored: Any) -> TarIndex:
    """Raise what any wrong type raises."""
    if stored["version"] != SIDECAR_VERSION:
        raise ValueError(f"version {stored['version']!r}, expected {SIDECAR_VERSION}")
    samples = {}
    for key, members in stored["samples"].items():
        samples[key] = tuple(
            _parse_entry(key, extension, *numbers) for extension, numbers in members.items()
        )
        if not members:
            raise ValueError(f"no files of {key!r}")
    if type(stored["tar_size"]) is not int:
        raise ValueError(f"tar_size {stored['tar_size']!r}")
    return TarIndex(stored["tar_size"], samples)


def _parse_entry(key: str, extension: str, offset: int, size: int, crc32: int) -> Member:
    numbers = (offset, size, crc32)
    if not all(type(number) is int for number in numbers):
        raise ValueError(f"entry {numbers!r} of {key!r}, expected whole numbers")
    f"{key}{extension}".encode("utf-8", "surrogateescape")  # any name that bytes can have
    return Member(extension, offset, size, crc32)


def check_header(where: str, block: bytes, key: str, member: Member, *, is_plain: bool) -> None:
    """Hold an entry of an index against the header before the content that it points to.

    Args:
        where: Named in errors.
        block: The header.
        key: Sample key.
        member: The entry.
        is_plain: The header has name and size; otherwise it must only be one of a regular file.

    Raises:
        DataError: It is another file's header, or none.
    """
    # What our writer writes is compared as bytes: parsing takes 20 times as long.
    name = f"{key}.{member.extension}".encode("utf-8", "surrogateescape")
    has_name = is_plain and block.startswith(name + b"\0") and block[156:157] == tarfile.REGTYPE
    if has_name and block[124:136] == b"%011o\0" % member.size:
        return
    try:
        header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        got = f"no header ({error})"
    else:
        found = (split_name(header.name), header.size)
        if header.isreg() and (not is_plain or found == ((key, member.extension), member.size)):
            return
        got = f"{shown(header.name)} of {header.size} bytes"
    expected = f"{shown(key)}.{shown(member.extension)} of {member.size} bytes"
    raise DataError(
        f"{where}: the index does not fit the shard, got {got} at byte {member.offset - BLOCK}, "
        f"expected {expected}; copy the shard again, or remove its .idx.json if the shard is right"
    )
