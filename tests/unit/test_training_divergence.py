"""The Jensen-Shannon divergence and its gradient against the formula in float64; what merging may
and may not change.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zppo_mm.algorithms.divergence import TopTokens, jensen_shannon, top_jensen_shannon, top_tokens
from zppo_mm.experience import NO_TOKEN

# Float32 against float64: sums over 101 entries of differences of log-probs of up to 30.
TOLERANCE = 5e-6
# The mass of the other tokens is what a float32 sum leaves of 1: wrong by up to 6e-8, however small
# it is. 3e-5 was the most in 6,000 examples.
REST_TOLERANCE = 1e-4
ROWS, VOCABULARY = 23, 101


def example(seed: int = 0, spread: float = 5.0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = spread * torch.randn(2, ROWS, VOCABULARY, generator=generator)
    # Rows that agree, more or less and exactly.
    teacher[:5] = student[:5] + 0.1 * teacher[:5]
    teacher[5] = student[5]
    return student, teacher


def naive(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """Return the divergence of two tables of probabilities, `[rows]`."""
    m = (p + q) / 2
    return sum((torch.xlogy(a, a) - torch.xlogy(a, m)).sum(-1) for a in (p, q)) / 2  # type: ignore[return-value]


def with_rest(probabilities: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Return the probabilities of some tokens of every row, and what is left."""
    top = probabilities.gather(-1, ids)
    return torch.cat([top, probabilities.scatter(-1, ids, 0.0).sum(-1, keepdim=True)], -1)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("chunk_rows", [5, 1000])
def test_value_and_gradient_are_those_of_the_formula(temperature: float, chunk_rows: int) -> None:
    student, teacher = example()
    ours, plain = student.clone().requires_grad_(), student.double().requires_grad_()
    found = jensen_shannon(ours, teacher, temperature=temperature, chunk_rows=chunk_rows)
    p, q = (torch.softmax(logits / temperature, -1) for logits in (plain, teacher.double()))
    expected = naive(p, q)
    torch.testing.assert_close(found.jsd.double(), expected, atol=TOLERANCE, rtol=TOLERANCE)
    entropies = torch.distributions.Categorical(probs=p.detach()).entropy()
    torch.testing.assert_close(found.entropies.double(), entropies, atol=TOLERANCE, rtol=TOLERANCE)
    assert torch.equal(found.agreements.bool(), student.argmax(-1) == teacher.argmax(-1))
    assert 5 < found.agreements.sum() < ROWS
    weights = torch.linspace(-1, 2, ROWS)
    (found.jsd * weights).sum().backward()
    (expected * weights.double()).sum().backward()
    assert ours.grad is not None
    torch.testing.assert_close(ours.grad.double(), plain.grad, atol=TOLERANCE, rtol=0)
    assert torch.equal(ours.detach(), student)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("k", [1, 7, VOCABULARY])
def test_value_and_gradient_with_a_rest_are_those_of_the_formula(
    temperature: float, k: int
) -> None:
    student, teacher = example(1)
    top = top_tokens(teacher, k, temperature=temperature)
    ours, plain = student.clone().requires_grad_(), student.double().requires_grad_()
    found = top_jensen_shannon(ours, top, temperature=temperature, chunk_rows=5)
    p, q = (torch.softmax(logits / temperature, -1) for logits in (plain, teacher.double()))
    expected = naive(with_rest(p, top.ids), with_rest(q, top.ids))
    torch.testing.assert_close(found.jsd.double(), expected, atol=TOLERANCE, rtol=TOLERANCE)
    assert torch.equal(found.agreements.bool(), student.argmax(-1) == teacher.argmax(-1))
    weights = torch.linspace(-1, 2, ROWS)
    (found.jsd * weights).sum().backward()
    (expected * weights.double()).sum().backward()
    assert ours.grad is not None
    torch.testing.assert_close(ours.grad.double(), plain.grad, atol=TOLERANCE, rtol=0)


def test_top_tokens_are_those_of_the_softmax() -> None:
    _, teacher = example()
    top = top_tokens(teacher, 4, temperature=0.6)
    logprobs, ids = torch.log_softmax(teacher.double() / 0.6, -1).topk(4)
    assert torch.equal(top.ids, ids)
    torch.testing.assert_close(top.logprobs.double(), logprobs, atol=TOLERANCE, rtol=TOLERANCE)
    assert top_tokens(teacher, VOCABULARY + 9).ids.shape == (ROWS, VOCABULARY)


def test_numbers_by_hand() -> None:
    student, teacher = (
        torch.tensor([[0.5, 0.25, 0.25]]).log(),
        torch.tensor([[0.25, 0.75, 0.0]]).log(),
    )
    # m = 3/8, 1/2, 1/8.
    of_student = 0.5 * math.log(4 / 3) + 0.25 * math.log(1 / 2) + 0.25 * math.log(2)
    of_teacher = 0.25 * math.log(2 / 3) + 0.75 * math.log(3 / 2)
    expected = (of_student + of_teacher) / 2
    assert float(jensen_shannon(student, teacher).jsd) == pytest.approx(expected, abs=1e-6)
    # Reduced to token 1 and the rest: p = 1/4, 3/4; q = 3/4, 1/4; m = 1/2, 1/2.
    top = TopTokens(torch.tensor([[1, NO_TOKEN]]), torch.tensor([[math.log(0.75), math.nan]]))
    assert float(top_jensen_shannon(student, top).jsd) == pytest.approx(
        0.25 * math.log(1 / 2) + 0.75 * math.log(3 / 2), abs=1e-6
    )


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    spread=st.sampled_from([0.01, 1.0, 5.0, 40.0]),
    k=st.integers(1, VOCABULARY),
)
def test_merging_gives_a_lower_bound_that_grows_with_k_up_to_the_whole(
    seed: int, spread: float, k: int
) -> None:
    student, teacher = example(seed, spread)
    whole = jensen_shannon(student, teacher).jsd
    fewer, more, every = (
        top_jensen_shannon(student, top_tokens(teacher, n)).jsd for n in (k, k + 1, VOCABULARY)
    )
    assert (fewer <= more + REST_TOLERANCE).all()
    assert (more <= whole + REST_TOLERANCE).all()
    torch.testing.assert_close(every, whole, atol=TOLERANCE, rtol=0)
    assert (whole >= -TOLERANCE).all()
    assert (whole <= math.log(2) + TOLERANCE).all()
    torch.testing.assert_close(whole, jensen_shannon(teacher, student).jsd, atol=TOLERANCE, rtol=0)


def test_impossible_tokens_make_no_nan() -> None:
    student, teacher = example()
    student[:, :50] = -torch.inf
    teacher[:, 30:] = -torch.inf
    student[7], teacher[7] = -torch.inf, -torch.inf
    student[7, 3], teacher[7, 4] = 0.0, 0.0
    for values in (
        lambda logits: jensen_shannon(logits, teacher),
        lambda logits: top_jensen_shannon(logits, top_tokens(teacher, 40)),
    ):
        logits = student.clone().requires_grad_()
        found = values(logits)
        # They share no token at all.
        torch.testing.assert_close(
            found.jsd, torch.full((ROWS,), math.log(2)), atol=TOLERANCE, rtol=0
        )
        found.jsd.sum().backward()
        assert torch.isfinite(found.entropies).all()
        assert logits.grad is not None
        assert torch.isfinite(logits.grad).all()


def test_rows_without_top_tokens_say_nothing() -> None:
    student, teacher = example()
    ids, logprobs = top_tokens(teacher, 3)
    ids[::2] = NO_TOKEN
    student.requires_grad_()
    found = top_jensen_shannon(student, TopTokens(ids, logprobs))
    torch.testing.assert_close(found.jsd[::2], torch.zeros(12), atol=TOLERANCE, rtol=0)
    found.jsd.sum().backward()
    assert student.grad is not None
    torch.testing.assert_close(
        student.grad[::2], torch.zeros(12, VOCABULARY), atol=TOLERANCE, rtol=0
    )
    assert (student.grad[1::2].abs().sum(-1) > 0).all()


def test_no_rows_give_empty_results_and_a_zero_gradient() -> None:
    logits = torch.randn(4, 7, requires_grad=True)
    none = logits[:0]
    whole, top = jensen_shannon(none, none), top_jensen_shannon(none, top_tokens(none, 2))
    (whole.jsd.sum() + top.jsd.sum()).backward()
    assert whole.jsd.shape == top.jsd.shape == (0,)
    assert torch.equal(logits.grad, torch.zeros(4, 7))
