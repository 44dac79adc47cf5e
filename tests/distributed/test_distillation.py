"""Distillation updates against a plain PyTorch loop over two Hugging Face models, and on every layout."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.distributed.launch import run_ranks
from tests.distributed.test_training_invariance import assert_same
from tests.distributed.training_example import IMAGE, TRAIN, Case, Result, make_batches, make_groups, write_tiny_folder
from zppo_mm.config import ModelConfig, ParallelConfig
from zppo_mm.experience import TopLogprobs, TrainingSample
from zppo_mm.models import parallel
from zppo_mm.models.architecture import load_architecture
from zppo_mm.models.provider import build_model
from zppo_mm.models.vision_language import VisionLanguageModel
from zppo_mm.models.weights import load_hf_weights
from zppo_mm.training.distillation import DistillationObjective
from zppo_mm.training.divergence import jensen_shannon, top_jensen_shannon, top_tokens
from zppo_mm.training.policy import Policy

# Two implementations of the network in float32, then AdamW steps.
ORACLE_TOLERANCE = 1e-3
# Float32 sums over the vocabulary in another order.
TOLERANCE = 1e-5
TOP_K = 6
NUM_STEPS = 2
STUDENT, TEACHER = "student", "teacher"


def make_texts() -> list[TrainingSample]:
    """Return the samples without media; an advantage of 0 must not matter."""
    samples = [sample for sample in make_groups() if not sample.grids]
    return [dataclasses.replace(sample, advantages=np.zeros_like(sample.advantages)) for sample in samples]


@dataclass(frozen=True)
class Distilled:
    """One way to distil."""

    layout: ParallelConfig = dataclasses.field(default_factory=ParallelConfig)
    top_k: int = 0
    share_prompts: bool = False
    texts_only: bool = False
    micro_batch_tokens: int = 64

    def case(self) -> Case:
        return Case(
            layout=self.layout,
            micro_batch_tokens=self.micro_batch_tokens,
            skip_zero_advantage=False,
            samples=make_texts if self.texts_only else make_groups,
            share_prompts=self.share_prompts,
        )


REFERENCES = {"whole": Distilled(), "top": Distilled(top_k=TOP_K)}
TENSOR = ParallelConfig(tensor_model_parallel_size=2)
TWO_RANKS = {
    "data 2": ParallelConfig(),
    "tensor 2": TENSOR,
    "tensor 2, sequence parallel": dataclasses.replace(TENSOR, sequence_parallel=True),
    "context 2": ParallelConfig(context_parallel_size=2),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a student, and a teacher whose network is another."""
    root = tmp_path_factory.mktemp("models")
    write_tiny_folder(root / STUDENT)
    write_teacher(root / TEACHER)
    return root


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


def load(folder: Path, layout: ParallelConfig, trainable: bool) -> VisionLanguageModel:
    model = build_model(load_architecture(folder), ModelConfig(), layout, trainable=trainable)
    load_hf_weights(model, folder)
    return model


def build(folders: Path, way: Distilled) -> Policy:
    parallel.initialize(way.layout, seed=0)
    teacher = load(folders / TEACHER, way.layout, trainable=False)
    objective = DistillationObjective(teacher, way.top_k, 1.0, parallel.tensor_group())
    return Policy(load(folders / STUDENT, way.layout, trainable=True), TRAIN, way.layout, objective)


def distil(folders: Path, ways: list[Distilled]) -> list[Result]:
    results = []
    for way in ways:
        policy = build(folders, way)
        batches = make_batches(way.case())
        metrics = [policy.train_step(batches) for _ in range(NUM_STEPS)]
        named = policy.model.named_parameters()
        results.append(Result(metrics, {n: p.detach().clone() for n, p in named if not getattr(p, "tensor_model_parallel", False)}))
    parallel.shutdown()
    return results


@pytest.fixture(scope="module")
def references(folders: Path) -> dict[str, Result]:
    """Return the updates of one process without shared prompts."""
    return dict(zip(REFERENCES, run_ranks(distil, 1, folders, list(REFERENCES.values()))[0], strict=True))


def naive_loss(student: torch.Tensor, teacher: torch.Tensor, top_k: int) -> torch.Tensor:
    """Return the summed divergence of `[tokens, vocabulary]` logits in plain PyTorch."""
    p, q = student.softmax(-1), teacher.softmax(-1)
    if top_k:
        ids = q.topk(top_k).indices
        p, q = (torch.cat([each.gather(-1, ids), 1 - each.gather(-1, ids).sum(-1, keepdim=True)], -1) for each in (p, q))
    m = (p + q) / 2
    return ((p * (p / m).log()).sum() + (q * (q / m).log()).sum()) / 2


def naive_updates(folders: Path, updates: list[list[TrainingSample]], top_k: int) -> list[tuple[float, float]]:
    """Return loss and gradient norm of plain updates, one sequence at a time."""
    from transformers import Qwen3_5ForConditionalGeneration

    def read(name: str) -> torch.nn.Module:
        return Qwen3_5ForConditionalGeneration.from_pretrained(folders / name, dtype=torch.float32, attn_implementation="eager")

    student, teacher = read(STUDENT), read(TEACHER)
    language = [parameter for name, parameter in student.named_parameters() if "visual" not in name]
    parts = [(TRAIN.weight_decay, [p for p in language if p.ndim > 1]), (0.0, [p for p in language if p.ndim <= 1])]
    optimizer = torch.optim.AdamW(
        [{"params": parameters, "weight_decay": decay} for decay, parameters in parts],
        lr=TRAIN.lr,
        betas=(TRAIN.adam_beta1, TRAIN.adam_beta2),
        eps=TRAIN.adam_eps,
    )
    results = []
    for samples in updates:
        optimizer.zero_grad()
        total = torch.zeros(())
        for sample in samples:
            ids = torch.from_numpy(sample.token_ids)[None]
            before = torch.from_numpy(sample.loss_mask[1:] != 0)
            with torch.no_grad():
                target = teacher(input_ids=ids).logits[0, :-1][before]
            total = total + naive_loss(student(input_ids=ids).logits[0, :-1][before], target, top_k)
        loss = total / sum(sample.num_loss_tokens for sample in samples)
        loss.backward()  # type: ignore[no-untyped-call]
        norm = torch.nn.utils.clip_grad_norm_(language, TRAIN.clip_grad)
        optimizer.step()
        results.append((float(loss.detach()), float(norm)))
    return results


def compare_with_naive(folders: Path, top_k: int) -> tuple[list[tuple[float, float]], list[tuple[float, float]]]:
    way = Distilled(top_k=top_k, texts_only=True)
    policy = build(folders, way)
    samples = make_texts()
    from tests.distributed.training_example import make_plan

    plan = make_plan(way.case(), 1)
    updates = [[s for s, owner in zip(samples, plan.minibatch_of, strict=True) if owner == update] for update in range(2)]
    ours = [(update.loss, update.grad_norm) for update in policy.train_step(make_batches(way.case())).updates]
    parallel.shutdown()
    return ours, naive_updates(folders, updates, top_k)


@pytest.mark.parametrize("top_k", [0, TOP_K])
def test_updates_are_those_of_a_plain_loop(folders: Path, top_k: int) -> None:
    ((ours, naive),) = run_ranks(compare_with_naive, 1, folders, top_k)
    assert len(ours) == 2
    np.testing.assert_allclose(ours, naive, rtol=ORACLE_TOLERANCE)
    assert min(loss for loss, _ in ours) > 0.01


def test_the_student_approaches_the_teacher(references: dict[str, Result]) -> None:
    for result in references.values():
        first, second = result.metrics
        assert second.loss < 0.95 * first.loss
        assert 0 <= first.means["agreement"] <= 1
    assert references["top"].metrics[0].updates[0].loss < references["whole"].metrics[0].updates[0].loss


@pytest.mark.parametrize("name", list(REFERENCES))
def test_sharing_prompts_changes_nothing(folders: Path, references: dict[str, Result], name: str) -> None:
    ways = [dataclasses.replace(REFERENCES[name], share_prompts=True, micro_batch_tokens=tokens) for tokens in (20, 64, 1000)]
    for actual in run_ranks(distil, 1, folders, ways)[0]:
        assert_same(actual, references[name], f"{name}, shared")


def test_the_layout_does_not_matter(folders: Path, references: dict[str, Result]) -> None:
    ways = {
        (name, layout, share): dataclasses.replace(REFERENCES[name], layout=TWO_RANKS[layout], share_prompts=share)
        for name in REFERENCES
        for layout in TWO_RANKS
        for share in ((False, True) if name == "whole" else (True,))
    }
    for results in run_ranks(distil, 2, folders, list(ways.values())):
        for (name, layout, share), actual in zip(ways, results, strict=True):
            assert_same(actual, references[name], f"{name}, {layout}, shared {share}")


def carried(folders: Path, share_prompts: bool) -> tuple[Result, Result]:
    """Distil from the teacher's top tokens, taken beforehand and carried by the samples, and from the teacher itself."""
    way = Distilled(top_k=TOP_K, texts_only=True, share_prompts=share_prompts)
    parallel.initialize(way.layout, seed=0)
    teacher = load(folders / TEACHER, way.layout, trainable=False)
    samples = [with_teacher_top(teacher, sample, TOP_K + (number % 2)) for number, sample in enumerate(make_texts())]
    objective = DistillationObjective(None, TOP_K, 1.0, parallel.tensor_group())
    policy = Policy(load(folders / STUDENT, way.layout, trainable=True), TRAIN, way.layout, objective)
    case = dataclasses.replace(way.case(), samples=lambda: samples)
    result = Result([policy.train_step(make_batches(case)) for _ in range(NUM_STEPS)], {})
    (live,) = distil(folders, [way])
    return result, live


def with_teacher_top(teacher: VisionLanguageModel, sample: TrainingSample, k: int) -> TrainingSample:
    """Attach the teacher's top tokens; every other sample has one more column, which says that there is no token."""
    length = torch.tensor([0, sample.num_tokens], dtype=torch.int32)
    with torch.no_grad():
        logits = teacher(torch.from_numpy(sample.token_ids), torch.from_numpy(sample.positions), length)
    ids, logprobs = (each.numpy() for each in top_tokens(logits, TOP_K))
    before = ((1, 0), (0, k - TOP_K))
    return dataclasses.replace(
        sample,
        teacher_top=TopLogprobs(
            np.pad(ids[:-1], before, constant_values=-1), np.pad(logprobs[:-1], before, constant_values=np.float32(np.nan))
        ),
    )


@pytest.mark.parametrize("share_prompts", [False, True])
def test_log_probs_that_samples_carry_are_as_good_as_the_teacher(folders: Path, share_prompts: bool) -> None:
    ((actual, live),) = run_ranks(carried, 1, folders, share_prompts)
    assert_same(actual, live, "carried")


def probed_embeddings(folders: Path, ways: list[Distilled]) -> list[np.ndarray]:
    """Return the gradient of the output layer's input, `[tokens]` norms, of the first micro-batch."""
    found = []
    for way in ways:
        policy = build(folders, way)
        microbatch = make_batches(way.case())[0].microbatches[0]
        places = (policy.model, microbatch.token_ids, microbatch.positions, microbatch.cu_seqlens, microbatch.patches, microbatch.grids)
        network, *inputs = places
        logits = network(*inputs, parents=microbatch.parents)
        logits.retain_grad()
        policy.objective(logits, microbatch).loss_sum.backward()
        assert logits.grad is not None
        touched = (logits.grad.abs().sum(-1) > 0).numpy()
        expected = np.zeros_like(touched)
        for sequence, parent in enumerate(microbatch.parents or [-1] * (len(microbatch.cu_seqlens) - 1)):
            bounds = microbatch.cu_seqlens.tolist()
            for token in range(bounds[sequence], bounds[sequence + 1]):
                if microbatch.loss_mask[token]:
                    expected[token - 1 if token > bounds[sequence] else bounds[parent + 1] - 1] = True
        assert (microbatch.token_ids == IMAGE).any()
        found.append(np.stack([touched, expected]))
    parallel.shutdown()
    return found


@pytest.mark.parametrize("top_k", [0, TOP_K])
def test_only_places_that_predict_the_response_get_a_gradient(folders: Path, top_k: int) -> None:
    ways = [Distilled(top_k=top_k, share_prompts=share, micro_batch_tokens=1000) for share in (False, True)]
    for touched, expected in run_ranks(probed_embeddings, 1, folders, ways)[0]:
        np.testing.assert_array_equal(touched, expected)
        assert 0 < expected.sum() < len(expected)


def divided_vocabulary(student: torch.Tensor, teacher: torch.Tensor) -> list[torch.Tensor]:
    """Return value, gradient, entropy and agreement of this rank's slice of the vocabulary, whole and lumped."""
    parallel.initialize(ParallelConfig(tensor_model_parallel_size=parallel_size()), seed=0)
    group, size, rank = parallel.tensor_group(), parallel.tensor_size(), parallel.tensor_rank()
    mine, other = (logits.chunk(size, -1)[rank].clone() for logits in (student, teacher))
    found = []
    top = top_tokens(other, TOP_K, group, 0.7)
    for divergence in (
        lambda logits: jensen_shannon(logits, other, group, 0.7, chunk_rows=3),
        lambda logits: top_jensen_shannon(logits, top, group, 0.7, chunk_rows=3),
    ):
        logits = mine.clone().requires_grad_()
        value = divergence(logits)
        (value.jsd * torch.arange(1.0, 9.0)).sum().backward()
        assert logits.grad is not None
        found += [value.jsd.detach(), value.entropies, value.agreements, logits.grad]
    parallel.shutdown()
    return [top.ids, top.logprobs, *found]


def parallel_size() -> int:
    import os

    return int(os.environ["WORLD_SIZE"])


def test_a_divided_vocabulary_gives_the_same_divergence_and_gradient() -> None:
    generator = torch.Generator().manual_seed(3)
    student, teacher = 3 * torch.randn(2, 8, 32, generator=generator)
    teacher[0] = student[0]
    # Ties across the two slices: the first of equals counts on both sides.
    student[1], teacher[1] = 0.0, 0.0
    (alone,) = run_ranks(divided_vocabulary, 1, student, teacher)
    ranks = run_ranks(divided_vocabulary, 2, student, teacher)
    for place, expected in enumerate(alone):
        parts = [rank[place] for rank in ranks]
        if expected.shape == student.shape:
            torch.testing.assert_close(torch.cat(parts, -1), expected, atol=TOLERANCE, rtol=0)
            continue
        for part in parts:
            # Which of equal tokens are among the top ones is open.
            rows = slice(None) if part.is_floating_point() else [0, *range(2, 8)]
            torch.testing.assert_close(part[rows], expected[rows], atol=TOLERANCE, rtol=0)
    assert alone[4].tolist()[:2] == [1.0, 1.0]
