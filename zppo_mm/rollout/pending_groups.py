"""Groups that an engine is sampling, and what it sampled so far as a file."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from zppo_mm.experience import PromptInstance
from zppo_mm.interruption import StopRequested
from zppo_mm.rollout.engine import Generation, PendingGenerations, SamplingParams
from zppo_mm.rollout.grading import Encoded, Outcome


class PendingGroups:
    """What `GroupSampler.start` has started; its tokens are kept once they are there.

    Args:
        instances: Of all replicas, the same on every rank.
        encoded: This replica's, without media.
        failed: This replica's without a prompt.
        params: How tokens are drawn.
        version: Rollout step whose weights draw them.
        generations: Of the instances that are not among the saved ones.
        saved: Continuations that were there already, by uid.

    Attributes:
        waited_seconds: Time spent waiting for the tokens.
        pending_seconds: Time from the start until the tokens were there and somebody asked for
            them; 0 until then, and if some of them were saved.
    """

    def __init__(
        self,
        instances: Sequence[PromptInstance],
        encoded: Sequence[Encoded],
        failed: Sequence[Outcome],
        params: SamplingParams,
        version: int,
        generations: PendingGenerations,
        saved: Mapping[str, Sequence[Generation]],
    ) -> None:
        self.instances = instances
        self.encoded = encoded
        self.failed = failed
        self.params = params
        self.version = version
        self.waited_seconds = self.pending_seconds = 0.0
        self._generations = generations
        self._saved = saved
        self._started = time.perf_counter()
        self._is_stopped = False
        self._arrived: list[Sequence[Generation]] | None = None

    def wait(self) -> Sequence[Sequence[Generation]]:
        """Return the continuations of every encoded instance; every rank of the replica calls this.

        Raises:
            StopRequested: On every rank of the replica, this time and from now on.
        """
        if self._is_stopped:
            raise StopRequested
        if self._arrived is None:
            began = time.perf_counter()
            try:
                fresh = iter(self._generations.wait())
            except StopRequested:
                self._is_stopped = True
                raise
            finally:
                now = time.perf_counter()
                self.waited_seconds += now - began
            # What a checkpoint kept was not pending here.
            self.pending_seconds = 0.0 if self._saved else now - self._started
            uids = [self.instances[item.index].uid for item in self.encoded]
            self._arrived = [
                self._saved[uid] if uid in self._saved else next(fresh) for uid in uids
            ]
        return self._arrived

    def arrived(self) -> dict[str, Sequence[Generation]]:
        """Return this replica's continuations by uid, once they are there."""
        assert self._arrived is not None, "waited for before"
        return {
            self.instances[item.index].uid: group
            for item, group in zip(self.encoded, self._arrived, strict=True)
        }

    def cancel(self) -> None:
        """Drop what is under way."""
        if self._arrived is None:
            self._generations.cancel()
