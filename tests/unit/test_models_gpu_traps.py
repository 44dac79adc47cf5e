"""What goes wrong on a GPU, or beside packages for one, and is refused or avoided: what of it a CPU
can show.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from encoders.torch_kernels import without_kernel_packages
from tests.support import network_checks, tiny_qwen
from tests.support.published_sizes import PUBLISHED
from tests.support.running import run_python
from zppo_mm.config.schema import ModelConfig, ParallelConfig
from zppo_mm.errors import ConfigError
from zppo_mm.models.families.architecture import parse_architecture
from zppo_mm.models.fp8_shapes import check_fp8_shapes, linear_shapes
from zppo_mm.models.layers.causal_convolution import causal_convolution
from zppo_mm.models.layers.delta_rule import (
    check_versions,
    chunk_gated_delta_rule,
    fused_kernels,
)
from zppo_mm.models.layers.gated_delta_net import GatedDeltaNet
from zppo_mm.parallel import groups as parallel

FP8 = ModelConfig(fp8="hybrid")
HOPPER, AMPERE = (9, 0), (8, 0)
# Float32 sums in another order, on logits of scale 3.
MAX_LOGIT_DIFFERENCE = 1e-4


@pytest.mark.parametrize(
    ("fla", "triton", "capability"),
    [
        ("0.4.2", "3.4.0", HOPPER),
        ("0.5.2", "3.6.0", HOPPER),
        ("0.6.0", "3.7.0", HOPPER),
        ("0.6.0", "3.6.0+gitabc", HOPPER),
    ],
)
def test_kernels_with_wrong_gradients_are_refused(
    fla: str, triton: str, capability: tuple[int, int]
) -> None:
    with pytest.raises(
        ConfigError,
        match=r"flash-linear-attention: its gradients are wrong on this GPU, got version .*"
        r"expected triton 3\.7\.1 or newer.*; install another triton, or uninstall",
    ):
        check_versions(fla, triton, capability)


@pytest.mark.parametrize(
    ("fla", "triton", "capability"),
    [
        ("0.6.0", "3.7.1", HOPPER),
        ("0.6.0", "3.3.1", HOPPER),
        ("0.5.2", "3.6.0", AMPERE),
        ("0.7.0", "3.6.0", HOPPER),
    ],
)
def test_other_kernels_are_not_refused(fla: str, triton: str, capability: tuple[int, int]) -> None:
    check_versions(fla, triton, capability)


def write_package(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        for parent in path.relative_to(folder).parents:
            (folder / parent / "__init__.py").touch()


@pytest.mark.parametrize("module", ["causal_conv1d/__init__", "convolution"])
def test_the_convolution_is_found_where_every_version_has_it(
    module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_package(
        tmp_path,
        {
            f"fla/modules/{module}.py": "def causal_conv1d(): return 'convolution'",
            "fla/ops/gated_delta_rule.py": "def chunk_gated_delta_rule(): return 'rule'",
        },
    )
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    kernels = fused_kernels()
    for name in set(sys.modules) - before:
        del sys.modules[name]
    assert kernels is not None
    assert [kernel() for kernel in kernels] == ["convolution", "rule"]


def test_without_the_package_there_are_no_kernels() -> None:
    with without_kernel_packages():
        assert fused_kernels() is None


@pytest.mark.parametrize("before", ["found", "hidden", "missing"])
def test_packages_are_found_afterwards_as_before(
    before: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "fla", raising=False)
    if before != "missing":
        monkeypatch.setitem(sys.modules, "fla", sys if before == "found" else None)
    expected = dict(sys.modules)
    with without_kernel_packages(), without_kernel_packages():
        assert sys.modules["fla"] is None
    assert sys.modules == expected


def convolve(
    inputs: torch.Tensor, weight: torch.Tensor, activation: str, cu_seqlens: torch.Tensor
) -> tuple[torch.Tensor, None]:
    """What FLA's convolution computes, sequence by sequence."""
    assert activation == "silu"
    parts = [
        causal_convolution(part[None], weight[:, None])
        for part in inputs[0].split(cu_seqlens.diff().tolist())
    ]
    return torch.cat(parts, 1), None


def delta_rule(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    g: torch.Tensor,
    beta: torch.Tensor,
    output_final_state: bool,
    use_qk_l2norm_in_kernel: bool,
    cu_seqlens: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What FLA's rule computes, sequence by sequence."""
    assert use_qk_l2norm_in_kernel
    assert not output_final_state
    lengths = cu_seqlens.diff().tolist()
    packs = [tensor[0].split(lengths) for tensor in (query, key, value, g, beta)]
    outputs = [
        chunk_gated_delta_rule(*(part[None] for part in parts))[0]
        for parts in zip(*packs, strict=True)
    ]
    return torch.cat(outputs, 1), None


@pytest.mark.usefixtures("one_rank")
def test_kernels_for_packs_are_given_the_same_bounds_in_every_layer(tmp_path: Path) -> None:
    """The path of FLA's kernels, with the same formulas in torch; they keep what they derive from
    the bounds for as long as they are given the same tensor.
    """
    network = network_checks.build(
        tiny_qwen.save(tiny_qwen.vision_language_model(), tmp_path), ParallelConfig()
    )
    pack = tiny_qwen.pack(tiny_qwen.sequences("text") + tiny_qwen.sequences("image"))
    with torch.no_grad():
        expected = network(**pack)
    bounds: list[torch.Tensor] = []

    def keep(function: Any) -> Any:
        def call(*arguments: Any, **named: Any) -> Any:
            bounds.append(named["cu_seqlens"])
            return function(*arguments, **named)

        return call

    layers = [module for module in network.modules() if isinstance(module, GatedDeltaNet)]
    for layer in layers:
        layer.fused_kernels = keep(convolve), keep(delta_rule)
    with torch.no_grad():
        found = network(**pack)
    assert (found - expected).abs().max() <= MAX_LOGIT_DIFFERENCE
    assert len(bounds) == 2 * len(layers) > 2
    assert all(each is bounds[0] for each in bounds)
    assert bounds[0].dtype == torch.int64


TRANSFORMERS = """
import sys
sys.path.insert(0, sys.argv[1])
if sys.argv[2] == "ours":
    from encoders.torch_kernels import import_on_torch as load
else:
    from importlib import import_module as load
network = load("transformers.models.qwen3_5.modeling_qwen3_5")
import fla
try:
    shapes = [(1, 2, 1, 4)] * 3 + [(1, 2, 1)] * 2
    network.torch_chunk_gated_delta_rule(*map(network.torch.ones, shapes))
    print("torch")
except ZeroDivisionError:
    print("kernel")
"""


@pytest.mark.medium
def test_the_oracle_stays_on_torch_beside_kernel_packages(tmp_path: Path) -> None:
    write_package(
        tmp_path,
        {"fla/ops/gated_delta_rule.py": "def chunk_gated_delta_rule(q, k, v, g, beta): 1 / 0"},
    )
    top = "from fla.ops.gated_delta_rule import chunk_gated_delta_rule"
    (tmp_path / "fla" / "__init__.py").write_text(top)
    for whose, expected in (("transformers", "kernel"), ("ours", "torch")):
        result = run_python("-c", TRANSFORMERS, str(tmp_path), whose)
        assert result.stdout.strip() == expected, result.stderr


OPTIMIZER = """
import sys
sys.path.insert(0, sys.argv[1])
if sys.argv[2] == "ours":
    import zppo_mm.parallel
from megatron.core.optimizer import Adam, clip_grads
print(Adam.__module__, clip_grads.l2_norm_impl.__module__)
"""


@pytest.mark.medium
@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the packages are used")
@pytest.mark.parametrize("package", ["transformer_engine", "apex"])
def test_packages_for_a_gpu_are_not_used_without_one(package: str, tmp_path: Path) -> None:
    kernels = "def multi_tensor_l2norm(): 1 / 0\nmulti_tensor_scale = multi_tensor_l2norm\n"
    everything = (
        f"{kernels}multi_tensor_applier = multi_tensor_l2norm\n"
        "class FusedAdam: pass\nFusedSGD = FusedAdam\n"
    )
    write_package(
        tmp_path,
        {"transformer_engine/pytorch/optimizers.py": everything}
        if package == "transformer_engine"
        else {
            "amp_C.py": kernels,
            "apex/multi_tensor_apply.py": everything,
            "apex/optimizers.py": everything,
        },
    )
    theirs, ours = (
        run_python("-c", OPTIMIZER, str(tmp_path), whose) for whose in ("megatron", "ours")
    )
    # megatron-core takes these, or fails on what they lack.
    assert theirs.stdout != ours.stdout
    assert ours.stdout.split() == ["torch.optim.adamw", "megatron.core.utils"], ours.stderr


def text_architecture(name: str) -> Any:
    raw = PUBLISHED[name][0]
    return parse_architecture(raw.get("text_config", raw))


def test_layers_that_fp8_cannot_multiply_are_named() -> None:
    # Qwen3.5-27B: 2 x 16 x 128 of query and key, 2 x 48 x 128 of value and gate, 2 x 48 of beta and
    # alpha are 16,480 rows: 4,120 on each of 4 ranks, which is 257.5 x 16.
    architecture = text_architecture("Qwen3.5-27B")
    rows_of = {name: rows for name, rows, _ in linear_shapes(architecture, 4)}
    assert rows_of["self_attention.in_proj"] == 4120
    with pytest.raises(
        ConfigError,
        match=r"model\.fp8: self_attention\.in_proj does not fit.*got \[4120, 5120\].*size=4, "
        r"expected multiples of 16; choose another tensor size",
    ):
        check_fp8_shapes(architecture, FP8, ParallelConfig(tensor_model_parallel_size=4))
    for fitting in (1, 2):
        check_fp8_shapes(architecture, FP8, ParallelConfig(tensor_model_parallel_size=fitting))
    # MXFP8 has blocks of 32: 8,240 rows are 257.5 of them.
    with pytest.raises(ConfigError, match="expected multiples of 32"):
        check_fp8_shapes(
            architecture,
            replace(FP8, fp8_recipe="mxfp8"),
            ParallelConfig(tensor_model_parallel_size=2),
        )
    check_fp8_shapes(architecture, ModelConfig(), ParallelConfig(tensor_model_parallel_size=4))


@pytest.mark.usefixtures("one_rank")
def test_the_shapes_that_are_checked_are_those_of_the_layers(tmp_path: Path) -> None:
    network = network_checks.build(
        tiny_qwen.save(tiny_qwen.text_model(), tmp_path), ParallelConfig()
    )
    built = {
        name.partition("layers.")[2].partition(".")[2]: tuple(parameter.shape)
        for name, parameter in network.named_parameters()
        if parameter.dim() == 2 and "layers." in name
    }
    assert built == {
        f"{name}.weight": (rows, columns)
        for name, rows, columns in linear_shapes(network.architecture, 1)
    }


def test_convolutions_in_float32_are_not_rounded_to_tf32() -> None:
    torch.backends.cudnn.allow_tf32 = True
    parallel.initialize(ParallelConfig(), seed=0)
    assert not torch.backends.cudnn.allow_tf32
    parallel.shutdown()
