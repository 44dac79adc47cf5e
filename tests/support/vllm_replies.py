"""What vLLM's servers read and write for rollouts: media, continuations, and continuations that are
spoilt.
"""

from __future__ import annotations

import base64
import math
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tests.support.drawing_students import Asked, Logits

PASS = "pass"
FAULTS = (
    "reset", "half_body", "500", "503", "stall", "wrong_json", "no_choices", "not_a_reply",
    "missing_choice", "doubled_choice", "other_weights", "nan_logprob", "positive_logprob",
    "too_long", "short_logprobs", "foreign_token", "placeholder", "aborted", "short_span",
)  # fmt: skip


def media_of(features: Any) -> Mapping[str, list[tuple[int, dict[str, Any]]]]:
    """Return the media of a request, as vLLM would decode them."""
    if not features:
        return {}
    return {
        name: [
            (span["offset"], {key: each["data"] for key, each in unpack(item).items()})
            for span, item in zip(
                features["mm_placeholders"][name], features["kwargs_data"][name], strict=True
            )
        ]
        for name in features["mm_hashes"]
    }


def choice(
    index: int, ids: Sequence[int], logits: Logits, asked: Asked, version: str
) -> dict[str, Any]:
    """Return one continuation as vLLM writes it with `--logprobs-mode processed_logprobs`."""
    sampling = asked.sampling
    processed = logits.copy()
    for token, bias in asked.bias.items():
        processed[:, token] += bias
    processed /= sampling["temperature"] or 1.0
    top = processed.max(-1, keepdims=True)
    processed -= top + np.log(np.exp(processed - top).sum(-1, keepdims=True))
    content = []
    for row, token in zip(processed, ids, strict=True):
        listed = [token, *sampling.get("logprob_token_ids", [])][: 1 + sampling["logprobs"]]
        # vLLM sends nothing below this.
        named = [
            {"token_id": each, "logprob": max(float(row[each]), -9999.0)}
            for each in dict.fromkeys(listed)
        ]
        content.append(
            {**named[0], "rank": 1, "top_logprobs": named[: max(1, sampling["logprobs"])]}
        )
    return {
        "index": index,
        "token_ids": list(ids),
        "logprobs": {"content": content},
        "finish_reason": "stop" if ids[-1] in sampling["stop_token_ids"] else "length",
        "stop_reason": None,
        "weight_versions": [{"version": version, "start": 0, "end": len(ids)}],
    }


def spoil(fault: str, reply: dict[str, Any], request: dict[str, Any]) -> Any:
    """Return a reply with a fault in one of its continuations."""
    choices = reply["choices"]
    last = choices[-1]
    content = last["logprobs"]["content"]
    if fault == "no_choices":
        return {**reply, "choices": []}
    if fault == "not_a_reply":
        return {"object": "list", "data": []}
    if fault == "missing_choice":
        choices.pop()
    elif fault == "doubled_choice":
        choices.append(dict(last))
    elif fault == "other_weights":
        last["weight_versions"][0]["version"] = "another/1"
    elif fault == "short_span":
        last["weight_versions"][0]["end"] -= 1
    elif fault == "nan_logprob":
        content[-1]["logprob"] = math.nan
    elif fault == "positive_logprob":
        content[-1]["logprob"] = 0.5
    elif fault == "short_logprobs":
        content.pop()
    elif fault == "foreign_token":
        last["token_ids"][-1] = content[-1]["token_id"] = 10**6
    elif fault == "placeholder":
        placeholder = int(next(iter(request["sampling_params"]["logit_bias"])))
        last["token_ids"][-1] = content[-1]["token_id"] = placeholder
    elif fault == "too_long":
        # A token that does not stop, as often as is more than was asked for.
        more = request["sampling_params"]["max_tokens"]
        stops = request["sampling_params"]["stop_token_ids"]
        token = next(each for each in range(100) if each not in stops)
        last["token_ids"] = [token] * (more + 1)
        last["logprobs"]["content"] = [{**content[0], "token_id": token}] * (more + 1)
        last["weight_versions"][0]["end"] = more + 1
    elif fault == "aborted":
        last["finish_reason"] = "abort"
    return reply


def unpack(encoded: str) -> dict[str, Any]:
    """Return a medium's arguments with their tensors as arrays, read by the rules of msgpack."""
    value, _ = _unpack(base64.b64decode(encoded), 0)
    assert isinstance(value, dict)
    for entry in value.values():
        dtype, shape, (code, raw) = entry["data"]
        assert code == 3
        entry["data"] = np.frombuffer(raw, dtype).reshape(shape)
    return value


SIZED = {
    0xD9: ">B", 0xDA: ">H", 0xDB: ">I", 0xDC: ">H", 0xDD: ">I", 0xDE: ">H", 0xDF: ">I",
    0xC7: ">B", 0xC8: ">H", 0xC9: ">I",
}  # fmt: skip
NUMBERS = {
    0xCC: ">B", 0xCD: ">H", 0xCE: ">I", 0xCF: ">Q",
    0xD0: ">b", 0xD1: ">h", 0xD2: ">i", 0xD3: ">q",
}  # fmt: skip
CONSTANTS = {0xC0: None, 0xC2: False, 0xC3: True}


def _unpack(raw: bytes, at: int) -> tuple[Any, int]:
    tag, at = raw[at], at + 1
    if tag in CONSTANTS:
        return CONSTANTS[tag], at
    if tag < 0x80:
        return tag, at
    if tag in NUMBERS:
        (number,) = struct.unpack_from(NUMBERS[tag], raw, at)
        return number, at + struct.calcsize(NUMBERS[tag])
    if tag in SIZED:
        (size,) = struct.unpack_from(SIZED[tag], raw, at)
        at += struct.calcsize(SIZED[tag])
    else:
        size = tag & (0x1F if 0xA0 <= tag < 0xC0 else 0x0F)
    if tag in (0xC7, 0xC8, 0xC9):
        code = raw[at]
        return (code, raw[at + 1 : at + 1 + size]), at + 1 + size
    if tag in (0xD9, 0xDA, 0xDB) or 0xA0 <= tag < 0xC0:
        return raw[at : at + size].decode(), at + size
    is_map = tag in (0xDE, 0xDF) or 0x80 <= tag < 0x90
    values = []
    for _ in range(2 * size if is_map else size):
        value, at = _unpack(raw, at)
        values.append(value)
    return (dict(zip(values[::2], values[1::2], strict=True)) if is_map else values), at
