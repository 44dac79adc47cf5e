"""From a configuration to the parts of a run."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import cast

from data.health import SampleHealth
from data.media.store import MediaStore
from data.shards import ShardFolder
from data.stream import QuestionStream
from zppo_mm.algorithms.importance import Level, MismatchCorrection
from zppo_mm.bundled import STUDENT_DIR
from zppo_mm.bundled.questions import bundled_sources
from zppo_mm.config.schema import (
    AlgorithmConfig,
    DistillConfig,
    EvaluationConfig,
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
from zppo_mm.parallel.exchange import ParallelExchange
from zppo_mm.parallel.liveness_barrier import LivenessBarrier
from zppo_mm.parallel.partition import PartitionLink
from zppo_mm.rewards.verify import Verifier
from zppo_mm.rollout.engine import SamplingParams
from zppo_mm.rollout.feed import QuestionFeed
from zppo_mm.rollout.held_out import HeldOut, held_out_questions
from zppo_mm.rollout.prefetch import MediaPrefetch
from zppo_mm.rollout.processor import describe
from zppo_mm.rollout.prompt import PromptEncoder
from zppo_mm.rollout.sampler import GroupSampler
from zppo_mm.run.judging import build_judging, build_verifier
from zppo_mm.run.parts import Run
from zppo_mm.run.shared import (
    Shared,
    load_model,
    media_limits,
    open_media_cache,
    student_limits,
)
from zppo_mm.run.teachers import Teachers, build_rewriters, build_teachers
from zppo_mm.run.thinking import log_generation_prefixes
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


def student_folder(model: ModelConfig) -> Path:
    """Return the Hugging Face folder that the student starts from."""
    return Path(model.student) if model.student else STUDENT_DIR


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
    folder = student_folder(config.model)
    media = MediaStore(media_limits(config.data, folder))
    interruption = interruption or Interruption()
    exchange = ParallelExchange(barrier, interruption.is_due)
    ranks = TeacherRanks(link, exchange) if link is not None else None
    pool = _teacher_pool(config, ranks, exchange, media)
    modes = (config.reward.judge, config.evaluation.judge)
    judging = build_judging(config, pool, exchange, modes, interruption.is_due)
    verifier = build_verifier(config.reward, judging.judge, config.reward.judge)
    shared = Shared(config, media, verifier, exchange, open_media_cache(config.data))
    encoder = shared.encoder(folder, config.model.chat_template_kwargs)
    templates = load_templates(config.zone.templates, encoder.chat.special_tokens)
    student = load_model(config.model, config.parallel, folder, trainable=True)
    add_lora(student, config.lora, config.seed)
    teachers = build_teachers(shared, pool, templates, encoder, ranks)
    objective = _build_objective(
        config.algorithm,
        config.distill,
        config.rollout.temperature,
        student,
        teachers.network,
        config.train.share_prompts,
    )
    policy = Policy(student, config.train, config.parallel, objective)
    _log_network(student, config.train.optimizer_state_dtype)
    if encoder.processor is not None and parallel.rank() == 0:
        logger.info("media: %s", describe(encoder.processor))
    stream = build_stream(config, SampleHealth(config.data.max_bad_fraction, config.data.strict))
    feed = _build_feed(shared, stream, encoder, templates, verifier)
    sampler = shared.sampler(policy.model, encoder, *student_limits(config))
    stages = _build_stages(
        shared, policy, sampler, encoder, templates, teachers, feed, interruption, judging.check
    )
    grader = verifier.with_judge_mode(config.evaluation.judge)
    log_generation_prefixes(shared.encoders, templates.closing)
    if ranks is not None:
        ranks.wait_until_ready()
    return Run(
        config=config,
        stages=stages,
        policy=policy,
        stream=stream,
        feed=feed,
        held_out=_held_out(config, grader),
        evaluation_sampling=evaluation_sampling(config.evaluation, config.rollout, encoder),
        media=media,
        cache=shared.cache,
        verifier=verifier,
        encoders=shared.encoders,
        teachers=teachers,
        evaluation_sampler=sampler.with_grader(grader),
        pools=_once(pool, judging.pool, *teachers.pools),
        judge=judging.judge,
    )


def _log_network(student: VisionLanguageModel, moments_dtype: str) -> None:
    log_part_sizes(student, moments_dtype)
    log_packages(student)


def _teacher_pool(
    config: RunConfig, ranks: TeacherRanks | None, exchange: ParallelExchange, media: MediaStore
) -> Servers | None:
    if ranks is not None:
        return ranks.open_pool(config.teacher, config.rollout.max_batch_size)
    return open_pool(config.teacher, exchange, limits=media.limits)


def _build_stages(
    shared: Shared,
    policy: Policy,
    sampler: GroupSampler,
    encoder: PromptEncoder,
    templates: PromptTemplates,
    teachers: Teachers,
    feed: QuestionFeed,
    interruption: Interruption,
    check_judge: Callable[[], None],
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
        check_judge=check_judge,
    )


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
    prefetches = data.prefetch_media and shared.cache is not None
    return QuestionFeed(
        stream,
        encoder,
        stream.health,
        shared.exchange,
        plain_text=templates.plain_text,
        max_prompt_tokens=data.max_prompt_tokens,
        can_grade=verifier.can_grade,
        prefetch=MediaPrefetch(encoder.media.prefetch, data.num_decode_workers)
        if prefetches
        else None,
    )


def _once(*pools: Servers | None) -> tuple[Servers, ...]:
    """Return those that are there, each once."""
    return tuple({id(pool): pool for pool in pools if pool is not None}.values())


def _build_objective(
    algorithm: AlgorithmConfig,
    distill: DistillConfig,
    temperature: float,
    student: VisionLanguageModel,
    teacher: VisionLanguageModel | None,
    share_prompts: str,
) -> Objective:
    """Return the training objective; a teacher without a network here returns its log-probs with
    its answers.
    """
    group = parallel.tensor_group()
    if distill.source == "none":
        return PolicyObjective(algorithm, temperature, group)
    if teacher is not None:
        check_networks(student, teacher, share_prompts)
    return DistillationObjective(teacher, distill.top_k, temperature, group)


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


def _plain_schedule(teacher: TeacherConfig, rollout: RolloutConfig, seed: int) -> PlainSchedule:
    """Return how plain prompts are divided: where the teacher answers meanwhile, into waves that
    all replicas decode at once.
    """
    if not (teacher.endpoints or teacher.num_ranks):
        return PlainSchedule(seed)
    size = max(1, rollout.max_batch_size // rollout.num_rollouts)
    return PlainSchedule(seed, size, parallel.num_replicas())


def training_sampling(rollout: RolloutConfig, encoder: PromptEncoder) -> SamplingParams:
    """Return how the student samples while it trains."""
    return SamplingParams(
        temperature=rollout.temperature,
        top_p=rollout.top_p,
        top_k=rollout.top_k,
        max_new_tokens=rollout.max_response_tokens,
        stop_token_ids=encoder.stop_token_ids,
    )


def evaluation_sampling(
    evaluation: EvaluationConfig, rollout: RolloutConfig, encoder: PromptEncoder
) -> SamplingParams:
    """Return how evaluations sample: responses end as in training."""
    return replace(
        training_sampling(rollout, encoder),
        temperature=evaluation.temperature,
        top_p=evaluation.top_p,
        top_k=evaluation.top_k,
        min_p=evaluation.min_p,
        presence_penalty=evaluation.presence_penalty,
    )
