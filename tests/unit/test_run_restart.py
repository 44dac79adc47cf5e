"""`--restart` moves an earlier run aside, and removes nothing."""

from __future__ import annotations

import fcntl
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from zppo_mm.errors import ConfigError
from zppo_mm.run.prepare import claimed
from zppo_mm.run_folder import RunFolder

pytestmark = pytest.mark.usefixtures("one_rank")


def content(folder: Path) -> dict[str, str]:
    """Return the text of every file below a folder but lock and log."""
    return {
        str(path.relative_to(folder)): path.read_text()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in (".lock", "run.log")
    }


def earlier_run(folder: RunFolder, text: str) -> dict[str, str]:
    """Write some files of a run; returns them."""
    for path in (folder.checkpoints / "step_000002" / "state.json", folder.metrics, folder.config):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (folder.path / "notes.txt").write_text("the user's own")
    return {
        "checkpoints/step_000002/state.json": text,
        "config.yaml": text,
        "metrics.jsonl": text,
        "notes.txt": "the user's own",
    }


@pytest.fixture(autouse=True)
def own_logging() -> Iterator[None]:
    """Take away the log file that a run opens."""
    root = logging.getLogger()
    before, level = list(root.handlers), root.level
    yield
    root.handlers[:] = before
    root.setLevel(level)


def test_every_start_has_a_folder_of_its_own(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    first = earlier_run(folder, "first")
    with claimed(folder):
        assert content(folder.path) == first
    with claimed(folder, restart=True):
        assert {path.name for path in folder.path.iterdir()} == {".lock", "run.log", "earlier_1"}
    assert f"the earlier run is in {folder.path / 'earlier_1'}" in folder.log.read_text()
    second = earlier_run(folder, "second")
    with claimed(folder, restart=True):
        assert content(folder.path / "earlier_1") == first
        assert content(folder.path / "earlier_2") == second


def test_where_there_is_no_run_nothing_is_moved(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "new")
    with claimed(folder, restart=True):
        assert content(folder.path) == {}
        assert not (folder.path / "earlier_1").exists()


def test_a_run_that_is_under_way_is_not_moved(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    before = earlier_run(folder, "running")
    with folder.lock.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with (
            pytest.raises(ConfigError, match="another process writes to this run"),
            claimed(folder, restart=True),
        ):
            raise AssertionError
    assert content(folder.path) == before
