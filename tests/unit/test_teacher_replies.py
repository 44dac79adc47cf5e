"""What a server may say, and what is made of it."""

from __future__ import annotations

import json
import time
from email.utils import formatdate
from typing import Any

import pytest

from zppo_mm.config_io import load_config
from zppo_mm.errors import ConfigError
from zppo_mm.rollout.exchange import SingleProcess
from zppo_mm.teacher.chat_api import Ask, Choice, Fault, parse_reply
from zppo_mm.teacher.connect import open_pool
from zppo_mm.teacher.endpoint import retry_after
from zppo_mm.teacher.media_parts import inert_text

A, B = (Choice(text, "stop", text) for text in "ab")


def reply(*choices: dict[str, Any], **fields: Any) -> bytes:
    return json.dumps({"choices": list(choices), **fields}).encode()


def choice(content: str | None, index: int = 0, **fields: Any) -> dict[str, Any]:
    return {"index": index, "message": {"content": content, **fields}, "finish_reason": "stop"}


def test_choices_and_usage() -> None:
    read = parse_reply(
        reply(choice("a"), {**choice("b", 1), "finish_reason": "length"}, usage={"prompt_tokens": 7, "completion_tokens": 5}), 2
    )
    assert read.choices == (Choice("a", "stop", "a"), Choice("b", "length", "b"))
    assert (read.num_returned, read.prompt_tokens, read.completion_tokens) == (2, 7, 5)


def test_no_choice_counts_twice_and_none_too_many() -> None:
    assert parse_reply(reply(choice("a"), choice("a"), choice("b", 1)), 4).choices == (A, B)
    assert parse_reply(reply(choice("a"), choice("b", 1)), 1).choices == (A,)
    some = parse_reply(reply(choice(""), choice("b", 1)), 2)
    assert (some.choices, some.num_returned) == ((B,), 2)


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
def test_reasoning_told_apart_is_put_back(name: str) -> None:
    (read,) = parse_reply(reply(choice("\\boxed{4}", **{name: "2 + 2"})), 1).choices
    assert (read.text, read.content) == ("<think>\n2 + 2\n</think>\n\n\\boxed{4}", "\\boxed{4}")
    cut = {"index": 0, "message": {"content": None, name: "2 +"}, "finish_reason": "length"}
    assert parse_reply(reply(cut), 1).choices == (Choice("<think>\n2 +\n</think>\n\n", "length", ""),)


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"null", b'{"choices": null}', b'{"choices": [1]}', b'{"choices": [{"index": 0}]}', b"\xff\xfe",
     b'{"choices": [{"message": {"content": 5}}]}', b'{"choices": [{"message": {"content": "a"}}], "usage": [3]}'],
)  # fmt: skip
def test_what_is_no_completion_is_a_bad_reply(body: bytes) -> None:
    with pytest.raises(Fault) as caught:
        parse_reply(body, 1)
    assert (caught.value.kind, caught.value.is_refusal) == ("bad_reply", False)


@pytest.mark.parametrize("body", [reply(), reply(choice(None)), reply(choice(""), choice("", 1))])
def test_no_text_is_an_empty_choice(body: bytes) -> None:
    with pytest.raises(Fault) as caught:
        parse_reply(body, 2)
    assert caught.value.kind == "empty_choice"


def test_retry_after() -> None:
    assert retry_after(None) is None
    assert retry_after("2.5") == 2.5
    assert retry_after("-3") == 0.0
    assert retry_after("soon") is None
    assert 25 < (retry_after(formatdate(time.time() + 30, usegmt=True)) or 0) <= 30
    assert retry_after(formatdate(0, usegmt=True)) == 0.0


def test_request_body() -> None:
    ask = Ask("hi é", num_choices=4, temperature=1.0, max_tokens=9, seed=2**31 - 1)
    body = json.loads(ask.body("m", "hi é", 4, 0))
    assert body == {
        "model": "m",
        "messages": [{"role": "user", "content": "hi é"}],
        "temperature": 1.0,
        "top_p": 1.0,
        "max_tokens": 9,
        "seed": 2**31 - 1,
        "stream": False,
        "n": 4,
    }
    assert json.loads(ask.body("m", "hi é", 1, 1))["seed"] == 0  # servers take 31 bits
    assert "n" not in json.loads(ask.body("m", "hi é", 1, 1))


def test_special_tokens_in_a_question_are_plain_text() -> None:
    assert inert_text("<|im_end|> <think> x<|y <|image_pad|>") == "< |im_end|> <think> x<|y < |image_pad|>"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["teacher.endpoints=[host:8000]", "teacher.model=m"], r"teacher.endpoints\[0\]: not an address"),
        (["teacher.endpoints=['http://u:geheim@h/v1']", "teacher.model=m"], r"holds more than an address"),
        (["teacher.endpoints=['http://h/v1?key=geheim']", "teacher.model=m"], r"holds more than an address"),
        (["teacher.endpoints=['http://h/v1','http://h/v1']", "teacher.model=m"], r"stands there twice"),
        (["teacher.endpoints=['http://h/v1']"], r"teacher.model: missing, got endpoints without a model"),
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
    config = load_config(None, ["teacher.endpoints=['http://127.0.0.1:9/v1']", "teacher.model=m", "teacher.api_key_env=NO_SUCH_KEY"])
    with pytest.raises(ConfigError, match="the environment has no NO_SUCH_KEY"):
        open_pool(config.teacher, SingleProcess())
