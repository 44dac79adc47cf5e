"""Runs a server and ends it, with every process that it started, when the run is gone.

    python server_keeper.py COMMAND ...

Its standard input is a pipe from the run that nobody writes to: however the run ends, the kernel
closes it. The keeper leads the process group of the server. It is started as a file, so that it
imports nothing but the standard library.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

GRACE_SECONDS = 5.0
"""Time for a server to clean up after itself."""


def main() -> None:
    """Start the command, and wait for its end or the run's."""
    try:
        server = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL)
    except OSError as error:
        sys.stderr.write(f"server_keeper: cannot start {sys.argv[1]!r}, got {error}\n")
        sys.exit(1)
    threading.Thread(target=_end_with_run, args=(server,), daemon=True).start()
    code = server.wait()
    sys.stderr.write(f"server_keeper: the server ended with code {code}\n")
    sys.stderr.flush()
    # What it leaves behind: an engine whose own parent was killed.
    os.killpg(0, signal.SIGKILL)


def _end_with_run(server: subprocess.Popen[bytes]) -> None:
    sys.stdin.buffer.read()
    server.terminate()
    try:
        server.wait(GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main()
