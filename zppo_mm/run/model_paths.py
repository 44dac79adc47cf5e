"""Checks of the model folders that a configuration names, before anything is loaded; errors say
what to write instead.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from zppo_mm.config.schema import ModelConfig, TeacherConfig
from zppo_mm.errors import ConfigError
from zppo_mm.models.families.architecture import load_architecture
from zppo_mm.run_folder import RunFolder
from zppo_mm.training.manifest import MANIFEST_FILE
from zppo_mm.weights.safetensors_folder import SafetensorsFolder

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_EXPORT = "python tools/convert_checkpoint.py export"
_MEGATRON_MARKS = (
    ".metadata",
    "metadata.json",
    "common.pt",
    "latest_checkpointed_iteration.txt",
    "headers",
    "*.distcp",
    "iter_*",
    "mp_rank_*",
)
_TOKENIZER_MARKS = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "tokenizer.model")
_OTHER_WEIGHTS = ("*.gguf", "*.bin", "*.pt", "*.pth")


def check_model_paths(model: ModelConfig, teachers: Sequence[TeacherConfig]) -> None:
    """Check every model folder that the run is to load.

    Args:
        model: The student's.
        teachers: The first teacher, then further ones.

    Raises:
        ConfigError: A path is no Hugging Face folder.
        ModelError: It is one that cannot be used; file and key are named.
    """
    check_model_path("model.student", model.student)
    for index, teacher in enumerate(teachers, -1):
        where = "teacher" if index < 0 else f"fallback_teachers[{index}]"
        endpoints = None if teacher.endpoints else f"{where}.endpoints"
        check_model_path(f"{where}.model", teacher.model, endpoints)


def check_model_path(key: str, value: str, endpoints: str | None = "") -> None:
    """Check one model folder; an empty path means a bundled model.

    Args:
        key: Of the configuration.
        value: Its value.
        endpoints: The key that would make the value a served model's name; empty if there is none,
            `None` if it is set, so that this is one.

    Raises:
        ConfigError: It is no Hugging Face folder.
        ModelError: It is one that cannot be used.
    """
    if not value or endpoints is None:
        return
    path = Path(value)
    found = _describe(path)
    if found:
        served = (
            f", or set {endpoints} if this is the name of a served model"
            if endpoints and not os.path.exists(path)
            else ""
        )
        raise ConfigError(
            f"{key}: {found[0]}, got {value!r}, expected a Hugging Face folder; {found[1]}{served}"
        )
    load_architecture(path)
    SafetensorsFolder(path)


def _describe(path: Path) -> tuple[str, str] | None:
    """Return what a path is and what to write instead; `None` if its file names are those of a
    Hugging Face folder.
    """
    try:
        if not path.exists():
            return _describe_missing(path)
        if not path.is_dir():
            return "a file", f"give its folder, {path.parent}, if that has a config.json"
        if (path / "config.json").is_file():
            return _describe_incomplete(path)
        return _describe_other(path)
    except (OSError, ValueError) as error:
        cause = getattr(error, "strerror", error)
        return f"cannot be read ({cause})", "correct its permissions or the path"


def _describe_missing(path: Path) -> tuple[str, str]:
    if _HUB_ID.fullmatch(str(path)):
        return (
            "no such folder, and nothing is downloaded from the Hugging Face Hub",
            f"if this is an id of the Hub, write hf download {path} --local-dir models/{path.name} "
            f"once and give models/{path.name}",
        )
    if "://" in str(path) or ":/" in str(path):
        return "an address", "download the model and give its folder"
    return "no such folder", "correct the path"


def _describe_incomplete(path: Path) -> tuple[str, str] | None:
    """Return what a folder with a config.json lacks."""
    if not any(
        (path / name).is_file() for name in ("model.safetensors", "model.safetensors.index.json")
    ):
        other = sorted(file.name for pattern in _OTHER_WEIGHTS for file in path.glob(pattern))
        have = f"weights that are not read here ({other[0]})" if other else "no weights"
        return (
            f"a folder with {have}",
            "give one with model.safetensors, or model.safetensors.index.json and its files",
        )
    if not any((path / name).is_file() for name in _TOKENIZER_MARKS):
        return (
            "a folder without a tokenizer",
            f"copy the model's {_TOKENIZER_MARKS[0]} and {_TOKENIZER_MARKS[1]} there",
        )
    return None


def _describe_other(path: Path) -> tuple[str, str]:
    """Return what a folder without a config.json is."""
    run = RunFolder(path)
    if run.config.is_file():
        if (run.hf / "config.json").is_file():
            return "the folder of a run", f"give its exported model, {run.hf}"
        return (
            "the folder of a run that is not finished",
            f"export its newest checkpoint ({_EXPORT} {path} HF_DIR) and give HF_DIR",
        )
    if (path / "adapter_config.json").is_file():
        return "adapters without their model", "give the folder of the merged model (a run's hf/)"
    its_run = RunFolder(path.parent.parent)
    if (path / MANIFEST_FILE).is_file() and path.parent == its_run.checkpoints:
        return "a checkpoint of a run", f"export it ({_EXPORT} {its_run} HF_DIR) and give HF_DIR"
    if any(any(path.glob(mark)) for mark in _MEGATRON_MARKS):
        return "a Megatron folder", f"export it ({_EXPORT} {path} HF_DIR) and give HF_DIR"
    below = sorted(
        file.parent
        for pattern in ("*/config.json", "snapshots/*/config.json")
        for file in path.glob(pattern)
    )
    if below:
        return "a folder without config.json", f"give {below[0]}, which has one"
    return "a folder without config.json", "correct the path, or download the folder again"
