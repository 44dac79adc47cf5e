"""Sizes and manners that no linter checks."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("data", "encoders", "zppo_mm")
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
MAX_TYPICAL_FUNCTION_LINES = 40
TYPICAL_FRACTION = 0.9
FORBIDDEN_NAMES = {"utils", "misc", "helpers", "common", "util", "helper", *sys.stdlib_module_names}


def sources(*folders: str) -> Iterator[Path]:
    for folder in folders:
        yield from sorted((ROOT / folder).rglob("*.py"))


def functions(path: Path) -> Iterator[tuple[str, int]]:
    """Yield name and line count of every function, its docstring and decorators left out."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            documented = ast.get_docstring(node, clean=False) is not None
            docstring = node.body[0].end_lineno - node.body[0].lineno + 1 if documented else 0  # type: ignore[operator]
            yield (
                f"{path.relative_to(ROOT)}:{node.lineno} {node.name}",
                node.end_lineno - node.lineno + 1 - docstring,
            )  # type: ignore[operator]


@pytest.mark.parametrize("folder", [*PACKAGES, "tools", "tests", "benchmarks"])
def test_no_file_is_longer_than_the_limit(folder: str) -> None:
    long = {
        str(path.relative_to(ROOT)): lines
        for path in sources(folder)
        if (lines := len(path.read_text().splitlines())) > MAX_FILE_LINES
    }
    assert long == {}


def test_no_function_is_longer_than_the_limit() -> None:
    long = {
        name: lines
        for path in sources(*PACKAGES, "tools")
        for name, lines in functions(path)
        if lines > MAX_FUNCTION_LINES
    }
    assert long == {}


def test_nine_functions_in_ten_are_short() -> None:
    lengths = [lines for path in sources(*PACKAGES) for _, lines in functions(path)]
    assert sum(
        length <= MAX_TYPICAL_FUNCTION_LINES for length in lengths
    ) >= TYPICAL_FRACTION * len(lengths)


def test_no_module_has_a_forbidden_name() -> None:
    paths = list(sources(*PACKAGES, "tools"))
    assert [str(path.relative_to(ROOT)) for path in paths if path.stem in FORBIDDEN_NAMES] == []
    assert [
        str(path.relative_to(ROOT))
        for path in paths
        if {"data", "encoders"} & set(path.relative_to(ROOT).parts[1:-1])
    ] == []
    assert [
        str(path.relative_to(ROOT))
        for path in sources("zppo_mm", "tools")
        if path.stem in {"data", "encoders"}
    ] == []


def test_packages_do_not_print() -> None:
    # A line written to a given file, such as a worker's pipe, is not shown to anybody.
    prints = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in sources(*PACKAGES)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "print"
        if "file" not in {keyword.arg for keyword in node.keywords}
    ]
    assert prints == []


def test_examples_hold_no_python_but_a_reward_function() -> None:
    assert list(sources("examples")) == [ROOT / "examples/own_reward/reward.py"]


@pytest.mark.medium
def test_every_module_has_a_docstring() -> None:
    bare = [
        str(path.relative_to(ROOT))
        for path in sources(*PACKAGES, "tools", "tests")
        if ast.get_docstring(ast.parse(path.read_text())) is None
    ]
    assert bare == []


def test_scripts_import_names_that_exist() -> None:
    missing = [
        f"{path.relative_to(ROOT)}:{node.lineno} {node.module}.{alias.name}"
        for path in sources("tools", "benchmarks")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in PACKAGES
        for alias in node.names
        if not _exists(node.module, alias.name)
    ]
    assert missing == []


def _exists(module: str, name: str) -> bool:
    found = importlib.import_module(module)
    is_package = hasattr(found, "__path__")
    return hasattr(found, name) or (
        is_package and importlib.util.find_spec(f"{module}.{name}") is not None
    )
