"""The bundled teacher behind a chat server, as a command: `PORT`."""

from __future__ import annotations

import sys

from tests.support.loopback_server import LoopbackServer, TinyModel
from zppo_mm.bundled import TEACHER_DIR

if __name__ == "__main__":
    LoopbackServer(TinyModel(TEACHER_DIR), port=int(sys.argv[1])).serve_forever()
