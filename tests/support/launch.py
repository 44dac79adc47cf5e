"""Runs a function of a test module on N local ranks and hands back what each rank returned.

    results = run_ranks(function, world_size, *arguments)

`function` is a module-level function; arguments and results are pickled. The ranks are processes
with torchrun's environment on a free port, so `zppo_mm.parallel.groups.initialize` works in them
unchanged. A failing or hanging rank fails the test with all output.

Ranks are forked from a process that has imported torch, Megatron and the project and has done
nothing else, since importing takes longer than most tests; with a GPU, whose driver does not
outlive a fork, they import for themselves. Tests of whole programs start fresh ones.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import inspect
import multiprocessing
import multiprocessing.forkserver
import os
import pickle
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from tests.support.running import CLONE, environment, free_port

# Importing alone takes half a minute on a loaded two-core machine: once, or in every rank where
# there is a GPU.
DEFAULT_TIMEOUT_SECONDS = 300.0
GRACE_SECONDS = 20.0
# The first makes `import megatron.core` possible everywhere and the default process group free of
# what would keep it.
IMPORTED = ("zppo_mm.parallel.groups", "zppo_mm.run.build")
OUTPUT_TAIL_CHARACTERS = 6000


class RanksFailedError(AssertionError):
    """A rank ended with an error, or not at all."""


def rank_environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    """Return torchrun's environment for one rank, single-threaded."""
    names = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": world_size,
        "LOCAL_WORLD_SIZE": world_size,
        "MASTER_PORT": port,
    }
    fixed = {"MASTER_ADDR": "127.0.0.1"}
    return {**environment(), **fixed, **{name: str(value) for name, value in names.items()}}


def run_ranks(
    function: Callable[..., Any],
    world_size: int,
    *arguments: Any,
    timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS,
    check: bool = True,
) -> list[Any]:
    """Run `function(*arguments)` on `world_size` ranks.

    Args:
        function: Module-level function of a file that can be imported on its own.
        world_size: Number of processes.
        *arguments: Pickled, the same for every rank.
        timeout_seconds: Time for all ranks together.
        check: Raise when a rank fails; `False` returns `(exit code, output)` per rank instead, for
            tests of failures.

    Returns:
        What each rank returned, by rank.

    Raises:
        RanksFailedError: A rank failed or the time was over.
    """
    with tempfile.TemporaryDirectory() as folder:
        task = Path(folder) / "task.pickle"
        # The arguments may hold classes of the test module, which a rank can unpickle only after
        # importing it: pickled apart.
        task.write_bytes(
            pickle.dumps(
                (
                    inspect.getfile(function),
                    function.__module__,
                    function.__qualname__,
                    pickle.dumps(arguments),
                )
            )
        )
        port = free_port()
        processes = [
            _start(task, rank, rank_environment(rank, world_size, port))
            for rank in range(world_size)
        ]
        try:
            timed_out = _wait(processes, timeout_seconds, stop_after_failure=check)
        finally:
            _end_sessions(processes)
        outputs = [_read(Path(folder) / f"{rank}.log") for rank in range(world_size)]
        codes = [process.exitcode for process in processes]
        if not check:
            return list(zip(codes, outputs, strict=True))
        if timed_out or any(codes):
            raise RanksFailedError(_report(codes, outputs, timed_out))
        return [
            pickle.loads((Path(folder) / f"{rank}.result").read_bytes())
            for rank in range(world_size)
        ]


def _start(task: Path, rank: int, variables: dict[str, str]) -> BaseProcess:
    if torch.cuda.is_available():
        process: BaseProcess = multiprocessing.get_context("spawn").Process(
            target=_run_rank, args=(task, rank, variables)
        )
    else:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(list(IMPORTED))
        with mock.patch.dict(os.environ, environment()):
            multiprocessing.forkserver.ensure_running()
        process = context.Process(target=_run_rank, args=(task, rank, variables))
    process.start()
    return process


def _wait(processes: list[BaseProcess], timeout_seconds: float, stop_after_failure: bool) -> bool:
    """Wait for all; kill what is left at the deadline, or a little after the first failure. Returns
    whether the time was over.
    """
    deadline = time.monotonic() + timeout_seconds
    timed_out = False
    while any(process.is_alive() for process in processes):
        if stop_after_failure and any(process.exitcode for process in processes):
            deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
            stop_after_failure = False
        if time.monotonic() > deadline:
            timed_out = True
            for process in processes:
                process.kill()
        time.sleep(0.05)
    return timed_out


def _end_sessions(processes: list[BaseProcess]) -> None:
    """Kill the ranks and all that they started."""
    for process in processes:
        assert process.pid is not None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()  # it may not have had the time to make a session of its own
        process.join()


def _read(log: Path) -> str:
    return (
        log.read_text(errors="replace") if log.exists() else ""
    )  # it may have been killed before it could write


def _report(codes: list[int | None], outputs: list[str], timed_out: bool) -> str:
    head = "the time was over" if timed_out else "a rank failed"
    parts = [
        f"--- rank {rank}, exit code {code}\n{text[-OUTPUT_TAIL_CHARACTERS:]}"
        for rank, (code, text) in enumerate(zip(codes, outputs, strict=True))
    ]
    return f"{head}: exit codes {codes}\n" + "\n".join(parts)


def _run_rank(task: Path, rank: int, environment: dict[str, str]) -> None:
    """Run one rank: load the task's module from its file, call the function, write the result."""
    os.setsid()  # so that what a killed rank leaves behind can be ended with it
    log = os.open(task.with_name(f"{rank}.log"), os.O_WRONLY | os.O_CREAT)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(log, stream.fileno())
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(CLONE)
    torch.set_num_threads(1)
    parallel = importlib.import_module(IMPORTED[0])
    path, module_name, function_name, arguments = pickle.loads(task.read_bytes())
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    spec.loader.exec_module(module)
    result = pickle.dumps(getattr(module, function_name)(*pickle.loads(arguments)))
    task.with_name(f"{rank}.result").write_bytes(result)
    parallel.leave()
