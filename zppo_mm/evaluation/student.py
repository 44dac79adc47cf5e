"""The parts of training that an evaluation needs: the student, frozen, with its prompts and its
grader.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data.media.store import MediaStore
from zppo_mm.config.schema import RunConfig
from zppo_mm.parallel.exchange import ParallelExchange
from zppo_mm.rewards.judge import LlmJudge
from zppo_mm.rewards.verify import Verifier
from zppo_mm.rollout.engine import SamplingParams
from zppo_mm.rollout.processor import OVERRIDES
from zppo_mm.rollout.prompt import PromptEncoder
from zppo_mm.rollout.sampler import GroupSampler
from zppo_mm.run.build import evaluation_sampling, student_folder
from zppo_mm.run.shared import Shared, load_model, media_limits
from zppo_mm.run.teachers import build_judge, judge_pool
from zppo_mm.teacher.served.connect import open_pool
from zppo_mm.teacher.served.servers import Servers
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
        verifier: Grades.
        media: Opens media.
        judge: Of open questions.
        pool: Its servers.
    """

    sampler: GroupSampler
    sampling: SamplingParams
    templates: PromptTemplates
    encoder: PromptEncoder
    verifier: Verifier
    media: MediaStore
    judge: LlmJudge | None
    pool: Servers | None

    def grading_losses(self) -> dict[str, int]:
        """Return what grading lost on this rank so far: comparisons that timed out or failed, and
        what the judge counts.
        """
        return {
            "timeouts": self.verifier.num_timeouts,
            "errors": self.verifier.num_errors,
            **(self.judge.counts if self.judge else {}),
        }

    def close(self) -> None:
        """End the worker processes and the connections."""
        if self.pool is not None:
            self.pool.close()
        self.media.close()
        self.verifier.close()


def build_student(config: RunConfig) -> Student:
    """Load the configuration's student for sampling alone; process groups must be initialised.

    Raises:
        ZppoError: The model, its layout or a template cannot be used.
    """
    exchange = ParallelExchange()
    own_servers = (
        config.reward.judge_endpoints or config.reward.judge_model or not config.reward.judge
    )
    teachers = None if own_servers else open_pool(config.teacher, exchange)
    pool = judge_pool(config.reward, config.teacher, teachers, exchange)
    judge = build_judge(config, pool)
    verifier = Verifier(
        config.reward.timeout_seconds,
        config.reward.num_workers,
        judge,
        config.reward.budget_seconds,
    )
    folder = student_folder(config.model)
    shared = Shared(config, MediaStore(media_limits(config.data, folder)), verifier, exchange)
    encoder = shared.encoder(folder)
    templates = load_templates(config.zone.templates, encoder.chat.special_tokens)
    model = load_model(config.model, config.parallel, folder, trainable=False)
    sampler = shared.sampler(model, encoder)
    return Student(
        sampler,
        evaluation_sampling(config.evaluation, config.rollout, encoder),
        templates,
        encoder,
        verifier,
        shared.media,
        judge,
        pool,
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
        "model": config.reward.judge_model or config.teacher.model,
        "template": config.reward.judge_template,
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
        "media": {name: getattr(config.data, name) for name in media},
        "judge": judged if student.judge is not None else None,
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
