"""What is said about keys that are misspelt, called otherwise or written with dashes."""

from __future__ import annotations

import pytest

from tests.support.tools import load_tool
from zppo_mm.config.load import load_config
from zppo_mm.errors import ConfigError


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("train.learning_rate", "train.lr"),
        ("learning_rate", "train.lr"),
        ("train.max_grad_norm", "train.clip_grad"),
        ("rollout.n", "rollout.num_rollouts"),
        ("train.train_batch_size", "train.num_new_questions"),
        # Its own section, where the name is there too, before others.
        ("evaluation.temprature", "evaluation.temperature"),
        ("temperature", "rollout.temperature"),
    ],
)
def test_a_name_of_other_programs_is_understood(key: str, meant: str) -> None:
    with pytest.raises(ConfigError, match=rf"unknown key, got [\w.]+, .*did you mean {meant}\?"):
        load_config(None, [f"{key}=1"])


@pytest.mark.parametrize(
    ("words", "advice"),
    [
        (["--train.lr=1e-4"], "expected train.lr=1e-4; write it without dashes"),
        (["--train.lr", "1e-4"], "expected train.lr=VALUE; write it without dashes"),
        (["seed=1", "--seed=2"], "expected seed=2; write it without dashes"),
        (["--nothing"], "unrecognized arguments: --nothing"),
    ],
)
def test_a_key_with_dashes_is_not_taken_for_an_option(
    words: list[str], advice: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        load_tool("train_zppo").parse(words)
    assert advice in " ".join(capsys.readouterr().err.split())


def test_a_launcher_that_starts_again_does_not_restart(monkeypatch: pytest.MonkeyPatch) -> None:
    parse = load_tool("train_zppo").parse
    for name in ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    assert parse(["--restart"]) == (load_config(None), True)
    assert parse([]) == (load_config(None), False)
    for name in ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT"):
        monkeypatch.setenv(name, "0")
        assert parse(["--restart"])[1]
        monkeypatch.setenv(name, "1")
        assert not parse(["--restart"])[1]
        monkeypatch.delenv(name)
