"""One safetensors file: its header, and single tensors read without mapping the file into memory.

A mapped file counts as resident memory as far as it was touched; reading what is asked for keeps
memory at one tensor. Headers are kept as the bytes that they are, so that a file written with the
same header and the same weights is the same file.
"""

from __future__ import annotations

import json
import math
import os
import reprlib
from collections import Counter
from collections.abc import Iterator, Mapping
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
_BITS = {name: 8 * dtype.itemsize for name, dtype in DTYPES.items()} | {
    "C64": 64,
    "U64": 64,
    "U32": 32,
    "U16": 16,
    "F8_E8M0": 8,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "F4": 4,
}
"""Of an element, by every name that the format has; with those that are no types here nothing is
computed.
"""
_PIECE_BYTES = 1 << 24
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
    """The header before the tensors of a file.

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
        ModelError: The file cannot be read, is no safetensors file, or is not as long as its header
            says.
    """
    try:
        with open(file, "rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            prefix = stream.read(_LENGTH_BYTES)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < _LENGTH_BYTES or not 2 <= length <= min(
                size - _LENGTH_BYTES, _MAX_HEADER_BYTES
            ):
                raise _unreadable(file, f"{size} bytes that begin with no header")
            header = parse_header(prefix + stream.read(length), str(file))
    except OSError as error:
        raise _unreadable(file, str(error)) from error
    for key, entry in header.entries.items():
        if len(header.raw) + entry.end > size:
            raise _unreadable(
                file, f"{size} bytes, too few for the key {key}", f"{header.file_bytes} bytes"
            )
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
        content = _parse_json(raw[_LENGTH_BYTES:])
        metadata = _texts(content.pop(_METADATA, None))
    except (ValueError, RecursionError) as error:
        raise _unreadable(where, f"a header that is none ({error})") from error
    entries = {}
    for key, found in content.items():
        try:
            entries[key] = _entry(found)
        except ValueError as error:
            raise _unreadable(
                where, f"a header that is none (the key {key[:200]}: {error})"
            ) from error
    position = 0
    for key, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)):
        expected = _size_bytes(entry)
        if entry.start != position or entry.size_bytes != expected:
            raise _unreadable(
                where,
                f"bytes {entry.start} to {entry.end} for the key {key}",
                f"{expected} bytes from {position} on",
            )
        position = entry.end
    return Header(raw, entries, metadata)


def _parse_json(text: bytes) -> dict[str, Any]:
    """Return a JSON object without duplicate names in which every number is whole, not negative,
    and fits 64 bits.

    Raises:
        ValueError: It is something else.
    """

    def refuse(number: str) -> Any:
        raise ValueError(f"the number {number[:40]}")

    def whole(number: str) -> int:
        return (
            int(number)
            if number.isdigit() and len(number) <= 20 and int(number) < 1 << 64
            else refuse(number)
        )

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            [(name, _)] = Counter(name for name, _ in pairs).most_common(1)
            raise ValueError(f"{name[:80]!r} occurs twice")
        return found

    if not text.startswith(b"{"):
        raise ValueError(f"it begins with {text[:8]!r}")
    content: dict[str, Any] = json.loads(
        text.decode(),
        parse_int=whole,
        parse_float=refuse,
        parse_constant=refuse,
        object_pairs_hook=once,
    )
    # A lone half of a surrogate pair is no text, though JSON can spell it.
    json.dumps(content, ensure_ascii=False).encode()
    return content


def _texts(value: Any) -> dict[str, str]:
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise ValueError(f"{_METADATA} is not texts by name")
    return value


def _entry(found: Any) -> Entry:
    """Check what a header says about one tensor.

    Raises:
        ValueError: It is not a type that the format knows, sizes, and first and last byte.
    """
    if not isinstance(found, dict):
        raise ValueError(f"got {type(found).__name__}, expected an object")
    values: list[Any] = [found.get(name) for name in ("dtype", "shape", "data_offsets")]
    dtype, shape, offsets = values
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise ValueError(f"the dtype {reprlib.repr(dtype)}")
    if not _are_whole(shape) or math.prod(size for size in shape if size) >= 1 << 63:
        raise ValueError(f"the shape {reprlib.repr(shape)}")
    if not _are_whole(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"the data_offsets {reprlib.repr(offsets)}")
    return Entry(dtype, tuple(shape), offsets[0], offsets[1])


def _are_whole(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int for value in values)


def _size_bytes(entry: Entry) -> int | None:
    """Return the bytes of a tensor; `None` if they are not whole."""
    bits = math.prod(entry.shape) * _BITS[entry.dtype]
    return None if bits % 8 else bits // 8


def build_header(
    tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], metadata: Mapping[str, str]
) -> Header:
    """Lay tensors out one after another.

    Args:
        tensors: Type and shape by key.
        metadata: Written besides.
    """
    content: dict[str, object] = {_METADATA: dict(metadata)} if metadata else {}
    entries = {}
    position = 0
    # Wide types first keeps every tensor aligned to its element.
    for key, (dtype, shape) in sorted(
        tensors.items(), key=lambda item: (-item[1][0].itemsize, item[0])
    ):
        entry = Entry(_NAMES[dtype], shape, position, position + math.prod(shape) * dtype.itemsize)
        entries[key] = entry
        content[key] = {
            "dtype": entry.dtype,
            "shape": list(shape),
            "data_offsets": [entry.start, entry.end],
        }
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
    content = torch.empty(entry.size_bytes, dtype=torch.uint8)
    _read_into(content, file, header, key, 0)
    return content.view(_dtype(file, header, key)).reshape(entry.shape)


def read_pieces(file: Path, header: Header, key: str) -> Iterator[torch.Tensor]:
    """Yield one tensor in flat pieces of the same number of elements.

    Raises:
        ModelError: As for `read_tensor`.
    """
    dtype, size = _dtype(file, header, key), header.entries[key].size_bytes
    for start in range(0, size, _PIECE_BYTES):
        content = torch.empty(min(_PIECE_BYTES, size - start), dtype=torch.uint8)
        _read_into(content, file, header, key, start)
        yield content.view(dtype)


def _dtype(file: Path, header: Header, key: str) -> torch.dtype:
    name = header.entries[key].dtype
    if name not in DTYPES:
        raise unsupported_type(file, key, name)
    return DTYPES[name]


def _read_into(content: torch.Tensor, file: Path, header: Header, key: str, offset: int) -> None:
    """Fill bytes with those of a tensor, from an offset on."""
    left = memoryview(cast(Any, content.numpy()))
    try:
        with open(file, "rb", buffering=0) as stream:
            stream.seek(len(header.raw) + header.entries[key].start + offset)
            while left and (count := stream.readinto(left)):
                left = left[count:]
    except OSError as error:
        raise _unreadable(file, f"{error} at the key {key}") from error
    if left:
        size = header.entries[key].size_bytes
        raise _unreadable(
            file, f"{offset + len(content) - len(left)} bytes of the key {key}", f"{size} bytes"
        )


def unsupported_type(file: Path, key: str, name: str) -> ModelError:
    """Return the error for a tensor of a type that nothing here can compute with."""
    return ModelError(
        f"{file}: the type of {key} is not supported, got {name}, expected one of "
        f"{', '.join(DTYPES)}; use a folder that is not quantised"
    )


def _unreadable(where: Path | str, got: str, expected: str = "a complete file") -> ModelError:
    return ModelError(
        f"{where}: cannot be read as safetensors, got {got}, expected {expected}; download or "
        "export the folder again"
    )
