"""The parts of training that an evaluation needs: the student, frozen, with its prompts and its
grader.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from data.media.store import MediaStore
from zppo_mm.config.schema import RunConfig
from zppo_mm.models.families.architecture import load_architecture
from zppo_mm.parallel.exchange import ParallelExchange
from zppo_mm.rewards.function_source import source_digest
from zppo_mm.rewards.judge import load_judge_template
from zppo_mm.rollout.engine import SamplingParams
from zppo_mm.rollout.processor import OVERRIDES
from zppo_mm.rollout.prompt import PromptEncoder
from zppo_mm.rollout.sampler import GroupSampler
from zppo_mm.rollout.served.engine import VllmEngine
from zppo_mm.run.build import student_folder
from zppo_mm.run.judging import Grading, build_grading, is_teacher
from zppo_mm.run.remote import open_files
from zppo_mm.run.sampling import evaluation_sampling
from zppo_mm.run.served_engine import vllm_engine
from zppo_mm.run.shared import Shared, load_model, media_limits, open_clip_cache
from zppo_mm.run.thinking import log_generation_prefixes
from zppo_mm.teacher.served.connect import open_pool
from zppo_mm.zone.prompts import PromptTemplates, load_templates

TEXT_FILES = (
    "chat_template.*",
    "tokenizer*",
    "vocab.json",
    "merges.txt",
    "*_tokens*.json",
    "*config.json",
)
"""Small files of a model's folder that decide what a prompt looks like, where a response ends and
what its text is.
"""


@dataclass(frozen=True, slots=True)
class Student:
    """A model that can be asked.

    Attributes:
        sampler: Samples and grades.
        sampling: How tokens are drawn.
        templates: Texts of the prompts.
        encoder: Keeps opened media.
        media: Opens media.
        grading: Rules, reward functions, and the judge of what these leave open.
        engine: Asks servers of the model; `None` if this process runs it.
    """

    sampler: GroupSampler
    sampling: SamplingParams
    templates: PromptTemplates
    encoder: PromptEncoder
    media: MediaStore
    grading: Grading
    engine: VllmEngine | None = None

    def grading_losses(self) -> dict[str, int]:
        """Return what grading lost on this rank so far: comparisons that timed out or failed, and
        what the judge counts.
        """
        verifier = self.grading.verifier
        return {
            "timeouts": verifier.num_timeouts,
            "errors": verifier.num_errors,
            "function_errors": verifier.functions.num_errors,
            **(self.grading.judge.counts if self.grading.judge else {}),
        }

    def graded_by(self, judge_mode: str, judge_template: str) -> Student:
        """Return one that shares all with this one but what the judge decides, and its prompt.

        Args:
            judge_mode: As `evaluation.judge`.
            judge_template: The prompt's file; empty means the one that it has.

        Raises:
            ConfigError: The file is no prompt of a judge.
        """
        # Answers that it does not decide must not depend on whether there is one.
        judge = None if judge_mode == "never" else self.grading.judge
        if judge is not None and judge_template:
            judge = judge.with_template(load_judge_template(judge_template))
        verifier = self.grading.verifier.with_judge(judge, judge_mode)
        grading = replace(self.grading, verifier=verifier, judge=judge)
        return replace(self, sampler=self.sampler.with_grader(verifier), grading=grading)

    def close(self) -> None:
        """End the worker processes and the connections."""
        if self.engine is not None:
            self.engine.close()
        if self.grading.pool is not None:
            self.grading.pool.close()
        self.media.close()
        self.grading.verifier.close()


def build_student(config: RunConfig) -> Student:
    """Load the configuration's student for sampling alone, or point to its servers; process groups
    must be initialised.

    Raises:
        ZppoError: The model, its layout or a template cannot be used.
    """
    exchange = ParallelExchange()
    mode = config.evaluation.judge
    asks_teacher = is_teacher(config.reward) and mode != "never"
    teachers = open_pool(config.teacher, exchange) if asks_teacher else None
    grading = build_grading(config, teachers, exchange, [mode])
    folder = student_folder(config.model)
    media = MediaStore(media_limits(config.data, folder), open_files(config.remote))
    clips = open_clip_cache(config.data, media)
    shared = Shared(config, media, grading.verifier, exchange, clips=clips)
    encoder = shared.student_encoder(folder)
    templates = load_templates(config.zone.templates, encoder.chat.special_tokens)
    log_generation_prefixes(shared.encoders, templates.closing)
    engine: VllmEngine | None = None
    if config.rollout.engine == "vllm":
        engine = vllm_engine(
            config.rollout,
            load_architecture(folder),
            encoder,
            exchange,
            config.rollout.endpoints,
            config.seed,
            config.data.max_prompt_tokens + config.rollout.max_response_tokens,
        )
        sampler = GroupSampler(engine, encoder, grading.verifier, exchange)
    else:
        model = load_model(config.model, config.parallel, folder, trainable=False)
        lengths = config.data.max_prompt_tokens, config.rollout.max_response_tokens
        sampler = shared.sampler(model, encoder, *lengths)
    return Student(
        sampler,
        evaluation_sampling(config.evaluation, config.rollout, encoder),
        templates,
        encoder,
        media,
        grading,
        engine,
    )


def describe_student(config: RunConfig, student: Student) -> dict[str, Any]:
    """Return all that its answers depend on, besides the questions, as JSON values; not the layout,
    which only moves rounding.
    """
    media = (
        "max_media_bytes",
        "max_media_pixels",
        "decode_timeout_seconds",
        *OVERRIDES,
    )
    sampling = asdict(student.sampling)
    judged = {
        "mode": config.evaluation.judge,
        "model": config.reward.judge_model or config.teacher.model,
        "template": config.reward.judge_template or config.zone.templates,
        "max_response_chars": config.reward.judge_max_response_chars,
    }
    return {
        "model": str(student_folder(config.model)),
        "weights": _weights_digest(student_folder(config.model)),
        "text_files": text_files_digest(student_folder(config.model)),
        "params_dtype": config.model.params_dtype,
        "fp8": config.model.fp8,
        "transformer_impl": config.model.transformer_impl,
        "seed": config.seed,
        "num_rollouts": config.evaluation.num_rollouts,
        "sampling": {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in sampling.items()
        },
        "closing": student.templates.closing,
        "chat_template_kwargs": config.model.chat_template_kwargs,
        **({"system_prompt": config.model.system_prompt} if config.model.system_prompt else {}),
        "media": {name: getattr(config.data, name) for name in media},
        "judge": judged if student.grading.judge is not None else None,
        "reward_functions": {
            answer_type: [name, source_digest(name)]
            for answer_type, name in config.reward.functions.items()
        },
        # Other engines draw other responses; earlier evaluations had one alone.
        **({"engine": config.rollout.engine} if student.engine is not None else {}),
    }


def _weights_digest(folder: Path) -> str:
    """Return a digest of names, sizes and times of the model's files: reading all of a large one
    would take minutes.
    """
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted(folder.glob("*.safetensors")):
        status = path.stat()
        digest.update(f"{path.name}\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
    return digest.hexdigest()


def text_files_digest(folder: Path) -> str:
    """Return a digest of names and content of the files that decide the text, whatever time they
    were written at.
    """
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted(
        {path for pattern in TEXT_FILES for path in folder.glob(pattern) if path.is_file()}
    ):
        digest.update(f"{path.name}\0{path.stat().st_size}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()
