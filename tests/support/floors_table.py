"""The table of packages in docs/architecture.md, from the floors of the import test and the
packages' docstrings: `python -m tests.support.floors_table` writes it into the page.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

from tests.unit.test_imports_layers import FLOORS

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "architecture.md"
HEAD = "| floor | package | what it holds |\n|---|---|---|\n"
TABLE = re.compile(re.escape(HEAD) + r"(?:\|.*\n)*")


def floors_table() -> str:
    """Return the table, from the top floor down."""
    rows = [
        f"| {number} | `{room}` | {_first_sentence(room)} |\n"
        for number, rooms in reversed(list(enumerate(FLOORS)))
        for room in rooms
    ]
    return HEAD + "".join(rows)


def _first_sentence(room: str) -> str:
    """Return the first sentence of a module's docstring, without what follows a colon."""
    path = ROOT.joinpath(*room.split("."))
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    text = " ".join((ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or "").split())
    return re.split(r"(?<=[^.])\.(?: |$)", text)[0]


def main() -> None:
    """Replace the table in the page."""
    text = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(TABLE.sub(lambda _: floors_table(), text), encoding="utf-8")


if __name__ == "__main__":
    main()
