"""A worker process whose requests may hang, swell or crash: each is answered in a forked child,
which ends without the worker.

Answers every request by what it is made to return, or by `{"timeout"}` or `{"error"}`. The child is
forked when everything is imported, so that one that died is replaced at once.
"""

from __future__ import annotations

import mmap
import os
import signal
from collections.abc import Callable, Mapping
from typing import Any

from data.worker_process import LENGTH, READY, Channel, end_with

IDLE = READY

Answer = Callable[[Mapping[str, Any]], Mapping[str, Any]]


def serve_forked(channel: Channel, answer: Answer) -> None:
    """Say that the process is ready, and serve requests until the owner is gone.

    Args:
        channel: To the owner. A request has its processor time in `seconds`.
        answer: From a request to the reply; it raises nothing.
    """
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    # Shared with the child: the request that it works on.
    number = mmap.mmap(-1, LENGTH.size)
    channel.send_ready()
    while True:
        LENGTH.pack_into(number, 0, IDLE)
        parent, child = os.getpid(), os.fork()
        if child == 0:
            end_with(parent)
            _serve(channel, answer, number)
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status == 0:
            return
        (asked,) = LENGTH.unpack_from(number)
        if asked != IDLE:
            problem = (
                {"timeout": True}
                if status == -signal.SIGPROF
                else {"error": f"the grading ended its process with code {status}"}
            )
            channel.send({**problem, "number": asked})


def _serve(channel: Channel, answer: Answer, number: mmap.mmap) -> None:
    """Answer requests, each within its seconds of processor time, after which the kernel ends this
    process, in C code too.
    """
    while (received := channel.receive()) is not None:
        request = received[0]
        LENGTH.pack_into(number, 0, request["number"])
        signal.setitimer(signal.ITIMER_PROF, request["seconds"])
        reply = answer(request)
        signal.setitimer(signal.ITIMER_PROF, 0)
        LENGTH.pack_into(number, 0, IDLE)
        channel.send({**reply, "number": request["number"]})
