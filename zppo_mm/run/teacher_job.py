"""A job whose last ranks are the teacher's: what those do, and how the student's ranks begin and
end beside them.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator

from data.media.store import MediaStore
from zppo_mm.config.schema import RunConfig
from zppo_mm.interruption import Interruption, RunStopped, StopRequested
from zppo_mm.observability.logs import configure_logging
from zppo_mm.parallel import groups as parallel
from zppo_mm.parallel.exchange import ParallelExchange
from zppo_mm.parallel.meetings import Meetings, open_meetings
from zppo_mm.parallel.partition import JobPartition, teacher_layout
from zppo_mm.run.shared import Shared, media_limits, release_memory
from zppo_mm.run.teachers import megatron_teacher
from zppo_mm.teacher.rank_channel import DONE, POLL_SECONDS, Channel
from zppo_mm.teacher.rank_server import LeaveToStudent, TeacherServer
from zppo_mm.teacher.teacher import TeacherLostError
from zppo_mm.zone.prompts import load_templates

logger = logging.getLogger(__name__)

STOPPED = "stopped after step "
LOOK_SECONDS = 1.0


def serve_teacher(
    config: RunConfig, world: JobPartition, interruption: Interruption | None = None
) -> None:
    """Load the teacher and answer until the student has ended; every rank of the teacher's world
    calls this.

    One that fails tells the student first and lets it save: a launcher ends all other processes as
    soon as one has failed.

    Raises:
        RunStopped: The student was ended before its last step.
    """
    configure_logging(None, world.job_rank)
    interruption = interruption or Interruption()
    channel = _open_channel(config, world)
    try:
        with parallel.explain_lost_rank():
            parallel.initialize(teacher_layout(config.teacher, config.parallel), config.seed, world)
            parallel.end_with_launcher()
            with open_meetings(config.parallel, world, interruption) as meetings:
                word = _serve(config, channel, meetings, interruption)
            parallel.shutdown()
    except Exception as error:
        channel.leave(_say(world, error))
        # A store that is gone went with the student's first rank.
        with contextlib.suppress(RuntimeError):
            while channel.last_word() is None and not channel.is_other_silent():
                time.sleep(POLL_SECONDS)
        raise
    channel.leave()
    if word.startswith(STOPPED):
        raise RunStopped(int(word.removeprefix(STOPPED)), "as the student")
    if word != DONE:
        logger.warning("the teacher ends because the student does: %s", word)


@contextlib.contextmanager
def reach_teacher(config: RunConfig, world: JobPartition | None) -> Iterator[Channel | None]:
    """Hold the channel to the teacher's ranks; when the student ends, well or not, they are told.

    Raises:
        TeacherLostError: The student is through, but the teacher's ranks do not end.
    """
    if world is None:
        yield None
        return
    channel = _open_channel(config, world)
    stopped: RunStopped | None = None
    try:
        yield channel
    except RunStopped as error:
        stopped = error
    except BaseException as error:
        channel.leave(_say(world, error))
        raise
    channel.leave(DONE if stopped is None else f"{STOPPED}{stopped.step}")
    if world.rank == 0:  # it may hold the store, from which the teacher hears that it can end
        _wait_for_teacher(channel, 60 * config.parallel.timeout_minutes)
    if stopped is not None:
        raise stopped


def _serve(
    config: RunConfig, channel: Channel, meetings: Meetings | None, interruption: Interruption
) -> str:
    media = MediaStore(media_limits(config.data))
    try:
        shared = Shared(
            config, media, LeaveToStudent(), ParallelExchange(meetings, _HasStudentLeft(channel))
        )
        layout = teacher_layout(config.teacher, config.parallel)
        teacher = megatron_teacher(
            shared, config.teacher, layout, load_templates(config.zone.templates)
        )
        at_once = shared.exchange.num_replicas * max(
            1, config.rollout.max_batch_size // config.teacher.num_rollouts
        )
        server = TeacherServer(
            channel,
            teacher,
            shared.exchange,
            judge_max_tokens=config.reward.judge_max_tokens,
            num_at_once=at_once,
            release_memory=lambda: release_memory(shared.encoders),
        )
        # A signal is passed on to the student, which decides when to end.
        with interruption.protected():
            try:
                return server.serve()
            except StopRequested:
                # The student has left in the middle of an answer that nobody waits for any more.
                return channel.last_word() or DONE
    finally:
        media.close()


class _HasStudentLeft:
    """Whether answers are still wanted; looks at the store at most once per second, and stays
    true.
    """

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._next_look = 0.0
        self._has_left = False

    def __call__(self) -> bool:
        if not self._has_left and time.monotonic() >= self._next_look:
            self._has_left = self._channel.last_word() is not None
            self._next_look = time.monotonic() + LOOK_SECONDS
        return self._has_left


def _open_channel(config: RunConfig, world: JobPartition) -> Channel:
    other = "teacher" if world.name == "student" else "student"
    return Channel(
        world.store,
        world.name,
        other,
        silence_seconds=60 * config.parallel.timeout_minutes,
        beats=world.rank == 0,
    )


def _wait_for_teacher(channel: Channel, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while channel.last_word() is None:
        if time.monotonic() > deadline:
            raise TeacherLostError(
                f"teacher: its ranks do not end, got no word from them for {seconds:g} s, expected "
                "them to end with the student; the run is complete, so end the job"
            )
        time.sleep(POLL_SECONDS)


def _say(world: JobPartition, error: BaseException) -> str:
    return f"rank {world.job_rank}: {type(error).__name__}: {error}"
