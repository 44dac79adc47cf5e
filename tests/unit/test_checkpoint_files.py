"""What else lies among a run's checkpoints: links, files and leftovers of killed processes."""

from __future__ import annotations

from pathlib import Path

import pytest

from zppo_mm.errors import CheckpointError
from zppo_mm.training.checkpoint_files import make_empty, publish, put_back, step_folders
from zppo_mm.training.staging import stage


def write(folder: Path, step: int, keep: int = 1) -> None:
    partial = folder / f".step_{step:06d}.partial"
    make_empty(partial)
    (partial / "state.json").write_text("{}", encoding="utf-8")
    publish(partial, folder / f"step_{step:06d}", {}, keep=keep)


def test_a_link_to_a_checkpoint_is_pruned_and_what_it_leads_to_stays(tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "checkpoints", tmp_path / "elsewhere"
    folder.mkdir()
    elsewhere.mkdir()
    (elsewhere / "state.json").write_text("{}", encoding="utf-8")
    (folder / "step_000001").symlink_to(elsewhere)
    for step in (2, 3):
        write(folder, step)
    assert [path.name for path in folder.iterdir()] == ["step_000003"]
    assert (elsewhere / "state.json").exists()


def test_files_and_dangling_links_give_way(tmp_path: Path) -> None:
    (tmp_path / "step_000001").write_text("a file", encoding="utf-8")
    (tmp_path / "step_000002").symlink_to(tmp_path / "nowhere")
    for name in (".step_000001.partial", ".step_000001.replaced", ".step_000009.removed"):
        (tmp_path / name).write_text("a file", encoding="utf-8")
    for step in (1, 2):
        write(tmp_path, step)
    assert [path.name for path in tmp_path.iterdir()] == ["step_000002"]
    assert step_folders(tmp_path) == [tmp_path / "step_000002"]


def test_a_folder_that_is_unavailable_is_no_beginning(tmp_path: Path) -> None:
    put_back(tmp_path / "nothing yet")
    (tmp_path / "link").symlink_to(tmp_path / "a disk that is not mounted")
    (tmp_path / "file").write_text("", encoding="utf-8")
    for name, found in (("link", "a link without a target"), ("file", "a file")):
        with pytest.raises(
            CheckpointError, match=f"{name}: no folder, got {found}, expected the run's checkpoints"
        ):
            put_back(tmp_path / name)


def test_pruning_goes_by_the_checkpoint_that_was_just_written(tmp_path: Path) -> None:
    # One of a later step may be damaged: it neither counts as kept nor goes.
    for step in (1, 9, 2, 3):
        (tmp_path / f"step_{step:06d}").mkdir()
    write(tmp_path, 4)
    assert step_folders(tmp_path) == [tmp_path / "step_000004", tmp_path / "step_000009"]
    write(tmp_path, 10, keep=2)
    assert step_folders(tmp_path) == [tmp_path / "step_000009", tmp_path / "step_000010"]
    write(tmp_path, 11, keep=5)
    assert len(step_folders(tmp_path)) == 3


def test_a_staging_folder_that_cannot_be_one_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"checkpoint\.staging_dir: .*file cannot take"):
        stage([], tmp_path / "file")
