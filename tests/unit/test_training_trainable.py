"""What is frozen has no gradient buffer, no optimizer state and no backward pass; the table says
what trains and what it costs.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.support.training_example import TRAIN, Case, make_batches, write_tiny_folder
from zppo_mm.config.schema import AlgorithmConfig, LoraConfig, ModelConfig, ParallelConfig
from zppo_mm.lora.adapters import add_lora
from zppo_mm.models.families.architecture import load_architecture
from zppo_mm.models.provider import build_model
from zppo_mm.parallel import groups as parallel
from zppo_mm.training.objective import PolicyObjective
from zppo_mm.training.policy import Policy
from zppo_mm.training.trainable import PartSize, part_sizes, table
from zppo_mm.weights.mapping import load_hf_weights

pytestmark = pytest.mark.usefixtures("one_rank")

PARTS = ("vision", "projector", "language")
# megatron-core starts every parameter and ends every bucket at a multiple of this many values.
MAX_PADDING = 128
FREEZES: list[tuple[tuple[str, ...], LoraConfig]] = [
    ((), LoraConfig()),
    (("vision",), LoraConfig()),
    (("language",), LoraConfig()),
    (("vision", "projector"), LoraConfig()),
    ((), LoraConfig(rank=2)),
    (PARTS, LoraConfig(rank=2)),
    (("vision",), LoraConfig(rank=2, also_train=["projector"])),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_folder(tmp_path_factory.mktemp("tiny"), tied=False)


def build(
    folder: Path,
    freeze: tuple[str, ...],
    lora: LoraConfig,
    dtype: str = "float32",
    moments_dtype: str = "float32",
) -> Policy:
    layout = ParallelConfig()
    model = build_model(load_architecture(folder), ModelConfig(params_dtype=dtype), layout)
    load_hf_weights(model, folder)
    add_lora(model, lora, seed=0)
    train = dataclasses.replace(TRAIN, freeze=list(freeze), optimizer_state_dtype=moments_dtype)
    return Policy(
        model, train, layout, PolicyObjective(AlgorithmConfig(), 1.0, parallel.tensor_group())
    )


def state_bytes(policy: Policy) -> int:
    """Return the bytes that the optimizer holds: its moments, and its own float32 copies of
    weights.
    """
    total = 0
    weights = {parameter.data_ptr() for parameter in policy.model.parameters()}
    for part in getattr(policy.optimizer, "chained_optimizers", [policy.optimizer]):
        for parameter, values in part.optimizer.state.items():
            total += sum(
                value.numel() * value.element_size()
                for name, value in values.items()
                if name != "step"
            )
            total += (
                0
                if parameter.data_ptr() in weights
                else parameter.numel() * parameter.element_size()
            )
    return total


@pytest.mark.parametrize(("freeze", "lora"), FREEZES)
@pytest.mark.medium
def test_frozen_parameters_have_no_buffer_no_state_and_do_not_move(
    folder: Path, freeze: tuple[str, ...], lora: LoraConfig
) -> None:
    policy = build(folder, freeze, lora)
    model, wrapped = policy.model, policy._wrapped
    frozen = {
        id(parameter): parameter for parameter in model.parameters() if not parameter.requires_grad
    }
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for part in PARTS:
        expected = part not in (lora.also_train if lora.rank else set(PARTS) - set(freeze))
        assert all(
            (id(parameter) in frozen) == expected for parameter in model.parameters_of(part)
        ), part
    before = {key: parameter.detach().clone() for key, parameter in frozen.items()}
    started = [parameter.detach().clone() for parameter in trained]
    count = sum(parameter.numel() for parameter in trained)

    buffered = sum(buffer.grad_data.numel() for buffer in wrapped.buffers)
    assert count <= buffered < count + MAX_PADDING * (len(trained) + 1)
    assert {id(parameter) for buffer in wrapped.buffers for parameter in buffer.params} == {
        id(parameter) for parameter in trained
    }
    # Two steps: a fresh B is zero, so the first moves no A.
    for _ in range(2):
        policy.train_step(make_batches(Case()))
    assert state_bytes(policy) == 8 * count
    assert all(torch.equal(parameter, before[key]) for key, parameter in frozen.items())
    assert all(
        parameter.grad is None and not hasattr(parameter, "main_grad")
        for parameter in frozen.values()
    )
    assert not any(
        torch.equal(parameter, old) for parameter, old in zip(trained, started, strict=True)
    )
    sizes = sum(part_sizes(model).values(), PartSize())
    assert (sizes.trainable, sizes.gradient_bytes, sizes.optimizer_bytes) == (
        count,
        4 * count,
        8 * count,
    )


def test_a_coarser_network_has_float32_copies_of_what_trains(folder: Path) -> None:
    policy = build(folder, ("vision", "projector"), LoraConfig(rank=2), dtype="bfloat16")
    policy.train_step(make_batches(Case()))
    sizes = part_sizes(policy.model)["lora"]
    assert sizes.weight_bytes == 2 * sizes.parameters
    assert sizes.optimizer_bytes == 12 * sizes.parameters == state_bytes(policy)


def test_moments_in_bfloat16_take_half(folder: Path) -> None:
    policy = build(folder, (), LoraConfig(rank=2), "bfloat16", "bfloat16")
    policy.train_step(make_batches(Case()))
    sizes = part_sizes(policy.model, "bfloat16")["lora"]
    assert sizes.optimizer_bytes == 8 * sizes.parameters == state_bytes(policy)


def test_log_probs_for_comparison_drop_nothing(folder: Path) -> None:
    policy = build(folder, (), LoraConfig(rank=2, dropout=0.9))
    for name, parameter in policy.model.named_parameters():
        if name.endswith("lora_B"):
            torch.nn.init.normal_(parameter)
    (batch, *_) = make_batches(Case())
    first, second = (torch.cat(policy.compute_logprobs(batch)) for _ in range(2))
    assert torch.equal(first, second)
    assert policy.model.training


class Passes:
    """Looks at what the vision tower is asked for.

    Attributes:
        grids: Of every call.
        differentiable: Whether the features of a call carried a gradient back.
        num_backward: Backward passes that reached the tower's features.
    """

    def __init__(self, model: Any) -> None:
        self.grids: list[list[int]] = []
        self.differentiable: list[bool] = []
        self.num_backward = 0
        model.vision.register_forward_hook(self._compare)

    def _compare(
        self, _tower: torch.nn.Module, inputs: tuple[Any, ...], features: torch.Tensor
    ) -> None:
        self.grids += inputs[1].tolist()
        self.differentiable.append(features.requires_grad)
        if features.requires_grad:
            features.register_hook(self._count)

    def _count(self, _gradient: torch.Tensor) -> None:
        self.num_backward += 1


@pytest.mark.parametrize(
    ("freeze", "lora"),
    [
        (("vision", "projector"), LoraConfig()),
        ((), LoraConfig(rank=2)),
        (("vision",), LoraConfig()),
        ((), LoraConfig()),
    ],
)
def test_no_backward_pass_runs_through_a_wholly_frozen_tower(
    folder: Path, freeze: tuple[str, ...], lora: LoraConfig
) -> None:
    policy = build(folder, freeze, lora)
    passes = Passes(policy.model)
    # One sample per micro-batch: each of the two updates has one with an image and two that pass
    # without.
    policy.train_step(make_batches(Case(micro_batch_tokens=1)))
    images = [grid for grid in passes.grids if grid == [1, 4, 6]]
    assert len(images) == 2
    if lora.rank or "projector" in freeze:
        assert passes.grids == images
        assert passes.differentiable == [False] * 2
        assert passes.num_backward == 0
    else:
        assert len(passes.grids) == 6
        assert all(passes.differentiable)
        assert passes.num_backward == 6


def test_the_table_counts_the_folder(folder: Path) -> None:
    policy = build(folder, (), LoraConfig(rank=2, targets=["q_proj", "down_proj"]))
    sizes = part_sizes(policy.model)
    tensors = load_file(folder / "model.safetensors")
    in_folder = dict.fromkeys(PARTS, 0)
    for key, tensor in tensors.items():
        part = (
            "projector" if "visual.merger" in key else "vision" if "visual." in key else "language"
        )
        in_folder[part] += tensor.numel()
    assert {part: sizes[part].parameters for part in PARTS} == in_folder
    assert all(
        sizes[part] == PartSize(count, 0, 4 * count, 0, 0) for part, count in in_folder.items()
    )
    # q_proj is 64 to 2 x 4 x 32 in the one attention layer, down_proj 96 to 64 in all four layers.
    adapters = 2 * (64 + 256) + 4 * 2 * (96 + 64)
    assert sizes["lora"] == PartSize(adapters, adapters, 4 * adapters, 4 * adapters, 8 * adapters)


def test_the_table_is_aligned_and_has_units() -> None:
    text = table(
        {
            "vision": PartSize(1_500, 0, 6_000, 0, 0),
            "lora": PartSize(2**20, 2**20, 2**21, 2**22, 12 * 2**30),
        }
    )
    assert text.splitlines() == [
        "        parameters  trainable  weights  gradients  optimizer",
        "------  ----------  ---------  -------  ---------  ---------",
        "vision       1,500          0  5.9 KiB        0 B        0 B",
        "lora     1,048,576  1,048,576  2.0 MiB    4.0 MiB   12.0 GiB",
        "all      1,050,076  1,048,576  2.0 MiB    4.0 MiB   12.0 GiB",
    ]
