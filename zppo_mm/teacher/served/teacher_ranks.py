"""A teacher on ranks of its own, as the student's ranks see it."""

from __future__ import annotations

import json
import math
import time
from dataclasses import replace

from zppo_mm.config.schema import TeacherConfig
from zppo_mm.parallel.exchange import Exchange
from zppo_mm.parallel.partition import PartitionLink
from zppo_mm.serving.client_process import PoolProcess
from zppo_mm.serving.servers import RetryPolicy
from zppo_mm.teacher.served.pool_settings import PoolSettings
from zppo_mm.teacher.served.servers import Servers
from zppo_mm.teacher.teacher import TeacherLostError

POLL_SECONDS = 0.05
# Names under which the teacher's leader publishes its server, and that the weights are loaded.
SERVER, READY = "server", "ready"


class TeacherRanks:
    """The teacher's partition. Every student rank has one.

    Args:
        link: To the teacher's partition.
        exchange: The student's replicas.
    """

    def __init__(self, link: PartitionLink, exchange: Exchange) -> None:
        self._link = link
        self._exchange = exchange

    def problem(self) -> str:
        """Return why the teacher's ranks have ended; empty while they have not."""
        exit_reason = self._link.exit_reason()
        if exit_reason is not None:
            return exit_reason
        return "no heartbeat within parallel.timeout_minutes" if self._link.is_other_lost() else ""

    def check(self) -> None:
        """Check that the teacher's ranks are there; every rank calls this.

        Raises:
            TeacherLostError: On every rank, if they are not.
        """
        for (problem,) in self._exchange.gather([self.problem()]):
            raise_if_lost(problem)

    def wait_until_ready(self) -> None:
        """Wait until the teacher has loaded its weights.

        Raises:
            TeacherLostError: On every rank, if its ranks have ended.
        """
        self._wait_for(READY)

    def open_pool(self, teacher: TeacherConfig, max_batch_size: int) -> Servers:
        """Return this process's client of the teacher's server, which answers once it is ready.

        Args:
            teacher: Its layout and limits.
            max_batch_size: Sequences that a replica of the teacher decodes together.

        Raises:
            TeacherLostError: On every rank, if its ranks have ended.
        """
        server = json.loads(self._wait_for(SERVER))
        sizes = (teacher.tensor_model_parallel_size, teacher.pipeline_model_parallel_size)
        num_replicas = teacher.num_ranks // math.prod(sizes)
        batch_size = num_replicas * max(1, max_batch_size // teacher.num_rollouts)
        # The server has a queue: a request waits there, and only max_wait_seconds limits that.
        limit = teacher.max_wait_seconds
        pool = PoolProcess(
            PoolSettings(
                urls=(server["url"],),
                model="teacher",
                config=replace(teacher, request_timeout_seconds=limit, read_timeout_seconds=limit),
                api_key=server["key"],
                max_concurrency=max(2 * batch_size, teacher.max_concurrency),
                batch_size=batch_size,
            )
        )
        if self._exchange.is_leader:
            pool.submit((), RetryPolicy(max_seconds=limit, num_retries=0))  # starts the process
        return pool

    def _wait_for(self, name: str) -> str:
        while (value := self._link.lookup(name)) is None:
            raise_if_lost(self.problem())
            time.sleep(POLL_SECONDS)
        return value


def raise_if_lost(problem: str) -> None:
    """Raise if the teacher's ranks have ended.

    Raises:
        TeacherLostError: They have.
    """
    if problem:
        raise TeacherLostError(
            f"teacher: its ranks have ended, got {problem!r}, expected them to run as long as the "
            "student; look at the last ranks' output, then start the run again to resume"
        )
