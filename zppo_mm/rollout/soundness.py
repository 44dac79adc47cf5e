"""What becomes of prompts that the engine cannot continue, or for which the network computes logits
that are not finite: left out and counted, or the end of the run.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from zppo_mm.errors import NotFiniteError
from zppo_mm.experience import Prompt
from zppo_mm.rollout.engine import Generation, SamplingParams

NOT_FINITE = "not_finite"
NO_ROOM = "no_room"
WINDOW_PROMPTS = 100
MIN_WINDOW_PROMPTS = 20
MAX_BROKEN_FRACTION = 0.1
"""Of the last prompts; more is not the fault of single ones."""
MIN_BROKEN_QUESTIONS = 2
"""A single poisoned medium never ends a run, however few prompts it is sampled with."""
MAX_NAMED = 3


@dataclass(frozen=True, slots=True)
class Sampled:
    """A prompt that was sampled: its question, and where its first broken rollout broke, empty if
    none did.
    """

    question_id: str
    broke_at: str


@dataclass(frozen=True, slots=True)
class Fault:
    """Why a prompt has no continuation that can be used.

    Attributes:
        reason: `NOT_FINITE` or `NO_ROOM`; empty if it has one.
        detail: Where it broke, or what found no room.
    """

    reason: str = ""
    detail: str = ""

    @property
    def broke_at(self) -> str:
        """Where the network broke; empty if it did not."""
        return self.detail if self.reason == NOT_FINITE else ""


def fault_of(
    prompt: Prompt, generations: Sequence[Generation], sampling: SamplingParams, rank: int
) -> Fault:
    """Return what is wrong with what an engine returned for a prompt.

    Args:
        prompt: What was to be continued.
        generations: Its continuations.
        sampling: How they were drawn.
        rank: Where they were drawn.
    """
    if not generations:
        return Fault(
            NO_ROOM,
            "the prompt does not fit the decoding cache or the servers, got "
            f"{len(prompt.token_ids)} tokens, expected room for them and a response of "
            f"{sampling.max_new_tokens}; raise rollout.cache_memory_gib, or the servers' "
            "--max-model-len",
        )
    for number, generation in enumerate(generations):
        index = generation.num_sound_tokens
        if index is not None:
            where = f"rollout {number}, token {index} of the response, drawn on rank {rank}"
            return Fault(NOT_FINITE, where)
    return Fault()


class Soundness:
    """Distinguishes single broken prompts from a broken network. Every rank holds one and gives it
    the same.

    A network is broken if all prompts of a call are, or of calls in a row, or more than
    `MAX_BROKEN_FRACTION` of the last `WINDOW_PROMPTS`, once there are `MIN_WINDOW_PROMPTS`; but
    never because of one question alone.
    """

    def __init__(self) -> None:
        self._window: deque[Sampled] = deque(maxlen=WINDOW_PROMPTS)
        self._in_a_row: list[Sampled] = []

    def note(self, prompts: Sequence[Sampled]) -> None:
        """Take in what one call sampled.

        Raises:
            NotFiniteError: The network is broken.
        """
        if any(not prompt.broke_at for prompt in prompts):
            self._in_a_row = []
        else:
            self._in_a_row += prompts
        self._window += prompts
        broken = [prompt for prompt in self._window if prompt.broke_at]
        if len(self._window) >= MIN_WINDOW_PROMPTS and len(broken) > MAX_BROKEN_FRACTION * len(
            self._window
        ):
            _refuse_several(broken, len(self._window))
        _refuse_several(self._in_a_row, len(self._in_a_row))


def _refuse_several(broken: Sequence[Sampled], num_prompts: int) -> None:
    """End the run if different questions broke."""
    first: dict[str, str] = {}
    for prompt in broken:
        first.setdefault(prompt.question_id, prompt.broke_at)
    if len(first) < MIN_BROKEN_QUESTIONS:
        return
    named = "; ".join(
        f"question {name!r}: {where}" for name, where in list(first.items())[:MAX_NAMED]
    )
    more = f"; and {len(first) - MAX_NAMED} more" if len(first) > MAX_NAMED else ""
    raise NotFiniteError(
        f"sampling: the network is broken, got logits that are not finite for {len(broken)} of the "
        f"last {num_prompts} prompts ({named}{more}), expected finite numbers; start again from an "
        "earlier checkpoint with a lower train.lr, or check the weights of the folder that the "
        "model came from"
    )


def check_rewards(uid: str, rewards: Sequence[float]) -> None:
    """Check the rewards that a group's rollouts got.

    Raises:
        NotFiniteError: One is not finite.
    """
    if not all(map(math.isfinite, rewards)):
        raise NotFiniteError(
            f"sampling: the grader gives {uid} rewards that are not finite, got {rewards}, "
            "expected numbers, or none where a response could not be graded; correct the reward"
        )
