"""Shards and the ways in which they are damaged, for the fuzzing of shards and indexes."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from data.errors import DataError
from data.question import Question
from data.shard_writer import write_shards
from data.shards import ShardFolder
from data.tar_index import split_name
from tests.support.shard_samples import QUESTION, png, sample, with_checksum

Content = list[tuple[str, list[tuple[str, bytes]]]]
"""Key of each sample with extension and content of its files, in the order of the shard."""
BLOCK = 512
MAX_MEMBERS = 1000  # what a damaged shard of a few members can hold; `tarfile` may go round in it


@dataclass(frozen=True)
class Original:
    """An undamaged shard: its bytes, where its headers are, and what it holds."""

    shard: bytes
    headers: tuple[int, ...]
    content: Content


def ours(folder: Path) -> Original:
    """Return a shard of our own writer, which leaves its index beside it."""
    samples = [
        sample(number, [("0.png", png(value=number)), ("1.mp4", b"clip" * 200 * number)])
        for number in range(4)
    ]
    (path,) = write_shards(folder, samples)
    return original(path.read_bytes())


def foreign(tar_format: int) -> Original:
    """Return a shard with long and other names, so that GNU and pax archives have extended
    headers.
    """
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tar_format) as archive:
        for number, stem in enumerate(("a", "folder/é", "long/" + "x" * 60 + "/" + "y" * 60)):
            for extension, content in (("json", QUESTION), ("PNG", png(value=number))):
                info = tarfile.TarInfo(f"{stem}.{extension}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return original(file.getvalue())


def original(shard: bytes) -> Original:
    content = by_tarfile(shard)
    assert content is not None
    with tarfile.open(fileobj=io.BytesIO(shard)) as archive:
        headers = {offset for info in archive for offset in (info.offset, info.offset_data - BLOCK)}
    return Original(shard, tuple(sorted(headers)), content)


def by_tarfile(shard: bytes) -> Content | None:
    """Return what `tarfile` finds, grouped as webdataset does; `None` if it refuses the shard or
    goes round in it.
    """
    found: Content = []
    offset = -1
    try:
        with tarfile.open(fileobj=io.BytesIO(shard), mode="r:") as archive:
            while (info := archive.next()) is not None:
                if info.offset <= offset or len(found) > MAX_MEMBERS:
                    return None
                offset = info.offset
                named = split_name(info.name)
                if info.isfile() and named is not None:
                    content = archive.extractfile(info)
                    assert content is not None
                    if not found or found[-1][0] != named[0]:
                        found.append((named[0], []))
                    found[-1][1].append((named[1], content.read()))
    except (tarfile.TarError, ValueError, OverflowError, RecursionError, EOFError):
        return None
    return found


def read_all(
    folder: Path,
) -> list[tuple[str, Question | DataError, list[bytes] | DataError]] | DataError:
    """Return every sample of a folder with its question and media, with errors instead of what
    they keep from being read.
    """
    found: list[tuple[str, Question | DataError, list[bytes] | DataError]] = []
    try:
        opened = ShardFolder(folder)
    except DataError as error:
        return error
    for shard, key in list(opened.keys()):
        try:
            question = opened.question(shard, key)
        except DataError as error:
            found.append((key, error, []))
            continue
        try:
            found.append((key, question, [opened.media_bytes(ref) for ref in question.media]))
        except DataError as error:
            found.append((key, question, error))
    opened.reader.close()
    return found


Step = tuple[str, *tuple[Any, ...]]
"""One damage: the name of a function of `DAMAGES` and what it is given besides the shard."""


def steps(whole: Original) -> st.SearchStrategy[list[Step]]:
    """Draw one to three damages of a shard, for `damaged`."""
    size, blocks = len(whole.shard), len(whole.shard) // BLOCK
    last = whole.headers[-1] + 2 * BLOCK  # most of the rest is the end of the archive
    header = st.sampled_from(whole.headers)
    position = st.one_of(
        st.integers(0, size - 1),
        st.integers(0, last),
        st.builds(int.__add__, header, st.integers(0, BLOCK - 1)),
    )
    block = st.one_of(
        st.integers(0, blocks - 1),
        st.integers(0, last // BLOCK),
        header.map(lambda at: at // BLOCK),
    )
    count = st.integers(1, 6)
    field = st.sampled_from(
        [(0, 100), (100, 8), (124, 12), (124, 1), (156, 1), (157, 100), (257, 8), (345, 155)]
    )
    value = st.one_of(
        st.binary(min_size=1, max_size=12),
        st.integers(0, 1 << 36).map(lambda number: b"%011o\0" % number),
        st.integers(-(1 << 80), 1 << 80).map(base_256),
        st.integers(-3000, -1).map(lambda number: b"%011d\0" % number),
        st.sampled_from([b"0", b"1", b"2", b"5", b"6", b"S", b"L", b"K", b"x", b"g", b"X", b"\0"]),
    )
    zeros = st.integers(0, 40).map(lambda number: bytes(BLOCK * number))
    step = st.one_of(
        st.tuples(st.just("flip"), position, st.integers(0, 7)),
        st.tuples(st.just("cut"), st.one_of(st.integers(0, size - 1), block.map(BLOCK.__mul__))),
        st.tuples(st.just("remove"), block, count),
        st.tuples(st.just("insert"), block, block, count),
        st.tuples(st.just("overwrite"), block, block, count),
        st.tuples(st.just("zero"), block, count),
        st.tuples(st.just("edit"), header, field, value),
        st.tuples(st.just("append"), st.one_of(st.binary(max_size=600), zeros)),
    )
    return st.lists(step, min_size=1, max_size=3)


def damaged(shard: bytes, several: list[Step]) -> bytes:
    """Return a shard after some damages."""
    for name, *arguments in several:
        shard = DAMAGES[name](shard, *arguments)
    return shard


def base_256(number: int) -> bytes:
    """Return a number as GNU tar writes one that is too large for octal digits, or negative."""
    return (b"\x80" if number >= 0 else b"\xff") + (number % (1 << 88)).to_bytes(11)


def _flip(shard: bytes, position: int, bit: int) -> bytes:
    changed = bytes(byte ^ 1 << bit for byte in shard[position : position + 1])
    return shard[:position] + changed + shard[position + 1 :]


def _cut(shard: bytes, size: int) -> bytes:
    return shard[:size]


def _remove(shard: bytes, start: int, count: int) -> bytes:
    return shard[: start * BLOCK] + shard[(start + count) * BLOCK :]


def _insert(shard: bytes, start: int, source: int, count: int) -> bytes:
    copied = shard[source * BLOCK : (source + count) * BLOCK]
    return shard[: start * BLOCK] + copied + shard[start * BLOCK :]


def _overwrite(shard: bytes, start: int, source: int, count: int) -> bytes:
    copied = shard[source * BLOCK : (source + count) * BLOCK]
    return shard[: start * BLOCK] + copied + shard[start * BLOCK + len(copied) :]


def _zero(shard: bytes, start: int, count: int) -> bytes:
    end = min(len(shard), (start + count) * BLOCK)
    return shard[: start * BLOCK] + bytes(max(0, end - start * BLOCK)) + shard[end:]


def _edit(shard: bytes, header: int, field: tuple[int, int], value: bytes) -> bytes:
    """Change a field of a header, and its checksum so that it fits."""
    block = shard[header : header + BLOCK]
    if len(block) < BLOCK:
        return shard
    start, length = field
    changed = block[:start] + value[:length].ljust(length, b"\0") + block[start + length :]
    return shard[:header] + with_checksum(changed) + shard[header + BLOCK :]


def _append(shard: bytes, content: bytes) -> bytes:
    return shard + content


DAMAGES: dict[str, Callable[..., bytes]] = {
    "flip": _flip,
    "cut": _cut,
    "remove": _remove,
    "insert": _insert,
    "overwrite": _overwrite,
    "zero": _zero,
    "edit": _edit,
    "append": _append,
}
