"""The judge's model behind servers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import wait

from zppo_mm.config.schema import RewardConfig
from zppo_mm.rewards.judge import read_verdict
from zppo_mm.teacher.served.chat_api import ChatRequest, Choice
from zppo_mm.teacher.served.servers import RetryPolicy, Servers

STOP_LOOK_SECONDS = 0.5


def greedy_replies(
    pool: Servers, config: RewardConfig, num_retries: int, should_stop: Callable[[], bool] = bool
) -> Callable[[Sequence[str]], list[str | None]]:
    """Return a function from prompts to one greedy reply each, `None` where no server answers in
    time; callable from one rank alone.

    A reply that was cut where it could still have become a verdict is none.

    Args:
        pool: The servers.
        config: Longest reply and wait.
        num_retries: Further attempts at a request.
        should_stop: Whether what is judged will be dropped anyway, so that nothing is to be waited
            for.
    """

    def complete(prompts: Sequence[str]) -> list[str | None]:
        requests = [ChatRequest(prompt, 1, 0.0, config.judge_max_tokens, 0) for prompt in prompts]
        policy = RetryPolicy(
            max_seconds=config.judge_max_wait_seconds, num_retries=num_retries, is_urgent=True
        )
        future = pool.submit(requests, policy)
        while not wait([future], timeout=STOP_LOOK_SECONDS).done:
            if should_stop():
                return [None] * len(prompts)
        replies = [outcome.answers() for outcome in future.result()]
        return [
            next((text for choice in choices if (text := _verdict_text(choice)) is not None), None)
            for choices in replies
        ]

    return complete


def _verdict_text(choice: Choice) -> str | None:
    """Return a reply without its reasoning; `None` if the limit came before a verdict, in a
    separate reasoning or in the object.
    """
    text = choice.content.rpartition("</think>")[2].strip()
    is_open = not text or text.startswith("{")
    return (
        None
        if choice.finish_reason == "length" and is_open and read_verdict(text) is None
        else text
    )
