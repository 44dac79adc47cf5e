"""Training samples to gradient updates: equal mini-batches, balanced over replicas, packed into
micro-batches.

`plan_batches` decides with indices alone and gives the same answer on every rank; `build_batches`
makes this rank's tensors from it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import overload

import numpy as np
import torch

from data.errors import DataError, ReasonedError
from data.question import Question
from encoders.processor import VisionInput
from zppo_mm.experience import NO_TOKEN, Batch, FloatArray, MediaSource, Microbatch, TrainingSample
from zppo_mm.training.prefix_groups import Indices, balance, fill_microbatches, make_prefix_groups

logger = logging.getLogger(__name__)

# Failures of the decoding process, not of the file, which was opened before for its prompt.
TRANSIENT_REASONS = ("timeout", "decoder_died")
# A replica without work still takes part in the update, with one sequence of this many tokens that
# carry no loss.
IDLE_TOKENS = 8
PADDING_TOKEN_ID = 0


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """Which sample goes where.

    Attributes:
        minibatch_of: Per sample, the update (from 0) that uses it.
        num_loss_tokens: Per update, the loss tokens of all its samples.
        denominators: Per update, the sum of the weights of those tokens.
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
    plans, denominators = [], []
    tokens = [0] * num_updates
    for update in range(num_updates):
        members = [index for index, owner in enumerate(minibatch_of) if owner == update]
        tokens[update] = sum(samples[index].num_loss_tokens for index in members)
        weights = (
            samples[index].token_weight * samples[index].num_loss_tokens for index in members
        )
        denominators.append(math.fsum(weights))
        prefix_groups = make_prefix_groups(
            samples,
            [index for index in members if needed[index]],
            micro_batch_tokens,
            share_prompts,
        )
        by_replica = balance(prefix_groups, num_replicas, micro_batch_tokens)
        plans.append(tuple(fill_microbatches(each, micro_batch_tokens) for each in by_replica))
    counts = tuple(tokens), tuple(denominators)
    return BatchPlan(minibatch_of, *counts, tuple(plans), len(samples) - sum(needed), share_prompts)


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


@dataclass(frozen=True, slots=True)
class _Segment:
    """Consecutive tokens of a sample that are one sequence of a pack.

    Attributes:
        tokens: Of the sample.
        parent: Index of the segment that this one continues, -1 for none.
    """

    sample: TrainingSample
    tokens: slice
    parent: int = -1


def pack(
    samples: Sequence[TrainingSample],
    *,
    media: MediaSource | None,
    device: torch.device,
    share_prompts: bool = False,
) -> Microbatch:
    """Concatenate samples for one forward pass.

    Args:
        samples: In this order; none gives a short sequence without loss.
        media: Opens the pixels of the samples' questions; `None` leaves `patches` out.
        device: Where the tensors go.
        share_prompts: Put the prompt of several samples of a group once, then their responses.

    Raises:
        DataError: A sample's media no longer has the grid that its prompt was made with.
    """
    for sample in samples:
        assert sample.num_tokens > 0, f"pack: {sample.uid} has no token"
        assert sample.loss_mask[0] == 0, (
            f"pack: the first token of {sample.uid} carries loss, but nothing predicts it"
        )
    segments = (
        _segments(samples)
        if share_prompts
        else [_Segment(sample, slice(0, sample.num_tokens)) for sample in samples]
    )
    lengths = [segment.tokens.stop - segment.tokens.start for segment in segments]
    padding = 0 if samples else IDLE_TOKENS
    lengths += [padding] if padding else []
    zeros = np.zeros(padding, dtype=np.float32)
    prompts = [segment.sample for segment in segments if segment.parent < 0]
    grids = [grid for sample in prompts for grid in sample.grids]

    def join(name: str, tail: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
        parts = (getattr(segment.sample, name)[..., segment.tokens] for segment in segments)
        return torch.from_numpy(np.concatenate([*parts, tail], axis=-1)).to(
            device=device, dtype=dtype
        )

    return Microbatch(
        token_ids=join("token_ids", np.full(padding, PADDING_TOKEN_ID), torch.int64),
        positions=join("positions", np.tile(np.arange(padding), (3, 1)), torch.int64),
        cu_seqlens=torch.tensor(np.cumsum([0, *lengths]), dtype=torch.int32, device=device),
        loss_mask=join("loss_mask", zeros, torch.float32),
        advantages=join("advantages", zeros, torch.float32),
        token_weights=join("token_weights", zeros, torch.float32),
        patches=_open_patches(prompts, media, device) if media is not None and grids else None,
        grids=torch.tensor(grids, dtype=torch.int64, device=device) if grids else None,
        uids=tuple(dict.fromkeys(s.uid for s in samples)),
        parents=tuple(segment.parent for segment in segments)
        if len(prompts) < len(segments)
        else None,
        **_join_old_logprobs(segments, padding, device),
        **_join_teacher_top(segments, padding, device),
    )


def _join_old_logprobs(
    segments: Sequence[_Segment], padding: int, device: torch.device
) -> dict[str, torch.Tensor]:
    """Return the field of old log-probs, and the mask of tokens where they are unknown, if there
    are any.
    """
    logprobs, unknown = [], []
    for segment in segments:
        old, mask = segment.sample.old_logprobs, segment.sample.loss_mask[segment.tokens]
        logprobs.append(np.zeros_like(mask) if old is None else old[segment.tokens])
        unknown.append((mask != 0) & (old is None))
    logprobs.append(np.zeros(padding, dtype=np.float32))
    unknown.append(np.zeros(padding, dtype=bool))
    fields = {"old_logprobs": torch.from_numpy(np.concatenate(logprobs)).to(device, torch.float32)}
    if any(part.any() for part in unknown):
        fields["unknown"] = torch.from_numpy(np.concatenate(unknown)).to(device)
    return fields


def _join_teacher_top(
    segments: Sequence[_Segment], padding: int, device: torch.device
) -> dict[str, torch.Tensor]:
    """Return the fields of the teacher's top log-probs; nothing if no sample has them."""
    width = max(
        (
            top.ids.shape[1]
            for segment in segments
            if (top := segment.sample.teacher_top) is not None
        ),
        default=0,
    )
    if not width:
        return {}
    num_tokens = sum(segment.tokens.stop - segment.tokens.start for segment in segments) + padding
    ids = np.full((num_tokens, width), NO_TOKEN, dtype=np.int64)
    logprobs = np.full((num_tokens, width), -np.inf, dtype=np.float32)
    start = 0
    for segment in segments:
        end = start + segment.tokens.stop - segment.tokens.start
        top = segment.sample.teacher_top
        if top is not None:
            columns = slice(0, top.ids.shape[1])
            ids[start:end, columns] = top.ids[segment.tokens]
            logprobs[start:end, columns] = top.logprobs[segment.tokens]
        start = end
    return {
        "teacher_ids": torch.from_numpy(ids).to(device),
        "teacher_logprobs": torch.from_numpy(logprobs).to(device),
    }


def _segments(samples: Sequence[TrainingSample]) -> list[_Segment]:
    """Put every group's prompt once and its responses behind it; a single sample stays whole."""
    groups: dict[str, list[TrainingSample]] = {}
    for sample in samples:
        groups.setdefault(sample.uid, []).append(sample)
    segments: list[_Segment] = []
    for members in groups.values():
        first = members[0]
        if len(members) == 1:
            segments.append(_Segment(first, slice(0, first.num_tokens)))
            continue
        prompt = slice(0, first.num_prompt_tokens)
        parent = len(segments)
        segments.append(_Segment(first, prompt))
        for sample in members:
            assert _same_prompt(sample, first), (
                f"pack: the samples of {first.uid} have different prompts"
            )
            segments.append(_Segment(sample, slice(prompt.stop, sample.num_tokens), parent))
    return segments


def _same_prompt(one: TrainingSample, other: TrainingSample) -> bool:
    """Return whether two samples agree in everything before their responses."""
    count = one.num_prompt_tokens
    return (
        count == other.num_prompt_tokens
        and np.array_equal(one.token_ids[:count], other.token_ids[:count])
        and np.array_equal(one.positions[:, :count], other.positions[:, :count])
        and one.grids == other.grids
    )


def _open_patches(
    prompts: Sequence[TrainingSample], media: MediaSource, device: torch.device
) -> torch.Tensor:
    """Return `[patches, channels]` of all media, in the order of the prompts, each given by one of
    its samples.
    """
    parts: list[FloatArray] = []
    for sample in prompts:
        if not sample.grids:
            continue
        inputs = _open_again(sample.question, media)
        opened = tuple(tuple(item.grid) for item in inputs)
        if opened != tuple(tuple(grid) for grid in sample.grids):
            raise DataError(
                f"training.batching: the media of question {sample.question.id!r} have changed, "
                f"got grids {opened}, expected {sample.grids} as in its prompt; do not rewrite "
                "shards during a run"
            )
        parts.extend(item.patches for item in inputs)
    return torch.from_numpy(np.concatenate(parts)).to(device=device, dtype=torch.float32)


def _open_again(question: Question, media: MediaSource) -> Sequence[VisionInput]:
    """Open media that were opened for the prompt, with one more try when the decoder failed, which
    a busy machine is enough for.
    """
    try:
        return media.vision_inputs(question)
    except ReasonedError as error:
        if error.reason not in TRANSIENT_REASONS:
            raise
        logger.warning(
            "opening the media of question %s again after %s: %s",
            question.id,
            error.reason,
            error,
        )
        return media.vision_inputs(question)
