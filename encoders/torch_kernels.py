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
    # A module may be `None` already: so somebody else keeps it from being found.
    before = {name: sys.modules[name] for name in _KERNEL_PACKAGES if name in sys.modules}
    for name in _KERNEL_PACKAGES:
        sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        for name in _KERNEL_PACKAGES:
            sys.modules.pop(name, None)
        sys.modules.update(before)


def import_on_torch(name: str) -> ModuleType:
    """Import a module of transformers that is computed with torch alone."""
    with without_kernel_packages():
        return importlib.import_module(name)
