"""Replies of a server: whatever comes is a fault with a name, or answers that are valid text and
keep no key.
"""

from __future__ import annotations

import gzip
import json
import math
import zlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
from hypothesis import event, example, given, settings
from hypothesis import strategies as st

from data.text import is_valid_text
from tests.support.raw_server import RawServer, completion, http, say, serve_raw
from zppo_mm.config.schema import TeacherConfig
from zppo_mm.rewards.judge import read_verdict
from zppo_mm.serving.endpoint import MAX_PAUSE_SECONDS, retry_after
from zppo_mm.serving.fault import Fault
from zppo_mm.serving.received_text import MAX_SHOWN_CHARS, ReceivedText
from zppo_mm.serving.servers import RetryPolicy
from zppo_mm.teacher.served.chat_api import ChatRequest, Choice, Reply
from zppo_mm.teacher.served.chat_reply import MAX_SPELLING_BYTES, parse_reply
from zppo_mm.teacher.served.pool import EndpointPool
from zppo_mm.teacher.served.servers import Outcome

KEY = "sk-0/9<fuzz-key>"
KINDS = {"bad_reply", "empty_choice", "unfinished", "content_filter"}
NUM_TOP = 2

TEXT = st.text(st.characters(exclude_categories=()), max_size=20) | st.sampled_from(
    [
        "",
        KEY,
        f"so {KEY}!",
        "\ud83d",
        "\ude00\ud83d",
        "a\0b",
        "</think>",
        "<think>",
        "\\boxed{4}",
        "\x1b[2J\r\nforged",
    ]
)
NUMBER = st.integers() | st.floats() | st.sampled_from([1e999, -1e999, 10**400, -1, 2**63, True])
SCALAR = st.none() | st.booleans() | NUMBER | TEXT
ANY = st.recursive(
    SCALAR,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)


LISTED = {
    "token": TEXT,
    "bytes": st.none() | st.lists(st.integers(0, 255), max_size=6),
    "logprob": st.floats(-20, 0),
}
TOKEN = st.fixed_dictionaries(
    {**LISTED, "top_logprobs": st.lists(st.fixed_dictionaries(LISTED), max_size=4)}
)
CONTENT = (
    TEXT
    | st.none()
    | st.lists(st.fixed_dictionaries({"type": st.just("text"), "text": TEXT}), max_size=3)
)
MESSAGE = st.fixed_dictionaries(
    {"content": CONTENT}, optional={"reasoning_content": TEXT, "reasoning": TEXT, "tool_calls": ANY}
)
STATE = st.just("stop") | st.sampled_from(
    ["length", "max_tokens", "eos_token", "abort", "content_filter", "", None]
)
CHOICE = st.fixed_dictionaries(
    {"message": MESSAGE, "finish_reason": STATE},
    optional={
        "index": st.integers(0, 4),
        "logprobs": st.fixed_dictionaries({"content": st.lists(TOKEN, max_size=3)}),
    },
)
USAGE = st.fixed_dictionaries({"prompt_tokens": NUMBER, "completion_tokens": st.integers(0, 99)})
GOOD = st.fixed_dictionaries(
    {"choices": st.lists(CHOICE, min_size=1, max_size=5)}, optional={"usage": USAGE, "error": ANY}
)


@st.composite
def completions(draw: st.DrawFn) -> Any:
    """Chat completions in which some members are of another kind, or missing."""
    reply = draw(GOOD)
    for _ in range(draw(st.sampled_from([0, 0, 1, 2]))):
        holder: Any = reply
        while True:
            keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            if isinstance(holder[key], dict | list) and draw(st.booleans()):
                holder = holder[key]
                continue
            if draw(st.booleans()):
                holder[key] = draw(ANY)
            else:
                del holder[key]
            break
    return reply


COMPLETION = completions()


def read(body: bytes, num_choices: int, received: ReceivedText) -> Reply | Fault:
    """Read a reply; only faults may be raised."""
    try:
        return parse_reply(body, num_choices, NUM_TOP, received)
    except Fault as fault:
        return fault


def check(body: bytes, num_choices: int) -> None:
    """Read a reply and hold it against what is promised."""
    received = ReceivedText(KEY)
    reply = read(body, num_choices, received)
    event(reply.kind if isinstance(reply, Fault) else f"{len(reply.choices)} answers")
    if isinstance(reply, Fault):
        assert reply.kind in KINDS
        assert reply.is_refusal == (reply.kind == "content_filter")
        assert_shown(received.shown(str(reply)))
        return
    assert 1 <= len(reply.choices) <= num_choices
    assert len(reply.choices) + reply.dropped.total() == reply.num_returned
    assert all(
        type(count) is int and 0 <= count < 2**53
        for count in (reply.prompt_tokens, reply.completion_tokens)
    )
    for choice in reply.choices:
        assert_answer(choice)


def assert_answer(choice: Choice) -> None:
    for text in (choice.text, choice.content):
        assert is_valid_text(text)
        assert KEY not in text
    assert choice.text
    assert choice.text.endswith(choice.content)
    assert choice.finish_reason in ("stop", "length")
    for token in choice.tokens:
        assert len(token.top) <= NUM_TOP + 1
        for spelling, logprob in ((token.spelling, token.logprob), *token.top):
            assert KEY.encode() not in spelling
            assert len(spelling) <= MAX_SPELLING_BYTES
            assert type(logprob) is float
    assert read_verdict(choice.content) in (True, False, None)


def assert_shown(text: str) -> None:
    assert text.isprintable()
    assert len(text) <= MAX_SHOWN_CHARS
    assert KEY.lower() not in text.lower()


@given(COMPLETION | ANY, st.integers(1, 4))
@example(
    {
        "choices": [{"message": {"content": "4"}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 1e999},
    },
    1,
)
@example(
    {"choices": [{"message": {"content": "\ud83d"}, "finish_reason": "stop", "index": [1]}]}, 1
)
def test_any_json_is_answers_or_a_fault(reply: Any, num_choices: int) -> None:
    check(json.dumps(reply).encode(), num_choices)
    check(json.dumps(reply, ensure_ascii=False).encode("utf-8", "surrogatepass"), num_choices)


@given(st.data())
def test_a_good_reply_that_was_damaged_is_answers_or_a_fault(data: st.DataObject) -> None:
    body = bytearray(completion("\\boxed{4}", f"é {KEY}"))
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(body)))
        end = start + data.draw(st.integers(0, 8))
        body[start:end] = data.draw(
            st.binary(max_size=4)
            | st.sampled_from([b"[" * 3000, b"null", b"1e999", b'\\ud83d"', b"\xff", b"{}"])
        )
    check(bytes(body), 2)


@given(st.binary(max_size=200))
@example(b"[" * 100_000)
@example(b'{"choices":' * 50_000)
def test_any_bytes_are_answers_or_a_fault(body: bytes) -> None:
    check(body, 2)


@given(
    st.text(max_size=40)
    | st.floats().map(str)
    | st.from_regex(r"\w{3}, \d{1,9} \w{3} \d{1,9} [\d:]{0,12} (GMT|[+-]\d{1,6})", fullmatch=True)
)
def test_any_pause_is_short_or_none(value: str) -> None:
    seconds = retry_after(value)
    assert seconds is None or (math.isfinite(seconds) and 0.0 <= seconds <= MAX_PAUSE_SECONDS)


@given(
    st.text(st.characters(exclude_categories=()), max_size=50),
    st.integers(0, 70_000),
    st.binary(max_size=50),
)
def test_what_is_shown_is_one_line_without_the_key(around: str, spaces: int, raw: bytes) -> None:
    received = ReceivedText(KEY)
    assert_shown(received.shown(around + " " * spaces + KEY + around))
    assert_shown(received.shown(raw + b" " * spaces + KEY.encode() + raw))


class Wire:
    """A server on a real socket and the way to it: one request, answered by the bytes given."""

    def __init__(self, server: RawServer, pool: EndpointPool) -> None:
        self.server = server
        self._pool = pool

    def exchange(self, sent: bytes) -> Outcome:
        self.server.plan = lambda _: say(sent)
        ask = ChatRequest("What is 3 + 1?", 2, 1.0, 16, 0, top_logprobs=NUM_TOP)
        (outcome,) = self._pool.submit([ask], RetryPolicy(max_seconds=60.0, num_retries=0)).result(
            timeout=100
        )
        return outcome


@pytest.fixture(scope="module")
def wire() -> Iterator[Wire]:
    config = TeacherConfig(backoff_seconds=0.0)
    with serve_raw(lambda _: say(b"")) as server:
        pool = EndpointPool([server.url], "tiny", config, KEY)
        yield Wire(server, pool)
        pool.close()


NAMES = [
    "Content-Type",
    "Content-Encoding",
    "Transfer-Encoding",
    "Connection",
    "Location",
    "Set-Cookie",
    "Retry-After",
    "X-Any",
]
VALUES = st.text(max_size=30) | st.sampled_from(
    ["gzip", "deflate", "br", "zstd", "identity", "gzip, gzip", "chunked", "close", "keep-alive",
    "upgrade", "99999999", "nan", "//[", KEY,
     "application/json; charset=zlib", "text/html; charset=utf-16"]
)  # fmt: skip
HEADERS = st.lists(st.tuples(st.sampled_from(NAMES), VALUES).map(": ".join), max_size=2)
# The time in a gzip header changes how long its own compression is.
_gzip = partial(gzip.compress, mtime=0)
PACKED = st.just(bytes) | st.sampled_from([_gzip, zlib.compress, lambda body: _gzip(_gzip(body))])
BODIES = (
    COMPLETION.map(lambda reply: json.dumps(reply).encode())
    | st.binary(max_size=60)
    | st.just(completion("3", f"It is {KEY}"))
)


@st.composite
def responses(draw: st.DrawFn) -> bytes:
    """Responses as they travel, some of them damaged."""
    # No interim replies: what follows them is silence, which costs the time for a request.
    code = draw(
        st.just(200)
        | st.just(200)
        | st.sampled_from([204, 302, 400, 429, 503])
        | st.integers(200, 999)
    )
    status = f"{code} {draw(st.sampled_from(['OK', KEY, '']))}"
    body = draw(PACKED)(draw(BODIES))
    sent = bytearray(http(body, *draw(HEADERS), status=status, length=draw(st.booleans())))
    for _ in range(draw(st.sampled_from([0, 0, 1, 2]))):
        start = draw(st.integers(0, len(sent)))
        sent[start : start + draw(st.integers(0, 3))] = draw(st.binary(max_size=3))
    return bytes(sent)


@settings(deadline=None)
@given(responses())
def test_any_response_on_the_wire_is_answers_or_a_fault(wire: Wire, sent: bytes) -> None:
    outcome = wire.exchange(sent)
    event(outcome.problem.partition(":")[0] or "2 answers")
    assert_shown(outcome.problem)
    assert bool(outcome.problem) == (len(outcome.choices) < 2)
    for choice in outcome.answers():
        assert_answer(choice)


def test_the_way_there_still_works_after_all_that(wire: Wire) -> None:
    outcome = wire.exchange(http(completion("3", "4")))
    # Once a server has returned one answer for two, each is asked for alone.
    assert [choice.text for choice in outcome.answers()] in (["3", "4"], ["3", "3"])
