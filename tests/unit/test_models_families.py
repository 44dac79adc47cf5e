"""Every family in one process against transformers: logits, gradients, greedy text, recomputation,
packing, export.
"""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from encoders.config import TIMESTAMPED, VideoLayout
from tests.support import network_checks, tiny_families, tiny_qwen
from tests.support.network_checks import check_training
from zppo_mm.config.schema import ModelConfig, ParallelConfig
from zppo_mm.errors import ConfigError, ModelError
from zppo_mm.models.families.architecture import check_layout, load_architecture, parse_architecture
from zppo_mm.models.families.table import FAMILIES as FAMILY_TABLE
from zppo_mm.models.provider import build_model
from zppo_mm.models.specs import check_recipe
from zppo_mm.weights.hf_export import export_hf_weights
from zppo_mm.weights.initial_weights import initialize_weights

pytestmark = pytest.mark.usefixtures("one_rank")

# Qwen3.5 has tests of its own in test_models_parity.
FAMILIES = tuple(family for family in tiny_families.KINDS if not family.startswith("qwen3_5"))
CASES = [(family, kind) for family in FAMILIES for kind in tiny_families.KINDS[family]]
# The same float32 sums in another grouping.
MAX_PACKING_DIFFERENCE = 2e-5
NUM_NEW_TOKENS = 12


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Any]]:
    return {
        family: tiny_families.folder(family, tmp_path_factory.mktemp(family)) for family in FAMILIES
    }


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_logits_and_gradients_equal_transformers(
    models: dict[str, tuple[Path, Any]], family: str, kind: str
) -> None:
    folder, oracle = models[family]
    # A text batch alone leaves the tower without a gradient in the oracle; with a second batch both
    # have all.
    beside = kind == "text" and len(tiny_families.KINDS[family]) > 1
    check_training(
        network_checks.build(folder, ParallelConfig()),
        oracle,
        (kind, "mixed") if beside else (kind,),
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tied_network_equals_transformers(family: str, tmp_path: Path) -> None:
    folder, oracle = tiny_families.folder(family, tmp_path, tied=True)
    check_training(
        network_checks.build(folder, ParallelConfig()), oracle, tiny_families.KINDS[family][-1:]
    )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputed_activations_give_the_same_gradients(
    models: dict[str, tuple[Path, Any]], family: str, recompute: str
) -> None:
    folder, oracle = models[family]
    network = network_checks.build(folder, ParallelConfig(), ModelConfig(recompute=recompute))
    check_training(network, oracle, tiny_families.KINDS[family][-1:])


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_sequences_equal_separate_ones(
    models: dict[str, tuple[Path, Any]], family: str
) -> None:
    network = network_checks.build(models[family][0], ParallelConfig())
    parts = [
        part
        for kind in tiny_families.KINDS[family]
        for part in tiny_families.sequences(family, kind)
    ]
    with torch.no_grad():
        packed = network(**tiny_qwen.pack(parts))
        separate = torch.cat([network(**tiny_qwen.pack([part])) for part in parts])
    assert (packed - separate).abs().max() <= MAX_PACKING_DIFFERENCE


@pytest.mark.parametrize(("family", "kind"), CASES)
@pytest.mark.medium
def test_greedy_tokens_equal_transformers(
    models: dict[str, tuple[Path, Any]], family: str, kind: str
) -> None:
    folder, oracle = models[family]
    network = network_checks.build(folder, ParallelConfig())
    parts = tiny_families.sequences(family, kind)
    tokens, _logits = network_checks.greedy(network, parts, NUM_NEW_TOKENS)
    assert tokens.tolist() == [
        network_checks.oracle_greedy(oracle, part, NUM_NEW_TOKENS) for part in parts
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_come_back_bit_for_bit(
    models: dict[str, tuple[Path, Any]], family: str, tmp_path: Path
) -> None:
    folder, _oracle = models[family]
    export_hf_weights(network_checks.build(folder, ParallelConfig()), folder, tmp_path / "out")
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "out"))
    assert before.keys() == after.keys()
    assert all(after[key].equal(before[key]) for key in before)
    assert (tmp_path / "out" / "config.json").read_bytes() == (folder / "config.json").read_bytes()


@pytest.mark.parametrize(
    ("family", "key", "value", "message"),
    [
        (
            "qwen3",
            "use_sliding_window",
            True,
            "use_sliding_window is not supported, got True, expected False; use an",
        ),
        ("qwen3", "attention_bias", True, "attention_bias is not supported, got True"),
        (
            "llama",
            "mlp_bias",
            True,
            "mlp_bias is not supported, got True, expected False; use an unmodified Llama",
        ),
        (
            "llama",
            "rope_parameters",
            {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
            "rope_type is not supported, got 'dynamic', expected 'default' or 'linear' or 'yarn' "
            "or 'llama3'",
        ),
        ("qwen3_vl", "text_config.hidden_act", "gelu", "hidden_act is not supported, got 'gelu'"),
        (
            "qwen3_vl",
            "text_config.layer_types",
            ["linear_attention"] * 4,
            "unknown kind, got .'linear_attention'., expected full",
        ),
        (
            "qwen2_5_vl",
            "text_config.use_sliding_window",
            True,
            "use_sliding_window is not supported, got True, expected False",
        ),
        (
            "qwen2_5_vl",
            "text_config.rope_parameters",
            {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
            "got 'dynamic', expected",
        ),
    ],
)
def test_settings_that_would_change_the_network_are_refused(
    models: dict[str, tuple[Path, Any]], family: str, key: str, value: Any, message: str
) -> None:
    raw = json.loads((models[family][0] / "config.json").read_text())
    part, _, inner = key.rpartition(".")
    (raw[part] if part else raw)[inner] = value
    with pytest.raises(ModelError, match=message):
        parse_architecture(raw)


def test_settings_of_older_folders_read_alike(models: dict[str, tuple[Path, Any]]) -> None:
    for family in FAMILIES:
        raw = json.loads((models[family][0] / "config.json").read_text())
        old = json.loads(json.dumps(raw))
        text = old.get("text_config", old)
        rope = text.pop("rope_parameters")
        text["rope_theta"] = rope.pop("rope_theta")
        text["rope_scaling"] = (
            {"type": rope.pop("rope_type"), **rope} if family == "llama" else rope
        )
        before, after = parse_architecture(raw), parse_architecture(old)
        for field in ("rotary_frequencies", "rotary_amplitude", "rotary_dim", "mrope_section"):
            assert getattr(before, field) == getattr(after, field), (family, field)


def test_layers_that_take_in_features_must_be_on_the_first_stage(
    models: dict[str, tuple[Path, Any]],
) -> None:
    architecture = load_architecture(models["qwen3_vl"][0])
    assert architecture.num_deepstack == 2
    check_layout(architecture, ParallelConfig(pipeline_model_parallel_size=2))
    with pytest.raises(
        ModelError,
        match=(
            r"got 4 over 4 stages, expected a multiple of 4, at least 2 in the first stage.*choose "
            r"2 stages"
        ),
    ):
        check_layout(architecture, ParallelConfig(pipeline_model_parallel_size=4))
    with pytest.raises(
        ModelError, match=r"num_key_value_heads cannot be split, got 2 over 4 ranks.*at most 2 here"
    ):
        check_layout(architecture, ParallelConfig(tensor_model_parallel_size=4))


def test_an_fp8_recipe_needs_its_gpu() -> None:
    for recipe, capability in (("tensorwise", (8, 9)), ("blockwise", (9, 0)), ("mxfp8", (10, 0))):
        check_recipe(ModelConfig(fp8="hybrid", fp8_recipe=recipe), capability)
    with pytest.raises(
        ConfigError,
        match=(
            r"mxfp8: this GPU cannot compute it, got compute capability 9.0, expected 10.0 .* "
            r"delayed or "
        ),
    ):
        check_recipe(ModelConfig(fp8="hybrid", fp8_recipe="mxfp8"), (9, 0))
    with pytest.raises(ConfigError, match=r"leave model\.fp8 empty"):
        check_recipe(ModelConfig(fp8="hybrid"), (8, 0))


# As in the config.json files of Qwen2.5-VL-3B-Instruct and -7B-Instruct: flat, rotary settings of
# before transformers 5.
QWEN2_5_VL: dict[str, Any] = {
    "model_type": "qwen2_5_vl",
    "hidden_act": "silu",
    "image_token_id": 151655,
    "max_position_embeddings": 128000,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "use_sliding_window": False,
    "video_token_id": 151656,
    "vision_end_token_id": 151653,
    "vision_start_token_id": 151652,
    "vision_config": {
        "depth": 32,
        "fullatt_block_indexes": [7, 15, 23, 31],
        "hidden_act": "silu",
        "hidden_size": 1280,
        "in_chans": 3,
        "intermediate_size": 3420,
        "num_heads": 16,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "spatial_patch_size": 14,
        "temporal_patch_size": 2,
        "tokens_per_second": 2,
        "window_size": 112,
    },
}
QWEN2_5_VL_SIZES: dict[str, dict[str, Any]] = {
    "3B": {
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "num_attention_heads": 16,
        "num_hidden_layers": 36,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
        "vocab_size": 151936,
    },
    "7B": {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_attention_heads": 28,
        "num_hidden_layers": 28,
        "num_key_value_heads": 4,
        "tie_word_embeddings": False,
        "vocab_size": 152064,
    },
}


def published(size: str) -> dict[str, Any]:
    """Return the whole config.json of a size."""
    tower = {
        **QWEN2_5_VL["vision_config"],
        "out_hidden_size": QWEN2_5_VL_SIZES[size]["hidden_size"],
    }
    return {**QWEN2_5_VL, **QWEN2_5_VL_SIZES[size], "vision_config": tower}


@pytest.mark.parametrize("size", QWEN2_5_VL_SIZES)
def test_published_configs_of_qwen2_5_vl_read(size: str) -> None:
    sizes = QWEN2_5_VL_SIZES[size]
    architecture = parse_architecture(published(size))
    assert (architecture.language_prefix, architecture.vision_prefix) == (
        "model.language_model.",
        "model.visual.",
    )
    assert (architecture.hidden_size, architecture.ffn_hidden_size) == (
        sizes["hidden_size"],
        sizes["intermediate_size"],
    )
    assert architecture.layer_types == ("full_attention",) * sizes["num_hidden_layers"]
    assert (architecture.num_attention_heads, architecture.num_query_groups) == (
        sizes["num_attention_heads"],
        sizes["num_key_value_heads"],
    )
    assert (architecture.head_dim, architecture.rotary_dim, architecture.rotary_amplitude) == (
        128,
        128,
        1.0,
    )
    assert architecture.rotary_frequencies[1] == pytest.approx(1e6 ** (-1 / 64))
    assert (architecture.mrope_section, architecture.mrope_interleaved) == ((16, 24, 24), False)
    assert (architecture.qkv_bias, architecture.qk_norm, architecture.output_gate) == (
        True,
        False,
        False,
    )
    assert architecture.tie_word_embeddings is sizes["tie_word_embeddings"]
    assert architecture.vocab_size == sizes["vocab_size"]
    assert (
        architecture.image_token_id,
        architecture.vision_end_token_id,
        architecture.spatial_merge_size,
    ) == (151655, 151653, 2)
    assert architecture.video_layout == VideoLayout(
        timestamped=False, tokens_per_second=2.0, limits_per_frame=True
    )


def test_one_family_shows_a_video_in_one_run(models: dict[str, tuple[Path, Any]]) -> None:
    # Prompts take the layout from the table, without an architecture.
    table = {
        name: family.video_layout({"vision_config": {"tokens_per_second": 4}})
        for name, family in FAMILY_TABLE.items()
    }
    built = {family: load_architecture(models[family][0]).video_layout for family in FAMILIES}
    for layouts in (table, built):
        assert [name for name, layout in layouts.items() if layout != TIMESTAMPED] == ["qwen2_5_vl"]
    assert (table["qwen2_5_vl"].tokens_per_second, built["qwen2_5_vl"].tokens_per_second) == (
        4.0,
        2.0,
    )


def test_an_inner_language_part_may_say_that_the_output_layer_is_the_embedding() -> None:
    flat = published("3B")
    inner = {key: value for key, value in flat.items() if not key.endswith("_id")}
    outer = {
        key: flat[key]
        for key in flat
        if key.endswith("_id") or key in ("model_type", "vision_config")
    }
    for raw, tied in (
        ({**outer, "text_config": inner}, True),
        ({**outer, "text_config": inner, "tie_word_embeddings": False}, True),
        ({**outer, "text_config": {**inner, "tie_word_embeddings": False}}, False),
    ):
        assert parse_architecture(raw).tie_word_embeddings is tied
        assert transformers.Qwen2_5_VLConfig(**deepcopy(raw)).tie_word_embeddings is tied


def test_a_text_batch_reaches_a_tower_whose_config_leaves_out_the_usual(
    models: dict[str, tuple[Path, Any]],
) -> None:
    raw = json.loads((models["qwen2_5_vl"][0] / "config.json").read_text())
    for key in ("patch_size", "temporal_patch_size", "in_channels"):
        del raw["vision_config"][key]
    raw["vision_config"]["window_size"] = 56
    network = build_model(parse_architecture(raw), ModelConfig(), ParallelConfig())
    assert network.vision.model.patch_embed.proj.weight.shape[1:] == (3, 2, 14, 14)
    initialize_weights(network, 0)
    network(**tiny_qwen.pack(tiny_qwen.sequences("text"))).sum().backward()
    assert all(parameter.grad is not None for parameter in network.vision.parameters())
