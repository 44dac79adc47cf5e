"""A server's tokens and log-probs in the student's vocabulary."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import math
from typing import Any

import numpy as np
import pytest

from zppo_mm.bundled import STUDENT_DIR
from zppo_mm.experience import NO_TOKEN
from zppo_mm.rollout.chat import ChatFormat
from zppo_mm.serving.fault import Fault
from zppo_mm.teacher.served.chat_api import ChatRequest, Choice, ServedToken
from zppo_mm.teacher.served.chat_reply import parse_reply
from zppo_mm.teacher.served.tokens import TokenReader


@pytest.fixture(scope="module")
def chat() -> ChatFormat:
    return ChatFormat(STUDENT_DIR)


IDS = {
    b"<think>": 1,
    b"\n": 2,
    b"4": 3,
    b" is": 4,
    b"</think>": 5,
    b"<end>": 6,
    b"\xc3": 7,
    b"\xa9": 8,
    "\ufffd".encode(): 9,
}


def token(spelling: bytes, probability: float = 0.5, **top: float) -> ServedToken:
    return ServedToken(
        spelling,
        math.log(probability),
        tuple((text.encode(), math.log(p)) for text, p in top.items()),
    )


def choice(text: str, *tokens: ServedToken) -> Choice:
    return Choice(text, "stop", text, tokens)


def reader() -> TokenReader:
    return TokenReader(IDS, [6], num_top=2)


def test_bytes_of_tokens_spell_any_text(chat: ChatFormat) -> None:
    ids_of = chat.token_bytes()
    spelled = {token_id: spelling for spelling, token_id in ids_of.items()}
    text = "What is 3 + 4? é ≤ 🙂\n\n<think> \\boxed{7}"
    ids = chat.tokenize([text])
    assert b"".join(spelled[token_id] for token_id in ids) == text.encode()
    assert set(chat.stop_token_ids) <= set(spelled)
    assert len(spelled) == len(ids_of)
    # Every single byte is a token, so that part of a character can be one.
    assert {bytes([byte]) for byte in range(256)} <= set(ids_of)


def test_ids_and_log_probs_by_position() -> None:
    answer = choice(
        "4",
        token(b"4", 0.5, **{"4": 0.5, " is": 0.25}),
        token(b"<end>", 0.125, **{" is": 0.75, "4": 0.0625}),
    )
    found = reader().read(answer)
    assert found is not None
    ids, top = found
    assert ids.tolist() == [3, 6]
    # The written token is listed anyway at the first position, and not at the second.
    assert top.ids.tolist() == [[3, 4, NO_TOKEN], [6, 4, 3]]
    np.testing.assert_allclose(
        np.exp(top.logprobs), [[0.5, 0.25, 0.0], [0.125, 0.75, 0.0625]], rtol=1e-6
    )


def test_a_character_may_be_divided_and_reasoning_separated() -> None:
    written = [
        token(part)
        for part in (
            b"<think>",
            b"\n",
            b"4",
            b"\n",
            b"</think>",
            b"\n",
            b"\n",
            b"\xc3",
            b"\xa9",
            b"<end>",
        )
    ]
    ids, _ = reader().read(choice("<think>\n4\n</think>\n\né", *written)) or (None, None)
    assert ids is not None
    assert ids.tolist() == [1, 2, 3, 2, 5, 2, 2, 7, 8, 6]
    # The prompt may have opened the reasoning already.
    assert reader().read(choice("<think>\n4\n</think>\n\né", *written[2:])) is not None


def test_an_end_that_is_not_spelled_is_the_stop_token() -> None:
    read = reader()
    ids, top = read.read(
        choice("4", token(b"4", **{"": 0.25}), token(b"", **{"": 0.5, "4": 0.25}))
    ) or (None, None)
    assert ids is not None
    assert top is not None
    assert ids.tolist() == [3, 6]
    # Elsewhere it may be any special token.
    assert top.ids.tolist() == [[3, NO_TOKEN], [6, 3]]
    assert read.num_out_of_vocabulary == 1
    cut = choice("4", token(b"4"), token(b""))
    assert read.read(dataclasses.replace(cut, finish_reason="length")) is None


def test_likely_tokens_out_of_the_vocabulary_are_counted() -> None:
    read = reader()
    found = read.read(choice("4", token(b"4", 0.5, cat=0.2, **{"\ufffd": 0.1, " is": 0.05})))
    assert found is not None
    assert found[1].ids.tolist() == [[3, 4]]
    assert read.num_out_of_vocabulary == 2


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (choice("4"), "sends no log-probs"),
        (choice("cat", token(b"cat")), "b'cat' is not in the student's vocabulary"),
        (choice("\ufffd", token("\ufffd".encode())), "is not in the student's vocabulary"),
        (choice("4 is", token(b"4")), "spell another text"),
        (choice("4", token(b""), token(b"4")), "b'' is not in the student's vocabulary"),
    ],
)
def test_what_cannot_be_used_is_left_out_and_said_once(
    answer: Choice, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    read = reader()
    with caplog.at_level(logging.WARNING):
        assert read.read(answer) is None
        assert read.read(answer) is None
    assert len(caplog.records) == 1
    assert reason in caplog.text


@pytest.mark.parametrize(
    "logprob",
    [math.nan, math.inf, -math.inf, 1e-3, 0.5, 1e300, -1e300],
    ids=["nan", "inf", "-inf", "above 0", "1/2", "huge", "tiny"],
)
@pytest.mark.parametrize("which", ["written", "likely", "unknown to the student"])
def test_impossible_log_probs_are_refused(
    logprob: float, which: str, caplog: pytest.LogCaptureFixture
) -> None:
    good = token(b"4", 0.5, **{" is": 0.25})
    bad = {
        "written": ServedToken(b" is", logprob, ((b"4", -1.0),)),
        "likely": ServedToken(b" is", -1.0, ((b"4", logprob),)),
        "unknown to the student": ServedToken(b" is", -1.0, ((b"4", -1.0), (b"cat", logprob))),
    }[which]
    read = reader()
    with caplog.at_level(logging.WARNING):
        assert read.read(choice("4 is", good, bad)) is None
    assert "which is not a finite number of at most 0" in caplog.text
    assert read.read(choice("4", good)) is not None


def test_probabilities_above_one_together_are_refused_and_rounding_is_not(
    caplog: pytest.LogCaptureFixture,
) -> None:
    read = reader()
    assert (
        read.read(choice("4", token(b"4", 0.75, **{"4": 0.75, " is": 0.2504}))) is not None
    )  # the written one counts once
    assert (
        read.read(
            choice(
                "4", ServedToken(b"4", -0.0, ((b" is", -9999.0), (b"\n", -3.4028234663852886e38)))
            )
        )
        is not None
    )
    with caplog.at_level(logging.WARNING):
        assert read.read(choice("4", token(b"4", 0.75, **{" is": 0.5}))) is None
    assert (
        "the most likely tokens beside b'4' have probability 1.25 together, more than 1"
        in caplog.text
    )


@pytest.mark.parametrize(
    "sent", ["NaN", "Infinity", "-Infinity", "1e999", "-1e999", "0.25", '"nan"', "true"]
)
def test_a_reply_with_such_log_probs_is_not_distilled_from(sent: str) -> None:
    body = reply({"content": [{"token": "é4", "bytes": None, "logprob": "SENT"}]}).replace(
        b'"SENT"', sent.encode()
    )
    read = TokenReader({"é4".encode(): 1}, [6], num_top=1)
    with contextlib.suppress(
        Fault
    ):  # whether the reply is refused as a whole or its log-probs alone
        assert read.read(parse_reply(body, 1).choices[0]) is None
    assert read.read(parse_reply(body.replace(sent.encode(), b"-0.5"), 1).choices[0]) is not None


def reply(content: Any) -> bytes:
    return json.dumps(
        {
            "choices": [
                {
                    "index": 0,
                    "message": {"content": "é4"},
                    "logprobs": content,
                    "finish_reason": "stop",
                }
            ]
        }
    ).encode()


def test_log_probs_of_a_reply() -> None:
    listed = [
        {
            "token": "\\xc3",
            "bytes": [195],
            "logprob": -0.5,
            "top_logprobs": [{"token": "4", "bytes": None, "logprob": -1.5}],
        },
        {"token": "\\xa9", "bytes": [169], "logprob": -0.25},
        {"token": "4", "bytes": None, "logprob": 0, "top_logprobs": []},
    ]
    (read,) = parse_reply(reply({"content": listed}), 1).choices
    assert read.tokens == (
        ServedToken(b"\xc3", -0.5, ((b"4", -1.5),)),
        ServedToken(b"\xa9", -0.25, ()),
        ServedToken(b"4", 0.0, ()),
    )
    for nothing in (None, {}, {"content": None}, {"content": []}):
        assert parse_reply(reply(nothing), 1).choices[0].tokens == ()


def listed(**changes: Any) -> Any:
    return {
        "content": [{"token": "4", "bytes": [52], "logprob": -0.5, "top_logprobs": [], **changes}]
    }


@pytest.mark.parametrize(
    "content",
    [[5], "4", 7, {"content": {"4": -0.5}}, {"content": [{"token": "4"}]}, {"content": [None]},
    listed(bytes=[300]), listed(bytes=[-1]),
     listed(bytes=[True]), listed(bytes=[52.0]), listed(bytes="4"), listed(bytes=None, token=4),
     listed(bytes=[52] * 10_000),
     listed(logprob="-0.5"), listed(logprob=True), listed(logprob=None), listed(logprob=10**400),
     listed(top_logprobs={"4": -0.5}),
     listed(top_logprobs=[7])],
)  # fmt: skip
def test_log_probs_of_another_form_are_none_and_take_no_answer_away(content: Any) -> None:
    (read,) = parse_reply(reply(content), 1, num_top=2).choices
    assert read.text
    assert read.tokens == ()
    assert (
        parse_reply(reply(content), 1, num_top=0).choices[0].tokens == ()
    )  # nobody asked for them


def test_more_likely_tokens_than_asked_for_are_not_kept() -> None:
    many = listed(top_logprobs=[{"token": str(i), "logprob": -1.0} for i in range(1000)])
    ((token,),) = (choice.tokens for choice in parse_reply(reply(many), 1, num_top=2).choices)
    assert len(token.top) == 3


def test_log_probs_are_asked_for_where_they_are_wanted() -> None:
    ask = ChatRequest("hi", num_choices=1, temperature=1.0, max_tokens=9, seed=0, top_logprobs=20)
    body = json.loads(ask.body("m", [{"role": "user", "content": "hi"}], 1, 0))
    assert (body["logprobs"], body["top_logprobs"]) == (True, 20)
