"""The judge's model behind servers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from zppo_mm.config import RewardConfig
from zppo_mm.teacher.chat_api import Ask
from zppo_mm.teacher.servers import Patience, Servers


def greedy_replies(pool: Servers, config: RewardConfig, num_retries: int) -> Callable[[Sequence[str]], list[str | None]]:
    """Return a function from prompts to one greedy reply each, `None` where no server answers in time; callable from one rank alone.

    Args:
        pool: The servers.
        config: Longest reply and wait.
        num_retries: Further attempts at a request.
    """

    def complete(prompts: Sequence[str]) -> list[str | None]:
        asks = [Ask(prompt, 1, 0.0, config.judge_max_tokens, 0) for prompt in prompts]
        outcomes = pool.submit(asks, Patience(max_seconds=config.judge_max_wait_seconds, num_retries=num_retries)).result()
        return [next((choice.content for choice in outcome.answers()), None) for outcome in outcomes]

    return complete
