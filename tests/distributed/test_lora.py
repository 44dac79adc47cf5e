"""Adapters on every layout: the same updates, PEFT folder, samples and table of sizes; checkpoints
that continue at another one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from tests.support import network_checks, tiny_qwen
from tests.support.launch import run_ranks
from tests.support.training_example import TRAIN, Case, make_batches, write_tiny_folder
from tests.unit.test_models_lora_bfloat16 import decoding_linears
from zppo_mm.config.schema import AlgorithmConfig, LoraConfig, ModelConfig, ParallelConfig
from zppo_mm.lora.adapters import adapters_of, add_lora
from zppo_mm.lora.export import WEIGHTS_FILE, export_adapter
from zppo_mm.models.decoding.decode import decode, prefill
from zppo_mm.models.families.architecture import load_architecture
from zppo_mm.models.layers.cache import DecodeCache
from zppo_mm.models.provider import build_model
from zppo_mm.models.vision_language import VisionLanguageModel
from zppo_mm.parallel import groups as parallel
from zppo_mm.training import checkpoint
from zppo_mm.training.objective import PolicyObjective
from zppo_mm.training.policy import Policy
from zppo_mm.training.trainable import part_sizes
from zppo_mm.weights.mapping import load_hf_weights

pytestmark = pytest.mark.timeout(700)  # a start of four ranks takes a minute on a busy machine
LORA = LoraConfig(rank=4, alpha=8)
# The last layer alone has these, so that the first stage of a pipeline has nothing to train.
FEW = LoraConfig(rank=4, alpha=8, targets=["q_proj", "o_proj"])
SEED = 3
# Float32 sums in another order, carried through four updates.
TOLERANCE = 2e-5
# Equal ones differ by 1e-6 here, a gradient missing one rank's part moves a weight by 4e-3.
WEIGHT_TOLERANCE = 1e-5
# bfloat16 rounds every activation to 8 bits.
LOSS_TOLERANCE = {"float32": TOLERANCE, "bfloat16": 3e-2}
SAMPLING_TOLERANCE = 1e-4

TWO_RANKS = {
    "data": ParallelConfig(),
    "tensor": ParallelConfig(tensor_model_parallel_size=2),
    "sequence": ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True),
    "pipeline": ParallelConfig(pipeline_model_parallel_size=2),
    "context": ParallelConfig(context_parallel_size=2),
    "few, pipeline": ParallelConfig(pipeline_model_parallel_size=2),
}
FOUR_RANKS = {
    "tensor x pipeline": ParallelConfig(
        tensor_model_parallel_size=2, pipeline_model_parallel_size=2
    ),
    "sequence x data": ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_folder(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def alone(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_ranks(
        train_cases,
        1,
        folder,
        {"all": ParallelConfig(), "few": ParallelConfig()},
        tmp_path_factory.mktemp("alone"),
    )[0]


def build(
    folder: Path, layout: ParallelConfig, lora: LoraConfig = LORA, dtype: str = "float32"
) -> VisionLanguageModel:
    """Return this rank's stage with adapters that have an effect, the same on every layout."""
    parallel.initialize(layout, seed=0)
    model = build_model(load_architecture(folder), ModelConfig(params_dtype=dtype), layout)
    load_hf_weights(model, folder)
    add_lora(model, lora, SEED)
    adapters = adapters_of(model)
    assert adapters is not None
    for branch in adapters.branches.values():
        num_shards = parallel.tensor_size() if branch.mapping.rule.axis == 0 else 1
        for target in branch.targets:
            stream = torch.Generator().manual_seed(sum(target.key.encode()))
            whole = torch.randn(len(target.rows) * num_shards, lora.rank, generator=stream) * 0.05
            target.lora_B.data.copy_(whole[target.rows])
    return model


def wrap(model: VisionLanguageModel, layout: ParallelConfig) -> Policy:
    return Policy(
        model, TRAIN, layout, PolicyObjective(AlgorithmConfig(), 1.0, parallel.tensor_group())
    )


def train(folder: Path, layout: ParallelConfig, target: Path, lora: LoraConfig) -> dict[str, Any]:
    """Export, decode, make two steps, export again."""
    model = build(folder, layout, lora)
    export_adapter(model, folder, target / "before")
    gap = sampling_gap(model)
    policy = wrap(model, layout)
    base = {
        name: parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if not parameter.requires_grad
    }
    batches = make_batches(Case(layout))
    updates = [update for _ in range(2) for update in policy.train_step(batches).updates]
    export_adapter(model, folder, target / "after")
    return {
        "updates": [(update.loss, update.grad_norm, update.skipped) for update in updates],
        "gap": gap,
        "sizes": part_sizes(model),
        "base unchanged": all(
            torch.equal(model.get_parameter(name), value) for name, value in base.items()
        ),
    }


@torch.no_grad()
def sampling_gap(model: VisionLanguageModel) -> float:
    """Return the largest difference of a token's log-probs between prefill and decoding, and the
    training forward pass.
    """
    part = tiny_qwen.make_sequence(0, [6, ("image", (1, 4, 6)), 5])
    count, prompt, vocabulary = 6, len(part.token_ids), model.architecture.vocab_size
    cache = DecodeCache(num_blocks=4, max_rows=1)
    logits = network_checks.share_logits(
        prefill(model, **tiny_qwen.pack([part]), cache=cache), 1, vocabulary
    )
    tokens, sampled = [], [logits]
    for step in range(count):
        tokens.append(logits[:, : tiny_qwen.IMAGE].argmax(-1))
        position = torch.full((3, 1), part.next_position + step)
        logits = network_checks.share_logits(
            decode(model, tokens[-1], position, cache), 1, vocabulary
        )
        sampled.append(logits)
    if parallel.pipeline_size() > 1:
        # A stage of a pipeline cannot run the forward pass alone; the engine's own tests cover its
        # messages.
        return 0.0
    pack = tiny_qwen.pack([part])
    pack["token_ids"] = torch.cat([part.token_ids, *tokens])
    pack["positions"] = torch.cat(
        [part.positions, part.next_position + torch.arange(count).expand(3, -1)], 1
    )
    pack["cu_seqlens"] = torch.tensor([0, prompt + count], dtype=torch.int32)
    whole = torch.zeros(prompt + count, vocabulary)
    whole[model.own_tokens(prompt + count)] = network_checks.gather_vocabulary(model(**pack))
    dist.all_reduce(whole, group=parallel.context_group())
    return float(
        (torch.log_softmax(torch.cat(sampled), -1) - torch.log_softmax(whole[prompt - 1 :], -1))
        .abs()
        .max()
    )


def train_cases(folder: Path, layouts: dict[str, ParallelConfig], target: Path) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for name, layout in layouts.items():
        results[name] = train(
            folder, layout, target / name, FEW if name.startswith("few") else LORA
        )
        for moment in ("before", "after"):
            results[name][moment] = load_file(target / name / moment / WEIGHTS_FILE)
    parallel.shutdown()
    return results


def test_adapters_learn_and_nothing_else_moves(alone: dict[str, Any]) -> None:
    assert sorted({key.split(".")[5] for key in alone["few"]["after"]}) == ["3"]
    alone = alone["all"]
    first, *_, last = alone["updates"]
    assert first[1] > 0.001
    assert abs(first[0] - last[0]) > 100 * TOLERANCE
    assert alone["base unchanged"]
    # 3 DeltaNet layers with 5 + 3 linears each, 1 of attention with 4 + 3.
    assert len(alone["after"]) == 2 * (3 * 8 + 7)
    moved = [
        float((alone["after"][name] - alone["before"][name]).abs().max()) for name in alone["after"]
    ]
    assert min(moved) > 20 * WEIGHT_TOLERANCE


@pytest.mark.parametrize(("world_size", "layouts"), [(2, TWO_RANKS), (4, FOUR_RANKS)])
def test_the_layout_does_not_matter(
    folder: Path,
    alone: dict[str, Any],
    world_size: int,
    layouts: dict[str, ParallelConfig],
    tmp_path: Path,
) -> None:
    for results in run_ranks(
        train_cases, world_size, folder, layouts, tmp_path, timeout_seconds=600
    ):
        for name, result in results.items():
            expected = alone["few" if name.startswith("few") else "all"]
            assert result["base unchanged"], name
            assert result["gap"] <= SAMPLING_TOLERANCE, name
            assert result["sizes"] == expected["sizes"], name
            for mine, reference in zip(result["updates"], expected["updates"], strict=True):
                assert mine == pytest.approx(reference, rel=TOLERANCE, abs=TOLERANCE), name
            assert result["before"].keys() == expected["before"].keys(), name
            for key, initial in expected["before"].items():
                assert torch.equal(result["before"][key], initial), (name, key)
                torch.testing.assert_close(
                    result["after"][key],
                    expected["after"][key],
                    atol=WEIGHT_TOLERANCE,
                    rtol=0,
                    msg=f"{name} {key}",
                )


def save_and_go_on(folder: Path, target: Path, layout: ParallelConfig, dtype: str) -> list[float]:
    policy = wrap(build(folder, layout, dtype=dtype), layout)
    batches = make_batches(Case(layout))
    policy.train_step(batches)
    checkpoint.save(target, 1, policy, {"step": 1}, keep=1)
    return [update.loss for update in policy.train_step(batches).updates]


def load_and_go_on(folder: Path, target: Path, layout: ParallelConfig, dtype: str) -> list[float]:
    """Start from other adapters, which the checkpoint must replace."""
    model = build(folder, layout, dtype=dtype)
    adapters = adapters_of(model)
    assert adapters is not None
    for parameter in adapters.parameters():
        torch.nn.init.normal_(parameter)
    policy = wrap(model, layout)
    assert checkpoint.load_latest(target, policy) == {"step": 1}
    return [update.loss for update in policy.train_step(make_batches(Case(layout))).updates]


def save_on_two_ranks(folder: Path, root: Path) -> dict[tuple[str, str], list[float]]:
    results = {}
    for dtype in LOSS_TOLERANCE:
        for name, layout in TWO_RANKS.items():
            if name != "few, pipeline":
                results[dtype, name] = save_and_go_on(folder, root / dtype / name, layout, dtype)
        for name, other in (("tensor", "pipeline"), ("data", "sequence")):
            results[dtype, f"{name} at {other}"] = load_and_go_on(
                folder, root / dtype / name, TWO_RANKS[other], dtype
            )
    parallel.shutdown()
    return results


def load_on_one_rank(folder: Path, root: Path) -> dict[tuple[str, str], list[float]]:
    names = [name for name in TWO_RANKS if name != "few, pipeline"]
    results = {
        (dtype, name): load_and_go_on(folder, root / dtype / name, ParallelConfig(), dtype)
        for dtype in LOSS_TOLERANCE
        for name in names
    }
    parallel.shutdown()
    return results


def test_a_checkpoint_continues_at_every_layout(
    folder: Path, alone: dict[str, Any], tmp_path: Path
) -> None:
    reference = [loss for loss, _norm, _skipped in alone["all"]["updates"][2:]]
    results = [
        *run_ranks(save_on_two_ranks, 2, folder, tmp_path),
        *run_ranks(load_on_one_rank, 1, folder, tmp_path),
    ]
    for result in results:
        for (dtype, name), losses in result.items():
            assert losses == pytest.approx(
                reference, rel=LOSS_TOLERANCE[dtype], abs=LOSS_TOLERANCE[dtype]
            ), (dtype, name)


def equal_outputs(folder: Path, size: float) -> dict[str, bool]:
    with torch.no_grad():
        return _equal_outputs(folder, size)


def _equal_outputs(folder: Path, size: float) -> dict[str, bool]:
    """Compare every linear's output in bfloat16 in the decoding loop with that in training, on two
    tensor ranks.
    """
    layout = ParallelConfig(tensor_model_parallel_size=2)
    parallel.initialize(layout, seed=0)
    model = build_model(load_architecture(folder), ModelConfig(params_dtype="bfloat16"), layout)
    load_hf_weights(model, folder)
    add_lora(model, LORA, SEED)
    adapters = adapters_of(model)
    assert adapters is not None
    for target in adapters.targets():
        stream = torch.Generator().manual_seed(sum(target.key.encode()))
        target.lora_B.data.copy_(
            size
            * torch.randn(2 * len(target.rows), LORA.rank, generator=stream)[: len(target.rows)]
        )
    linears, equal = decoding_linears(model.eval()), {}
    for name, branch in adapters.branches.items():
        # Of a row-parallel linear each rank has inputs of its own.
        stream = torch.Generator().manual_seed(
            parallel.tensor_rank() if branch.mapping.rule.axis == 1 else 5
        )
        hidden = torch.randn(256, branch.mapping.parameter.shape[1], generator=stream).bfloat16()
        equal[name] = torch.equal(
            linears[branch.linear](hidden), branch.linear(hidden[:, None])[0].squeeze(1)
        )
    parallel.shutdown()
    return equal


@pytest.mark.parametrize("size", [1e-4, 1e-1])
def test_sampler_and_trainer_compute_the_same_in_bfloat16_on_two_tensor_ranks(
    folder: Path, size: float
) -> None:
    for equal in run_ranks(equal_outputs, 2, folder, size):
        assert len(equal) == 4 * 4
        assert all(equal.values()), equal
