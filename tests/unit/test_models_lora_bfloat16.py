"""Adapters in bfloat16: what small ones add reaches the sampler as it reaches the trainer; an
export says what merging loses.
"""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.support import network_checks, tiny_families, tiny_qwen
from zppo_mm.config.schema import LoraConfig, ModelConfig, ParallelConfig
from zppo_mm.lora.adapters import adapters_of, add_lora
from zppo_mm.models.decoding.decode import decode, prefill
from zppo_mm.models.decoding.layers import DecodeAttention, DecodeDeltaNet, Linear
from zppo_mm.models.decoding.plan import build_plan
from zppo_mm.models.layers.cache import DecodeCache
from zppo_mm.models.vision_language import VisionLanguageModel
from zppo_mm.weights.hf_export import export_hf_weights

pytestmark = pytest.mark.usefixtures("one_rank")

ALL = LoraConfig(rank=4, alpha=8)
NUM_ROWS = 2048
# The two differ by rounding in any case; with the adapters merged into the weights it is 1.4 times
# as much.
MAX_GAP_RATIO = 1.15


def adapted(folder: Path, size: float, dtype: str = "bfloat16") -> VisionLanguageModel:
    """Return the network with B's of a size."""
    network = network_checks.build(folder, ParallelConfig(), ModelConfig(params_dtype=dtype))
    add_lora(network, ALL, 7)
    for number, target in enumerate(adapters_of(network).targets()):  # type: ignore[union-attr]
        torch.nn.init.normal_(
            target.lora_B, std=size, generator=torch.Generator().manual_seed(number)
        )
    return network.eval()


def decoding_linears(network: VisionLanguageModel) -> dict[Any, Linear]:
    """Return the decoding loop's linears by the network's own."""
    found: dict[Any, Linear] = {}
    with torch.no_grad():
        plan = build_plan(network)
    for own, layer in zip(network.language_model.decoder.layers, plan.layers, strict=True):
        mixer = own.self_attention
        match layer.mixer:
            case DecodeDeltaNet():
                found |= {mixer.in_proj: layer.mixer.in_proj, mixer.out_proj: layer.mixer.out_proj}
            case DecodeAttention():
                found |= {
                    mixer.linear_qkv: layer.mixer.qkv,
                    mixer.linear_proj: layer.mixer.projection,
                }
        found |= {own.mlp.linear_fc1: layer.fc1, own.mlp.linear_fc2: layer.fc2}
    return found


def fraction_of(added: torch.Tensor, wanted: torch.Tensor) -> float:
    """Return how much of what is wanted was added, 1 for all of it, whatever rounding adds at
    random.
    """
    return float((added.double() * wanted.double()).sum() / wanted.double().square().sum())


@torch.no_grad()
@pytest.mark.parametrize("family", ["qwen3_5", "qwen2_5_vl", "qwen3"])
@pytest.mark.parametrize("size", [1e-5, 1e-4, 1e-3, 1e-1])
def test_sampler_and_trainer_compute_the_same_outputs(
    tmp_path: Path, family: str, size: float
) -> None:
    """Linear by linear, number for number: nothing is rounded that the trainer does not round."""
    folder, _ = tiny_families.folder(family, tmp_path)
    network = adapted(folder, size)
    linears = decoding_linears(network)
    adapters = adapters_of(network)
    assert adapters is not None
    assert {branch.linear for branch in adapters.branches.values()} == set(linears)
    for name, branch in adapters.branches.items():
        if linears[branch.linear].bias is not None:
            # With a bias, which megatron-core adds to the rounded product and Transformer Engine
            # before, they differ in any case.
            branch.linear.bias.zero_()
        hidden = torch.randn(
            NUM_ROWS, branch.mapping.parameter.shape[1], generator=torch.Generator().manual_seed(1)
        ).bfloat16()
        trained, _bias = branch.linear(hidden[:, None])
        sampled = linears[branch.linear](hidden)
        assert torch.equal(sampled, trained.squeeze(1)), name
        assert not torch.equal(
            sampled, F.linear(hidden, branch.mapping.parameter, linears[branch.linear].bias)
        ), name


@torch.no_grad()
@pytest.mark.parametrize("size", [1e-4, 1e-3, 1e-2, 5e-2])
@pytest.mark.medium
def test_log_probs_of_sampler_and_trainer_are_as_near_with_adapters_as_without(
    tmp_path: Path, size: float
) -> None:
    folder = tiny_qwen.save(tiny_qwen.vision_language_model(), tmp_path)
    ids = torch.randint(0, tiny_qwen.IMAGE, (64, 40), generator=torch.Generator().manual_seed(0))
    without, with_adapters = (mean_gap(adapted(folder, each), ids) for each in (0.0, size))
    assert with_adapters <= MAX_GAP_RATIO * without


def mean_gap(network: VisionLanguageModel, ids: torch.Tensor) -> float:
    """Return the mean distance of all log-probs between decoding `[sequences, length]` tokens and
    the training forward pass.
    """
    (num, length), prompt = ids.shape, 4
    cache = DecodeCache(num_blocks=2 * num, max_rows=num)
    logits = [prefill(network, **packed(ids[:, :prompt]), cache=cache)]
    logits += [
        decode(network, ids[:, position], torch.full((3, num), position), cache)
        for position in range(prompt, length - 1)
    ]
    sampled = torch.log_softmax(torch.stack(logits, 1).float(), -1)
    trained = torch.log_softmax(network(**packed(ids)).view(num, length, -1).float(), -1)[
        :, prompt - 1 : -1
    ]
    return float((sampled - trained).abs().mean())


def packed(ids: torch.Tensor) -> dict[str, Any]:
    num, length = ids.shape
    bounds = torch.arange(0, num * length + 1, length, dtype=torch.int32)
    positions = torch.arange(length).repeat(num).expand(3, -1)
    return {
        "token_ids": ids.flatten(),
        "positions": positions,
        "cu_seqlens": bounds,
        "patches": None,
        "grids": None,
    }


def in_type(folder: Path, target: Path, dtype: torch.dtype) -> Path:
    """Copy a folder with all its weights in a type."""
    target.mkdir()
    for path in folder.iterdir():
        if path.suffix == ".safetensors":
            save_file(
                {key: tensor.to(dtype) for key, tensor in load_file(path).items()},
                target / path.name,
                metadata={"format": "pt"},
            )
        else:
            (target / path.name).write_bytes(path.read_bytes())
    return target


def bfloat16_folder(tmp_path: Path) -> Path:
    """Return the folder of a tiny network in bfloat16."""
    whole = tiny_qwen.save(tiny_qwen.vision_language_model(), tmp_path / "float32")
    return in_type(whole, tmp_path / "source", torch.bfloat16)


def exported(folder: Path, target: Path, network: VisionLanguageModel) -> dict[str, torch.Tensor]:
    export_hf_weights(network, folder, target)
    with safe_open(target / "model.safetensors", "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


@pytest.mark.parametrize(("size", "least", "most"), [(1e-4, 0.0, 0.6), (0.3, 0.99, 1.01)])
def test_an_export_says_what_merging_into_bfloat16_keeps(
    tmp_path: Path, size: float, least: float, most: float, caplog: pytest.LogCaptureFixture
) -> None:
    folder = bfloat16_folder(tmp_path)
    network = adapted(folder, size)
    before = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}
    with caplog.at_level(logging.INFO):
        merged = exported(folder, tmp_path / "hf", network)
    assert all(
        torch.equal(parameter, before[name]) for name, parameter in network.named_parameters()
    )
    (record,) = [record for record in caplog.records if "merged weights" in record.message]
    match = re.match(
        r"export: merged weights in bfloat16 keep (\S+)% of what the adapters add, with a relative "
        r"error of",
        record.message,
    )
    assert match is not None
    assert record.levelno == (logging.WARNING if most < 0.99 else logging.INFO)
    # The same number from the two folders and the adapters, linear by linear.
    source = load_file(folder / "model.safetensors")
    overlap = total = 0.0
    for target in adapters_of(network).targets():  # type: ignore[union-attr]
        added = (
            ALL.alpha / ALL.rank * target.lora_B.detach().double() @ target.lora_A.detach().double()
        )
        overlap += float(
            (added * (merged[target.key].double() - source[target.key].double())).sum()
        )
        total += float(added.square().sum())
    assert float(match[1]) / 100 == pytest.approx(overlap / total, abs=2e-3)
    assert least <= overlap / total <= most


def test_an_export_says_that_trained_weights_are_rounded(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = bfloat16_folder(tmp_path)
    for dtype in ("bfloat16", "float32"):
        caplog.clear()
        network = network_checks.build(folder, ParallelConfig(), ModelConfig(params_dtype=dtype))
        exported(folder, tmp_path / dtype, network)
        # The decay rates of the DeltaNet layers are float32 in any run.
        number = sum(parameter.dtype == torch.float32 for parameter in network.parameters())
        match = re.search(
            r"export: (\d+) trained tensors, the first \S+, are rounded from float32 to bfloat16",
            caplog.text,
        )
        assert match is not None
        assert int(match[1]) >= number, dtype
        assert (int(match[1]) == number) == (dtype == "bfloat16")
    caplog.clear()
    exported(folder, tmp_path / "adapted", adapted(folder, 0.3, "float32"))
    assert (
        "are rounded" not in caplog.text
    )  # the weights are frozen, of the adapters the other message speaks


def test_a_float32_folder_gets_small_adapters_whole_from_a_network_in_bfloat16(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rounded = bfloat16_folder(tmp_path)
    folder = in_type(rounded, tmp_path / "back", torch.float32)
    network = adapted(folder, 1e-4)
    with caplog.at_level(logging.INFO):
        merged = exported(folder, tmp_path / "hf", network)
    assert "merged weights in float32 keep 100.0% of what the adapters add" in caplog.text
    source = load_file(folder / "model.safetensors")
    for target in adapters_of(network).targets():  # type: ignore[union-attr]
        added = (
            ALL.alpha / ALL.rank * target.lora_B.detach().double() @ target.lora_A.detach().double()
        )
        assert fraction_of(merged[target.key] - source[target.key], added) == pytest.approx(
            1.0, abs=1e-3
        ), target.key
    assert json.loads((tmp_path / "hf" / "config.json").read_text()) == json.loads(
        (folder / "config.json").read_text()
    )
