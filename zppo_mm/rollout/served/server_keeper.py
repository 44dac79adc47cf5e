"""Runs a server and ends it, with every process that it started, when the run is gone.

    python server_keeper.py COMMAND ...

Its standard input is a pipe from the run that nobody writes to: however the run ends, the kernel
closes it. The keeper leads the process group of the server. It is started as a file, so that it
imports nothing but the standard library.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading

GRACE_SECONDS = 5.0
"""Time for a server to clean up after itself, where signals can reach it."""
BLOCKS = "/dev/shm/psm_"
"""How the files of the blocks of `multiprocessing.shared_memory` begin."""


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
    _kill_group()


def _end_with_run(server: subprocess.Popen[bytes]) -> None:
    sys.stdin.buffer.read()
    # A run that takes signals itself blocks them, and the server has that from it.
    if signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, []):
        server.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(GRACE_SECONDS)
            return
    _kill_group()


def _kill_group() -> None:
    """Kill the server, all that it started and the keeper, and remove the shared memory that they
    cannot remove any more.
    """
    for path in _shared_memory():
        with contextlib.suppress(OSError):
            os.unlink(path)
    os.killpg(0, signal.SIGKILL)


def _shared_memory() -> set[str]:
    """Return the files of the blocks of `multiprocessing.shared_memory` that the processes of this
    group have mapped.
    """
    found = set()
    for name in filter(str.isdecimal, os.listdir("/proc") if os.path.isdir("/proc") else ()):
        # It may end meanwhile, or be somebody else's.
        with contextlib.suppress(OSError):
            if os.getpgid(int(name)) != os.getpgid(0):
                continue
            with open(f"/proc/{name}/maps") as maps:
                fields = [line.rstrip("\n").split(maxsplit=5) for line in maps]
            found |= {each[5] for each in fields if each[5:] and each[5].startswith(BLOCKS)}
    return found


if __name__ == "__main__":
    main()
