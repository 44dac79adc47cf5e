"""A checkpoint's manifest: every other content than a list of files is damage, and a disk that
cannot be read is not.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zppo_mm.training.manifest import (
    MANIFEST_FILE,
    DamagedCheckpointError,
    Listed,
    check_file,
    read_manifest,
)

STATE = "state.json"
GOOD = {"size": 2, "crc32": zlib.crc32(b"{}")}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from([STATE, "size", "crc32", "../x", "/x", "a"]), inner)
    ),
    max_leaves=8,
)


def write(folder: Path, content: bytes) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / MANIFEST_FILE).write_bytes(content)
    return folder


def test_a_good_one_is_read_and_compared(tmp_path: Path) -> None:
    write(tmp_path, json.dumps({STATE: GOOD}).encode())
    (tmp_path / STATE).write_bytes(b"{}")
    ((name, listed),) = read_manifest(tmp_path, STATE).items()
    check_file(tmp_path, name, listed)
    (tmp_path / STATE).write_bytes(b"[]")
    with pytest.raises(
        DamagedCheckpointError,
        match=r"state.json: the file is damaged, got another checksum, expected \d+; use another",
    ):
        check_file(tmp_path, name, listed)
    (tmp_path / STATE).write_bytes(b"{} ")
    with pytest.raises(
        DamagedCheckpointError, match="is incomplete, got 3 bytes, expected 2 bytes"
    ):
        check_file(tmp_path, name, listed)
    (tmp_path / STATE).unlink()
    with pytest.raises(DamagedCheckpointError, match="is incomplete, got no file"):
        check_file(tmp_path, name, listed)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "got no JSON"),
        (b"\xff\xfe", "got no JSON"),
        (b"[" * 100_000, "got no JSON .RecursionError."),
        (b"null", "got JSON of type NoneType"),
        (b"[]", "got JSON of type list"),
        (b'"x"', "got JSON of type str"),
        (b"5", "got JSON of type int"),
        (b"{}", "got 0 files without state.json"),
        (b'{"other": {"size": 1, "crc32": 1}}', "got 1 files without state.json"),
        (b'{"state.json": 5}', "got an entry of 'state.json' without size and checksum"),
        (b'{"state.json": {"size": true, "crc32": 1}}', "without size and checksum"),
        (b'{"state.json": {"size": 1.0, "crc32": 1}}', "without size and checksum"),
        (b'{"state.json": {"size": 1}}', "without size and checksum"),
        (b'{"../state.json": {"size": 1, "crc32": 1}}', "got the name '../state.json'"),
        (b'{"/etc/passwd": {"size": 1, "crc32": 1}}', "got the name '/etc/passwd'"),
    ],
)
def test_everything_else_is_damage(content: bytes, problem: str, tmp_path: Path) -> None:
    with pytest.raises(DamagedCheckpointError, match=problem):
        read_manifest(write(tmp_path, content), STATE)


def test_a_missing_one_is_damage_and_one_that_cannot_be_read_is_not(tmp_path: Path) -> None:
    with pytest.raises(DamagedCheckpointError, match=r"manifest\.json: the file is missing"):
        read_manifest(tmp_path, STATE)
    (tmp_path / MANIFEST_FILE).symlink_to(tmp_path / MANIFEST_FILE)
    with pytest.raises(OSError, match="symbolic links"):
        read_manifest(tmp_path, STATE)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir], ids=["pipe", "folder"])
def test_what_is_no_plain_file_is_damage_and_is_not_waited_for(
    make: Callable[[Path], None], tmp_path: Path
) -> None:
    make(tmp_path / MANIFEST_FILE)
    with pytest.raises(DamagedCheckpointError, match=r"manifest\.json: the file is missing"):
        read_manifest(tmp_path, STATE)
    make(tmp_path / STATE)
    with pytest.raises(DamagedCheckpointError, match="is incomplete, got no file"):
        check_file(tmp_path, STATE, Listed((tmp_path / STATE).stat().st_size, 0))


@given(content=JSON)
@pytest.mark.medium
def test_no_json_gives_anything_but_a_list_or_damage(
    content: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = write(tmp_path_factory.getbasetemp() / "manifest", json.dumps(content).encode())
    try:
        listed = read_manifest(folder, STATE)
    except DamagedCheckpointError:
        return
    assert isinstance(content, dict)
    assert set(listed) == set(content)
    assert STATE in listed
    assert all(
        content[name] == {**content[name], "size": entry.size, "crc32": entry.crc32}
        for name, entry in listed.items()
    )
