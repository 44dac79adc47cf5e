"""A start that fails says why in one line and leaves no run folder; one that is damaged twice is
refused twice, and loses nothing.
"""

from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path

import pytest

from tests.support.running import RUN_TIMEOUT_SECONDS, lines, run, start
from zppo_mm.bundled import STUDENT_DIR

SMALL_RUN = (
    "modality=text",
    "parity.mode=none",
    "observability.report=false",
    "evaluation.num_questions=2",
    "method=grpo",
    "train.train_iters=3",
)


def refused(tmp_path: Path, *options: str, name: str = "run") -> str:
    """Return the one line of a start that fails with exit code 1."""
    process = start(tmp_path, name, *SMALL_RUN, *options)
    output, _ = process.communicate(timeout=RUN_TIMEOUT_SECONDS)
    assert process.returncode == 1, output[-3000:]
    assert "Traceback" not in output
    (line,) = [line for line in output.splitlines() if " E " in line]
    return line


def broken_student(tmp_path: Path) -> str:
    """A folder whose names are right and whose tokenizer is not: found out only when it is
    loaded.
    """
    folder = shutil.copytree(STUDENT_DIR, tmp_path / "student")
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    settings.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return str(folder)


@pytest.mark.timeout(900)
def test_starts_that_fail_leave_no_folder(tmp_path: Path) -> None:
    out = tmp_path / "runs"
    hub = refused(out, "model.student=Qwen/Qwen3.5-0.8B")
    assert "model.student: no such folder, and nothing is downloaded" in hub
    assert not out.exists()
    # Found only after the names are checked: the folder has been made by then, and is taken away.
    assert "no chat template" in refused(out, f"model.student={broken_student(tmp_path)}")
    assert not out.exists()
    # Something of the user's own beside it stays.
    (out / "other").mkdir(parents=True)
    (out / "other" / "notes.txt").write_text("mine")
    assert "nowhere" in refused(out, "data.train=[{path: nowhere}]")
    assert [path.name for path in out.iterdir()] == ["other"]


@pytest.mark.timeout(900)
def test_a_port_in_use_and_a_folder_that_cannot_be_written_are_said_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "file"
    file.write_text("not a folder")
    assert "the run's folder cannot be used" in refused(file)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        for name, value in (
            ("RANK", "0"),
            ("WORLD_SIZE", "1"),
            ("MASTER_ADDR", "127.0.0.1"),
            ("MASTER_PORT", taken.getsockname()[1]),
        ):
            monkeypatch.setenv(name, str(value))
        assert "parallel: the job's processes cannot connect at 127.0.0.1:" in refused(
            tmp_path / "runs"
        )
    assert not (tmp_path / "runs").exists()


def test_a_file_of_the_run_that_cannot_be_written_is_said_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "run" / "config.yaml").mkdir(parents=True)
    line = refused(tmp_path)
    assert "run: a file of the run cannot be used, got [Errno 21] Is a directory" in line


def records(folder: Path) -> dict[str, bytes]:
    names = ("metrics.jsonl", "evaluation.jsonl", "transcripts", "buffer", "evaluations")
    files = [
        path
        for name in names
        for path in (
            [folder / name] if (folder / name).is_file() else sorted((folder / name).rglob("*"))
        )
    ]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files if path.is_file()}


@pytest.mark.timeout(900)
def test_damage_is_refused_every_time_and_no_record_is_lost(tmp_path: Path) -> None:
    folder = run(tmp_path, "run", *SMALL_RUN, "checkpoint.interval=1")
    shutil.rmtree(folder / "hf")
    before = records(folder)
    checkpoints = sorted((folder / "checkpoints").iterdir())
    assert [path.name for path in checkpoints] == ["step_000002", "step_000003"]
    (checkpoints[0] / "manifest.json").write_text('["another", "type"]')
    (checkpoints[1] / "state.json").write_text("{}")
    for _ in range(3):
        assert "no usable checkpoint" in refused(tmp_path)
        assert records(folder) == before
    # Restored from a copy, or moved away: the run does not start again by itself.
    for path in checkpoints:
        path.rename(path.with_name(f"{path.name}.broken"))
    assert (
        "a run without a usable checkpoint, got step_000002.broken, step_000003.broken"
        in refused(tmp_path)
    )
    assert "a run without a usable checkpoint" in refused(tmp_path, "checkpoint.resume=false")
    assert records(folder) == before


@pytest.mark.timeout(900)
def test_without_any_checkpoint_a_run_starts_again_and_keeps_what_was_recorded(
    tmp_path: Path,
) -> None:
    folder = run(tmp_path, "run", *SMALL_RUN, "train.train_iters=1")
    for name in ("hf", "checkpoints"):  # as after a kill before the first checkpoint
        shutil.rmtree(folder / name)
    before = records(folder)
    again = run(tmp_path, "run", *SMALL_RUN, "train.train_iters=1")
    assert records(again / "earlier_1") == before
    assert [row["step"] for row in lines(again / "metrics.jsonl")] == [1]
    assert "they are kept in" in (again / "run.log").read_text(encoding="utf-8")
