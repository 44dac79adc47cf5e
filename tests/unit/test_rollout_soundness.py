"""When broken prompts are left out and when they end the run; what no engine and no grader may
return.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest

from data.media.opening import Frames
from data.question import MediaRef, Question
from tests.support.tiny_folder import build_folder
from zppo_mm.errors import NotFiniteError
from zppo_mm.experience import PromptInstance
from zppo_mm.parallel.exchange import SingleProcess
from zppo_mm.rewards.verdict import Verdict
from zppo_mm.rollout.engine import Generation, GenerationRequest, SamplingParams
from zppo_mm.rollout.prompt import PromptEncoder
from zppo_mm.rollout.sampler import GroupSampler
from zppo_mm.rollout.soundness import Sampled, Soundness

SAMPLING = SamplingParams(temperature=1.0, max_new_tokens=8, stop_token_ids=(0,))


def good(count: int, first: int = 0) -> list[Sampled]:
    return [Sampled(f"q{number}", "") for number in range(first, first + count)]


def broken(*names: str) -> list[Sampled]:
    return [Sampled(name, f"token 3 of {name}") for name in names]


def test_single_broken_prompts_never_end_a_run() -> None:
    soundness = Soundness()
    for call in range(50):
        soundness.note(broken("poisoned"))  # alone in its call, again and again
        soundness.note([*good(7, 10 * call), *broken("poisoned")])
        soundness.note([])
        soundness.note(broken("poisoned", "poisoned"))
    sparse = Soundness()
    for call in range(50):  # one of 16, each time another one
        sparse.note([*good(15), *broken(f"bad{call}")])


def test_a_call_of_which_all_is_broken_ends_the_run() -> None:
    soundness = Soundness()
    soundness.note(good(384))
    with pytest.raises(
        NotFiniteError,
        match=(
            r"the network is broken, got logits that are not finite for 2 of the last 2 prompts "
            r"\(question"
        ),
    ):
        soundness.note(broken("a", "b"))
    with pytest.raises(
        NotFiniteError,
        match=(
            r"question 'a': token 3 of a; question 'b': token 3 of b; question 'c': .*; and 61 "
            r"more\)"
        ),
    ):
        Soundness().note(broken(*(chr(ord("a") + n) for n in range(64))))


def test_calls_of_single_prompts_count_together_until_one_is_sound() -> None:
    soundness = Soundness()
    soundness.note(broken("a"))
    soundness.note(good(1))
    soundness.note(broken("b"))
    soundness.note([])  # says nothing
    with pytest.raises(NotFiniteError, match="for 2 of the last 2 prompts"):
        soundness.note(broken("c"))


@pytest.mark.parametrize("size", [10, 20, 50])
def test_a_fraction_beyond_the_limit_ends_the_run(size: int) -> None:
    """A modality of which everything is broken, three in ten prompts."""
    soundness = Soundness()
    soundness.note(good(100))
    num_broken = 3 * size // 10
    calls = [
        [*good(size - num_broken), *broken(*(f"{call}/{n}" for n in range(num_broken)))]
        for call in range(10)
    ]
    with pytest.raises(NotFiniteError, match=r"for (1[1-9]|2\d|30) of the last 100 prompts"):
        any(map(soundness.note, calls))


class Rewarding:
    """Gives one reward to everything."""

    def __init__(self, reward: float | None) -> None:
        self._reward = reward

    def verify_all(self, items: Sequence[tuple[Question, str]]) -> list[Verdict]:
        return [Verdict(None, self._reward, "match") for _ in items]


class Reporting:
    """An engine that returns one log-prob with the second token of the second rollout of every
    second prompt.
    """

    def __init__(self, logprob: float) -> None:
        self._logprob = logprob

    def generate(
        self, requests: Sequence[GenerationRequest], sampling: SamplingParams
    ) -> list[list[Generation]]:
        results = []
        for row, item in enumerate(requests):
            returned = [np.full(3, -0.5, np.float32) for _ in range(item.num_rollouts)]
            if row % 2:
                returned[1][1] = self._logprob
            results.append(
                [Generation(np.array([65, 66, 0]), logprobs, "stop") for logprobs in returned]
            )
        return results


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> PromptEncoder:
    def no_media(reference: MediaRef) -> Frames:
        raise AssertionError(reference)

    folder = tmp_path_factory.mktemp("model")
    build_folder(folder)
    return PromptEncoder(folder, no_media)


def instances(count: int) -> list[PromptInstance]:
    questions = [
        Question(id=f"q{n}", text="", media=(), answer="b", answer_type="open")
        for n in range(count)
    ]
    return [
        PromptInstance(f"1/new/{n}", question, "new", "what?")
        for n, question in enumerate(questions)
    ]


@pytest.mark.parametrize(
    ("logprob", "is_sound"),
    [(math.nan, False), (math.inf, False), (-math.inf, False), (0.5, False), (0.0, True)],
)
def test_log_probs_that_no_sound_network_gives_leave_the_group_out(
    encoder: PromptEncoder, logprob: float, is_sound: bool, caplog: pytest.LogCaptureFixture
) -> None:
    sampler = GroupSampler(Reporting(logprob), encoder, Rewarding(1.0), SingleProcess())
    groups = sampler.sample(instances(3), SAMPLING, 2, 1)
    assert [group.uid for group in groups] == (
        ["1/new/0", "1/new/1", "1/new/2"] if is_sound else ["1/new/0", "1/new/2"]
    )
    assert dict(sampler.failures) == ({} if is_sound else {"not_finite": 1})
    where = "left out 1/new/1: not_finite: rollout 1, token 1 of the response, drawn on rank 0"
    assert (where in caplog.text) is not is_sound


@pytest.mark.parametrize("reward", [math.nan, math.inf])
def test_a_reward_that_is_not_finite_is_refused_by_name_and_not_taken_for_ungraded(
    encoder: PromptEncoder, reward: float
) -> None:
    sampler = GroupSampler(Reporting(0.0), encoder, Rewarding(reward), SingleProcess())
    with pytest.raises(
        NotFiniteError,
        match=r"the grader gives 1/new/0 rewards that are not finite, got \[(nan|inf), ",
    ):
        sampler.sample(instances(2), SAMPLING, 2, 1)
    ungraded = GroupSampler(Reporting(0.0), encoder, Rewarding(None), SingleProcess())
    assert ungraded.sample(instances(2), SAMPLING, 2, 1) == []
    assert dict(ungraded.failures) == {"ungraded": 2}
