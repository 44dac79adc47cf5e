"""The parts of a run that the loop needs."""

from __future__ import annotations

from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from data.media.clip_cache import ClipCache
from data.media.node_cache import NodeCache
from data.media.store import MediaStore
from data.stream import QuestionStream
from zppo_mm.config.schema import RunConfig
from zppo_mm.observability.metrics import Max, StepMetrics, Sum
from zppo_mm.observability.rank_times import SlowRankWatch
from zppo_mm.observability.record_writer import RecordWriter
from zppo_mm.parallel import groups as parallel
from zppo_mm.rewards.judge import LlmJudge
from zppo_mm.rewards.verify import Verifier
from zppo_mm.rollout.engine import SamplingParams
from zppo_mm.rollout.feed import QuestionFeed
from zppo_mm.rollout.held_out import HeldOut
from zppo_mm.rollout.prompt import PromptEncoder
from zppo_mm.rollout.sampler import GroupSampler
from zppo_mm.rollout.served.engine import VllmEngine
from zppo_mm.run.profiler import StepProfiler
from zppo_mm.run.shared import release_memory
from zppo_mm.run.teachers import Teachers
from zppo_mm.stages.stages import Stages
from zppo_mm.teacher.served.servers import Servers
from zppo_mm.training.policy import Policy
from zppo_mm.zone.prompts import PromptTemplates


@dataclass(frozen=True, slots=True)
class Run:
    """The parts of a run that the loop needs.

    Attributes:
        config: The run as configured.
        stages: What a step is made of.
        policy: The student that is trained.
        stream: Where new questions come from, for its state.
        feed: Those of them that can be asked.
        held_out: Questions of every evaluation; none turns evaluation off.
        evaluation_sampling: How they are answered.
        evaluation_sampler: Samples them, and grades as evaluations do.
        media: Opens and decodes media.
        cache: Opened media that the ranks of this machine share.
        clips: Frames of videos that this machine's disk keeps.
        verifier: Grades.
        encoders: Of the student and then the teacher; they keep opened media.
        teachers: Those who help.
        profiler: Writes traces of steps.
        opened: Closes what the run has opened.
        pools: Servers of the teachers and, if they are others, of the judge.
        judge: Of what the rules leave open.
        engine: Samples elsewhere; `None` if the trained network does.
        counted: Losses that `take_losses` has handed out, by metric.
        sent: What `take_weight_counts` has handed out.
        slow_ranks: Warns of a rank that keeps the others waiting.
        records: Writes the records of steps, on rank 0.
    """

    config: RunConfig
    stages: Stages
    policy: Policy
    stream: QuestionStream
    feed: QuestionFeed
    held_out: HeldOut
    evaluation_sampling: SamplingParams
    media: MediaStore
    cache: NodeCache | None
    clips: ClipCache | None
    verifier: Verifier
    encoders: list[PromptEncoder]
    teachers: Teachers
    evaluation_sampler: GroupSampler
    profiler: StepProfiler
    opened: ExitStack
    pools: tuple[Servers, ...] = ()
    judge: LlmJudge | None = None
    engine: VllmEngine | None = None
    counted: dict[str, int] = field(default_factory=dict)
    sent: dict[str, float] = field(default_factory=dict)
    slow_ranks: SlowRankWatch = field(default_factory=SlowRankWatch)
    records: RecordWriter = field(default_factory=RecordWriter)

    @property
    def templates(self) -> PromptTemplates:
        """Texts of the prompts."""
        return self.stages.reformulator.templates

    @property
    def encoder(self) -> PromptEncoder:
        """The student's."""
        return self.encoders[0]

    def position(self) -> dict[str, Any]:
        """Return the stream's position before the questions of the next step that is not complete,
        as JSON values.
        """
        overlap = self.stages.overlap
        return self.stream.state_dict() if overlap is None else overlap.position()

    def check_teacher(self) -> None:
        """Check that a teacher on ranks of its own still runs.

        Raises:
            TeacherLostError: On every rank, if it does not.
        """
        if self.teachers.ranks is not None:
            self.teachers.ranks.check()

    def take_losses(self) -> StepMetrics:
        """Return what grading lost and what was exchanged with servers on this rank since the
        last call.
        """
        metrics = StepMetrics()
        counts = Counter(
            {
                "reward/timeouts": self.verifier.num_timeouts,
                "reward/errors": self.verifier.num_errors,
                "reward/function_errors": self.verifier.functions.num_errors,
            }
        )
        counts.update(
            {
                f"reward/{name}": count
                for name, count in (self.judge.counts if self.judge else Counter[str]()).items()
            }
        )
        if self.engine is not None:
            counts.update({f"rollout/{name}": n for name, n in self.engine.counts.items()})
        for pool in self.pools:
            counts.update({f"teacher/{name}": count for name, count in dict(pool.counts).items()})
        # Every rank knows of these, and what the replicas count is added up.
        if parallel.replica_rank() == 0:
            counts.update(
                {
                    "teacher/passed_on": self.teachers.num_passed_on,
                    "teacher/lost_rollouts": self.teachers.num_ungraded,
                }
            )
        for name, count in counts.items():
            metrics.add(name, Sum(count - self.counted.get(name, 0)))
            self.counted[name] = count
        return metrics

    def take_weight_counts(self) -> StepMetrics:
        """Return what this rank sent of weights since the last call."""
        metrics = StepMetrics()
        for name, count in (self.engine.weight_counts if self.engine else {}).items():
            metrics.add(f"weight_sync/{name}", Sum(count - self.sent.get(name, 0.0)))
            self.sent[name] = count
        return metrics

    def take_media_counts(self) -> StepMetrics:
        """Return how this rank came by remote files and opened media since the last call."""
        metrics = StepMetrics()
        for name, count in self.media.files.counts.items():
            metrics.add(f"remote/{name}", Sum(count - self.counted.get(f"remote/{name}", 0)))
            self.counted[f"remote/{name}"] = count
        caches = (
            ("media", self.cache, "cached_bytes"),
            ("video_cache", self.clips, "bytes"),
        )
        for group, cache, bytes_name in caches:
            if cache is None:
                continue
            for own, count in dict(cache.counts).items():
                name = f"{group}/{own}"
                metrics.add(name, Sum(count - self.counted.get(name, 0)))
                self.counted[name] = count
            metrics.add(f"{group}/{bytes_name}", Max(cache.num_bytes()))
        return metrics

    def release_memory(self) -> None:
        """Drop the opened media of a step, which the next one does not ask for again."""
        release_memory(self.encoders, self.cache)

    def close(self) -> None:
        """End the worker processes and the connections, and leave the shared media: all of them,
        even if one cannot be closed.
        """
        self.opened.close()
