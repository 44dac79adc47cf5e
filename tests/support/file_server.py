"""A web server of a folder, with what stores say of their objects, and failures on demand."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from tests.support.serving import serving


@dataclass
class FileServer:
    """What the server was asked for, and how often it is to fail.

    Attributes:
        url: Its address.
        gets: Files that it sent, by name; listings are none.
        failures: Requests for a file that are refused before one is answered, by name.
        status: What it refuses with.
    """

    url: str = ""
    gets: Counter[str] = field(default_factory=Counter)
    failures: Counter[str] = field(default_factory=Counter)
    status: int = 503


@contextmanager
def serve_files(folder: Path) -> Iterator[FileServer]:
    """Serve a folder on a free port until the end of the block."""
    state = FileServer()

    class Handler(SimpleHTTPRequestHandler):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments, directory=str(folder))

        def send_head(self) -> Any:
            name = Path(self.path).name
            if state.failures[name] > 0:
                state.failures[name] -= 1
                self.send_error(state.status)
                return None
            if self.command == "GET" and Path(self.translate_path(self.path)).is_file():
                state.gets[name] += 1
            return super().send_head()

        def end_headers(self) -> None:
            path = Path(self.translate_path(self.path))
            if path.is_file():
                self.send_header("ETag", hashlib.md5(path.read_bytes()).hexdigest())
            super().end_headers()

        def log_message(self, *arguments: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.url = f"http://127.0.0.1:{server.server_port}"
    with serving(server):
        yield state
