"""The network on a GPU: local layers, Transformer Engine's and FLA's kernels against transformers
in float32 on the CPU.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.support import network_checks, tiny_qwen
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

# Heads of the size that fused kernels are made for.
SIZES = {
    "hidden_size": 128,
    "head_dim": 64,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 1e4,
        "partial_rotary_factor": 0.5,
        "mrope_section": [6, 5, 5],
        "mrope_interleaved": True,
    },
}
# Float32 sums in another order on another device, without TF32.
MAX_FLOAT32_DIFFERENCE = 1e-3
# Four layers in bfloat16, on logits of scale 3: mean and maximum.
MEAN_BFLOAT16_DIFFERENCE = 0.05
MAX_BFLOAT16_DIFFERENCE = 0.5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_qwen.save(
        tiny_qwen.vision_language_model(tied=True, **SIZES), tmp_path_factory.mktemp("gpu")
    )


def on_gpu(pack: dict[str, torch.Tensor | None]) -> dict[str, torch.Tensor | None]:
    return {name: None if tensor is None else tensor.cuda() for name, tensor in pack.items()}


def differences(network: VisionLanguageModel) -> tuple[float, float]:
    """Return mean and largest difference of the logits from the oracle's, and check that a backward
    pass reaches every parameter.
    """
    oracle = tiny_qwen.vision_language_model(tied=True, **SIZES)
    parts = [part for kind in tiny_qwen.SEQUENCES for part in tiny_qwen.sequences(kind)]
    logits = network(**on_gpu(tiny_qwen.pack(parts)))
    logits.log_softmax(-1)[:, 0].sum().backward()
    assert all(
        parameter.grad is not None and parameter.grad.isfinite().all()
        for parameter in network.parameters()
    )
    with torch.no_grad():
        difference = (logits.cpu() - tiny_qwen.oracle_logits(oracle, parts)).abs()
    return float(difference.mean()), float(difference.max())


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
    found = [prefill(network, **on_gpu(tiny_qwen.pack(prompts)), cache=cache)]
    for step in (-2, -1):
        token_ids = torch.stack([part.token_ids[step] for part in parts]).cuda()
        positions = torch.stack([part.positions[:, step] for part in parts], 1).cuda()
        found.append(decode(network, token_ids, positions, cache))
    with torch.no_grad():
        whole = network(**on_gpu(tiny_qwen.pack(parts)))
    ends = torch.tensor([len(part.token_ids) for part in parts]).cumsum(0)
    for step, logits in enumerate(found):
        assert (whole[(ends - 3 + step).cuda()] - logits).abs().max() <= tolerance


def test_local_layers_in_float32(folder: Path) -> None:
    network = network_checks.build(
        folder, ParallelConfig(), ModelConfig(transformer_impl="local", params_dtype="float32")
    )
    assert differences(network)[1] <= MAX_FLOAT32_DIFFERENCE
    check_decoding(network, MAX_FLOAT32_DIFFERENCE)


def test_local_layers_in_bfloat16(folder: Path) -> None:
    network = network_checks.build(
        folder, ParallelConfig(), ModelConfig(transformer_impl="local", params_dtype="bfloat16")
    )
    layers = [module for module in network.modules() if isinstance(module, GatedDeltaNet)]
    assert all(
        (layer.fused_kernels is not None) == (fused_kernels() is not None) for layer in layers
    )
    mean, largest = differences(network)
    assert mean <= MEAN_BFLOAT16_DIFFERENCE
    assert largest <= MAX_BFLOAT16_DIFFERENCE
    check_decoding(network, MAX_BFLOAT16_DIFFERENCE)


@pytest.mark.skipif(transformer_engine_provider() is None, reason="needs Transformer Engine")
@pytest.mark.parametrize("fp8", ["", "hybrid"])
def test_transformer_engine_layers(folder: Path, fp8: str) -> None:
    network = network_checks.build(
        folder,
        ParallelConfig(),
        ModelConfig(transformer_impl="transformer_engine", params_dtype="bfloat16", fp8=fp8),
    )
    mean, largest = differences(network)
    # FP8 keeps 2 or 3 bits of mantissa where bfloat16 keeps 7.
    factor = 4 if fp8 else 1
    assert mean <= factor * MEAN_BFLOAT16_DIFFERENCE
    assert largest <= factor * MAX_BFLOAT16_DIFFERENCE
    if not fp8:
        check_decoding(network, MAX_BFLOAT16_DIFFERENCE)
