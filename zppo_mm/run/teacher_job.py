"""A job whose last ranks are the teacher's: what they do, and how the student's ranks begin and end
beside them.
"""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections.abc import Iterator

from data.media.store import MediaStore
from zppo_mm.config.schema import ParallelConfig, RunConfig
from zppo_mm.interruption import Interruption, RunStopped, StopRequested
from zppo_mm.observability.logs import configure_logging
from zppo_mm.parallel import failures
from zppo_mm.parallel import groups as parallel
from zppo_mm.parallel.exchange import ParallelExchange
from zppo_mm.parallel.liveness_barrier import LivenessBarrier, open_liveness_barrier
from zppo_mm.parallel.partition import DONE, JobPartition, PartitionLink, teacher_layout
from zppo_mm.run.build import student_folder
from zppo_mm.run.hangs import finding_hangs
from zppo_mm.run.remote import open_files
from zppo_mm.run.shared import (
    longest_teacher_prompt,
    media_limits,
    open_shared,
    release_memory,
)
from zppo_mm.run.teachers import load_teacher
from zppo_mm.run_folder import RunFolder
from zppo_mm.teacher.served.chat_server import ChatServer, job_address
from zppo_mm.teacher.served.rank_server import NoGrader, RankServer
from zppo_mm.teacher.served.teacher_ranks import POLL_SECONDS, READY, SERVER
from zppo_mm.teacher.teacher import TeacherLostError

logger = logging.getLogger(__name__)

STOPPED = "stopped after step "
EXIT_CHECK_SECONDS = 1.0


def serve_teacher(
    config: RunConfig,
    folder: RunFolder,
    partition: JobPartition,
    interruption: Interruption | None = None,
) -> None:
    """Load the teacher and answer until the student has ended; every rank of the teacher's
    partition calls this.

    A rank that fails gives its exit reason first and lets the student save: a launcher ends all
    other processes as soon as one has failed.

    Raises:
        RunStopped: The student was ended before its last step.
    """
    configure_logging(None, partition.job_rank)
    interruption = interruption or Interruption()
    link = _open_link(config.parallel, partition)
    try:
        with failures.translate_collective_errors():
            layout = teacher_layout(config.teacher, config.parallel)
            parallel.initialize(layout, config.seed, partition)
            failures.end_with_launcher()
            with (
                open_liveness_barrier(config.parallel, partition, interruption) as barrier,
                finding_hangs(config.parallel, folder.stacks, partition),
            ):
                reason = _serve(config, link, barrier, interruption)
            parallel.shutdown()
    except Exception as error:
        link.leave(_exit_reason(partition, error))
        # A store that is gone went with the student's first rank.
        with contextlib.suppress(RuntimeError):
            while link.exit_reason() is None and not link.is_other_lost():
                time.sleep(POLL_SECONDS)
        raise
    finally:
        # As `open_run` does.
        parallel.leave()
    link.leave()
    if reason.startswith(STOPPED):
        raise RunStopped(int(reason.removeprefix(STOPPED)), "as the student")
    if reason != DONE:
        logger.warning("the teacher ends because the student does: %s", reason)


@contextlib.contextmanager
def link_to_teacher(
    config: ParallelConfig, partition: JobPartition | None
) -> Iterator[PartitionLink | None]:
    """Hold the link to the teacher's ranks; when the student ends, its exit reason is given.

    Raises:
        TeacherLostError: The student is through, but the teacher's ranks do not end.
    """
    if partition is None:
        yield None
        return
    link = _open_link(config, partition)
    stopped: RunStopped | None = None
    try:
        yield link
    except RunStopped as error:
        stopped = error
    except BaseException as error:
        link.leave(_exit_reason(partition, error))
        raise
    link.leave(DONE if stopped is None else f"{STOPPED}{stopped.step}")
    if partition.rank == 0:  # it may hold the store, where the teacher reads that it can end
        _wait_for_teacher(link)
    if stopped is not None:
        raise stopped


def _serve(
    config: RunConfig,
    link: PartitionLink,
    barrier: LivenessBarrier | None,
    interruption: Interruption,
) -> str:
    exchange = ParallelExchange(barrier, _HasStudentLeft(link))
    with contextlib.ExitStack() as stack:
        opened = media_limits(config.data, student_folder(config.model))
        media = MediaStore(opened, open_files(config.remote))
        stack.callback(media.close)
        server = None
        if exchange.is_leader and exchange.replica == 0:
            server = ChatServer(job_address())
            stack.callback(server.close)
            link.publish(SERVER, json.dumps({"url": server.url, "key": server.key}))
        shared = open_shared(config, media, NoGrader(), exchange, stack)
        layout = teacher_layout(config.teacher, config.parallel)
        model, encoder, sampling = load_teacher(shared, config.teacher, layout)
        limits = longest_teacher_prompt(config), sampling.max_new_tokens
        if server is not None:
            link.publish(READY, "")
        ranks = RankServer(
            link,
            server,
            shared.sampler(model, encoder, *limits),
            shared.sampler(model, shared.without_thinking(encoder), *limits),
            sampling,
            exchange,
            lambda: release_memory(shared.encoders, shared.cache),
        )
        # A signal is passed on to the student, which decides when to end.
        with interruption.protected():
            try:
                return ranks.serve()
            except StopRequested:
                # The student has left in the middle of an answer that nobody waits for any more.
                return link.exit_reason() or DONE


class _HasStudentLeft:
    """Whether answers are still wanted; checks at most once per second, and stays true."""

    def __init__(self, link: PartitionLink) -> None:
        self._link = link
        self._next_check = 0.0
        self._has_left = False

    def __call__(self) -> bool:
        if not self._has_left and time.monotonic() >= self._next_check:
            self._has_left = self._link.exit_reason() is not None
            self._next_check = time.monotonic() + EXIT_CHECK_SECONDS
        return self._has_left


def _open_link(config: ParallelConfig, partition: JobPartition) -> PartitionLink:
    return PartitionLink(partition, 60 * config.timeout_minutes)


def _wait_for_teacher(link: PartitionLink) -> None:
    deadline = time.monotonic() + link.timeout_seconds
    while link.exit_reason() is None:
        if time.monotonic() > deadline:
            raise TeacherLostError(
                f"teacher: its ranks do not end, got no exit reason for {link.timeout_seconds:g} "
                "s, expected them to end with the student; the run is complete, so end the job"
            )
        time.sleep(POLL_SECONDS)


def _exit_reason(partition: JobPartition, error: BaseException) -> str:
    return f"rank {partition.job_rank}: {type(error).__name__}: {error}"
