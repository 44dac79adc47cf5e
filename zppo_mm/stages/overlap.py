"""Plain rollouts that are sampled while the step before trains.

The questions of a step depend on the groups of the step before, not on what these teach. So they
are taken, and their rollouts started, before the update. The weights that sample them are one step
behind those that they train; everything else of a step is sampled with the current ones.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.question import Question
from data.stream import QuestionStream
from zppo_mm.errors import RolloutServersLostError
from zppo_mm.experience import Group
from zppo_mm.interruption import Interruption, StopRequested
from zppo_mm.parallel.exchange import Exchange
from zppo_mm.rollout.engine import Generation
from zppo_mm.rollout.pending_groups import PendingGroups
from zppo_mm.rollout.sampler import GroupSampler
from zppo_mm.rollout.saved_generations import from_bytes, to_bytes

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Ahead:
    """What was started for a step while the step before ran.

    Attributes:
        step: The step that it is for.
        version: Rollout step whose weights sample it.
        new: Its new questions.
        replayed: Its replayed questions.
        stream: Position of the stream before the new questions were taken.
        waves: Plain prompts, in the waves in which the teacher is asked about them.
    """

    step: int
    version: int
    new: Sequence[Question]
    replayed: Sequence[Question]
    stream: dict[str, Any]
    waves: tuple[PendingGroups, ...]


@dataclass(frozen=True, slots=True)
class SavedAhead:
    """What a checkpoint keeps of it: the questions follow from the stream and the buffer.

    Attributes:
        step: The step that it is for.
        version: Rollout step whose weights sampled.
        generations: Continuations by uid.
    """

    step: int
    version: int
    generations: Mapping[str, Sequence[Generation]]


class Overlap:
    """Keeps what was started for the next step. Every rank holds one and calls it alike.

    A run that is to end waits for what is under way, because it cannot be sampled again by the same
    weights, unless most of the time for that has passed.

    Args:
        sampler: The student's.
        stream: Where new questions come from.
        exchange: The replicas.
        interruption: Of the run.
        last_step: Of the run; nothing is started for the step after it.
        partial_rollouts: Whether rollouts that are under way go on with the new weights; else they
            are waited for before the engine gets these.

    Attributes:
        ahead: For the step that runs or comes next.
        following: For the step after the one that runs.
        saved: From the checkpoint that the run goes on from, until its step begins.
    """

    def __init__(
        self,
        sampler: GroupSampler,
        stream: QuestionStream,
        exchange: Exchange,
        interruption: Interruption,
        last_step: int,
        partial_rollouts: bool = False,
    ) -> None:
        self.sampler = sampler
        self._exchange = exchange
        self._interruption = interruption
        self.stream = stream
        self.last_step = last_step
        self.ahead: Ahead | None = None
        self.following: Ahead | None = None
        self.saved: SavedAhead | None = None
        self._partial_rollouts = partial_rollouts

    def position(self) -> dict[str, Any]:
        """Return the stream's position before the questions of the next step that is not complete,
        as JSON values.
        """
        return self.stream.state_dict() if self.ahead is None else self.ahead.stream

    def advance(self) -> None:
        """Go on to the next step: the one that ran is complete."""
        self.ahead, self.following = self.following, None

    def drop_following(self) -> None:
        """Drop what the step that runs has started for the next one; what was started for itself is
        kept.
        """
        if self.following is not None:
            for wave in self.following.waves:
                wave.cancel()
        self.following = None

    def settle(self) -> None:
        """Wait for the rollouts that are under way, unless they go on with other weights.

        Raises:
            StopRequested: On every rank, if the run is to end.
        """
        if self.ahead is not None and not self._partial_rollouts:
            self._wait(self.ahead.waves)

    def finish(self, wave: PendingGroups) -> list[Group]:
        """Return the groups of one wave of `ahead`, the same on every rank."""
        self._wait([wave])
        return self.sampler.finish(wave)

    def _wait(self, waves: Sequence[PendingGroups]) -> None:
        with self._interruption.held():
            self.sampler.wait(waves)

    def before_update(self, update_weights: Callable[[int], None]) -> Callable[[int], None]:
        """Return what gives an engine other weights when nothing is under way that must not have
        them.
        """

        def update(version: int) -> None:
            self.settle()
            update_weights(version)

        return update

    def state(self) -> tuple[dict[str, Any] | None, dict[str, bytes]]:
        """Wait for the rollouts of the next step; returns what a checkpoint keeps of them: JSON
        values, the same on every rank, and this rank's files by name.

        If they do not come in time, nothing of them is kept: they are sampled again when the run
        goes on, by the weights of then.
        """
        if self.ahead is None:
            return None, {}
        try:
            self._wait(self.ahead.waves)
        except (StopRequested, RolloutServersLostError) as error:
            logger.warning(
                "step %d: its plain rollouts are left out of the checkpoint, because they are not "
                "there (%s); they are sampled again when the run goes on",
                self.ahead.step,
                str(error) or "the run is to end",
            )
            return None, {}
        names = [f"ahead_{replica:05d}.npz" for replica in range(self._exchange.num_replicas)]
        kept = {uid: each for wave in self.ahead.waves for uid, each in wave.arrived().items()}
        state = {"step": self.ahead.step, "version": self.ahead.version, "files": names}
        if not self._exchange.is_leader:
            return state, {}
        return state, {names[self._exchange.replica]: to_bytes(kept)}

    def restore(self, state: Mapping[str, Any], folder: Path) -> None:
        """Take up what `state` returned, whatever layout it was saved at.

        Args:
            state: Its JSON values.
            folder: That holds its files.
        """
        generations: dict[str, Sequence[Generation]] = {}
        for name in state["files"]:
            generations |= from_bytes((folder / name).read_bytes())
        self.saved = SavedAhead(int(state["step"]), int(state["version"]), generations)
