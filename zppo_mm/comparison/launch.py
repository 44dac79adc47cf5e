"""Runs of a comparison as processes: finished ones are left alone, killed ones go on, and one that
fails does not stop the others.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from zppo_mm.comparison.plan import Plan, PlannedRun
from zppo_mm.config.load import flat_keys, load_config
from zppo_mm.errors import ConfigError
from zppo_mm.report.run_record import RunRecord, read_run
from zppo_mm.run_folder import RunFolder

logger = logging.getLogger(__name__)

OUTPUT_FOLDER = "output"
NUM_TAIL_LINES = 15
POLL_SECONDS = 0.2
END_MARGIN_SECONDS = 20.0


@dataclass(frozen=True, slots=True)
class Failure:
    """A run that did not come to its end.

    Attributes:
        run: Which.
        reason: What is known of it: the end of its output, or why it was not started.
    """

    run: PlannedRun
    reason: str


def steps_reached(record: RunRecord) -> int:
    """Return the last step that a run has recorded, 0 before the first."""
    return int(record.metrics[-1]["step"]) if record.metrics else 0


def is_finished(run: PlannedRun, record: RunRecord) -> bool:
    """Return whether a run has come to its last step, with the evaluation after it, and was
    exported.
    """
    last = run.config.train.train_iters
    evaluated = not record.evaluations or record.evaluations[-1]["step"] >= last
    return steps_reached(record) >= last and evaluated and RunFolder(run.folder).hf.is_dir()


def check_same_configuration(run: PlannedRun) -> None:
    """Compare a finished run with what is planned; where the folder lies does not count.

    Raises:
        ConfigError: It was made with other options, so its numbers are not those of the comparison.
    """
    made, planned = (
        flat_keys(asdict(config))
        for config in (load_config(RunFolder(run.folder).config), run.config)
    )
    keys = [key for key in planned if key != "output_dir" and made.get(key) != planned[key]]
    changed = [f"{key} was {made.get(key)!r}, is {planned[key]!r}" for key in keys]
    if changed:
        raise ConfigError(
            f"{run.folder}: a finished run of another configuration, got {'; '.join(changed)}, "
            "expected the planned one; remove the folder or give another output_dir"
        )


def run_all(plan: Plan, train_tool: Path) -> list[Failure]:
    """Start what is not finished, `parallel_runs` at a time, and return what failed.

    Args:
        plan: The comparison.
        train_tool: The program that takes a run's arguments.
    """
    failures: list[Failure] = []
    waiting = _unfinished(plan, failures)
    logger.info(
        "%d runs, of them %d finished or refused before",
        len(plan.runs),
        len(plan.runs) - len(waiting),
    )
    with _ended_at_exit() as running:
        while waiting or running:
            while waiting and len(running) < plan.parallel_runs:
                run = waiting.pop(0)
                running[run.name] = (run, _start(run, plan, train_tool), time.monotonic())
            time.sleep(POLL_SECONDS)
            for name, (run, process, started) in list(running.items()):
                if process.poll() is not None:
                    del running[name]
                    failures += _outcome(run, plan, process.returncode, time.monotonic() - started)
    return failures


def output_path(plan: Plan, run: PlannedRun) -> Path:
    """Return where everything goes that a run prints."""
    return plan.folder / OUTPUT_FOLDER / f"{run.name}.txt"


def _unfinished(plan: Plan, failures: list[Failure]) -> list[PlannedRun]:
    """Return the runs to be started; a finished one that is not the planned one joins the
    failures.
    """
    unfinished = []
    for run in plan.runs:
        if not is_finished(run, read_run(run.folder)):
            unfinished.append(run)
            continue
        try:
            check_same_configuration(run)
        except ConfigError as error:
            logger.error("%s", error)
            failures.append(Failure(run, str(error)))
    return unfinished


_Running = dict[str, tuple[PlannedRun, subprocess.Popen[bytes], float]]


@contextmanager
def _ended_at_exit() -> Iterator[_Running]:
    """Hold the running processes; whatever ends the block ends them too, so that no run goes on
    unseen.
    """
    running: _Running = {}
    try:
        yield running
    finally:
        for _, process, _ in running.values():
            process.terminate()
        for run, process, _ in running.values():
            try:
                # A run writes a checkpoint before it ends.
                process.wait(run.config.train.stop_within_seconds + END_MARGIN_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _start(run: PlannedRun, plan: Plan, train_tool: Path) -> subprocess.Popen[bytes]:
    launcher = [sys.executable]
    if plan.processes_per_run > 1:
        launcher += [
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            str(plan.processes_per_run),
        ]
    command = [*launcher, str(train_tool), *run.arguments]
    path = output_path(plan, run)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Runs side by side with OpenMP threads for every core would starve each other.
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    with path.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment
        )
    logger.info("%s started, output in %s", run.name, path)
    return process


def _outcome(run: PlannedRun, plan: Plan, returncode: int, seconds: float) -> list[Failure]:
    """Say how a run ended; returns its failure if it failed."""
    record = read_run(run.folder)
    if returncode == 0 and is_finished(run, record):
        accuracy = (
            f", held-out accuracy {record.evaluations[-1]['accuracy']:.1%}"
            if record.evaluations
            else ""
        )
        logger.info("%s finished after %.0f s%s", run.name, seconds, accuracy)
        return []
    path = output_path(plan, run)
    what = f"exit status {returncode} after step {steps_reached(record)}"
    logger.error("%s failed, %s; see %s", run.name, what, path)
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()[-NUM_TAIL_LINES:]
    return [Failure(run, "\n".join([f"{what}; the end of its output:", *lines]))]
