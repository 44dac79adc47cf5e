"""The judge's model behind servers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import wait
from typing import Any

from zppo_mm.config.schema import RewardConfig
from zppo_mm.reasoning import without_reasoning
from zppo_mm.rollout.chat_template import THINKING_SWITCH
from zppo_mm.serving.servers import RetryPolicy
from zppo_mm.teacher.served.chat_api import ChatRequest
from zppo_mm.teacher.served.servers import Outcome, Servers

STOP_LOOK_SECONDS = 0.5
WITHOUT_THINKING = {THINKING_SWITCH: False}


def greedy_replies(
    pool: Servers,
    config: RewardConfig,
    num_retries: int,
    should_stop: Callable[[], bool] = bool,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> Callable[[Sequence[str]], list[str | None]]:
    """Return a function from prompts to one greedy reply each, `None` where no server answers in
    time; callable from one rank alone.

    The model is asked not to reason. If it does all the same, what it wrote after its reasoning is
    the reply, which is empty if it came to no end. So is that of a model without an answer.

    Args:
        pool: The servers.
        config: Longest reply and wait.
        num_retries: Further attempts at a request.
        should_stop: Whether what is judged will be dropped anyway, so that nothing is to be waited
            for.
        chat_template_kwargs: Further variables of the model's chat template.
    """
    template_kwargs = {**(chat_template_kwargs or {}), **WITHOUT_THINKING}

    def complete(prompts: Sequence[str]) -> list[str | None]:
        requests = [
            ChatRequest(
                prompt,
                num_choices=1,
                temperature=0.0,
                max_tokens=config.judge_max_tokens,
                seed=0,
                chat_template_kwargs=template_kwargs,
                needs_template_kwargs=False,
            )
            for prompt in prompts
        ]
        policy = RetryPolicy(
            max_seconds=config.judge_max_wait_seconds, num_retries=num_retries, is_urgent=True
        )
        future = pool.submit(requests, policy)
        while not wait([future], timeout=STOP_LOOK_SECONDS).done:
            if should_stop():
                return [None] * len(prompts)
        return [_reply(outcome) for outcome in future.result()]

    return complete


def _reply(outcome: Outcome) -> str | None:
    answers = outcome.answers()
    if answers:
        return without_reasoning(answers[0].content)
    return "" if outcome.has_no_answer else None
