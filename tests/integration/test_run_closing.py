"""What a run has opened is closed: at its end, after an error, and when it cannot be built."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch.distributed as dist

from data.errors import DataError
from tests.support.raw_server import completion, http, say, serve_raw
from zppo_mm.config.load import load_config
from zppo_mm.config.schema import RunConfig, SourceConfig
from zppo_mm.interruption import Interruption
from zppo_mm.run.parts import Run
from zppo_mm.run.session import open_run
from zppo_mm.run_folder import RunFolder


@pytest.fixture
def config(tmp_path: Path) -> Iterator[RunConfig]:
    """A run that asks a judge behind a server."""
    with serve_raw(lambda number: say(http(completion("4")))) as server:
        yield load_config(
            None,
            [
                "modality=image",
                "method=grpo",
                f"output_dir={tmp_path}",
                f"reward.judge_endpoints=[{server.url}]",
                "reward.judge_model=judge",
                "reward.judge=open",
            ],
        )


def media_folders() -> set[Path]:
    """Return the folders of shared media that this process is in; other runs have theirs."""
    files = (Path(each.path) for each in psutil.Process().open_files())
    return {file.parent for file in files if file.parent.parent.name.startswith("zppo_mm-")}


@contextmanager
def nothing_left() -> Iterator[None]:
    """Check that the block leaves no process, thread, shared folder or process group."""
    children = set(psutil.Process().children())
    yield
    assert set(psutil.Process().children()) <= children
    assert not media_folders()
    assert not [each for each in threading.enumerate() if each.name.startswith("media")]
    assert not dist.is_initialized()


def train(config: RunConfig, tmp_path: Path, work: Callable[[Run], None]) -> Path:
    """Open a run and some media, work with it, and close it; returns the folder of its media."""
    with open_run(config, RunFolder(tmp_path / "run"), None, None, Interruption()) as run:
        run.feed.take(1)
        assert run.feed.prefetch is not None
        run.feed.prefetch.wait()
        assert len(psutil.Process().children()) >= 2, "one asks the judge, one decodes"
        (folder,) = media_folders()
        work(run)
    return folder


def test_a_run_that_is_through_leaves_nothing(config: RunConfig, tmp_path: Path) -> None:
    with nothing_left():
        folder = train(config, tmp_path, lambda run: None)
    assert not folder.exists()


def test_an_error_in_a_run_leaves_nothing(config: RunConfig, tmp_path: Path) -> None:
    def fail(run: Run) -> None:
        raise ArithmeticError("in a step")

    with nothing_left(), pytest.raises(ArithmeticError, match="in a step"):
        train(config, tmp_path, fail)


def test_a_part_that_cannot_be_closed_keeps_no_other_open(
    config: RunConfig, tmp_path: Path
) -> None:
    def fail() -> None:
        raise OSError("cannot be closed")

    with nothing_left(), pytest.raises(OSError, match="cannot be closed"):
        train(config, tmp_path, lambda run: run.opened.callback(fail) and None)


def test_a_run_that_cannot_be_built_leaves_nothing(config: RunConfig, tmp_path: Path) -> None:
    """The held-out questions are looked for when all else is there."""
    held_out = [SourceConfig(path=str(tmp_path / "nowhere"))]
    broken = replace(config, data=replace(config.data, held_out=held_out))
    with nothing_left(), pytest.raises(DataError, match="nowhere"):
        train(broken, tmp_path, lambda run: pytest.fail("it was built"))
