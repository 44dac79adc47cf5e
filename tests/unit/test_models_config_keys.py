"""config.json: every key that transformers reads is read alike, or refused by name. transformers'
own models are the oracle.
"""

from __future__ import annotations

import ast
import contextlib
import copy
import dataclasses
import importlib
import re
from pathlib import Path
from typing import Any

import pytest
import transformers

from tests.support.config_oracle import FAMILIES, WITH_TOWER, YARN, differs, text_of
from zppo_mm.errors import ModelError
from zppo_mm.models.families.architecture import load_architecture, parse_architecture
from zppo_mm.models.families.config_keys import BUILT, FOREIGN, HARMLESS, READ, READ_OUTSIDE

pytestmark = pytest.mark.usefixtures("one_rank")


def modules_of(family: str) -> tuple[Any, ...]:
    package = family.removesuffix("_text")
    names = (f"models.{package}.modeling_{package}", "modeling_rope_utils", "masking_utils")
    return tuple(importlib.import_module(f"transformers.{name}") for name in names)


def keys_that_are_looked_at(module: Any) -> set[str]:
    """Return the names that a module's code asks a configuration for."""
    found = set()
    for node in ast.walk(ast.parse(Path(module.__file__).read_text())):
        if (
            isinstance(node, ast.Attribute)
            and ast.unparse(node.value).endswith("config")
            and isinstance(node.ctx, ast.Load)
        ):
            found.add(node.attr)
        if (
            isinstance(node, ast.Call)
            and ast.unparse(node.func) == "getattr"
            and "config" in ast.unparse(node.args[0])
        ):
            found.add(
                ast.literal_eval(node.args[1])
                if isinstance(node.args[1], ast.Constant)
                else "a name that is computed"
            )
    return found


# What the code asks a configuration for besides settings of a network: how it is run, and ways to
# its parts.
Raws = dict[str, dict[str, Any]]
NO_SETTINGS = {
    "_attn_implementation",
    "get_text_config",
    "standardize_rope_params",
    "validate_rope",
    # Of a rotary type that is refused.
    "a name that is computed",
    "per_layer_config",
    "default_theta",
    "is_heterogeneous",
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_key_that_transformers_knows_has_a_fate(family: str) -> None:
    known = READ | set(BUILT) | HARMLESS
    config = transformers.CONFIG_MAPPING[family]
    parts = {name: spec.config_class for name, spec in config.sub_configs_defaults.items()}
    text = parts.get("text_config", config)
    assert {field.name for field in dataclasses.fields(text)} - known == set()
    assert {field.name for field in dataclasses.fields(config)} - known - READ_OUTSIDE == set()
    # The tower is transformers' own and reads its part by itself.
    towers = transformers.CONFIG_MAPPING[family.removesuffix("_text")].sub_configs_defaults
    tower = (
        {field.name for field in dataclasses.fields(towers["vision_config"].config_class)}
        if towers
        else set()
    )
    asked = set().union(*map(keys_that_are_looked_at, modules_of(family)))
    assert asked - known - READ_OUTSIDE - tower - NO_SETTINGS - set(FOREIGN) == set()
    assert {"hidden_size", "rms_norm_eps", "is_causal", "head_dim"} <= asked, (
        "the code is looked through"
    )


def test_no_key_has_two_fates() -> None:
    tables = [set(READ), set(BUILT), set(HARMLESS), set(FOREIGN)]
    assert sum(map(len, tables)) == len(set().union(*tables))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.medium
def test_a_key_that_is_left_out_has_the_value_that_transformers_gives_it(
    raws: Raws, family: str, tmp_path: Path
) -> None:
    equal = []
    for key in text_of(raws[family]):
        raw = copy.deepcopy(raws[family])
        if key == "model_type" and raw is text_of(raw):
            continue
        del text_of(raw)[key]
        found = differs(raw, tmp_path / key)
        assert is_named(key, found), (key, found)
        equal += [key] if not found else []
    # Refusing everything would be no reading. Rotary settings of these small heads do not fit
    # transformers' defaults with a tower.
    assert {"rms_norm_eps", "max_position_embeddings", "num_key_value_heads"} & set(equal), equal


def is_named(key: str, found: str) -> bool:
    """Return whether the networks are equal or the refusal names the key, or the axes that it
    decides the number of.
    """
    named = (
        "mrope_section does not fit"
        if key in ("head_dim", "partial_rotary_factor", "rope_parameters")
        else key
    )
    return found == "" or (
        found.startswith("refused: config.json: ") and (key in found or named in found)
    )


OTHER_VALUES: dict[str, Any] = {
    "hidden_act": "gelu",
    "attention_bias": True,
    "mlp_bias": True,
    "attention_dropout": 0.25,
    "use_sliding_window": True,
    "sliding_window": 8,
    "attention_chunk_size": 8,
    "is_causal": False,
    "rms_norm_eps": 1e-2,
    "head_dim": 8,
    "num_key_value_heads": 1,
    "max_window_layers": 1,
    "layer_types": ["full_attention", "sliding_attention", "full_attention", "full_attention"],
    "rope_theta": 77.0,
    "partial_rotary_factor": 0.25,
    "tie_word_embeddings": True,
    "per_layer_config": {"1": {"num_key_value_heads": 4}},
    "initializer_range": 0.5,
    "pretraining_tp": 2,
    "use_cache": False,
    "linear_conv_kernel_dim": 2,
    "linear_key_head_dim": 8,
    "full_attention_interval": 4,
    "attn_output_gate": False,
    "output_gate_type": "sigmoid",
    "logits_scaling": 2.0,
    "final_logit_softcapping": 30.0,
    "embedding_multiplier": 12.0,
    "num_experts": 4,
    "pad_token_id": 3,
    "dtype": "bfloat16",
    "torch_dtype": "float16",
    "something_of_ours": 5,
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.medium
def test_a_setting_is_computed_as_transformers_does_or_refused_by_name(
    raws: Raws, family: str, tmp_path: Path
) -> None:
    for key, value in OTHER_VALUES.items():
        raw = copy.deepcopy(raws[family])
        text_of(raw)[key] = value
        found = differs(raw, tmp_path / key)
        assert is_named(key, found), (key, found)


@pytest.mark.parametrize(
    ("key", "value"),
    [(key, value) for key, value in OTHER_VALUES.items() if key in BUILT or key in FOREIGN],
)
def test_a_setting_that_is_not_built_is_refused(raws: Raws, key: str, value: Any) -> None:
    raw = copy.deepcopy(raws["llama"])
    raw[key] = value
    with pytest.raises(ModelError, match=rf"config\.json: {key} is .*got "):
        parse_architecture(raw)


def test_a_key_of_a_newer_transformers_is_refused_unless_it_has_its_default(
    raws: Raws, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(BUILT, "mlp_bias")
    raw = copy.deepcopy(raws["llama"])
    parse_architecture(raw)
    with pytest.raises(
        ModelError,
        match="mlp_bias is not supported, got True, expected False; use an unmodified Llama folder",
    ):
        parse_architecture({**raw, "mlp_bias": True})


@pytest.mark.parametrize("family", WITH_TOWER)
def test_settings_around_the_language_part_are_not_dropped(raws: Raws, family: str) -> None:
    raw = raws[family]
    text = text_of(raw)
    same = {
        key: text[key]
        for key in ("hidden_size", "vocab_size", "rope_parameters", "num_hidden_layers")
    }
    assert parse_architecture({**copy.deepcopy(raw), **copy.deepcopy(same)}) == parse_architecture(
        raw
    )
    for stray in (
        {"rope_scaling": {**text["rope_parameters"], **YARN}},
        {"rms_norm_eps": 0.5},
        {"num_hidden_layers": 2},
    ):
        with pytest.raises(ModelError, match=r"twice|transformers cannot read it|two values"):
            parse_architecture({**copy.deepcopy(raw), **stray})
    with pytest.raises(ModelError, match="attention_chunk_size is not supported, got 4"):
        parse_architecture({**copy.deepcopy(raw), "attention_chunk_size": 4})


def test_a_language_part_is_looked_for_where_transformers_does(
    raws: Raws,
) -> None:
    for family in WITH_TOWER:
        raw = copy.deepcopy(raws[family])
        flat = {**raw.pop("text_config"), **raw}
        if family == "qwen2_5_vl":
            assert parse_architecture(flat) == parse_architecture(raws[family])
        else:
            with pytest.raises(ModelError, match=r"config\.json: the key 'text_config' is missing"):
                parse_architecture(flat)
        with pytest.raises(ModelError, match=r"config\.json: the key 'vision_config' is missing"):
            parse_architecture(
                {key: value for key, value in raws[family].items() if key != "vision_config"}
            )


@pytest.mark.parametrize("family", FAMILIES)
def test_a_quantisation_that_is_not_read_is_refused(raws: Raws, family: str) -> None:
    for section in (
        {},
        {"quantization_config": None},
        {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}},
    ):
        parse_architecture({**copy.deepcopy(raws[family]), **section})
    for found in (
        {"quant_method": "awq", "bits": 4},
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        "fp4",
        [1],
    ):
        raw = copy.deepcopy(raws[family])
        text_of(raw)["quantization_config"] = found
        with pytest.raises(
            ModelError,
            match=(
                r"config\.json: (quantization_config is not supported|transformers cannot read it)"
            ),
        ):
            parse_architecture(raw)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_value_of_another_kind_ends_in_no_traceback(
    raws: Raws, family: str, tmp_path: Path
) -> None:
    for section in (raws[family], text_of(raws[family])):
        for key in section:
            for value in ("text", [1], {"a": 1}, -1, 1.5, None, True):
                raw = copy.deepcopy(raws[family])
                (raw if section is raws[family] else text_of(raw))[key] = value
                with contextlib.suppress(ModelError):
                    parse_architecture(raw)
    for whole in ("[]", '"text"', "null", "[" * 100_000, "\udc80".encode(errors="surrogatepass")):
        (tmp_path / "config.json").write_bytes(
            whole if isinstance(whole, bytes) else whole.encode()
        )
        with pytest.raises(
            ModelError, match=r"config\.json: (is no JSON object, got|cannot be read as JSON)"
        ):
            load_architecture(tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is no size, got 1000000000"),
        ({"vocab_size": 2**62}, "vocab_size is no size"),
        ({"intermediate_size": True}, "intermediate_size is no size, got True"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is not supported, got nan"),
        ({"rms_norm_eps": float("inf")}, "rms_norm_eps is not supported, got inf"),
        ({"rms_norm_eps": -1e-6}, "rms_norm_eps is not supported"),
        ({"partial_rotary_factor": "x"}, "partial_rotary_factor is not supported, got 'x'"),
        ({"partial_rotary_factor": -0.5}, "partial_rotary_factor is not supported"),
        ({"mrope_section": "211"}, "mrope_section is not supported, got '211'"),
        ({"mrope_section": [9, -1, 0]}, "mrope_section is not supported"),
        ({"mrope_section": [4.0, 2, 2]}, "mrope_section is not supported"),
    ],
)
def test_numbers_that_describe_no_network_are_refused_before_it_is_built(
    raws: Raws, family: str, change: dict[str, Any], message: str
) -> None:
    raw = copy.deepcopy(raws[family])
    (key, value), *_ = change.items()
    if key == "mrope_section" and family not in WITH_TOWER:
        pytest.skip("text has one axis")
    rotary = key in ("mrope_section", "partial_rotary_factor")
    (text_of(raw)["rope_parameters"] if rotary else text_of(raw))[key] = value
    with pytest.raises(ModelError, match=re.escape(message)):
        parse_architecture(raw)


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_that_transformers_would_take_from_elsewhere_are_refused(
    raws: Raws, family: str
) -> None:
    with pytest.raises(
        ModelError, match=r"transformers_weights is not supported, got 'other\.safetensors'"
    ):
        parse_architecture(
            {**copy.deepcopy(raws[family]), "transformers_weights": "other.safetensors"}
        )
    with pytest.raises(
        ModelError, match="quantization_config is not supported, got 'bitsandbytes'"
    ):
        parse_architecture(
            {**copy.deepcopy(raws[family]), "quantization_config": {"load_in_4bit": True}}
        )
