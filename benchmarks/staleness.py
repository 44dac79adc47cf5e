"""Time of a step whose plain rollouts are sampled while the step before trains, beside that of one
that waits for them: `rollout.max_staleness` 1 and 0, a vLLM server on another core than the run.

    python benchmarks/staleness.py [--student HF_DIR] [--dtype bfloat16] [--steps 8] [key=v …]

Each run has a server of its own, that of `make vllm-env`; runs are pinned to one core, servers to
another. Both are started, and then take turns step by step with their servers, the others stopped
meanwhile, so that a machine that slows down slows all alike. Other processes on these cores favour
the run that uses both at once: the figure is that of a machine that does nothing else. CPU seconds
are those of the run and of its server. The first step has nothing to overlap with and does not
count. How long sampling and update take follows from `rollout.max_response_tokens` and
`train.updates_per_step`.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import tempfile
import time
from pathlib import Path

import psutil
from teacher_overlap import Run

from zppo_mm.rollout.served.server_control import ServerControl
from zppo_mm.rollout.served.server_process import (
    ServerProcess,
    ServerSettings,
    free_ports,
    server_environment,
)

CLONE = Path(__file__).resolve().parents[1]
VLLM = Path(os.environ.get("VLLM", CLONE / ".venv-vllm" / "bin" / "vllm"))
HOST = "127.0.0.1"
OPTIONS = (
    *("--enforce-eager", "--skip-mm-profiling"),
    *("--no-enable-prefix-caching", "--no-enable-chunked-prefill"),
)
START_SECONDS = 900.0
MAX_TOKENS = 2048


class ServedRun:
    """A run and its server, which go on for one step at a time.

    Attributes:
        run: The run.
        cpu_seconds: Of both, in every turn so far.
    """

    def __init__(
        self, folder: Path, staleness: int, arguments: argparse.Namespace, cores: list[int]
    ) -> None:
        command = (*("env", "VLLM_CPU_KVCACHE_SPACE=1"), str(VLLM), "serve", "{model}")
        settings = ServerSettings(
            (*command, "--dtype", arguments.dtype, *OPTIONS),
            arguments.student.absolute(),
            MAX_TOKENS,
            64,
            HOST,
        )
        [port] = free_ports(HOST, 1)
        own_cores = os.sched_getaffinity(0)
        os.sched_setaffinity(0, {cores[-1]})
        environment = {**server_environment(os.environ, ""), "OMP_NUM_THREADS": "1"}
        log = folder / f"server_{staleness}.log"
        self._server = ServerProcess(settings.words(port, 0), environment, log)
        os.sched_setaffinity(0, own_cores)
        self._control = ServerControl(f"http://{HOST}:{port}", START_SECONDS)
        self._core = cores[0]
        self.run = Run(
            folder,
            f"staleness-{staleness}",
            arguments.steps + 1,
            [
                f"model.student={arguments.student}",
                f"model.params_dtype={arguments.dtype}",
                "rollout.engine=vllm",
                f"rollout.endpoints=[http://{HOST}:{port}]",
                f"rollout.max_staleness={staleness}",
                "rollout.max_server_restarts=20",
                *arguments.options,
            ],
        )
        self.cpu_seconds: list[tuple[float, float]] = []

    def wait_for_server(self) -> None:
        """Wait for its first answer."""
        deadline = time.monotonic() + START_SECONDS
        while not self._control.is_healthy():
            if time.monotonic() > deadline or not self._server.is_running():
                raise RuntimeError("the server did not start; its log says why")
            time.sleep(0.5)
        os.killpg(self._server.pid, signal.SIGSTOP)

    def turn(self) -> None:
        """Run until the next step's metrics are written."""
        os.killpg(self._server.pid, signal.SIGCONT)
        own_cores = os.sched_getaffinity(0)
        os.sched_setaffinity(0, {self._core})
        before = self._used()
        self.run.turn()
        self.cpu_seconds.append((self._used()[0] - before[0], self._used()[1] - before[1]))
        os.sched_setaffinity(0, own_cores)
        os.killpg(self._server.pid, signal.SIGSTOP)

    def end(self) -> None:
        """Break both off."""
        self.run.end()
        os.killpg(self._server.pid, signal.SIGCONT)
        self._server.end()

    def _used(self) -> tuple[float, float]:
        """Return the CPU seconds of the run and of the server so far."""
        server = {each.pid for each in psutil.Process(self._server.pid).children(recursive=True)}
        own = psutil.Process().children(recursive=True)
        name = f"name={self.run.name}"
        roots = [each for each in own if each.pid not in server and name in each.cmdline()]
        run = [each for root in roots for each in (root, *root.children(recursive=True))]
        return _cpu(run), _cpu([psutil.Process(pid) for pid in server])


def _cpu(processes: list[psutil.Process]) -> float:
    times = [process.cpu_times() for process in processes]
    return sum(each.user + each.system for each in times)


def main() -> None:
    """Run both in turns and print a line for each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--student", type=Path, default=CLONE / "models" / "vllm_student")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("options", nargs="*", metavar="key=value")
    arguments = parser.parse_intermixed_args()
    cores = sorted(os.sched_getaffinity(0))
    runs: dict[int, ServedRun] = {}
    with tempfile.TemporaryDirectory() as scratch:
        try:
            for staleness in (0, 1):
                runs[staleness] = ServedRun(Path(scratch), staleness, arguments, cores)
                runs[staleness].wait_for_server()
            for _ in range(arguments.steps):
                for each in runs.values():
                    each.turn()
        finally:
            for each in runs.values():
                each.end()
    show(runs)


def show(runs: dict[int, ServedRun]) -> None:
    """Print one line per run, and the ratio of their steps."""
    print(
        "| max_staleness | step | plain_rollout | update | CPU: run | server |\n" + "|---" * 6 + "|"
    )
    for staleness, each in runs.items():
        phases = ("step", "plain_rollout", "update")
        values = [statistics.median(each.run.seconds(phase)) for phase in phases]
        values += [statistics.median(used) for used in zip(*each.cpu_seconds[1:], strict=True)]
        print(f"| {staleness} | {' | '.join(f'{value:.2f}' for value in values)} |")
    older, newer = (sum(each.run.seconds("step")) for each in runs.values())
    print(f"step time without overlap over that with it: {older / newer:.2f}")


if __name__ == "__main__":
    main()
