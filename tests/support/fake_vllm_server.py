"""A server process with the routes by which vLLM takes weights, for tests of what happens to
processes: `python fake_vllm_server.py --port P --host H FAULTS ...`.

It reads safetensors files and computes checksums by NumPy alone. Its greedy text is in the file
itself, the tensors `probe.tokens` and `probe.logprobs`, so another file gives another text. Every
load takes one line of the file FAULTS, if there are any left: `die`, `hang`, `refuse`, `corrupt`,
`odd` (versions of several types), or `ok`. It is busy: a request that does not come before all
others is never answered.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np

DTYPES = {"F32": np.float32, "I64": np.int64, "U8": np.uint8}
MODULUS = 2**64


def read_file(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    """Return the tensors of a safetensors file."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    header.pop("__metadata__", None)
    content = raw[8 + length :]
    return {
        key: np.frombuffer(
            content[entry["data_offsets"][0] : entry["data_offsets"][1]], DTYPES[entry["dtype"]]
        ).reshape(entry["shape"])
        for key, entry in header.items()
    }


def naive_checksum(array: np.ndarray[Any, Any]) -> str:
    """Return the checksum of the worker's extension, word by word."""
    raw = array.tobytes()
    num_words = len(raw) // 8
    words = [int.from_bytes(raw[8 * i : 8 * i + 8], "little") for i in range(num_words)]
    total = sum(word * (index // 1024 + 1) for index, word in enumerate(words))
    for byte in raw[8 * num_words :]:
        total = total * 257 + byte
    return f"{total % MODULUS:016x}"


class Server(ThreadingHTTPServer):
    """What it has."""

    tensors: dict[str, np.ndarray[Any, Any]]
    version = "none"
    is_odd = False
    policy: str
    faults: Path

    def next_fault(self) -> str:
        """Take the next line of the faults."""
        lines = self.faults.read_text().split() if self.faults.is_file() else []
        if lines:
            self.faults.write_text("\n".join(lines[1:]))
        return lines[0] if lines else "ok"

    def load(self, path: Path) -> dict[str, Any]:
        """Load a file as the worker's extension does."""
        fault = self.next_fault()
        if fault == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if fault == "hang":
            time.sleep(3600)
        self.is_odd = fault == "odd"
        if fault == "refuse":
            return {"error": "refused"}
        try:
            self.tensors = read_file(path)
        except OSError as error:
            return {"error": str(error)}
        sums = {key: naive_checksum(array) for key, array in self.tensors.items()}
        if fault == "corrupt":
            sums["probe.tokens"] = "0" * 16
        return {"checksums": sums, "dtype": "float32", "num_compared": 1}


class Handler(BaseHTTPRequestHandler):
    """The routes."""

    server: Server

    def do_GET(self) -> None:
        self._reply({"world_size": 1} if self.path == "/get_world_size" else {})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        request = json.loads(body) if body else {}
        path = self.path.partition("?")[0]
        reply: dict[str, Any] = {}
        if path == "/collective_rpc":
            reply = {"results": [self.server.load(Path(request["kwargs"]["path"]))]}
        elif path == "/reset_prefix_cache":
            reply = {"success": True}
        elif path == "/update_weight_version":
            self.server.version = request["new_version"]
        elif path == "/inference/v1/generate":
            if request.get("priority", 0) >= 0 or self.server.policy != "priority":
                time.sleep(3600)  # behind requests that last
            reply = {"choices": [self._choice()]}
        self._reply(reply)

    def _choice(self) -> dict[str, Any]:
        tokens = self.server.tensors["probe.tokens"].tolist()
        logprobs = self.server.tensors["probe.logprobs"].tolist()
        spans: list[dict[str, Any]] = [
            {"version": self.server.version, "start": 0, "end": len(tokens)}
        ]
        if self.server.is_odd:
            spans.append({"version": 1})
        return {
            "token_ids": tokens,
            "logprobs": {"content": [{"logprob": value} for value in logprobs]},
            "weight_versions": spans,
        }

    def _reply(self, content: dict[str, Any]) -> None:
        encoded = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(encoded)))
        self.end_headers()
        self.wfile.write(encoded)

    def log_message(self, format: str, *args: Any) -> None:
        pass


def main() -> None:
    """Serve until the process is ended. Like vLLM, it has a child that would outlive it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("faults", type=Path)
    parser.add_argument("--port", type=int)
    parser.add_argument("--host")
    parser.add_argument("--scheduling-policy", default="fcfs")
    arguments, _ = parser.parse_known_args()
    engine = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"])
    sys.stderr.write(f"engine {engine.pid}\n")
    sys.stderr.flush()
    server = Server((arguments.host, arguments.port), Handler)
    server.faults = arguments.faults
    server.policy = arguments.scheduling_policy
    server.serve_forever()


if __name__ == "__main__":
    main()
