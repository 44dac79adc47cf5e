"""With which exit code a run ends."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from data.errors import DataError
from zppo_mm.errors import ConfigError
from zppo_mm.interruption import EXIT_CODE, RunStopped
from zppo_mm.parallel.failures import (
    RANK_FAILURE_EXIT_CODE,
    RankFailureError,
    refuse_restarts,
)
from zppo_mm.run.session import exit_code
from zppo_mm.run_folder import RunFolder


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (RunStopped(3, "SIGTERM"), EXIT_CODE),
        (RankFailureError("rank 0 lost rank 1"), RANK_FAILURE_EXIT_CODE),
        (ConfigError("a key"), 1),
        (DataError("a shard"), 1),
        (OSError(errno.ENOSPC, "no space left on device"), 1),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else str(value),
)
def test_what_a_job_script_can_go_by(tmp_path: Path, error: Exception, code: int) -> None:
    assert exit_code(error, RunFolder(tmp_path)) == code


def test_a_fault_of_ours_keeps_its_traceback(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        exit_code(ZeroDivisionError(), RunFolder(tmp_path))


def test_a_limit_of_hours_is_refused_under_a_launcher_that_starts_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    refuse_restarts(2.0)  # without a launcher
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    refuse_restarts(0.0)
    with pytest.raises(ConfigError, match=r"train\.max_hours: .* got 2 and --max-restarts 3"):
        refuse_restarts(2.0)
