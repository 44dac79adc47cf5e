"""Storage that does not answer for a while, that loses what it was given, and a disk of the machine
in between: training goes on, and no good checkpoint is lost.
"""

from __future__ import annotations

import os
import resource
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.support.launch import run_ranks
from tests.support.training_example import Case, build_policy, make_batches
from zppo_mm.errors import CheckpointError
from zppo_mm.parallel import groups as parallel
from zppo_mm.parallel.thread_progress import ThreadProgress
from zppo_mm.run.hangs import BOUNDED_WAITS
from zppo_mm.training import checkpoint
from zppo_mm.training.checkpoint_writer import CheckpointWriter
from zppo_mm.training.manifest import MANIFEST_FILE
from zppo_mm.weights.checkpoint_metadata import METADATA_FILE

CASE = Case(params_dtype="bfloat16")
PATIENCE_SECONDS = 60.0
SMALL_FILE = 20_000
NUM_CHECKS = 50


class StalledStorage:
    """Storage that does not answer: whoever opens, lists, makes, renames or removes something below
    a folder waits.
    """

    EVENTS = frozenset(
        ("open", "os.listdir", "os.scandir", "os.mkdir", "os.rename", "os.remove", "shutil.rmtree")
    )

    def __init__(self, folder: Path) -> None:
        self.answers = threading.Event()
        self._folder = str(folder)
        sys.addaudithook(self._wait)

    def _wait(self, event: str, arguments: tuple[Any, ...]) -> None:
        if (
            event in self.EVENTS
            and not self.answers.is_set()
            and any(str(argument).startswith(self._folder) for argument in arguments)
        ):
            assert self.answers.wait(PATIENCE_SECONDS), f"{event} waited for storage"


def files(folder: Path) -> dict[str, bytes]:
    """Return the files of a checkpoint. The description names the save and its folder, and so
    differs from one save to the next; the manifest has its checksum.
    """
    return {
        path.name: path.read_bytes()
        for path in folder.iterdir()
        if path.name not in (METADATA_FILE, MANIFEST_FILE)
    }


def open_files_in(folder: Path) -> int:
    """Return how many files without a name this process has on the disk of a folder."""
    found = []
    for handle in Path("/proc/self/fd").iterdir():
        try:
            found.append(os.readlink(handle))
        except FileNotFoundError:  # of the listing itself
            continue
    return sum(name.startswith(str(folder)) and name.endswith("(deleted)") for name in found)


def save_to_stalled_storage(model: Path, root: Path) -> dict[str, Any]:
    policy, batches = build_policy(model, CASE), make_batches(CASE)
    staging, target, expected = root / "staging", root / "stalled", root / "synchronous"
    complete: list[int] = []
    writer = CheckpointWriter(target, 2, complete.append, staging)
    storage = StalledStorage(target)
    for step in (1, 2):
        policy.train_step(batches)
        checkpoint.save(expected, step, policy, {"step": step}, keep=2)
        writer.save(step, policy, {"step": step}, {f"own_{parallel.rank()}": b"mine"})
        writer.notice()
    policy.train_step(batches)
    results: dict[str, Any] = {"while it stalls": (list(complete), os.path.exists(target))}
    results["second is staged"] = writer._pending[-1].staged.result() is not None
    results["on the machine"] = (open_files_in(staging), list(staging.iterdir()))
    moves: list[bool] = []
    watcher = threading.Thread(target=watch_until_it_answers, args=(storage, moves))
    watcher.start()
    writer.save(3, policy, {"step": 3})
    watcher.join()
    results["waits"] = all(moves)
    writer.finish()
    results["complete"] = list(complete)
    results["left on the machine"] = open_files_in(staging)
    parallel.barrier()
    results["bytes"] = [files(root / name / "step_000002") for name in ("stalled", "synchronous")]
    results["loaded"] = checkpoint.load_latest(target, policy)
    results["failures"] = [
        failing_save(fail, 4, policy, writer, target)
        for fail in (no_room_for_staging, a_disk_that_changes_a_byte)
    ]
    writer.save(5, policy, {"step": 5})
    writer.finish()
    results["in the end"] = sorted(path.name for path in target.iterdir())
    parallel.shutdown()
    return results


def watch_until_it_answers(storage: StalledStorage, moves: list[bool]) -> None:
    """Check the main thread as the hang watch does, many times, then let storage answer."""
    progress = ThreadProgress(threading.main_thread(), BOUNDED_WAITS, is_computing_progress=False)
    for _ in range(NUM_CHECKS):
        time.sleep(0.02)
        moves.append(progress.has_moved())
    storage.answers.set()


def no_room_for_staging() -> Callable[[], object]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (SMALL_FILE, before[1]))
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, before)


def a_disk_that_changes_a_byte() -> Callable[[], object]:
    sync = os.fsync

    def change(handle: int) -> None:
        sync(handle)
        path = Path(os.readlink(f"/proc/self/fd/{handle}"))
        if path.suffix == ".distcp":
            path.write_bytes(path.read_bytes()[:-1] + b"?")
            sync(handle)

    os.fsync = change
    return lambda: setattr(os, "fsync", sync)


def failing_save(
    fail: Callable[[], Callable[[], object]],
    step: int,
    policy: Any,
    writer: CheckpointWriter,
    target: Path,
) -> tuple[str, list[str]]:
    """Save where something fails on rank 1 alone; returns the error and what is left."""
    restore = fail() if parallel.rank() == 1 else lambda: None
    try:
        writer.save(step, policy, {"step": step})
        writer.finish()
    except CheckpointError as error:
        parallel.barrier()
        return str(error), sorted(path.name for path in target.iterdir())
    finally:
        restore()
        parallel.barrier()
    return "", []


def test_stalled_and_forgetful_storage(student_folder: Path, tmp_path: Path) -> None:
    for results in run_ranks(save_to_stalled_storage, 2, student_folder, tmp_path):
        assert results["while it stalls"] == ([], False)
        assert results["second is staged"]
        assert results["on the machine"] == (2, [])
        assert results["waits"]  # and no rank was taken for one that hangs
        assert results["complete"] == [1, 2, 3]
        assert results["left on the machine"] == 0
        stalled, synchronous = results["bytes"]
        assert {stalled.pop(f"own_{rank}") for rank in (0, 1)} == {b"mine"}
        assert stalled == synchronous
        assert results["loaded"] == {"step": 3}
        kept = ["step_000002", "step_000003"]
        no_room, changed = results["failures"]
        assert "checkpoint.staging_dir: " in no_room[0]
        assert "cannot take a checkpoint, got [Errno 27] File too large" in no_room[0]
        assert "a file that was written reads differently, got " in changed[0]
        assert ".step_000004.partial/__1_0.distcp: the file is damaged" in changed[0]
        assert [no_room[1], changed[1]] == [kept, kept]
        assert results["in the end"] == ["step_000003", "step_000005"]
