"""A proxy that stands between client and server and spoils replies as a plan says."""

from __future__ import annotations

import http.client
import json
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

from tests.support.serving import serving

PASS = "pass"
FAULTS = (
    "reset",
    "500",
    "429",
    "503",
    "half_body",
    "wrong_json",
    "not_a_completion",
    "empty_choice",
    "no_choice",
    "stall",
)


class FaultProxy(ThreadingHTTPServer):
    """Passes requests on or spoils them.

    Attributes:
        plan: From the number of a request to a fault or `PASS`.
        stall_seconds: Silence of the fault `stall`.
        retry_after: Header of the fault `429`.
        injected: Faults so far.
        delivered: Choices of every reply that was passed on whole, by the id of the reply.
        most_at_once: Largest number of requests in flight.
    """

    daemon_threads = True
    request_queue_size = 256

    def __init__(self, upstream: str, plan: Callable[[int], str]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.upstream = urlsplit(upstream)
        self.plan = plan
        self.stall_seconds = 1.0
        self.retry_after = "0.02"
        self.injected: Counter[str] = Counter()
        self.delivered: dict[str, list[str]] = {}
        self.num_requests = 0
        self.in_flight = 0
        self.most_at_once = 0
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}{self.upstream.path}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # a client that gave up on a stalled reply


class Handler(BaseHTTPRequestHandler):
    """One request."""

    protocol_version = "HTTP/1.1"
    server: FaultProxy

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        with self.server.lock:
            number = self.server.num_requests
            self.server.num_requests += 1
            self.server.in_flight += 1
            self.server.most_at_once = max(self.server.most_at_once, self.server.in_flight)
        try:
            fault = self.server.plan(number)
            if fault != PASS:
                with self.server.lock:
                    self.server.injected[fault] += 1
            self.reply(fault, body)
        finally:
            with self.server.lock:
                self.server.in_flight -= 1

    def reply(self, fault: str, body: bytes) -> None:
        if fault == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
            self.close_connection = True
        elif fault == "stall":
            time.sleep(self.server.stall_seconds)
            self.close_connection = True
        elif fault.isdigit():
            headers = {"Retry-After": self.server.retry_after} if fault == "429" else {}
            self.send(int(fault), b'{"error": {"message": "injected"}}', headers)
        elif fault == "wrong_json":
            self.send(200, b'{"choices": [{"index": 0, "message"')
        elif fault == "not_a_completion":
            self.send(200, b'{"object": "list", "data": []}')
        elif fault == "no_choice":
            self.send(200, b'{"id": "x", "choices": [], "usage": null}')
        elif fault == "empty_choice":
            self.send(
                200,
                b'{"id": "x", "choices": [{"index": 0, "message": {"content": null}, '
                b'"finish_reason": "stop"}]}',
            )
        else:
            status, content = self.ask_upstream(body)
            if fault == PASS and status == 200:
                parsed = json.loads(content)
                with self.server.lock:
                    self.server.delivered[parsed["id"]] = [
                        choice["message"]["content"] for choice in parsed["choices"]
                    ]
            self.send(status, content, half=fault == "half_body")

    def ask_upstream(self, body: bytes) -> tuple[int, bytes]:
        upstream = http.client.HTTPConnection(self.server.upstream.netloc, timeout=60)
        headers = {
            name: value
            for name, value in self.headers.items()
            if name.lower() in ("authorization", "content-type")
        }
        upstream.request("POST", self.path, body, headers)
        response = upstream.getresponse()
        content = response.read()
        upstream.close()
        return response.status, content

    def send(
        self, status: int, body: bytes, headers: dict[str, str] | None = None, half: bool = False
    ) -> None:
        self.send_response(status)
        for name, value in {
            "Content-Type": "application/json",
            "Content-Length": str(len(body)),
            **(headers or {}),
        }.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if half else body)
        self.close_connection = self.close_connection or half

    def log_message(self, format: str, *arguments: Any) -> None:
        pass


@contextmanager
def stand_between(upstream: str, plan: Callable[[int], str]) -> Iterator[FaultProxy]:
    """Run a proxy in a thread until the block ends."""
    with serving(FaultProxy(upstream, plan)) as proxy:
        yield proxy
