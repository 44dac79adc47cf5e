"""config.json of tiny models of every family, and the network that it describes held against
transformers'.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file

from tests.support import network_checks, tiny_families, tiny_qwen
from zppo_mm.config.schema import ParallelConfig
from zppo_mm.errors import ModelError
from zppo_mm.models.families.architecture import parse_architecture

FAMILIES = tuple(tiny_families.KINDS)
WITH_TOWER = tuple(family for family in FAMILIES if len(tiny_families.KINDS[family]) > 1)
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}


def written_configs(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the config.json that transformers writes for the tiny model of every family."""
    found = {}
    for family in FAMILIES:
        tiny_families.model(family).config.save_pretrained(folder / family)
        found[family] = json.loads((folder / family / "config.json").read_text())
    return found


def text_of(raw: dict[str, Any]) -> dict[str, Any]:
    part: dict[str, Any] = raw.get("text_config", raw)
    return part


def differs(raw: dict[str, Any], folder: Path) -> str:
    """Return how the network of a config.json differs from transformers', or why it is refused;
    empty if they are equal.
    """
    try:
        architecture = parse_architecture(copy.deepcopy(raw))
    except ModelError as error:
        return f"refused: {error}"
    family = architecture.family
    config = transformers.CONFIG_MAPPING[family].from_dict(copy.deepcopy(raw))
    auto: Any = (
        transformers.AutoModelForImageTextToText
        if architecture.has_vision
        else transformers.AutoModelForCausalLM
    )
    torch.manual_seed(0)
    oracle = tiny_qwen.randomised(auto.from_config(config).float())
    folder.mkdir()
    shared = set(oracle._tied_weights_keys) if config.tie_word_embeddings else set()
    weights = {
        name: tensor.contiguous()
        for name, tensor in oracle.state_dict().items()
        if name not in shared
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(raw))
    network = network_checks.build(folder, ParallelConfig())
    parts = tiny_families.sequences(family, tiny_families.KINDS[family][-1])
    with torch.no_grad():
        gap = float(
            (network(**tiny_qwen.pack(parts)) - tiny_families.oracle_logits(oracle, parts))
            .abs()
            .max()
        )
    # Written so that a logit that is not a number differs.
    return "" if gap <= network_checks.MAX_LOGIT_DIFFERENCE else f"logits differ by {gap}"
