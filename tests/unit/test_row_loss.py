"""Losses by chunks of rows against the logits of all rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from zppo_mm.algorithms.logprobs import token_statistics
from zppo_mm.algorithms.row_loss import MAX_CHUNK_LOGITS_GPU, MAX_PRODUCT_ELEMENTS_CPU, OutputRows

NUM_ROWS, HIDDEN, VOCABULARY = 37, 16, 53


def inputs(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    hidden = torch.randn(NUM_ROWS, HIDDEN, generator=random).to(dtype).requires_grad_()
    weight = torch.randn(VOCABULARY, HIDDEN, generator=random).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(VOCABULARY, (NUM_ROWS,), generator=random)


class Loss:
    """Weighted log-probs and entropies, and the sum of the entropies."""

    def __init__(self, targets: torch.Tensor) -> None:
        self.targets = targets
        self.weights = torch.linspace(-1, 2, len(targets))

    def __call__(self, logits: torch.Tensor, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        logprobs, entropies = token_statistics(logits, self.targets[rows])
        loss = (self.weights[rows] * logprobs + 0.1 * entropies).sum()
        return loss, torch.stack([entropies.detach().sum().double()])


@pytest.mark.parametrize("max_logits", [1, VOCABULARY * 8, 1 << 26])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    # A gradient of the weight sums over 37 rows; bfloat16 has 8 bits, and each chunk is rounded.
    [(torch.float32, 1e-5), (torch.bfloat16, 2**-6)],
)
def test_chunks_give_the_loss_and_gradient_of_all_rows(
    dtype: torch.dtype, tolerance: float, max_logits: int
) -> None:
    hidden, weight, targets = inputs(dtype)
    loss, sums = OutputRows(hidden, weight, max_logits).sum(Loss(targets))
    (3 * loss).backward()
    whole_hidden, whole_weight, _ = inputs(dtype)
    expected, expected_sums = Loss(targets)(
        OutputRows(whole_hidden, whole_weight).logits(slice(None)), slice(None)
    )
    (3 * expected).backward()
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    assert sums.tolist() == pytest.approx(expected_sums.tolist(), rel=1e-6)
    for ours, theirs in ((hidden.grad, whole_hidden.grad), (weight.grad, whole_weight.grad)):
        assert ours is not None
        assert theirs is not None
        assert ours.dtype == dtype
        scale = float(theirs.float().abs().max())
        assert float((ours.float() - theirs.float()).abs().max()) <= tolerance * scale


def test_without_rows_the_gradients_are_zero() -> None:
    hidden, weight, targets = inputs(torch.float32)
    loss, sums = OutputRows(hidden[:0], weight).sum(Loss(targets[:0]))
    loss.backward()
    assert (float(loss.detach()), sums.tolist()) == (0.0, [0.0])
    assert weight.grad is not None
    assert not weight.grad.any()


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_what_is_frozen_gets_no_gradient(frozen: str) -> None:
    hidden, weight, targets = inputs(torch.float32)
    named = {"hidden": hidden, "weight": weight}
    named[frozen].requires_grad_(False)
    loss, _ = OutputRows(hidden, weight, VOCABULARY).sum(Loss(targets))
    loss.backward()
    assert [name for name, tensor in named.items() if tensor.grad is None] == [frozen]


def test_without_gradient_the_sums_are_the_same() -> None:
    hidden, weight, targets = inputs(torch.float32)
    loss, sums = OutputRows(hidden, weight, VOCABULARY).sum(Loss(targets))
    with torch.no_grad():
        again, sums_again = OutputRows(hidden, weight, VOCABULARY).sum(Loss(targets))
    assert (float(again), sums_again.tolist()) == (float(loss.detach()), sums.tolist())
    assert not again.requires_grad


class LargestTensor(TorchDispatchMode):
    """Keeps the number of elements of the largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_tensor_holds_the_logits_of_all_rows(dtype: torch.dtype) -> None:
    hidden, weight, targets = inputs(dtype)
    with LargestTensor() as found:
        OutputRows(hidden, weight, 4 * VOCABULARY).sum(Loss(targets))[0].backward()
    # The gradient of the weight is the largest; logits of all rows would be 37 x 53.
    assert found.elements == VOCABULARY * HIDDEN < NUM_ROWS * VOCABULARY


def published_loss(logits: torch.Tensor, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
    targets = torch.zeros(len(logits), dtype=torch.int64, device="meta")
    logprobs, entropies = token_statistics(logits, targets)
    return logprobs.sum(), entropies.detach().sum()[None]


def test_published_shapes_have_half_a_gibibyte_of_logits_at_once() -> None:
    """A forward and a backward pass without data: 12,288 loss tokens, a vocabulary of 248,320."""
    tokens, vocabulary, width = 12288, 248320, 512
    hidden, weight = (
        torch.empty(rows, width, dtype=torch.bfloat16, device="meta", requires_grad=True)
        for rows in (tokens, vocabulary)
    )
    with LargestTensor() as found:
        OutputRows(hidden, weight).sum(published_loss)[0].backward()
    # Nothing else is larger: the gradient of a narrow weight is smaller than a chunk.
    assert vocabulary * width < found.elements <= MAX_CHUNK_LOGITS_GPU
    assert MAX_CHUNK_LOGITS_GPU * 4 == 1 << 29
    # All at once, in bfloat16, in float32 and their gradient: 10 bytes each.
    assert 10 * tokens * vocabulary == pytest.approx(30.5e9, rel=1e-3)


class LargestProduct(TorchDispatchMode):
    """Keeps the number of elements of the largest bfloat16 matrix that a product returns."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ == "mm" and result.dtype == torch.bfloat16:
            self.elements = max(self.elements, result.numel())
        return result


def test_in_bfloat16_the_gradient_of_a_large_weight_is_added_by_parts_that_stay_in_the_cache() -> (
    None
):
    # Ten parts and a last one of 24 rows; few rows, so that no product of logits is as large.
    width, vocabulary = MAX_PRODUCT_ELEMENTS_CPU // 128, 10 * 128 + 24
    random = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, width, generator=random).to(torch.bfloat16)
    weight = torch.zeros(vocabulary, width, dtype=torch.bfloat16, requires_grad=True)

    def weighted(logits: torch.Tensor, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        return ((logits + 1) * torch.arange(vocabulary)).sum(), logits.detach().sum()

    with LargestProduct() as found:
        OutputRows(hidden, weight).sum(weighted)[0].backward()
    assert found.elements == MAX_PRODUCT_ELEMENTS_CPU
    expected = torch.arange(vocabulary).bfloat16().float()[:, None] * hidden.float().sum(0)
    assert weight.grad is not None
    # Two roundings to 8 bits, of the product and of the gradient, next to a sum of three.
    assert torch.allclose(weight.grad.float(), expected, rtol=2**-6, atol=2.0)
