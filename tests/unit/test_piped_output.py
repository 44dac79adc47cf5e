"""What prints pages ends quietly when nobody reads them any more."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from tests.support.running import CLONE, environment

PRINTING = {
    "pages": ("-m", "zppo_mm.config.help"),
    "help": ("tools/train_zppo.py", "--help"),
    "commands": ("tools/compare.py", "examples/compare_digits/compare.yaml", "--commands"),
}


@pytest.mark.parametrize("name", PRINTING)
def test_a_closed_pipe_ends_it_without_a_word(name: str) -> None:
    process = subprocess.Popen(
        [sys.executable, *PRINTING[name]],
        cwd=CLONE,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    process.stdout.close()  # before it prints
    process.stdout = None
    _, errors = process.communicate(timeout=280)
    assert errors.decode() == ""
    assert process.returncode == -signal.SIGPIPE
