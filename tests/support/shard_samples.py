"""Small samples for the tests of shards and streams."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Sequence

import numpy as np
from PIL import Image

from data.sample import ShardSample

HEADER_FIELDS = {"octal": (124, 12), "kind": (156, 1)}


def png(width: int = 8, height: int = 6, value: int = 100) -> bytes:
    """Return a grey PNG file."""
    file = io.BytesIO()
    Image.fromarray(np.full((height, width, 3), value, np.uint8)).save(file, "PNG")
    return file.getvalue()


def sample(index: int, media: Sequence[tuple[str, bytes]] = (), **fields: object) -> ShardSample:
    """Return a good sample; `fields` replace its own."""
    question = {
        "id": f"q{index}",
        "question": f"{index} + 1 = ?",
        "answer": str(index + 1),
        "answer_type": "math",
    }
    return ShardSample(f"{index:06d}", {**question, **fields}, media)


def header(name: str, size: int = 0, **fields: bytes) -> bytes:
    """Return a tar header of 512 bytes with a right checksum; `fields` replace `octal` (the size)
    or `kind` as bytes.
    """
    info = tarfile.TarInfo(name)
    info.size = size
    block = bytearray(info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape")[-512:])
    for field, (start, length) in HEADER_FIELDS.items():
        if field in fields:
            block[start : start + length] = fields[field].ljust(length, b"\0")
    return with_checksum(bytes(block))


def with_checksum(block: bytes) -> bytes:
    """Return a tar header with the checksum that fits its other fields."""
    total = sum(block[:148]) + 8 * 32 + sum(block[156:])
    return block[:148] + b"%06o\0 " % total + block[156:]


def member(name: str, content: bytes, **fields: bytes) -> bytes:
    """Return a tar header and its content, filled up to whole blocks."""
    return header(name, len(content), **fields) + content + b"\0" * (-len(content) % 512)


def pax(*records: bytes, kind: bytes = b"x") -> bytes:
    """Return an extended header of `LENGTH KEY=VALUE` records; `records` are `KEY=VALUE`."""
    content = b""
    for record in records:
        length = len(record) + 2
        length += len(str(length + len(str(length))))
        content += b"%d %s\n" % (length, record)
    return member("PaxHeader", content, kind=kind)


END = b"\0" * 1024
QUESTION = b'{"id": "q", "question": "1 + 1 = ?", "answer": "2", "answer_type": "math"}'
