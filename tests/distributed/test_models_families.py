"""Every family at tensor and pipeline sizes above one, with and without sequence parallelism and
recomputation, against transformers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.support import network_checks, tiny_families
from tests.support.launch import run_ranks
from zppo_mm.config.schema import ModelConfig, ParallelConfig
from zppo_mm.models.vision_language import VisionLanguageModel
from zppo_mm.parallel import groups as parallel
from zppo_mm.weights.hf_export import export_hf_weights

# Qwen3.5 has tests of its own in test_models_layouts.
FAMILIES = tuple(family for family in tiny_families.KINDS if not family.startswith("qwen3_5"))
# Tied networks hold the embedding on the first and the last stage.
TIED = ("qwen3", "qwen3_vl")
LAYOUTS = {"tensor": (2, 1), "pipeline": (1, 2), "both": (2, 2)}
NUM_NEW_TOKENS = 6


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {
        family: tiny_families.folder(family, tmp_path_factory.mktemp(family), tied=family in TIED)[
            0
        ]
        for family in FAMILIES
    }


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_split_network_equals_transformers(
    layout: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    tensor, pipeline = LAYOUTS[layout]
    run_ranks(check_rank, tensor * pipeline, tensor, pipeline, folders, tmp_path)
    for family, folder in folders.items():
        wanted, found = (
            load_file(path / "model.safetensors") for path in (folder, tmp_path / family)
        )
        assert found.keys() == wanted.keys()
        assert all(found[key].equal(tensor) for key, tensor in wanted.items())


def check_rank(tensor: int, pipeline: int, folders: dict[str, Path], target: Path) -> None:
    """Run on every rank: every family through training, greedy text and export, then scattered over
    the sequence and recomputed.
    """
    config = ParallelConfig(
        tensor_model_parallel_size=tensor, pipeline_model_parallel_size=pipeline, timeout_minutes=3
    )
    parallel.initialize(config, seed=0)
    for family, folder in folders.items():
        oracle = tiny_families.model(family, tied=family in TIED)
        network = network_checks.build(folder, config)
        check_family(network, oracle, family)
        export_hf_weights(network, folder, target / family)
    if tensor > 1:
        config.sequence_parallel = True
        for family, folder in folders.items():
            network = network_checks.build(folder, config, ModelConfig(recompute="full"))
            check_family(network, tiny_families.model(family, tied=family in TIED), family)
    parallel.shutdown()


def check_family(network: VisionLanguageModel, oracle: Any, family: str) -> None:
    """Compare logits, gradients and greedy text; the last modality of a family has all that the
    others have.
    """
    kind = tiny_families.KINDS[family][-1]
    network_checks.check_training(network, oracle, (kind,))
    parts = tiny_families.sequences(family, kind)
    tokens, _logits = network_checks.greedy(network, parts, NUM_NEW_TOKENS)
    assert tokens.tolist() == [
        network_checks.oracle_greedy(oracle, part, NUM_NEW_TOKENS) for part in parts
    ]
