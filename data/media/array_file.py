"""An array in a file that several processes read: one writes it, and it may be removed while others
still use it.

The first bytes say how far it has come; they are written last.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import struct
import weakref
from collections.abc import Mapping
from typing import Any, Literal, cast, get_args

import numpy as np
import numpy.typing as npt

from data.errors import DataError

State = Literal["unfinished", "complete", "refused", "not kept"]
Header = Mapping[str, Any]
"""JSON values."""
Stored = tuple[Header, npt.NDArray[Any]]

PREFIX = struct.Struct("<16sQ")  # state, bytes of the header
ALIGNMENT = 64
MAPPED_BYTES = 1 << 20
"""A smaller array is read: the number of mappings of a process is limited."""
PROT_READ, MAP_SHARED = 1, 1
MAP_FAILED = ctypes.c_void_p(-1).value


class DamagedFileError(DataError):
    """A file is not what `write` wrote: shorter, or with another beginning."""


def file_size(header: Header, array: npt.NDArray[Any]) -> int:
    """Return the bytes that `write` takes."""
    return _start(len(_encode(header, array))) + array.nbytes


def write(descriptor: int, header: Header, array: npt.NDArray[Any]) -> None:
    """Write a header and an array of numbers, and mark the file as complete.

    Raises:
        OSError: There is no room.
    """
    encoded = _encode(header, array)
    _write_at(descriptor, encoded, PREFIX.size)
    content = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    _write_at(descriptor, content.data, _start(len(encoded)))
    _write_at(descriptor, PREFIX.pack(b"complete", len(encoded)), 0)


def mark(descriptor: int, state: State, header: Header) -> None:
    """Write a header without an array.

    Raises:
        OSError: There is no room.
    """
    os.ftruncate(descriptor, 0)
    encoded = json.dumps(dict(header)).encode()
    _write_at(descriptor, encoded, PREFIX.size)
    _write_at(descriptor, PREFIX.pack(state.encode(), len(encoded)), 0)


def read_state(descriptor: int) -> tuple[State, Header]:
    """Return what a file says about itself; one that was left half-written, or says nothing that
    `write` or `mark` wrote, is `unfinished`.
    """
    try:
        state, header, _ = _read_head(descriptor)
    except DamagedFileError:
        return "unfinished", {}
    return state, header


def read(descriptor: int, *, map_large: bool = True) -> Stored:
    """Return what `write` wrote; a large array is mapped, so that all readers share its memory, and
    none can be written to.

    Args:
        descriptor: Of the file.
        map_large: Off where a page may fail to be read later, as from a disk, which would kill the
            process.

    Raises:
        DamagedFileError: The file is not complete, or not of `write`.
    """
    state, header, start = _read_head(descriptor)
    try:
        dtype, shape = np.dtype(header["dtype"]), tuple(header["shape"])
        length = start + math.prod(shape) * dtype.itemsize
        own = header["header"]
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(f"{state}, a header without {error}") from error
    size = os.fstat(descriptor).st_size
    # A mapped page beyond the end of its file would kill the process.
    if state != "complete" or size < length:
        raise _damaged(f"{state}, {size} bytes of {length}")
    content = _map(descriptor, length) if map_large and length >= MAPPED_BYTES else None
    if content is None:
        content = _read_all(descriptor, length)
    try:
        array = np.frombuffer(content, dtype, offset=start).reshape(shape)
    except (TypeError, ValueError) as error:
        raise _damaged(f"numbers that are not of their shape: {error}") from error
    array.flags.writeable = False
    return own, array


def _read_head(descriptor: int) -> tuple[State, Header, int]:
    """Return state, header, and where an array begins."""
    prefix = os.pread(descriptor, PREFIX.size, 0)
    state, length = PREFIX.unpack(prefix) if len(prefix) == PREFIX.size else (b"", 0)
    name = state.rstrip(b"\0") or b"unfinished"
    if name not in [each.encode() for each in get_args(State)]:
        raise _damaged(f"the state {name!r}")
    if PREFIX.size + length > os.fstat(descriptor).st_size:
        raise _damaged(f"a header of {length} bytes in a shorter file")
    try:
        header = json.loads(os.pread(descriptor, length, PREFIX.size)) if length else {}
    except ValueError as error:
        raise _damaged(f"a header that is not JSON: {error}") from error
    if not isinstance(header, dict):
        raise _damaged("a header that is no object")
    return cast(State, name.decode()), header, _start(length)


def _damaged(got: str) -> DamagedFileError:
    return DamagedFileError(
        f"array file: damaged, got {got}, expected what was written; let nothing else write there"
    )


def _encode(header: Header, array: npt.NDArray[Any]) -> bytes:
    return json.dumps(
        {"header": dict(header), "dtype": array.dtype.str, "shape": array.shape}
    ).encode()


def _start(header_bytes: int) -> int:
    """Return where the array begins."""
    return -(-(PREFIX.size + header_bytes) // ALIGNMENT) * ALIGNMENT


def _write_at(descriptor: int, content: bytes | memoryview, offset: int) -> None:
    view = memoryview(content)
    while view:
        count = os.pwrite(descriptor, view, offset)
        view, offset = view[count:], offset + count


def _read_all(descriptor: int, length: int) -> bytearray:
    """Return the first bytes of a file; one system call reads 2 GiB at most."""
    content = bytearray(length)
    view, offset = memoryview(content), 0
    while offset < length:
        count = os.preadv(descriptor, [view[offset:]], offset)
        if not count:
            raise _damaged(f"an end after {offset} bytes of {length}")
        offset += count
    return content


def _map(descriptor: int, length: int) -> Any:
    """Return the first bytes of a file, mapped until the last array on them is gone; `None` if the
    system gives no more mappings.

    Python's `mmap` would hold a descriptor for each, of which a process has about a thousand.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = (
        ctypes.c_void_p,
        ctypes.c_size_t,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_long,
    )
    libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
    address = libc.mmap(None, length, PROT_READ, MAP_SHARED, descriptor, 0)
    if address == MAP_FAILED:
        return None
    buffer = (ctypes.c_ubyte * length).from_address(address)
    # Not at exit: another thread may still read.
    weakref.finalize(buffer, libc.munmap, address, length).atexit = False
    return buffer
