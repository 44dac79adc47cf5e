"""Damaged indexes: an error, or exactly what the shard holds."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.errors import DataError
from data.tar_index import sidecar_path
from tests.fuzz.damaged_shards import Step, damaged, read_all, steps
from tests.fuzz.test_shards import INDEX, OURS, TRUTH

STORED = json.loads(INDEX)
KEYS = [*STORED["samples"], "000009", "a.b", "", "../x", "\ud800"]
EXTENSIONS = ["json", "0.png", "1.mp4", "pxg", "JSON", ""]
NUMBERS = st.one_of(
    st.integers(-1024, 20_000),
    st.integers(0, 30).map(lambda block: 512 * block),
    st.sampled_from([-1, 1 << 63, 1 << 80, 10**400, 1e999, 1.5, "512", None, True, [], {}]),
)
OF_OTHERS = [files for each in STORED["samples"].values() for files in each.values()]
ENTRIES = st.one_of(st.lists(NUMBERS, max_size=4), st.sampled_from(OF_OTHERS))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    made = tmp_path_factory.mktemp("fuzz")
    (made / "a.tar").write_bytes(OURS.shard)
    logging.disable(logging.WARNING)  # thousands of damaged indexes are named there
    yield made
    logging.disable(logging.NOTSET)


@st.composite
def changed_indexes(draw: st.DrawFn) -> dict[str, Any]:
    """Draw an index with one to four changed entries, samples or heads."""
    index = copy.deepcopy(STORED)
    if draw(st.booleans()):
        entries = {
            key: {name: numbers[:2] for name, numbers in files.items()}
            for key, files in index["samples"].items()
        }
        index.update(version=1, samples=entries)
    for _ in range(draw(st.integers(1, 4))):
        samples = index["samples"]
        kind = draw(st.integers(0, 6))
        key, other = draw(st.sampled_from(KEYS)), draw(st.sampled_from(KEYS))
        if kind == 0:
            index[draw(st.sampled_from(["tar_size", "version"]))] = draw(NUMBERS)
        elif kind == 1:
            samples.pop(key, None)
        elif kind == 2:
            samples[key], samples[other] = (
                copy.deepcopy(samples.get(other, {})),
                copy.deepcopy(samples.get(key, {})),
            )
        elif kind == 3:
            samples.setdefault(key, {})[draw(st.sampled_from(EXTENSIONS))] = draw(ENTRIES)
        elif kind == 4:
            samples.get(key, {}).pop(draw(st.sampled_from(EXTENSIONS)), None)
        elif kind == 5 and samples.get(key):
            files = samples[key]
            name = draw(st.sampled_from(list(files)))
            files[draw(st.sampled_from(EXTENSIONS))] = files.pop(name)
        elif kind == 6 and samples.get(key):
            numbers = samples[key][draw(st.sampled_from(list(samples[key])))]
            if numbers:
                numbers[draw(st.integers(0, len(numbers) - 1))] = draw(NUMBERS)
    return index


@st.composite
def changed_bytes(draw: st.DrawFn) -> bytes:
    """Draw the bytes of an index with a few changed, left out or repeated."""
    content = INDEX
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, max(0, len(content) - 1)))
        end = start + draw(st.integers(0, 20))
        middle = draw(
            st.one_of(
                st.binary(max_size=4),
                st.just(content[start:end] * 2),
                st.sampled_from([b"[" * 2000, b"-", b"9" * 5000]),
            )
        )
        content = (
            content[:start] + middle + content[draw(st.sampled_from([start, start + 1, end])) :]
        )
    return content


def check(folder: Path, index: bytes) -> None:
    sidecar_path(folder / "a.tar").write_bytes(index)
    found = read_all(folder)
    if isinstance(found, DataError):
        assert "a.tar" in str(found)
        return
    for key, question, media in found:
        is_error = isinstance(question, DataError) or isinstance(media, DataError)
        assert is_error or (key, question.answer, media) in TRUTH
    assert len(found) >= len(TRUTH), "a sample less would be lost in silence"


@settings(deadline=None)
@given(index=changed_indexes())
def test_a_changed_index_is_an_error_or_the_truth(folder: Path, index: dict[str, Any]) -> None:
    check(folder, json.dumps(index).encode())


@settings(deadline=None)
@given(index=changed_bytes())
def test_changed_bytes_of_an_index_are_an_error_or_the_truth(folder: Path, index: bytes) -> None:
    check(folder, index)


@settings(deadline=None)
@given(index=changed_indexes(), several=steps(OURS))
def test_a_changed_index_of_a_damaged_shard_is_nothing_worse_than_an_error(
    folder: Path, index: dict[str, Any], several: list[Step]
) -> None:
    both = folder / "both"
    both.mkdir(exist_ok=True)
    (both / "b.tar").write_bytes(damaged(OURS.shard, several))
    sidecar_path(both / "b.tar").write_text(json.dumps(index))
    found = read_all(both)
    assert not isinstance(found, DataError) or "b.tar" in str(found)
