"""The file of the trained weights that servers load: every tensor, in the network's types."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.support import network_checks, tiny_families, tiny_qwen
from tests.support.tiny_fp8 import LINEARS, quantise
from zppo_mm.config.schema import LoraConfig, ModelConfig, ParallelConfig
from zppo_mm.errors import ModelError
from zppo_mm.lora.adapters import adapters_of, add_lora
from zppo_mm.models.vision_language import VisionLanguageModel
from zppo_mm.rollout.served.adapter_files import AdapterFiles
from zppo_mm.rollout.served.vllm_worker.zppo_vllm_worker import checksum
from zppo_mm.rollout.served.weight_files import WeightFile, WeightFiles
from zppo_mm.weights.hf_export import export_hf_weights

pytestmark = pytest.mark.usefixtures("one_rank")

LAYOUT = ParallelConfig()


def written(network: VisionLanguageModel, source: Path, folder: Path, version: int) -> WeightFile:
    file = WeightFiles(network, source, folder).write(version)
    assert file is not None
    return file


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ["qwen3_5", "qwen3_vl", "llama"])
def test_the_file_has_every_tensor_of_the_export(family: str, tied: bool, tmp_path: Path) -> None:
    source, _ = tiny_families.folder(family, tmp_path / "source", tied=tied)
    network = network_checks.build(source, LAYOUT)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.01)
    file = written(network, source, tmp_path / "files", 1)
    export_hf_weights(network, source, tmp_path / "export")
    expected, found = load_file(tmp_path / "export/model.safetensors"), load_file(file.path)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert file.checksums == {key: checksum(tensor) for key, tensor in expected.items()}
    assert file.num_bytes == file.path.stat().st_size


def test_training_in_float32_is_not_rounded_to_the_folder(tmp_path: Path) -> None:
    oracle = tiny_families.model("qwen3").to(torch.bfloat16)
    source = tiny_qwen.save(oracle, tmp_path / "source")
    network = network_checks.build(source, LAYOUT, ModelConfig(params_dtype="float32"))
    key = "model.layers.0.mlp.down_proj.weight"
    parameter = dict(network.named_parameters())[
        "language_model.decoder.layers.0.mlp.linear_fc2.weight"
    ]
    with torch.no_grad():
        parameter.add_(1e-5)
    found = load_file(written(network, source, tmp_path / "files", 1).path)
    assert torch.equal(found[key], parameter)
    assert not torch.equal(found[key].bfloat16().float(), parameter)


def test_a_copy_of_the_tied_embedding_is_left_to_the_server(tmp_path: Path) -> None:
    embedding = tiny_families.model("qwen3", tied=True).get_input_embeddings().weight
    source = tiny_qwen.save(
        tiny_families.model("qwen3", tied=True),
        tmp_path / "source",
        lm_head__weight=embedding.detach().clone(),
    )
    network = network_checks.build(source, LAYOUT)
    found = load_file(written(network, source, tmp_path / "files", 1).path)
    assert "model.embed_tokens.weight" in found
    assert "lm_head.weight" not in found


def test_adapters_are_merged(tmp_path: Path) -> None:
    source, _ = tiny_families.folder("qwen3", tmp_path / "source")
    network = network_checks.build(source, LAYOUT)
    add_lora(network, LoraConfig(rank=2, alpha=4), seed=0)
    adapters = adapters_of(network)
    assert adapters is not None
    for target in adapters.targets():
        torch.nn.init.normal_(target.lora_B, std=0.1)
    found = load_file(written(network, source, tmp_path / "files", 1).path)
    export_hf_weights(network, source, tmp_path / "export")
    expected = load_file(tmp_path / "export/model.safetensors")
    plain = load_file(source / "model.safetensors")
    key = "model.layers.0.mlp.down_proj.weight"
    assert torch.equal(found[key], expected[key])
    assert not torch.equal(found[key], plain[key])


def test_adapters_are_sent_beside_the_frozen_weights(tmp_path: Path) -> None:
    source, _ = tiny_families.folder("qwen3", tmp_path / "source")
    network = network_checks.build(source, LAYOUT)
    add_lora(network, LoraConfig(rank=2, alpha=6), seed=0)
    adapters = adapters_of(network)
    assert adapters is not None
    for target in adapters.targets():
        torch.nn.init.normal_(target.lora_B, std=0.1)
    frozen = WeightFiles(network, source, tmp_path / "files", merges=False).write(1)
    assert frozen is not None
    found, plain = load_file(frozen.path), load_file(source / "model.safetensors")
    assert all(torch.equal(found[key], plain[key]) for key in plain)
    files = AdapterFiles(network, source, tmp_path / "adapters")
    written = [files.write(version) for version in (1, 2, 3)][-1]
    assert written is not None
    assert sorted(path.name for path in (tmp_path / "adapters").iterdir()) == [
        "version_2",
        "version_3",
    ]
    assert written.scaling == 3
    tensors = load_file(written.file.path)
    assert written.file.checksums == {key: checksum(each) for key, each in tensors.items()}
    [target] = [each for each in adapters.targets() if each.key.endswith("0.mlp.down_proj.weight")]
    name = "base_model.model.model.layers.0.mlp.down_proj"
    assert torch.equal(tensors[f"{name}.lora_B.weight"], target.lora_B)


def test_two_versions_are_kept(tmp_path: Path) -> None:
    source, _ = tiny_families.folder("qwen3", tmp_path / "source")
    files = WeightFiles(network_checks.build(source, LAYOUT), source, tmp_path / "files")
    for version in (1, 2, 3):
        files.write(version)
    assert sorted(path.name for path in (tmp_path / "files").iterdir()) == [
        "version_2",
        "version_3",
    ]


def test_a_folder_without_room_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, _ = tiny_families.folder("qwen3", tmp_path / "source")
    files = WeightFiles(network_checks.build(source, LAYOUT), source, tmp_path / "files")

    def full(handle: int, offset: int, length: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(ModelError, match=r"version_1: the update failed.*No space left"):
        files.write(1)
    assert list((tmp_path / "files").iterdir()) == []


def test_a_quantised_student_is_refused(tmp_path: Path) -> None:
    model = tiny_qwen.vision_language_model().to(torch.bfloat16)
    source = tiny_qwen.save(model, tmp_path / "source")
    quantise(source, LINEARS)
    network = network_checks.build(source, LAYOUT)
    with pytest.raises(ModelError, match=r"quantised weights.*FP8.*docs/conversion.md"):
        WeightFiles(network, source, tmp_path / "files")
