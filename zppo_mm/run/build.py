"""From a configuration to the parts of a run."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from data.health import SampleHealth
from data.media.store import MediaStore
from data.shards import ShardFolder
from data.stream import QuestionStream
from zppo_mm.bundled import STUDENT_DIR
from zppo_mm.bundled.questions import bundled_sources
from zppo_mm.config.schema import RunConfig
from zppo_mm.interruption import Interruption
from zppo_mm.lora.adapters import add_lora
from zppo_mm.models.vision_language import VisionLanguageModel
from zppo_mm.observability.metrics import StepMetrics, Sum
from zppo_mm.parallel import groups as parallel
from zppo_mm.parallel.exchange import ParallelExchange
from zppo_mm.parallel.liveness_barrier import LivenessBarrier
from zppo_mm.parallel.partition import PartitionLink
from zppo_mm.rewards.judge import LlmJudge
from zppo_mm.rewards.verify import Verifier
from zppo_mm.rollout.engine import SamplingParams
from zppo_mm.rollout.feed import QuestionFeed
from zppo_mm.rollout.held_out import HeldOut, held_out_questions
from zppo_mm.rollout.prompt import PromptEncoder
from zppo_mm.run.shared import Shared, load_model, media_limits, release_memory
from zppo_mm.run.teachers import Teachers, build_judge, build_rewriters, build_teachers, judge_pool
from zppo_mm.step import Stages
from zppo_mm.teacher.served.connect import open_pool
from zppo_mm.teacher.served.servers import Servers
from zppo_mm.teacher.served.teacher_ranks import TeacherRanks
from zppo_mm.training.distillation import DistillationObjective, check_networks
from zppo_mm.training.learner import Learner
from zppo_mm.training.objective import Objective, PolicyObjective
from zppo_mm.training.policy import Policy
from zppo_mm.training.trainable import log_part_sizes
from zppo_mm.zone.plain_schedule import PlainSchedule
from zppo_mm.zone.prompts import PromptTemplates, load_templates
from zppo_mm.zone.reformulate import Reformulator
from zppo_mm.zone.replay import ReplayBuffer
from zppo_mm.zone.selection import Selection

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Run:
    """The parts of a run that the loop needs.

    Attributes:
        stages: What a step is made of.
        stream: Where new questions come from, for its state.
        held_out: Questions of every evaluation; none turns evaluation off.
        evaluation_sampling: How they are answered.
        media: Opens and decodes media.
        verifier: Grades.
        encoders: Of the student and then the teacher; they keep opened media.
        teachers: Those who help.
        pools: Servers of the teachers and, if they are others, of the judge.
        judge: Of open questions.
        counted: Losses that `take_losses` has handed out, by metric.
    """

    stages: Stages
    stream: QuestionStream
    held_out: HeldOut
    evaluation_sampling: SamplingParams
    media: MediaStore
    verifier: Verifier
    encoders: list[PromptEncoder]
    teachers: Teachers
    pools: tuple[Servers, ...] = ()
    judge: LlmJudge | None = None
    counted: dict[str, int] = field(default_factory=dict)

    @property
    def templates(self) -> PromptTemplates:
        """Texts of the prompts."""
        return self.stages.reformulator.templates

    @property
    def encoder(self) -> PromptEncoder:
        """The student's."""
        return self.encoders[0]

    @property
    def policy(self) -> Policy:
        """The student that is trained."""
        return self.stages.learner.policy

    def take_losses(self) -> StepMetrics:
        """Return what grading lost and what went to and fro with servers on this rank since the
        last call.
        """
        metrics = StepMetrics()
        counts = Counter(
            {
                "reward/timeouts": self.verifier.num_timeouts,
                "reward/errors": self.verifier.num_errors,
            }
        )
        counts.update(
            {
                f"reward/{name}": count
                for name, count in (self.judge.counts if self.judge else Counter[str]()).items()
            }
        )
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

    def release_memory(self) -> None:
        """Drop the opened media of a step, which the next one does not ask for again."""
        release_memory(self.encoders)

    def close(self) -> None:
        """End the worker processes and the connections."""
        for pool in self.pools:
            pool.close()
        self.media.close()
        self.verifier.close()


def student_folder(config: RunConfig) -> Path:
    """Return the Hugging Face folder that the student starts from."""
    return Path(config.model.student) if config.model.student else STUDENT_DIR


def build_run(
    config: RunConfig,
    link: PartitionLink | None = None,
    barrier: LivenessBarrier | None = None,
    interruption: Interruption | None = None,
) -> Run:
    """Build the parts of a run; process groups must be initialised.

    Args:
        config: The run.
        link: To a teacher on ranks of its own, which is waited for.
        barrier: Where ranks wait for one another; `None` waits in collectives.
        interruption: Ends the run before its last step; `None` is nothing that could.

    Raises:
        ZppoError: A model, its layout or a template cannot be used.
        DataError: A data source cannot be used.
    """
    media = MediaStore(media_limits(config.data))
    interruption = interruption or Interruption()
    exchange = ParallelExchange(barrier, interruption.is_due)
    ranks = TeacherRanks(link, exchange) if link is not None else None
    pool = (
        ranks.open_pool(config.teacher, config.rollout.max_batch_size)
        if ranks is not None
        else open_pool(config.teacher, exchange, limits=media.limits)
    )
    judges = judge_pool(config.reward, config.teacher, pool, exchange)
    judge = build_judge(config, judges, interruption.is_due)
    reward = config.reward
    verifier = Verifier(reward.timeout_seconds, reward.num_workers, judge, reward.budget_seconds)
    shared = Shared(config, media, verifier, exchange)
    encoder = shared.encoder(student_folder(config))
    templates = load_templates(config.zone.templates, encoder.chat.special_tokens)
    student = load_model(config.model, config.parallel, student_folder(config), trainable=True)
    add_lora(student, config.lora, config.seed)
    teachers = build_teachers(shared, pool, templates, encoder, ranks)
    policy = Policy(
        student, config.train, config.parallel, _build_objective(config, student, teachers.network)
    )
    log_part_sizes(student)
    compressor, hints = build_rewriters(config.teacher, encoder, teachers.rewrites)
    sampler = shared.sampler(student, encoder)
    stream = build_stream(config, SampleHealth(config.data.max_bad_fraction, config.data.strict))
    stages = Stages(
        config=config,
        interruption=interruption,
        feed=QuestionFeed(
            stream,
            encoder,
            stream.health,
            shared.exchange,
            plain_text=templates.plain_text,
            max_prompt_tokens=config.data.max_prompt_tokens,
            can_grade=verifier.can_grade,
        ),
        replay=ReplayBuffer(config.zone.buffer_capacity),
        sampler=sampler,
        sampling=_sampling(config, encoder),
        teacher=teachers.answers,
        reformulator=Reformulator(
            templates,
            config.zone,
            config.seed,
            compressor,
            hints=hints,
            student_ids=encoder.response_ids,
        ),
        selection=Selection(
            config.zone,
            config.distill,
            config.seed,
            student_ids=encoder.response_ids,
            adopt=sampler.adopt,
            plain_text=templates.plain_text,
        ),
        learner=_build_learner(config, policy, encoder),
        schedule=_plain_schedule(config),
    )
    held_out, answered = _held_out(config, verifier), evaluation_sampling(config, encoder)
    pools = _once(pool, judges, *teachers.pools)
    if ranks is not None:
        ranks.wait_until_ready()
    return Run(
        stages, stream, held_out, answered, media, verifier, shared.encoders, teachers, pools, judge
    )


def _build_learner(config: RunConfig, policy: Policy, encoder: PromptEncoder) -> Learner:
    temperature, cap = config.rollout.temperature, config.algorithm.importance_cap
    return Learner(
        policy, encoder, config.train, config.seed, temperature=temperature, importance_cap=cap
    )


def _once(*pools: Servers | None) -> tuple[Servers, ...]:
    """Return those that are there, each once."""
    return tuple({id(pool): pool for pool in pools if pool is not None}.values())


def _build_objective(
    config: RunConfig, student: VisionLanguageModel, teacher: VisionLanguageModel | None
) -> Objective:
    """Return what is descended; a teacher without a network here has told its log-probs with its
    answers.
    """
    temperature, group = config.rollout.temperature, parallel.tensor_group()
    if config.distill.source == "none":
        return PolicyObjective(config.algorithm, temperature, group)
    if teacher is not None:
        check_networks(student, teacher, config.train.share_prompts)
    return DistillationObjective(teacher, config.distill.top_k, temperature, group)


def build_stream(config: RunConfig, health: SampleHealth) -> QuestionStream:
    """Return the run's training questions from the first on, its bad samples counted by `health`;
    every rank calls this.

    Raises:
        DataError: A data source cannot be used.
    """
    sources = config.data.train or bundled_sources(config, "train")
    return QuestionStream(
        [(ShardFolder(source.path), source.weight) for source in sources], config.seed, health
    )


def _held_out(config: RunConfig, verifier: Verifier) -> HeldOut:
    """Return the questions of every evaluation; without held-out data of their own, a user's
    questions are not evaluated.
    """
    if config.data.train and not config.data.held_out:
        logger.warning(
            "data.held_out is empty: this run trains without evaluation; name a folder of held-out "
            "shards to have one"
        )
        return HeldOut()
    sources = config.data.held_out or bundled_sources(config, "held_out")
    folders = [ShardFolder(source.path) for source in sources]
    health = SampleHealth(config.data.max_bad_fraction, config.data.strict)
    chosen = held_out_questions(
        folders, config.evaluation.num_questions, config.seed, health, verifier.can_grade
    )
    if chosen.num_skipped:
        logger.warning(
            "left out %d of %d held-out questions: %s",
            chosen.num_skipped,
            len(chosen) + chosen.num_skipped,
            health.counts,
        )
    return chosen


def _plain_schedule(config: RunConfig) -> PlainSchedule:
    """Return how plain prompts are divided: where the teacher answers meanwhile, into waves that
    all replicas decode at once.
    """
    if not (config.teacher.endpoints or config.teacher.num_ranks):
        return PlainSchedule(config.seed)
    size = max(1, config.rollout.max_batch_size // config.rollout.num_rollouts)
    return PlainSchedule(config.seed, size, parallel.num_replicas())


def _sampling(config: RunConfig, encoder: PromptEncoder) -> SamplingParams:
    return SamplingParams(
        temperature=config.rollout.temperature,
        top_p=config.rollout.top_p,
        top_k=config.rollout.top_k,
        max_new_tokens=config.rollout.max_response_tokens,
        stop_token_ids=encoder.stop_token_ids,
    )


def evaluation_sampling(config: RunConfig, encoder: PromptEncoder) -> SamplingParams:
    """Return how evaluations sample."""
    return SamplingParams(
        temperature=config.evaluation.temperature,
        top_p=config.evaluation.top_p,
        top_k=config.evaluation.top_k,
        min_p=config.evaluation.min_p,
        presence_penalty=config.evaluation.presence_penalty,
        max_new_tokens=config.rollout.max_response_tokens,
        stop_token_ids=encoder.stop_token_ids,
    )
