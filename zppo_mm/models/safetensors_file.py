"""One safetensors file: its header, and single tensors read without mapping the file into memory.

A mapped file counts as resident memory as far as it was touched; reading what is asked for keeps memory at one tensor. Headers are kept as
the bytes that they are, so that a file written with the same header and the same weights is the same file.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch

from zppo_mm.errors import ModelError

DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Types by their names in headers."""
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_LENGTH_BYTES = 8
_ALIGNMENT = 8
_MAX_HEADER_BYTES = 100_000_000
"""The format's own limit."""
_METADATA = "__metadata__"


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a file.

    Attributes:
        dtype: Its type's name.
        shape: Its shape.
        start: Its first byte, counted from the end of the header.
        end: The byte after its last.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def size_bytes(self) -> int:
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class Header:
    """What stands before the tensors of a file.

    Attributes:
        raw: The bytes: length, JSON, padding.
        entries: Tensors by key, in file order.
        metadata: What the file says besides.
    """

    raw: bytes
    entries: Mapping[str, Entry]
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def file_bytes(self) -> int:
        """Size of the whole file."""
        return len(self.raw) + max((entry.end for entry in self.entries.values()), default=0)


def read_header(file: Path) -> Header:
    """Read and check a file's header; no tensor is read.

    Raises:
        ModelError: The file cannot be read, is no safetensors file, or is not as long as its header says.
    """
    try:
        with open(file, "rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            prefix = stream.read(_LENGTH_BYTES)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < _LENGTH_BYTES or not 2 <= length <= min(size - _LENGTH_BYTES, _MAX_HEADER_BYTES):
                raise _unreadable(file, f"{size} bytes that begin with no header")
            header = parse_header(prefix + stream.read(length), str(file))
    except OSError as error:
        raise _unreadable(file, str(error)) from error
    for key, entry in header.entries.items():
        if len(header.raw) + entry.end > size:
            raise _unreadable(file, f"{size} bytes, too few for the key {key}", f"{header.file_bytes} bytes")
    if size != header.file_bytes:
        raise _unreadable(file, f"{size} bytes", f"{header.file_bytes} bytes")
    return header


def parse_header(raw: bytes, where: str) -> Header:
    """Check the bytes of a header.

    Args:
        raw: Length, JSON and padding.
        where: Names them in messages.

    Raises:
        ModelError: They are no header, or tensors overlap or leave gaps.
    """
    try:
        content = json.loads(raw[_LENGTH_BYTES:])
        metadata = content.pop(_METADATA, {})
        entries = {
            key: Entry(found["dtype"], tuple(found["shape"]), found["data_offsets"][0], found["data_offsets"][1])
            for key, found in content.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise _unreadable(where, f"a header that is none ({error!r})") from error
    position = 0
    for key, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)):
        known = entry.dtype in DTYPES
        expected = math.prod(entry.shape) * DTYPES[entry.dtype].itemsize if known else entry.size_bytes
        if entry.start != position or entry.size_bytes != expected:
            raise _unreadable(where, f"bytes {entry.start} to {entry.end} for the key {key}", f"{expected} bytes from {position} on")
        position = entry.end
    return Header(raw, entries, metadata)


def build_header(tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], metadata: Mapping[str, str]) -> Header:
    """Lay tensors out one after another.

    Args:
        tensors: Type and shape by key.
        metadata: Written besides.
    """
    content: dict[str, object] = {_METADATA: dict(metadata)} if metadata else {}
    entries = {}
    position = 0
    # Wide types first keeps every tensor aligned to its element.
    for key, (dtype, shape) in sorted(tensors.items(), key=lambda item: (-item[1][0].itemsize, item[0])):
        entry = Entry(_NAMES[dtype], shape, position, position + math.prod(shape) * dtype.itemsize)
        entries[key] = entry
        content[key] = {"dtype": entry.dtype, "shape": list(shape), "data_offsets": [entry.start, entry.end]}
        position = entry.end
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(_LENGTH_BYTES + len(text)) % _ALIGNMENT)
    return Header(len(text).to_bytes(_LENGTH_BYTES, "little") + text, entries, metadata)


def read_tensor(file: Path, header: Header, key: str) -> torch.Tensor:
    """Read one tensor into memory of its own.

    Raises:
        ModelError: Its type is not supported, or the file cannot be read to the tensor's end.
    """
    entry = header.entries[key]
    if entry.dtype not in DTYPES:
        raise unsupported_type(file, key, entry.dtype)
    content = torch.empty(entry.size_bytes, dtype=torch.uint8)
    left = memoryview(cast(Any, content.numpy()))
    try:
        with open(file, "rb", buffering=0) as stream:
            stream.seek(len(header.raw) + entry.start)
            while left and (count := stream.readinto(left)):
                left = left[count:]
    except OSError as error:
        raise _unreadable(file, f"{error} at the key {key}") from error
    if left:
        raise _unreadable(file, f"{entry.size_bytes - len(left)} bytes of the key {key}", f"{entry.size_bytes} bytes")
    return content.view(DTYPES[entry.dtype]).reshape(entry.shape)


def unsupported_type(file: Path, key: str, name: str) -> ModelError:
    """Return the error for a tensor of a type that nothing here can compute with."""
    return ModelError(
        f"{file}: the type of {key} is not supported, got {name}, expected one of {', '.join(DTYPES)}; use a folder that is not quantised"
    )


def _unreadable(where: Path | str, got: str, expected: str = "a complete file") -> ModelError:
    return ModelError(f"{where}: cannot be read as safetensors, got {got}, expected {expected}; download or export the folder again")
