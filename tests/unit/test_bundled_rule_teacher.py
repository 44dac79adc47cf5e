"""The teacher made of rules: its probabilities are those of what it writes, over HTTP too, in the
student's tokens.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from http.client import HTTPConnection
from typing import Any
from urllib.parse import urlsplit

import pytest

from data.toy.additions import messages, worked_solutions
from tests.support.serving import serving
from zppo_mm.bundled import STUDENT_DIR
from zppo_mm.bundled.rule_teacher import (
    NAME,
    NO_ADDITION,
    RuleTeacher,
    RuleTeacherServer,
    next_tokens,
)
from zppo_mm.errors import ConfigError
from zppo_mm.rewards.boxes import final_answer
from zppo_mm.rollout.tokenizer import load_tokenizer, token_bytes
from zppo_mm.teacher.served.chat_reply import parse_reply
from zppo_mm.teacher.served.tokens import TokenReader

ERROR_RATE = 0.3
MESSAGES = messages(47, 25)
QUESTION = MESSAGES[-1]["content"]
# Products of some 60 numbers in float64.
RELATIVE_ERROR = 1e-9


@pytest.fixture(scope="module")
def teacher() -> RuleTeacher:
    return RuleTeacher(STUDENT_DIR, ERROR_RATE)


@pytest.fixture(scope="module")
def server(teacher: RuleTeacher) -> Iterator[RuleTeacherServer]:
    with serving(RuleTeacherServer(teacher, port=0)) as served:
        yield served


def request(**changes: Any) -> dict[str, Any]:
    return {
        "model": NAME,
        "messages": MESSAGES,
        "temperature": 1.0,
        "max_tokens": 200,
        "seed": 5,
        **changes,
    }


def post(
    server: RuleTeacherServer, body: bytes, path: str = "/v1/chat/completions"
) -> tuple[int, bytes]:
    connection = HTTPConnection(urlsplit(server.url).netloc, timeout=30)
    connection.request("POST", path, body)
    reply = connection.getresponse()
    content = reply.status, reply.read()
    connection.close()
    return content


def test_next_tokens_multiply_to_the_probability_of_a_text(teacher: RuleTeacher) -> None:
    texts = teacher.texts(QUESTION)
    assert len(texts) == len(worked_solutions(47, 25, ERROR_RATE)) == 6
    for tokens, probability in texts.items():
        steps = [next_tokens(texts, tokens[:end])[token] for end, token in enumerate(tokens)]
        assert math.prod(steps) == pytest.approx(probability, rel=RELATIVE_ERROR)
        # A text that could also be a beginning of another would have to be ended by a draw.
        assert next_tokens(texts, tokens[:-1]) == {tokens[-1]: 1.0}


def test_answers_are_wrong_as_often_as_said(teacher: RuleTeacher) -> None:
    reply = teacher.answer(request(n=600))
    answers = [final_answer(choice["message"]["content"]) for choice in reply["choices"]]
    assert set(answers) == {"72", "73", "71"}
    wrong = sum(answer != "72" for answer in answers)
    # 600 draws: 180 expected, with a standard deviation of sqrt(600 * 0.3 * 0.7) = 11.2.
    assert abs(wrong - 180) < 4 * 11.2


def test_seeds_decide_and_temperature_0_takes_the_most_likely(teacher: RuleTeacher) -> None:
    def texts(**changes: Any) -> list[str]:
        choices = teacher.answer(request(n=20, **changes))["choices"]
        return [choice["message"]["content"] for choice in choices]

    assert texts() == texts() != texts(seed=6)
    [greedy] = set(texts(temperature=0.0))
    assert final_answer(greedy) == "72"
    # Wrong and right ones differ by 0.7 to 0.15 and 0.15: at a low temperature none is left.
    assert {final_answer(text) for text in texts(temperature=0.05)} == {"72"}


def test_a_client_reads_the_probabilities_in_the_students_tokens(server: RuleTeacherServer) -> None:
    body = json.dumps(request(n=8, logprobs=True, top_logprobs=20)).encode()
    status, content = post(server, body)
    assert status == 200
    reply = parse_reply(content, num_choices=8, num_top=20)
    tokenizer = load_tokenizer(STUDENT_DIR)
    stop = tokenizer.eos_token_id
    reader = TokenReader(token_bytes(STUDENT_DIR, tokenizer), (stop,), num_top=20)
    solutions = worked_solutions(47, 25, ERROR_RATE)
    assert len({choice.text for choice in reply.choices}) > 1
    for choice in reply.choices:
        read = reader.read(choice)
        assert read is not None
        ids, top = read
        assert [*ids] == [*tokenizer.encode(choice.text, add_special_tokens=False), stop]
        # The written token comes first.
        assert top.ids[:, 0].tolist() == ids.tolist()
        written = math.exp(top.logprobs[:, 0].sum())
        assert written == pytest.approx(solutions[choice.text], rel=1e-5)  # float32
        mass = [sum(map(math.exp, row)) for row in top.logprobs]
        assert mass == pytest.approx([1.0] * len(ids), rel=1e-5)
    assert reader.num_out_of_vocabulary == 0
    assert reply.completion_tokens == sum(len(choice.tokens) for choice in reply.choices)


def test_what_is_not_an_addition_and_what_is_too_long(server: RuleTeacherServer) -> None:
    for changes, text, reason in (
        ({"messages": [{"role": "user", "content": "Hello"}]}, NO_ADDITION, "stop"),
        ({"max_tokens": 1}, None, "length"),
    ):
        _, content = post(server, json.dumps(request(**changes)).encode())
        [choice] = parse_reply(content, num_choices=1).choices
        assert choice.finish_reason == reason
        assert text is None or choice.text == text


@pytest.mark.parametrize(
    ("body", "path", "status", "message"),
    [
        (b"{}", "/v1/models", 404, "nothing at /v1/models"),
        (b"nothing", "/v1/chat/completions", 400, "JSONDecodeError"),
        (b"[]", "/v1/chat/completions", 400, "TypeError"),
        (json.dumps(request(model="other")).encode(), "/v1/chat/completions", 404, "'other'"),
        (json.dumps(request(max_tokens=0)).encode(), "/v1/chat/completions", 400, "out of range"),
    ],
)
def test_bad_requests_are_refused(
    server: RuleTeacherServer, body: bytes, path: str, status: int, message: str
) -> None:
    found, content = post(server, body, path)
    assert found == status
    assert message in json.loads(content)["error"]


def test_an_error_rate_is_a_probability() -> None:
    with pytest.raises(ConfigError, match=r"error rate: .*got 1\.5, expected 0 to 1"):
        RuleTeacher(STUDENT_DIR, 1.5)
