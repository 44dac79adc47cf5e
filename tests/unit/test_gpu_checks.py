"""The checks of tests/gpu on a CPU: they hold in both types, and see a wrong gradient."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import gpu_checks, network_checks, tiny_qwen
from zppo_mm.config.schema import ModelConfig, ParallelConfig
from zppo_mm.models.layers.gated_delta_net import GatedDeltaNet

pytestmark = pytest.mark.usefixtures("one_rank")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_logits_and_gradients_are_those_of_transformers(dtype: str, tmp_path: Path) -> None:
    oracle = tiny_qwen.vision_language_model(tied=True, **gpu_checks.SIZES)
    folder = tiny_qwen.save(oracle, tmp_path)
    model = ModelConfig(params_dtype=dtype)
    network = network_checks.build(folder, ParallelConfig(), model)
    found = gpu_checks.differences(network, oracle, "mixed")
    gpu_checks.check(found, dtype)
    if dtype == "bfloat16":
        return
    layer = next(each for each in network.modules() if isinstance(each, GatedDeltaNet))
    layer.A_log.register_hook(lambda gradient: gradient * 1.01)
    found = gpu_checks.differences(network, oracle, "mixed")
    with pytest.raises(AssertionError, match=r"A_log', 0\.0(1|09)"):
        gpu_checks.check(found, dtype)
