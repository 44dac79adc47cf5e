"""Fused kernels: which are chosen, and those that a CPU can compute change nothing."""

from __future__ import annotations

import types
from pathlib import Path

import pytest
import torch
from megatron.core.fusions.fused_layer_norm import FusedLayerNorm
from megatron.core.fusions.fused_softmax import FusedScaleMaskSoftmax
from megatron.core.tensor_parallel import layers as megatron_linears

from tests.support import network_checks, tiny_qwen
from zppo_mm.config.schema import ModelConfig, ParallelConfig
from zppo_mm.models.families.architecture import load_architecture
from zppo_mm.models.fusions import Fusions, choose_fusions, packages_table
from zppo_mm.models.layers.gated_delta_net import GatedDeltaNet
from zppo_mm.models.provider import transformer_config
from zppo_mm.models.specs import Implementation, block_submodules
from zppo_mm.models.vision_language import VisionLanguageModel
from zppo_mm.parallel.gpu_packages import GpuPackages
from zppo_mm.training.optimizer import wrap_model
from zppo_mm.weights.mapping import load_hf_weights

pytestmark = pytest.mark.usefixtures("one_rank")

NOTHING = GpuPackages()
TRITON = GpuPackages(triton="3.7.1")
APEX = GpuPackages(apex="0.1", apex_accumulates=True)
APEX_WITHOUT_KERNEL = GpuPackages(apex="0.1")
EVERYTHING = GpuPackages("2.20.2", "0.1", True, "0.6.0", "3.7.1")
# Float32 sums in another order, relative to the largest entry.
TOLERANCE = 1e-5


@pytest.mark.parametrize(
    ("packages", "device", "implementation", "trainable", "expected"),
    [
        (EVERYTHING, "cpu", "local", True, Fusions()),
        (EVERYTHING, "cpu", "transformer_engine", True, Fusions()),
        (NOTHING, "cuda", "local", True, Fusions()),
        (APEX, "cuda", "local", True, Fusions(gradient_accumulation=True)),
        (APEX, "cuda", "local", False, Fusions()),
        (APEX_WITHOUT_KERNEL, "cuda", "local", True, Fusions()),
        (TRITON, "cuda", "local", True, Fusions(activation=True, residual=True)),
        (TRITON, "cuda", "local", False, Fusions(activation=True, residual=True)),
        (NOTHING, "cuda", "transformer_engine", True, Fusions(gradient_accumulation=True)),
        (NOTHING, "cuda", "transformer_engine", False, Fusions()),
        (EVERYTHING, "cuda", "local", True, Fusions(True, True, True)),
        (EVERYTHING, "cuda", "transformer_engine", True, Fusions(True, True, True)),
    ],
)
def test_the_choice(
    packages: GpuPackages,
    device: str,
    implementation: Implementation,
    trainable: bool,
    expected: Fusions,
) -> None:
    assert choose_fusions(packages, torch.device(device), implementation, trainable) == expected


def test_the_table_of_a_start(tmp_path: Path) -> None:
    folder = tiny_qwen.save(tiny_qwen.text_model(), tmp_path)
    for implementation, fusions, optimizer, expected in (
        (
            "local",
            Fusions(True, True, False),
            "apex.optimizers.fused_adam",
            ["Transformer Engine 2.20.2 -", "NVIDIA Apex 0.1 weight gradients, optimizer"],
        ),
        (
            "transformer_engine",
            Fusions(True, True, False),
            "transformer_engine.pytorch.optimizers.fused_adam",
            ["Transformer Engine 2.20.2 layers, weight gradients, optimizer", "NVIDIA Apex 0.1 -"],
        ),
    ):
        config = transformer_config(
            load_architecture(folder), ModelConfig(), ParallelConfig(), "local", fusions
        )
        config.transformer_impl = implementation
        lines = packages_table(EVERYTHING, config, True, optimizer).splitlines()
        assert [" ".join(line.split()) for line in lines[2:]] == [
            *expected,
            "flash-linear-attention 0.6.0 DeltaNet",
            "triton 3.7.1 SwiGLU",
        ]


def build(folder: Path, fusions: Fusions, apart: bool) -> VisionLanguageModel:
    """Build as `build_model` does, with a given choice; `apart`: as with FP8, beta and alpha have a
    product of their own.
    """
    architecture = load_architecture(folder)
    config = transformer_config(
        architecture, ModelConfig(recompute="full"), ParallelConfig(), "local", fusions
    )
    # Read by the DeltaNet layers alone, after megatron-core has checked the configuration.
    config.fp8 = "hybrid" if apart else None
    network = VisionLanguageModel(
        architecture,
        config,
        block_submodules(architecture, config, "local"),
        pre_process=True,
        post_process=True,
    )
    config.fp8 = None
    load_hf_weights(network, folder)
    return network


def gradients(network: VisionLanguageModel) -> dict[str, torch.Tensor]:
    """Return what two micro-batches leave in the gradient buffers, by name."""
    wrapped = wrap_model(network, ParallelConfig())
    wrapped.zero_grad_buffer()
    for kind in ("text", "image"):
        parts = tiny_qwen.sequences(kind)
        pack = tiny_qwen.pack(parts)
        network_checks.loss_of(wrapped(**pack), pack["token_ids"]).backward()
    return {name: p.main_grad.clone() for name, p in network.named_parameters()}


@pytest.mark.parametrize("apart", [False, True], ids=["one projection", "small projections apart"])
def test_fused_accumulation_and_kernels_give_the_same_gradients(
    apart: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch adds the products to the buffers, in place of Apex's kernel with the same arguments."""
    calls = []

    def accumulate(inputs: torch.Tensor, grads: torch.Tensor, buffer: torch.Tensor) -> None:
        calls.append(buffer.shape)
        buffer.add_(grads.t() @ inputs)

    kernel = types.SimpleNamespace(wgrad_gemm_accum_fp32=accumulate)
    monkeypatch.setattr(megatron_linears, "fused_weight_gradient_mlp_cuda", kernel, raising=False)
    monkeypatch.setattr(megatron_linears, "_grad_accum_fusion_available", True)
    folder = tiny_qwen.save(tiny_qwen.vision_language_model(), tmp_path)
    plain = gradients(build(folder, Fusions(), apart))
    assert not calls
    network = build(folder, Fusions(True, True, True), apart)
    fused = gradients(network)
    linears = sum(
        bool(getattr(module, "gradient_accumulation_fusion", False)) for module in network.modules()
    )
    # Two micro-batches; the output layer's product is the loss's own.
    assert len(calls) == 2 * (linears - 1)
    for name, expected in plain.items():
        difference = (fused[name] - expected).abs().max() / expected.abs().max()
        assert difference <= TOLERANCE, name


def test_the_output_layer_is_built_without_apex(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where Transformer Engine's layers accumulate gradients by themselves."""
    monkeypatch.setattr(megatron_linears, "_grad_accum_fusion_available", False)
    folder = tiny_qwen.save(tiny_qwen.text_model(), tmp_path)
    build(folder, Fusions(gradient_accumulation=True), apart=False)
    assert megatron_linears._grad_accum_fusion_available is False


def test_fusions_that_are_never_on_have_nothing_to_fuse(tmp_path: Path) -> None:
    folder = tiny_qwen.save(tiny_qwen.vision_language_model(), tmp_path)
    network = network_checks.build(folder, ParallelConfig())
    assert any(isinstance(module, GatedDeltaNet) for module in network.modules())
    unused = (FusedLayerNorm, FusedScaleMaskSoftmax)
    assert not [module for module in network.modules() if isinstance(module, unused)]
