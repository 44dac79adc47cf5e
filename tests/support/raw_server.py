"""A server that says whatever bytes a test wants, on a real socket.

with serve_raw(lambda number: say(b"HTTP/1.1 200 OK\\r\\n\\r\\n{}")) as server:
    server.url, server.requests
"""

from __future__ import annotations

import json
import socket
import socketserver
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tests.support.serving import serving

Say = Callable[[socket.socket], None]


class RawServer(socketserver.ThreadingTCPServer):
    """Reads a request of a connection, says what the plan says for its number, and closes.

    Attributes:
        requests: Heads and bodies of all requests.
    """

    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 256

    def __init__(self, plan: Callable[[int], Say], context: ssl.SSLContext | None) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.plan = plan
        self.context = context
        self.requests: list[tuple[bytes, bytes]] = []
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"{'https' if self.context else 'http'}://127.0.0.1:{self.server_address[1]}/v1"

    def get_request(self) -> tuple[socket.socket, Any]:
        connection, address = super().get_request()
        if self.context is not None:
            # The handshake belongs to the connection's thread.
            connection = self.context.wrap_socket(
                connection, server_side=True, do_handshake_on_connect=False
            )
        return connection, address

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # a client that has read enough


class Handler(socketserver.BaseRequestHandler):
    """One connection."""

    server: RawServer
    request: socket.socket

    def handle(self) -> None:
        received = b""
        while b"\r\n\r\n" not in received:
            piece = self.request.recv(65_536)
            if not piece:
                return
            received += piece
        head, _, body = received.partition(b"\r\n\r\n")
        length = int(
            next(
                (
                    line.split(b":")[1]
                    for line in head.split(b"\r\n")
                    if line.lower().startswith(b"content-length:")
                ),
                b"0",
            )
        )
        while len(body) < length:
            body += self.request.recv(65_536)
        with self.server.lock:
            number = len(self.server.requests)
            self.server.requests.append((head, body))
        self.server.plan(number)(self.request)


@contextmanager
def serve_raw(
    plan: Callable[[int], Say], context: ssl.SSLContext | None = None
) -> Iterator[RawServer]:
    """Serve in a thread until the block ends."""
    with serving(RawServer(plan, context)) as server:
        yield server


def say(*parts: bytes) -> Say:
    """Say all of it."""
    return lambda connection: connection.sendall(b"".join(parts))


def say_forever(first: bytes, again: bytes) -> Say:
    """Say the first part, and the other one until nobody listens any more."""

    def said(connection: socket.socket) -> None:
        connection.sendall(first)
        while True:
            connection.sendall(again)

    return said


def http(
    body: bytes, *headers: str, status: str = "200 OK", version: str = "1.1", length: bool = True
) -> bytes:
    """Return a response as it travels."""
    lines = [
        f"HTTP/{version} {status}",
        *headers,
        *([f"Content-Length: {len(body)}"] if length else []),
    ]
    return "\r\n".join(lines).encode("utf-8") + b"\r\n\r\n" + body


def completion(*texts: str, **fields: Any) -> bytes:
    """Return a good chat completion."""
    choices = [
        {"index": index, "message": {"content": text}, "finish_reason": "stop"}
        for index, text in enumerate(texts)
    ]
    return json.dumps(
        {"choices": choices, "usage": {"prompt_tokens": 3, "completion_tokens": 2}, **fields}
    ).encode()
