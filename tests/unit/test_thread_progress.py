"""What is progress of a thread, whatever the time it takes: no phase of a healthy run is taken for
one that hangs.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from contextlib import contextmanager
from pathlib import Path

from data.file_lock import locked
from zppo_mm.config.schema import TeacherConfig
from zppo_mm.parallel.thread_progress import ThreadProgress
from zppo_mm.run.hangs import BOUNDED_WAITS
from zppo_mm.serving.client_process import PoolProcess
from zppo_mm.serving.servers import RetryPolicy
from zppo_mm.teacher.served.chat_api import ChatRequest
from zppo_mm.teacher.served.pool_settings import PoolSettings

NUM_CHECKS, NUM_CALLS = 5, 20
PATIENCE_SECONDS = 120.0


@contextmanager
def running(work: Callable[[], object]) -> Iterator[threading.Thread]:
    """Do something in a thread, which must end with the block."""
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    yield thread
    thread.join(PATIENCE_SECONDS)
    assert not thread.is_alive()


def eventually(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not holds():
        assert time.monotonic() < deadline, "it never came to that"
        time.sleep(0.01)


def is_waiting(progress: ThreadProgress) -> bool:
    return not any(progress.has_moved() for _ in range(NUM_CHECKS))


def pause(gate: threading.Lock) -> None:
    gate.acquire()


def test_the_next_call_of_the_same_function_is_progress() -> None:
    gate, started = threading.Lock(), []

    def work() -> None:
        for number in range(NUM_CALLS):
            started.append(number)
            pause(gate)

    gate.acquire()
    with running(work) as thread:
        progress = ThreadProgress(thread)
        for number in range(NUM_CALLS):
            while len(started) == number:
                time.sleep(0.001)
            time.sleep(0.01)  # for the call itself, which is all that happens in between
            assert progress.has_moved()
            eventually(lambda: not progress.has_moved())
            gate.release()


def test_one_call_that_reads_is_progress() -> None:
    source, sink = os.pipe()
    # It returns when it has all, after as many system calls as there are pieces.
    file = os.fdopen(source, "rb")
    with running(lambda: file.read(NUM_CHECKS + 1)) as thread, os.fdopen(sink, "wb", 0) as pieces:
        progress = ThreadProgress(thread, is_computing_progress=False)
        for _ in range(NUM_CHECKS):
            eventually(lambda: is_waiting(progress))
            pieces.write(b".")
            eventually(progress.has_moved)
    file.close()


def assert_may_wait(thread: threading.Thread) -> None:
    """Assert that the thread waits in one call, and that the run allows it to."""
    unwatched = ThreadProgress(thread, is_computing_progress=False)
    eventually(lambda: is_waiting(unwatched))
    progress = ThreadProgress(thread, BOUNDED_WAITS, is_computing_progress=False)
    assert all(progress.has_moved() for _ in range(NUM_CHECKS))
    assert is_waiting(unwatched)


def test_what_another_process_makes_is_waited_for(tmp_path: Path) -> None:
    def work() -> None:
        with locked(tmp_path / "lock"):
            pass

    # The lock is given back before the thread that waits for it is joined.
    with contextlib.ExitStack() as stack, locked(tmp_path / "lock"):
        assert_may_wait(stack.enter_context(running(work)))


def test_a_teacher_may_think_for_long() -> None:
    policy = RetryPolicy(max_seconds=PATIENCE_SECONDS, num_retries=None)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/v1"
        settings = PoolSettings(urls=(url,), model="tiny", config=TeacherConfig())
        with contextlib.closing(PoolProcess(settings)) as pool:
            answers = pool.submit([ChatRequest("What is 1 + 1?", 1, 1.0, 4, 0)], policy)

            def work() -> None:
                with contextlib.suppress(CancelledError):
                    answers.result()

            with running(work) as thread:
                silent.settimeout(PATIENCE_SECONDS)
                silent.accept()
                assert_may_wait(thread)
                pool.close()
