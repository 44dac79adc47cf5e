"""What the runs of a comparison left behind, read from their public files alone."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from zppo_mm.comparison.launch import check_same_configuration, is_finished, steps_reached
from zppo_mm.comparison.plan import Plan, PlannedRun
from zppo_mm.config.schema import RunConfig
from zppo_mm.errors import ConfigError
from zppo_mm.report.run_record import RunRecord, read_lines, read_run
from zppo_mm.run_folder import RunFolder, files_by_step

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Answered:
    """A held-out question in one evaluation: where it comes from, and the mean reward of its
    responses.
    """

    source: str
    modality: str
    accuracy: float


Answers = Mapping[tuple[str, str], Answered]
"""One evaluation by source and question id."""


@dataclass(frozen=True, slots=True)
class RunResult:
    """What a run's folder says of it.

    Attributes:
        run: What was planned.
        record: Metrics and evaluations.
        answers: Evaluations by step.
        is_finished: Whether it came to its end.
        is_refused: Whether it was made with another configuration than the planned one.
    """

    run: PlannedRun
    record: RunRecord
    answers: Mapping[int, Answers]
    is_finished: bool
    is_refused: bool = False

    @property
    def last_step(self) -> int:
        return self.run.config.train.train_iters

    @property
    def counts(self) -> bool:
        """Whether the run is finished, the planned one, and has the answers before and after
        training: part of the tables.
        """
        return self.is_finished and not self.is_refused and {0, self.last_step} <= set(self.answers)

    @property
    def status(self) -> str:
        """How far it came, in words."""
        if self.is_refused:
            return "finished, with another configuration"
        if self.is_finished:
            return "finished" if self.counts else "finished, without answers to held-out questions"
        steps = steps_reached(self.record)
        return (
            f"step {steps} of {self.last_step}"
            if self.record.metrics or self.record.evaluations
            else "not started"
        )


@dataclass(frozen=True, slots=True)
class Results:
    """All runs of a comparison.

    Attributes:
        plan: The comparison.
        runs: By label and seed, in the plan's order, also those that were not started.
    """

    plan: Plan
    runs: Mapping[str, Mapping[int, RunResult]]

    def counted(self, label: str) -> dict[int, RunResult]:
        """Return the runs of a method that are part of the tables, by seed."""
        return {seed: result for seed, result in self.runs[label].items() if result.counts}

    def has_replay(self, label: str) -> bool:
        return self.config(label).zone.replay

    def config(self, label: str) -> RunConfig:
        """Return the configuration of a method's runs, which differ in the seed alone."""
        return next(iter(self.runs[label].values())).run.config


def read_results(plan: Plan) -> Results:
    """Read the folders of all runs; any of them may be missing."""
    runs: dict[str, dict[int, RunResult]] = {label: {} for label in plan.labels}
    for run in plan.runs:
        record = read_run(run.folder)
        finished = is_finished(run, record)
        runs[run.label][run.seed] = RunResult(
            run, record, read_answers(run.folder), finished, finished and not _is_planned(run)
        )
    return Results(plan, runs)


def _is_planned(run: PlannedRun) -> bool:
    try:
        check_same_configuration(run)
    except ConfigError as error:
        logger.warning("left out of the tables: %s", error)
        return False
    return True


def read_answers(folder: Path) -> dict[int, Answers]:
    """Return all evaluations of a run by step; answers without a reward are no part of a question's
    accuracy.
    """
    answers: dict[int, Answers] = {}
    for step, path in files_by_step(RunFolder(folder).answers).items():
        # Two sources may use the same id.
        of_step = {
            (line["source"], line["question_id"]): Answered(
                line["source"], line["modality"], line["accuracy"]
            )
            for line in read_lines(path)
        }
        answers[step] = of_step
    return answers
