"""Every family on a GPU: logits and gradients of local layers in float32 against transformers on
the CPU, Transformer Engine in
bfloat16 against the local float32 ones.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.support import gpu_checks, network_checks, tiny_families, tiny_qwen
from zppo_mm.config.schema import ModelConfig, ParallelConfig
from zppo_mm.models.specs import transformer_engine_provider
from zppo_mm.models.vision_language import VisionLanguageModel

pytestmark = [
    pytest.mark.usefixtures("one_rank"),
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

CASES = [(family, kind) for family, kinds in tiny_families.KINDS.items() for kind in kinds]
# Mean divergence per token of whole distributions, in nats: a few layers in bfloat16 on logits of
# scale 3 move log-probs by about 0.03.
MAX_BFLOAT16_KL = 5e-3


def log_probs(network: VisionLanguageModel, parts: list[tiny_qwen.Sequence]) -> torch.Tensor:
    """Return `[tokens, vocabulary]` float32."""
    with torch.no_grad():
        return network(**gpu_checks.on_device(tiny_qwen.pack(parts))).float().log_softmax(-1)


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_implementations_agree(family: str, kind: str, tmp_path: Path) -> None:
    folder, oracle = tiny_families.folder(family, tmp_path)
    parts = tiny_families.sequences(family, kind)
    exact = ModelConfig(transformer_impl="local", params_dtype="float32")
    network = network_checks.build(folder, ParallelConfig(), exact)
    gpu_checks.check(gpu_checks.differences(network, oracle, kind), "float32")
    if transformer_engine_provider() is None:
        pytest.skip("needs Transformer Engine for the rest")
    half = ModelConfig(transformer_impl="transformer_engine", params_dtype="bfloat16")
    fused = log_probs(network_checks.build(folder, ParallelConfig(), half), parts)
    local = log_probs(network, parts)
    divergence = (local.exp() * (local - fused)).sum(-1)
    assert divergence.mean() <= MAX_BFLOAT16_KL
