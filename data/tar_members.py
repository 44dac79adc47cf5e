"""The regular files of a tar archive, as `tarfile` finds them.

`tarfile` is what webdataset reads with, so both see the same files. It ends without an error at a
damaged header, goes backwards on a negative size, and reads extended headers of any size into
memory. So its reads are bounded here, every size is checked before the next header is read, and
the archive must end where `tarfile` stopped.
"""

from __future__ import annotations

import io
import os
import stat
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from data.errors import DataError, shown

BLOCK = 512
MAX_HEADER_BYTES = 1 << 14
"""Most bytes of all headers of one member; the longest path that Linux takes has 4,096."""
END_BYTES = 2 * BLOCK
MAX_END_BYTES = END_BYTES + 20 * BLOCK
"""Writers fill up to a record of 20 blocks. More zeros are content that never arrived."""
KINDS = {
    tarfile.LNKTYPE: "a hard link",
    tarfile.SYMTYPE: "a symbolic link",
    tarfile.CHRTYPE: "a device",
    tarfile.BLKTYPE: "a device",
    tarfile.FIFOTYPE: "a FIFO",
}


@dataclass(frozen=True, slots=True)
class TarMember:
    """A regular file of an archive.

    Attributes:
        name: Its name; bytes that are not UTF-8 are surrogates, as in `os.fsdecode`.
        offset: Of its content, in bytes.
        size: Of its content, in bytes.
        is_plain: It has one header, no extended ones before it.
    """

    name: str
    offset: int
    size: int
    is_plain: bool


def open_regular(path: str | Path, what: str = "shard") -> int:
    """Return a descriptor of a regular file; nothing else is waited for or read.

    Raises:
        DataError: It cannot be opened, or is a folder, a FIFO or a device.
    """
    try:
        # Without O_NONBLOCK, opening a FIFO waits for a writer.
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
        raise DataError(f"{path}: the {what} is not a regular file, got {got}, {expected}")
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
        raise _unreadable(path, offset, error) from error
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _unreadable(path: str | Path, offset: int, error: OSError) -> DataError:
    detail = f"at byte {offset} ({error.strerror})"
    return DataError(f"{path}: the file cannot be read {detail}; copy it again")


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
        DataError: The archive is cut off or damaged, or has a member that is not a regular file.
    """
    file = _HeaderFile(descriptor, closefd=False)
    file.seek(0)
    archive: tarfile.TarFile | None = None
    while True:
        offset = 0 if archive is None else archive.offset
        file.num_left = MAX_HEADER_BYTES
        try:
            if archive is None:
                archive = tarfile.TarFile(fileobj=file, encoding="utf-8", errors="surrogateescape")
            info = archive.next()
        except OSError as error:
            raise _unreadable(path, offset, error) from error
        except (tarfile.TarError, ValueError, OverflowError) as error:
            what = "not a tar archive" if offset == 0 else f"damaged tar header at byte {offset}"
            raise DataError(
                f"{path}: {what} ({shown(str(error))}); copy the shard again"
            ) from error
        if info is None:
            break
        archive.members.clear()  # type: ignore[attr-defined] # there may be millions
        _check_member(path, archive, info, tar_size)
        if info.isreg():
            is_plain = info.offset_data == info.offset + BLOCK
            yield TarMember(info.name, info.offset_data, info.size, is_plain)
    check_end(path, descriptor, archive.offset, tar_size)


class _HeaderFile(io.FileIO):
    """A file of which `tarfile` reads the headers of one member at a time, within a limit."""

    num_left = MAX_HEADER_BYTES

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or not 0 <= size <= self.num_left:
            raise tarfile.ReadError(
                f"extended headers too long, expected at most {MAX_HEADER_BYTES} bytes"
            )
        self.num_left -= size
        return super().read(size) or b""


def _check_member(
    path: str | Path, archive: tarfile.TarFile, info: tarfile.TarInfo, tar_size: int
) -> None:
    """Refuse a member that is not a regular file or folder within the archive."""
    where = f"{path}:{shown(info.name)}: at byte {info.offset}"
    if archive.pax_headers.keys() & {"path", "size"}:
        raise DataError(f"{where}: got one name or size for all members; write the shard again")
    if info.sparse is not None or not (info.isreg() or (info.isdir() and info.size == 0)):
        kind = KINDS.get(info.type, f"a member of type {info.type!r} with {info.size} bytes")
        got = "a sparse file" if info.sparse is not None else kind
        raise DataError(f"{where}: got {got}, expected plain files; write the shard again")
    most = tar_size - info.offset_data
    if not 0 <= info.size <= most:
        raise DataError(
            f"{where}: the shard ends inside a member, got a size of {info.size} bytes, "
            f"expected 0 to {most} in a shard of {tar_size}; copy it again"
        )


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
        advice = "copy it again; if it is known to be whole, append 1,024 bytes of zeros"
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
            f"{path}: the shard is damaged or goes on after its end at byte {end}, got {got}, "
            f"{expected}; copy or write it again"
        )
