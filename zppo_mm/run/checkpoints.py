"""The checkpoints of a run: what is in one, and how the run ends at a complete step."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from zppo_mm.errors import CheckpointError, GradingError, RolloutServersLostError
from zppo_mm.interruption import RunStopped, StopRequested
from zppo_mm.mirror.upload import Mirror
from zppo_mm.observability.metrics import Max, StepMetrics, Sum
from zppo_mm.parallel import groups as parallel
from zppo_mm.run.parts import Run
from zppo_mm.teacher.teacher import TeacherLostError
from zppo_mm.training.checkpoint_writer import CheckpointWriter
from zppo_mm.training.staging import stage
from zppo_mm.weights.distributed_folder import on_every_rank

logger = logging.getLogger(__name__)


class RunCheckpoints:
    """Saves a run after complete steps. Every rank calls its methods together.

    A save that fails does not end the run while a complete checkpoint is there: the next save tries
    again, until as many have failed one after another as `checkpoint.max_failed_saves` says.

    Args:
        run: What is saved.
        folder: Of the checkpoints.
        mirror: Takes a copy of each that is complete; on rank 0, if the run has one.

    Raises:
        CheckpointError: On every rank, if `checkpoint.staging_dir` cannot be written on one.
    """

    def __init__(self, run: Run, folder: Path, mirror: Mirror | None = None) -> None:
        self._run, self._mirror = run, mirror
        self._counted: Counter[str] = Counter()
        self._interruption = run.stages.interruption
        config = run.config.checkpoint
        staging = Path(config.staging_dir) if config.staging_dir else None
        if staging is not None:
            on_every_rank(staging, partial(stage, [], staging))  # an error now, not at the first
        self._num_broken = parallel.on_rank_zero(lambda: len(list(folder.glob("*.broken"))))
        self._max_failed = config.max_failed_saves
        self._failed_in_a_row = self._num_failed = 0
        self._seconds = 0.0
        in_use = mirror.in_use if mirror is not None else lambda: None
        self._writer = CheckpointWriter(
            folder, config.keep, self._on_complete, staging, self._on_failure, in_use
        )

    def save(self, step: int, wait: bool) -> None:
        """Begin to write a checkpoint.

        Args:
            step: Complete steps.
            wait: Return when it is complete; a save that fails is repeated at once.

        Raises:
            CheckpointError: On every rank, if too many saves have failed in a row, or one has
                before the run had any checkpoint.
        """
        run, overlap = self._run, self._run.stages.overlap
        state = {
            "step": step,
            "config": asdict(run.config),
            "reward_functions": run.verifier.functions.digests,
            "stream": run.position(),
            "replay": run.stages.replay.state_dict(),
        }
        own_files: dict[str, bytes] = {}
        if overlap is not None:
            state["ahead"], own_files = overlap.state()
        started = time.perf_counter()
        self._begin(step, state, own_files)
        while wait:
            self._writer.finish()
            if self._interruption.steps_done == step:
                break
            self._begin(step, state, own_files)
        self._seconds += time.perf_counter() - started

    def _begin(self, step: int, state: dict[str, Any], own_files: dict[str, bytes]) -> None:
        # A run that continues from a checkpoint must find the records of the steps before it.
        if problem := parallel.on_rank_zero(self._run.records.flush):
            self._on_failure(step, CheckpointError(f"{problem}; check the disk"))
        else:
            self._writer.save(step, self._run.policy, state, own_files)

    def save_if_missing(self, step: int) -> None:
        """Leave a complete checkpoint of a step. One that is complete or under way is not written
        again, because a failure would then lose it. Raises as `save`.
        """
        self._writer.finish()
        if self._interruption.steps_done != step:
            self.save(step, wait=True)

    def poll(self) -> None:
        """See whether the save under way is complete. Raises as `save`."""
        self._writer.notice()

    def _on_complete(self, step: int) -> None:
        self._interruption.steps_done = step
        self._failed_in_a_row = 0
        if self._mirror is not None:
            self._mirror.request()

    def _on_failure(self, step: int, error: CheckpointError) -> None:
        """Let the run go on without the checkpoint of a step, if it may."""
        self._num_failed += 1
        self._failed_in_a_row += 1
        newest = self._interruption.steps_done
        if newest is None:
            raise error
        if self._failed_in_a_row >= self._max_failed:
            raise CheckpointError(
                f"checkpoint.max_failed_saves: {self._failed_in_a_row} saves in a row have failed, "
                f"the last with: {error}. The run would continue after step {newest}; give it "
                "storage that works, then start the same command"
            ) from error
        if parallel.rank() == 0:
            logger.warning(
                "checkpoint: step %d is not saved (%d of at most %d failures in a row), the newest "
                "checkpoint is of step %d: %s",
                step,
                self._failed_in_a_row,
                self._max_failed,
                newest,
                error,
            )

    def take_metrics(self) -> StepMetrics:
        """Return how long saves kept this rank from training, how many have failed and what was
        uploaded since the last call, and how many checkpoints were set aside when the run was
        started.
        """
        metrics = StepMetrics()
        metrics.add("checkpoint/failed", Sum(self._num_failed))
        self._num_failed = 0
        metrics.add("seconds/checkpoint", Sum(self._seconds))
        metrics.add("checkpoint/broken", Max(self._num_broken))
        self._seconds = 0.0
        if self._mirror is not None:
            counts = Counter(self._mirror.counts)
            for name in ("uploaded", "uploaded_bytes", "failures"):
                metrics.add(f"mirror/{name}", Sum(counts[name] - self._counted[name]))
            metrics.add("mirror/newest_step", Max(self._mirror.newest_step))
            self._counted = counts
        return metrics

    def stop_if_requested(self, step: int) -> None:
        """End the run after a complete step.

        Raises:
            RunStopped: On every rank, with a checkpoint, if any of them is to end.
        """
        reasons = [
            reason for reason in parallel.gather_from_ranks(self._interruption.reason) if reason
        ]
        if reasons:
            self.save_if_missing(step)
            self._interruption.close()
            raise RunStopped(step, reasons[0])

    @contextmanager
    def restoring_stream(self, step: int) -> Iterator[None]:
        """Run a step in the block. One that is dropped has moved nothing but the stream and what it
        started for the next step; both are put back, so that a resumed run takes the same
        questions.

        Raises:
            TeacherLostError: On every rank, with a checkpoint, if the teacher does not answer.
            GradingError: The same, if grading fails too often.
            RolloutServersLostError: The same, if the servers that sample do not answer.
            RunStopped: On every rank, with a checkpoint, if the run is to end.
        """
        position = self._run.position()
        try:
            yield
        except (TeacherLostError, GradingError, RolloutServersLostError):
            self._put_back(position)
            self.save_if_missing(step - 1)
            raise
        except StopRequested:
            self._put_back(position)
            self.stop_if_requested(step - 1)
            raise AssertionError("a step is dropped because the run is to end") from None

    def _put_back(self, position: dict[str, Any]) -> None:
        self._run.stream.load_state_dict(position)
        if self._run.stages.overlap is not None:
            self._run.stages.overlap.drop_following()
