"""Rotary embeddings: every setting, spelling and contradiction, with transformers' models as the
oracle.
"""

from __future__ import annotations

import copy
import importlib
from pathlib import Path
from typing import Any

import pytest
import transformers

from tests.support import network_checks, tiny_families
from tests.support.config_oracle import FAMILIES, WITH_TOWER, YARN, differs, text_of
from zppo_mm.config.schema import ParallelConfig
from zppo_mm.errors import ModelError
from zppo_mm.models.families import qwen2_5_vl, qwen3_5, qwen3_vl
from zppo_mm.models.families.architecture import parse_architecture

pytestmark = pytest.mark.usefixtures("one_rank")


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


ROTARY: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 3.0},
    "yarn": YARN,
    "yarn of a trained length that is implied": {"rope_type": "yarn", "factor": 4.0},
    "yarn, amplitude": {**YARN, "attention_factor": 0.7},
    "yarn, bounds": {**YARN, "beta_fast": 8.0, "beta_slow": 0.5},
    "yarn, both scales": {**YARN, "mscale": 0.8, "mscale_all_dim": 1.2},
    "yarn, one scale": {**YARN, "mscale": 0.8},
    "yarn, not truncated": {**YARN, "truncate": False},
    "yarn that shrinks": {**YARN, "factor": 0.5},
    "llama3": LLAMA3,
}


REFUSED: dict[str, dict[str, Any]] = {
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "longrope": {
        "rope_type": "longrope",
        "short_factor": [1.0] * 8,
        "long_factor": [2.0] * 8,
        "original_max_position_embeddings": 16,
    },
    "proportional": {"rope_type": "proportional", "rope_theta": 1e4},
    "unknown": {"rope_type": "su", "factor": 2.0},
    "yarn without a factor": {"rope_type": "yarn"},
    "yarn, factor of nothing": {**YARN, "factor": 0},
    "yarn, factor in words": {**YARN, "factor": "four"},
    "linear, infinite": {"rope_type": "linear", "factor": float("inf")},
    "nested": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}},
    "no object": ["yarn"],  # type: ignore[dict-item]
}


def with_rope(raw: dict[str, Any], change: dict[str, Any], spelling: str) -> dict[str, Any]:
    """Return a config.json whose rotary type is changed, in the spelling of transformers 5 or in
    one of before.
    """
    raw = copy.deepcopy(raw)
    text = text_of(raw)
    rope = text.pop("rope_parameters")
    kept = {
        key: rope[key]
        for key in ("rope_theta", "partial_rotary_factor", "mrope_section", "mrope_interleaved")
        if key in rope
    }
    whole = {**kept, **change}
    if spelling == "rope_parameters":
        text["rope_parameters"] = whole
        return raw
    for key in ("rope_theta", "partial_rotary_factor"):
        if key in whole:
            text[key] = whole.pop(key)
    if spelling == "type":
        whole["type"] = whole.pop("rope_type")
    text["rope_scaling"] = whole
    return raw


@pytest.mark.parametrize("spelling", ["rope_parameters", "rope_scaling", "type"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.medium
def test_rotary_embeddings_are_those_of_transformers_in_every_spelling(
    raws: dict[str, dict[str, Any]], family: str, spelling: str, tmp_path: Path
) -> None:
    seen = set()
    for name, change in ROTARY.items():
        raw = with_rope(raws[family], change, spelling)
        assert differs(raw, tmp_path / name) == "", name
        architecture = parse_architecture(raw)
        seen.add((architecture.rotary_frequencies, architecture.rotary_amplitude))
    # One of two scales is not looked at, and bounds are rounded to the few frequencies of a small
    # head.
    assert len(seen) >= len(ROTARY) - 2


@pytest.mark.parametrize("family", FAMILIES)
def test_sampling_rotates_as_training_does(
    raws: dict[str, dict[str, Any]], family: str, tmp_path: Path
) -> None:
    raw = with_rope(raws[family], ROTARY["yarn, amplitude"], "rope_scaling")
    assert differs(raw, tmp_path / "folder") == ""
    auto: Any = (
        transformers.AutoModelForImageTextToText
        if family in WITH_TOWER
        else transformers.AutoModelForCausalLM
    )
    oracle = auto.from_pretrained(tmp_path / "folder").eval()
    parts = tiny_families.sequences(family, "text")
    tokens, _logits = network_checks.greedy(
        network_checks.build(tmp_path / "folder", ParallelConfig()), parts, 8
    )
    assert tokens.tolist() == [network_checks.oracle_greedy(oracle, part, 8) for part in parts]


@pytest.mark.parametrize("spelling", ["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize("name", REFUSED)
def test_rotary_embeddings_that_are_not_built_are_refused(
    raws: dict[str, dict[str, Any]], name: str, spelling: str
) -> None:
    for family in FAMILIES:
        raw = copy.deepcopy(raws[family])
        text_of(raw).pop("rope_parameters")
        text_of(raw)[spelling] = REFUSED[name]
        with pytest.raises(
            ModelError, match=r"config\.json: .*(rope_type|rope_parameters|rope_scaling|factor)"
        ):
            parse_architecture(raw)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.medium
def test_of_two_rotary_spellings_none_is_dropped(
    raws: dict[str, dict[str, Any]], family: str, tmp_path: Path
) -> None:
    rope = text_of(raws[family])["rope_parameters"]
    plain = {
        key: value
        for key, value in rope.items()
        if key in ("rope_theta", "partial_rotary_factor", "mrope_section", "mrope_interleaved")
    }
    scaled = {**plain, **YARN}

    def both(
        new: dict[str, Any] | None, old: dict[str, Any] | None, **beside: Any
    ) -> dict[str, Any]:
        raw = copy.deepcopy(raws[family])
        text_of(raw).update({"rope_parameters": new, "rope_scaling": old, **beside})
        return raw

    # The same twice, or a type added in the older spelling to settings that say none: one meaning.
    for number, raw in enumerate(
        [
            both(scaled, scaled),
            both({**plain, "rope_type": "default"}, scaled),
            both(scaled, None),
        ]
    ):
        assert differs(raw, tmp_path / str(number)) == ""
        assert parse_architecture(raw).rotary_amplitude > 1
    contradictions = {
        "rope_type": both(scaled, {**plain, "rope_type": "default"}),
        "factor": both({**scaled, "factor": 2.0}, scaled),
        "attention_factor": both({**scaled, "attention_factor": 2.0}, scaled),
        # Without its base, the older spelling would be read with transformers' default.
        "rope_theta": both(
            {**plain, "rope_theta": 77.0},
            {key: value for key, value in scaled.items() if key != "rope_theta"},
        ),
        "type": both({**plain, "rope_type": "default", "type": "yarn"}, None),
    }
    for key, raw in contradictions.items():
        with pytest.raises(
            ModelError,
            match=(
                rf"config\.json: {key} has two values, got .* in rope_parameters, and .* is what "
                rf"transformers"
            ),
        ):
            parse_architecture(raw)
    with pytest.raises(
        ModelError, match=r"rope_theta has two values, got 78\.0 in the part around it"
    ):
        parse_architecture(both(plain, None, rope_theta=78.0))


def test_axes_that_a_file_does_not_say_are_those_of_transformers() -> None:
    for module, name in (
        (qwen3_5, "Qwen3_5Text"),
        (qwen3_vl, "Qwen3VLText"),
        (qwen2_5_vl, "Qwen2_5_VL"),
    ):
        package = module.__name__.rpartition(".")[2]
        code = importlib.import_module(f"transformers.models.{package}.modeling_{package}")
        config = getattr(transformers, f"{name.removesuffix('Text')}TextConfig")()
        assert (
            tuple(getattr(code, f"{name}RotaryEmbedding")(config).mrope_section)
            == module.DEFAULT_SECTION
        )
