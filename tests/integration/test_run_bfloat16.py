"""A run in bfloat16 as tests/gpu has it, on the CPU."""

from __future__ import annotations

from pathlib import Path

from tests.support.gpu_checks import run_in_bfloat16


def test_a_bfloat16_run_saves_resumes_and_exports(tmp_path: Path) -> None:
    run_in_bfloat16(tmp_path)
