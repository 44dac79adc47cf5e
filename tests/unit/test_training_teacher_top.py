"""The teacher's log-probs on their way from rollouts to micro-batches."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from data.question import Question
from zppo_mm.experience import NO_TOKEN, Group, Prompt, PromptInstance, Rollout, TopLogprobs
from zppo_mm.training.packing import pack
from zppo_mm.training.samples import to_training_samples

CPU = torch.device("cpu")


def make_group(uid: str, num_prompt: int, widths: list[tuple[int, int]]) -> Group:
    """Return a group with a rollout per length and k; a k of 0 is a rollout without log-probs.
    Token i of all has i among its ids.
    """
    rollouts = []
    for number, (length, k) in enumerate(widths):
        ids = 1000 * number + np.arange(length)[:, None] + 100 * np.arange(k)
        top = TopLogprobs(ids, (-ids / 8).astype(np.float32)) if k else None
        response = 1000 * number + np.arange(length)
        rollouts.append(
            Rollout(
                response, np.zeros(length, np.float32), "stop", "", None, 1.0, 0, teacher_top=top
            )
        )
    question = Question(id=uid, text="", media=(), answer="", answer_type="math")
    prompt = Prompt("", np.arange(num_prompt), np.tile(np.arange(num_prompt), (3, 1)), num_prompt)
    return Group(PromptInstance(uid, question, "new", ""), prompt, tuple(rollouts))


@pytest.mark.parametrize("share_prompts", [False, True])
def test_every_response_token_keeps_its_own(share_prompts: bool) -> None:
    groups = [make_group("a", 4, [(3, 2), (5, 3), (2, 0)]), make_group("b", 2, [(1, 1)])]
    samples = to_training_samples(groups, [np.ones(3, np.float32), np.ones(1, np.float32)])
    packed = pack(samples, media=None, device=CPU, share_prompts=share_prompts)
    assert packed.teacher_ids is not None
    assert packed.teacher_logprobs is not None
    assert packed.teacher_ids.shape == packed.teacher_logprobs.shape == (len(packed.token_ids), 3)
    expected = {
        0: [0, 100, NO_TOKEN],
        1: [0, 100, 200],
        2: [NO_TOKEN] * 3,
        3: [0, NO_TOKEN, NO_TOKEN],
    }
    # The responses come in the order of the samples, whether their prompts are shared or not.
    lengths = [3, 5, 2, 1]
    positions = packed.loss_mask.nonzero().squeeze(-1).split(lengths)
    for number, where in enumerate(positions):
        ids = packed.teacher_ids[where]
        first = packed.token_ids[where][:, None]
        offsets = torch.tensor(expected[number])
        assert torch.equal(ids, torch.where(offsets == NO_TOKEN, NO_TOKEN, first + offsets)), number
    known = packed.teacher_ids != NO_TOKEN
    assert torch.equal(packed.teacher_logprobs[known], -packed.teacher_ids[known] / 8)
    assert not known[packed.loss_mask == 0].any()
    assert known.sum() == 3 * 2 + 5 * 3 + 1


def test_without_any_there_is_none() -> None:
    samples = to_training_samples([make_group("a", 4, [(3, 0)])], [np.ones(1, np.float32)])
    assert pack(samples, media=None, device=CPU).teacher_ids is None
    assert pack([], media=None, device=CPU).teacher_ids is None
