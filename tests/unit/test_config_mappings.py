"""Keys that hold a mapping of the user's own names, and values of earlier versions."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest

from zppo_mm.config.load import load_config, save_config
from zppo_mm.errors import CheckpointError, ConfigError
from zppo_mm.run.resume import check_same_run
from zppo_mm.run_folder import RunFolder

KEY = "model.chat_template_kwargs"


def test_a_mapping_comes_from_a_file_and_options(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("model: {chat_template_kwargs: {enable_thinking: true, effort: high}}\n")
    options = [
        f"{KEY}.enable_thinking=false",
        "teacher.chat_template_kwargs={levels: [1, {a: null}]}",
        "fallback_teachers=[{chat_template_kwargs: {enable_thinking: false}}]",
    ]
    config = load_config(path, options)
    assert config.model.chat_template_kwargs == {"enable_thinking": False, "effort": "high"}
    assert config.teacher.chat_template_kwargs == {"levels": [1, {"a": None}]}
    assert config.fallback_teachers[0].chat_template_kwargs == {"enable_thinking": False}
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config
    assert load_config(path, [f"{KEY}={{}}"]).model.chat_template_kwargs == {}
    assert load_config(path, [f"{KEY}={{}}", f"{KEY}.a=1"]).model.chat_template_kwargs == {"a": 1}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("3", "has the wrong type"),
        ("[enable_thinking]", "has the wrong type"),
        ("null", "has the wrong type"),
        ("{1: true}", "has the wrong type"),
        ("{a: .nan}", rf"{KEY}: not JSON, got {{'a': nan}}"),
        ("{a: [{b: .inf}]}", rf"{KEY}: not JSON"),
        ("{enable_thinking: 'false'}", rf"{KEY}.enable_thinking: neither true nor false"),
    ],
)
def test_what_is_no_mapping_of_json_values_is_refused(value: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(None, [f"{KEY}={value}"])


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ([], [f"{KEY}.recompute=true"]),  # `model.recompute` may change, this is no such key
        ([f"{KEY}.a=1"], []),
        ([f"{KEY}.a=1"], [f"{KEY}.a=2"]),
        ([f"{KEY}={{a: [1]}}"], [f"{KEY}={{a: [2]}}"]),
        (["teacher.chat_template_kwargs.a=1"], ["teacher.chat_template_kwargs.b=1"]),
    ],
)
def test_a_resumed_run_keeps_its_mappings(before: list[str], after: list[str]) -> None:
    saved = asdict(load_config(None, before))
    with pytest.raises(CheckpointError, match=r"chat_template_kwargs was \{.*\}, is \{.*\};"):
        check_same_run(load_config(None, after), saved, RunFolder(Path("runs/one")))
    check_same_run(load_config(None, before), saved, RunFolder(Path("runs/one")))


@pytest.mark.parametrize(
    ("value", "advice"),
    [("true", "write open"), ("false", r"write never \(and evaluation.judge: never\)")],
)
def test_a_judge_that_is_on_or_off_says_what_to_write(value: str, advice: str) -> None:
    message = (
        r"reward.judge: not a choice, got '(True|False)', expected one of 'open', 'fallback', "
        rf"'never'; {advice}$"
    )
    with pytest.raises(ConfigError, match=message):
        load_config(None, [f"reward.judge={value}"])
