"""The HTTP server of a teacher on ranks of its own: chat completions, and fields of this project.

It takes messages of plain text, the last of the user. What `chat_api.ChatRequest.body` adds for
this server is under `zppo`: media by reference, the name of the random stream, and the batch.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import logging
import math
import os
import secrets
import select
import socket
import socketserver
import threading
import time
from concurrent.futures import Future, wait
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler
from typing import Any

from data.messages import read_messages
from data.question import MediaRef, Turn
from zppo_mm.rollout.chat_template import THINKING_SWITCH
from zppo_mm.teacher.served.chat_api import Batch

logger = logging.getLogger(__name__)

PATH = "/v1/chat/completions"
MAX_BODY_BYTES = 64 * 2**20
# A request whose batch stays incomplete for so long (others of it were given up) is answered
# without the rest.
BATCH_SECONDS = 5.0
CONNECTION_CHECK_SECONDS = 1.0

Reply = tuple[int, dict[str, Any]]
"""HTTP status and JSON content."""


@dataclass(frozen=True, slots=True)
class ReceivedRequest:
    """One request.

    Attributes:
        text: Of the last message, the user's.
        media: What the messages show, in order.
        num_choices: Answers wanted.
        temperature: 0 is greedy.
        max_tokens: Longest answer.
        stream: Name of the random stream: `rollout` or `respond`, and a name.
        batch: Requests that are sampled together.
        is_without_thinking: Whether the chat template is to turn reasoning off, if it can.
        earlier: Messages before the last.
    """

    text: str
    media: tuple[MediaRef, ...]
    num_choices: int
    temperature: float
    max_tokens: int
    stream: tuple[str, str]
    batch: Batch
    is_without_thinking: bool = False
    earlier: tuple[Turn, ...] = ()

    @property
    def batch_key(self) -> tuple[object, ...]:
        """What requests that are sampled together have in common."""
        kind, name = self.stream
        limits = (self.num_choices, self.temperature, self.max_tokens)
        stream = (kind, name if kind == "respond" else "")
        return (self.batch.name, *limits, self.is_without_thinking, *stream)


@dataclass(frozen=True, slots=True, eq=False)
class PendingRequest:
    """A request on the server, and where its reply goes."""

    request: ReceivedRequest
    received: float
    reply: Future[Reply]


class ChatServer(socketserver.ThreadingTCPServer):
    """Receives requests in threads of its own and hands them out in batches.

    Args:
        host: Address to listen on.

    Attributes:
        url: Base URL.
        key: Demanded as a bearer token.
        is_closed: Whether all requests are refused.
    """

    daemon_threads = True
    block_on_close = False
    request_queue_size = 1024

    def __init__(self, host: str) -> None:
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, 0), _Handler)
        shown = f"[{host}]" if ":" in host else host
        self.url = f"http://{shown}:{self.server_address[1]}/v1"
        self.key = secrets.token_hex(32)
        self._pending: list[PendingRequest] = []
        self._arrived = threading.Condition()
        self.is_closed = False
        threading.Thread(target=self.serve_forever, name="chat server", daemon=True).start()

    def close(self) -> None:
        """Refuse all requests, those under way included."""
        self.is_closed = True
        self.shutdown()
        self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log what broke a connection."""
        logger.debug("chat server: a connection failed", exc_info=True)

    def add(self, request: ReceivedRequest) -> PendingRequest:
        """Queue a request."""
        pending = PendingRequest(request, time.monotonic(), Future())
        with self._arrived:
            self._pending.append(pending)
            self._arrived.notify_all()
        return pending

    def drop(self, pending: PendingRequest) -> None:
        """Remove a request that nobody waits for, unless it is being answered."""
        with self._arrived, contextlib.suppress(ValueError):
            self._pending.remove(pending)

    def take_batch(self, timeout_seconds: float) -> list[PendingRequest]:
        """Remove and return the next complete batch, urgent ones first; empty if there is none in
        time.
        """
        with self._arrived:
            batch = self._arrived.wait_for(self._next_batch, timeout_seconds)
            self._pending = [each for each in self._pending if each not in batch]
        return sorted(batch, key=lambda each: each.request.batch.index)

    def _next_batch(self) -> list[PendingRequest]:
        batches: dict[tuple[object, ...], list[PendingRequest]] = {}
        for each in self._pending:
            batches.setdefault(each.request.batch_key, []).append(each)
        oldest = time.monotonic() - BATCH_SECONDS
        ready = [
            batch
            for batch in batches.values()
            if len(batch) >= batch[0].request.batch.size or batch[0].received < oldest
        ]
        return min(ready, key=lambda batch: not batch[0].request.batch.is_urgent, default=[])


class _Handler(BaseHTTPRequestHandler):
    """Reads one request, waits for its reply and sends it."""

    server: ChatServer
    timeout = 60.0

    def do_POST(self) -> None:
        given = self.headers.get("Authorization", "").encode("latin-1", "replace")
        if not hmac.compare_digest(given, f"Bearer {self.server.key}".encode()):
            self._send(401, {"error": "a wrong key"})
        elif self.path != PATH:
            self._send(404, {"error": f"nothing at {self.path}, expected {PATH}"})
        else:
            self._answer()

    def log_message(self, format: str, *args: Any) -> None:
        logger.debug(format, *args)

    def _answer(self) -> None:
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or int(length) > MAX_BODY_BYTES:
            self._send(413, {"error": f"expected a Content-Length up to {MAX_BODY_BYTES}"})
            return
        try:
            request = read_request(self.rfile.read(int(length)))
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            self._send(400, {"error": f"{type(error).__name__}: {error}"})
            return
        pending = self.server.add(request)
        while not wait([pending.reply], CONNECTION_CHECK_SECONDS).done:
            if self.server.is_closed:
                self._send(503, {"error": "the teacher's ranks have ended"})
                return
            # The client sends nothing more: what can be read is the end of the connection.
            if select.select([self.connection], [], [], 0)[0]:
                self.server.drop(pending)
                return
        self._send(*pending.reply.result())

    def _send(self, status: int, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        with contextlib.suppress(OSError):  # the client has gone
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)


def read_request(body: bytes) -> ReceivedRequest:
    """Read a request.

    Raises:
        ValueError: A value is out of range. LookupError, TypeError and AttributeError come from
            other JSON than a request.
    """
    fields = json.loads(body)
    turns, _ = read_messages("request", fields["messages"])
    ours = fields.get("zppo", {})
    batch = Batch(**ours["batch"]) if "batch" in ours else Batch(secrets.token_hex(8), 0, 1)
    variables = fields.get("chat_template_kwargs", {})
    kind, name = ours.get("stream") or ("rollout", f"chat/{fields.get('seed', 0)}/{batch.index}")
    request = ReceivedRequest(
        text=turns[-1].text,
        media=tuple(MediaRef(**ref) for ref in ours.get("media", ())),
        num_choices=int(fields.get("n", 1)),
        temperature=float(fields.get("temperature", 1.0)),
        max_tokens=int(fields["max_tokens"]),
        stream=(kind, name),
        batch=batch,
        is_without_thinking=variables.get(THINKING_SWITCH, True) is False,
        earlier=turns[:-1],
    )
    if not all(isinstance(message["content"], str) for message in fields["messages"]):
        raise ValueError("expected messages of plain text")
    if not (
        0 <= request.temperature < math.inf and min(request.num_choices, request.max_tokens) > 0
    ):
        raise ValueError("temperature, n or max_tokens is out of range")
    if kind not in ("rollout", "respond"):
        raise ValueError(f"a random stream of kind {kind!r}")
    return request


def job_address() -> str:
    """Return this machine's address on the network of the job: the one it reaches rank 0 from.

    Raises:
        OSError: It cannot reach rank 0.
    """
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    for family, kind, _, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM):
        with contextlib.suppress(OSError), socket.socket(family, kind) as probe:
            probe.connect(address)  # sends nothing
            return str(probe.getsockname()[0])
    raise OSError(f"teacher: no way from here to rank 0 at {host}:{port}")
