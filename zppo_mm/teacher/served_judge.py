"""The judge's model behind servers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import wait

from zppo_mm.config import RewardConfig
from zppo_mm.teacher.chat_api import Ask
from zppo_mm.teacher.servers import Patience, Servers

STOP_LOOK_SECONDS = 0.5


def greedy_replies(
    pool: Servers, config: RewardConfig, num_retries: int, should_stop: Callable[[], bool] = bool
) -> Callable[[Sequence[str]], list[str | None]]:
    """Return a function from prompts to one greedy reply each, `None` where no server answers in time; callable from one rank alone.

    Args:
        pool: The servers.
        config: Longest reply and wait.
        num_retries: Further attempts at a request.
        should_stop: Whether what is judged will be dropped anyway, so that nothing is to be waited for.
    """

    def complete(prompts: Sequence[str]) -> list[str | None]:
        asks = [Ask(prompt, 1, 0.0, config.judge_max_tokens, 0) for prompt in prompts]
        future = pool.submit(asks, Patience(max_seconds=config.judge_max_wait_seconds, num_retries=num_retries))
        while not wait([future], timeout=STOP_LOOK_SECONDS).done:
            if should_stop():
                return [None] * len(prompts)
        outcomes = future.result()
        return [next((choice.content for choice in outcome.answers()), None) for outcome in outcomes]

    return complete
