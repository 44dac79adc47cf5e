"""Sampling: frequencies, filter sets against a naive implementation, log-probs that the loss
computes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zppo_mm.experience import NO_TOKEN
from zppo_mm.rollout.engine import SamplingParams
from zppo_mm.rollout.token_choice import choose_tokens

DRAWS = 20_000
# Five standard deviations of a frequency over DRAWS draws; a correct sampler exceeds it once in a
# million tokens.
FREQUENCY_SIGMAS = 5.0
LOGPROB_TOLERANCE = 1e-5  # float32 log-softmax over at most 100 logits


def params(temperature: float = 1.0, **changes: float) -> SamplingParams:
    return SamplingParams(temperature=temperature, max_new_tokens=1, stop_token_ids=(), **changes)


def naive_distribution(
    logits: list[float],
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    penalised: set[int],
    penalty: float,
) -> list[float]:
    scaled = [
        (value - penalty * (index in penalised)) / temperature for index, value in enumerate(logits)
    ]
    weights = [math.exp(value - max(scaled)) for value in scaled]
    kept = {index for index, weight in enumerate(weights) if weight >= min_p}
    order = sorted(kept, key=lambda index: -weights[index])
    order = order[:top_k] if top_k else order
    total, mass, final = sum(weights[index] for index in order), 0.0, []
    for index in order:
        if final and mass >= top_p * total:
            break
        final.append(index)
        mass += weights[index]
    return [weights[index] / mass if index in final else 0.0 for index in range(len(logits))]


SETTINGS = [
    {},
    {"temperature": 0.6},
    {"temperature": 0.6, "top_p": 0.9, "top_k": 5},
    {"top_p": 0.7},
    {"min_p": 0.2},
    {"top_k": 3, "presence_penalty": 1.5, "min_p": 0.05, "temperature": 1.3},
]


@pytest.mark.parametrize("chosen", SETTINGS)
def test_frequencies_are_the_probabilities(chosen: dict[str, float]) -> None:
    logits = torch.randn(12, generator=torch.Generator().manual_seed(1)) * 2
    uniforms = torch.from_numpy(np.random.default_rng(0).random(DRAWS))
    seen = torch.zeros(DRAWS, 12, dtype=torch.bool)
    seen[:, [0, 3, 7]] = True
    tokens, logprobs = choose_tokens(logits.expand(DRAWS, -1), uniforms, params(**chosen), seen)
    full = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0} | {
        k: v for k, v in chosen.items() if k != "presence_penalty"
    }
    expected = np.array(
        naive_distribution(
            logits.tolist(),
            penalised={0, 3, 7},
            penalty=chosen.get("presence_penalty", 0.0),
            **full,
        )
    )
    frequencies = np.bincount(tokens.numpy(), minlength=12) / DRAWS
    assert (frequencies[expected == 0] == 0).all()
    assert (
        np.abs(frequencies - expected)
        <= FREQUENCY_SIGMAS * np.sqrt(expected * (1 - expected) / DRAWS) + 1e-12
    ).all()
    loss_side = torch.log_softmax(logits / full["temperature"], dim=-1)[tokens]
    assert (logprobs - loss_side).abs().max() < LOGPROB_TOLERANCE


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.integers(-40, 40), min_size=2, max_size=30, unique=True),
    st.floats(0.3, 2.0),
    st.integers(0, 31),
    st.floats(0.05, 1.0),
    st.floats(0.0, 0.9),
)
@pytest.mark.medium
def test_the_set_that_can_be_drawn_is_the_naive_one(
    values: list[int], temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    logits = [value / 8 for value in values]
    expected = naive_distribution(logits, temperature, top_k, top_p, min_p, set(), 0.0)
    # One draw in the middle of every kept token's share, in the order in which shares are laid out,
    # must give that very token.
    chosen = params(temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    truncated = top_k > 0 or top_p < 1 or min_p > 0
    order = (
        sorted(range(len(logits)), key=lambda index: -logits[index])
        if truncated
        else range(len(logits))
    )
    kept = [index for index in order if expected[index] > 1e-9]
    middles = (
        np.cumsum([expected[index] for index in kept])
        - np.array([expected[index] for index in kept]) / 2
    )
    tokens, _ = choose_tokens(torch.tensor([logits] * len(kept)), torch.from_numpy(middles), chosen)
    assert tokens.tolist() == kept


def test_greedy_takes_the_largest_and_reports_temperature_one() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0], [5.0, 1.0, 4.9]])
    seen = torch.tensor([[False, True, False], [True, False, False]])
    tokens, logprobs = choose_tokens(logits, torch.zeros(2), params(0.0))
    assert tokens.tolist() == [1, 0]
    assert torch.allclose(logprobs, torch.log_softmax(logits, -1)[[0, 1], [1, 0]])
    assert choose_tokens(logits, torch.zeros(2), params(0.0, presence_penalty=1.5), seen)[
        0
    ].tolist() == [2, 2]


def test_tokens_without_probability_are_never_drawn() -> None:
    logits = torch.tensor([[-1e30, 0.0, -1e30, 0.0, -1e30]])
    for uniform, token in ((0.0, 1), (0.49, 1), (0.51, 3), (1 - 2**-53, 3)):
        assert (
            choose_tokens(logits, torch.tensor([uniform], dtype=torch.float64), params())[0].item()
            == token
        )


@pytest.mark.parametrize("chosen", [params(), params(0.0), params(top_k=2), params(top_p=0.9)])
def test_forbidden_tokens_are_never_drawn(chosen: SamplingParams) -> None:
    logits = torch.tensor([[9.0, 1.0, 8.0, 2.0]]).expand(200, -1)
    uniforms = torch.arange(200, dtype=torch.float64) / 200
    tokens, logprobs = choose_tokens(logits, uniforms, chosen, forbidden=torch.tensor([0, 2]))
    assert set(tokens.tolist()) <= {1, 3}
    assert torch.equal(
        logprobs, torch.log_softmax(logits, -1).gather(1, tokens[:, None]).squeeze(1)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "chosen",
    [
        params(),
        params(0.0),
        params(0.6),
        params(top_k=3),
        params(top_p=0.9),
        params(min_p=0.1, temperature=1.3),
        params(top_k=99),
    ],
)
@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("columns", [[0], [9], range(10), [2, 7]])
def test_nothing_is_drawn_from_logits_that_are_not_finite(
    dtype: torch.dtype, chosen: SamplingParams, wrong: float, columns: Sequence[int]
) -> None:
    """The rows beside stay what they are, whatever the number and position of the wrong logits; one
    of the columns is forbidden.
    """
    logits = (torch.randn(4, 10, generator=torch.Generator().manual_seed(2)) * 3).to(dtype)
    uniforms, forbidden = (
        torch.tensor([0.1, 0.4, 0.7, 0.999], dtype=torch.float64),
        torch.tensor([9]),
    )
    expected = choose_tokens(logits.float(), uniforms, chosen, forbidden=forbidden)
    poisoned = logits.clone()
    for row in (1, 3):
        poisoned[row, list(columns)] = wrong
    tokens, logprobs = choose_tokens(poisoned.float(), uniforms, chosen, forbidden=forbidden)
    assert tokens[[1, 3]].tolist() == [NO_TOKEN, NO_TOKEN]
    assert logprobs[[1, 3]].tolist() == [0.0, 0.0]
    assert torch.equal(tokens[[0, 2]], expected[0][[0, 2]])
    assert torch.equal(logprobs[[0, 2]], expected[1][[0, 2]])
    assert (expected[0] != NO_TOKEN).all()


@pytest.mark.parametrize("temperature", [1e-30, 1e-3, 0.5, 1.0, 1e30])
@pytest.mark.parametrize("scale", [1.0, 1e30, 3e38])
@pytest.mark.parametrize("truncated", [{}, {"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.3}])
def test_finite_logits_of_any_size_give_a_token_and_a_log_prob(
    temperature: float, scale: float, truncated: dict[str, float]
) -> None:
    logits = torch.tensor([[-1.0, 0.5, 1.0, -0.25]]) * scale
    for uniform in (1e-9, 0.5, 1 - 2**-53):
        drawn = torch.tensor([uniform], dtype=torch.float64)
        tokens, logprobs = choose_tokens(logits, drawn, params(temperature, **truncated))
        assert 0 <= tokens.item() < 4
        assert math.isfinite(logprobs.item())
        if scale / temperature >= 1e3:
            assert tokens.item() == 2
        # With the most likely token forbidden, another one is drawn, not the last one of the
        # vocabulary.
        tokens, _ = choose_tokens(
            logits, drawn, params(1.0, **truncated), forbidden=torch.tensor([2])
        )
        assert tokens.item() == 1 or scale == 1.0


def test_a_large_vocabulary_keeps_its_probabilities() -> None:
    # 248,320 equal tokens: the uniform u selects token floor(u * 248320); float32 sums would be off
    # by hundreds.
    size = 248_320
    uniforms = torch.tensor([0.1, 0.5, 0.9, 0.999], dtype=torch.float64)
    tokens, _ = choose_tokens(torch.zeros(4, size), uniforms, params())
    assert (tokens - (uniforms * size).long()).abs().max() <= 1
