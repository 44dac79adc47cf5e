"""Token log-probs and entropies against the plain softmax."""

from __future__ import annotations

import pytest
import torch

from zppo_mm.algorithms.logprobs import token_statistics

# Float32 sums over 101 entries of size 5 in another order.
TOLERANCE = 5e-6
# The loss of the test weighs entropies by up to 300.
GRADIENT_TOLERANCE = 300 * TOLERANCE
TOKENS, VOCABULARY = 37, 101


def example() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = 5 * torch.randn(TOKENS, VOCABULARY, generator=generator)
    return logits, torch.randint(VOCABULARY, (TOKENS,), generator=generator)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("chunk_rows", [5, 1000])
def test_values_and_gradients_are_those_of_the_softmax(temperature: float, chunk_rows: int) -> None:
    logits, targets = example()
    ours, plain = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    logprobs, entropies = token_statistics(
        ours, targets, temperature=temperature, chunk_rows=chunk_rows
    )
    expected = torch.log_softmax(plain / temperature, -1)
    expected_logprobs = expected.gather(-1, targets[:, None]).squeeze(-1)
    expected_entropies = torch.distributions.Categorical(logits=plain / temperature).entropy()
    torch.testing.assert_close(logprobs, expected_logprobs, atol=TOLERANCE, rtol=TOLERANCE)
    torch.testing.assert_close(entropies, expected_entropies, atol=TOLERANCE, rtol=TOLERANCE)
    (logprobs.square().sum() + 3 * (entropies * targets).sum()).backward()
    (expected_logprobs.square().sum() + 3 * (expected_entropies * targets).sum()).backward()
    assert ours.grad is not None
    torch.testing.assert_close(ours.grad, plain.grad, atol=GRADIENT_TOLERANCE, rtol=0)
    assert torch.equal(ours.detach(), logits)


@pytest.mark.parametrize("field", ["logprobs", "entropies"])
def test_a_loss_may_use_one_of_the_two_alone(field: str) -> None:
    logits, targets = example()
    ours, plain = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    getattr(token_statistics(ours, targets), field).square().sum().backward()
    expected = torch.log_softmax(plain, -1)
    both = {
        "logprobs": expected.gather(-1, targets[:, None]).squeeze(-1),
        "entropies": -(expected.exp() * expected).sum(-1),
    }
    both[field].square().sum().backward()
    assert ours.grad is not None
    torch.testing.assert_close(ours.grad, plain.grad, atol=GRADIENT_TOLERANCE, rtol=0)


def test_a_large_shift_of_the_logits_changes_nothing() -> None:
    logits, targets = example()
    base = token_statistics(logits.double(), targets)
    shifted = token_statistics(logits.double() + 500.0, targets)
    # Float32 inside: 500 + 5 leaves about 3e-5 of resolution.
    torch.testing.assert_close(shifted.logprobs, base.logprobs, atol=2e-4, rtol=0)


def test_a_masked_vocabulary_entry_makes_no_nan() -> None:
    logits, targets = example()
    logits[:, VOCABULARY - 1] = -torch.inf
    logits.requires_grad_()
    logprobs, entropies = token_statistics(logits, targets.clamp(max=VOCABULARY - 2))
    (logprobs + entropies).sum().backward()
    assert torch.isfinite(logprobs).all()
    assert torch.isfinite(entropies).all()
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()


def test_no_rows_give_empty_results() -> None:
    logits = torch.randn(0, 7, requires_grad=True)
    logprobs, entropies = token_statistics(logits, torch.empty(0, dtype=torch.int64))
    (logprobs.sum() + entropies.sum()).backward()
    assert logprobs.shape == (0,)
    assert logits.grad is not None


def test_temperature_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="temperature above 0, got 0"):
        token_statistics(torch.zeros(1, 2), torch.tensor([1]), temperature=0)
