"""docs/extending.md: the lines that it shows are added to a copy of the project, and work."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/extending.md").read_text(encoding="utf-8")
SECTIONS = {text.partition("\n")[0]: text.partition("\n")[2] for text in PAGE.split("\n## ")[1:]}
BLOCK = re.compile(
    r"^In (?:the new file )?`(?P<path>[\w/.]+)`(?:, (?P<how>append to|before|after) "
    r"`(?P<name>[\w.]+)`)?:\n```(?:python|yaml)\n(?P<code>.*?)```$",
    re.MULTILINE | re.DOTALL,
)
TRIAL = re.compile(r"^Try it:\n```python\n(.*?)```$", re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy of the project with all the lines of the page added."""
    root = tmp_path_factory.mktemp("copy")
    for package in ("zppo_mm", "data", "encoders"):
        shutil.copytree(
            ROOT / package, root / package, ignore=shutil.ignore_patterns("__pycache__")
        )
    blocks = list(BLOCK.finditer(PAGE))
    assert len(blocks) == len(re.findall("```(?:python|yaml)", PAGE)) - len(SECTIONS)
    for block in blocks:
        path = root / block["path"]
        if block["how"]:
            assert path.is_file()
            path.write_text(extended(path.read_text(), block["how"], block["name"], block["code"]))
        else:
            assert not path.exists()
            path.write_text(block["code"])
    return root


def extended(source: str, how: str, name: str, code: str) -> str:
    """Add code before or after a definition, or to the end of a collection."""
    found = next(node for node in ast.walk(ast.parse(source)) if name in defined(node))
    lines = source.splitlines(keepends=True)
    if how == "append to":
        assert isinstance(found, ast.Assign | ast.AnnAssign)
        assert found.value is not None
        last = lines[found.value.end_lineno - 1]  # type: ignore[operator]
        end = found.value.end_col_offset - 1  # type: ignore[operator]
        kept = "".join([*lines[: found.value.end_lineno - 1], last[:end]]).rstrip()  # type: ignore[operator]
        comma = "" if kept.endswith((",", "{", "[", "(")) else ","
        rest = last[end:] + "".join(lines[found.value.end_lineno :])
        return f"{kept}{comma}\n{code.rstrip()},\n{rest}"
    index = found.lineno - 1 if how == "before" else found.end_lineno
    added = textwrap.indent(code, " " * found.col_offset)
    return "".join([*lines[:index], added, *lines[index:]])


def defined(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Assign):
        return [ast.unparse(target) for target in node.targets]
    if isinstance(node, ast.AnnAssign):
        return [ast.unparse(node.target)]
    return [node.name] if isinstance(node, ast.ClassDef) else []


@pytest.mark.parametrize("section", SECTIONS)
@pytest.mark.medium
def test_what_the_page_adds_works(copy: Path, section: str) -> None:
    (trial,) = TRIAL.findall(SECTIONS[section])
    run = subprocess.run(
        [sys.executable, "-c", trial],
        cwd=copy,
        env={**os.environ, "PYTHONPATH": str(copy)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr


def test_a_method_kind_touches_three_files() -> None:
    files = {block["path"] for block in BLOCK.finditer(SECTIONS["A method kind"])}
    assert len(files) == 3
