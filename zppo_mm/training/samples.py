"""Groups and their advantages to training samples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from zppo_mm.experience import (
    NO_TOKEN,
    FloatArray,
    Group,
    IntArray,
    Prompt,
    Rollout,
    TopLogprobs,
    TrainingSample,
)


def to_training_samples(
    groups: Sequence[Group], advantages: Sequence[FloatArray]
) -> list[TrainingSample]:
    """Turn every rollout into one sequence to train on, in the order of groups and rollouts.

    Args:
        groups: Sampled groups of any kind.
        advantages: Per group `[rollouts]`, one advantage per rollout.

    Raises:
        ValueError: If a group and its advantages differ in length.
    """
    samples = []
    for group, group_advantages in zip(groups, advantages, strict=True):
        for rollout, advantage in zip(group.rollouts, group_advantages, strict=True):
            samples.append(_training_sample(group, rollout, float(advantage)))
    return samples


def with_question_weights(samples: Sequence[TrainingSample]) -> list[TrainingSample]:
    """Return samples weighted so that the weighted mean over all their loss tokens is the mean over
    tokens of a response, then over the responses of a group, then over the groups.

    A group without loss tokens takes no part. Weights and their sum follow from all samples of the
    step, so they are the same on every rank.

    Args:
        samples: One group per question.

    Source: ZPPO, off-policy distillation.
    """
    num_responses = Counter(sample.uid for sample in samples if sample.num_loss_tokens)
    return [
        replace(sample, token_weight=1 / (num_responses[sample.uid] * sample.num_loss_tokens))
        if sample.num_loss_tokens
        else sample
        for sample in samples
    ]


def response_sequence(
    prompt: Prompt, response_ids: IntArray
) -> tuple[IntArray, IntArray, FloatArray]:
    """Return a prompt and its response as one sequence.

    Args:
        prompt: Tokens and positions.
        response_ids: `[response]`.

    Returns:
        Token ids `[tokens]`, positions `[3, tokens]`, and the loss mask `[tokens]`, 1 on the
        response.
    """
    whole = prompt.continued(response_ids)
    mask = np.repeat(np.array([0, 1], dtype=np.float32), [len(prompt.token_ids), len(response_ids)])
    return whole.token_ids, whole.positions, mask


def _training_sample(group: Group, rollout: Rollout, advantage: float) -> TrainingSample:
    token_ids, positions, mask = response_sequence(group.prompt, rollout.response_ids)
    before = np.zeros(len(group.prompt.token_ids), dtype=np.float32)
    known = rollout.rollout_logprobs
    assert known is None or np.isfinite(known).all(), (
        f"{group.uid}: a log-prob that is not finite; what is not known is None"
    )
    return TrainingSample(
        uid=group.uid,
        question=group.question,
        token_ids=token_ids,
        positions=positions,
        loss_mask=mask,
        old_logprobs=None if known is None else np.concatenate([before, known]),
        advantages=mask * np.float32(advantage),
        grids=group.prompt.grids,
        teacher_top=_after_prompt(rollout.teacher_top, len(before)),
        policy_version=rollout.policy_version,
    )


def _after_prompt(top: TopLogprobs | None, num_prompt_tokens: int) -> TopLogprobs | None:
    """Return the teacher's tokens at the tokens of prompt and response; a prompt has none."""
    if top is None:
        return None
    rows = ((num_prompt_tokens, 0), (0, 0))
    return TopLogprobs(
        np.pad(top.ids, rows, constant_values=NO_TOKEN),
        np.pad(top.logprobs, rows, constant_values=-np.inf),
    )
