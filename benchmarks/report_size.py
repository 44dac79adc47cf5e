"""Size, time and memory of a report as a run grows.

    python benchmarks/report_size.py [--steps 100 1000 10000] [--questions 10]

A simulated run of 50 steps is written by the real writers and repeated up to the number of steps,
with new questions in every step. CPU seconds, and peak resident memory of a process that draws the
report and does nothing else.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from tests.support.simulated_run import simulate_run
from zppo_mm.report.page import write_report
from zppo_mm.report.run_record import read_lines
from zppo_mm.run_folder import RunFolder, files_by_step
from zppo_mm.text_table import text_table

SIMULATED_STEPS = 50
SIMULATED_EVERY = 10
"""Steps between two simulated evaluations."""


def grow(simulated: RunFolder, folder: RunFolder, num_steps: int) -> int:
    """Repeat a run's records up to a number of steps; returns the number of questions."""
    folder.transcripts.mkdir(parents=True)
    folder.config.write_bytes(simulated.config.read_bytes())
    rows = list(read_lines(simulated.metrics))
    evaluations = list(read_lines(simulated.evaluations))
    texts = [path.read_text() for path in files_by_step(simulated.transcripts).values()]
    num_questions = 0
    with folder.metrics.open("w") as metrics, folder.evaluations.open("w") as evaluated:
        for step in range(1, num_steps + 1):
            index = (step - 1) % len(rows)
            metrics.write(json.dumps({**rows[index], "step": step}) + "\n")
            if step % SIMULATED_EVERY == 0:
                evaluation = evaluations[step // SIMULATED_EVERY % len(evaluations)]
                evaluated.write(json.dumps({**evaluation, "step": step}) + "\n")
            # Ids of their own, as if no question came back after its run of steps.
            text = texts[index].replace("-train-", f"-train-{step // len(rows)}-")
            folder.transcript_of(step).write_text(text)
            num_questions += text.count('"kind": "new"')
    return num_questions


def draw(path: Path) -> tuple[float, float, float]:
    """Write the report; returns CPU seconds, MiB of the page, and peak resident MiB."""
    start = time.process_time()
    page = write_report(path)
    seconds = time.process_time() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    return seconds, page.stat().st_size / 2**20, peak


def measure(all_steps: Sequence[int], num_new: int, scratch: Path) -> list[list[str]]:
    """Return one row of the table per number of steps."""
    simulated = scratch / "simulated"
    simulate_run(simulated, SIMULATED_STEPS, num_new=num_new)
    rows = []
    for num_steps in all_steps:
        path = scratch / str(num_steps)
        num_questions = grow(RunFolder(simulated), RunFolder(path), num_steps)
        # A process of its own, so that the peak is that of this report.
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            seconds, size, peak = pool.submit(draw, path).result()
        rows.append(
            [str(num_steps), str(num_questions), f"{seconds:.1f}", f"{size:.1f}", f"{peak:.0f}"]
        )
    return rows


def main() -> None:
    """Read the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--steps", type=int, nargs="+", default=[100, 1000, 10000])
    parser.add_argument("--questions", type=int, default=10, help="new questions per step")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        rows = measure(arguments.steps, arguments.questions, Path(scratch))
    print(text_table(["steps", "questions", "CPU s", "page MiB", "peak MiB"], rows, num_left=0))


if __name__ == "__main__":
    main()
