"""The text of `--help`: every key of the configuration with its type, default and meaning, read
from the source of `zppo_mm.config.schema` and its sections.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from dataclasses import fields, is_dataclass
from typing import Any

from zppo_mm.config import network as config_models
from zppo_mm.config import schema as config
from zppo_mm.config import teacher as config_teacher
from zppo_mm.config.schema import RunConfig

LINE_WIDTH = 110


def describe_options() -> str:
    """Return all options grouped as in the configuration, one `key  type = default` line and its
    meaning each.
    """
    meanings = _meanings()
    blocks = [_group_text("", RunConfig(), meanings)]
    for field in fields(RunConfig):
        value = getattr(RunConfig(), field.name)
        if is_dataclass(value):
            title = f"{field.name}: {meanings[RunConfig.__name__, field.name]}"
            blocks.append(title + "\n" + _group_text(f"{field.name}.", value, meanings))
    return "\n\n".join(blocks)


def _group_text(prefix: str, group: Any, meanings: dict[tuple[str, str], str]) -> str:
    """Describe the plain fields of one dataclass instance."""
    lines = []
    for field in fields(group):
        value = getattr(group, field.name)
        if is_dataclass(value):
            continue
        # Annotations are strings in the configuration module, just as a reader wrote them.
        lines.append(f"  {prefix}{field.name}  {field.type} = {_default_text(value)}")
        meaning = meanings[type(group).__name__, field.name]
        lines += textwrap.wrap(
            meaning, LINE_WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6
        )
    return "\n".join(lines)


def _default_text(value: Any) -> str:
    """Write a default as it would be given on the command line."""
    if isinstance(value, bool):
        return str(value).lower()
    return repr(value) if isinstance(value, str) else str(value)


def _meanings() -> dict[tuple[str, str], str]:
    """Return the string under each field, by class and field name."""
    meanings = {}
    for node in (
        node
        for module in (config, config_models, config_teacher)
        for node in ast.parse(inspect.getsource(module)).body
    ):
        if not isinstance(node, ast.ClassDef):
            continue
        for statement, follower in zip(node.body, node.body[1:], strict=False):
            if not (
                isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)
            ):
                continue
            if isinstance(follower, ast.Expr) and isinstance(follower.value, ast.Constant):
                meanings[node.name, statement.target.id] = " ".join(
                    str(follower.value.value).split()
                )
    return meanings
