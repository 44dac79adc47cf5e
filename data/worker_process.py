"""The worker's side of `data.worker`: gives up all that its work does not need, then answers
requests until its owner is gone.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import resource
import signal
import socket
import struct
import sys
from collections.abc import Callable, Mapping
from typing import Any, Protocol

LENGTH = struct.Struct(">Q")
PR_SET_PDEATHSIG = 1
MAX_MESSAGE = 500

Answer = tuple[Mapping[str, Any], Any]
"""Header and bytes."""


class Server(Protocol):
    """What a worker process does; made before the doors are closed, for later nothing can be
    imported.
    """

    def check(self) -> None:
        """Try everything behind the closed doors, so that a library that needs them open is found
        at the start.
        """
        ...

    def answer(self, header: Mapping[str, Any], content: bytearray) -> Answer:
        """Answer one request."""
        ...


def run(make: Callable[[], Server]) -> None:
    """Import, lock the process down, say that it is ready, and serve until the owner is gone.

    The command line holds the owner's process id, the address space in bytes, and the seconds that
    a request may take.
    """
    owner, memory_bytes, timeout_seconds = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
    end_with(owner)
    connection = socket.socket(fileno=0)
    connection.settimeout(None)
    try:
        server = make()
        lock_down(memory_bytes)
        server.check()
    except (
        Exception
    ) as error:  # a broken native library raises OSError, an older NumPy AttributeError
        send(connection, {"error": message(error)})
        return
    send(connection, {"ready": True})
    while (request := receive_request(connection)) is not None:
        limit_cpu(2 * timeout_seconds + 5)  # a library may use two threads
        send(connection, *server.answer(*request))


def end_with(owner: int) -> None:
    """Have the kernel kill this process when its owner is gone; elsewhere than on Linux its end is
    seen at the next request.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != owner:  # it was gone before
        os._exit(1)


def lock_down(memory_bytes: int) -> None:
    """Give up what working from memory does not need, for good."""
    _lower(resource.RLIMIT_AS, memory_bytes)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # Descriptors 0 to 2 are taken and no new one may be opened: neither a file nor an address.
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))


def _lower(kind: int, most: int) -> None:
    """Set a limit for good; one that the machine has set lower stays."""
    _, hard = resource.getrlimit(kind)
    limit = most if hard == resource.RLIM_INFINITY else min(most, hard)
    resource.setrlimit(kind, (limit, limit))


def limit_cpu(seconds: float) -> None:
    """Have the kernel end this process when it has used so many more seconds of CPU time."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    wanted = math.ceil(usage.ru_utime + usage.ru_stime + seconds)
    resource.setrlimit(
        resource.RLIMIT_CPU, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard)
    )


def message(error: BaseException) -> str:
    """Return an error in one short line."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[-1]}"[:MAX_MESSAGE]


def receive_request(connection: socket.socket) -> tuple[Mapping[str, Any], bytearray] | None:
    """Return header and bytes of the next request, `None` when the owner is gone."""
    prefix = _receive(connection, LENGTH.size)
    header = None if prefix is None else _receive(connection, LENGTH.unpack(prefix)[0])
    if header is None:
        return None
    request = json.loads(header)
    content = _receive(connection, request["size"])
    return None if content is None else (request, content)


def send(connection: socket.socket, header: Mapping[str, Any], content: Any = b"") -> None:
    """Send a request or an answer: small ones in one piece, so that the other side wakes up
    once.
    """
    encoded = json.dumps(dict(header)).encode()
    head = LENGTH.pack(len(encoded)) + encoded
    sent = connection.sendmsg([head, content])
    if sent < len(head):
        connection.sendall(head[sent:])
    connection.sendall(memoryview(content)[max(0, sent - len(head)) :])


def _receive(connection: socket.socket, size: int) -> bytearray | None:
    content = bytearray(size)
    view = memoryview(content)
    while view:
        try:
            count = connection.recv_into(view)
        except ConnectionResetError:
            return None
        if count == 0:
            return None
        view = view[count:]
    return content
