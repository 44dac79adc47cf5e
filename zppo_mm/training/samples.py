"""Groups and their advantages to training samples."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from zppo_mm.experience import FloatArray, Group, Rollout, TrainingSample


def to_training_samples(groups: Sequence[Group], advantages: Sequence[FloatArray]) -> list[TrainingSample]:
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


def _training_sample(group: Group, rollout: Rollout, advantage: float) -> TrainingSample:
    prompt, num_response = group.prompt, len(rollout.response_ids)
    before = np.zeros(len(prompt.token_ids), dtype=np.float32)
    # Text after the prompt advances all three rotary axes together.
    response_positions = np.broadcast_to(prompt.next_position + np.arange(num_response), (3, num_response))
    return TrainingSample(
        uid=group.uid,
        question=group.question,
        token_ids=np.concatenate([prompt.token_ids, rollout.response_ids]),
        positions=np.concatenate([prompt.positions, response_positions], axis=1),
        loss_mask=np.concatenate([before, np.ones(num_response, dtype=np.float32)]),
        old_logprobs=np.concatenate([before, rollout.rollout_logprobs]),
        advantages=np.concatenate([before, np.full(num_response, advantage, dtype=np.float32)]),
        grids=prompt.grids,
    )
