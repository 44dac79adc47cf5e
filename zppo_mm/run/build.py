"""From a configuration to the parts of a run."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TypeVar, cast

from data.media.store import MediaStore
from data.stream import QuestionStream
from zppo_mm.algorithms.importance import Level, MismatchCorrection
from zppo_mm.bundled import STUDENT_DIR
from zppo_mm.config.schema import (
    ModelConfig,
    RolloutConfig,
    RunConfig,
    TeacherConfig,
)
from zppo_mm.interruption import Interruption
from zppo_mm.lora.adapters import add_lora
from zppo_mm.models.fusions import log_packages
from zppo_mm.models.vision_language import VisionLanguageModel
from zppo_mm.parallel import groups as parallel
from zppo_mm.parallel.exchange import Exchange, ParallelExchange
from zppo_mm.parallel.liveness_barrier import LivenessBarrier
from zppo_mm.parallel.partition import PartitionLink
from zppo_mm.rewards.verify import Verifier
from zppo_mm.rollout.feed import QuestionFeed
from zppo_mm.rollout.prefetch import MediaPrefetch
from zppo_mm.rollout.processor import describe
from zppo_mm.rollout.prompt import PromptEncoder
from zppo_mm.rollout.sampler import GroupSampler
from zppo_mm.rollout.served.engine import VllmEngine
from zppo_mm.run.judging import build_grading
from zppo_mm.run.parts import Run
from zppo_mm.run.profiler import StepProfiler
from zppo_mm.run.questions import build_held_out, build_stream, sample_health
from zppo_mm.run.remote import open_files
from zppo_mm.run.sampling import evaluation_sampling, training_sampling
from zppo_mm.run.served_engine import open_served_engine
from zppo_mm.run.shared import (
    Shared,
    load_model,
    media_limits,
    open_shared,
    student_limits,
)
from zppo_mm.run.teachers import Teachers, build_rewriters, build_teachers
from zppo_mm.run.thinking import log_generation_prefixes
from zppo_mm.run_folder import RunFolder
from zppo_mm.stages.overlap import Overlap
from zppo_mm.stages.stages import Stages
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

Part = TypeVar("Part", bound=Servers | VllmEngine | None)


def student_folder(model: ModelConfig) -> Path:
    """Return the Hugging Face folder that the student starts from."""
    return Path(model.student) if model.student else STUDENT_DIR


def build_run(
    config: RunConfig,
    link: PartitionLink | None = None,
    barrier: LivenessBarrier | None = None,
    interruption: Interruption | None = None,
    run_folder: RunFolder | None = None,
) -> Run:
    """Build the parts of a run; process groups must be initialised. Without success, what was
    opened until then is closed.

    Args:
        config: The run.
        link: To a teacher on ranks of its own, which is waited for.
        barrier: Where ranks wait for one another; `None` waits in collectives.
        interruption: Ends the run before its last step; `None` is nothing that could.
        run_folder: Takes the logs of servers that the run starts; `None` is the present folder.

    Raises:
        ZppoError: A model, its layout or a template cannot be used.
        DataError: A data source cannot be used.
    """
    interruption = interruption or Interruption()
    exchange = ParallelExchange(barrier, interruption.is_due)
    ranks = TeacherRanks(link, exchange) if link is not None else None
    with ExitStack() as opened:
        return _build(config, exchange, ranks, interruption, opened, run_folder)


def _build(
    config: RunConfig,
    exchange: ParallelExchange,
    ranks: TeacherRanks | None,
    interruption: Interruption,
    opened: ExitStack,
    run_folder: RunFolder | None,
) -> Run:
    """Build the parts; `opened` closes them until they are whole, then the run does."""
    folder = student_folder(config.model)
    media = MediaStore(media_limits(config.data, folder), open_files(config.remote))
    opened.callback(media.close)
    pool = _closing(opened, _teacher_pool(config, ranks, exchange, media))
    modes = (config.reward.judge, config.evaluation.judge)
    grading = build_grading(config, pool, exchange, modes, interruption.is_due)
    _closing(opened, grading.pool if grading.pool is not pool else None)
    verifier = grading.verifier
    opened.callback(verifier.close)
    shared = open_shared(config, media, verifier, exchange, opened)
    encoder = shared.student_encoder(folder)
    templates = load_templates(config.zone.templates, encoder.chat.special_tokens)
    student = load_model(config.model, config.parallel, folder, trainable=True)
    add_lora(student, config.lora, config.seed)
    teachers = build_teachers(shared, pool, templates, encoder, ranks)
    policy = _build_policy(config, student, teachers.network)
    _log_network(student, config.train.optimizer_state_dtype, shared.encoders, templates.closing)
    stream = build_stream(config, sample_health(config), media.files)
    feed = _build_feed(shared, stream, encoder, templates, verifier)
    served = open_served_engine(config, exchange, policy.model, folder, encoder, run_folder)
    engine = _closing(opened, served)
    own = engine or shared.engine(policy.model, *student_limits(config))
    sampler = GroupSampler(own, encoder, verifier, exchange)
    stages = _build_stages(
        shared, policy, sampler, encoder, templates, teachers, feed, interruption, grading.check
    )
    stages = _with_served_weights(stages, engine)
    grader = verifier.with_judge_mode(config.evaluation.judge)
    if ranks is not None:
        ranks.wait_until_ready()
    return Run(
        config=config,
        stages=stages,
        policy=policy,
        stream=stream,
        feed=feed,
        held_out=build_held_out(config, grader, media.files),
        evaluation_sampling=evaluation_sampling(config.evaluation, config.rollout, encoder),
        media=media,
        cache=shared.cache,
        clips=shared.clips,
        verifier=verifier,
        encoders=shared.encoders,
        teachers=teachers,
        evaluation_sampler=sampler.with_grader(grader),
        pools=_once(pool, grading.pool, *teachers.pools),
        judge=grading.judge,
        engine=engine,
        profiler=StepProfiler(config.observability.profile_steps, run_folder or RunFolder(Path())),
        opened=opened.pop_all(),
    )


def _closing(opened: ExitStack, part: Part) -> Part:
    """Have a part, where there is one, closed with what was opened; returns it."""
    if part is not None:
        opened.callback(part.close)
    return part


def _with_served_weights(stages: Stages, engine: VllmEngine | None) -> Stages:
    """Return stages that send the servers, if there are any, the trained weights."""
    if engine is None:
        return stages
    update: Callable[[int], None] = engine.update_weights
    if stages.overlap is not None:
        update = stages.overlap.before_update(update)
    return replace(stages, update_weights=update)


def _build_policy(
    config: RunConfig, student: VisionLanguageModel, teacher: VisionLanguageModel | None
) -> Policy:
    objective = _build_objective(config, student, teacher)
    return Policy(student, config.train, config.parallel, objective)


def _log_network(
    student: VisionLanguageModel,
    moments_dtype: str,
    encoders: Sequence[PromptEncoder],
    closing: str,
) -> None:
    log_part_sizes(student, moments_dtype)
    log_packages(student)
    processor = encoders[0].processor
    if processor is not None and parallel.rank() == 0:
        logger.info("media: %s", describe(processor))
    log_generation_prefixes(encoders, closing)


def _teacher_pool(
    config: RunConfig, ranks: TeacherRanks | None, exchange: ParallelExchange, media: MediaStore
) -> Servers | None:
    if ranks is not None:
        return ranks.open_pool(config.teacher, config.rollout.max_batch_size)
    return open_pool(config.teacher, exchange, limits=media.limits, files=media.files)


def _build_stages(
    shared: Shared,
    policy: Policy,
    sampler: GroupSampler,
    encoder: PromptEncoder,
    templates: PromptTemplates,
    teachers: Teachers,
    feed: QuestionFeed,
    interruption: Interruption,
    check_grading: Callable[[], None],
) -> Stages:
    config = shared.config
    compressor, hints = build_rewriters(config.teacher, encoder, teachers.rewrites, templates)
    return Stages(
        seed=config.seed,
        num_new_questions=config.train.num_new_questions,
        num_rollouts=config.rollout.num_rollouts,
        advantage_normalization=config.algorithm.advantage_normalization,
        zone=config.zone,
        distill=config.distill,
        feed=feed,
        replay=ReplayBuffer(config.zone.buffer_capacity),
        sampler=sampler,
        sampling=training_sampling(config.rollout, encoder),
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
        learner=Learner(
            policy,
            encoder,
            config.train,
            config.seed,
            temperature=config.rollout.temperature,
            correction=mismatch_correction(config),
            averages_questions=config.distill.source == "teacher",
        ),
        schedule=_plain_schedule(config.teacher, config.rollout, config.seed),
        interruption=interruption,
        check_grading=check_grading,
        waited=lambda: shared.exchange.waits.seconds + policy.waits.seconds,
        overlap=build_overlap(config, sampler, feed.stream, shared.exchange, interruption),
    )


def build_overlap(
    config: RunConfig,
    sampler: GroupSampler,
    stream: QuestionStream,
    exchange: Exchange,
    interruption: Interruption,
) -> Overlap | None:
    """Return what starts the plain rollouts of the next step; `None` in an on-policy run."""
    rollout = config.rollout
    if not rollout.max_staleness:
        return None
    last_step = config.train.train_iters
    return Overlap(sampler, stream, exchange, interruption, last_step, rollout.partial_rollouts)


def mismatch_correction(config: RunConfig) -> MismatchCorrection:
    """Return what is done about the difference between sampler and trained network."""
    algorithm = config.algorithm
    return MismatchCorrection(
        level=cast(Level, algorithm.importance_level),
        cap=algorithm.largest_weight(config.rollout.engine),
        rejection_bound=algorithm.rejection_bound,
        rejection_token_bound=algorithm.rejection_token_bound,
    )


def _build_feed(
    shared: Shared,
    stream: QuestionStream,
    encoder: PromptEncoder,
    templates: PromptTemplates,
    verifier: Verifier,
) -> QuestionFeed:
    data = shared.config.data
    prefetch = None
    if data.prefetch_media and shared.cache is not None:
        prefetch = MediaPrefetch(encoder.media.prefetch, data.num_decode_workers)
        shared.opened.callback(prefetch.close)
    return QuestionFeed(
        stream,
        encoder,
        stream.health,
        shared.exchange,
        plain_text=templates.plain_text,
        max_prompt_tokens=data.max_prompt_tokens,
        can_grade=verifier.can_grade,
        prefetch=prefetch,
    )


def _once(*pools: Servers | None) -> tuple[Servers, ...]:
    """Return those that are there, each once."""
    return tuple({id(pool): pool for pool in pools if pool is not None}.values())


def _build_objective(
    config: RunConfig, student: VisionLanguageModel, teacher: VisionLanguageModel | None
) -> Objective:
    """Return the training objective; a teacher without a network here returns its log-probs with
    its answers.
    """
    group, temperature = parallel.tensor_group(), config.rollout.temperature
    if config.distill.source == "none":
        return PolicyObjective(config.algorithm, temperature, group)
    if teacher is not None:
        check_networks(student, teacher, config.train.share_prompts)
    return DistillationObjective(teacher, config.distill.top_k, temperature, group)


def _plain_schedule(teacher: TeacherConfig, rollout: RolloutConfig, seed: int) -> PlainSchedule:
    """Return how plain prompts are divided: where the teacher answers meanwhile, into waves that
    all replicas decode at once.
    """
    if not (teacher.endpoints or teacher.num_ranks):
        return PlainSchedule(seed)
    size = max(1, rollout.max_batch_size // rollout.num_rollouts)
    return PlainSchedule(seed, size, parallel.num_replicas())
