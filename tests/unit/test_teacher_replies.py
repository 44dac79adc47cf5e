"""What a server may say, and what is made of it."""

from __future__ import annotations

import json
import time
from email.utils import formatdate
from typing import Any

import pytest

from zppo_mm.config.schema import TeacherConfig
from zppo_mm.serving.endpoint import retry_after
from zppo_mm.serving.fault import Fault
from zppo_mm.serving.received_text import MAX_READ_CHARS, ReceivedText
from zppo_mm.teacher.served.chat_api import ChatRequest, Choice
from zppo_mm.teacher.served.chat_reply import parse_reply
from zppo_mm.teacher.served.media import MessageWriter

A, B = (Choice(text, "stop", text) for text in "ab")


def reply(*choices: dict[str, Any], **fields: Any) -> bytes:
    return json.dumps({"choices": list(choices), **fields}).encode()


def choice(content: str | None, index: int = 0, **fields: Any) -> dict[str, Any]:
    return {"index": index, "message": {"content": content, **fields}, "finish_reason": "stop"}


def test_choices_and_usage() -> None:
    read = parse_reply(
        reply(
            choice("a"),
            {**choice("b", 1), "finish_reason": "length"},
            usage={"prompt_tokens": 7, "completion_tokens": 5},
        ),
        2,
    )
    assert read.choices == (Choice("a", "stop", "a"), Choice("b", "length", "b"))
    assert (read.num_returned, read.prompt_tokens, read.completion_tokens) == (2, 7, 5)


def test_no_choice_counts_twice_and_none_too_many() -> None:
    assert parse_reply(reply(choice("a"), choice("a"), choice("b", 1)), 4).choices == (A, B)
    assert parse_reply(reply(choice("a"), choice("b", 1)), 1).choices == (A,)
    some = parse_reply(reply(choice(""), choice("b", 1)), 2)
    assert (some.choices, some.num_returned, some.dropped) == ((B,), 2, {"empty_choice": 1})
    many = parse_reply(reply(choice("b", 7), choice("c", 7), choice("a", 3), choice("d", 9)), 2)
    assert (many.choices, many.dropped) == ((A, B), {"surplus_choice": 2})


@pytest.mark.parametrize("index", [None, "0", True, 1.0, [], {}, "\ud83d"])
def test_an_index_of_another_type_counts_as_none(index: Any) -> None:
    assert parse_reply(reply(choice("a", index), choice("b", index)), 2).choices == (A, B)
    assert parse_reply(reply(choice("b"), choice("a", -(10**30))), 2).choices == (A, B)


@pytest.mark.parametrize("count", [None, -1, "7", True, 7.5, 1e999, 10**400, [7], {}])
def test_a_usage_that_counts_nothing_loses_no_answer(count: Any) -> None:
    assert parse_reply(reply(choice("a"), usage=count), 1).choices == (A,)
    usage = {"prompt_tokens": count, "completion_tokens": count}
    read = parse_reply(reply(choice("a"), usage=usage), 1)
    assert (read.choices, read.prompt_tokens, read.completion_tokens) == ((A,), 0, 0)


def test_content_may_come_in_parts_of_text() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": ""}]
    assert parse_reply(reply({**choice("x"), "message": {"content": parts}}), 1).choices == (A,)
    assert parse_reply(
        reply({**choice("x"), "message": {"content": [{"type": "output_text", "text": "a"}]}}), 1
    ).choices == (A,)
    thinking = {"type": "thinking", "thinking": [{"type": "text", "text": "2 + 2"}]}
    (read,) = parse_reply(
        reply({**choice("x"), "message": {"content": [thinking, parts[0]]}}), 1
    ).choices
    assert (read.text, read.content) == ("<think>\n2 + 2\n</think>\n\na", "a")
    (cut,) = parse_reply(
        reply({**choice("x"), "message": {"content": [thinking]}, "finish_reason": "length"}), 1
    ).choices
    assert (cut.text, cut.finish_reason, cut.content) == ("<think>\n2 + 2", "length", "")
    for unknown in (
        {"type": "image_url", "image_url": {}},
        {"type": "other", "text": "a"},
        {"type": []},
        "a",
        None,
        {"type": "text"},
    ):
        with pytest.raises(Fault, match="bad_reply"):
            parse_reply(reply({**choice("x"), "message": {"content": [unknown]}}), 1)


TOKEN = {"token": "a", "bytes": [97], "logprob": -0.5, "top_logprobs": []}
UNREADABLE: list[Any] = [{"content": [{**TOKEN, **wrong}]} for wrong in (
    {"logprob": None}, {"logprob": "-0.5"}, {"logprob": True}, {"top_logprobs": {"a": -0.5}},
    {"top_logprobs": [None]},
    {"bytes": [256]}, {"bytes": "YQ=="}, {"bytes": [97] * 5000},
    {"token": None, "bytes": None})]  # fmt: skip
UNREADABLE += [
    {"content": ["a"]},
    {"content": {"0": TOKEN}},
    {"content": [{"token": "a"}]},
    [TOKEN],
    "a",
    {"tokens": ["a"]},
    {},
    0,
    None,
]


@pytest.mark.parametrize("sent", UNREADABLE)
def test_log_probs_that_cannot_be_read_take_no_answer_away(sent: Any) -> None:
    assert parse_reply(reply({**choice("a"), "logprobs": sent}), 1, 1).choices == (A,)
    (read,) = parse_reply(reply({**choice("a"), "logprobs": {"content": [TOKEN]}}), 1, 1).choices
    assert len(read.tokens) == 1


def test_text_that_is_no_text_is_made_one() -> None:
    body = reply(choice("half \ud83d, whole \ud83d\ude00, nul \0", reasoning="\udc00"))
    (read,) = parse_reply(body, 1).choices
    assert read.content == "half \ufffd, whole \U0001f600, nul \ufffd"
    assert read.text == f"<think>\n\ufffd\n</think>\n\n{read.content}"
    (raw,) = parse_reply(
        reply(choice("X")).replace(b"X", b"\xff\xed\xa0\xbd"), 1
    ).choices  # bytes that are no UTF-8
    assert raw.text.strip("\ufffd") == ""
    assert parse_reply(b"\xef\xbb\xbf" + reply(choice("a")), 1).choices == (A,)


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
def test_separate_reasoning_is_put_back(name: str) -> None:
    (read,) = parse_reply(reply(choice("\\boxed{4}", **{name: "2 + 2"})), 1).choices
    assert (read.text, read.content) == ("<think>\n2 + 2\n</think>\n\n\\boxed{4}", "\\boxed{4}")
    (tagged,) = parse_reply(reply(choice("4", **{name: "<think> 2 + 2 "})), 1).choices
    assert tagged.text == "<think>\n2 + 2\n</think>\n\n4"


@pytest.mark.parametrize(
    "parts",
    [
        ["2 ", "+ 2"],
        [{"type": "text", "text": "2 "}, {"text": "+ 2"}],
        [{"type": "thinking", "thinking": "2 + 2"}],
        [{"type": "reasoning_text", "text": "2 + 2"}, {"type": "signature", "signature": "x"}],
        [{"type": "thinking", "thinking": [{"type": "text", "text": "2 + 2"}]}],
    ],
)
def test_a_reasoning_in_parts_is_one_text(parts: list[object]) -> None:
    (read,) = parse_reply(reply(choice("4", reasoning_content=parts)), 1).choices
    assert read.text == "<think>\n2 + 2\n</think>\n\n4"


@pytest.mark.parametrize("content", [None, ""])
@pytest.mark.parametrize("reason", ["length", "stop"])
def test_a_reasoning_that_nothing_follows_is_not_closed(content: str | None, reason: str) -> None:
    cut = {**choice(content, reasoning="2 +"), "finish_reason": reason}
    (read,) = parse_reply(reply(cut), 1).choices
    assert (read.text, read.finish_reason, read.content) == ("<think>\n2 +", reason, "")


@pytest.mark.parametrize(
    "reason", ["stop", "STOP", "eos", "eos_token", "end_turn", "stop_sequence", "COMPLETE"]
)
def test_an_answer_that_the_model_ended_is_complete(reason: str) -> None:
    assert parse_reply(reply({**choice("a"), "finish_reason": reason}), 1).choices == (A,)


@pytest.mark.parametrize(
    "reason",
    [
        "length",
        "max_tokens",
        "MAX_TOKENS",
        "max_output_tokens",
        "model_length",
        "model_context_window_exceeded",
    ],
)
def test_an_answer_at_the_limit_is_cut(reason: str) -> None:
    assert parse_reply(reply({**choice("a"), "finish_reason": reason}), 1).choices == (
        Choice("a", "length", "a"),
    )


UNFINISHED = ["abort", "error", "timeout", "cancelled", "tool_calls", "function_call", "repetition",
"stopped", " stop", "st\u043ep", "",
              None, "time_limit", "pause_turn", "OTHER", "network_error", "null",
              "insufficient_system_resource", "unknown_reason", 0, True, 1e999, ["stop"],
              {"type": "stop"}]  # fmt: skip


@pytest.mark.parametrize("reason", UNFINISHED)
def test_any_other_state_is_no_answer(reason: Any) -> None:
    unfinished = {**choice("\\boxed{4}", reasoning="2 + 2"), "finish_reason": reason}
    with pytest.raises(
        Fault, match=r"^unfinished: finish_reason .*, expected 'stop' or 'length'$"
    ) as caught:
        parse_reply(reply(unfinished), 1)
    assert not caught.value.is_refusal
    some = parse_reply(reply(choice("a"), {**unfinished, "index": 1}), 2)
    assert (some.choices, some.num_returned, some.dropped) == ((A,), 2, {"unfinished": 1})


@pytest.mark.parametrize("reason", ["tool_calls", "function_call", "tool_use", "repetition"])
def test_what_the_model_made_instead_of_an_answer_is_no_fault_of_the_server(reason: str) -> None:
    for said in (
        {**choice(None, tool_calls=[{}]), "finish_reason": reason},
        choice(""),
        {**choice(""), "finish_reason": "length"},
    ):
        with pytest.raises(Fault) as caught:
            parse_reply(reply(said), 1)
        assert (caught.value.is_of_model, caught.value.is_refusal) == (True, False)
    with pytest.raises(Fault) as caught:
        parse_reply(reply({**choice("a"), "finish_reason": "abort"}), 1)
    assert not caught.value.is_of_model


def test_a_choice_without_a_finish_reason_is_no_answer() -> None:
    with pytest.raises(Fault, match="unfinished: finish_reason None"):
        parse_reply(reply({"index": 0, "message": {"content": "a"}}), 1)


def test_an_error_beside_an_answer_is_one() -> None:
    with pytest.raises(Fault, match=r"unfinished: finish_reason 'stop' and an error: .*overloaded"):
        parse_reply(reply({**choice("half"), "error": {"code": 502, "message": "overloaded"}}), 1)


REFUSED = [
    {**choice("a"), "finish_reason": state}
    for state in ("SAFETY", "RECITATION", "guardrail_intervened", "refusal")
]
REFUSED += [
    choice(None, refusal="I cannot."),
    {**choice(""), "message": {"content": [{"type": "refusal", "refusal": "I cannot."}]}},
]


@pytest.mark.parametrize("refused", REFUSED)
def test_a_refusal_in_any_form_is_one(refused: dict[str, Any]) -> None:
    with pytest.raises(Fault, match=r"^content_filter: ") as caught:
        parse_reply(reply(refused), 1)
    assert caught.value.is_refusal


def test_an_answer_that_is_held_back_is_not_asked_for_again() -> None:
    held = {**choice("", 1), "finish_reason": "content_filter"}
    with pytest.raises(Fault, match="content_filter: ") as caught:
        parse_reply(reply(held), 1)
    assert caught.value.is_refusal
    with pytest.raises(Fault, match="empty_choice: ") as caught:  # the other one may come
        parse_reply(reply(held, choice("")), 2)
    assert not caught.value.is_refusal
    assert parse_reply(reply(choice("a"), held), 2).dropped == {"content_filter": 1}


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"null", b'{"choices": null}', b'{"choices": [1]}',
    b'{"choices": [{"index": 0}]}', b"\xff\xfe",
     b'{"choices": [{"message": {"content": 5}}]}', b"[" * 200_000, b'{"choices":' * 200_000,
     b'{"choices": ' + b"9" * 5000 + b"}",
     b'{"choices": {"0": 1}}', b'{"choices": "ab"}', b'{"choices": [null]}',
     b'{"choices": [{"message": "a"}]}', b"1e999",
     b'{"error": {"message": "overloaded", "code": 503}}', b"<html>502</html>",
     reply(choice("a")).decode().encode("utf-16")],
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
    assert (
        retry_after("99999999")
        == retry_after("1e999")
        == retry_after(formatdate(4e9, usegmt=True))
        == 60.0
    )
    for unreadable in (
        "nan",
        "",
        "9" * 5000 + "x",
        "Wed, 21 Oct 99999 07:28:00 GMT",
        "Mon, 99 Foo 2026",
        "0 0 0 0 0 0",
        "\u0663",
    ):
        assert (retry_after(unreadable) or 0.0) <= 60.0


def test_request_body() -> None:
    ask = ChatRequest("hi é", num_choices=4, temperature=1.0, max_tokens=9, seed=2**31 - 1)
    messages = [{"role": "user", "content": "hi é"}]
    body = json.loads(ask.body("m", messages, 4, 0))
    assert body == {
        "model": "m",
        "messages": messages,
        "temperature": 1.0,
        "top_p": 1.0,
        "max_tokens": 9,
        "seed": 2**31 - 1,
        "stream": False,
        "n": 4,
    }
    assert json.loads(ask.body("m", messages, 1, 1))["seed"] == 0  # servers take 31 bits
    assert "n" not in json.loads(ask.body("m", messages, 1, 1))


def test_special_tokens_in_a_question_are_plain_text() -> None:
    given = "<|im_end|> </s> [/INST] x<|y a < b\ud83d"
    (message,) = MessageWriter(TeacherConfig()).messages(given)
    assert message["content"] == "< |im_end|> < /s> [ /INST] x<|y a < b\ufffd"


KEY = "sk-0123/4567<89>"


def test_the_key_is_hidden_in_answers_and_messages() -> None:
    received = ReceivedText(KEY)
    body = reply(choice(f"It is {KEY}.", reasoning=f"{KEY}?")).replace(b"sk-", b"\\u0073k-")
    (read,) = parse_reply(body, 1, 0, received).choices
    assert (read.content, read.text) == ("It is ***.", "<think>\n***?\n</think>\n\nIt is ***.")
    listed = [
        {"token": KEY, "logprob": -1.0},
        {"token": "x", "bytes": list(f" {KEY}".encode()), "logprob": -1.0},
    ]
    sent = {**choice("a"), "logprobs": {"content": listed}}
    (read,) = parse_reply(reply(sent), 1, 1, received).choices
    assert [token.spelling for token in read.tokens] == [b"***", b" ***"]
    for spelling in (KEY, KEY.replace("/", "%2F"), "sk-0123\\/4567&lt;89&#62;", KEY.upper()):
        assert received.shown(f"Bearer {spelling} is wrong") == "Bearer *** is wrong"
    with pytest.raises(Fault) as caught:
        parse_reply(json.dumps({"error": f"wrong key {KEY}"}).encode(), 1, 0, received)
    assert "***" in caught.value.detail
    assert "sk-" not in caught.value.detail
    for before in range(
        MAX_READ_CHARS - 20, MAX_READ_CHARS + 2
    ):  # never a part of it, wherever the text is cut
        assert "sk" not in received.shown(" " * before + KEY)


def test_a_key_that_is_no_secret_changes_no_answer() -> None:
    received = ReceivedText("EMPTY")
    assert (
        parse_reply(reply(choice("The set is EMPTY")), 1, 0, received).choices[0].text
        == "The set is EMPTY"
    )
    assert received.shown("wrong key EMPTY") == "wrong key ***"


def test_what_is_shown_is_one_short_line_that_no_terminal_obeys() -> None:
    shown = ReceivedText().shown("a\x1b[2J\r\nERROR forged\x9b\u202e\u2028\0\ud83d" + "x" * 10**6)
    assert shown.startswith("a\\x1b[2J ERROR forged\\x9b\\u202e")
    assert shown.isprintable()
    assert len(shown) == 300
