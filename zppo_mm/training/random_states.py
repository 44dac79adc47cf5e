"""The torch generators that a run draws from: the process's own, the GPU's, and megatron-core's streams for dropout."""

from __future__ import annotations

import io
import logging
from typing import Any

import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker

from zppo_mm.models import parallel

logger = logging.getLogger(__name__)


def gather_random_states() -> bytes:
    """Return the states of every rank, by rank, for a file; every rank calls it.

    numpy's streams are not among them: each is named by what it decides and starts from the seed (`zppo_mm.randomness`).
    """
    device = parallel.device()
    states: dict[str, Any] = {"device": device.type, "torch": torch.get_rng_state(), "streams": get_cuda_rng_tracker().get_states()}
    if device.type == "cuda":
        # Dropout outside of megatron-core's streams, such as that of adapters, draws from here.
        states["cuda"] = torch.cuda.get_rng_state(device)
    box = io.BytesIO()
    torch.save(parallel.gather_from_ranks(states), box)
    return box.getvalue()


def restore_random_states(content: bytes) -> None:
    """Let the generators go on where they were; on other ranks or another kind of device they start from the seed, as nothing corresponds.

    Args:
        content: From `gather_random_states`.
    """
    device = parallel.device()
    states = torch.load(io.BytesIO(content), weights_only=True)
    if len(states) != parallel.world_size() or states[parallel.rank()]["device"] != device.type:
        found, now = f"{len(states)} {states[0]['device']} ranks", f"{parallel.world_size()} {device.type} ranks"
        logger.info("checkpoint: saved on %s, the dropout streams start anew on %s", found, now)
        return
    mine = states[parallel.rank()]
    torch.set_rng_state(mine["torch"])
    get_cuda_rng_tracker().set_states(mine["streams"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(mine["cuda"], device)
