"""Distillation updates against a plain PyTorch loop over two Hugging Face models, and on every
layout.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.distributed.test_training_invariance import assert_same
from tests.support.distillation_example import (
    NUM_STEPS,
    STUDENT,
    TEACHER,
    TOP_K,
    TWO_RANKS,
    Distilled,
    build,
    distil,
    load,
    make_folders,
    make_texts,
    naive_loss,
    naive_mean,
)
from tests.support.launch import run_ranks
from tests.support.training_example import (
    IMAGE,
    TRAIN,
    RandomMedia,
    Result,
    make_batches,
    make_plan,
    naive_optimizer,
    naive_update,
)
from zppo_mm.algorithms.divergence import top_tokens
from zppo_mm.algorithms.row_loss import OutputRows
from zppo_mm.config.schema import ModelConfig, ParallelConfig
from zppo_mm.errors import ConfigError
from zppo_mm.experience import Group, Prompt, PromptInstance, Rollout, TopLogprobs, TrainingSample
from zppo_mm.models import vision_language
from zppo_mm.models.families.architecture import load_architecture
from zppo_mm.models.provider import build_model
from zppo_mm.models.vision_language import VisionLanguageModel
from zppo_mm.observability.metrics import StepMetrics
from zppo_mm.parallel import groups as parallel
from zppo_mm.training.distillation import DistillationObjective, check_networks
from zppo_mm.training.learner import Learner
from zppo_mm.training.policy import Policy

# Two implementations of the network in float32, then AdamW steps.
ORACLE_TOLERANCE = 1e-3
# Float32 sums over the vocabulary in another order.
TOLERANCE = 1e-5


REFERENCES = {
    "whole": Distilled(),
    "top": Distilled(top_k=TOP_K),
    "whole, by question": Distilled(by_question=True),
    "top, by question": Distilled(top_k=TOP_K, by_question=True),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a student, and a teacher whose network is another."""
    return make_folders(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def references(folders: Path) -> dict[str, Result]:
    """Return the updates of one process without shared prompts."""
    return dict(
        zip(REFERENCES, run_ranks(distil, 1, folders, list(REFERENCES.values()))[0], strict=True)
    )


def naive_updates(
    folders: Path, updates: list[list[TrainingSample]], top_k: int, by_question: bool
) -> list[tuple[float, float]]:
    """Return loss and gradient norm of plain updates, one sequence at a time."""
    from transformers import Qwen3_5ForConditionalGeneration

    def read(name: str) -> torch.nn.Module:
        return Qwen3_5ForConditionalGeneration.from_pretrained(
            folders / name, dtype=torch.float32, attn_implementation="eager"
        )

    student, teacher = read(STUDENT), read(TEACHER)
    optimizer, language = naive_optimizer(student)
    results = []
    for samples in updates:
        divergences = []
        for sample in samples:
            ids = torch.from_numpy(sample.token_ids)[None]
            before = torch.from_numpy(sample.loss_mask[1:] != 0)
            with torch.no_grad():
                target = teacher(input_ids=ids).logits[0, :-1][before]
            logits = student(input_ids=ids).logits[0, :-1][before]
            divergences.append(naive_loss(logits, target, top_k))
        mean = naive_mean(divergences, samples, by_question)
        results.append(naive_update(optimizer, language, mean))
    return results


def compare_with_naive(
    folders: Path, top_k: int, by_question: bool
) -> tuple[list[tuple[float, float]], list[tuple[float, float]]]:
    way = Distilled(top_k=top_k, texts_only=True, by_question=by_question)
    policy = build(folders, way)
    samples = make_texts()
    plan = make_plan(way.case(), 1)
    updates = [
        [s for s, owner in zip(samples, plan.minibatch_of, strict=True) if owner == update]
        for update in range(2)
    ]
    ours = [
        (update.loss, update.grad_norm)
        for update in policy.train_step(make_batches(way.case())).updates
    ]
    parallel.shutdown()
    return ours, naive_updates(folders, updates, top_k, by_question)


@pytest.mark.parametrize("by_question", [False, True])
@pytest.mark.parametrize("top_k", [0, TOP_K])
def test_updates_are_those_of_a_plain_loop(folders: Path, top_k: int, by_question: bool) -> None:
    ((ours, naive),) = run_ranks(compare_with_naive, 1, folders, top_k, by_question)
    assert len(ours) == 2
    np.testing.assert_allclose(ours, naive, rtol=ORACLE_TOLERANCE)
    assert min(loss for loss, _ in ours) > 0.01


def test_the_student_approaches_the_teacher(references: dict[str, Result]) -> None:
    for result in references.values():
        first, second = result.metrics
        assert second.loss < 0.95 * first.loss
        agreements = [update.means["distill/agreement"].reduced() for update in first.updates]
        assert all(0 <= agreement <= 1 for agreement in agreements)
    assert (
        references["top"].metrics[0].updates[0].loss
        < references["whole"].metrics[0].updates[0].loss
    )


@pytest.mark.parametrize("name", list(REFERENCES))
def test_sharing_prompts_changes_nothing(
    folders: Path, references: dict[str, Result], name: str
) -> None:
    ways = [
        dataclasses.replace(REFERENCES[name], share_prompts=True, micro_batch_tokens=tokens)
        for tokens in (20, 64, 1000)
    ]
    for actual in run_ranks(distil, 1, folders, ways)[0]:
        assert_same(actual, references[name], f"{name}, shared")


def test_the_layout_does_not_matter(folders: Path, references: dict[str, Result]) -> None:
    ways = {
        (name, layout, share_prompts): dataclasses.replace(
            REFERENCES[name], layout=TWO_RANKS[layout], share_prompts=share_prompts
        )
        for name in REFERENCES
        for layout in TWO_RANKS
        for share_prompts in ((False, True) if "whole" in name else (True,))
    }
    for results in run_ranks(distil, 2, folders, list(ways.values())):
        for (name, layout, share_prompts), actual in zip(ways, results, strict=True):
            assert_same(actual, references[name], f"{name}, {layout}, shared {share_prompts}")


def carried(folders: Path, share_prompts: bool) -> tuple[Result, Result]:
    """Distil from the teacher's top tokens, taken beforehand and carried by the samples, and from
    the teacher itself.
    """
    way = Distilled(top_k=TOP_K, texts_only=True, share_prompts=share_prompts)
    parallel.initialize(way.layout, seed=0)
    teacher = load(folders / TEACHER, way.layout, trainable=False)
    samples = [
        with_teacher_top(teacher, sample, TOP_K + (number % 2))
        for number, sample in enumerate(make_texts())
    ]
    objective = DistillationObjective(None, TOP_K, 1.0, parallel.tensor_group())
    policy = Policy(
        load(folders / STUDENT, way.layout, trainable=True), TRAIN, way.layout, objective
    )
    case = dataclasses.replace(way.case(), samples=lambda: samples)
    result = Result([policy.train_step(make_batches(case)) for _ in range(NUM_STEPS)], {})
    (live,) = distil(folders, [way])
    return result, live


def with_teacher_top(
    teacher: VisionLanguageModel, sample: TrainingSample, k: int
) -> TrainingSample:
    """Attach the teacher's top tokens; every other sample has one more column, which says that
    there is no token.
    """
    length = torch.tensor([0, sample.num_tokens], dtype=torch.int32)
    with torch.no_grad():
        logits = teacher(
            torch.from_numpy(sample.token_ids), torch.from_numpy(sample.positions), length
        )
    ids, logprobs = (each.numpy() for each in top_tokens(logits, TOP_K))
    before = ((1, 0), (0, k - TOP_K))
    return dataclasses.replace(
        sample,
        teacher_top=TopLogprobs(
            np.pad(ids[:-1], before, constant_values=-1),
            np.pad(logprobs[:-1], before, constant_values=np.float32(np.nan)),
        ),
    )


@pytest.mark.parametrize("share_prompts", [False, True])
def test_log_probs_that_samples_carry_are_as_good_as_the_teacher(
    folders: Path, share_prompts: bool
) -> None:
    ((actual, live),) = run_ranks(carried, 1, folders, share_prompts)
    assert_same(actual, live, "carried")


def learn(folders: Path, by_question: bool) -> tuple[list[float], list[float], dict[str, float]]:
    """Learn from groups of which one rollout has no log-probs of the teacher, and from the same
    groups without it.
    """
    layout = ParallelConfig()
    parallel.initialize(layout, seed=0)
    teacher = load(folders / TEACHER, layout, trainable=False)
    samples = [with_teacher_top(teacher, sample, TOP_K) for sample in make_texts()]
    updates, measured = [], []
    for without in (False, True):
        policy = Policy(
            load(folders / STUDENT, layout, trainable=True),
            TRAIN,
            layout,
            DistillationObjective(None, TOP_K, 1.0),
        )
        groups = [as_group(samples[:4], None if without else 1), as_group(samples[4:6], 2)]
        if without:
            groups[0] = dataclasses.replace(
                groups[0], rollouts=(*groups[0].rollouts[:1], *groups[0].rollouts[2:])
            )
        metrics = StepMetrics()
        train = dataclasses.replace(TRAIN, updates_per_step=1)
        advantages = {group.uid: np.zeros(len(group.rollouts), np.float32) for group in groups}
        learner = Learner(policy, RandomMedia(), train, 0, averages_questions=by_question)
        learner.learn(groups, advantages, 1, metrics)
        measured.append(metrics.values())
        updates.append(
            [
                measured[-1][name]
                for name in (
                    "policy/loss",
                    "policy/grad_norm",
                    "batch/loss_tokens",
                    "distill/agreement",
                )
            ]
        )
    parallel.shutdown()
    return updates[0], updates[1], measured[0]


def as_group(samples: list[TrainingSample], without_logprobs: int | None) -> Group:
    """Return the samples of a group as what was sampled, one of them without the teacher's
    log-probs.
    """
    first = samples[0]
    count = first.num_prompt_tokens
    prompt = Prompt("", first.token_ids[:count], first.positions[:, :count], count)
    rollouts = []
    for index, sample in enumerate(samples):
        assert sample.teacher_top is not None
        top = TopLogprobs(sample.teacher_top.ids[count:], sample.teacher_top.logprobs[count:])
        teacher_top = None if index == without_logprobs else top
        rollouts.append(
            Rollout(
                sample.token_ids[count:], None, "stop", "", None, 1.0, 1, teacher_top=teacher_top
            )
        )
    return Group(PromptInstance(first.uid, first.question, "teacher", ""), prompt, tuple(rollouts))


@pytest.mark.parametrize("by_question", [False, True])
def test_a_rollout_without_log_probs_is_left_out_and_counted(
    folders: Path, by_question: bool
) -> None:
    ((with_it, without, metrics),) = run_ranks(learn, 1, folders, by_question)
    assert metrics["distill/left_out"] == 1
    np.testing.assert_allclose(with_it, without, rtol=TOLERANCE)
    # Responses of 12, 7, 7 and 5, 6 tokens are left.
    assert without[2] == 12 + 7 + 7 + 5 + 6


def refusals(folders: Path) -> list[str]:
    """Return what is said about teachers that cannot be compared with the student."""
    layout = ParallelConfig()
    parallel.initialize(layout, seed=0)
    architecture = load_architecture(folders / STUDENT)
    student = build_model(architecture, ModelConfig(), layout)
    larger = build_model(
        dataclasses.replace(architecture, vocab_size=136), ModelConfig(), layout, trainable=False
    )
    fused = build_model(architecture, ModelConfig(), layout, trainable=False)
    # As if it alone were computed by flash-linear-attention's kernels.
    vision_language.chosen_kernels = lambda config: (  # type: ignore[assignment]
        (abs, abs) if config is fused.config else None
    )
    said = []
    for teacher, share_prompts in ((larger, "auto"), (fused, "auto"), (fused, "never")):
        try:
            check_networks(student, teacher, share_prompts)
            said.append("")
        except ConfigError as error:
            said.append(str(error))
    check_networks(fused, student, "auto")
    parallel.shutdown()
    return said


def test_networks_that_cannot_be_compared_are_refused(folders: Path) -> None:
    ((sizes, sharing, apart),) = run_ranks(refusals, 1, folders)
    assert "got 128 tokens of the student and 136 of the teacher, expected as many" in sizes
    assert "train.share_prompts: the teacher's layers cannot share prompts, got 'auto'" in sharing
    assert apart == ""


def touched_positions(folders: Path, ways: list[Distilled]) -> list[np.ndarray]:
    """Return which tokens' outputs get a gradient in the first micro-batch, and which should, `[2,
    tokens]`.
    """
    found = []
    for way in ways:
        policy = build(folders, way)
        microbatch = make_batches(way.case())[0].microbatches[0]
        inputs = (
            microbatch.token_ids,
            microbatch.positions,
            microbatch.cu_seqlens,
            microbatch.patches,
            microbatch.grids,
        )
        hidden = policy.model(*inputs, parents=microbatch.parents, output_layer=False)
        hidden.retain_grad()
        rows = OutputRows(hidden, policy.model.output_weight())
        policy.objective(rows, microbatch).loss_sum.backward()
        assert hidden.grad is not None
        touched = (hidden.grad.abs().sum(-1) > 0).numpy()
        expected = np.zeros_like(touched)
        for sequence, parent in enumerate(
            microbatch.parents or [-1] * (len(microbatch.cu_seqlens) - 1)
        ):
            bounds = microbatch.cu_seqlens.tolist()
            for token in range(bounds[sequence], bounds[sequence + 1]):
                if microbatch.loss_mask[token]:
                    expected[token - 1 if token > bounds[sequence] else bounds[parent + 1] - 1] = (
                        True
                    )
        assert (microbatch.token_ids == IMAGE).any()
        found.append(np.stack([touched, expected]))
    parallel.shutdown()
    return found


@pytest.mark.parametrize("top_k", [0, TOP_K])
def test_only_positions_that_predict_the_response_get_a_gradient(folders: Path, top_k: int) -> None:
    ways = [
        Distilled(top_k=top_k, share_prompts=share_prompts, micro_batch_tokens=1000)
        for share_prompts in (False, True)
    ]
    for touched, expected in run_ranks(touched_positions, 1, folders, ways)[0]:
        np.testing.assert_array_equal(touched, expected)
        assert 0 < expected.sum() < len(expected)
