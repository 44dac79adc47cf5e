"""Training samples to one micro-batch: laid end to end without padding, a prompt once for all its
responses where they share it.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from data.errors import DataError, ReasonedError
from data.question import Question
from encoders.processor import VisionInput
from zppo_mm.experience import NO_TOKEN, FloatArray, MediaSource, Microbatch, TrainingSample

logger = logging.getLogger(__name__)

# Failures of the decoding process, not of the file, which was opened before for its prompt.
TRANSIENT_REASONS = ("timeout", "decoder_died")
# A replica without work still takes part in the update, with one sequence of this many tokens that
# carry no loss.
IDLE_TOKENS = 8
PADDING_TOKEN_ID = 0


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
        **_join_importance(segments, padding, device),
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


def _join_importance(
    segments: Sequence[_Segment], padding: int, device: torch.device
) -> dict[str, torch.Tensor]:
    """Return the field of importance weights; nothing if no sample has them."""
    weights = [segment.sample.importance for segment in segments]
    if all(each is None for each in weights):
        return {}
    parts = [
        np.ones_like(segment.sample.loss_mask[segment.tokens])
        if each is None
        else each[segment.tokens]
        for segment, each in zip(segments, weights, strict=True)
    ]
    joined = np.concatenate([*parts, np.ones(padding, dtype=np.float32)])
    return {"importance": torch.from_numpy(joined).to(device, torch.float32)}


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
                f"training.packing: the media of question {sample.question.id!r} have changed, "
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
