"""Runs a function of a test module on N local ranks and hands back what each rank returned.

    results = run_ranks(function, world_size, *arguments)

`function` is a module-level function; arguments and results are pickled. The ranks are fresh processes with torchrun's environment on a
free port, so `zppo_mm.models.parallel.initialize` works in them unchanged. A failing or hanging rank fails the test with all output.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import inspect
import os
import pickle
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

CLONE_ROOT = Path(__file__).resolve().parents[2]
# Starting and importing alone takes half a minute per rank on a loaded two-core machine.
DEFAULT_TIMEOUT_SECONDS = 300.0
GRACE_SECONDS = 20.0
PORTS = (20_000, 32_000)
OUTPUT_TAIL_CHARACTERS = 6000


class RanksFailedError(AssertionError):
    """A rank ended with an error, or not at all."""


def free_port() -> int:
    """Return a TCP port that is free now, from below those that the system hands out: a connection could take one of them meanwhile."""
    while True:
        port = random.SystemRandom().randrange(*PORTS)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def rank_environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    """Return torchrun's environment for one rank, single-threaded."""
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size, "MASTER_PORT": port}
    path = os.pathsep.join(filter(None, [str(CLONE_ROOT), os.environ.get("PYTHONPATH", "")]))
    fixed = {"MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    return {**os.environ, **fixed, **{name: str(value) for name, value in names.items()}}


def run_ranks(
    function: Callable[..., Any], world_size: int, *arguments: Any, timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS, check: bool = True
) -> list[Any]:
    """Run `function(*arguments)` on `world_size` ranks.

    Args:
        function: Module-level function of a file that can be imported on its own.
        world_size: Number of processes.
        *arguments: Pickled, the same for every rank.
        timeout_seconds: Time for all ranks together.
        check: Raise when a rank fails; `False` returns `(exit code, output)` per rank instead, for tests of failures.

    Returns:
        What each rank returned, by rank.

    Raises:
        RanksFailedError: A rank failed or the time was over.
    """
    with tempfile.TemporaryDirectory() as folder:
        task = Path(folder) / "task.pickle"
        # The arguments may hold classes of the test module, which a rank can unpickle only after importing it: pickled apart.
        task.write_bytes(pickle.dumps((inspect.getfile(function), function.__module__, function.__qualname__, pickle.dumps(arguments))))
        port = free_port()
        processes = []
        for rank in range(world_size):
            with open(Path(folder) / f"{rank}.log", "w") as log:
                processes.append(
                    subprocess.Popen(
                        [sys.executable, str(Path(__file__).resolve()), str(task), str(Path(folder) / f"{rank}.result")],
                        env=rank_environment(rank, world_size, port),
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        cwd=CLONE_ROOT,
                        # A session of its own, so that what a killed rank leaves behind can be ended with it.
                        start_new_session=True,
                    )
                )
        try:
            timed_out = _wait(processes, timeout_seconds, stop_after_failure=check)
        finally:
            _end_sessions(processes)
        outputs = [(Path(folder) / f"{rank}.log").read_text(errors="replace") for rank in range(world_size)]
        codes = [process.returncode for process in processes]
        if not check:
            return list(zip(codes, outputs, strict=True))
        if timed_out or any(codes):
            raise RanksFailedError(_report(codes, outputs, timed_out))
        return [pickle.loads((Path(folder) / f"{rank}.result").read_bytes()) for rank in range(world_size)]


def _wait(processes: list[subprocess.Popen[bytes]], timeout_seconds: float, stop_after_failure: bool) -> bool:
    """Wait for all; kill what is left at the deadline, or a little after the first failure. Returns whether the time was over."""
    deadline = time.monotonic() + timeout_seconds
    timed_out = False
    while any(process.poll() is None for process in processes):
        if stop_after_failure and any(process.returncode for process in processes):
            deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
            stop_after_failure = False
        if time.monotonic() > deadline:
            timed_out = True
            for process in processes:
                process.kill()
        time.sleep(0.05)
    return timed_out


def _end_sessions(processes: list[subprocess.Popen[bytes]]) -> None:
    """Kill the ranks and all that they started."""
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _report(codes: list[int], outputs: list[str], timed_out: bool) -> str:
    head = "the time was over" if timed_out else "a rank failed"
    parts = [
        f"--- rank {rank}, exit code {code}\n{text[-OUTPUT_TAIL_CHARACTERS:]}"
        for rank, (code, text) in enumerate(zip(codes, outputs, strict=True))
    ]
    return f"{head}: exit codes {codes}\n" + "\n".join(parts)


def _main() -> None:
    """Run one rank: load the task's module from its file, call the function, write the result."""
    task, result = Path(sys.argv[1]), Path(sys.argv[2])
    path, module_name, function_name, arguments = pickle.loads(task.read_bytes())
    # First, because it makes `import megatron.core` possible everywhere and the world's group free of what would keep it.
    parallel = importlib.import_module("zppo_mm.models.parallel")
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    spec.loader.exec_module(module)
    result.write_bytes(pickle.dumps(getattr(module, function_name)(*pickle.loads(arguments))))
    parallel.leave()


if __name__ == "__main__":
    _main()
