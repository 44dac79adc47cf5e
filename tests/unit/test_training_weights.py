"""In off-policy distillation tokens, responses and questions are averaged in turn."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from tests.support.training_example import make_sample
from zppo_mm.training.samples import with_question_weights

# Weights are float64.
TOLERANCE = 1e-12


def test_the_weights_by_hand() -> None:
    samples = [
        make_sample(uid, number, prompt, response, 0.0, image=False)
        for uid, number, prompt, response in (
            ("a", 0, 3, 10),
            ("b", 0, 5, 4),
            ("a", 1, 3, 2),
            ("b", 1, 5, 8),
            ("c", 0, 2, 6),
        )
    ]
    # What no log-probs came for has no loss tokens: b has one response left, c none.
    for index in (3, 4):
        samples[index] = dataclasses.replace(
            samples[index], loss_mask=np.zeros_like(samples[index].loss_mask)
        )
    weighted = with_question_weights(samples)
    # a: 2 responses of 10 and 2 tokens; b: 1 of 4.
    assert [each.token_weight for each in weighted[:3]] == pytest.approx(
        [1 / (2 * 10), 1 / 4, 1 / (2 * 2)], rel=TOLERANCE
    )
    # Together the tokens of a question weigh 1.
    totals = [each.token_weight * each.num_loss_tokens for each in weighted]
    assert sum(totals) == pytest.approx(2, rel=TOLERANCE)
    assert totals[3:] == [0.0, 0.0]
