"""The network at tensor and pipeline sizes above one: logits, gradients, decoding, export and
distributed checkpoints.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from safetensors.torch import load_file

from tests.support import network_checks, tiny_qwen
from tests.support.launch import run_ranks
from zppo_mm.config.schema import ModelConfig, ParallelConfig
from zppo_mm.models.layers.gated_delta_net import GatedDeltaNet
from zppo_mm.models.provider import build_model
from zppo_mm.models.vision_language import VisionLanguageModel
from zppo_mm.parallel import groups as parallel
from zppo_mm.weights.hf_export import export_hf_weights
from zppo_mm.weights.mapping import parameter_mappings

KINDS = tuple(tiny_qwen.SEQUENCES)
LAYOUTS = {"tensor": (2, 1), "pipeline": (1, 2), "both": (2, 2)}
NUM_NEW_TOKENS = 6


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """Return an untied and a tied folder, by whether they are tied."""
    return {
        tied: tiny_qwen.save(
            tiny_qwen.vision_language_model(tied=tied), tmp_path_factory.mktemp("model")
        )
        for tied in (False, True)
    }


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return where the first layout saves and the others load."""
    return tmp_path_factory.mktemp("checkpoint")


@pytest.mark.parametrize("layout", ["both", "tensor", "pipeline"])
def test_a_split_network_equals_transformers(
    layout: str, folders: dict[bool, Path], checkpoint: Path, tmp_path: Path
) -> None:
    tensor, pipeline = LAYOUTS[layout]
    run_ranks(check_rank, tensor * pipeline, tensor, pipeline, folders, checkpoint, tmp_path)
    for tied, folder in folders.items():
        wanted, found = (
            load_file(path / "model.safetensors") for path in (folder, tmp_path / f"export {tied}")
        )
        assert found.keys() == wanted.keys()
        assert all(found[key].equal(tensor) for key, tensor in wanted.items())


def check_rank(
    tensor: int, pipeline: int, folders: dict[bool, Path], checkpoint: Path, target: Path
) -> None:
    """Run on every rank: both folders through all checks."""
    config = ParallelConfig(
        tensor_model_parallel_size=tensor, pipeline_model_parallel_size=pipeline, timeout_minutes=3
    )
    parallel.initialize(config, seed=0)
    for tied, folder in folders.items():
        oracle = tiny_qwen.vision_language_model(tied=tied)
        network = network_checks.build(folder, config)
        if tied:
            compute_small_projections_apart(network)
        network_checks.check_training(network, oracle, KINDS)
        if tied:
            check_decoding(network, oracle)
        export_hf_weights(network, folder, target / f"export {tied}")
        check_checkpoint(network, config, checkpoint / str(tied))
    if tensor > 1:
        assert marked_parameters(network) == {
            name for name, _ in network.named_parameters() if name.endswith("out_norm.weight")
        }
        config.sequence_parallel = True
        network = network_checks.build(folders[True], config)
        # Megatron sums these itself when the sequence is scattered; twice would be wrong.
        assert marked_parameters(network) == set()
        compute_small_projections_apart(network)
        network_checks.check_training(network, tiny_qwen.vision_language_model(tied=True), KINDS)
        check_decoding(network, tiny_qwen.vision_language_model(tied=True))
    parallel.shutdown()


def compute_small_projections_apart(network: VisionLanguageModel) -> None:
    """Switch on what FP8 switches on in DeltaNet layers; nothing may change."""
    for module in network.modules():
        if isinstance(module, GatedDeltaNet):
            module.small_projections_apart = True


def check_decoding(network: VisionLanguageModel, oracle: Any) -> None:
    """Compare greedy tokens with transformers, every sequence twice."""
    parts = [tiny_qwen.sequences(kind)[0] for kind in KINDS]
    tokens, _logits = network_checks.greedy(network, parts, NUM_NEW_TOKENS, repeats=2)
    wanted = [network_checks.oracle_greedy(oracle, part, NUM_NEW_TOKENS) for part in parts]
    assert tokens.tolist() == [row for row in wanted for _ in range(2)]


def check_checkpoint(network: VisionLanguageModel, config: ParallelConfig, folder: Path) -> None:
    """Save with the first layout; load what it saved into another network and compare bit for
    bit.
    """
    metadata = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    if not folder.exists():
        dist.barrier()
        if parallel.rank() == 0:
            folder.mkdir()
        dist.barrier()
        dist_checkpointing.save(network.sharded_state_dict(metadata=metadata), str(folder))
        return
    other = build_model(network.architecture, ModelConfig(), config)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.fill_(float("nan"))
    other.load_state_dict(
        dist_checkpointing.load(other.sharded_state_dict(metadata=metadata), str(folder)),
        strict=False,
    )
    for loaded, mapping in zip(other.parameters(), parameter_mappings(network), strict=True):
        assert loaded.equal(mapping.parameter), mapping.name


def marked_parameters(network: VisionLanguageModel) -> set[str]:
    """Return the parameters whose gradient the training code sums over tensor ranks."""
    return {
        name
        for name, parameter in network.named_parameters()
        if getattr(parameter, "sum_gradients_across_tp", False)
    }
