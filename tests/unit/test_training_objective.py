"""Objectives on packed sequences against a loop over tokens."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from zppo_mm.algorithms.row_loss import OutputRows
from zppo_mm.config.schema import AlgorithmConfig
from zppo_mm.experience import Microbatch
from zppo_mm.training.objective import (
    PerForwardToken,
    PerLossToken,
    PolicyObjective,
    SupervisedObjective,
    predicting_rows,
    with_loss_predicted_by,
)

VOCABULARY = 11
# Float32 sums of about ten terms.
TOLERANCE = 1e-5


def packed(old_shift: float = 0.0) -> tuple[torch.Tensor, Microbatch]:
    """Two sequences of 5 and 4 tokens, the last 3 and 2 of which are responses."""
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(VOCABULARY, (9,), generator=random)
    mask = torch.tensor([0.0, 0, 1, 1, 1, 0, 0, 1, 1])
    logits = 2 * torch.randn(9, VOCABULARY, generator=random)
    advantages = mask * torch.tensor([0.0, 0, 1.5, 1.5, 1.5, 0, 0, -0.5, -0.5])
    old = torch.zeros(9)
    for token in range(1, 9):
        old[token] = torch.log_softmax(logits[token - 1], -1)[ids[token]] + old_shift
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3]] * 3)
    bounds = torch.tensor([0, 5, 9], dtype=torch.int32)
    return logits, Microbatch(
        ids, positions, bounds, mask, old * mask, advantages, token_weights=torch.ones(9)
    )


def rows_of(logits: torch.Tensor) -> OutputRows:
    """Return rows whose hidden states are their logits."""
    return OutputRows(logits, torch.eye(VOCABULARY), max_chunk_logits=2 * VOCABULARY)


def sums_by_name(
    objective: PolicyObjective, logits: torch.Tensor, microbatch: Microbatch
) -> dict[str, float]:
    names = ("loss", "num_tokens", *(metric.name for metric in objective.metrics))
    return dict(zip(names, objective(rows_of(logits), microbatch).sums.tolist(), strict=True))


def test_a_token_is_predicted_from_the_position_before_it() -> None:
    logits, microbatch = packed()
    terms = SupervisedObjective()(rows_of(logits), microbatch)
    expected = -sum(
        float(torch.log_softmax(logits[i - 1], -1)[microbatch.token_ids[i]])
        for i in (2, 3, 4, 7, 8)
    )
    assert float(terms.loss_sum) == pytest.approx(expected, rel=TOLERANCE)
    assert terms.sums.tolist()[:2] == pytest.approx([expected, 5.0], rel=TOLERANCE)


def test_no_prediction_crosses_into_the_next_sequence() -> None:
    logits, microbatch = packed()
    logits.requires_grad_()
    SupervisedObjective()(rows_of(logits), microbatch).loss_sum.backward()
    assert logits.grad is not None
    touched = logits.grad.abs().sum(-1) > 0
    # Responses are tokens 2-4 and 7-8, so logits 1-3 and 6-7 matter; 4 and 8 end their sequences.
    assert touched.tolist() == [False, True, True, True, False, False, True, True, False]


def test_the_predicting_rows_alone_give_the_same_terms() -> None:
    logits, microbatch = packed(old_shift=0.1)
    rows = predicting_rows(microbatch)
    assert rows is not None
    assert rows.tolist() == [1, 2, 3, 6, 7]
    objective = PolicyObjective(AlgorithmConfig(), temperature=1.0)
    assert torch.equal(
        objective(rows_of(logits[rows]), microbatch).sums,
        objective(rows_of(logits), microbatch).sums,
    )


def test_on_policy_tokens_have_ratio_one() -> None:
    logits, microbatch = packed()
    objective = PolicyObjective(AlgorithmConfig(), temperature=1.0)
    named = sums_by_name(objective, logits, microbatch)
    # loss = -(3 * 1.5 - 2 * 0.5)
    assert named["loss"] == pytest.approx(-3.5, rel=TOLERANCE)
    assert named["num_tokens"] == 5
    assert named["policy/ratio"] == pytest.approx(5.0, rel=TOLERANCE)
    assert named["policy/kl_old"] == pytest.approx(0.0, abs=TOLERANCE)
    assert named["policy/clip_low"] == named["policy/clip_high"] == named["policy/clip_dual"] == 0
    entropies = torch.distributions.Categorical(logits=logits[[1, 2, 3, 6, 7]]).entropy()
    assert named["policy/entropy"] == pytest.approx(float(entropies.sum()), rel=TOLERANCE)


def test_moved_policy_counts_its_clipped_tokens() -> None:
    logits, microbatch = packed(old_shift=-0.5)
    objective = PolicyObjective(AlgorithmConfig(), temperature=1.0)
    named = sums_by_name(objective, logits, microbatch)
    # Ratio exp(0.5) = 1.6487: clipped to 1.28 where the advantage is 1.5, kept where it is -0.5.
    assert named["loss"] == pytest.approx(-(3 * 1.28 * 1.5 - 2 * 1.6487213 * 0.5), rel=TOLERANCE)
    assert (named["policy/clip_low"], named["policy/clip_high"]) == (0, 3)
    assert named["policy/ratio"] == pytest.approx(5 * 1.6487213, rel=TOLERANCE)


def test_a_micro_batch_without_loss_tokens_has_no_gradient() -> None:
    logits, microbatch = packed()
    idle = Microbatch(
        *(getattr(microbatch, name) for name in ("token_ids", "positions", "cu_seqlens")),
        *[torch.zeros(9)] * 4,
    )
    logits.requires_grad_()
    terms = PolicyObjective(AlgorithmConfig(), temperature=1.0)(rows_of(logits), idle)
    terms.loss_sum.backward()
    assert terms.sums.tolist() == [0.0] * (2 + len(PolicyObjective.metrics))
    assert torch.equal(logits.grad, torch.zeros_like(logits))


@pytest.mark.parametrize("middle", [0, 1, 2, 3, 7, 9])
def test_the_loss_is_divided_by_where_the_predicting_position_lies(middle: int) -> None:
    logits, microbatch = packed(old_shift=0.1)
    whole = SupervisedObjective()(rows_of(logits), microbatch)
    parts = []
    for own in (slice(0, middle), slice(middle, 9)):
        mine = with_loss_predicted_by(microbatch, own)
        rows = predicting_rows(mine)
        # A part that predicts nothing gives the logits of its own tokens, whatever their number.
        parts.append(
            SupervisedObjective()(
                rows_of(logits[own] if rows is None else logits[own][rows - own.start]), mine
            )
        )
    assert sum(float(part.loss_sum) for part in parts) == pytest.approx(
        float(whole.loss_sum), rel=TOLERANCE
    )
    # Tokens 2, 3, 4, 7 and 8 carry loss; their predecessors are counted.
    assert int(parts[0].sums[1]) == sum(position - 1 < middle for position in (2, 3, 4, 7, 8))
    assert int(parts[1].sums[1]) == 5 - int(parts[0].sums[1])


def test_a_response_is_predicted_where_its_prompt_ends() -> None:
    _, microbatch = packed()
    # The second sequence continues the first: its first token is predicted by position 4.
    child = dataclasses.replace(
        microbatch,
        loss_mask=torch.tensor([0.0, 0, 0, 0, 0, 1, 1, 1, 1]),
        parents=(-1, 0),
        cu_seqlens=torch.tensor([0, 5, 9]),
    )
    assert with_loss_predicted_by(child, slice(0, 5)).loss_mask.nonzero().flatten().tolist() == [5]
    assert with_loss_predicted_by(child, slice(5, 9)).loss_mask.nonzero().flatten().tolist() == [
        6,
        7,
        8,
    ]


def test_metrics_are_averaged_over_the_tokens_that_their_type_names() -> None:
    # Two updates: 6 of 8 and 0 of 2 loss tokens went through the network.
    clipped = [PerLossToken("c").mean(4, 8, 6), PerLossToken("c").mean(0, 2, 0)]
    assert clipped[0].merge(clipped[1]).reduced() == (4 / 8 + 0 / 2) / 2
    ratio = [PerForwardToken("r").mean(9, 8, 6), PerForwardToken("r").mean(0, 2, 0)]
    assert ratio[0].merge(ratio[1]).reduced() == 9 / 6
    assert ratio[1].reduced() is None
