"""What the models of a run have in common: media, grading, replicas, and how a model is built and
sampled from.
"""

from __future__ import annotations

import ctypes
import logging
import secrets
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from data.media.clip_cache import ClipCache
from data.media.node_cache import NodeCache
from data.media.opening import MediaLimits
from data.media.store import MediaStore
from zppo_mm.config.schema import DataConfig, ModelConfig, ParallelConfig, RunConfig
from zppo_mm.errors import ConfigError
from zppo_mm.models.decoding.cache_size import GIB
from zppo_mm.models.families.architecture import load_architecture
from zppo_mm.models.provider import build_model
from zppo_mm.models.vision_language import VisionLanguageModel
from zppo_mm.parallel import groups as parallel
from zppo_mm.parallel.exchange import ParallelExchange
from zppo_mm.rollout.chat_template import THINKING_SWITCH
from zppo_mm.rollout.grading import Grader
from zppo_mm.rollout.megatron_engine import MegatronEngine
from zppo_mm.rollout.processor import frame_sampling, processor_overrides, read_processor
from zppo_mm.rollout.prompt import PromptEncoder
from zppo_mm.rollout.sampler import GroupSampler
from zppo_mm.weights.mapping import load_hf_weights
from zppo_mm.zone.hard import count_of_fraction

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Shared:
    """What student and teachers have in common; `opened` closes what was opened for them."""

    config: RunConfig
    media: MediaStore
    verifier: Grader
    exchange: ParallelExchange
    cache: NodeCache | None = None
    clips: ClipCache | None = None
    encoders: list[PromptEncoder] = field(default_factory=list)
    opened: ExitStack = field(default_factory=ExitStack)

    def encoder(
        self,
        folder: Path,
        chat_template_kwargs: Mapping[str, object] | None = None,
        system_prompt: str = "",
    ) -> PromptEncoder:
        """Return a prompt encoder whose opened media are dropped with the others'."""
        encoder = PromptEncoder(
            folder,
            self.media.open,
            overrides=processor_overrides(self.config.data),
            chat_template_kwargs=chat_template_kwargs,
            system_prompt=system_prompt,
            cache=self.cache,
            clips=self.clips,
        )
        self.encoders.append(encoder)
        return encoder

    def student_encoder(self, folder: Path) -> PromptEncoder:
        """Return the student's prompt encoder."""
        model = self.config.model
        return self.encoder(folder, model.chat_template_kwargs, model.system_prompt)

    def without_thinking(self, encoder: PromptEncoder) -> PromptEncoder:
        """Return an encoder whose chat template turns reasoning off; the same one if it does so
        already, or cannot.
        """
        if encoder.chat.prefix.thinking == "closed" or not encoder.chat.can_switch_thinking:
            return encoder
        variables = {**encoder.chat_template_kwargs, THINKING_SWITCH: False}
        return self.encoder(encoder.folder, variables, encoder.system_prompt)

    def engine(
        self, model: VisionLanguageModel, max_prompt_tokens: int, max_response_tokens: int
    ) -> MegatronEngine:
        """Return an engine with a model's weights.

        Args:
            model: The network.
            max_prompt_tokens: Of the longest prompt that it is given.
            max_response_tokens: Of the longest response.

        Raises:
            ConfigError: The decoding cache has no room for the longest prompt and response.
        """
        rollout = self.config.rollout
        engine = MegatronEngine(
            model,
            self.config.seed,
            rollout.max_batch_size,
            should_stop=self.exchange.should_stop,
            cache_bytes=int(rollout.cache_memory_gib * GIB),
            max_prefill_patches=self.config.train.micro_batch_patches,
        )
        engine.check_longest(max_prompt_tokens, max_response_tokens)
        return engine

    def sampler(
        self,
        model: VisionLanguageModel,
        encoder: PromptEncoder,
        max_prompt_tokens: int,
        max_response_tokens: int,
    ) -> GroupSampler:
        """Return a sampler with a model's weights; see `engine`."""
        engine = self.engine(model, max_prompt_tokens, max_response_tokens)
        return GroupSampler(engine, encoder, self.verifier, self.exchange)


def student_limits(config: RunConfig) -> tuple[int, int]:
    """Return the tokens of the student's longest prompt and response."""
    return longest_prompt(config), config.rollout.max_response_tokens


def longest_prompt(config: RunConfig) -> int:
    """Return the tokens of the student's longest prompt: a plain one, and the candidates that it
    may show or the beginning of a response that it may continue.
    """
    zone = config.zone
    shown = max(2 * zone.bcq, config.rollout.num_rollouts * zone.ncq, int(zone.hint))
    continued = zone.prefix * count_of_fraction(zone.prefix_fraction, longest_answer(config))
    return config.data.max_prompt_tokens + max(
        shown * config.teacher.compression_max_tokens, continued
    )


def longest_teacher_prompt(config: RunConfig) -> int:
    """Return the tokens of the first teacher's longest prompt: a plain one, or a response that it
    rewrites.
    """
    lengths = [config.data.max_prompt_tokens]
    kinds = config.zone.kinds
    if config.teacher.compressor == "teacher" and any(kind.is_rewritten for kind in kinds):
        lengths += [config.rollout.max_response_tokens, longest_answer(config)]
    return max(lengths)


def longest_answer(config: RunConfig) -> int:
    """Return the tokens of the longest response of any teacher."""
    return max(each.max_response_tokens for each in (config.teacher, *config.fallback_teachers))


def media_limits(config: DataConfig, folder: Path) -> MediaLimits:
    """Return what a run opens; of videos the frames that the model in the folder sees."""
    return MediaLimits(
        max_bytes=config.max_media_bytes,
        max_pixels=config.max_media_pixels,
        sampling=frame_sampling(read_processor(folder, processor_overrides(config))),
        decode_timeout_seconds=config.decode_timeout_seconds,
        num_workers=config.num_decode_workers,
    )


def open_media_cache(config: DataConfig) -> NodeCache | None:
    """Return what the ranks of a machine share; every rank of the partition calls this."""
    name = parallel.on_rank_zero(lambda: secrets.token_hex(8))
    if not config.media_cache_bytes:
        return None
    try:
        return NodeCache(name, config.media_cache_bytes)
    except OSError as error:
        logger.warning(
            "opened media are not shared between the ranks of this machine, got %s, expected room "
            "in shared memory; correct it, or set data.media_cache_bytes=0",
            error,
        )
        return None


def open_clip_cache(config: DataConfig, media: MediaStore) -> ClipCache | None:
    """Return what keeps the frames of videos on this machine's disk.

    Raises:
        ConfigError: Its folder cannot be used.
    """
    if not config.video_cache_dir:
        return None
    try:
        folder = Path(config.video_cache_dir)
        return ClipCache(media, folder, int(config.video_cache_gib * GIB))
    except OSError as error:
        raise ConfigError(
            f"data.video_cache_dir: the folder cannot be used, got {error}, expected one that can "
            "be made and written to on every machine; name another one, or leave the key out"
        ) from error


def open_shared(
    config: RunConfig,
    media: MediaStore,
    verifier: Grader,
    exchange: ParallelExchange,
    opened: ExitStack,
) -> Shared:
    """Open the caches of media; every rank of the partition calls this.

    Raises:
        ConfigError: One cannot be used.
    """
    cache = open_media_cache(config.data)
    if cache is not None:
        opened.callback(cache.close)
    clips = open_clip_cache(config.data, media)
    return Shared(config, media, verifier, exchange, cache, clips, opened=opened)


def release_memory(encoders: Sequence[PromptEncoder], cache: NodeCache | None = None) -> None:
    """Drop the encoders' opened media at the end of a step, and give freed memory back to the
    system.

    glibc keeps what tensors of ever new sizes have freed, so that resident memory creeps up over a
    run although nothing is held.
    """
    for encoder in encoders:
        encoder.forget_media()
    if cache is not None:
        cache.next_step()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def load_model(
    options: ModelConfig, layout: ParallelConfig, folder: Path, trainable: bool
) -> VisionLanguageModel:
    """Build this rank's part of a model and load its weights."""
    model = build_model(load_architecture(folder), options, layout, trainable=trainable)
    load_hf_weights(model, folder)
    return model
