"""What an exchange of groups takes on a rank at the paper's batch, 256 replicas of 4 ranks.

    python benchmarks/exchange_memory.py

GiB: the groups of a step themselves, which every rank holds; and the room for them during an
exchange, which is one longest object per participant, over all ranks and over the leaders.
"""

from __future__ import annotations

import pickle

import numpy as np

from zppo_mm.experience import Prompt, Rollout
from zppo_mm.rollout.grading import Outcome
from zppo_mm.text_table import text_table

NUM_GROUPS, NUM_ROLLOUTS = 384 + 96 + 96, 8
"""Of a step: new questions, replayed and reformulated ones; responses to each."""
NUM_REPLICAS, MODEL_SIZE, PROMPT_TOKENS = 256, 4, 1024


def outcome(response_tokens: int) -> Outcome:
    """Return what replicas exchange of one group."""
    draw = np.random.default_rng(0)
    ids = draw.integers(0, 150_000, PROMPT_TOKENS)
    rollouts = [
        Rollout(
            draw.integers(0, 150_000, response_tokens),
            draw.random(response_tokens, dtype=np.float32),
            "stop",
            "four" * response_tokens,
            "1",
            1.0,
            1,
        )
        for _ in range(NUM_ROLLOUTS)
    ]
    positions = np.zeros((3, PROMPT_TOKENS), np.int64)
    return Outcome(0, Prompt("four" * PROMPT_TOKENS, ids, positions, 0), tuple(rollouts))


def count(response_tokens: int) -> list[str]:
    """Return one line of the table."""
    size = len(pickle.dumps([outcome(response_tokens)])) / 2**30
    longest = size * -(-NUM_GROUPS // NUM_REPLICAS)
    rooms = (NUM_GROUPS * size, NUM_REPLICAS * MODEL_SIZE * longest, NUM_REPLICAS * longest)
    return [str(response_tokens), *(f"{each:.2f}" for each in rooms)]


if __name__ == "__main__":
    head = ["response tokens", "groups", "room over all ranks", "over leaders"]
    print(text_table(head, [count(tokens) for tokens in (4096, 12_288)]))
