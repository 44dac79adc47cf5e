"""The network on a GPU: local layers, Transformer Engine's and FLA's kernels against transformers
in float32 on the CPU: logits, gradients, decoding.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.support import gpu_checks, network_checks, tiny_qwen
from zppo_mm.config.schema import ModelConfig, ParallelConfig
from zppo_mm.models.decoding.decode import decode, prefill
from zppo_mm.models.layers.cache import DecodeCache
from zppo_mm.models.layers.delta_rule import fused_kernels
from zppo_mm.models.layers.gated_delta_net import GatedDeltaNet
from zppo_mm.models.specs import transformer_engine_provider
from zppo_mm.models.vision_language import VisionLanguageModel

pytestmark = [
    pytest.mark.usefixtures("one_rank"),
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_qwen.save(
        tiny_qwen.vision_language_model(tied=True, **gpu_checks.SIZES),
        tmp_path_factory.mktemp("gpu"),
    )


def check_decoding(network: VisionLanguageModel, tolerance: float) -> None:
    """Compare the logits of prefill and two decoding steps with the forward pass over the same
    tokens.
    """
    parts = [tiny_qwen.make_sequence(seed, [length]) for seed, length in enumerate((12, 30))]
    cache = DecodeCache(num_blocks=4, max_rows=2)
    prompts = [
        tiny_qwen.Sequence(
            part.token_ids[:-2],
            part.positions[:, :-2],
            len(part.token_ids) - 2,
            part.patches,
            (),
            (),
        )
        for part in parts
    ]
    found = [prefill(network, **gpu_checks.on_device(tiny_qwen.pack(prompts)), cache=cache)]
    for step in (-2, -1):
        token_ids = torch.stack([part.token_ids[step] for part in parts]).cuda()
        positions = torch.stack([part.positions[:, step] for part in parts], 1).cuda()
        found.append(decode(network, token_ids, positions, cache))
    with torch.no_grad():
        whole = network(**gpu_checks.on_device(tiny_qwen.pack(parts)))
    ends = torch.tensor([len(part.token_ids) for part in parts]).cumsum(0)
    for step, logits in enumerate(found):
        assert (whole[(ends - 3 + step).cuda()] - logits).abs().max() <= tolerance


def differences(network: VisionLanguageModel) -> gpu_checks.Differences:
    oracle = tiny_qwen.vision_language_model(tied=True, **gpu_checks.SIZES)
    return gpu_checks.differences(network, oracle, "mixed")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_local_layers(folder: Path, dtype: str) -> None:
    model = ModelConfig(transformer_impl="local", params_dtype=dtype)
    network = network_checks.build(folder, ParallelConfig(), model)
    layers = [module for module in network.modules() if isinstance(module, GatedDeltaNet)]
    uses_kernels = dtype == "bfloat16" and fused_kernels() is not None
    assert all((layer.fused_kernels is not None) == uses_kernels for layer in layers)
    gpu_checks.check(differences(network), dtype)
    check_decoding(
        network,
        gpu_checks.MAX_FLOAT32_DIFFERENCE
        if dtype == "float32"
        else gpu_checks.MAX_BFLOAT16_DIFFERENCE,
    )


@pytest.mark.skipif(transformer_engine_provider() is None, reason="needs Transformer Engine")
@pytest.mark.parametrize("fp8", ["", "hybrid"])
def test_transformer_engine_layers(folder: Path, fp8: str) -> None:
    network = network_checks.build(
        folder,
        ParallelConfig(),
        ModelConfig(transformer_impl="transformer_engine", params_dtype="bfloat16", fp8=fp8),
    )
    # FP8 keeps 2 or 3 bits of mantissa where bfloat16 keeps 7.
    gpu_checks.check(differences(network), "bfloat16", factor=4 if fp8 else 1)
    if not fp8:
        check_decoding(network, gpu_checks.MAX_BFLOAT16_DIFFERENCE)
