"""The worker process that compares answers by algebra; it may hang, swell or crash, and is killed then.

Speaks JSON lines: `{"ready": true}` once, then for every `{"parsed", "gold"}` one `{"equal"}` or `{"error"}`.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import signal
import sys
from typing import Any

MAX_MEMORY_BYTES = 4 << 30
# Decimal places at which floats are compared; with the library's 6, 1.414214 would be the root of 2.
FLOAT_ROUNDING = 12


def is_equal(parsed: str, gold: str) -> bool:
    """Compare two answers with math-verify, without its time limits: they need the main thread and cannot end C code."""
    from math_verify import parse, verify

    expected, answered = (parse(f"\\boxed{{{text}}}", parsing_timeout=None) for text in (gold, parsed))
    return bool(verify(expected, answered, float_rounding=FLOAT_ROUNDING, timeout_seconds=None))


def _answer(request: dict[str, str]) -> dict[str, Any]:
    try:
        return {"equal": is_equal(request["parsed"], request["gold"])}
    except Exception as error:  # whatever the library does with hostile text is this answer's fault alone; it is reported
        return {"error": f"{type(error).__name__}: {str(error)[:200]}"}


def main(timeout_seconds: float) -> None:
    """Serve requests from standard input until it ends.

    Args:
        timeout_seconds: The kernel ends the process after this time on one request, in C code too and when nobody is left to kill it.
    """
    # Whatever a library prints must not get into the answers.
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    is_equal("x+1", "1+x")  # imports and warms the parser
    print(json.dumps({"ready": True}), file=replies, flush=True)
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_REAL, timeout_seconds)
        reply = _answer(json.loads(line))
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(json.dumps(reply), file=replies, flush=True)


if __name__ == "__main__":
    main(float(sys.argv[1]))
