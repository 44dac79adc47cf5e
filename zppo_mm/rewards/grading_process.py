"""The worker process that compares answers by algebra; a comparison may hang, swell or crash, and
ends then without the worker.

Answers every `{"parsed", "gold", "seconds"}` by `{"equal"}`, `{"timeout"}` or `{"error"}`.
Comparisons run in a child that is forked when everything is imported, so that a child that died is
replaced at once. Nothing but this process's own code runs here, in one thread, so
that forking is safe.
"""

from __future__ import annotations

import logging
import mmap
import os
import signal
from collections.abc import Mapping
from typing import Any

from data.worker_process import LENGTH, READY, Channel, drop_output, end_with, limit_memory, message
from zppo_mm.rewards.algebra import is_equal_expression
from zppo_mm.rewards.mathematics import is_same

MAX_MEMORY_BYTES = 4 << 30
IDLE = READY
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
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    for pair in WARMING_PAIRS:
        is_equal(*pair)
    drop_output()
    # Shared with the child: the request that it works on.
    number = mmap.mmap(-1, LENGTH.size)
    channel.send_ready()
    while True:
        LENGTH.pack_into(number, 0, IDLE)
        parent, child = os.getpid(), os.fork()
        if child == 0:
            end_with(parent)
            _serve(channel, number)
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status == 0:
            return
        (asked,) = LENGTH.unpack_from(number)
        if asked != IDLE:
            problem = (
                {"timeout": True}
                if status == -signal.SIGPROF
                else {"error": f"the comparison ended its process with code {status}"}
            )
            channel.send({**problem, "number": asked})


def _serve(channel: Channel, number: mmap.mmap) -> None:
    """Answer requests, each within its seconds of processor time, after which the kernel ends this
    process, in C code too.
    """
    while (received := channel.receive()) is not None:
        request = received[0]
        LENGTH.pack_into(number, 0, request["number"])
        signal.setitimer(signal.ITIMER_PROF, request["seconds"])
        answer = _answer(request)
        signal.setitimer(signal.ITIMER_PROF, 0)
        LENGTH.pack_into(number, 0, IDLE)
        channel.send({**answer, "number": request["number"]})


def _answer(request: Mapping[str, Any]) -> dict[str, Any]:
    try:
        return {"equal": is_equal(request["parsed"], request["gold"])}
    # Whatever the library does with hostile text is this answer's fault alone; it is reported.
    except Exception as error:
        return {"error": message(error)}


if __name__ == "__main__":
    main()
