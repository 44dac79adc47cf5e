"""Worker processes: killed when they hang, replaced when they die, and gone with their owner."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import psutil
import pytest
from PIL import Image

from data.errors import MediaError
from data.media.decoder import WORKER_MODULE, FrameLimits, MediaDecoder, WorkerLimits
from data.media.opening import MediaLimits, MediaOpener
from data.media.sampling import FrameSampling
from data.worker import KillableWorker, WorkerDied, WorkerNotStarted
from tests.support.running import run_python
from tests.support.shard_samples import png

LIMITS = WorkerLimits(memory_bytes=8 << 30, timeout_seconds=60)
PATIENCE_SECONDS = 60.0  # for what takes milliseconds on a quiet machine
SLOW_OWNER = """
import sys, threading
from data.media.opening import MediaLimits, MediaOpener
from tests.unit.test_data_worker import slow_jpeg
from tests.support.shard_samples import png
opener = MediaOpener(MediaLimits(decode_timeout_seconds=600))
opener.open(png(), "image")
threading.Timer(0.3, lambda: print("busy", flush=True)).start()
opener.open(slow_jpeg(20_000), "image")
"""


def slow_jpeg(num_scans: int) -> bytes:
    """Return a progressive picture whose last scan, which changes nothing, comes again and again:
    few bytes, much work.
    """
    file = io.BytesIO()
    Image.new("L", (6000, 6000)).save(file, "JPEG", progressive=True)
    content = file.getvalue()
    return content[:-2] + content[content.rindex(b"\xff\xda") : -2] * num_scans + content[-2:]


def wait_until(condition: Callable[[], bool]) -> bool:
    end = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def workers(pid: int | None = None) -> list[psutil.Process]:
    return [child for child in psutil.Process(pid).children() if WORKER_MODULE in child.cmdline()]


def is_gone(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


@pytest.fixture
def worker() -> Iterator[KillableWorker]:
    made = KillableWorker(WORKER_MODULE, str(LIMITS.memory_bytes), str(LIMITS.timeout_seconds))
    made.ready.result()
    yield made
    made.close()


@pytest.mark.medium
def test_an_image_that_takes_too_long_is_given_up_and_the_next_one_opens() -> None:
    opener = MediaOpener(MediaLimits(decode_timeout_seconds=1.0))
    with pytest.raises(
        MediaError,
        match=r"image: not decoded within 1 s; shrink it or raise data\.decode_timeout_seconds",
    ) as caught:
        opener.open(slow_jpeg(1000), "image")
    assert caught.value.reason == "timeout"
    opener.close()
    patient = MediaOpener(MediaLimits())
    assert patient.open(png(), "image").pixels.shape == (1, 6, 8, 3)
    patient.close()


def test_a_worker_ends_in_the_middle_of_its_work_when_its_owner_is_killed() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", SLOW_OWNER], stdout=subprocess.PIPE, cwd=os.getcwd()
    ) as owner:
        assert owner.stdout is not None
        assert owner.stdout.readline() == b"busy\n"
        (process,) = workers(owner.pid)
        owner.kill()
    assert wait_until(lambda: is_gone(process))


def test_a_worker_outlives_the_thread_that_first_needed_it() -> None:
    opener = MediaOpener(MediaLimits())
    before = {process.pid for process in workers()}
    thread = threading.Thread(target=opener.open, args=(png(), "image"))
    thread.start()
    thread.join()
    (process,) = [each for each in workers() if each.pid not in before]
    time.sleep(0.2)  # the signal of a thread's end would come at once
    opener.open(png(), "image")
    assert not is_gone(process)
    opener.close()
    assert wait_until(lambda: is_gone(process))


@pytest.mark.medium
def test_an_owner_that_is_forgotten_leaves_no_process() -> None:
    opener = MediaOpener(MediaLimits())
    before = {process.pid for process in workers()}
    opener.open(png(), "image")
    (process,) = [each for each in workers() if each.pid not in before]
    del opener
    assert wait_until(lambda: is_gone(process))


@pytest.mark.medium
def test_cpu_time_of_one_request_is_bounded_by_the_kernel() -> None:
    program = "from data.worker_process import limit_cpu\nlimit_cpu(1)\nwhile True:\n    pass\n"
    result = subprocess.run([sys.executable, "-c", program], check=False, timeout=600)
    assert result.returncode == -signal.SIGXCPU
    # What was used before does not count: the limit is one of each request.
    again = (
        "import time\nfrom data.worker_process import limit_cpu\nfor _ in range(4):\n    "
        "limit_cpu(1)\n"
    )
    again += (
        "    end = time.process_time() + 0.5\n    while time.process_time() < end:\n        pass\n"
    )
    subprocess.run([sys.executable, "-c", again], check=True, timeout=600)


def test_answers_that_make_no_sense_end_the_worker(worker: KillableWorker) -> None:
    request = {"kind": "image", "limits": {"max_pixels": 100}}

    def refuse(header: object) -> memoryview:
        raise ValueError("nonsense")

    reply = worker.submit(
        request, png(), deadline=time.monotonic() + PATIENCE_SECONDS, receive=refuse
    )
    with pytest.raises(WorkerDied, match="ValueError, ended by SIGKILL"):
        reply.result()
    assert not worker.is_running()
    decoder = MediaDecoder(1, LIMITS)
    assert (
        decoder.decode(
            "image",
            png(),
            FrameLimits(max_pixels=48, sampling=FrameSampling(), max_clip_bytes=1),
        ).pixels.size
        == 144
    )
    decoder.close()


def test_a_deadline_that_has_passed_ends_the_worker(worker: KillableWorker) -> None:
    request = {"kind": "image", "limits": {}}
    reply = worker.submit(request, deadline=time.monotonic() - 1)
    with pytest.raises(TimeoutError, match="did not answer in time, ended by SIGKILL"):
        reply.result()
    assert not worker.is_running()
    with pytest.raises(WorkerDied, match="ended by SIGKILL"):
        worker.submit(request, deadline=time.monotonic() + PATIENCE_SECONDS).result()


def test_what_does_not_start_says_why() -> None:
    with pytest.raises(WorkerNotStarted, match="ended with exit status 1"):
        KillableWorker("data.no_such_module").ready.result()


def test_a_worker_starts_where_the_machine_allows_less_memory_than_it_may_take() -> None:
    program = f"""
import resource
resource.setrlimit(resource.RLIMIT_AS, ({6 << 30}, {6 << 30}))
from data.media.opening import MediaLimits, MediaOpener
opener = MediaOpener(MediaLimits(worker_memory_bytes={8 << 30}))
print(opener.open(bytes.fromhex({png().hex()!r}), "image").pixels.shape)
opener.close()
"""
    done = run_python("-c", program)
    assert done.stdout == "(1, 6, 8, 3)\n", done.stderr
