"""Files and folders appear complete or not at all, and leave nothing temporary behind."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from data.atomic_files import new_folder, replace_folder, restore_replaced, write_atomically


class Stopped(Exception):
    """Raised in the middle of a write."""


def write_and_stop(target: Path) -> None:
    with new_folder(target, replace=True) as folder:
        fill(folder, "new")
        raise Stopped


def fill(folder: Path, content: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "file").write_text(content)


def content_of(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): path.read_text()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "made" / "file"
    assert write_atomically(path, "a\r\nö") == path
    assert path.read_bytes() == "a\r\nö".encode()
    write_atomically(path, b"\xff")
    assert [each.read_bytes() for each in path.parent.iterdir()] == [b"\xff"]


def test_a_failed_write_leaves_the_earlier_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_atomically(tmp_path / "file", "old")

    def full_disk(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(tmp_path / "file", "new")
    assert content_of(tmp_path) == {"file": "old"}


def test_a_failed_folder_leaves_the_earlier_one(tmp_path: Path) -> None:
    fill(tmp_path / "folder", "old")
    with pytest.raises(Stopped):
        write_and_stop(tmp_path / "folder")
    assert content_of(tmp_path) == {"folder/file": "old"}


def test_a_folder_is_kept_or_replaced(tmp_path: Path) -> None:
    for content, replace, expected in (
        ("first", False, "first"),
        ("second", False, "first"),
        ("third", True, "third"),
    ):
        with new_folder(tmp_path / "a" / "folder", replace=replace) as folder:
            fill(folder, content)
        assert content_of(tmp_path) == {"a/folder/file": expected}


def test_a_replacement_that_was_cut_in_two_is_undone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path / "old", "old")
    fill(tmp_path / "new", "new")
    rename = Path.rename

    def stop_at_the_second(self: Path, target: Path) -> Path:
        if self.name == "new":
            raise Stopped
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", stop_at_the_second)
    with pytest.raises(Stopped):
        replace_folder(tmp_path / "new", tmp_path / "old")
    assert not (tmp_path / "old").exists()
    restore_replaced(tmp_path, "o*")
    assert content_of(tmp_path) == {"new/file": "new", "old/file": "old"}
