"""Lets megatron-core run where there is no GPU. Does nothing where CUDA is available.

megatron-core asks CUDA for devices, random states and tensor type names even when every tensor is
on the CPU. Each patch below is one function with the caller that needs it; `install` applies them
all, once, and only on a machine without CUDA. What a configuration flag can do is not patched:
models are built with `use_cpu_initialization=True` and without fusions.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.jit._builtins as torch_builtins
import torch.utils._device as torch_device

_CPU = torch.device("cpu")
_FACTORIES = (
    "zeros",
    "ones",
    "empty",
    "full",
    "tensor",
    "arange",
    "rand",
    "randn",
    "randint",
    "zeros_like",
    "ones_like",
    "empty_like",
)
_CUDA_TYPE_NAMES = {
    torch.float32: "torch.cuda.FloatTensor",
    torch.float16: "torch.cuda.HalfTensor",
    torch.bfloat16: "torch.cuda.BFloat16Tensor",
}
_TYPE_READERS = "megatron.core.optimizer"


def leave_uncompiled() -> None:
    """`torch.compile` returns the plain function. Must come before megatron-core's first import.

    megatron-core decorates its small fused functions with it at import; on a CPU each new shape
    would cost seconds of C++ compilation, and the compiler alone a second of every process's start.
    """
    if not torch.cuda.is_available():
        torch.compile = _uncompiled


def install() -> bool:
    """Apply every patch, once. Calling it again, or with CUDA at hand, changes nothing.

    Returns:
        Whether the patches are in place after the call.
    """
    if torch.cuda.is_available():
        return False
    answer: object = torch.cuda.current_device
    if answer is _current_device:
        return True
    _patch_device()
    _patch_factories()
    _patch_tensor_type()
    _patch_random_states()
    return True


def _uncompiled(model: Any = None, **_: object) -> Any:
    return _itself if model is None else model


def _itself(function: Any) -> Any:
    return function


def _current_device() -> torch.device:
    return _CPU


def _no_synchronize(*_: object, **__: object) -> None:
    return None


def _stay(tensor: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
    return tensor


def _patch_device() -> None:
    """`torch.cuda` answers with the CPU's device and stream, `synchronize` returns at once,
    `Tensor.cuda` returns the tensor itself.

    The device is asked for by rotary tables, gradient buffers, tensor-parallel mappings and
    pipeline messages, the stream from 0.19 on by every reduction of gradients; the pipeline's
    variable-length messages and the checkpoint writer synchronize unconditionally; a tied embedding
    is moved while pipeline stages are built.
    """
    tensor: Any = torch.Tensor
    tensor.cuda = _stay
    cuda: Any = torch.cuda
    cuda.current_device = _current_device
    cuda.current_stream = torch.cpu.current_stream
    cuda.synchronize = _no_synchronize


def _patch_factories() -> None:
    """Factories asked for a CUDA or pinned tensor give a plain CPU tensor.

    Needed by gradient clipping, the optimizer's overflow flags and the schedules' token counters,
    which name `device="cuda"` literally.
    """
    # `with torch.device(...)` remembers the factories it finds at its first use. Finding ours, it
    # would ignore the real ones, and models that transformers loads later would silently keep
    # uninitialised rotary tables.
    torch_device._device_constructors()
    builtins: Any = torch_builtins
    for name in _FACTORIES:
        factory = getattr(torch, name)
        patched = _on_cpu(factory)
        # TorchScript knows torch's functions by their identity, pickle by their place.
        if (operator := builtins._find_builtin(factory)) is not None:
            builtins._register_builtin(patched, operator)
        patched.__module__, patched.__qualname__ = torch.__name__, name
        setattr(torch, name, patched)


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(factory)
    def make(*args: Any, **kwargs: Any) -> torch.Tensor:
        device = kwargs.get("device")
        # An integer device is a CUDA ordinal to torch; only strings and devices are handled, as
        # only those occur.
        if (
            device is not None
            and not isinstance(device, int)
            and torch.device(device).type == "cuda"
        ):
            kwargs["device"] = _CPU
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return make


def _patch_tensor_type() -> None:
    """`Tensor.type()` names the CUDA type, to megatron-core's optimizers alone.

    They sort parameters and gradients by these names and refuse any other. Everyone else keeps the
    true answer.
    """
    original = torch.Tensor.type

    def type_name(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if not args and not kwargs and self.dtype in _CUDA_TYPE_NAMES:
            caller = sys._getframe(1).f_globals.get("__name__", "")
            if caller.startswith(_TYPE_READERS):
                return _CUDA_TYPE_NAMES[self.dtype]
        return original(self, *args, **kwargs)

    tensor: Any = torch.Tensor
    tensor.type = type_name


def _patch_random_states() -> None:
    """The model-parallel random streams live in the CPU generator.

    Needed by `model_parallel_cuda_manual_seed`, by dropout in attention and by activation
    recomputation.
    """
    import megatron.core.tensor_parallel.random as streams

    class CpuStreams(streams.CudaRNGStatesTracker):  # type: ignore[misc]
        """Named random streams, kept as states of the CPU generator."""

        def add(self, name: str, seed: int) -> None:
            """Start the stream `name` from `seed`."""
            assert name not in self.states_, (
                f"megatron_cpu: the random stream {name!r} was added twice"
            )
            self._is_initialized = True
            self.seeds_.add(seed)
            self.states_[name] = torch.Generator().manual_seed(seed).get_state()

        @contextlib.contextmanager
        def fork(self, name: str = "model-parallel-rng") -> Iterator[None]:
            """Draw from the stream `name` inside the block, from the previous one again after
            it.
            """
            previous = torch.get_rng_state()
            torch.set_rng_state(self.states_[name])
            try:
                yield
            finally:
                self.states_[name] = torch.get_rng_state()
                torch.set_rng_state(previous)

    def get_state(*_: object, **__: object) -> torch.Tensor:
        return torch.get_rng_state()

    def set_state(state: torch.Tensor, *_: object, **__: object) -> None:
        torch.set_rng_state(state)

    def no_seed(_: int) -> None:
        """The default stream is the CPU generator, which `torch.manual_seed` already seeds."""

    module: Any = streams
    module.CudaRNGStatesTracker = CpuStreams
    module._get_cuda_rng_state = get_state
    module._set_cuda_rng_state = set_state
    cuda: Any = torch.cuda
    cuda.manual_seed = no_seed
