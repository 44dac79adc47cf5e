"""The checkpoints of a run: what is in one, and how the run ends at a complete step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from zppo_mm.errors import GradingError, RolloutServersLostError
from zppo_mm.interruption import RunStopped, StopRequested
from zppo_mm.parallel import groups as parallel
from zppo_mm.run.parts import Run
from zppo_mm.teacher.teacher import TeacherLostError
from zppo_mm.training.checkpoint import CheckpointWriter


class RunCheckpoints:
    """Saves a run after complete steps. Every rank calls its methods together.

    Args:
        run: What is saved.
        folder: Of the checkpoints.
    """

    def __init__(self, run: Run, folder: Path) -> None:
        self._run = run
        self._interruption = run.stages.interruption
        self._writer = CheckpointWriter(
            folder, run.config.checkpoint.keep, partial(setattr, self._interruption, "steps_done")
        )

    def save(self, step: int, wait: bool) -> None:
        """Begin to write a checkpoint.

        Args:
            step: Complete steps.
            wait: Return when it is complete.
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
        self._writer.save(step, run.policy, state, own_files)
        if wait:
            self._writer.finish()

    def save_if_missing(self, step: int) -> None:
        """Leave a complete checkpoint of a step. One that is complete or under way is not written
        again, because a failure would then lose it.
        """
        self._writer.finish()
        if self._interruption.steps_done != step:
            self.save(step, wait=True)

    def poll(self) -> None:
        """See whether the save under way is complete."""
        self._writer.notice()

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
