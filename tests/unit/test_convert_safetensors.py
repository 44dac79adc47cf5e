"""Safetensors files by hand, held against the format's own library, and quantised weights against
transformers and the naive formula.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.support import tiny_qwen
from tests.support.tiny_fp8 import BLOCK, LINEARS, quantise
from zppo_mm.errors import ModelError
from zppo_mm.weights.fp8 import dequantise, read_block_size
from zppo_mm.weights.safetensors_file import build_header, read_header, read_tensor
from zppo_mm.weights.safetensors_folder import SafetensorsFolder

TENSORS = {
    "b": torch.arange(6, dtype=torch.bfloat16).reshape(2, 3),
    "a": torch.tensor([1.5, -2.5]),
    "flag": torch.tensor([True, False, True]),
    "empty": torch.empty(0, 4),
    "single": torch.tensor(7, dtype=torch.int64),
    "eight": torch.tensor([0.5, 448.0]).to(torch.float8_e4m3fn),
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    save_file(TENSORS, tmp_path / "model.safetensors", metadata={"format": "pt"})
    return tmp_path / "model.safetensors"


def same(left: torch.Tensor, right: torch.Tensor) -> bool:
    return (
        left.dtype == right.dtype
        and left.shape == right.shape
        and left.float().equal(right.float())
    )


def test_tensors_are_read_as_the_library_reads_them(file: Path) -> None:
    header = read_header(file)
    assert set(header.entries) == set(TENSORS)
    assert header.metadata == {"format": "pt"}
    assert header.file_bytes == file.stat().st_size
    assert all(same(read_tensor(file, header, key), tensor) for key, tensor in TENSORS.items())


def test_a_header_that_is_built_is_one_for_the_library(tmp_path: Path) -> None:
    header = build_header(
        {key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in TENSORS.items()},
        {"format": "pt"},
    )
    content = bytearray(header.file_bytes)
    content[: len(header.raw)] = header.raw
    for key, tensor in TENSORS.items():
        start = len(header.raw) + header.entries[key].start
        content[start : start + tensor.nbytes] = (
            tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
        )
    (tmp_path / "built.safetensors").write_bytes(content)
    found = load_file(tmp_path / "built.safetensors")
    assert found.keys() == TENSORS.keys()
    assert all(same(found[key], tensor) for key, tensor in TENSORS.items())
    with safe_open(tmp_path / "built.safetensors", framework="pt") as opened:
        assert opened.metadata() == {"format": "pt"}


def test_a_truncated_file_is_named_with_the_first_key_that_it_lacks(file: Path) -> None:
    content = file.read_bytes()
    last = max(read_header(file).entries.items(), key=lambda item: item[1].end)[0]
    file.write_bytes(content[:-1])
    with pytest.raises(
        ModelError,
        match=(
            rf"model\.safetensors: .* got {len(content) - 1} bytes, too few for the key {last}, "
            rf"expected"
        ),
    ):
        read_header(file)
    file.write_bytes(content + b"x")
    with pytest.raises(
        ModelError, match=rf"got {len(content) + 1} bytes, expected {len(content)} bytes"
    ):
        read_header(file)
    file.write_bytes(content[:5])
    with pytest.raises(ModelError, match="got 5 bytes that begin with no header"):
        read_header(file)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (
            {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]},
            r"bytes 4 to 12 for the key a, expected 8 bytes from 0 on",
        ),
        (
            {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]},
            r"bytes 0 to 4 for the key a, expected 8 bytes from 0 on",
        ),
        (
            {"dtype": "F32", "shape": [2]},
            r"a header that is none \(the key a: the data_offsets None\)",
        ),
    ],
)
def test_a_header_that_lies_is_refused(tmp_path: Path, entry: dict[str, Any], message: str) -> None:
    text = json.dumps({"a": entry}).encode()
    (tmp_path / "x").write_bytes(len(text).to_bytes(8, "little") + text + b"\0" * 12)
    with pytest.raises(ModelError, match=message):
        read_header(tmp_path / "x")


def naive(
    weight: torch.Tensor, scale: torch.Tensor, block: tuple[int, int], dtype: torch.dtype
) -> torch.Tensor:
    """Return every element times the factor of its block."""
    rows, columns = (
        torch.arange(weight.shape[0]) // block[0],
        torch.arange(weight.shape[1]) // block[1],
    )
    return (weight.float() * scale.float()[rows][:, columns]).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(32, 48), (33, 48), (32, 50), (40, 17), (5, 3)])
def test_blocks_are_multiplied_by_their_factors(shape: tuple[int, int], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    block = (16, 8)
    weight = torch.randn(shape).to(torch.float8_e4m3fn)
    scale = torch.rand(-(-shape[0] // 16), -(-shape[1] // 8)).to(torch.bfloat16)
    found = dequantise(weight, scale, block, dtype)
    assert found.dtype == dtype
    assert found.equal(naive(weight, scale, block, dtype))


@pytest.fixture
def quantised(tmp_path: Path) -> Path:
    model = tiny_qwen.text_model(tied=True).to(torch.bfloat16)
    folder = tiny_qwen.save(
        model,
        tmp_path / "fp8",
        mtp__fc__weight=torch.randn(32, 16),
        mtp__norm__weight=torch.randn(16),
    )
    quantise(folder, (*LINEARS, "mtp.fc.weight"))
    return folder


def test_a_quantised_folder_looks_plain(quantised: Path) -> None:
    folder = SafetensorsFolder(quantised)
    assert folder.is_quantised
    key = "model.layers.1.self_attn.q_proj.weight"
    stored = load_file(quantised / "model.safetensors")
    assert sorted(folder.weight_map) == sorted(
        key for key in stored if not key.endswith("_scale_inv")
    )
    assert (folder.dtype(key), folder.shape(key)) == (torch.bfloat16, tuple(stored[key].shape))
    block = read_block_size(quantised)
    assert block == (BLOCK, BLOCK)
    for asked in (torch.bfloat16, torch.float32):
        found = SafetensorsFolder(quantised, asked).read(key)
        assert found.equal(naive(stored[key], stored[f"{key}_scale_inv"], block, asked))
    assert folder.read("model.norm.weight").equal(stored["model.norm.weight"])
    [header] = folder.plain_headers().values()
    assert set(header.entries) == set(folder.weight_map)
    assert {entry.dtype for entry in header.entries.values()} == {"BF16", "F32"}


def test_quantised_weights_are_what_transformers_makes_of_them(quantised: Path) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(quantised, dtype=torch.bfloat16).state_dict()
    folder = SafetensorsFolder(quantised)
    compared = [key for key in folder.weight_map if key.endswith(LINEARS)]
    assert len(compared) > 20
    assert [key for key in compared if not folder.read(key).equal(theirs[key])] == []


def damage(folder: Path, change: Any) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def test_an_fp8_weight_without_factors_is_named(quantised: Path) -> None:
    key = "model.layers.1.self_attn.q_proj.weight"
    damage(quantised, lambda tensors: tensors.pop(f"{key}_scale_inv"))
    message = (
        rf"model\.safetensors: the FP8 weight {key} has no factors, got no key {key}_scale_inv"
    )
    with pytest.raises(ModelError, match=message):
        SafetensorsFolder(quantised)


def test_factors_that_do_not_fit_are_named(quantised: Path) -> None:
    key = "model.layers.1.self_attn.q_proj.weight_scale_inv"
    damage(quantised, lambda tensors: tensors.update({key: torch.ones(1, 1)}))
    with pytest.raises(
        ModelError,
        match=(
            rf"model\.safetensors: the factors {key} do not fit, got \[1, 1\] .* for blocks of 16 "
            rf"x 16"
        ),
    ):
        SafetensorsFolder(quantised)


def test_factors_of_a_weight_that_is_not_quantised_are_a_key_like_any_other(
    quantised: Path,
) -> None:
    damage(
        quantised, lambda tensors: tensors.update({"model.norm.weight_scale_inv": torch.ones(1, 1)})
    )
    assert "model.norm.weight_scale_inv" in SafetensorsFolder(quantised).weight_map


@pytest.mark.parametrize("block", [[128], ["128", 128], [0, 128]])
def test_a_block_size_that_is_none_is_refused(quantised: Path, block: list[Any]) -> None:
    config = json.loads((quantised / "config.json").read_text())
    config["quantization_config"]["weight_block_size"] = block
    (quantised / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        ModelError,
        match=r"weight_block_size is not supported, got .*, expected two positive numbers",
    ):
        SafetensorsFolder(quantised)


def split(folder: Path) -> tuple[str, str]:
    """Make two files and an index of a folder's single one; returns a key of each."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    keys = sorted(tensors)
    parts = {
        "model-00001-of-00002.safetensors": keys[::2],
        "model-00002-of-00002.safetensors": keys[1::2],
    }
    for name, chosen in parts.items():
        save_file({key: tensors[key] for key in chosen}, folder / name, metadata={"format": "pt"})
    weight_map = {key: name for name, chosen in parts.items() for key in chosen}
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map})
    )
    return keys[0], keys[1]


def test_weight_and_factors_may_be_in_different_files(quantised: Path) -> None:
    before = SafetensorsFolder(quantised)
    wanted = {key: before.read(key) for key in before.weight_map}
    split(quantised)
    folder = SafetensorsFolder(quantised)
    assert wanted.keys() == folder.weight_map.keys()
    assert all(folder.read(key).equal(tensor) for key, tensor in wanted.items())


@pytest.mark.parametrize(
    "name",
    ["../model.safetensors", "/etc/passwd", "sub/../../x", "", "..", "a\0b", "..\\x", "\ud800"],
)
def test_an_index_that_names_a_file_outside_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(
        ModelError,
        match=(
            r"index\.json: the file of a is none of this folder, got '.*', expected a name inside "
            r"it"
        ),
    ):
        SafetensorsFolder(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        [],
        {},
        {"weight_map": []},
        {"weight_map": {}},
        {"weight_map": {"a": 3}},
        {"weight_map": None},
        "x",
    ],
)
def test_an_index_of_another_kind_is_refused(tmp_path: Path, content: Any) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(content))
    with pytest.raises(ModelError, match=r"index\.json: is no (index of weights|JSON object), got"):
        SafetensorsFolder(tmp_path)


def test_an_index_may_name_the_single_file_and_links(quantised: Path, tmp_path: Path) -> None:
    keys = load_file(quantised / "model.safetensors").keys()
    (quantised / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": dict.fromkeys(keys, "model.safetensors")})
    )
    wanted = SafetensorsFolder(quantised).weight_map
    # As the hub's cache has them: a folder of links to files elsewhere.
    linked = tmp_path / "linked"
    linked.mkdir()
    for path in quantised.iterdir():
        (linked / path.name).symlink_to(path)
    assert SafetensorsFolder(linked).weight_map == wanted


def test_an_index_that_does_not_fit_its_files_is_refused(quantised: Path) -> None:
    first, second = split(quantised)
    files = [quantised / f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    tensors = load_file(files[1])
    save_file({**tensors, first: torch.zeros(1)}, files[1])
    with pytest.raises(
        ModelError,
        match=(
            rf"00002\.safetensors: the key {first} is there twice, got it in model-00001-of-00002"
        ),
    ):
        SafetensorsFolder(quantised)
    save_file({key: tensor for key, tensor in tensors.items() if key != second}, files[1])
    with pytest.raises(
        ModelError,
        match=(
            rf"00002\.safetensors: the key {second} is missing, got \d+ keys, expected it because"
        ),
    ):
        SafetensorsFolder(quantised)
    files[1].unlink()
    with pytest.raises(ModelError, match=r"00002\.safetensors: the file is missing"):
        SafetensorsFolder(quantised)


def test_a_single_file_beside_the_files_of_an_index_is_refused(quantised: Path) -> None:
    single = (quantised / "model.safetensors").read_bytes()
    split(quantised)
    SafetensorsFolder(quantised)
    # transformers loads the single file, and an export would copy it unchanged beside the trained
    # weights.
    (quantised / "model.safetensors").write_bytes(single)
    message = r"two sets of weights, got model\.safetensors, .* and model\.safetensors\.index\.json"
    with pytest.raises(ModelError, match=message):
        SafetensorsFolder(quantised)
    index = quantised / "model.safetensors.index.json"
    index.write_text(
        json.dumps(
            {
                "weight_map": dict.fromkeys(
                    load_file(quantised / "model.safetensors"), "model.safetensors"
                )
            }
        )
    )
    assert SafetensorsFolder(quantised).files == ("model.safetensors",), (
        "an index may name the single file itself"
    )
