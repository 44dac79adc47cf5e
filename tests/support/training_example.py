"""A tiny Qwen3.5-VL folder, samples with and without images, and a few updates on them: what the
training tests share.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from data.question import MediaRef, Question
from encoders.processor import VisionInput
from tests.support import tiny_qwen
from zppo_mm.config.schema import (
    AlgorithmConfig,
    LoraConfig,
    ModelConfig,
    ParallelConfig,
    TrainConfig,
)
from zppo_mm.experience import Batch, TrainingSample
from zppo_mm.lora.adapters import add_lora
from zppo_mm.models.families.architecture import load_architecture
from zppo_mm.models.provider import build_model
from zppo_mm.parallel import groups as parallel
from zppo_mm.randomness import generator
from zppo_mm.training.batching import BatchPlan, build_batches, plan_batches
from zppo_mm.training.objective import PolicyObjective
from zppo_mm.training.policy import Policy, TrainMetrics, UpdateMetrics
from zppo_mm.weights.mapping import load_hf_weights

VOCABULARY = 128
IMAGE, VIDEO, VISION_START, VISION_END = 120, 121, 122, 123
GRID = (1, 4, 6)
ROPE = tiny_qwen.rope_parameters(1e4, 0.25, [2, 1, 1])
PATCH_ELEMENTS = 3 * 2 * 4 * 4
# An epsilon above the gradients' rounding: Adam divides a near-zero gradient by itself, which turns
# rounding into whole steps.
TRAIN = TrainConfig(updates_per_step=2, lr=2e-2, adam_eps=1e-3, clip_grad=0.3, train_iters=10)


def write_tiny_folder(folder: Path, tied: bool = True, vocabulary: int = VOCABULARY) -> Path:
    """Write a random Hugging Face model with 3 DeltaNet layers, 1 attention layer and a vision
    tower.
    """
    from transformers import Qwen3_5Config, Qwen3_5ForConditionalGeneration

    text = tiny_qwen.text_config(
        tied=tied, vocab_size=vocabulary, full_attention_interval=4, rope_parameters=ROPE
    )
    torch.manual_seed(5)
    config = Qwen3_5Config(
        text_config=text,
        vision_config=tiny_qwen.vision_config(),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
        tie_word_embeddings=tied,
    )
    Qwen3_5ForConditionalGeneration(config).save_pretrained(folder)
    return folder


def make_sample(
    uid: str, number: int, prompt: int, response: int, advantage: float, image: bool
) -> TrainingSample:
    """Return a random sample; with an image its prompt starts with the placeholders."""
    random = generator(1, uid, number)
    pixels = [VISION_START, *[IMAGE] * (GRID[1] * GRID[2] // 4), VISION_END] if image else []
    ids = np.array([*pixels, *random.integers(1, 100, prompt + response)])
    mask = np.zeros(len(ids), dtype=np.float32)
    mask[len(ids) - response :] = 1
    media = (MediaRef("image", "none.tar", uid, "png"),) if image else ()
    return TrainingSample(
        uid=uid,
        question=Question(id=uid, text="", media=media, answer="", answer_type="math"),
        token_ids=ids,
        positions=np.tile(np.arange(len(ids)), (3, 1)),
        loss_mask=mask,
        # Around the log-prob of a uniform guess, so that ratios lie on both sides of the clip
        # range.
        old_logprobs=(mask * (-np.log(VOCABULARY) + 0.4 * random.standard_normal(len(ids)))).astype(
            np.float32
        ),
        advantages=(advantage * mask).astype(np.float32),
        grids=(GRID,) if image else (),
    )


def make_samples() -> list[TrainingSample]:
    """Return two groups, one per update: in each a long image sample balances short text samples,
    and two are trivial.
    """
    shapes = [
        (8, 30, 1.5, True),
        (6, 9, -0.7, False),
        (5, 12, 0.0, False),
        (6, 5, 0.0, False),
        (4, 7, -1.2, False),
    ]
    return [
        make_sample(uid, number, prompt, response, advantage, image)
        for uid in ("first", "second")
        for number, (prompt, response, advantage, image) in enumerate(shapes)
    ]


def make_groups() -> list[TrainingSample]:
    """Return four groups whose samples have their prompt in common, one with an image; each
    response is a sample of its own length.
    """
    shapes = [
        (3, (30, 9, 5), True),
        (11, (12, 1, 7, 7), False),
        (2, (5, 6), False),
        (20, (8,), False),
    ]
    samples = []
    for number, (prompt, responses, image) in enumerate(shapes):
        first = make_sample(f"group {number}", 0, prompt, responses[0], 1.5, image)
        count = first.num_prompt_tokens
        samples.append(first)
        for index, response in enumerate(responses[1:], 1):
            sample = make_sample(f"group {number}", index, prompt, response, -0.9 * index, image)
            token_ids = np.concatenate([first.token_ids[:count], sample.token_ids[count:]])
            samples.append(dataclasses.replace(sample, token_ids=token_ids))
    return samples


class RandomMedia:
    """Pixels that follow from the question's id."""

    def vision_inputs(self, question: Question) -> list[VisionInput]:
        patches = (
            generator(2, question.id)
            .standard_normal((GRID[0] * GRID[1] * GRID[2], PATCH_ELEMENTS))
            .astype(np.float32)
        )
        return [VisionInput("image", patches, GRID) for _ in question.media]


@dataclass(frozen=True)
class Case:
    """One way to run the same updates."""

    layout: ParallelConfig = dataclasses.field(default_factory=ParallelConfig)
    micro_batch_tokens: int = 64
    skip_zero_advantage: bool = True
    train: TrainConfig = dataclasses.field(default_factory=lambda: TRAIN)
    samples: Callable[[], list[TrainingSample]] = make_samples
    share_prompts: bool = False
    params_dtype: str = "float32"
    lora: LoraConfig = dataclasses.field(default_factory=LoraConfig)


def make_plan(case: Case, num_replicas: int) -> BatchPlan:
    return plan_batches(
        case.samples(),
        num_minibatches=case.train.updates_per_step,
        num_replicas=num_replicas,
        micro_batch_tokens=case.micro_batch_tokens,
        random=generator(0, "minibatches", 0),
        skip_zero_advantage=case.skip_zero_advantage,
        share_prompts=case.share_prompts,
    )


def make_batches(case: Case) -> list[Batch]:
    """Return this rank's updates."""
    media = RandomMedia() if parallel.is_first_stage() else None
    plan = make_plan(case, parallel.data_size())
    return build_batches(
        plan, case.samples(), replica=parallel.data_rank(), media=media, device=parallel.device()
    )


def build_policy(folder: Path, case: Case) -> Policy:
    """Set the layout, load the folder and wrap it."""
    parallel.initialize(case.layout, seed=0)
    model = build_model(
        load_architecture(folder), ModelConfig(params_dtype=case.params_dtype), case.layout
    )
    load_hf_weights(model, folder)
    add_lora(model, case.lora, seed=0)
    return Policy(
        model,
        case.train,
        case.layout,
        PolicyObjective(AlgorithmConfig(), 1.0, parallel.tensor_group()),
    )


@dataclass(frozen=True)
class Result:
    """What came of a case: metrics by step, and the trained weights that every tensor rank holds
    whole, by name.
    """

    metrics: list[TrainMetrics]
    whole_weights: dict[str, torch.Tensor]


def reduced(update: UpdateMetrics) -> dict[str, float | None]:
    """Return the means of an update as numbers."""
    return {name: mean.reduced() for name, mean in update.means.items()}


def run_case(folder: Path, case: Case, num_steps: int = 2) -> Result:
    """Make some steps over the same batches."""
    policy = build_policy(folder, case)
    batches = make_batches(case)
    metrics = [policy.train_step(batches) for _ in range(num_steps)]
    named = policy.model.named_parameters()
    return Result(
        metrics,
        {
            name: p.detach().clone()
            for name, p in named
            if not getattr(p, "tensor_model_parallel", False)
        },
    )


def run_cases(folder: Path, cases: list[Case]) -> list[Result]:
    """Run several cases in the same processes."""
    results = [run_case(folder, case) for case in cases]
    parallel.shutdown()
    return results


def naive_optimizer(network: torch.nn.Module) -> tuple[torch.optim.AdamW, list[torch.nn.Parameter]]:
    """Return PyTorch's AdamW with the settings of `TRAIN`, and the parameters that it updates:
    those of the language model.
    """
    language = [value for name, value in network.named_parameters() if "visual" not in name]
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in language if p.ndim > 1], "weight_decay": TRAIN.weight_decay},
            {"params": [p for p in language if p.ndim <= 1], "weight_decay": 0.0},
        ],
        lr=TRAIN.lr,
        betas=(TRAIN.adam_beta1, TRAIN.adam_beta2),
        eps=TRAIN.adam_eps,
    )
    return optimizer, language


def naive_update(
    optimizer: torch.optim.AdamW, parameters: list[torch.nn.Parameter], loss: torch.Tensor
) -> tuple[float, float]:
    """Take one step on a loss; returns the loss and the gradient norm."""
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    norm = torch.nn.utils.clip_grad_norm_(parameters, TRAIN.clip_grad)
    optimizer.step()
    return float(loss.detach()), float(norm)
