"""Optimizer state and gradient buffers off the GPU while nothing is updated."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from zppo_mm.training.optimizer_state import parameter_shards


class OptimizerOffload:
    """Moves the optimizer state to host memory and back, and frees the gradient buffers.

    Storages are emptied and filled again, so every view of them, megatron-core's among them, stays
    what it was. megatron-core's own `offload_to_cpu` gives parameters new memory instead, which
    cuts float32 weights off from their network, and its host memory is not pinned.

    Host memory is kept, as large as this rank's part of the state: pinning takes longer than
    copying.

    Args:
        wrapped: From `wrap_model`.
        optimizer: From `build_optimizer`, its state on the device.
    """

    def __init__(self, wrapped: Any, optimizer: Any) -> None:
        self._optimizer = optimizer
        gradients = [buffer.grad_data.untyped_storage() for buffer in wrapped.buffers]
        self._gradients = {storage: storage.nbytes() for storage in gradients}
        self._host: list[torch.Tensor] = []
        self._away: list[torch.UntypedStorage] = []
        self._leave()

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """Have the state on the device inside the block; gradient buffers are zero at its start."""
        self._come_back()
        try:
            yield
        finally:
            self._leave()

    def _leave(self) -> None:
        storages = self._storages()
        for position, storage in enumerate(storages):
            if position == len(self._host):
                self._host.append(_host_memory(storage))
            elif self._host[position].nbytes != storage.nbytes():
                # An update that failed has left moments in float32, and its error is the one to
                # see.
                self._host[position] = _host_memory(storage)
            self._host[position].copy_(_bytes_of(storage), non_blocking=True)
        torch.cuda.synchronize()  # what is still being copied must not be freed
        self._away = storages
        for storage in (*storages, *self._gradients):
            storage.resize_(0)
        torch.cuda.empty_cache()

    def _come_back(self) -> None:
        for storage, host in zip(self._away, self._host, strict=True):
            storage.resize_(host.nbytes)
            _bytes_of(storage).copy_(host, non_blocking=True)
        self._away = []
        for storage, size in self._gradients.items():
            storage.resize_(size)
            _bytes_of(storage).zero_()

    def _storages(self) -> list[torch.UntypedStorage]:
        """Return the memory of the state, each once, always in the same order."""
        tensors = [
            tensor
            for shard in parameter_shards(self._optimizer)
            for tensor in shard.tensors().values()
        ]
        storages = [tensor.untyped_storage() for tensor in tensors]
        return list({storage.data_ptr(): storage for storage in storages}.values())


def _bytes_of(storage: torch.UntypedStorage) -> torch.Tensor:
    """Return a view `[bytes]` of a storage."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _host_memory(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(
        storage.nbytes(), dtype=torch.uint8, pin_memory=storage.device.type == "cuda"
    )
