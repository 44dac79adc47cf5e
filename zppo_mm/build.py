"""From a configuration to the parts of a run."""

from __future__ import annotations

import ctypes
import logging
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

from data.health import SampleHealth
from data.media import Frames, MediaLimits, MediaOpener
from data.question import MediaRef
from data.shards import ShardFolder, ShardReader
from data.stream import QuestionStream
from zppo_mm.config import DataConfig, ModelConfig, ParallelConfig, RunConfig
from zppo_mm.embedded import STUDENT_DIR, TEACHER_DIR
from zppo_mm.embedded.questions import embedded_sources
from zppo_mm.evaluate import HeldOut, held_out_questions
from zppo_mm.models import parallel
from zppo_mm.models.architecture import load_architecture
from zppo_mm.models.lora import add_lora
from zppo_mm.models.provider import build_model
from zppo_mm.models.vision_language import VisionLanguageModel
from zppo_mm.models.weights import load_hf_weights
from zppo_mm.observability.metrics import StepMetrics, Sum
from zppo_mm.rewards.judge import LlmJudge, load_judge_template
from zppo_mm.rewards.verify import Verifier
from zppo_mm.rollout.engine import SamplingParams
from zppo_mm.rollout.exchange import ParallelExchange
from zppo_mm.rollout.feed import QuestionFeed
from zppo_mm.rollout.megatron_engine import MegatronEngine
from zppo_mm.rollout.prompt import PromptEncoder
from zppo_mm.rollout.sampler import GroupSampler
from zppo_mm.step import Stages
from zppo_mm.teacher.compress import RuleCompressor, TeacherCompressor, load_compression_template
from zppo_mm.teacher.connect import open_pool
from zppo_mm.teacher.endpoint_pool import EndpointPool
from zppo_mm.teacher.media_parts import MessageWriter
from zppo_mm.teacher.megatron_teacher import MegatronTeacher
from zppo_mm.teacher.served_judge import greedy_replies
from zppo_mm.teacher.served_teacher import ServedTeacher
from zppo_mm.teacher.teacher import Compressor, Teacher
from zppo_mm.training.learner import Learner
from zppo_mm.training.objective import PolicyObjective
from zppo_mm.training.policy import Policy
from zppo_mm.training.trainable import log_part_sizes
from zppo_mm.zone.prompts import PromptTemplates, load_templates
from zppo_mm.zone.reformulate import Reformulator
from zppo_mm.zone.replay import ReplayBuffer

logger = logging.getLogger(__name__)


class MediaStore:
    """Opens any media reference of the run's shards."""

    def __init__(self, config: DataConfig) -> None:
        self._reader = ShardReader()
        self._opener = MediaOpener(
            MediaLimits(
                max_bytes=config.max_media_bytes,
                max_pixels=config.max_media_pixels,
                frames_per_second=config.video_frames_per_second,
                max_frames=config.video_max_frames,
                decode_timeout_seconds=config.decode_timeout_seconds,
                num_workers=config.num_decode_workers,
            )
        )

    def open(self, ref: MediaRef) -> Frames:
        """Return the sampled frames of a media file."""
        return self._opener.open_ref(ref, self._reader)

    def read(self, ref: MediaRef) -> bytes:
        """Return a media file as it is, within the size limit."""
        return self._opener.read_ref(ref, self._reader)

    def close(self) -> None:
        """End the decoding workers and close the shards."""
        self._opener.close()
        self._reader.close()


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
        pools: Servers of the teacher and, if they are others, of the judge.
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
    pools: tuple[EndpointPool, ...] = ()
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
        """Return what grading lost and what went to and fro with servers on this rank since the last call."""
        metrics = StepMetrics()
        counts = Counter({"reward/timeouts": self.verifier.num_timeouts, "reward/errors": self.verifier.num_errors})
        counts.update({f"reward/{name}": count for name, count in (self.judge.counts if self.judge else Counter[str]()).items()})
        for pool in self.pools:
            counts.update({f"teacher/{name}": count for name, count in pool.counts.items()})
        for name, count in counts.items():
            metrics.add(name, Sum(count - self.counted.get(name, 0)))
            self.counted[name] = count
        return metrics

    def release_memory(self) -> None:
        """Drop the opened media of a step, which the next one does not ask for again, and give freed memory back to the system.

        glibc keeps what tensors of ever new sizes have freed, so that resident memory creeps up over a run although nothing is held.
        """
        for encoder in self.encoders:
            encoder.forget_media()
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)

    def close(self) -> None:
        """End the worker processes and the connections."""
        for pool in self.pools:
            pool.close()
        self.media.close()
        self.verifier.close()


@dataclass(frozen=True, slots=True)
class _Shared:
    """What student and teacher have in common."""

    config: RunConfig
    media: MediaStore
    verifier: Verifier
    exchange: ParallelExchange
    pool: EndpointPool | None
    encoders: list[PromptEncoder] = field(default_factory=list)

    def encoder(self, folder: Path) -> PromptEncoder:
        encoder = PromptEncoder(folder, self.media.open)
        self.encoders.append(encoder)
        return encoder

    def sampler(self, model: VisionLanguageModel, encoder: PromptEncoder) -> GroupSampler:
        engine = MegatronEngine(model, self.config.seed, self.config.rollout.max_batch_size)
        return GroupSampler(engine, encoder, self.verifier, self.exchange)


def student_folder(config: RunConfig) -> Path:
    """Return the Hugging Face folder that the student starts from."""
    return Path(config.model.student) if config.model.student else STUDENT_DIR


def build_run(config: RunConfig) -> Run:
    """Build the parts of a run; process groups must be initialised.

    Raises:
        ZppoError: A model, its layout or a template cannot be used.
        DataError: A data source cannot be used.
    """
    media = MediaStore(config.data)
    exchange = ParallelExchange()
    pool = open_pool(config.teacher, exchange)
    judge_pool = _judge_pool(config, pool, exchange)
    judge = _build_judge(config, judge_pool)
    verifier = Verifier(config.reward.timeout_seconds, config.reward.num_workers, judge)
    shared = _Shared(config, media, verifier, exchange, pool)
    encoder = shared.encoder(student_folder(config))
    templates = load_templates(config.zone.templates, encoder.chat.special_tokens)
    student = _load_model(config.model, config.parallel, student_folder(config), trainable=True)
    add_lora(student, config.lora, config.seed)
    objective = PolicyObjective(config.algorithm, config.rollout.temperature, parallel.tensor_group())
    policy = Policy(student, config.train, config.parallel, objective)
    log_part_sizes(student)
    teacher = _build_teacher(shared, templates, encoder)
    stream = build_stream(config, SampleHealth(config.data.max_bad_share, config.data.strict))
    stages = Stages(
        config=config,
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
        sampler=shared.sampler(student, encoder),
        sampling=_sampling(config, encoder),
        teacher=teacher if config.zone.bcq else None,
        reformulator=Reformulator(templates, config.zone, config.seed, _build_compressor(config, encoder, teacher)),
        learner=Learner(policy, encoder, config.train, config.seed),
    )
    held_out, answered = _held_out(config, verifier), _evaluation_sampling(config, encoder)
    pools = tuple({id(each): each for each in (pool, judge_pool) if each is not None}.values())
    return Run(stages, stream, held_out, answered, media, verifier, shared.encoders, pools, judge)


def _load_model(options: ModelConfig, layout: ParallelConfig, folder: Path, trainable: bool) -> VisionLanguageModel:
    model = build_model(load_architecture(folder), options, layout, trainable=trainable)
    load_hf_weights(model, folder)
    return model


def _build_teacher(shared: _Shared, templates: PromptTemplates, student: PromptEncoder) -> Teacher | None:
    """Load the teacher, or point to its servers, unless nothing in this configuration would ask it."""
    config = shared.config
    rewrites = config.teacher.compressor == "teacher" and (config.zone.bcq or config.zone.ncq)
    if not (config.zone.bcq or rewrites):
        return None
    if shared.pool is not None:
        return ServedTeacher(
            shared.pool,
            config.teacher,
            shared.exchange,
            shared.verifier,
            MessageWriter(config.teacher, shared.media.open, shared.media.read),
            plain_text=templates.plain_text,
            tokenize=lambda text: student.chat.tokenize([text]),
            seed=config.seed,
        )
    folder = Path(config.teacher.model) if config.teacher.model else TEACHER_DIR
    encoder = shared.encoder(folder)
    sampling = SamplingParams(
        temperature=config.teacher.temperature,
        max_new_tokens=config.teacher.max_response_tokens,
        stop_token_ids=encoder.stop_token_ids,
    )
    own = config.teacher
    options = replace(
        config.model,
        transformer_impl=own.transformer_impl or config.model.transformer_impl,
        params_dtype=own.params_dtype or config.model.params_dtype,
        fp8=own.fp8,
        recompute="none",
    )
    model = _load_model(options, config.parallel, folder, trainable=False)
    return MegatronTeacher(shared.sampler(model, encoder), sampling, config.teacher.num_rollouts, templates.plain_text)


def _judge_pool(config: RunConfig, teachers: EndpointPool | None, exchange: ParallelExchange) -> EndpointPool | None:
    """Return the judge's servers: the teacher's unless it has its own or another model."""
    reward = config.reward
    if not reward.judge or not (reward.judge_endpoints or reward.judge_model):
        return teachers if reward.judge else None
    return open_pool(config.teacher, exchange, reward.judge_endpoints, reward.judge_model)


def _build_judge(config: RunConfig, pool: EndpointPool | None) -> LlmJudge | None:
    if pool is None:
        return None
    template = load_judge_template(config.reward.judge_template)
    return LlmJudge(greedy_replies(pool, config.reward, config.teacher.num_retries), template)


def _build_compressor(config: RunConfig, encoder: PromptEncoder, teacher: Teacher | None) -> Compressor:
    """Candidates are counted in the student's tokens: the student reads them."""
    rule = RuleCompressor(encoder.chat.count_tokens, config.teacher.compression_max_tokens, config.teacher.compression_max_lines)
    if config.teacher.compressor == "rule" or teacher is None:
        return rule
    return TeacherCompressor(teacher.rewrite, rule, load_compression_template())


def build_stream(config: RunConfig, health: SampleHealth) -> QuestionStream:
    """Return the run's training questions from the first on, its bad samples counted by `health`; every rank calls this.

    Raises:
        DataError: A data source cannot be used.
    """
    sources = config.data.train or embedded_sources(config, "train")
    return QuestionStream([(ShardFolder(source.path), source.weight) for source in sources], config.seed, health)


def _held_out(config: RunConfig, verifier: Verifier) -> HeldOut:
    """Return the questions of every evaluation; without held-out data of their own, a user's questions are not evaluated."""
    if config.data.train and not config.data.held_out:
        logger.warning("data.held_out is empty: this run trains without evaluation; name a folder of held-out shards to have one")
        return HeldOut()
    sources = config.data.held_out or embedded_sources(config, "held_out")
    folders = [ShardFolder(source.path) for source in sources]
    health = SampleHealth(config.data.max_bad_share, config.data.strict)
    chosen = held_out_questions(folders, config.evaluation.num_questions, config.seed, health, verifier.can_grade)
    if chosen.num_skipped:
        logger.warning("left out %d of %d held-out questions: %s", chosen.num_skipped, len(chosen) + chosen.num_skipped, health.counts)
    return chosen


def _sampling(config: RunConfig, encoder: PromptEncoder) -> SamplingParams:
    return SamplingParams(
        temperature=config.rollout.temperature,
        top_p=config.rollout.top_p,
        top_k=config.rollout.top_k,
        max_new_tokens=config.rollout.max_response_tokens,
        stop_token_ids=encoder.stop_token_ids,
    )


def _evaluation_sampling(config: RunConfig, encoder: PromptEncoder) -> SamplingParams:
    return SamplingParams(
        temperature=config.evaluation.temperature,
        top_p=config.evaluation.top_p,
        top_k=config.evaluation.top_k,
        presence_penalty=config.evaluation.presence_penalty,
        max_new_tokens=config.rollout.max_response_tokens,
        stop_token_ids=encoder.stop_token_ids,
    )
