"""The regular files of a tar archive, found header by header.

`tarfile` parses each header. The way from one header to the next is ours, because `tarfile.TarFile`
ends in silence at a damaged header, goes backwards on a negative size, and reads an extended header
of any size into memory. Here every step goes forward, every read is bounded, and the end of the
archive must be where the archive says it is.
"""

from __future__ import annotations

import os
import re
import stat
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from data.errors import DataError, shown

BLOCK = 512
MAX_EXTENSION_BYTES = 1 << 16
"""Most bytes of an extended header; the longest path that Linux takes has 4,096."""
END_BYTES = 2 * BLOCK
MAX_END_BYTES = END_BYTES + 20 * BLOCK
"""Writers fill up to a record of 20 blocks. More zeros are content that never arrived."""
GNU_LONG_NAME = b"L"
PAX_KINDS = (b"x", b"X")
PAX_GLOBAL = b"g"
PAX_RECORD = re.compile(rb"([1-9][0-9]{0,5}) ([^=\n]+)=")
PAX_DECIMAL = re.compile(rb"[0-9]{1,20}")
KINDS = {
    b"1": "a hard link",
    b"2": "a symbolic link",
    b"3": "a device",
    b"4": "a device",
    b"6": "a FIFO",
    b"S": "a sparse file",
}


@dataclass(frozen=True, slots=True)
class TarMember:
    """A regular file of an archive.

    Attributes:
        name: Its name; bytes that are no UTF-8 are surrogates, as in `os.fsdecode`.
        offset: Of its content, in bytes.
        size: Of its content, in bytes.
        is_plain: Its own header says name and size, no extended one does.
    """

    name: str
    offset: int
    size: int
    is_plain: bool


@dataclass(slots=True)
class _Extension:
    """What the extended headers before a member say about it."""

    name: str | None = None
    size: int | None = None
    kinds: bytes = b""


def open_regular(path: str | Path, what: str = "shard") -> int:
    """Return a descriptor of a regular file; nothing else is waited for or read.

    Raises:
        DataError: It cannot be opened, or is a folder, a FIFO or a device.
    """
    try:
        # Opening a FIFO for reading would wait for somebody to write.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        advice = "give the folder's path as seen from here"
        detail = error.strerror
        raise DataError(f"{path}: the {what} cannot be opened ({detail}); {advice}") from error
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        got = "a folder" if stat.S_ISDIR(mode) else "a FIFO" if stat.S_ISFIFO(mode) else "a device"
        expected = "expected a regular file; remove it or move it out of the folder"
        raise DataError(f"{path}: the {what} is no regular file, got {got}, {expected}")
    return descriptor


def read_at(path: str | Path, descriptor: int, size: int, offset: int) -> bytes:
    """Return `size` bytes from an offset, fewer where the file ends.

    Raises:
        DataError: The file cannot be read.
    """
    parts = []
    try:
        # One call reads at most 2 GiB, and network file systems may return less.
        while size > 0 and (part := os.pread(descriptor, size, offset)):
            parts.append(part)
            size -= len(part)
            offset += len(part)
    except OSError as error:
        detail = f"at byte {offset} ({error.strerror})"
        raise DataError(f"{path}: the file cannot be read {detail}; copy it anew") from error
    return parts[0] if len(parts) == 1 else b"".join(parts)


def rounded(size: int) -> int:
    """Return how many bytes of an archive some content takes: whole blocks."""
    return (size + BLOCK - 1) // BLOCK * BLOCK


def tar_members(path: str | Path, descriptor: int, tar_size: int) -> Iterator[TarMember]:
    """Yield the regular files of an archive in their order; folders are passed over.

    Args:
        path: Named in errors.
        descriptor: The open archive.
        tar_size: Its size in bytes.

    Raises:
        DataError: The archive is cut off or damaged, or has a member that is no regular file.
    """
    offset = 0
    extension = _Extension()
    while True:
        header = _header(path, offset, read_at(path, descriptor, BLOCK, offset))
        if header is None:
            break
        content = offset + BLOCK
        size = header.size if extension.size is None else extension.size
        if not 0 <= size <= tar_size - content:
            got = f"got a size of {size} bytes in the header at byte {offset}"
            expected = f"expected 0 to {tar_size - content} in a shard of {tar_size}"
            raise DataError(
                f"{path}: the shard ends inside a member, {got}, {expected}; copy it anew"
            )
        if header.type in (GNU_LONG_NAME, *PAX_KINDS, PAX_GLOBAL):
            if size > MAX_EXTENSION_BYTES:
                got = f"an extended header of {size} bytes"
                raise _damaged(path, offset, got, f"at most {MAX_EXTENSION_BYTES}")
            data = read_at(path, descriptor, rounded(size), content)
            if data[size:].strip(b"\0"):  # some readers would read on to the end of the block
                raise _damaged(
                    path, offset, f"more than the {size} bytes of its extended header", "zeros"
                )
            _extend(path, offset, extension, header.type, data[:size])
        elif header.isdir() and size == 0:
            extension = _Extension()
        elif header.type in (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE):
            is_plain = extension.name is None and extension.size is None
            name = header.name if extension.name is None else extension.name
            yield TarMember(name, content, size, is_plain)
            extension = _Extension()
        else:
            kind = KINDS.get(header.type, f"a member of type {header.type!r} with {size} bytes")
            where = f"{path}:{shown(header.name)}: at byte {offset}"
            raise DataError(f"{where}: got {kind}, expected plain files; write the shard anew")
        offset = content + rounded(size)
    if extension.kinds:
        raise _damaged(path, offset, "an extended header without its member", "a member")
    check_end(path, descriptor, offset, tar_size)


def _header(path: str | Path, offset: int, block: bytes) -> tarfile.TarInfo | None:
    """Parse one header; `None` for zeros, or where the file has ended."""
    try:
        return tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except (tarfile.EOFHeaderError, tarfile.EmptyHeaderError, tarfile.TruncatedHeaderError):  # type: ignore[attr-defined]
        return None
    except tarfile.HeaderError as error:
        what = "no tar archive" if offset == 0 else f"damaged tar header at byte {offset}"
        got = f"got {block[:8]!r}, expected a header"
        raise DataError(f"{path}: {what} ({error}), {got}; copy the shard anew") from error


def check_end(path: str | Path, descriptor: int, end: int, tar_size: int) -> None:
    """Refuse an archive that does not end after its last member.

    Args:
        path: Named in errors.
        descriptor: The open archive.
        end: Where its last member ends, in bytes.
        tar_size: Its size in bytes.

    Raises:
        DataError: Blocks of zeros are missing there, or other bytes, or too many zeros, follow.
    """
    left = tar_size - end
    if left < END_BYTES:
        advice = "copy it anew; if it is known to be whole, append 1,024 bytes of zeros"
        expected = f"expected the {END_BYTES} bytes of zeros that end an archive"
        raise DataError(
            f"{path}: the shard is cut off, got {max(left, 0)} bytes after its last whole member "
            f"at byte {end}, {expected}; {advice}"
        )
    tail = read_at(path, descriptor, min(left, MAX_END_BYTES), end)
    zeros = len(tail) - len(tail.lstrip(b"\0"))
    if zeros < len(tail) or left > MAX_END_BYTES:
        got = f"other bytes from byte {end + zeros} on" if zeros < len(tail) else f"{left} bytes"
        expected = f"expected at most {MAX_END_BYTES} bytes of zeros and nothing else"
        raise DataError(
            f"{path}: the shard goes on after its end at byte {end}, got {got}, {expected}; copy "
            "or write it anew"
        )


def _damaged(path: str | Path, offset: int, got: str, expected: str) -> DataError:
    where = f"{path}: damaged tar header at byte {offset}"
    return DataError(f"{where}, got {got}, expected {expected}; write the shard anew")


def _extend(
    path: str | Path, offset: int, extension: _Extension, kind: bytes, content: bytes
) -> None:
    """Add what one extended header says."""
    if kind in extension.kinds:
        raise _damaged(path, offset, "two extended headers of one kind", "one before each member")
    extension.kinds += kind
    if kind == GNU_LONG_NAME:
        names, sizes = [content.split(b"\0", 1)[0]], []
    else:
        records = _pax_records(path, offset, content)
        sparse = [key for key in records if key.startswith(b"GNU.sparse")]
        if sparse or (kind == PAX_GLOBAL and records.keys() & {b"path", b"size"}):
            what = "a sparse file" if sparse else "one name or size for all members"
            raise _damaged(path, offset, what, "plain files")
        names, sizes = ([records[key]] if key in records else [] for key in (b"path", b"size"))
    for name in names:
        if extension.name is not None:
            raise _damaged(path, offset, "two names for one member", "one")
        extension.name = name.decode("utf-8", "surrogateescape")
    for size in sizes:
        if not PAX_DECIMAL.fullmatch(size):
            raise _damaged(path, offset, f"a size of {size[:20]!r}", "a number")
        extension.size = int(size)


def _pax_records(path: str | Path, offset: int, content: bytes) -> dict[bytes, bytes]:
    """Return the records `LENGTH KEY=VALUE` of a pax header, which end where their lengths say."""
    records: dict[bytes, bytes] = {}
    position = 0
    while position < len(content):
        match = PAX_RECORD.match(content, position)
        end = position + int(match[1]) if match else 0
        is_whole = match is not None and match.end() < end <= len(content)
        if match is None or not is_whole or content[end - 1 : end] != b"\n" or match[2] in records:
            got = f"a record {content[position : position + 20]!r}"
            raise _damaged(path, offset, got, "LENGTH KEY=VALUE, each key once")
        records[match[2]] = content[match.end() : end - 1]
        position = end
    return records
