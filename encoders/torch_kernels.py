"""transformers' networks on torch's own formulas."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

_KERNEL_PACKAGES = ("fla", "causal_conv1d")


@contextmanager
def without_kernel_packages() -> Iterator[None]:
    """Keep kernel packages from being found inside the block; they are as before after it.

    transformers takes their kernels when a network's module is first imported, for good and for CPU
    tensors too, on which they fail. They are also less exact than what a network is compared with
    should be.
    """
    hidden = {name: sys.modules.get(name) for name in _KERNEL_PACKAGES}
    for name in hidden:
        sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        for name, module in hidden.items():
            if module is None:
                sys.modules.pop(name, None)
            else:
                sys.modules[name] = module


def import_on_torch(name: str) -> ModuleType:
    """Import a module of transformers that is computed with torch alone."""
    with without_kernel_packages():
        return importlib.import_module(name)
