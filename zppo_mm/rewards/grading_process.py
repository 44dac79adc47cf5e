"""The worker process that compares answers by algebra.

Answers every `{"parsed", "gold", "seconds"}` by `{"equal"}`, `{"timeout"}` or `{"error"}`. Nothing
but this process's own code runs here, in one thread, so that forking is safe.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from data.worker_process import Channel, drop_output, limit_memory, message
from zppo_mm.rewards.algebra import is_equal_expression
from zppo_mm.rewards.forked import serve_forked
from zppo_mm.rewards.mathematics import is_same

MAX_MEMORY_BYTES = 4 << 30
# SymPy imports parts of itself when they are first needed; a child that dies takes along what it
# has imported.
WARMING_PAIRS = (
    ("x+1", "1+x"),
    ("|x|<3", "(-3,3)"),
    ("\\sqrt{2}+\\sqrt{3}-\\sqrt{5+2\\sqrt{6}}", "0"),
    ("\\int_0^1 x dx", "\\sum_{k=1}^n k"),
)


def is_equal(parsed: str, gold: str) -> bool:
    """Compare two normalised answers, by algebra where their text does not decide."""
    return is_same(parsed, gold, is_equal_expression) is True


def main() -> None:
    """Serve requests until the owner is gone."""
    channel = Channel()
    limit_memory(MAX_MEMORY_BYTES)
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    for pair in WARMING_PAIRS:
        is_equal(*pair)
    drop_output()
    serve_forked(channel, _answer)


def _answer(request: Mapping[str, Any]) -> dict[str, Any]:
    try:
        return {"equal": is_equal(request["parsed"], request["gold"])}
    # Whatever the library does with hostile text is this answer's fault alone; it is reported.
    except Exception as error:
        return {"error": message(error)}


if __name__ == "__main__":
    main()
