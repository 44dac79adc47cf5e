"""docs/algorithm.md names functions and options that exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from zppo_mm.config.schema import RunConfig
from zppo_mm.methods import METHODS

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "algorithm.md").read_text(encoding="utf-8")
MIN_NAMES = 25


def defined_names(module: Path) -> set[str]:
    names = set()
    for node in ast.parse(module.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            names.add(node.name)
            names |= {
                f"{node.name}.{inner.name}"
                for inner in node.body
                if isinstance(inner, ast.FunctionDef)
            }
            names |= {
                f"{node.name}.{ast.unparse(inner.target)}"
                for inner in node.body
                if isinstance(inner, ast.AnnAssign)
            }
        elif isinstance(node, ast.AnnAssign):
            names.add(ast.unparse(node.target))
    return names


def resolves(dotted: str) -> bool:
    parts = dotted.split(".")
    if ROOT.joinpath("zppo_mm", *parts).with_suffix(".py").is_file():
        return True
    for split in range(len(parts) - 1, 0, -1):
        module = ROOT.joinpath("zppo_mm", *parts[:split]).with_suffix(".py")
        if module.is_file() and ".".join(parts[split:]) in defined_names(module):
            return True
    value: object = RunConfig()
    for part in parts:
        if not hasattr(value, part):
            return False
        value = getattr(value, part)
    return True


def test_every_name_exists() -> None:
    names = {
        name
        for name in re.findall(r"`([a-z_]+(?:\.\w+)+)(?:\([^`]*\))?`", PAGE)
        if not name.endswith(".txt")
    }
    assert len(names) >= MIN_NAMES
    assert [name for name in sorted(names) if not resolves(name)] == []
    assert not resolves("zone.hard.no_such_function")


def test_every_method_is_in_the_table() -> None:
    assert [method for method in METHODS if f"`{method}`" not in PAGE] == []
