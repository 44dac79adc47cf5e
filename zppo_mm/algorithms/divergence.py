"""How far a student is from its teacher at every token: the Jensen-Shannon divergence over a
vocabulary split over tensor-parallel ranks.

With p the student's and q the teacher's distribution and m = (p + q) / 2, in nats:

JSD = 1/2 sum p log(p / m) + 1/2 sum q log(q / m), between 0 and log 2; with f = 1/2 log(p / m): d
JSD / d z_i = p_i (f_i - sum_j p_j f_j), for the student's scaled logits z.

Source: on- and off-policy distillation of the ZPPO paper; Lin 1991, "Divergence measures based on
the Shannon entropy".
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.nn.functional import softplus

from zppo_mm.algorithms.logprobs import NO_WEIGHT, row_chunks
from zppo_mm.experience import NO_TOKEN

DEFAULT_CHUNK_ROWS = 64


class Divergence(NamedTuple):
    """Of every row, all `[rows]` float32.

    Attributes:
        jsd: With gradient to the student's logits.
        entropies: Of the student, in nats, without gradient.
        agreements: 1 where student and teacher have the same most likely token, else 0.
    """

    jsd: torch.Tensor
    entropies: torch.Tensor
    agreements: torch.Tensor


class TopTokens(NamedTuple):
    """The teacher's most likely tokens of every row, each at most once.

    Attributes:
        ids: `[rows, k]` int64, over the whole vocabulary; `NO_TOKEN` where a row has fewer.
        logprobs: `[rows, k]` float32; ignored where there is no token.
    """

    ids: torch.Tensor
    logprobs: torch.Tensor


def jensen_shannon(
    student: torch.Tensor,
    teacher: torch.Tensor,
    group: dist.ProcessGroup | None = None,
    temperature: float = 1.0,
    chunk_rows: int = DEFAULT_CHUNK_ROWS,
) -> Divergence:
    """Return the divergence over the whole vocabulary, without ever gathering it.

    Seven all-reduces of one to three numbers per row. Work memory is a few chunks of `[chunk_rows,
    vocab / tp]` in float32.

    Args:
        student: `[rows, vocab / tp]` logits, this rank's slice of the vocabulary; left unchanged.
        teacher: The same of the teacher; gets no gradient.
        group: Ranks that share the vocabulary, in its order; `None` if it is whole.
        temperature: Divides both logits.
        chunk_rows: Rows handled at a time.
    """
    assert student.shape == teacher.shape, (
        "student and teacher logits of the same rows and the same slice of one vocabulary"
    )
    divergence = _JensenShannon.apply(  # type: ignore[no-untyped-call]
        student, teacher.detach(), _parted(group), temperature, chunk_rows
    )
    return Divergence(*divergence)


def top_jensen_shannon(
    student: torch.Tensor,
    teacher: TopTokens,
    group: dist.ProcessGroup | None = None,
    temperature: float = 1.0,
    chunk_rows: int = DEFAULT_CHUNK_ROWS,
) -> Divergence:
    """Return the divergence over the teacher's top tokens and one further outcome, in which both
    merge all other tokens into one outcome.

    Merging can only hide differences: this is a lower bound of the divergence over the whole
    vocabulary, and equals it where every token is a top token.

    Args:
        student: `[rows, vocab / tp]` logits, this rank's slice of the vocabulary; left unchanged.
        teacher: Its top tokens, the same on every rank; what their probabilities leave of 1 is the
            mass of all others.
        group: Ranks that share the vocabulary, in its order; `None` if it is whole.
        temperature: Divides the student's logits.
        chunk_rows: Rows handled at a time.
    """
    assert len(student) == len(teacher.ids), "logits and top tokens of the same rows"
    known = teacher.ids != NO_TOKEN
    logprobs = teacher.logprobs.detach().float().masked_fill(~known, -math.inf)
    rest = (1.0 - logprobs.exp().sum(-1, keepdim=True)).clamp(min=0.0).log()
    outcomes = torch.cat([logprobs, rest], -1).clamp(min=NO_WEIGHT)
    divergence = _TopJensenShannon.apply(  # type: ignore[no-untyped-call]
        student, teacher.ids, outcomes, _parted(group), temperature, chunk_rows
    )
    return Divergence(*divergence)


def top_tokens(
    logits: torch.Tensor,
    k: int,
    group: dist.ProcessGroup | None = None,
    temperature: float = 1.0,
    chunk_rows: int = DEFAULT_CHUNK_ROWS,
) -> TopTokens:
    """Return the k most likely tokens of every row, the most likely first; all tokens where there
    are fewer.

    Args:
        logits: `[rows, vocab / tp]`, this rank's slice of the vocabulary.
        k: Tokens wanted.
        group: Ranks that share the vocabulary, in its order; `None` if it is whole.
        temperature: Divides the logits.
        chunk_rows: Rows handled at a time.
    """
    group = _parted(group)
    partition = _partition(logits, group, temperature, chunk_rows)
    values, ids = logits.topk(min(k, logits.shape[1]), dim=-1)
    values, ids = values.float() / temperature, ids + _offset(logits, group)
    if group is not None:
        values, ids = _gathered(values, group), _gathered(ids, group)
        values, order = values.topk(min(k, values.shape[1]), dim=-1)
        ids = ids.gather(-1, order)
    return TopTokens(ids, values - partition.log_sums[:, None])


class _JensenShannon(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student: torch.Tensor,
        teacher: torch.Tensor,
        group: dist.ProcessGroup | None,
        temperature: float,
        chunk_rows: int,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        mine, other = (
            _partition(logits, group, temperature, chunk_rows) for logits in (student, teacher)
        )
        sums = student.new_empty((3, len(student)), dtype=torch.float32)
        for chunk in row_chunks(len(student), chunk_rows):
            log_p = _logprobs(student[chunk], mine.log_sums[chunk], temperature)
            log_q = _logprobs(teacher[chunk], other.log_sums[chunk], temperature)
            p, gap = log_p.exp(), log_q - log_p
            sums[0, chunk] = (p * _half_log_ratio(gap)).sum(-1)
            sums[1, chunk] = (log_q.exp() * _half_log_ratio(-gap)).sum(-1)
            sums[2, chunk] = -(p * log_p).sum(-1)
        if group is not None:
            dist.all_reduce(sums, group=group)
        means, others, entropies = sums.unbind()
        agreements = (mine.largest_ids == other.largest_ids).float()
        ctx.save_for_backward(student, teacher, mine.log_sums, other.log_sums, means)
        ctx.temperature, ctx.chunk_rows = temperature, chunk_rows
        ctx.mark_non_differentiable(entropies, agreements)
        return means + others, entropies, agreements

    @staticmethod
    def backward(
        ctx: Any, upstream: torch.Tensor, *_unused: Any
    ) -> tuple[torch.Tensor, None, None, None, None]:
        student, teacher, student_log_sums, teacher_log_sums, means = ctx.saved_tensors
        result = torch.empty_like(student)
        for chunk in row_chunks(len(student), ctx.chunk_rows):
            log_p = _logprobs(student[chunk], student_log_sums[chunk], ctx.temperature)
            gap = _logprobs(teacher[chunk], teacher_log_sums[chunk], ctx.temperature).sub_(log_p)
            surplus = _half_log_ratio(gap).sub_(means[chunk, None])
            result[chunk] = (
                log_p.exp_()
                .mul_(surplus)
                .mul_(upstream[chunk, None] / ctx.temperature)
                .to(result.dtype)
            )
        return result, None, None, None, None


class _TopJensenShannon(torch.autograd.Function):
    """The tokens outside the top k are one outcome, with one factor in the gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        student: torch.Tensor,
        ids: torch.Tensor,
        log_q: torch.Tensor,
        group: dist.ProcessGroup | None,
        temperature: float,
        chunk_rows: int,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        k = ids.shape[1]
        partition = _partition(student, group, temperature, chunk_rows)
        local = ids - _offset(student, group)
        here = (local >= 0) & (local < student.shape[1]) & (ids != NO_TOKEN)
        columns = torch.where(here, local, 0)
        masses = student.new_empty((len(student), k + 2), dtype=torch.float32)
        for chunk in row_chunks(len(student), chunk_rows):
            log_p = _logprobs(student[chunk], partition.log_sums[chunk], temperature)
            p = log_p.exp()
            masses[chunk, k + 1] = -(p * log_p).sum(-1)
            masses[chunk, :k] = torch.where(here[chunk], p.gather(-1, columns[chunk]), 0.0)
            # What is left over is added up, not subtracted from 1: a small mass must keep its
            # digits.
            masses[chunk, k] = p.scatter_add_(-1, columns[chunk], -masses[chunk, :k]).sum(-1)
        if group is not None:
            dist.all_reduce(masses, group=group)
        p, entropies = masses[:, : k + 1], masses[:, k + 1]
        gap = log_q - p.log().clamp(min=NO_WEIGHT)
        # An outcome that the student does not have adds nothing, and no token of it waits for a
        # gradient.
        halves = torch.where(p > 0, _half_log_ratio(gap), 0.0)
        means = (p * halves).sum(-1)
        jsd = means + (log_q.exp() * _half_log_ratio(-gap)).sum(-1)
        agreements = (
            partition.largest_ids
            == ids.gather(-1, log_q[:, :k].argmax(-1, keepdim=True)).squeeze(-1)
        ).float()
        ctx.save_for_backward(student, partition.log_sums, columns, here, p, halves, means)
        ctx.temperature, ctx.chunk_rows = temperature, chunk_rows
        ctx.mark_non_differentiable(entropies, agreements)
        return jsd, entropies, agreements

    @staticmethod
    def backward(
        ctx: Any, upstream: torch.Tensor, *_unused: Any
    ) -> tuple[torch.Tensor, None, None, None, None, None]:
        student, log_sums, columns, here, p, halves, means = ctx.saved_tensors
        scale = upstream / ctx.temperature
        rest = (halves[:, -1] - means) * scale
        top = torch.where(here, p[:, :-1] * (halves[:, :-1] - halves[:, -1:]), 0.0) * scale[:, None]
        result = torch.empty_like(student)
        for chunk in row_chunks(len(student), ctx.chunk_rows):
            gradient = (
                _logprobs(student[chunk], log_sums[chunk], ctx.temperature)
                .exp_()
                .mul_(rest[chunk, None])
            )
            result[chunk] = gradient.scatter_add_(-1, columns[chunk], top[chunk]).to(result.dtype)
        return result, None, None, None, None, None


def _half_log_ratio(gap: torch.Tensor) -> torch.Tensor:
    """Return 1/2 log(a / ((a + b) / 2)) for gap = log b - log a."""
    return softplus(gap).neg_().add_(math.log(2.0)).mul_(0.5)


def _logprobs(logits: torch.Tensor, log_sums: torch.Tensor, temperature: float) -> torch.Tensor:
    """Return the float32 log-probs of some rows, a probability of 0 at the bound."""
    return logits.float().div(temperature).sub_(log_sums[:, None]).clamp_(min=NO_WEIGHT)


class _Partition(NamedTuple):
    """Logarithms of the sums of exponentials, and the most likely tokens (the first of equals),
    both `[rows]`.
    """

    log_sums: torch.Tensor
    largest_ids: torch.Tensor


def _partition(
    logits: torch.Tensor, group: dist.ProcessGroup | None, temperature: float, chunk_rows: int
) -> _Partition:
    """Normalise rows over the whole vocabulary."""
    values, ids = logits.max(-1)
    largest = values.to(torch.float32, copy=True)
    if group is not None:
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
        ids = torch.where(
            values == largest, ids + _offset(logits, group), torch.iinfo(ids.dtype).max
        )
        dist.all_reduce(ids, dist.ReduceOp.MIN, group=group)
    largest.div_(temperature)
    sums = torch.empty_like(largest)
    for chunk in row_chunks(len(logits), chunk_rows):
        sums[chunk] = (
            logits[chunk].float().div(temperature).sub_(largest[chunk, None]).exp_().sum(-1)
        )
    if group is not None:
        dist.all_reduce(sums, group=group)
    return _Partition(sums.log_().add_(largest), ids)


def _parted(group: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
    """Return the group if it parts the vocabulary."""
    return None if group is None or dist.get_world_size(group) == 1 else group


def _offset(logits: torch.Tensor, group: dist.ProcessGroup | None) -> int:
    """Return the first id of this rank's slice."""
    return 0 if group is None else dist.get_rank(group) * logits.shape[1]


def _gathered(part: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Return the columns of all ranks, in their order."""
    parts = [torch.empty_like(part) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, part.contiguous(), group=group)
    return torch.cat(parts, -1)
