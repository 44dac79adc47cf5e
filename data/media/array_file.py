"""An array in a file that several processes read: one writes it, and it may be removed while others
still use it.

The first bytes say how far it has come; they are written last.
"""

from __future__ import annotations

import ctypes
import json
import os
import struct
import weakref
from collections.abc import Mapping
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt

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
    """Return what a file says about itself; one that was left half-written is `unfinished`."""
    state, header, _ = _read_head(descriptor)
    return state, header


def read(descriptor: int) -> Stored:
    """Return what `write` wrote; a large array is mapped, so that all readers share its memory, and
    none can be written to.
    """
    state, header, start = _read_head(descriptor)
    assert state == "complete", f"array file: read while {state}"
    dtype, shape = np.dtype(header["dtype"]), tuple(header["shape"])
    length = start + int(np.prod(shape)) * dtype.itemsize
    content = (
        _map(descriptor, length) if length >= MAPPED_BYTES else os.pread(descriptor, length, 0)
    )
    array = np.frombuffer(content, dtype, offset=start).reshape(shape)
    array.flags.writeable = False
    return header["header"], array


def _read_head(descriptor: int) -> tuple[State, Header, int]:
    """Return state, header, and where an array begins."""
    prefix = os.pread(descriptor, PREFIX.size, 0)
    state, length = PREFIX.unpack(prefix) if len(prefix) == PREFIX.size else (b"", 0)
    name = state.rstrip(b"\0").decode() or "unfinished"
    header = json.loads(os.pread(descriptor, length, PREFIX.size)) if length else {}
    return cast(State, name), header, _start(length)


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


def _map(descriptor: int, length: int) -> Any:
    """Return the first bytes of a file, mapped until the last array on them is gone.

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
        raise OSError(ctypes.get_errno(), "an opened medium cannot be mapped")
    buffer = (ctypes.c_ubyte * length).from_address(address)
    # Not at exit: another thread may still read.
    weakref.finalize(buffer, libc.munmap, address, length).atexit = False
    return buffer
