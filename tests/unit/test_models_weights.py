"""Hugging Face folders in and out, the layouts and settings that are refused, and their
messages.
"""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support import network_checks, tiny_qwen
from zppo_mm.config.schema import ModelConfig, ParallelConfig
from zppo_mm.errors import ConfigError, ModelError
from zppo_mm.models import specs
from zppo_mm.models.families.architecture import check_layout, load_architecture, parse_architecture
from zppo_mm.models.provider import build_model
from zppo_mm.weights.hf_export import export_hf_weights
from zppo_mm.weights.initial_weights import initialize_weights
from zppo_mm.weights.mapping import load_hf_weights, parameter_mappings

pytestmark = pytest.mark.usefixtures("one_rank")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tied folder in mixed types with weights outside the network, as released models are."""
    model = tiny_qwen.vision_language_model(tied=True).to(torch.bfloat16)
    folder = tiny_qwen.save(
        model, tmp_path_factory.mktemp("tied") / "source", mtp__fc__weight=torch.randn(4, 8)
    )
    file = folder / "model.safetensors"
    tensors = {
        key: tensor.float() if key.endswith(("A_log", "linear_attn.norm.weight")) else tensor
        for key, tensor in load_file(file).items()
    }
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


@pytest.fixture
def copy(source: Path, tmp_path: Path) -> Path:
    """A folder to damage."""
    target = tmp_path / "copy"
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def assert_same_folder(left: Path, right: Path) -> None:
    """Check names, other files byte for byte, and weights bit for bit with their types."""
    names = sorted(path.name for path in left.iterdir())
    assert sorted(path.name for path in right.iterdir()) == names
    for name in names:
        if not name.endswith(".safetensors"):
            assert (left / name).read_bytes() == (right / name).read_bytes(), name
            continue
        wanted, found = load_file(left / name), load_file(right / name)
        assert found.keys() == wanted.keys()
        for key, tensor in wanted.items():
            assert found[key].dtype == tensor.dtype, key
            assert found[key].equal(tensor), key


@pytest.mark.parametrize("params_dtype", ["float32", "bfloat16"])
def test_a_tied_folder_survives_the_round_trip(
    source: Path, tmp_path: Path, params_dtype: str
) -> None:
    network = network_checks.build(source, ParallelConfig(), ModelConfig(params_dtype=params_dtype))
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "old file").write_text("from an earlier export")
    export_hf_weights(network, source, tmp_path / "target")
    assert_same_folder(source, tmp_path / "target")
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_a_folder_in_several_files_survives_the_round_trip(tmp_path: Path) -> None:
    model = tiny_qwen.vision_language_model()
    model.save_pretrained(tmp_path / "source", max_shard_size="200KB")
    assert (tmp_path / "source" / "model.safetensors.index.json").is_file()
    network = network_checks.build(tmp_path / "source", ParallelConfig())
    export_hf_weights(network, tmp_path / "source", tmp_path / "target")
    assert_same_folder(tmp_path / "source", tmp_path / "target")


def test_an_exported_folder_is_read_by_whom_the_umask_lets(source: Path, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        export_hf_weights(
            network_checks.build(source, ParallelConfig()), source, tmp_path / "target"
        )
    finally:
        os.umask(before)
    modes = {
        path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "target").iterdir()
    }
    assert modes == dict.fromkeys(modes, 0o640)
    assert "model.safetensors" in modes


def test_changed_weights_reach_the_exported_folder(source: Path, tmp_path: Path) -> None:
    network = network_checks.build(source, ParallelConfig())
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(1.0)
    export_hf_weights(network, source, tmp_path / "target")
    before, after = (
        load_file(source / "model.safetensors"),
        load_file(tmp_path / "target" / "model.safetensors"),
    )
    same = {key for key, tensor in before.items() if after[key].equal(tensor)}
    assert same == {"mtp.fc.weight"}


def test_initial_weights_follow_the_seed(source: Path) -> None:
    architecture = load_architecture(source)
    networks = [build_model(architecture, ModelConfig(), ParallelConfig()) for _ in range(3)]
    for network, seed in zip(networks, (1, 1, 2), strict=True):
        initialize_weights(network, seed)
    first, second, third = (dict(network.named_parameters()) for network in networks)
    assert all(first[name].equal(second[name]) for name in first)
    assert any(not first[name].equal(third[name]) for name in first)
    assert networks[0](**tiny_qwen.pack(tiny_qwen.sequences("mixed"))).isfinite().all()


def test_a_frozen_network_requires_no_gradients(source: Path) -> None:
    network = build_model(
        load_architecture(source), ModelConfig(), ParallelConfig(), trainable=False
    )
    assert not network.training
    assert not any(parameter.requires_grad for parameter in network.parameters())


def test_every_parameter_knows_its_hugging_face_keys(source: Path) -> None:
    network = build_model(load_architecture(source), ModelConfig(), ParallelConfig())
    keys = [key for mapping in parameter_mappings(network) for key in mapping.keys]
    assert sorted(keys) == sorted(set(load_file(source / "model.safetensors")) - {"mtp.fc.weight"})


def damaged(copy: Path, change: Any) -> None:
    file = copy / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    load_hf_weights(build_model(load_architecture(copy), ModelConfig(), ParallelConfig()), copy)


def test_a_missing_key_is_named(copy: Path) -> None:
    key = "model.language_model.layers.1.self_attn.k_proj.weight"
    with pytest.raises(ModelError, match=rf"copy: the key {key} is missing \(1 in all\)"):
        damaged(copy, lambda tensors: tensors.pop(key))


def test_an_unknown_key_is_named(copy: Path) -> None:
    with pytest.raises(
        ModelError,
        match=r"model\.safetensors: the key lm_head\.bias belongs to nothing in the network",
    ):
        damaged(copy, lambda tensors: tensors.update({"lm_head.bias": torch.zeros(128)}))
    with pytest.raises(ModelError, match=r"the key model\.visual\.extra belongs to nothing"):
        damaged(
            copy,
            lambda tensors: [
                tensors.pop("lm_head.bias"),
                tensors.update({"model.visual.extra": torch.zeros(1)}),
            ],
        )


def test_a_wrong_shape_is_named(copy: Path) -> None:
    key = "model.language_model.layers.0.linear_attn.in_proj_z.weight"
    with pytest.raises(
        ModelError,
        match=(
            rf"model\.safetensors: the shape of {key} does not fit, got \[64, 63\], expected \[64, "
            rf"64\]"
        ),
    ):
        damaged(copy, lambda tensors: tensors.update({key: torch.zeros(64, 63)}))


def test_unreadable_weights_are_named(copy: Path) -> None:
    network = build_model(load_architecture(copy), ModelConfig(), ParallelConfig())
    (copy / "model.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(ModelError, match=r"model\.safetensors: cannot be read as safetensors"):
        load_hf_weights(network, copy)
    (copy / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"copy: no weights found, expected model\.safetensors or"):
        load_hf_weights(network, copy)
    (copy / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "part.safetensors"}})
    )
    with pytest.raises(
        ModelError, match=r"part\.safetensors: the file is missing, expected it because"
    ):
        load_hf_weights(network, copy)
    (copy / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ModelError, match="is no index of weights"):
        load_hf_weights(network, copy)


def test_a_type_that_is_not_supported_is_named(copy: Path) -> None:
    key = "model.language_model.norm.weight"
    network = network_checks.build(copy, ParallelConfig())
    tensors = load_file(copy / "model.safetensors")
    tensors[key] = tensors[key].to(torch.complex64)
    save_file(tensors, copy / "model.safetensors")
    with pytest.raises(
        ModelError,
        match=(
            rf"model\.safetensors: the type of {key} is not supported, got C64, expected one of F64"
        ),
    ):
        export_hf_weights(network, copy, copy.parent / "target")


def test_an_export_that_cannot_be_written_fails_with_its_reason(
    source: Path, tmp_path: Path
) -> None:
    network = network_checks.build(source, ParallelConfig())
    (tmp_path / "a file").write_text("")
    with pytest.raises(ModelError, match=r"the export failed, got .*expected a complete folder"):
        export_hf_weights(network, source, tmp_path / "a file" / "target")


def changed(source: Path, **changes: Any) -> dict[str, Any]:
    """Return the parsed config with changes; `text__` and `rope__` go to the inner parts."""
    raw = json.loads((source / "config.json").read_text())
    for key, value in changes.items():
        part, _, inner = key.partition("__")
        target = {
            "text": raw["text_config"],
            "rope": raw["text_config"]["rope_parameters"],
            "vision": raw["vision_config"],
        }.get(part, raw)
        target[inner or key] = value
    return raw


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model_type": "gpt2"},
            "model_type is not supported, got 'gpt2', expected one of qwen3_5, qwen3_5_text, "
            "qwen3_vl",
        ),
        ({"text__hidden_act": "gelu"}, "hidden_act is not supported, got 'gelu', expected 'silu'"),
        (
            {"text__attention_bias": True},
            "attention_bias is not supported, got True, expected False",
        ),
        ({"text__attn_output_gate": False}, "attn_output_gate is not supported"),
        (
            {"rope__rope_type": "dynamic", "rope__factor": 2.0},
            r"rope_type is not supported, got 'dynamic', expected 'default' or 'linear'",
        ),
        (
            {"rope__rope_type": "yarn"},
            r"config\.json: transformers cannot read it, got KeyError: .*'yarn'.*'factor'",
        ),
        ({"rope__mrope_interleaved": False}, "mrope_interleaved is not supported"),
        ({"vision__deepstack_visual_indexes": [1]}, "deepstack_visual_indexes is not supported"),
        (
            {"text__num_hidden_layers": 5},
            r"transformers cannot read it, got .*`num_hidden_layers` \(5\) must be equal",
        ),
        (
            {"text__layer_types": ["linear_attention", "sliding_attention"] * 2},
            r"unknown kind, got \['sliding_attention'\]",
        ),
        (
            {"rope__mrope_section": [3, 3, 3]},
            "mrope_section does not fit, got .3, 3, 3., expected a sum of 8",
        ),
    ],
)
def test_settings_that_would_change_the_network_are_refused(
    source: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        parse_architecture(changed(source, **changes))


def test_a_folder_without_a_usable_config_is_refused(copy: Path) -> None:
    raw = changed(copy)
    del raw["text_config"]["hidden_size"]
    with pytest.raises(ModelError, match="the key 'hidden_size' is missing"):
        parse_architecture(raw)
    (copy / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"config\.json: cannot be read as JSON"):
        load_architecture(copy)
    (copy / "config.json").unlink()
    with pytest.raises(ModelError, match=r"config\.json: the file is missing"):
        load_architecture(copy)


def test_layer_types_follow_the_interval_where_they_are_not_listed(source: Path) -> None:
    raw = changed(source, text__full_attention_interval=2, text__layer_types=None)
    assert parse_architecture(raw).layer_types == load_architecture(source).layer_types


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (
            {"tensor_model_parallel_size": 3},
            "num_key_value_heads cannot be split, got 2 over 3 ranks",
        ),
        (
            {"context_parallel_size": 4},
            "num_key_value_heads cannot be split, got 2 over tensor 1 x context 4 ranks, .* "
            "divides 2, at most 2 here",
        ),
        (
            {"tensor_model_parallel_size": 2, "context_parallel_size": 2},
            "got 2 over tensor 2 x context 2 ranks, .* at most 1 here",
        ),
        (
            {"pipeline_model_parallel_size": 3},
            "layers cannot be split, got 4 over 3 stages, expected a multiple of 3",
        ),
    ],
)
def test_layouts_that_do_not_divide_are_refused(
    source: Path, layout: dict[str, int], message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        build_model(load_architecture(source), ModelConfig(), ParallelConfig(**layout))


def test_a_vocabulary_that_does_not_divide_is_refused(source: Path) -> None:
    with pytest.raises(ModelError, match="vocab_size cannot be split, got 127 over 2 ranks"):
        check_layout(
            parse_architecture(changed(source, text__vocab_size=127)),
            ParallelConfig(tensor_model_parallel_size=2),
        )


def test_a_layout_other_than_the_process_groups_is_refused(source: Path) -> None:
    message = (
        r"the layout is not that of the process groups, got tensor x pipeline x context \(2, 1, "
        r"1\), expected \(1, 1, 1\)"
    )
    with pytest.raises(ModelError, match=message):
        build_model(
            load_architecture(source), ModelConfig(), ParallelConfig(tensor_model_parallel_size=2)
        )


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"transformer_impl": "apex"}, "model.transformer_impl: unknown value, got 'apex'"),
        ({"params_dtype": "float16"}, "model.params_dtype: unknown value, got 'float16'"),
        ({"recompute": "some"}, "model.recompute: unknown value, got 'some'"),
        ({"recompute_vision": "some"}, "model.recompute_vision: unknown value, got 'some'"),
    ],
)
def test_unknown_model_settings_are_refused(
    source: Path, model: dict[str, str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        build_model(load_architecture(source), ModelConfig(**model), ParallelConfig())


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU refuses")
def test_transformer_engine_and_fp8_are_refused_without_a_gpu() -> None:
    for asked in (
        ModelConfig(transformer_impl="transformer_engine"),
        ModelConfig(fp8="hybrid"),
        ModelConfig(fp8="e4m3", transformer_impl="local"),
    ):
        with pytest.raises(
            ConfigError,
            match=(
                "Transformer Engine cannot be used here, got no GPU, expected a CUDA GPU and the "
                "package"
            ),
        ):
            specs.choose_implementation(asked)
    assert specs.choose_implementation(ModelConfig()) == "local"
