"""Files of shared arrays that something else has changed: noticed, counted, made again."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from data.media import array_file
from data.media.array_file import MAPPED_BYTES, PREFIX, Stored
from data.media.node_cache import NodeCache


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[NodeCache]:
    made = NodeCache("run", 1 << 30, tmp_path)
    yield made
    made.close()


def stored(number: float, count: int = 100) -> Stored:
    return {"number": number}, np.full(count, number, np.float32)


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def overwrite(at: int, content: bytes) -> Callable[[Path], None]:
    def damage(file: Path) -> None:
        with file.open("r+b") as opened:
            opened.seek(at)
            opened.write(content)

    return damage


DAMAGES = {
    "cut": cut,
    "empty": lambda file: os.truncate(file, 0),
    "foreign": lambda file: file.write_bytes(b"GIF89a" * 100),
    "state": overwrite(0, b"refused!"),
    "header length": overwrite(16, b"\xff" * 8),
    "no JSON": overwrite(PREFIX.size, b"{{"),
    "other JSON": overwrite(PREFIX.size, b'{"a": "'),
    "negative shape": lambda file: file.write_bytes(file.read_bytes().replace(b": [", b": [-")),
    "objects": lambda file: file.write_bytes(file.read_bytes().replace(b'"<f4"', b'"O"  ')),
}


@pytest.mark.parametrize("size", [8, MAPPED_BYTES])
@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_file_is_made_again_and_counted(
    cache: NodeCache, name: str, size: int, caplog: pytest.LogCaptureFixture
) -> None:
    cache.get("key", lambda: stored(1.0, size))
    file = cache._folder.path / "key"
    before = file.read_bytes()
    DAMAGES[name](file)
    assert file.read_bytes() != before
    assert (cache.get("key", lambda: stored(2.0, size))[1] == 2.0).all()
    assert (cache.get("key", lambda: stored(3.0, size))[1] == 2.0).all()
    assert cache.counts == {"opened": 2, "damaged": 1, "found": 1}
    assert "opened again: array file: damaged, got" in caplog.text


def test_a_damaged_file_that_was_not_given_its_name_is_made_again(cache: NodeCache) -> None:
    """As by a process that was killed between the two."""
    cache.get("key", lambda: stored(1.0))
    file = cache._folder.path / "key"
    cut(file)
    file.rename(cache._part("key"))
    assert (cache.get("key", lambda: stored(2.0))[1] == 2.0).all()
    assert cache.counts == {"opened": 2, "damaged": 1}


def test_without_a_mapping_an_array_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    header, array = stored(5.0, MAPPED_BYTES)
    with (tmp_path / "file").open("w+b") as file:
        array_file.write(file.fileno(), header, array)
        # More than a process can address.
        assert array_file._map(file.fileno(), 1 << 62) is None
        monkeypatch.setattr(array_file, "_map", lambda descriptor, length: None)
        found_header, found = array_file.read(file.fileno())
        assert found_header == header
        assert np.array_equal(found, array)
        assert not found.flags.writeable
