"""A judge behind a server that thinks, fences, is cut, answers nothing or prose, or refuses fields;
and the end of a run whose judge gives no verdicts.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from data.question import Question
from tests.support.raw_server import RawServer, Say, http, say, serve_raw
from zppo_mm.config.schema import RewardConfig, TeacherConfig
from zppo_mm.errors import ConfigError, GradingError
from zppo_mm.parallel.exchange import SingleProcess
from zppo_mm.rewards.failures import MIN_GRADED, FailureCheck, GradedCount, WatchedJudge
from zppo_mm.rewards.judge import LlmJudge, load_judge_template
from zppo_mm.rewards.verify import JudgedResponse, Verifier
from zppo_mm.teacher.served.connect import open_pool
from zppo_mm.teacher.served.judge import greedy_replies
from zppo_mm.teacher.served.pool import EndpointPool

CAT = Question("q", "What is it?", (), "a cat", "open")
RIGHT = '{"verdict": "correct"}'
REFUSED = say(http(b'{"error": "unknown field"}', status="400 Bad Request"))
FAILED = say(http(b"{}", status="500 Internal Server Error"))


def choice(content: str | None, finish_reason: str = "stop", **message: Any) -> Say:
    made = {"message": {"content": content, **message}, "finish_reason": finish_reason}
    return say(http(json.dumps({"choices": [{"index": 0, **made}]}).encode()))


def judge_at(server: RawServer, **variables: Any) -> tuple[LlmJudge, EndpointPool]:
    settings = TeacherConfig(backoff_seconds=0.0, num_retries=3)
    pool = EndpointPool([server.url], "tiny", settings)
    complete = greedy_replies(pool, RewardConfig(), 0, chat_template_kwargs=variables)
    return LlmJudge(complete, load_judge_template(), 1000), pool


def ask(judge: LlmJudge, *texts: str) -> list[bool | None]:
    return judge.judge([JudgedResponse(CAT, text, is_final_answer=True) for text in texts])


def bodies(server: RawServer) -> list[dict[str, Any]]:
    return [json.loads(body) for _, body in server.requests]


@pytest.mark.parametrize(
    ("says", "malformed"),
    [
        (choice(RIGHT), False),
        (choice(f"```json\n{RIGHT}\n```"), False),
        (choice(f"<think>\nA cat is a cat.\n</think>\n\n{RIGHT}"), False),
        (choice(f"A cat is a cat.\n</think>\n\n{RIGHT}"), False),  # the prompt opened the thought
        (choice(f"<think></think>```\n{RIGHT}\n```"), False),
        (choice(RIGHT, reasoning_content="Is it wrong? No."), False),
        (choice(RIGHT, reasoning="Is it wrong? No."), False),
        (choice(RIGHT, reasoning_content=["Is it wrong?", "No."]), False),
        (choice(RIGHT, "length"), False),  # complete all the same
        (choice('{"verdict": "corr', "length"), True),
        (choice(f"<think>\nI would say {RIGHT}", "length"), True),
        (choice(None, "length", reasoning_content=f"I would say {RIGHT}"), True),
        (choice(f"{RIGHT}<think>but", "length"), False),
        (choice(""), True),
        (choice(None), True),
        (choice(None, "length"), True),
        (choice(None, reasoning_content=RIGHT), True),
        (choice(None, "tool_calls", tool_calls=[]), True),
        (choice("The answer is correct."), True),
        (choice(f"Verdict: {RIGHT}"), True),
        (choice(f"{RIGHT} because both are cats"), True),
    ],
)
def test_a_reply_is_a_verdict_or_malformed_and_wrong(says: Say, malformed: bool) -> None:
    with serve_raw(lambda number: says) as server:
        judge, pool = judge_at(server)
        assert ask(judge, "the cat") == [not malformed]
        pool.close()
    assert len(server.requests) == 1  # another greedy reply would be the same
    assert (judge.counts["judged"], judge.counts["judge_malformed"]) == (1, int(malformed))
    assert judge.counts["judge_failures"] == 0


@pytest.mark.parametrize(
    "says", [FAILED, choice(RIGHT, "content_filter"), choice(RIGHT, "abort"), REFUSED]
)
def test_a_server_that_does_not_reply_gives_no_verdict(says: Say) -> None:
    with serve_raw(lambda number: says) as server:
        judge, pool = judge_at(server)
        assert ask(judge, "the cat") == [None]
        pool.close()
    assert (judge.counts["judged"], judge.counts["judge_failures"]) == (0, 1)


def test_the_judge_is_asked_without_thinking() -> None:
    with serve_raw(lambda number: choice(RIGHT)) as server:
        judge, pool = judge_at(server, style="short", enable_thinking=True)
        ask(judge, "the cat")
        pool.close()
    (body,) = bodies(server)
    assert body["chat_template_kwargs"] == {"style": "short", "enable_thinking": False}
    assert (body["temperature"], body["max_tokens"]) == (0.0, 512)


class ChoosyServer:
    """Refuses requests by their body."""

    def __init__(self, refuses: Callable[[dict[str, Any]], bool]) -> None:
        self.refuses = refuses
        self.server: RawServer

    def __call__(self, number: int) -> Say:
        return REFUSED if self.refuses(bodies(self.server)[number]) else choice(RIGHT)


def test_a_server_without_the_field_is_asked_without_it_from_then_on() -> None:
    plan = ChoosyServer(lambda body: "chat_template_kwargs" in body)
    with serve_raw(plan) as plan.server:
        judge, pool = judge_at(plan.server)
        assert [ask(judge, text) for text in ("one", "two", "three")] == [[True]] * 3
        pool.close()
    sent = ["chat_template_kwargs" in body for body in bodies(plan.server)]
    assert sent == [True, False, False, False]


def test_a_text_that_is_refused_says_nothing_about_the_field() -> None:
    plan = ChoosyServer(lambda body: "too long" in body["messages"][0]["content"])
    with serve_raw(plan) as plan.server:
        judge, pool = judge_at(plan.server)
        assert [ask(judge, text) for text in ("too long", "one")] == [[None], [True]]
        pool.close()
    sent = ["chat_template_kwargs" in body for body in bodies(plan.server)]
    assert sent == [True, False, True]


@pytest.mark.parametrize("status", ["400 Bad Request", "422 Unprocessable Entity"])
def test_a_teachers_server_that_refuses_the_field_is_an_error_that_names_the_key(
    status: str,
) -> None:
    with serve_raw(lambda number: say(http(b"{}", status=status))) as server:
        variables = {"enable_thinking": False}
        settings = TeacherConfig(
            model="tiny", endpoints=[server.url], chat_template_kwargs=variables
        )
        message = r"or remove teacher.chat_template_kwargs if the server does not know that field"
        with pytest.raises(ConfigError, match=message):
            open_pool(settings, SingleProcess())
    assert bodies(server)[0]["chat_template_kwargs"] == variables


def judged(judge: LlmJudge, num_right: int, num_malformed: int) -> None:
    judge.counts.update({"judged": num_right + num_malformed, "judge_malformed": num_malformed})


def check_of(judge: LlmJudge | None, gather: Any = None) -> FailureCheck:
    watched = WatchedJudge(judge, "the judge at http://x/v1") if judge is not None else None
    return FailureCheck(watched, 0.25, gather or SingleProcess().gather)


def some_judge() -> LlmJudge:
    return LlmJudge(lambda prompts: ["Looks right."] * len(prompts), load_judge_template(), 100)


def test_too_many_malformed_replies_end_the_run() -> None:
    judge = some_judge()
    check = check_of(judge)
    judged(judge, MIN_GRADED - 10, 9)
    check()  # one judgement too few to say anything
    ask(judge, "the cat")
    message = (
        r"reward.judge: the judge at http://x/v1 does not give verdicts, got 10 malformed replies "
        r"of 20 \(50%\), such as 'Looks right.', expected .* in all but 25%; .*max_malformed_fract"
    )
    with pytest.raises(GradingError, match=message):
        check()


def test_the_limit_is_on_the_judgements_since_the_last_check() -> None:
    judge = some_judge()
    check = check_of(judge)
    judged(judge, 1500, 500)  # at the limit
    check()
    judged(judge, 15, 5)
    check()
    judged(judge, 14, 6)  # 506 of 2,040 over all
    with pytest.raises(GradingError, match=r"6 malformed replies of 20"):
        check()


def test_every_rank_ends_by_what_all_have_judged() -> None:
    judges = [some_judge(), some_judge()]
    judged(judges[0], 20, 0)
    judged(judges[1], 0, 8)
    judges[1]._malformed.append("prose")
    sent: list[GradedCount] = []

    def collect(local: Sequence[GradedCount]) -> list[list[GradedCount]]:
        sent.extend(local)
        return [[]]

    for judge in judges:
        check_of(judge, collect)()
    for judge in judges:
        with pytest.raises(
            GradingError, match=r"8 malformed replies of 28 \(29%\), such as 'prose'"
        ):
            check_of(judge, lambda local: [[count] for count in sent])()


def test_without_a_judge_nothing_is_exchanged() -> None:
    def gather(local: Sequence[GradedCount]) -> list[list[GradedCount]]:
        raise AssertionError("nobody else would come")

    check_of(None, gather)()


def test_a_run_that_would_grade_everything_wrong_ends() -> None:
    with serve_raw(lambda number: choice("Yes, they agree.")) as server:
        judge, pool = judge_at(server)
        check = check_of(judge)
        with Verifier(judge=judge) as verifier:
            items = [(CAT, f"\\boxed{{cat {number}}}") for number in range(MIN_GRADED)]
            verdicts = verifier.verify_all(items)
        pool.close()
    assert [verdict.reason for verdict in verdicts] == ["mismatch"] * MIN_GRADED
    with pytest.raises(
        GradingError, match=r"20 malformed replies of 20 \(100%\), such as 'Yes, they"
    ):
        check()
