"""Records of steps on storage that refuses some: nothing is torn, missing or out of order."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from zppo_mm.errors import ZppoError
from zppo_mm.observability.record_writer import RecordWriter, append_bytes

FULL_BYTES = 25
"""A line of ten bytes fits twice, of the third five."""


@contextmanager
def full_disk() -> Iterator[None]:
    """Let no file grow beyond some bytes: the write that would is cut off there, the next fails."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (FULL_BYTES, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def line(number: int) -> bytes:
    return f"line {number:04d}\n".encode()


def test_what_a_full_disk_refuses_is_written_later_in_order(tmp_path: Path) -> None:
    writer, path, page = RecordWriter(), tmp_path / "lines", tmp_path / "page"
    with full_disk():
        for number in range(5):
            writer.append(path, line(number))
        writer.replace(page, b"page")
        assert not page.exists(), "it waits for those before"
        assert "4 records of steps wait for storage, got [Errno 27]" in writer.flush()
    assert writer.waiting_bytes == 3 * len(line(0)) + len(b"page")
    assert writer.take_num_failed() == 5
    assert path.read_bytes()[: 2 * len(line(0))] == line(0) + line(1)
    writer.append(path, line(5))
    assert path.read_bytes() == b"".join(map(line, range(6)))
    assert page.read_bytes() == b"page"
    assert (writer.flush(), writer.waiting_bytes, writer.take_num_failed()) == ("", 0, 0)


def test_too_much_that_waits_ends_the_run(tmp_path: Path) -> None:
    writer = RecordWriter(max_waiting_bytes=15)
    (tmp_path / "file").write_text("no folder")
    writer.append(tmp_path / "file" / "lines", line(0))
    with pytest.raises(ZppoError, match=r"2 records .* 20 bytes, expected at most 15"):
        writer.append(tmp_path / "file" / "lines", line(1))


def test_a_line_that_cannot_be_appended_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    with full_disk():
        for number in range(2):
            append_bytes(path, line(number))
        with pytest.raises(OSError, match="File too large"):
            append_bytes(path, line(2))
    assert path.read_bytes() == line(0) + line(1)
