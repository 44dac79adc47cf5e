"""From a configuration to the teachers, and those who rewrite for prompts."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path

from zppo_mm.bundled import TEACHER_DIR
from zppo_mm.config.schema import (
    DistillConfig,
    ParallelConfig,
    TeacherConfig,
)
from zppo_mm.models.vision_language import VisionLanguageModel
from zppo_mm.rollout.engine import SamplingParams
from zppo_mm.rollout.prompt import PromptEncoder
from zppo_mm.run.shared import Shared, load_model, longest_teacher_prompt
from zppo_mm.teacher.chain import TeacherChain
from zppo_mm.teacher.megatron_teacher import MegatronTeacher
from zppo_mm.teacher.served.connect import open_pool
from zppo_mm.teacher.served.servers import Servers
from zppo_mm.teacher.served.teacher import ServedTeacher
from zppo_mm.teacher.served.teacher_ranks import TeacherRanks
from zppo_mm.teacher.served.tokens import TokenReader
from zppo_mm.teacher.teacher import Compressor, HintWriter, Teacher
from zppo_mm.zone.compress import RuleCompressor, TeacherCompressor
from zppo_mm.zone.hint import RuleHintWriter, TeacherHintWriter
from zppo_mm.zone.prompts import PromptTemplates

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Teachers:
    """Who helps.

    Attributes:
        answers: Answers questions; `None` if no method in use shows its answers.
        rewrites: Rewrites for the compressor and the writer of hints; `None` if the rule does.
        pools: Servers of further teachers.
        network: To distil from; `None` if nothing is, or if the teacher's answers come with their
            log-probs.
        ranks: Of the first teacher, if it has its own.
    """

    answers: Teacher | None
    rewrites: Teacher | None
    pools: tuple[Servers, ...] = ()
    network: VisionLanguageModel | None = None
    ranks: TeacherRanks | None = None

    @property
    def num_passed_on(self) -> int:
        """Questions that a further teacher was asked so far."""
        return self.answers.num_passed_on if isinstance(self.answers, TeacherChain) else 0

    @property
    def num_ungraded(self) -> int:
        """Rollouts of teachers in this process that could not be graded so far."""
        asked = (
            [self.answers.first, *self.answers.others]
            if isinstance(self.answers, TeacherChain)
            else [self.answers]
        )
        return sum(
            teacher.num_ungraded for teacher in asked if isinstance(teacher, MegatronTeacher)
        )


def build_teachers(
    shared: Shared,
    pool: Servers | None,
    templates: PromptTemplates,
    student: PromptEncoder,
    ranks: TeacherRanks | None = None,
) -> Teachers:
    """Load the teachers, or point to their servers, unless nothing in this configuration would ask
    them.

    Args:
        shared: What they share with the student.
        pool: Servers of the first teacher, or of its ranks; `None` if it runs in this process.
        templates: Texts of the prompts.
        student: The student's prompts.
        ranks: Of the first teacher, if it has its own.
    """
    config = shared.config
    zone = config.zone
    answers = zone.uses_teacher or config.distill.source == "teacher"
    rewrites = config.teacher.compressor == "teacher" and any(
        kind.is_rewritten for kind in zone.kinds
    )
    if rewrites and not config.teacher.model:
        logger.warning(
            "teacher.compressor: the bundled teacher was not trained to rewrite responses, got "
            "'teacher', expected 'rule' with it; set that, or name your teacher in teacher.model"
        )
    distils = config.distill.source != "none"
    if not (answers or rewrites or distils):
        return Teachers(None, None, ranks=ranks)
    first = _build_teacher(shared, config.teacher, pool, templates, student, ranks)
    others: list[Teacher] = []
    pools: list[Servers] = []
    for index, other in enumerate(config.fallback_teachers if answers else ()):
        own = open_pool(
            other,
            shared.exchange,
            limits=shared.media.limits,
            files=shared.media.files,
            where=f"fallback_teachers[{index}]",
        )
        if own is not None:
            shared.opened.callback(own.close)
            pools.append(own)
        others.append(_build_teacher(shared, other, own, templates, student))
    chain = TeacherChain([first, *others]) if others else first
    network = first.model if distils and isinstance(first, MegatronTeacher) else None
    return Teachers(
        chain if answers else None, first if rewrites else None, tuple(pools), network, ranks
    )


def _build_teacher(
    shared: Shared,
    own: TeacherConfig,
    pool: Servers | None,
    templates: PromptTemplates,
    student: PromptEncoder,
    ranks: TeacherRanks | None = None,
) -> Teacher:
    config = shared.config
    if pool is not None:
        return ServedTeacher(
            pool,
            own,
            shared.exchange,
            shared.verifier,
            plain_text=templates.plain_text,
            tokenize=lambda text: student.chat.tokenize([text]),
            seed=config.seed,
            tokens=_token_reader(config.distill, student),
            ranks=ranks,
        )
    model, encoder, sampling = load_teacher(shared, own, config.parallel)
    if config.distill.source != "none":
        student.check_same_inputs(encoder, "distill.source")
    sampler = shared.sampler(
        model, encoder, longest_teacher_prompt(config), own.max_response_tokens
    )
    return MegatronTeacher(model, sampler, sampling, own.num_rollouts, templates.plain_text)


def load_teacher(
    shared: Shared, own: TeacherConfig, layout: ParallelConfig
) -> tuple[VisionLanguageModel, PromptEncoder, SamplingParams]:
    """Load a teacher onto the ranks of this process's partition.

    Args:
        shared: What the models there have in common.
        own: The teacher.
        layout: How the ranks are laid out.

    Raises:
        ZppoError: Its folder or its layout cannot be used.
    """
    config = shared.config
    folder = Path(own.model) if own.model else TEACHER_DIR
    encoder = shared.encoder(folder, own.chat_template_kwargs)
    sampling = SamplingParams(
        temperature=own.temperature,
        max_new_tokens=own.max_response_tokens,
        stop_token_ids=encoder.stop_token_ids,
    )
    options = replace(
        config.model,
        transformer_impl=own.transformer_impl or config.model.transformer_impl,
        params_dtype=own.params_dtype or config.model.params_dtype,
        fp8=own.fp8,
        recompute="none",
    )
    return load_model(options, layout, folder, trainable=False), encoder, sampling


def _token_reader(config: DistillConfig, student: PromptEncoder) -> TokenReader | None:
    if config.source == "none":
        return None
    return TokenReader(student.chat.token_bytes(), student.stop_token_ids, config.top_k)


def build_rewriters(
    config: TeacherConfig,
    student: PromptEncoder,
    teacher: Teacher | None,
    templates: PromptTemplates,
) -> tuple[Compressor, HintWriter]:
    """Return who shortens candidates and who writes hints; both count in the student's tokens: the
    student reads them.
    """
    rule = RuleCompressor(
        student.chat.count_tokens,
        config.compression_max_tokens,
        config.compression_max_lines,
    )
    hints = RuleHintWriter(rule)
    if teacher is None:
        return rule, hints
    by_teacher = TeacherHintWriter(teacher.rewrite, hints, templates.write_hint)
    return TeacherCompressor(teacher.rewrite, rule, templates.compress), by_teacher
