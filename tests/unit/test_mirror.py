"""The copy of a run in a store: complete or not there, pruned as the run's own checkpoints, and
enough to go on from.
"""

from __future__ import annotations

import json
import threading
import uuid
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from data.remote_objects import RemoteFile, RemoteObjects
from zppo_mm.config.load import load_config
from zppo_mm.config.training import CheckpointConfig
from zppo_mm.errors import CheckpointError, ConfigError, ZppoError
from zppo_mm.mirror.restore import restore
from zppo_mm.mirror.upload import Mirror
from zppo_mm.run.mirroring import mirrored, refuse_stored_run
from zppo_mm.run_folder import RunFolder
from zppo_mm.training.checkpoint_files import STATE_FILE, folder_of_step, publish, step_folders

pytestmark = pytest.mark.usefixtures("one_rank")

KEEP = 2
TENSORS = "__0_0.distcp"
PATIENCE_SECONDS = 60.0


class Store(RemoteObjects):
    """A store in the memory of this process, which can refuse some objects or hold them up."""

    def __init__(self) -> None:
        super().__init__(num_attempts=1, backoff_seconds=0.0)
        self.address = f"memory://{uuid.uuid4().hex}/run"
        self.system = fsspec.filesystem("memory")
        self.refused = ""
        self.let_go = threading.Event()
        self.let_go.set()
        self.order: list[str] = []

    def upload(self, path: Path, address: str) -> RemoteFile:
        assert self.let_go.wait(PATIENCE_SECONDS)
        if self.refused and self.refused in address:
            address = f"no-such-scheme://{address}"
        self.order.append(address.removeprefix(f"{self.address}/"))
        return super().upload(path, address)

    def names(self) -> set[str]:
        return set(self.tree(self.address))

    def steps(self) -> set[str]:
        """Return the checkpoints of which anything is there."""
        return {name.split("/")[1] for name in self.names() if name.startswith("checkpoints/")}

    def write(self, name: str, content: bytes) -> None:
        self.system.pipe_file(f"{self.address}/{name}", content)


@pytest.fixture
def store() -> Iterator[Store]:
    made = Store()
    yield made
    made.let_go.set()


def save(folder: RunFolder, step: int, in_use: Any = lambda: None) -> None:
    """Publish a checkpoint as a run does, of two small files."""
    target = folder_of_step(folder.checkpoints, step)
    partial = target.with_name(f".{target.name}.partial")
    partial.mkdir(parents=True)
    (partial / STATE_FILE).write_text(json.dumps({"step": step}))
    content = f"tensors of step {step}".encode()
    (partial / TENSORS).write_bytes(content)
    publish(partial, target, {TENSORS: zlib.crc32(content)}, KEEP, in_use)


def record(folder: RunFolder, step: int) -> None:
    """Write the records of a step."""
    folder.transcripts.mkdir(parents=True, exist_ok=True)
    folder.transcript_of(step).write_text(f"step {step}")
    with folder.metrics.open("a") as file:
        file.write(json.dumps({"step": step}) + "\n")
    folder.log.write_text(f"log up to step {step}\n")


def mirror_of(folder: RunFolder, store: Store) -> Mirror:
    mirror = Mirror(folder, store.address, KEEP, store)
    mirror.begin(store.tree(store.address), 0)
    return mirror


def test_a_copy_is_enough_to_go_on_from(tmp_path: Path, store: Store) -> None:
    folder, other = RunFolder(tmp_path / "run"), RunFolder(tmp_path / "other" / "run")
    mirror = mirror_of(folder, store)
    for step in (1, 2, 3, 4):
        record(folder, step)
        save(folder, step)
        assert mirror.finish() == ""
        assert mirror.newest_step == step
    (folder.transcripts / ".step_000005.jsonl.1.tmp").write_text("not complete")
    (folder.checkpoints / ".step_000005.partial").mkdir()
    assert mirror.finish() == ""
    assert store.steps() == {"step_000003", "step_000004"}
    assert {name for name in store.names() if name.startswith("transcripts/")} == {
        f"transcripts/step_00000{step}.jsonl" for step in (1, 2, 3, 4)
    }
    assert store.order.count("transcripts/step_000001.jsonl") == 1, "not once per pass"
    assert store.order[-1] == "checkpoints/step_000004/manifest.json"
    records_of_4 = store.order.index("transcripts/step_000004.jsonl")
    assert records_of_4 < store.order.index(f"checkpoints/step_000004/{STATE_FILE}")

    # Another machine, whose run has logged a line already.
    other.path.mkdir(parents=True)
    other.log.write_text("a line of the new start\n")
    assert restore(other, store.address, store.tree(store.address), store) == 4
    assert [path.name for path in step_folders(other.checkpoints)] == ["step_000004"]
    for name in (STATE_FILE, TENSORS, "manifest.json"):
        here, there = (each.checkpoints / "step_000004" / name for each in (folder, other))
        assert here.read_bytes() == there.read_bytes()
    assert other.metrics.read_bytes() == folder.metrics.read_bytes()
    assert other.transcript_of(1).read_text() == "step 1"
    assert other.log.read_text() == "log up to step 4\na line of the new start\n"
    # Nothing older than what is there is fetched.
    assert restore(folder, store.address, store.tree(store.address), store) is None
    # The next start uploads what is new alone.
    store.order.clear()
    again = Mirror(other, store.address, KEEP, store)
    again.begin(store.tree(store.address), 4)
    save(other, 5)
    assert again.finish() == ""
    assert not [name for name in store.order if name.startswith("transcripts/")]
    assert store.steps() == {"step_000004", "step_000005"}


def test_a_store_that_refuses_costs_no_checkpoint(tmp_path: Path, store: Store) -> None:
    folder = RunFolder(tmp_path / "run")
    mirror = mirror_of(folder, store)
    save(folder, 1)
    assert mirror.finish() == ""
    store.refused = f"step_000002/{TENSORS}"
    save(folder, 2)
    missing = mirror.finish()
    assert "1 files or checkpoints are missing (checkpoints/step_000002)" in missing
    assert "unknown kind of address" in missing
    assert mirror.counts["failures"] == 3
    assert "checkpoints/step_000002/manifest.json" not in store.names()
    assert restore(RunFolder(tmp_path / "a"), store.address, store.tree(store.address), store) == 1
    store.refused = ""
    save(folder, 3)
    assert mirror.finish() == ""
    assert store.steps() == {"step_000001", "step_000003"}, "what was half uploaded is gone"


def test_a_checkpoint_stays_while_it_is_uploaded(tmp_path: Path, store: Store) -> None:
    folder = RunFolder(tmp_path / "run")
    mirror = mirror_of(folder, store)
    store.let_go.clear()
    save(folder, 1, mirror.in_use)
    mirror.request()
    while mirror.in_use() is None:
        threading.Event().wait(0.01)
    for step in (2, 3, 4):
        save(folder, step, mirror.in_use)
        mirror.request()
    kept = [path.name for path in step_folders(folder.checkpoints)]
    assert kept == ["step_000001", "step_000003", "step_000004"]
    store.let_go.set()
    assert mirror.finish() == ""
    assert store.steps() == {"step_000001", "step_000004"}, "one further pass for all three"
    save(folder, 5, mirror.in_use)
    kept = [path.name for path in step_folders(folder.checkpoints)]
    assert kept == ["step_000004", "step_000005"]


def test_damage_in_the_store_is_found(tmp_path: Path, store: Store) -> None:
    folder = RunFolder(tmp_path / "run")
    mirror = mirror_of(folder, store)
    for step in (1, 2):
        save(folder, step)
        assert mirror.finish() == ""
    store.write(f"checkpoints/step_000002/{TENSORS}", b"tensors of step 9")
    other = RunFolder(tmp_path / "other")
    assert restore(other, store.address, store.tree(store.address), store) == 1
    # The run goes on from there, and the damaged one is replaced.
    again = Mirror(other, store.address, KEEP, store)
    again.begin(store.tree(store.address), 1)
    assert again.finish() == ""
    assert store.steps() == {"step_000001", "step_000002"}, "only older ones are removed"
    save(other, 2)
    assert again.finish() == ""
    assert restore(RunFolder(tmp_path / "b"), store.address, store.tree(store.address), store) == 2
    for step in (1, 2):
        store.system.rm_file(f"{store.address}/checkpoints/step_{step:06d}/{TENSORS}")
    with pytest.raises(CheckpointError, match=r"no usable checkpoint in memory://.*\.distcp"):
        restore(RunFolder(tmp_path / "c"), store.address, store.tree(store.address), store)


def test_names_lead_nowhere_else(store: Store) -> None:
    store.write("transcripts/../../../outside", b"anything")
    store.write("transcripts/step_000001.jsonl", b"a step")
    assert any(".." in name for name in store.system.find(store.address))
    assert store.names() == {"transcripts/step_000001.jsonl"}


def test_a_run_keeps_its_copy_in_a_folder(tmp_path: Path) -> None:
    config = CheckpointConfig(mirror=f"file://{tmp_path}/store", keep=KEEP)
    folder = RunFolder(tmp_path / "here" / "run")
    with mirrored(config, folder) as mirror:
        record(folder, 1)
        save(folder, 1)
        assert mirror is not None
        mirror.request()
    stored = tmp_path / "store" / "run"
    assert (stored / "checkpoints" / "step_000001" / "manifest.json").is_file()
    with mirrored(config, RunFolder(tmp_path / "there" / "run")):
        assert (tmp_path / "there" / "run" / "checkpoints" / "step_000001").is_dir()
    first_step = CheckpointConfig(mirror=config.mirror, resume=False)
    refuse_stored_run(config, folder, restart=False)
    for refused, restart in ((config, True), (first_step, False)):
        with pytest.raises(ConfigError, match=r"run has an earlier run, got .* of steps \[1\]"):
            refuse_stored_run(refused, folder, restart)


def test_a_run_that_ends_says_what_is_missing(tmp_path: Path) -> None:
    store = tmp_path / "store"
    config = CheckpointConfig(mirror=f"file://{store}", keep=KEEP)
    folder = RunFolder(tmp_path / "run")
    ending = mirrored(config, folder, RemoteObjects(num_attempts=1))
    ending.__enter__()
    folder.path.mkdir()
    folder.config.write_text("seed: 0")
    save(folder, 1)
    store.write_text("no folder")
    with pytest.raises(ZppoError, match=r"2 files or checkpoints are missing \(checkpoints/step"):
        ending.__exit__(None, None, None)


@pytest.mark.parametrize("address", ["bucket/runs", "https://host/runs", "s3://"])
def test_an_address_that_takes_no_files_is_refused(address: str) -> None:
    with pytest.raises(ConfigError, match=r"checkpoint\.mirror: not a store that takes files"):
        load_config(None, [f"checkpoint.mirror={address}"])
