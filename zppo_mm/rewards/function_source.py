"""The files of reward functions, found without importing them, so that an edit is noticed."""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path


def source_file(name: str) -> Path | None:
    """Return the file of the module in `module:function` or `file.py:function`, `None` for one that
    is not found or has none.
    """
    source = name.rpartition(":")[0]
    if source.endswith(".py"):
        return _existing(Path(source))
    top, *inner = source.split(".")
    try:
        spec = importlib.util.find_spec(top)  # imports nothing, as it would for what is inside
    except ValueError:  # a module that was not imported in the usual way
        return None
    if spec is not None and not inner:
        return _existing(Path(spec.origin or ""))
    # Workers look last where they run.
    bases = [str(Path.cwd() / top)] if spec is None else spec.submodule_search_locations or ()
    paths = [Path(base, *inner) for base in bases]
    files = [file for path in paths for file in (path / "__init__.py", path.with_suffix(".py"))]
    return next(filter(Path.is_file, files), None)


def source_digest(name: str) -> str:
    """Return a digest of a function's own file, not of what it imports; empty without one."""
    file = source_file(name)
    return "" if file is None else hashlib.blake2b(file.read_bytes(), digest_size=8).hexdigest()


def _existing(path: Path) -> Path | None:
    return path if path.is_file() else None
