"""Stateless random streams: every draw follows from the run's seed and the name of what it decides.

Nothing has to be saved to resume: the same (seed, path) gives the same numbers on every rank,
layout and restart.
"""

from __future__ import annotations

import hashlib

import numpy as np


def generator(seed: int, *path: str | int) -> np.random.Generator:
    """Return the random generator that belongs to a named decision of the run.

    Args:
        seed: The run's seed.
        *path: What is decided, from coarse to fine, e.g. `("sample", step, uid, rollout)`.
    """
    digest = hashlib.blake2b(repr((seed, *path)).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))
