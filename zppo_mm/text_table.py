"""Tables of text for logs and terminals."""

from __future__ import annotations

from collections.abc import Sequence


def text_table(head: Sequence[str], rows: Sequence[Sequence[str]], num_left: int = 1) -> str:
    """Return aligned columns under a head.

    Args:
        head: One title per column.
        rows: As many cells each.
        num_left: First columns, which are aligned to the left; the others, numbers, to the right.
    """
    cells = [list(head), *([*row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if column < num_left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    ]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])
