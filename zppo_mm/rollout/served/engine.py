"""The engine whose network runs in vLLM servers. Of each replica the leader asks them, through a
process of its own; the ranks wait together and get the same.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import Protocol

from zppo_mm.errors import RolloutServersLostError
from zppo_mm.interruption import StopRequested
from zppo_mm.parallel.exchange import Exchange, never
from zppo_mm.randomness import generator
from zppo_mm.rollout.engine import Generation, GenerationRequest, SamplingParams
from zppo_mm.rollout.served.features import MediaReading, place_media
from zppo_mm.rollout.served.replies import OTHER_WEIGHTS
from zppo_mm.rollout.served.requests import ServedRequest
from zppo_mm.rollout.served.results import GenerateOutcome
from zppo_mm.serving.fault import Fault
from zppo_mm.serving.servers import RetryPolicy

logger = logging.getLogger(__name__)

EXCHANGE_SECONDS = 5.0
"""Ranks that wait for their leader's servers exchange this often: a collective that lasts would
reach its time limit.
"""
MAX_CLIENTS = 3
"""Processes that are started for one call, should they die."""


class GenerateServers(Protocol):
    """Continues prompts; a `GeneratePool` in a process of its own is one.

    Attributes:
        counts: Requests, retries, faults by kind and tokens so far.
    """

    counts: Counter[str]

    def submit(
        self, requests: Sequence[ServedRequest], policy: RetryPolicy
    ) -> Future[list[GenerateOutcome]]:
        """Start asking; the future has one outcome per request, in order."""
        ...

    def probe(self) -> Future[dict[str, Fault | None]]:
        """Ask every server for its health, once."""
        ...

    def close(self) -> None:
        """Drop what is in flight."""
        ...


class WeightSender(Protocol):
    """Sends the trained network's weights to all servers; `WeightSync` is one."""

    @property
    def counts(self) -> Mapping[str, float]:
        """What was sent so far, on the rank that sends it."""
        ...

    def push(self, version: int) -> None:
        """Send the present weights; every rank of every replica calls this."""
        ...

    def close(self) -> None:
        """End what was started."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """What is known here of the network that the servers run.

    Attributes:
        vocabulary: Tokens that it has.
        reading: How it reads media.
        run: Names the run in the versions of its weights; empty if they are never sent.
        seed: The run's seed.
        context: Tokens of the longest prompt and response that they have to take.
        adapter: Name of the trained adapters there; empty if they are merged, or there are none.
    """

    vocabulary: int
    reading: MediaReading
    run: str
    seed: int
    context: int
    adapter: str = ""

    def request(
        self, asked: GenerationRequest, sampling: SamplingParams, versions: range
    ) -> ServedRequest:
        """Return what a server is asked for a prompt."""
        return ServedRequest(
            token_ids=asked.prompt.token_ids,
            media=place_media(asked.prompt.token_ids, asked.vision, self.reading),
            num_rollouts=asked.num_rollouts,
            seed=int(generator(self.seed, *asked.seed_path).integers(2**31)),
            sampling=sampling,
            forbidden_ids=self.reading.placeholder_ids,
            vocabulary=self.vocabulary,
            run=self.run,
            versions=versions,
            adapter=self.adapter,
            may_be_refused=len(asked.prompt.token_ids) + sampling.max_new_tokens > self.context,
        )


class VllmEngine:
    """Implements `ServedEngine` on vLLM servers.

    Args:
        servers: Of the model; only leaders use them.
        model: What is known of it.
        exchange: The replicas.
        policy: How long a call may take, and how often a request is tried.
        weights: Sends weights; `None` if the servers keep those that they have.
        should_stop: Whether the run is to end, as far as this rank knows.
        num_versions: Versions of the weights, from those at the start on, that may draw a
            continuation; with 1, the caller sends no new weights before what is under way has come.
    """

    def __init__(
        self,
        servers: GenerateServers,
        model: ServedModel,
        exchange: Exchange,
        policy: RetryPolicy,
        weights: WeightSender | None = None,
        should_stop: Callable[[], bool] = never,
        num_versions: int = 1,
    ) -> None:
        self._servers = servers
        self._model = model
        self._exchange = exchange
        self._policy = policy
        self._weights = weights
        self._should_stop = should_stop
        self._num_versions = num_versions
        self._version: int | None = None

    @property
    def counts(self) -> Mapping[str, int]:
        """Requests, retries, faults by kind and tokens of this rank so far, under the names of the
        metrics without `rollout/`.
        """
        counted = dict(self._servers.counts)
        return {**counted, "stale_groups": counted.get(f"faults/{OTHER_WEIGHTS}", 0)}

    @property
    def weight_counts(self) -> Mapping[str, float]:
        """What was sent of weights so far, on the rank that sends them, under the names of the
        metrics without `weight_sync/`.
        """
        return self._weights.counts if self._weights is not None else {}

    def generate(
        self, requests: Sequence[GenerationRequest], sampling: SamplingParams
    ) -> list[list[Generation]]:
        """Return `num_rollouts` continuations per request, in the order of the requests.

        Raises:
            StopRequested: On every rank, if any of them is to stop.
            RolloutServersLostError: On every rank, if a prompt of any replica is not continued.
        """
        pending = self.start(requests, sampling)
        try:
            return pending.wait()
        except StopRequested:
            pending.cancel()
            raise

    def start(
        self, requests: Sequence[GenerationRequest], sampling: SamplingParams
    ) -> ServedGenerations:
        """Start what `generate` does, with the weights that the servers have now."""
        version = self._version
        assert version is not None or not self._model.run, "weights are sent before the first call"
        versions = range(version, version + self._num_versions) if version is not None else range(0)
        asked = (
            [self._model.request(each, sampling, versions) for each in requests]
            if self._exchange.is_leader
            else []
        )
        return ServedGenerations(
            self._servers, self._exchange, self._policy, asked, self._should_stop
        )

    def update_weights(self, version: int) -> None:
        """Send the trained network's present weights; see `ServedEngine.update_weights`.

        Raises:
            StopRequested: On every rank, if the run is to end.
            RolloutServersLostError: The same, if no server takes them.
        """
        if self._weights is None or version == self._version:
            return
        self._weights.push(version)
        self._version = version

    def close(self) -> None:
        """Drop what is in flight, and end what was started."""
        self._servers.close()
        if self._weights is not None:
            self._weights.close()


class ServedGenerations:
    """Continuations on their way. Implements `PendingGenerations`.

    Args:
        servers: Asked by the leader.
        exchange: The replicas.
        policy: Of the requests.
        requests: The leader's; the others have none.
        should_stop: Whether the run is to end, as far as this rank knows.
    """

    def __init__(
        self,
        servers: GenerateServers,
        exchange: Exchange,
        policy: RetryPolicy,
        requests: Sequence[ServedRequest],
        should_stop: Callable[[], bool],
    ) -> None:
        self._servers = servers
        self._exchange = exchange
        self._policy = policy
        self._requests = requests
        self._should_stop = should_stop
        self._outcomes: dict[int, GenerateOutcome] = {}
        self._num_clients = 0
        self._ask(range(len(requests)))

    def wait(self) -> list[list[Generation]]:
        """Return the continuations, none of a prompt that is longer than the servers have to take
        and than they do; every rank calls this.

        Raises:
            StopRequested: On every rank, if any of them is to stop; it may be called again.
            RolloutServersLostError: On every rank, if a prompt of any replica is not continued.
        """
        self._arrive()
        problems = [
            each.problem
            for index, each in self._outcomes.items()
            if each.problem and not (each.is_refused and self._requests[index].may_be_refused)
        ]
        gathered = self._exchange.gather([_Losses(len(self._requests), tuple(problems))])
        if not self._has_arrived:
            raise StopRequested
        _check_losses([each for replica in gathered for each in replica])
        own = [list(self._outcomes[index].generations) for index in range(len(self._requests))]
        return [group for rank in self._exchange.gather_in_replica(own) for group in rank]

    def _arrive(self) -> None:
        """Wait until this replica has its continuations, or its leader is to stop."""
        while not any(done for (done,) in self._exchange.gather_in_replica([self._is_done()])):
            pass

    @property
    def _has_arrived(self) -> bool:
        """Whether this rank has all that it asked for."""
        return len(self._outcomes) == len(self._requests)

    def cancel(self) -> None:
        """Drop what is under way."""
        self._future.cancel()

    def _ask(self, indices: Sequence[int]) -> None:
        """Ask for those of the requests."""
        self._asked = indices
        self._num_clients += 1
        self._future = (
            self._servers.submit([self._requests[index] for index in indices], self._policy)
            if indices
            else _nothing()
        )

    def _is_done(self) -> bool:
        """Return whether the leader has all outcomes or is to stop, after some time at most."""
        if not self._exchange.is_leader:
            return False
        if self._has_arrived:
            return True
        wait([self._future], timeout=EXCHANGE_SECONDS)
        if not self._future.done():
            return self._should_stop()
        outcomes = dict(zip(self._asked, self._future.result(), strict=True))
        lost = [index for index, outcome in outcomes.items() if outcome.is_client_lost]
        if lost and self._num_clients < MAX_CLIENTS:
            outcomes = {index: each for index, each in outcomes.items() if index not in lost}
            self._ask(lost)
        self._outcomes |= outcomes
        return self._has_arrived


@dataclass(frozen=True, slots=True)
class _Losses:
    """What a replica sends the others: its prompts, and why some were not continued."""

    num_prompts: int
    problems: tuple[str, ...]


def _check_losses(replicas: Sequence[_Losses]) -> None:
    problems = [problem for each in replicas for problem in each.problems]
    if problems:
        num_prompts = sum(each.num_prompts for each in replicas)
        raise RolloutServersLostError(
            f"rollout: {len(problems)} of {num_prompts} prompts were not continued, got "
            f"{problems[0]!r}, expected every one within rollout.max_wait_seconds; look at the "
            "servers, then start the run again to resume"
        )


def _nothing() -> Future[list[GenerateOutcome]]:
    nothing: Future[list[GenerateOutcome]] = Future()
    nothing.set_result([])
    return nothing
