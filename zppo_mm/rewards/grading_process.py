"""The worker process that compares answers by algebra; a comparison may hang, swell or crash, and
ends then without the worker.

Speaks JSON lines: `{"ready": true}` once, then for every `{"parsed", "gold", "seconds"}` one
`{"equal"}`, `{"timeout"}` or `{"error"}`. Comparisons run in a child that is forked when everything
is imported, so that another one takes the place of a child that died at once. Nothing but this
process's own code runs here, in one thread, so that forking is safe.
"""

from __future__ import annotations

import json
import logging
import mmap
import os
import resource
import signal
import sys
from typing import IO, Any

from zppo_mm.rewards.algebra import is_equal_expression
from zppo_mm.rewards.mathematics import is_same

MAX_MEMORY_BYTES = 4 << 30
IDLE, BUSY = 0, 1
# SymPy imports parts of itself when they are first needed; a child that dies takes along what it
# has imported.
WARMING_PAIRS = (
    ("x+1", "1+x"),
    ("|x|<3", "(-3,3)"),
    ("\\sqrt{2}+\\sqrt{3}-\\sqrt{5+2\\sqrt{6}}", "0"),
    ("\\int_0^1 x dx", "\\sum_{k=1}^n k"),
)


def is_equal(parsed: str, gold: str) -> bool:
    """Compare two normalised answers, by algebra where looking does not decide."""
    return is_same(parsed, gold, is_equal_expression) is True


def main() -> None:
    """Serve requests from standard input until it ends."""
    # Whatever a library prints must not get into the answers.
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    for pair in WARMING_PAIRS:
        is_equal(*pair)
    state = mmap.mmap(-1, 1)
    _reply(replies, {"ready": True})
    while True:
        state[0] = IDLE
        child = os.fork()
        if child == 0:
            _serve(replies, state)
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status == 0:
            return
        if state[0] == BUSY:
            timed_out = status == -signal.SIGPROF
            _reply(
                replies,
                {"timeout": True}
                if timed_out
                else {"error": f"the comparison ended its process with code {status}"},
            )


def _serve(replies: IO[str], state: mmap.mmap) -> None:
    """Answer requests, each within its seconds of processor time, after which the kernel ends this
    process, in C code too.
    """
    # Unbuffered: what a child that dies has read ahead would be lost.
    with open(sys.stdin.fileno(), "rb", buffering=0, closefd=False) as requests:
        while line := requests.readline():
            state[0] = BUSY
            request = json.loads(line)
            signal.setitimer(signal.ITIMER_PROF, request["seconds"])
            reply = _answer(request)
            signal.setitimer(signal.ITIMER_PROF, 0)
            _reply(replies, reply)
            state[0] = IDLE


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    try:
        return {"equal": is_equal(request["parsed"], request["gold"])}
    # Whatever the library does with hostile text is this answer's fault alone; it is reported.
    except Exception as error:
        return {"error": f"{type(error).__name__}: {str(error)[:200]}"}


def _reply(replies: IO[str], content: dict[str, Any]) -> None:
    print(json.dumps(content), file=replies, flush=True)


if __name__ == "__main__":
    main()
