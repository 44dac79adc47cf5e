"""Continuations as the bytes of a file: 8 bytes a token, and little else."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence

import numpy as np

from zppo_mm.experience import VersionSpan
from zppo_mm.rollout.engine import Generation

_NUM_COLUMNS = 5


def to_bytes(groups: Mapping[str, Sequence[Generation]]) -> bytes:
    """Return the continuations of prompts, by uid, as a NumPy archive without Python objects."""
    flat = [each for group in groups.values() for each in group]
    rows = [
        (
            len(each.response_ids),
            len(each.versions),
            each.finish_reason == "stop",
            each.is_broken,
            each.num_preemptions,
        )
        for each in flat
    ]
    spans = [(span.version, span.num_tokens) for each in flat for span in each.versions]
    ids = [each.response_ids.astype(np.int32) for each in flat]
    logprobs = [each.rollout_logprobs.astype(np.float32) for each in flat]
    file = io.BytesIO()
    np.savez(
        file,
        uids=np.frombuffer(json.dumps(list(groups)).encode(), dtype=np.uint8),
        num_rollouts=np.array([len(group) for group in groups.values()], dtype=np.int32),
        rows=np.array(rows, dtype=np.int32).reshape(-1, _NUM_COLUMNS),
        spans=np.array(spans, dtype=np.int32).reshape(-1, 2),
        response_ids=np.concatenate([np.zeros(0, np.int32), *ids]),
        rollout_logprobs=np.concatenate([np.zeros(0, np.float32), *logprobs]),
    )
    return file.getvalue()


def from_bytes(content: bytes) -> dict[str, list[Generation]]:
    """Return what `to_bytes` was given.

    Raises:
        ValueError: It is something else.
        KeyError: Something is missing.
    """
    with np.load(io.BytesIO(content), allow_pickle=False) as archive:
        arrays = {name: archive[name] for name in archive.files}
    ids = arrays["response_ids"].astype(np.int64)
    logprobs = arrays["rollout_logprobs"]
    spans = [VersionSpan(version, num_tokens) for version, num_tokens in arrays["spans"].tolist()]
    flat, token, span = [], 0, 0
    for num_tokens, num_spans, is_stop, is_broken, num_preemptions in arrays["rows"].tolist():
        flat.append(
            Generation(
                ids[token : token + num_tokens],
                logprobs[token : token + num_tokens],
                "stop" if is_stop else "length",
                bool(is_broken),
                num_preemptions,
                tuple(spans[span : span + num_spans]),
            )
        )
        token, span = token + num_tokens, span + num_spans
    groups, first = {}, 0
    uids = json.loads(arrays["uids"].tobytes())
    for uid, num_rollouts in zip(uids, arrays["num_rollouts"].tolist(), strict=True):
        groups[uid] = flat[first : first + num_rollouts]
        first += num_rollouts
    return groups
