"""Reads a vLLM server's continuations, and says what is wrong with them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from zppo_mm.experience import FinishReason, FloatArray, IntArray
from zppo_mm.rollout.engine import MAX_LOGPROB, Generation, VersionSpan
from zppo_mm.serving.fault import Fault
from zppo_mm.serving.received_text import ReceivedText

NOT_A_NUMBER = -9999.0
"""What vLLM sends for a log-prob that is NaN or minus infinity."""
STARTED_WITH = "default"
"""What vLLM calls the weights that it was started with (`v1/engine/core.py`)."""
ENDED = ("stop", "length")
OTHER_WEIGHTS = "other_weights"
"""Kind of the fault that other weights than the step's drew a continuation."""
PAUSE_SECONDS = 1.0
"""For a server that has other weights: it may be about to get them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """What a usable reply holds.

    Attributes:
        num_rollouts: Continuations, all of which come or none counts.
        max_new_tokens: Longest one.
        stop_token_ids: Any of these ends one and belongs to it.
        forbidden_ids: Never drawn; their log-probs come with every token.
        vocabulary: Tokens that the network has.
        forbidden_bias: Added to the scaled logits of what is forbidden.
        run: Names the run in the versions; empty expects the weights that the server was started
            with.
        versions: Those whose weights may have drawn.
    """

    num_rollouts: int
    max_new_tokens: int
    stop_token_ids: tuple[int, ...]
    forbidden_ids: tuple[int, ...]
    vocabulary: int
    forbidden_bias: float
    run: str
    versions: range


def parse_reply(body: bytes, expected: Expected, received: ReceivedText) -> tuple[Generation, ...]:
    """Read the continuations of one prompt, in the order of their index.

    Args:
        body: The whole response.
        expected: What was asked for.
        received: Makes its texts fit to be shown.

    Raises:
        Fault: It is not what was asked for (`bad_reply`), a continuation was neither ended by a
            stop token nor by the limit (`unfinished`), the server's own limit cut it
            (`cut_by_server`), or other weights drew it (`other_weights`).
    """
    try:
        choices = _listed(json.loads(body)["choices"])
        by_index = {_integer(choice["index"]): choice for choice in choices}
        if len(choices) != expected.num_rollouts or sorted(by_index) != list(range(len(choices))):
            indices = [choice["index"] for choice in choices][: expected.num_rollouts + 1]
            raise ValueError(
                f"the choices {indices}, expected each of {expected.num_rollouts} once"
            )
        return tuple(_generation(by_index[index], expected) for index in sorted(by_index))
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        what = f"{type(error).__name__}: {received.shown(str(error))}"
        raise Fault(
            "bad_reply", f"not the continuations asked for ({what}), got {received.shown(body)!r}"
        ) from error


def _generation(choice: Mapping[str, Any], expected: Expected) -> Generation:
    reason = choice.get("finish_reason")
    if reason not in ENDED:
        raise Fault("unfinished", f"finish_reason {str(reason)[:40]!r}, expected one of {ENDED}")
    ids = _token_ids(choice["token_ids"], expected)
    finish_reason = _finish_reason(ids, expected)
    content = _listed(choice["logprobs"]["content"])
    if len(content) != len(ids):
        raise ValueError(f"{len(content)} log-probs of {len(ids)} tokens")
    logprobs = _logprobs(ids, content, expected)
    versions: tuple[VersionSpan, ...] = ()
    if expected.run:
        versions = _spans(choice["weight_versions"], len(ids), expected)
    else:
        _check_unchanged(choice.get("weight_versions"))
    return Generation(ids, logprobs, finish_reason, versions=versions)


def _token_ids(listed: Any, expected: Expected) -> IntArray:
    ids = [_integer(token) for token in _listed(listed)]
    if not 0 < len(ids) <= expected.max_new_tokens:
        raise ValueError(f"{len(ids)} tokens, expected 1 to {expected.max_new_tokens}")
    if not 0 <= min(ids) <= max(ids) < expected.vocabulary:
        raise ValueError(f"tokens {min(ids)} to {max(ids)}, expected 0 to {expected.vocabulary}")
    if not set(expected.forbidden_ids).isdisjoint(ids):
        raise ValueError("a token that is never to be drawn")
    return np.array(ids, dtype=np.int64)


def _finish_reason(ids: IntArray, expected: Expected) -> FinishReason:
    """Return how a continuation ended, which its tokens say; the server's limit of a sequence must
    not have cut it.
    """
    stops = np.isin(ids, expected.stop_token_ids)
    if stops[:-1].any():
        raise ValueError("tokens after a stop token")
    if stops[-1]:
        return "stop"
    if len(ids) != expected.max_new_tokens:
        raise Fault(
            "cut_by_server",
            f"{len(ids)} tokens without a stop token, expected {expected.max_new_tokens}; the "
            "server's --max-model-len may be too small",
            # The same request is cut at the same place.
            is_refusal=True,
        )
    return "length"


def _logprobs(
    ids: IntArray, content: Sequence[Mapping[str, Any]], expected: Expected
) -> FloatArray:
    """Return log-probs of the whole distribution, `[response]`.

    The server's are those under the bias, which takes the forbidden tokens out of the sum that the
    others are divided by. Their own log-probs under the bias say how much it was.
    """
    own = np.array([_own_logprob(*pair) for pair in zip(ids.tolist(), content, strict=True)])
    if not expected.forbidden_ids:
        return own.astype(np.float32)
    listed = np.array([_listed_logprobs(each, expected.forbidden_ids) for each in content])
    taken = np.logaddexp.reduce(listed - expected.forbidden_bias, axis=1)
    whole: FloatArray = (own - np.logaddexp(0.0, taken)).astype(np.float32)
    return whole


def _own_logprob(token: int, entry: Mapping[str, Any]) -> float:
    if _integer(entry["token_id"]) != token:
        raise ValueError(f"the log-prob of token {entry['token_id']} for token {token}")
    value = _number(entry["logprob"])
    # The network is broken there, as the sampler will find.
    return math.nan if value <= NOT_A_NUMBER else value


def _listed_logprobs(entry: Mapping[str, Any], wanted: Sequence[int]) -> list[float]:
    by_token = {
        _integer(each["token_id"]): _number(each["logprob"])
        for each in _listed(entry["top_logprobs"])
    }
    return [by_token[token] for token in wanted]


def _spans(listed: Any, length: int, expected: Expected) -> tuple[VersionSpan, ...]:
    """Return which weights drew which tokens; the spans must cover them all, in order."""
    spans: list[VersionSpan] = []
    end = 0
    for each in _listed(listed):
        start, stop = _integer(each["start"]), _integer(each["end"])
        if start != end or stop <= start:
            raise ValueError(f"a span of weights from {start} to {stop}, expected it from {end}")
        spans.append(VersionSpan(_version(each["version"], expected), stop - start))
        end = stop
    if end != length:
        raise ValueError(f"spans of weights of {end} tokens, expected {length}")
    return tuple(spans)


def _check_unchanged(listed: Any) -> None:
    """Check that the weights are those that the server was started with, if it says which."""
    for each in _listed(listed) if listed is not None else []:
        version = _text(each["version"])
        if version != STARTED_WITH:
            raise Fault(
                OTHER_WEIGHTS,
                f"drawn with weights {version[:80]!r}, which a training run has sent, expected "
                f"{STARTED_WITH!r}, those of the folder; start the server again",
                is_refusal=True,
            )


def version_text(run: str, version: int) -> str:
    """Return the name of a step's weights at a server."""
    return f"{run}/{version}"


def _version(text: Any, expected: Expected) -> int:
    name, _, number = _text(text).rpartition("/")
    version = int(number) if name == expected.run and number.isdecimal() else -1
    if version not in expected.versions:
        raise Fault(
            OTHER_WEIGHTS,
            f"drawn with weights {text[:80]!r}, expected {expected.run}/{expected.versions}",
            retry_after_seconds=PAUSE_SECONDS,
        )
    return version


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"got {type(value).__name__}, expected str")
    return value


def _listed(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise TypeError(f"got {type(value).__name__}, expected list")
    return value


def _integer(value: Any) -> int:
    if type(value) is not int:
        raise TypeError(f"got {type(value).__name__}, expected int")
    return value


def _number(value: Any) -> float:
    """Return a finite log-prob."""
    if type(value) not in (int, float) or not -math.inf < value <= MAX_LOGPROB:
        raise ValueError(f"the log-prob {str(value)[:40]}, expected a number of at most 0")
    return float(value)
