"""The newest step's metrics as a page that Prometheus reads."""

from __future__ import annotations

import math
import re
import threading
from collections.abc import Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from zppo_mm.observability.samples import Sample

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def exposition(run: str, step: int, values: Mapping[str, float]) -> str:
    """Return metrics in Prometheus' text format: `accuracy/plain` is
    `zppo_accuracy_plain{run="…"}`. Source:
    https://prometheus.io/docs/instrumenting/exposition_formats/
    """
    label = run.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
    lines = []
    for name, value in {"step": float(step), **values}.items():
        gauge = "zppo_" + re.sub(r"[^a-zA-Z0-9_]", "_", name)
        lines.append(f'# TYPE {gauge} gauge\n{gauge}{{run="{label}"}} {_number(value)}\n')
    return "".join(lines)


def _number(value: float) -> str:
    """Write a number as the format wants it."""
    if math.isnan(value):
        return "NaN"
    return repr(float(value)) if math.isfinite(value) else f"{value:+}".replace("inf", "Inf")


class PrometheusEndpoint:
    """Serves `/metrics`. Implements `Tracker`.

    Args:
        host: Address to listen at.
        port: Its port; 0 takes a free one.
        run: Name of the run, a label of every metric.
    """

    def __init__(self, host: str, port: int, run: str) -> None:
        self._run = run
        self._page = b""
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            timeout = 10.0  # seconds, of a client that sends nothing

            def do_GET(self) -> None:
                if self.path != "/metrics":
                    self.send_error(404)
                    return
                page = endpoint._page
                self.send_response(200)
                self.send_header("Content-Type", CONTENT_TYPE)
                self.send_header("Content-Length", str(len(page)))
                self.end_headers()
                self.wfile.write(page)

            def log_message(self, format: str, *arguments: object) -> None:
                """Write no line per request."""

        self._server = ThreadingHTTPServer((host, port), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, name="metrics", daemon=True).start()

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self._server.server_address[1])

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Show these values from now on."""
        self._page = exposition(self._run, step, values).encode()

    def write_samples(self, step: int, samples: Sequence[Sample]) -> None:
        """Prometheus has numbers alone."""

    def close(self) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._server.server_close()
