"""The worker's side of `data.worker`."""

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
import threading
from collections.abc import Callable, Mapping
from typing import Any, Protocol

LENGTH = struct.Struct(">Q")
READY = 0  # number of the message that says so
PR_SET_PDEATHSIG = 1
MAX_MESSAGE = 500

Answer = tuple[Mapping[str, Any], Any]
"""Header and bytes."""


class Server(Protocol):
    """What a locked worker process does. It is made before the process is locked, because nothing
    can be imported later.
    """

    def check(self) -> None:
        """Try everything in the locked process, so that a library that cannot work there is found
        at the start.
        """
        ...

    def answer(self, header: Mapping[str, Any], content: bytearray) -> Answer:
        """Answer one request."""
        ...


class Channel:
    """The socket to the owner, whose process id comes first on the command line. May send from
    several threads.
    """

    def __init__(self) -> None:
        end_with(int(sys.argv[1]))
        # Away from standard input, and closed in programs that this process starts: whoever reads
        # there would take requests.
        self._connection = socket.socket(fileno=os.dup(0))
        with open(os.devnull, "rb") as nothing:
            os.dup2(nothing.fileno(), 0)
        self._connection.settimeout(None)
        self._lock = threading.Lock()

    def send_ready(self) -> None:
        """Say that requests can be answered."""
        self.send({"number": READY})

    def send(self, header: Mapping[str, Any], content: Any = b"") -> None:
        """Send a reply to the request of its `number`, or a notice if that is `None`."""
        with self._lock:
            send(self._connection, {**header, "size": len(content)}, content)

    def receive(self) -> tuple[Mapping[str, Any], bytearray] | None:
        """Return header and bytes of the next request, `None` when the owner is gone."""
        prefix = _receive(self._connection, LENGTH.size)
        header = None if prefix is None else _receive(self._connection, LENGTH.unpack(prefix)[0])
        if header is None:
            return None
        request = json.loads(header)
        content = _receive(self._connection, request["size"])
        return None if content is None else (request, content)


def run(make: Callable[[], Server]) -> None:
    """Import, lock the process down, say that it is ready, and serve until the owner is gone.

    The command line holds the owner's process id, the address space in bytes, and the seconds that
    a request may take.
    """
    memory_bytes, timeout_seconds = int(sys.argv[2]), float(sys.argv[3])
    channel = Channel()
    try:
        server = make()
        drop_output()
        lock_down(memory_bytes)
        server.check()
    # A broken native library raises OSError, an older NumPy AttributeError.
    except Exception as error:
        channel.send({"number": READY, "not_started": message(error)})
        return
    channel.send_ready()
    while (request := channel.receive()) is not None:
        limit_cpu(2 * timeout_seconds + 5)  # a library may use two threads
        header, content = server.answer(*request)
        channel.send({**header, "number": request[0]["number"]}, content)


def end_with(owner: int) -> None:
    """Have the kernel kill this process when its owner is gone; elsewhere than on Linux its end is
    seen at the next request.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != owner:  # it was gone before
        os._exit(1)


def drop_output() -> None:
    """Drop what is written to standard error: libraries write pages about forged input."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    os.close(null)


def lock_down(memory_bytes: int) -> None:
    """Give up what working from memory does not need, for good."""
    limit_memory(memory_bytes)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    # Descriptors 0 to 2 are taken and no new one may be opened: neither a file nor an address.
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))


def limit_memory(num_bytes: int) -> None:
    """Limit the address space for good; a limit that the machine has set lower stays. A crash
    leaves no file of it.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = num_bytes if hard == resource.RLIM_INFINITY else min(num_bytes, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


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


def send(connection: socket.socket, header: Mapping[str, Any], content: Any = b"") -> None:
    """Send a message: a small one in one piece, so that the other side wakes up once."""
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
