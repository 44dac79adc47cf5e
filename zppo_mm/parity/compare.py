"""Log-probs of the same tokens by two computations: how far apart they are, and what a person is
reported when that is too far.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from zppo_mm.errors import ZppoError
from zppo_mm.experience import FloatArray, IntArray

Array = npt.NDArray[np.float64]
Side = Literal["rollout", "source"]
SIDES: tuple[Side, ...] = ("rollout", "source")
NAMES: dict[Side, str] = {"rollout": "sampling", "source": "the source checkpoint in transformers"}
ADVICE: dict[Side, str] = {
    "rollout": (
        "the engine and the training forward pass compute different networks; try "
        "model.transformer_impl=local and one rank to see which layout or kernel is to blame"
    ),
    "source": (
        "the network is not the one of the folder; try model.transformer_impl=local and one rank, "
        "and download the folder again if the gap stays"
    ),
}


class ParityError(ZppoError):
    """Two computations that must agree do not, or a medium was lost on the way."""


@dataclass(frozen=True, slots=True)
class Limit:
    """How far apart log-probs may be.

    In float32 both sides compute the same sums in another order, so every single token is held to a
    small bound. In bfloat16 a logit of size 16 is stored in steps of 0.125: single tokens differ in
    a correct network, in both directions. Their divergence grows with the square of the difference,
    so it forgives many small ones and sees a few large ones, which a mean of distances would bury
    among the tokens that are certain either way. A spread of 0.1 nats gives 0.005; the bundled
    student in bfloat16 has less than 0.0001, and 0.008 or more when the features of its media are
    zero.

    Attributes:
        key: Configuration key that sets it.
        value: In nats.
        of_divergence: Whether it holds for the divergence over a modality's tokens instead of for
            the distance of every token.
    """

    key: str
    value: float
    of_divergence: bool


@dataclass(frozen=True, slots=True)
class Response:
    """One sampled response and its log-probs by the computations, each `[response]` at the sampling
    temperature.

    Attributes:
        modality: Of its question.
        question_id: Its question.
        token_ids: `[response]`.
        training: By the training forward pass.
        rollout: By the engine that sampled it.
        source: By the source checkpoint; `None` where it was not compared.
    """

    modality: str
    question_id: str
    token_ids: IntArray
    training: FloatArray
    rollout: FloatArray
    source: FloatArray | None = None

    def other(self, side: Side) -> FloatArray | None:
        """Return what the training forward pass is compared with."""
        return self.rollout if side == "rollout" else self.source


@dataclass(frozen=True, slots=True)
class Gap:
    """Distance between two computations over the tokens of a modality, in nats.

    Attributes:
        num_tokens: Tokens compared.
        max: Largest absolute difference of a token's log-probs.
        mean: Mean absolute difference.
        kl: Estimate of the divergence per token, see `divergences`.
    """

    num_tokens: int
    max: float
    mean: float
    kl: float

    def exceeds(self, limit: Limit) -> bool:
        """Return whether it is above the limit; a gap that is not a number is."""
        return not (self.kl if limit.of_divergence else self.max) <= limit.value


def measure(responses: Sequence[Response], side: Side) -> Gap | None:
    """Return the gap between the training forward pass and one other computation; `None` if nothing
    was compared.
    """
    pairs = [
        (response.training, values)
        for response in responses
        if (values := response.other(side)) is not None
    ]
    if not pairs:
        return None
    training = np.concatenate([values for values, _ in pairs]).astype(np.float64)
    other = np.concatenate([values for _, values in pairs]).astype(np.float64)
    distances = np.abs(training - other)
    return Gap(
        len(distances),
        float(distances.max()),
        float(distances.mean()),
        float(divergences(training, other, side).mean()),
    )


def divergences(training: Array, other: Array, side: Side) -> Array:
    """Return r - 1 - log r per token, with r the ratio of the further computation's probability to
    that of the one nearer to the draw.

    Never negative; over tokens that the nearer one drew, its mean is the divergence of the further
    from the nearer one in expectation. The engine draws, the training forward pass computes the
    same weights, the source checkpoint is furthest.

    Args:
        training: `[tokens]` log-probs by the training forward pass.
        other: `[tokens]` log-probs by the other computation.
        side: Which one that is.
    """
    log_ratio = training - other if side == "rollout" else other - training
    # Above this a float64 overflows, and any limit is exceeded.
    return np.exp(np.minimum(log_ratio, 700.0)) - 1 - log_ratio


def describe_gap(
    responses: Sequence[Response],
    side: Side,
    gap: Gap,
    limit: Limit,
    decode: Callable[[Sequence[int]], str],
) -> str:
    """Return what disagrees, and where first.

    Args:
        responses: Of one modality.
        side: What the training forward pass was compared with.
        gap: Their gap, above the limit.
        limit: The limit.
        decode: Gives the text of token ids.
    """
    response, index = _first_above(responses, side, limit)
    other = response.other(side)
    assert other is not None, "only compared responses are searched"
    token = int(response.token_ids[index])
    kind, value = ("divergence", gap.kl) if limit.of_divergence else ("largest gap", gap.max)
    return (
        f"parity: {response.modality}: {NAMES[side]} and the training forward pass disagree, got a "
        f"{kind} of {value:.3g} nats over {gap.num_tokens} tokens, expected at most "
        f"{limit.value:g} ({limit.key}); first at question {response.question_id!r}, token {index} "
        f"of the response (id {token}, {decode([token])!r}): log-prob {other[index]:.5f} by "
        f"{NAMES[side]}, {response.training[index]:.5f} in training; {ADVICE[side]}; "
        "parity.mode=warn goes on all the same"
    )


def _first_above(responses: Sequence[Response], side: Side, limit: Limit) -> tuple[Response, int]:
    """Return the first token above the limit; where the mean of divergences exceeds it, at least
    one of them does too.
    """
    for response in responses:
        other = response.other(side)
        if other is None:
            continue
        training, values = response.training.astype(np.float64), other.astype(np.float64)
        sizes = (
            divergences(training, values, side)
            if limit.of_divergence
            else np.abs(training - values)
        )
        above = np.flatnonzero(~(sizes <= limit.value))
        if len(above):
            return response, int(above[0])
    raise AssertionError("a gap above the limit has a token above it")
