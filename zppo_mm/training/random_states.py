"""The torch generators that a run draws from: the process's own, the GPU's, and megatron-core's
streams for dropout.
"""

from __future__ import annotations

import io
import logging
from typing import Any

import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker

from zppo_mm.parallel import groups as parallel

logger = logging.getLogger(__name__)
_NAMES = {"device", "torch", "streams"}


def gather_random_states() -> bytes:
    """Return the states of every rank, by rank, for a file; every rank calls it.

    numpy's streams are not among them: each is named by what it decides and starts from the seed
    (`zppo_mm.randomness`).
    """
    device = parallel.device()
    states: dict[str, Any] = {
        "device": device.type,
        "torch": torch.get_rng_state(),
        "streams": get_cuda_rng_tracker().get_states(),
    }
    if device.type == "cuda":
        # Dropout outside of megatron-core's streams, such as that of adapters, draws from here.
        states["cuda"] = torch.cuda.get_rng_state(device)
    buffer = io.BytesIO()
    torch.save(parallel.gather_from_ranks(states), buffer)
    return buffer.getvalue()


def read_random_states(content: bytes) -> list[dict[str, Any]]:
    """Return the states of all ranks, by rank, from what `gather_random_states` gave.

    Raises:
        ValueError: It is something else.
    """
    try:
        states = torch.load(io.BytesIO(content), weights_only=True)
    except Exception as error:
        # torch's unpickler raises what it pleases on other bytes, and refuses whatever would run
        # code.
        raise ValueError(" ".join(str(error).split())[:300]) from error
    if not isinstance(states, list) or not all(
        isinstance(each, dict) and set(each) >= _NAMES for each in states
    ):
        raise ValueError("no list of random states")
    return states


def restore_random_states(states: list[dict[str, Any]]) -> None:
    """Let the generators go on where they were; on other ranks or another kind of device they start
    from the seed, as nothing corresponds.

    Args:
        states: From `read_random_states`.
    """
    device = parallel.device()
    if len(states) != parallel.world_size() or states[parallel.rank()]["device"] != device.type:
        found, now = (
            f"{len(states)} {states[0]['device']} ranks",
            f"{parallel.world_size()} {device.type} ranks",
        )
        logger.info(
            "checkpoint: saved on %s, the dropout streams are seeded again on %s", found, now
        )
        return
    mine = states[parallel.rank()]
    torch.set_rng_state(mine["torch"])
    get_cuda_rng_tracker().set_states(mine["streams"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(mine["cuda"], device)
