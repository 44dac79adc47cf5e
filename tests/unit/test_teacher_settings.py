"""Wrong settings of served teachers, which are named without repeating a key."""

from __future__ import annotations

import pytest

from zppo_mm.config.load import load_config
from zppo_mm.errors import ConfigError
from zppo_mm.parallel.exchange import SingleProcess
from zppo_mm.teacher.served.connect import open_pool


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["teacher.endpoints=[host:8000]", "teacher.model=m"],
            r"teacher.endpoints\[0\]: not an address",
        ),
        (
            ["teacher.endpoints=['http://u:geheim@h/v1']", "teacher.model=m"],
            r"holds more than an address",
        ),
        (
            ["teacher.endpoints=['http://h/v1?key=geheim']", "teacher.model=m"],
            r"holds more than an address",
        ),
        (
            ["teacher.endpoints=['http://h/v1','http://h/v1']", "teacher.model=m"],
            r"an address is listed twice",
        ),
        (
            ["teacher.endpoints=['http://h/v1']"],
            r"teacher.model: missing, got endpoints without a model",
        ),
        (["teacher.api_key_env=sk-geheim"], r"teacher.api_key_env: not a name"),
        (["teacher.on_failure=pray"], r"teacher.on_failure: not a choice"),
    ],
)
def test_wrong_settings_are_named_and_no_key_repeated(options: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(None, options)
    assert "geheim" not in str(caught.value)


def test_a_key_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    config = load_config(
        None,
        [
            "teacher.endpoints=['http://127.0.0.1:9/v1']",
            "teacher.model=m",
            "teacher.api_key_env=NO_SUCH_KEY",
        ],
    )
    with pytest.raises(ConfigError, match="the environment has no NO_SUCH_KEY"):
        open_pool(config.teacher, SingleProcess())
