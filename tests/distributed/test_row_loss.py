"""The output layer with its loss by chunks of rows, on two ranks: values and gradients are those of
plain losses on the logits of all rows over the whole vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy, linear

from tests.support.distillation_example import TOP_K, TWO_RANKS, write_teacher
from tests.support.launch import run_ranks
from tests.support.training_example import (
    TRAIN,
    VOCABULARY,
    Case,
    make_batches,
    make_groups,
    write_tiny_folder,
)
from zppo_mm.algorithms.row_loss import OutputRows
from zppo_mm.config.schema import AlgorithmConfig, ModelConfig, ParallelConfig
from zppo_mm.experience import Microbatch, TopLogprobs, TrainingSample
from zppo_mm.models.families.architecture import load_architecture
from zppo_mm.models.provider import build_model
from zppo_mm.models.vision_language import VisionLanguageModel
from zppo_mm.parallel import groups as parallel
from zppo_mm.randomness import generator
from zppo_mm.training.distillation import DistillationObjective, teacher_rows
from zppo_mm.training.objective import (
    Objective,
    ObjectiveTerms,
    PolicyObjective,
    SupervisedObjective,
    loss_rows,
)
from zppo_mm.training.policy import Policy
from zppo_mm.training.samples import with_question_weights
from zppo_mm.weights.mapping import load_hf_weights

LAYOUTS = {**TWO_RANKS, "pipeline 2": ParallelConfig(pipeline_model_parallel_size=2)}
TYPES = ("float32", "bfloat16")
OBJECTIVES = ("policy", "cross-entropy", "carried", "whole", "top")
TEMPERATURE = 0.8
CHUNK_ROWS = 5
# Of the largest element: sums in another order; in bfloat16 (8 bits) the gradient of a chunk's
# logits, the parts of two tensor ranks and their sum are rounded.
GRADIENT_TOLERANCE = {"float32": 1e-5, "bfloat16": 2**-6}
# Of the loss: in bfloat16 products of other shapes may round a logit to its neighbour.
LOSS_TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-3}
# Between layouts the hidden states differ as well, by the network's rounding.
LAYOUT_TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2}

Naive = Callable[[torch.Tensor, torch.Tensor, Microbatch], torch.Tensor]
"""From the logits `[loss tokens, vocabulary]` and the indices of the loss tokens to their loss."""


@dataclass(frozen=True)
class Compared:
    """What came of a micro-batch, by chunks and naively; errors are relative to the largest element
    of the naive gradient.
    """

    num_chunks: int
    loss: float
    naive_loss: float
    hidden_error: float
    weight_error: float


class Comparing:
    """An objective that also compares itself with a naive one, on the same hidden states."""

    def __init__(self, objective: Objective, naive: Naive) -> None:
        self.objective = objective
        self.naive = naive
        self.metrics = objective.metrics
        self.needs_advantages = objective.needs_advantages
        self.needs_teacher_top = objective.needs_teacher_top
        self.found: list[Compared] = []

    def __call__(self, rows: OutputRows, microbatch: Microbatch) -> ObjectiveTerms:
        with torch.enable_grad():
            self.found.append(self.compare(rows, microbatch))
        return self.objective(rows, microbatch)

    def compare(self, rows: OutputRows, microbatch: Microbatch) -> Compared:
        hidden, weight = leaf(rows.hidden), leaf(rows.weight)
        chunked = OutputRows(hidden, weight, CHUNK_ROWS * len(weight))
        loss = self.objective(chunked, microbatch).loss_sum
        loss.backward()
        assert hidden.grad is not None
        # What the network does with it.
        dist.all_reduce(hidden.grad, group=parallel.tensor_group())

        whole_hidden, whole_weight = leaf(rows.hidden), leaf(whole_vocabulary(rows.weight))
        indices, wanted = loss_rows(OutputRows(whole_hidden, whole_weight), microbatch)
        logits = linear(wanted.hidden, whole_weight).float()
        naive_loss = self.naive(logits, indices, microbatch)
        naive_loss.backward()
        assert whole_weight.grad is not None
        own = whole_weight.grad.chunk(parallel.tensor_size())[parallel.tensor_rank()]
        return Compared(
            len(loss_rows(chunked, microbatch)[1].chunks()),
            float(loss),
            float(naive_loss),
            relative_error(hidden.grad, whole_hidden.grad),
            relative_error(weight.grad, own),
        )


def leaf(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().clone().requires_grad_()


def whole_vocabulary(weight: torch.Tensor) -> torch.Tensor:
    parts = [torch.empty_like(weight) for _ in range(parallel.tensor_size())]
    dist.all_gather(parts, weight.detach().contiguous(), group=parallel.tensor_group())
    return torch.cat(parts)


def relative_error(ours: torch.Tensor | None, theirs: torch.Tensor | None) -> float:
    assert ours is not None
    assert theirs is not None
    assert ours.dtype == theirs.dtype
    scale = float(theirs.float().abs().max()) or 1.0
    return float((ours.float() - theirs.float()).abs().max()) / scale


def naive_policy(
    logits: torch.Tensor, indices: torch.Tensor, microbatch: Microbatch
) -> torch.Tensor:
    config = AlgorithmConfig()
    logprobs = (logits / TEMPERATURE).log_softmax(-1)
    targets = microbatch.token_ids[indices]
    total = logits.sum() * 0
    for row, target, old, advantage in zip(
        logprobs,
        targets,
        microbatch.old_logprobs[indices],
        microbatch.advantages[indices],
        strict=True,
    ):
        ratio = (row[target] - old).exp()
        clipped = ratio.clip(1 - config.clip_ratio_low, 1 + config.clip_ratio_high)
        surrogate = min(ratio * advantage, clipped * advantage)
        if advantage < 0:
            surrogate = max(surrogate, config.clip_ratio_c * advantage)
        total = total - surrogate
    return total


def naive_cross_entropy(
    logits: torch.Tensor, indices: torch.Tensor, microbatch: Microbatch
) -> torch.Tensor:
    return cross_entropy(logits, microbatch.token_ids[indices], reduction="sum")


def naive_divergence(
    p: torch.Tensor, q: torch.Tensor, indices: torch.Tensor, microbatch: Microbatch
) -> torch.Tensor:
    """Return the weighted Jensen-Shannon divergences of rows of probabilities."""
    m = (p + q) / 2
    rows = ((p * (p / m).log()).sum(-1) + (q * (q / m).log()).sum(-1)) / 2
    return (rows * microbatch.token_weights[indices]).sum()


def with_rest(probabilities: torch.Tensor) -> torch.Tensor:
    return torch.cat([probabilities, 1 - probabilities.sum(-1, keepdim=True)], -1)


def naive_carried(
    logits: torch.Tensor, indices: torch.Tensor, microbatch: Microbatch
) -> torch.Tensor:
    if not len(indices):
        return logits.sum() * 0
    assert microbatch.teacher_ids is not None
    assert microbatch.teacher_logprobs is not None
    p = (logits / TEMPERATURE).softmax(-1).gather(-1, microbatch.teacher_ids[indices])
    q = microbatch.teacher_logprobs[indices].exp()
    return naive_divergence(with_rest(p), with_rest(q), indices, microbatch)


def naive_distillation(teacher: VisionLanguageModel, top_k: int) -> Naive:
    def naive(logits: torch.Tensor, indices: torch.Tensor, microbatch: Microbatch) -> torch.Tensor:
        if not len(indices):
            return logits.sum() * 0
        hidden = teacher_rows(teacher, microbatch).hidden
        q = linear(hidden, whole_vocabulary(teacher.output_weight())).float()
        p, q = ((each / TEMPERATURE).softmax(-1) for each in (logits, q))
        if top_k:
            ids = q.topk(top_k).indices
            p, q = (with_rest(each.gather(-1, ids)) for each in (p, q))
        return naive_divergence(p, q, indices, microbatch)

    return naive


def samples() -> list[TrainingSample]:
    """Return groups whose samples carry invented log-probs of a teacher."""
    made = []
    for number, sample in enumerate(with_question_weights(make_groups())):
        random = generator(9, sample.uid, number)
        ids = np.stack([random.permutation(VOCABULARY)[:TOP_K] for _ in sample.token_ids])
        # The last part is that of all other tokens.
        parts = random.dirichlet(np.ones(TOP_K + 1), len(ids))[:, :TOP_K]
        top = TopLogprobs(ids, np.log(parts).astype(np.float32))
        made.append(dataclasses.replace(sample, teacher_top=top))
    return made


def load(
    folder: Path, layout: ParallelConfig, params_dtype: str, trainable: bool
) -> VisionLanguageModel:
    options = ModelConfig(params_dtype=params_dtype)
    model = build_model(load_architecture(folder), options, layout, trainable=trainable)
    load_hf_weights(model, folder)
    return model


def objectives(folder: Path, layout: ParallelConfig) -> dict[str, Comparing]:
    group = parallel.tensor_group()

    def distilling(network: Any, top_k: int) -> DistillationObjective:
        return DistillationObjective(network, top_k, TEMPERATURE, group)

    found = {
        "policy": Comparing(PolicyObjective(AlgorithmConfig(), TEMPERATURE, group), naive_policy),
        "cross-entropy": Comparing(SupervisedObjective(group), naive_cross_entropy),
        "carried": Comparing(distilling(None, TOP_K), naive_carried),
    }
    if parallel.pipeline_size() == 1:  # a teacher's network has to be in one stage
        # In bfloat16 several tokens are the least likely of the top ones, and which is taken is
        # open.
        teacher = load(folder, layout, "float32", trainable=False)
        for name, top_k in (("whole", 0), ("top", TOP_K)):
            naive = naive_distillation(teacher, top_k)
            found[name] = Comparing(distilling(teacher, top_k), naive)
    return found


def compare_all(student: Path, teacher: Path) -> dict[tuple[str, str, str], list[Compared]]:
    """Return what every objective found, by layout, type and name."""
    compared = {}
    # So small a rate leaves the weights as they are.
    train = replace(TRAIN, lr=1e-12, updates_per_step=1)
    for name, layout in LAYOUTS.items():
        parallel.initialize(layout, seed=0)
        case = Case(layout, skip_zero_advantage=False, train=train, samples=samples)
        batches = make_batches(replace(case, share_prompts=True))
        for params_dtype in TYPES:
            model = load(student, layout, params_dtype, trainable=True)
            chosen = objectives(teacher, layout)
            policy = Policy(model, train, layout, chosen["policy"])
            for kind, objective in chosen.items():
                policy.objective = objective
                policy.train_step(batches)
                compared[name, params_dtype, kind] = objective.found
    parallel.shutdown()
    return compared


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, list[Compared]]]:
    folder = tmp_path_factory.mktemp("models")
    student = write_tiny_folder(folder / "student")
    write_teacher(folder / "teacher")
    return run_ranks(compare_all, 2, student, folder / "teacher")


def total(ranks: list[dict[Any, list[Compared]]], case: tuple[str, str, str]) -> float:
    """Return the loss of all micro-batches and replicas; tensor ranks have the same one."""
    counted = ranks[:1] if case[0].startswith("tensor") else ranks
    return sum(each.loss for rank in counted for each in rank[case])


@pytest.mark.parametrize("params_dtype", TYPES)
@pytest.mark.parametrize("kind", OBJECTIVES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_chunks_give_values_and_gradients_of_whole_logits(
    ranks: list[dict[Any, list[Compared]]], layout: str, kind: str, params_dtype: str
) -> None:
    case = (layout, params_dtype, kind)
    if layout == "pipeline 2" and kind in ("whole", "top"):
        assert case not in ranks[0]
        return
    found = [each for rank in ranks for each in rank[case]]
    if layout == "pipeline 2":
        assert not ranks[0][case], "the first stage has no output layer"
    assert max(each.num_chunks for each in found) > 2
    assert max(abs(each.naive_loss) for each in found) > 0.01
    for each in found:
        assert each.loss == pytest.approx(each.naive_loss, rel=LOSS_TOLERANCE[params_dtype])
        assert each.hidden_error <= GRADIENT_TOLERANCE[params_dtype]
        assert each.weight_error <= GRADIENT_TOLERANCE[params_dtype]
    expected = total(ranks, ("data 2", params_dtype, kind))
    assert total(ranks, case) == pytest.approx(expected, rel=LAYOUT_TOLERANCE[params_dtype])
