"""Distillation of a tiny student from a tiny teacher: what the tests of distillation share."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from tests.support.training_example import (
    TRAIN,
    Case,
    Result,
    make_batches,
    make_groups,
    write_tiny_folder,
)
from zppo_mm.config.schema import ModelConfig, ParallelConfig
from zppo_mm.experience import TrainingSample
from zppo_mm.models.families.architecture import load_architecture
from zppo_mm.models.provider import build_model
from zppo_mm.models.vision_language import VisionLanguageModel
from zppo_mm.parallel import groups as parallel
from zppo_mm.training.distillation import DistillationObjective
from zppo_mm.training.policy import Policy
from zppo_mm.training.samples import with_question_weights
from zppo_mm.weights.mapping import load_hf_weights

TOP_K = 6
NUM_STEPS = 2
STUDENT, TEACHER = "student", "teacher"
_TENSOR = ParallelConfig(tensor_model_parallel_size=2)
TWO_RANKS = {
    "data 2": ParallelConfig(),
    "tensor 2": _TENSOR,
    "tensor 2, sequence parallel": dataclasses.replace(_TENSOR, sequence_parallel=True),
    "context 2": ParallelConfig(context_parallel_size=2),
}


def make_folders(root: Path) -> Path:
    """Write a student, and a teacher whose network is another, below a folder; return it."""
    write_tiny_folder(root / STUDENT)
    write_teacher(root / TEACHER)
    return root


def make_texts() -> list[TrainingSample]:
    """Return the samples without media; an advantage of 0 must not matter."""
    samples = [sample for sample in make_groups() if not sample.grids]
    return [
        dataclasses.replace(sample, advantages=np.zeros_like(sample.advantages))
        for sample in samples
    ]


@dataclass(frozen=True)
class Distilled:
    """One way to distil."""

    layout: ParallelConfig = dataclasses.field(default_factory=ParallelConfig)
    top_k: int = 0
    share_prompts: bool = False
    texts_only: bool = False
    micro_batch_tokens: int = 64
    by_question: bool = False
    params_dtype: str = "float32"

    def samples(self) -> list[TrainingSample]:
        made = make_texts() if self.texts_only else make_groups()
        return with_question_weights(made) if self.by_question else made

    def case(self) -> Case:
        return Case(
            layout=self.layout,
            micro_batch_tokens=self.micro_batch_tokens,
            skip_zero_advantage=False,
            samples=self.samples,
            share_prompts=self.share_prompts,
        )


def write_teacher(folder: Path) -> None:
    from transformers import Qwen3_5ForConditionalGeneration

    write_tiny_folder(folder)
    model = Qwen3_5ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    torch.manual_seed(11)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.08)
    model.save_pretrained(folder)


def load(
    folder: Path, layout: ParallelConfig, trainable: bool, params_dtype: str = "float32"
) -> VisionLanguageModel:
    options = ModelConfig(params_dtype=params_dtype)
    model = build_model(load_architecture(folder), options, layout, trainable=trainable)
    load_hf_weights(model, folder)
    return model


def build(folders: Path, way: Distilled) -> Policy:
    parallel.initialize(way.layout, seed=0)
    teacher = load(folders / TEACHER, way.layout, False, way.params_dtype)
    student = load(folders / STUDENT, way.layout, True, way.params_dtype)
    objective = DistillationObjective(teacher, way.top_k, 1.0, parallel.tensor_group())
    return Policy(student, TRAIN, way.layout, objective)


def distil(folders: Path, ways: list[Distilled]) -> list[Result]:
    results = []
    for way in ways:
        policy = build(folders, way)
        batches = make_batches(way.case())
        metrics = [policy.train_step(batches) for _ in range(NUM_STEPS)]
        named = policy.model.named_parameters()
        results.append(
            Result(
                metrics,
                {
                    n: p.detach().clone()
                    for n, p in named
                    if not getattr(p, "tensor_model_parallel", False)
                },
            )
        )
    parallel.shutdown()
    return results


def naive_loss(student: torch.Tensor, teacher: torch.Tensor, top_k: int) -> torch.Tensor:
    """Return the summed divergence of `[tokens, vocabulary]` logits in plain PyTorch."""
    p, q = student.softmax(-1), teacher.softmax(-1)
    if top_k:
        ids = q.topk(top_k).indices
        p, q = (
            torch.cat([each.gather(-1, ids), 1 - each.gather(-1, ids).sum(-1, keepdim=True)], -1)
            for each in (p, q)
        )
    m = (p + q) / 2
    return ((p * (p / m).log()).sum() + (q * (q / m).log()).sum()) / 2


def naive_mean(
    divergences: list[torch.Tensor], samples: list[TrainingSample], by_question: bool
) -> torch.Tensor:
    """Return the mean of summed divergences over all tokens, or over tokens, responses and
    questions in turn.
    """
    lengths = [sample.num_loss_tokens for sample in samples]
    if not by_question:
        return torch.stack(divergences).sum() / sum(lengths)
    means: dict[str, list[torch.Tensor]] = {}
    for sample, total, length in zip(samples, divergences, lengths, strict=True):
        means.setdefault(sample.uid, []).append(total / length)
    return torch.stack([torch.stack(each).mean() for each in means.values()]).mean()
