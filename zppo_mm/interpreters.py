"""Processes of our own: fresh interpreters, so that nothing is forked beside torch and NCCL, and
scripts need no guard.
"""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any


def start_interpreter(module: str, *arguments: str, **options: Any) -> subprocess.Popen[bytes]:
    """Start `python -m module` with this process's import path and one thread for arithmetic.

    Args:
        module: With a dot path.
        arguments: For its command line.
        options: Of `subprocess.Popen`.
    """
    # -P: what lies in the working directory must not come before our modules unless this process
    # sees it so too.
    search_path = os.pathsep.join(path or os.getcwd() for path in sys.path)
    environment = {**os.environ, "PYTHONPATH": search_path, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-P", "-m", module, *arguments], env=environment, **options
    )
