"""A server with vLLM's routes for rollouts, on the standard library: what it answers, a real
network drew. It can spoil its replies as a plan says.

with serve_vllm(TransformersStudent(STUDENT_DIR)) as server:
    server.url, server.delivered
"""

from __future__ import annotations

import json
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from tests.support.drawing_students import Asked, Student
from tests.support.serving import serving
from tests.support.vllm_replies import PASS, choice, media_of, spoil

GENERATE = "/inference/v1/generate"
DEFAULTS = {
    "n": 1,
    "seed": 0,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "stop_token_ids": (),
}
"""Of the sampling parameters that are read here, as vLLM has them."""
UNSYNCED = "default"
"""What vLLM calls the weights that it was started with."""


class FakeVllm(ThreadingHTTPServer):
    """Serves the routes that the run uses.

    Attributes:
        student: Draws.
        plan: From the number of a request for continuations to a fault or `PASS`.
        version: Of the weights.
        calls: Paths and bodies of all other requests.
        missing: Routes that it has not.
        num_workers: That it says it has; one answers.
        latency_seconds: Least time of an answer.
        injected: Faults so far.
        delivered: Of every reply that was sent whole, the tokens of its continuations by request
            id, and the version of their weights.
        requests: Bodies of all requests for continuations.
    """

    daemon_threads = True
    request_queue_size = 256

    def __init__(self, student: Student, plan: Callable[[int], str], port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.student = student
        self.plan = plan
        self.version = UNSYNCED
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.missing: set[str] = set()
        self.num_workers = 1
        self.latency_seconds = 0.0
        self.injected: Counter[str] = Counter()
        self.delivered: list[tuple[int, str, list[list[int]]]] = []
        self.requests: list[dict[str, Any]] = []
        self.lock = threading.Lock()
        self.network_lock = threading.Lock()
        self.is_open = threading.Event()
        self.is_open.set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # a client that gave up on a stalled reply

    def note(self, request: dict[str, Any]) -> tuple[int, str]:
        """Count a request; returns its number and its fault."""
        with self.lock:
            number = len(self.requests)
            self.requests.append(request)
            fault = self.plan(number)
            if fault != PASS:
                self.injected[fault] += 1
        return number, fault

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Return the reply to a request for continuations."""
        sampling = {**DEFAULTS, **request["sampling_params"]}
        asked = Asked(request["token_ids"], media_of(request.get("features")), sampling)
        self.is_open.wait()
        with self.network_lock:
            version = self.version
            drawn = self.student.draw(asked)
        return {
            "request_id": "x",
            "choices": [
                choice(index, ids, logits, asked, version)
                for index, (ids, logits) in enumerate(drawn)
            ],
        }


class Handler(BaseHTTPRequestHandler):
    """One request."""

    protocol_version = "HTTP/1.1"
    server: FakeVllm

    def do_GET(self) -> None:
        replies = {"/health": {}, "/get_world_size": {"world_size": self.server.num_workers}}
        self.send(200 if self.path in replies else 404, replies.get(self.path, {}))

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        request = json.loads(body) if body else {}
        path = self.path.partition("?")[0]
        if path in self.server.missing:
            self.send(404, {"detail": "Not Found"})
            return
        if path == GENERATE:
            self.generate(request)
            return
        self.server.calls.append((path, request))
        if path == "/v1/load_lora_adapter":
            self.send_bytes(200, b"Success: LoRA adapter added successfully.")
            return
        reply: Any = {}
        if path == "/pause":
            self.server.is_open.clear()
        elif path == "/resume":
            self.server.is_open.set()
        elif path == "/collective_rpc":
            reply = {"results": [self.load(Path(request["kwargs"]["path"]))]}
        elif path == "/update_weight_version":
            self.server.version = request["new_version"]
        elif path == "/reset_prefix_cache":
            reply = {"success": True}
        self.send(200, reply)

    def load(self, path: Path) -> dict[str, Any]:
        with self.server.network_lock:
            try:
                sums = self.server.student.load(path)
            except OSError as error:
                return {"error": str(error)}
        return {"checksums": sums, "dtype": "float32", "num_compared": len(sums)}

    def generate(self, request: dict[str, Any]) -> None:
        started = time.monotonic()
        server = self.server
        number, fault = server.note(request)
        if fault == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
            self.close_connection = True
            return
        if fault == "stall":
            time.sleep(1.0)
            self.close_connection = True
            return
        if fault.isdigit():
            self.send(int(fault), {"error": {"message": "injected"}})
            return
        if fault == "wrong_json":
            self.send_bytes(200, b'{"choices": [{"index": 0, "token_ids"')
            return
        reply = server.answer(request)
        tokens = [each["token_ids"] for each in reply["choices"]]
        version = reply["choices"][0]["weight_versions"][0]["version"]
        if fault not in (PASS, "half_body"):
            reply = spoil(fault, reply, request)
        time.sleep(max(0.0, started + server.latency_seconds - time.monotonic()))
        if fault == PASS:
            with server.lock:
                server.delivered.append((number, version, tokens))
        self.send_bytes(200, json.dumps(reply).encode(), half=fault == "half_body")

    def send(self, status: int, content: Any) -> None:
        self.send_bytes(status, json.dumps(content).encode())

    def send_bytes(self, status: int, body: bytes, half: bool = False) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if half else body)
        self.close_connection = self.close_connection or half

    def log_message(self, format: str, *arguments: Any) -> None:
        pass


@contextmanager
def serve_vllm(
    student: Student, plan: Callable[[int], str] = lambda number: PASS, port: int = 0
) -> Iterator[FakeVllm]:
    """Serve in a thread until the block ends."""
    with serving(FakeVllm(student, plan, port)) as server:
        yield server
