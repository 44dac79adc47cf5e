"""Training samples to gradient updates: equal mini-batches, balanced over replicas, packed into
micro-batches.

`plan_batches` decides with indices alone and gives the same answer on every rank; `build_batches`
makes this rank's tensors from it.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import overload

import numpy as np
import torch

from zppo_mm.experience import Batch, MediaSource, Microbatch, TrainingSample
from zppo_mm.training.packing import pack
from zppo_mm.training.prefix_groups import Indices, balance, fill_microbatches, make_prefix_groups


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """Which sample goes where.

    Attributes:
        minibatch_of: Per sample, the update (from 0) that uses it.
        num_loss_tokens: Per update, the loss tokens of all its samples.
        denominators: Per update, the sum of the weights of those tokens; 1 without any.
        microbatches: `[update][replica][micro-batch]` indices of the samples that go through
            the network.
        num_skipped: Samples that need no forward pass.
        share_prompts: Whether the samples of one group in a micro-batch share one copy of the
            prompt.
    """

    minibatch_of: Indices
    num_loss_tokens: Indices
    denominators: tuple[float, ...]
    microbatches: tuple[tuple[tuple[Indices, ...], ...], ...]
    num_skipped: int
    share_prompts: bool = False


def has_gradient(sample: TrainingSample) -> bool:
    """Return whether any token of the sample can move the weights."""
    return bool(np.any((sample.loss_mask != 0) & (sample.advantages != 0)))


def plan_batches(
    samples: Sequence[TrainingSample],
    *,
    num_minibatches: int,
    num_replicas: int,
    micro_batch_tokens: int,
    random: np.random.Generator,
    micro_batch_patches: int = sys.maxsize,
    skip_zero_advantage: bool = True,
    share_prompts: bool = False,
) -> BatchPlan:
    """Assign every sample to one update, and in it to a replica and a micro-batch.

    Whole groups are shuffled and dealt to the updates, whose numbers of groups differ by at most
    one; only when there are fewer groups than updates are single samples dealt instead. With fewer
    samples than updates there are as many updates as samples.

    Samples whose advantages are all 0 (those of trivial groups) have a surrogate of 0 and no
    gradient whatever the weights are. Their forward pass is left out, while their tokens still
    count in the denominator, so loss and gradient are those of the full pass.

    In an update, the tokens of two replicas differ by at most the longest sample. With shared
    prompts, the tokens of a replica and of a micro-batch are those that pass through the network,
    each prompt counted once per micro-batch. A group is then kept together unless it is too long
    for a micro-batch or the balance asks for its division. To which update a sample goes does not
    depend on sharing.

    Args:
        samples: Of the whole step, the same on every rank.
        num_minibatches: I, the updates per step.
        num_replicas: Data-parallel size.
        micro_batch_tokens: Most tokens of a micro-batch; a longer sample has one to itself.
        random: Shuffles the groups.
        micro_batch_patches: Most patches of a micro-batch, those of a shared prompt counted once;
            a prompt with more has one to itself.
        skip_zero_advantage: `False` keeps every sample with loss tokens, for objectives that do
            not use advantages.
        share_prompts: Shared-prefix training: one copy of a group's prompt per micro-batch; all
            samples of a uid must have the same prompt.

    Source: ZPPO, Algorithm 1, step 6.
    """
    minibatch_of = _deal(samples, num_minibatches, random)
    num_updates = max(minibatch_of, default=-1) + 1
    needed = [
        has_gradient(sample) if skip_zero_advantage else sample.num_loss_tokens > 0
        for sample in samples
    ]
    plans, num_loss_tokens, denominators = [], [], []
    for update in range(num_updates):
        members = [index for index, owner in enumerate(minibatch_of) if owner == update]
        own = [samples[index] for index in members]
        num_loss_tokens.append(sum(sample.num_loss_tokens for sample in own))
        weights = [sample.token_weight * sample.num_loss_tokens for sample in own]
        denominators.append(math.fsum(weights) or 1.0)
        prefix_groups = make_prefix_groups(
            samples,
            [index for index in members if needed[index]],
            micro_batch_tokens,
            share_prompts,
        )
        by_replica = balance(prefix_groups, num_replicas, micro_batch_tokens)
        plans.append(
            tuple(
                fill_microbatches(each, micro_batch_tokens, micro_batch_patches)
                for each in by_replica
            )
        )
    return BatchPlan(
        minibatch_of,
        num_loss_tokens=tuple(num_loss_tokens),
        denominators=tuple(denominators),
        microbatches=tuple(plans),
        num_skipped=len(samples) - sum(needed),
        share_prompts=share_prompts,
    )


def _deal(
    samples: Sequence[TrainingSample], num_minibatches: int, random: np.random.Generator
) -> Indices:
    """Return the update of every sample."""
    uids = list(dict.fromkeys(sample.uid for sample in samples))
    by_group = len(uids) >= num_minibatches
    dealt: Sequence[str | int] = uids if by_group else list(range(len(samples)))
    order = random.permutation(len(dealt))
    num_updates = min(num_minibatches, len(dealt))
    owner = {
        dealt[index]: position * num_updates // len(dealt) for position, index in enumerate(order)
    }
    return tuple(owner[sample.uid if by_group else index] for index, sample in enumerate(samples))


def build_batches(
    plan: BatchPlan,
    samples: Sequence[TrainingSample],
    *,
    replica: int,
    media: MediaSource | None,
    device: torch.device,
) -> list[Batch]:
    """Return the updates as this replica's micro-batches; a replica without samples gets one that
    carries no loss.

    Args:
        plan: What goes where.
        samples: Those the plan was made from.
        replica: This rank's data-parallel rank.
        media: Opens pixels; `None` off the first pipeline stage.
        device: Where the tensors go.
    """
    batches = []
    for update, replicas in enumerate(plan.microbatches):
        packs = [[samples[index] for index in members] for members in replicas[replica]] or [[]]
        makers = [
            partial(pack, each, media=media, device=device, share_prompts=plan.share_prompts)
            for each in packs
        ]
        num_loss_tokens, denominator = plan.num_loss_tokens[update], plan.denominators[update]
        batches.append(Batch(LazyMicrobatches(makers), num_loss_tokens, denominator))
    return batches


class LazyMicrobatches(Sequence[Microbatch]):
    """Micro-batches that are made, and their media opened, on access.

    Args:
        makers: One per micro-batch; called at every access.
    """

    def __init__(self, makers: Sequence[Callable[[], Microbatch]]) -> None:
        self._makers = makers

    def __len__(self) -> int:
        return len(self._makers)

    @overload
    def __getitem__(self, index: int) -> Microbatch: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Microbatch]: ...
    def __getitem__(self, index: int | slice) -> Microbatch | Sequence[Microbatch]:
        return (
            LazyMicrobatches(self._makers[index])
            if isinstance(index, slice)
            else self._makers[index]()
        )

    def __iter__(self) -> Iterator[Microbatch]:
        return (make() for make in self._makers)
