"""Rotary settings: which spelling holds, and the frequencies that transformers computes from
them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from zppo_mm.errors import ModelError
from zppo_mm.models.families.config_keys import ROPE_BESIDE, ROPE_SPELLINGS, same_value

SCALED_ROPE_TYPES = ("linear", "yarn", "llama3")
"""RoPE scaling whose frequencies depend on the settings alone. Dynamic types change them with the
sequence length, so that a prompt would mean something else in every pack.
"""

_BESIDE = "the part around it"


@dataclass(frozen=True, slots=True)
class Rotary:
    """What rotates the heads.

    Attributes:
        frequencies: Radians per position, one for each pair of rotated channels.
        amplitude: Factor of sines and cosines.
    """

    frequencies: tuple[float, ...]
    amplitude: float


def check_spellings(section: Mapping[str, Any], effective: Mapping[str, Any], where: str) -> None:
    """Refuse a file that says two things about its rotary embedding, of which transformers reads
    one and drops the other.

    Args:
        section: The language model's part of config.json.
        effective: What transformers makes of it.
        where: The file in messages.

    Raises:
        ModelError: A setting differs from the one that holds.
    """
    for where_found, key, value in _settings_of(section):
        name = "rope_type" if key == "type" else key
        value = "default" if name == "rope_type" and value == "mrope" else value
        if value is None or (name == "rope_type" and value == "default"):
            # Files of transformers 5 that somebody extended in the older spelling have this beside
            # the type that holds.
            continue
        if where_found == _BESIDE and name not in effective:
            # The length of the first training is read by some types alone.
            continue
        if not same_value(value, effective.get(name)):
            raise ModelError(
                f"{where}: {key} has two values, got {value!r} in {where_found}, and "
                f"{effective.get(name)!r} is what transformers would read, expected one; write all "
                f"rotary settings into {ROPE_SPELLINGS[0]} and remove {ROPE_SPELLINGS[1]}"
            )


def _settings_of(section: Mapping[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """Yield every rotary setting of a file, with the section that holds it."""
    for spelling in ROPE_SPELLINGS:
        for key, value in (section.get(spelling) or {}).items():
            yield spelling, key, value
    for key in ROPE_BESIDE:
        if key in section:
            yield _BESIDE, key, section[key]


def read_rotary(text: Any, rotary_dim: int, where: str) -> Rotary:
    """Return the frequencies of a language model.

    Args:
        text: transformers' configuration of it.
        rotary_dim: How many channels of a head are rotated.
        where: The file in messages.

    Raises:
        ModelError: The type is not supported, or its settings give no frequencies.
    """
    settings = text.rope_parameters
    kind = settings.get("rope_type")
    if kind not in ("default", *SCALED_ROPE_TYPES):
        raise ModelError(
            f"{where}: rope_type is not supported, got {kind!r}, expected 'default' or "
            f"{' or '.join(map(repr, SCALED_ROPE_TYPES))}; use a folder with one of these rotary "
            "embeddings, the same for all layers"
        )
    try:
        if kind == "default":
            steps = torch.arange(0, rotary_dim, 2, dtype=torch.float32) / rotary_dim
            frequencies, amplitude = 1.0 / settings["rope_theta"] ** steps, 1.0
        else:
            frequencies, amplitude = ROPE_INIT_FUNCTIONS[kind](text)
        rotary = Rotary(tuple(frequencies.tolist()), float(amplitude))
    except (ArithmeticError, LookupError, TypeError, ValueError, RuntimeError) as error:
        raise _unusable(where, settings, f"{type(error).__name__}: {error}") from error
    if len(rotary.frequencies) * 2 != rotary_dim or not all(
        map(_positive, (*rotary.frequencies, rotary.amplitude))
    ):
        raise _unusable(
            where,
            settings,
            f"{len(rotary.frequencies)} frequencies and a factor of {rotary.amplitude}",
        )
    return rotary


def _positive(value: float) -> bool:
    return math.isfinite(value) and value > 0


def _unusable(where: str, settings: Mapping[str, Any], got: str) -> ModelError:
    return ModelError(
        f"{where}: rope_parameters give no rotary embedding, got {got} from {dict(settings)}, "
        "expected positive numbers; correct the file"
    )
