"""Spellings of keys in weight files: what transformers finds is found here, and an export spells as
its source does.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.support import network_checks, tiny_families, tiny_qwen
from zppo_mm.config.schema import ParallelConfig
from zppo_mm.conversion.description import describe_folder
from zppo_mm.conversion.exporting import export_folder
from zppo_mm.conversion.importing import import_folder
from zppo_mm.conversion.verify import verify_folder
from zppo_mm.errors import ModelError
from zppo_mm.weights.hf_export import export_hf_weights
from zppo_mm.weights.safetensors_folder import SafetensorsFolder

pytestmark = pytest.mark.usefixtures("one_rank")

FAMILIES = tuple(tiny_families.KINDS)
LANGUAGE = (
    "",
    "model.",
    "language_model.",
    "model.language_model.",
    "language_model.model.",
    "model.model.",
    "model.language_model.model.",
    "language_model.model.model.",
    "model.model.language_model.",
    "thinker.model.",
)
TOWER = (
    "visual.",
    "model.visual.",
    "model.model.visual.",
    "vision_tower.",
    "model.language_model.visual.",
)
OUTPUT = ("lm_head.", "model.lm_head.", "language_model.lm_head.", "model.language_model.lm_head.")
USUAL_TOWER, USUAL_OUTPUT = "model.visual.", "lm_head."
Spelling = tuple[str, str, str]


@pytest.fixture(scope="module")
def oracles() -> dict[str, Any]:
    return {family: tiny_families.model(family) for family in FAMILIES}


def has_tower(family: str) -> bool:
    return len(tiny_families.KINDS[family]) > 1


def usual_language(family: str) -> str:
    return "model.language_model." if has_tower(family) else "model."


def spelled(oracle: Any, spelling: Spelling) -> dict[str, torch.Tensor]:
    """Return a model's tensors with other beginnings of their names."""
    usual = dict(
        zip(
            (usual_language(oracle.config.model_type), USUAL_TOWER, USUAL_OUTPUT),
            spelling,
            strict=True,
        )
    )
    found = {}
    for name, tensor in oracle.state_dict().items():
        start = max((start for start in usual if name.startswith(start)), key=len)
        found[usual[start] + name.removeprefix(start)] = tensor.contiguous()
    return found


def write(oracle: Any, tensors: dict[str, torch.Tensor], folder: Path) -> Path:
    oracle.config.save_pretrained(folder)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def transformers_finds(oracle: Any, folder: Path) -> bool:
    """Return whether transformers has a use for every tensor and gets every weight."""
    model, info = type(oracle).from_pretrained(folder, output_loading_info=True)
    loaded = model.state_dict()
    complete = not info["missing_keys"] and not info["unexpected_keys"]
    return complete and all(
        loaded[name].equal(tensor) for name, tensor in oracle.state_dict().items()
    )


def is_exported_alike(oracle: Any, folder: Path) -> bool:
    """Return whether a folder computes what its oracle does and comes out byte for byte; false if
    it is refused.
    """
    try:
        network = network_checks.build(folder, ParallelConfig())
    except ModelError as error:
        if "is missing" not in str(error):
            raise
        return False
    parts = tiny_families.sequences(oracle.config.model_type, "text")
    with torch.no_grad():
        gap = (
            (network(**tiny_qwen.pack(parts)) - tiny_families.oracle_logits(oracle, parts))
            .abs()
            .max()
        )
    assert gap <= network_checks.MAX_LOGIT_DIFFERENCE
    target = folder.with_name(folder.name + "-out")
    export_hf_weights(network, folder, target)
    assert (target / "model.safetensors").read_bytes() == (
        folder / "model.safetensors"
    ).read_bytes()
    return True


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.medium
def test_the_spellings_of_transformers_are_those_that_load(
    oracles: dict[str, Any], family: str, tmp_path: Path
) -> None:
    usual = usual_language(family)
    spellings = [(start, USUAL_TOWER, USUAL_OUTPUT) for start in LANGUAGE] + [
        (usual, USUAL_TOWER, start) for start in OUTPUT
    ]
    if has_tower(family):
        spellings += [(usual, start, USUAL_OUTPUT) for start in TOWER]
        spellings += [
            ("model.", "visual.", USUAL_OUTPUT),
            ("language_model.", "visual.", USUAL_OUTPUT),
        ]
    found = {}
    for number, spelling in enumerate(spellings):
        folder = write(oracles[family], spelled(oracles[family], spelling), tmp_path / str(number))
        found[spelling] = is_exported_alike(oracles[family], folder)
        assert found[spelling] == transformers_finds(oracles[family], folder), spelling
    assert sum(found.values()) >= 3, "more than one spelling loads"
    assert not all(found.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_spellings_may_be_mixed_but_no_key_stands_in_two(
    oracles: dict[str, Any], family: str, tmp_path: Path
) -> None:
    oracle = oracles[family]
    usual, other = (
        spelled(oracle, (start, USUAL_TOWER, USUAL_OUTPUT))
        for start in (usual_language(family), "model.language_model.model.")
    )
    if not has_tower(family) and family != "qwen3_5_text":
        other = spelled(oracle, ("", USUAL_TOWER, USUAL_OUTPUT))
    pairs = list(zip(usual.items(), other.items(), strict=True))
    mixed = dict(pair[number % 2] for number, pair in enumerate(pairs))
    folder = write(oracle, mixed, tmp_path / "mixed")
    assert transformers_finds(oracle, folder)
    assert is_exported_alike(oracle, folder)
    key, tensor = next(two for one, two in pairs if one[0] != two[0])
    folder = write(oracle, {**usual, key: tensor.clone()}, tmp_path / "twice")
    message = (
        r"model\.safetensors: the key .* is there in two spellings, got .* and .*, expected one"
    )
    with pytest.raises(ModelError, match=message):
        SafetensorsFolder(folder)


def test_a_text_network_is_read_from_the_folder_of_a_larger_one(tmp_path: Path) -> None:
    whole = tiny_qwen.vision_language_model()
    folder = tiny_qwen.save(whole, tmp_path / "text", mtp__fc__weight=torch.randn(4, 8))
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({**raw["text_config"], "tie_word_embeddings": False})
    )
    oracle = transformers.Qwen3_5ForCausalLM.from_pretrained(folder)
    assert oracle.lm_head.weight.equal(whole.lm_head.weight)
    assert is_exported_alike(oracle, folder)


def test_old_files_may_keep_rotary_frequencies(oracles: dict[str, Any], tmp_path: Path) -> None:
    oracle = oracles["llama"]
    kept = {
        f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.rand(8) for layer in range(4)
    }
    folder = write(
        oracle, {**spelled(oracle, ("model.", USUAL_TOWER, USUAL_OUTPUT)), **kept}, tmp_path / "old"
    )
    assert transformers_finds(oracle, folder)
    assert is_exported_alike(oracle, folder)


def tied_folder(
    family: str, folder: Path, change: Callable[[torch.Tensor], torch.Tensor]
) -> tuple[Path, str]:
    """Write a tied folder that holds the output layer besides; returns it and the key of its
    embedding.
    """
    folder, _oracle = tiny_families.folder(family, folder, tied=True)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    [embedding] = [key for key in tensors if key.endswith("embed_tokens.weight")]
    save_file(
        {**tensors, "lm_head.weight": change(tensors[embedding]).clone()},
        file,
        metadata={"format": "pt"},
    )
    return folder, embedding


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tied_output_layer_in_the_file_is_written_equal_to_the_trained_embedding(
    family: str, tmp_path: Path
) -> None:
    folder, embedding = tied_folder(family, tmp_path / "source", torch.Tensor.clone)
    network = network_checks.build(folder, ParallelConfig())
    export_hf_weights(network, folder, tmp_path / "same")
    assert (tmp_path / "same" / "model.safetensors").read_bytes() == (
        folder / "model.safetensors"
    ).read_bytes()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.25)
    export_hf_weights(network, folder, tmp_path / "trained")
    before, after = (
        load_file(path / "model.safetensors") for path in (folder, tmp_path / "trained")
    )
    assert before.keys() == after.keys()
    assert after[embedding].equal(before[embedding] + 0.25)
    assert after["lm_head.weight"].equal(after[embedding])
    assert transformers_finds(tiny_families.model(family, tied=True), folder)


def test_a_copy_of_the_embedding_is_no_parameter(tmp_path: Path) -> None:
    texts = []
    for name, folder in (
        ("with", tied_folder("qwen3", tmp_path / "with", torch.Tensor.clone)[0]),
        ("without", tmp_path / "without"),
    ):
        if name == "without":
            tiny_families.folder("qwen3", folder, tied=True)
        texts.append(
            next(
                line
                for line in describe_folder(folder).splitlines()
                if line.startswith("parameters in all")
            )
        )
    assert texts[0] == texts[1]


def test_a_tied_output_layer_goes_through_megatrons_format(tmp_path: Path) -> None:
    folder, _embedding = tied_folder("qwen3", tmp_path / "source", torch.Tensor.clone)
    import_folder(folder, tmp_path / "megatron", ParallelConfig())
    assert "lm_head.weight" not in load_file(tmp_path / "megatron" / "passed_through.safetensors")
    export_folder(tmp_path / "megatron", tmp_path / "back", ParallelConfig())
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (
        folder / "model.safetensors"
    ).read_bytes()
    report = verify_folder(folder)
    assert report.good, report.text()


def test_a_copy_in_another_type_is_compared_by_its_values(tmp_path: Path) -> None:
    folder, embedding = tied_folder("llama", tmp_path / "source", lambda tensor: tensor.double())
    network = network_checks.build(folder, ParallelConfig())
    export_hf_weights(network, folder, tmp_path / "out")
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert after["lm_head.weight"].dtype == torch.float64
    assert after["lm_head.weight"].equal(after[embedding].double())


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda tensor: tensor * 2, id="values"),
        pytest.param(lambda tensor: torch.cat([tensor[:-1], tensor[-1:] + 1e-6]), id="one row"),
        pytest.param(lambda tensor: tensor[:-1], id="shape"),
        pytest.param(lambda tensor: tensor.to(torch.bfloat16), id="rounded"),
    ],
)
def test_a_tied_output_layer_with_values_of_its_own_is_refused(
    change: Callable[[torch.Tensor], torch.Tensor], tmp_path: Path
) -> None:
    folder, embedding = tied_folder("qwen3", tmp_path / "source", change)
    message = (
        rf"model\.safetensors: lm_head\.weight is not the embedding, got other values than those "
        rf"of {embedding}, .* set it to false"
    )
    with pytest.raises(ModelError, match=message):
        network_checks.build(folder, ParallelConfig())
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, "tie_word_embeddings": False}))
    if change(torch.zeros(128, 64)).shape == (128, 64):
        network_checks.build(folder, ParallelConfig())
