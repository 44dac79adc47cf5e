"""Decode videos in processes that may hang or die without harm to the run."""

from __future__ import annotations

import json
import logging
import math
import os
import queue
import signal
import socket
import struct
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data.errors import DataError, MediaError

logger = logging.getLogger(__name__)

WORKER = Path(__file__).with_name("video_worker.py")
LENGTH = struct.Struct(">Q")
START_SECONDS = 120.0  # importing the decoder from a cold network disk
MAX_REQUESTS = 1000  # a decoder loses some memory on damaged files, so workers are replaced now and then
MAX_HEADER_BYTES = 1 << 20


class _WorkerGone(Exception):
    """The worker closed its socket."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """Frames `[frames, height, width, 3]`, their seconds and the seconds between them, or why there are none."""

    pixels: npt.NDArray[np.uint8] | None = None
    timestamps: tuple[float, ...] = ()
    seconds_per_frame: float = 0.0
    reason: str = ""
    detail: str = ""


class VideoWorker:
    """One decoding process and the socket to it."""

    def __init__(self, memory_bytes: int) -> None:
        """Start the process and wait until it has imported its decoder.

        Raises:
            DataError: It does not start, so that no video could be decoded at all.
        """
        self._num_requests = 0
        self._connection, child = socket.socketpair()
        # -P: the script's folder must not come first on the import path, its modules have everyday names.
        command = [sys.executable, "-P", str(WORKER), str(memory_bytes)]
        environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}  # its threads would count against the address space
        with child:
            # Decoders write pages to stderr about forged files; what matters comes back in the answer.
            self._process = subprocess.Popen(
                command, stdin=child.fileno(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment
            )
        try:
            answer = self._receive_header(time.monotonic() + START_SECONDS)
        except (OSError, _WorkerGone) as error:
            answer = {"detail": f"{type(error).__name__}, {self.kill()}"}
        if "ready" not in answer:
            self.kill()
            raise DataError(f"video: the decoder does not start ({answer['detail']}); install it with: pip install decord2")

    def request(self, header: dict[str, Any], content: bytes, deadline: float) -> Answer:
        """Send one video and return the answer.

        Raises:
            TimeoutError: The deadline passed.
            OSError: The connection broke.
            ValueError, TypeError, KeyError: The answer makes no sense.
            _WorkerGone: The process ended.
        """
        self._num_requests += 1
        encoded = json.dumps({**header, "size": len(content)}).encode()
        self._connection.settimeout(_remaining(deadline))
        self._connection.sendall(LENGTH.pack(len(encoded)) + encoded)
        self._connection.settimeout(_remaining(deadline))
        self._connection.sendall(content)
        answer = self._receive_header(deadline)
        if "shape" not in answer:
            return Answer(reason="oversized" if answer["reason"] == "oversized" else "unreadable", detail=str(answer["detail"]))
        # A forged file may have taken the worker over: its answer is checked like any input.
        frames, height, width, channels = map(int, answer["shape"])
        timestamps, seconds = tuple(map(float, answer["timestamps"])), float(answer["seconds_per_frame"])
        if not (0 < frames <= header["max_frames"] and min(height, width) > 0 and height * width <= header["max_pixels"] and channels == 3):
            raise ValueError(f"shape {answer['shape']}")
        if len(timestamps) != frames or not all(map(math.isfinite, timestamps)):
            raise ValueError(f"{len(timestamps)} time stamps for {frames} frames")
        if not 0 < seconds < math.inf:
            raise ValueError(f"{seconds} seconds per frame")
        pixels = np.empty((frames, height, width, 3), np.uint8)
        self._receive_into(pixels.data.cast("B"), deadline)
        return Answer(pixels=pixels, timestamps=timestamps, seconds_per_frame=seconds)

    def is_fit(self) -> bool:
        """Return whether the process still runs and has not served its time."""
        return self._process.poll() is None and self._num_requests < MAX_REQUESTS

    def kill(self) -> str:
        """End the process and return how it ended."""
        self._connection.close()
        if self._process.poll() is None:
            self._process.kill()
        code = self._process.wait()
        return f"ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit status {code}"

    def how_it_ended(self) -> str:
        """Return how a process ended that closed its socket."""
        try:
            self._process.wait(timeout=5.0)
        except subprocess.TimeoutExpired:
            return "closed its socket, then " + self.kill()
        return self.kill()

    def _receive_header(self, deadline: float) -> dict[str, Any]:
        prefix = bytearray(LENGTH.size)
        self._receive_into(memoryview(prefix), deadline)
        (length,) = LENGTH.unpack(prefix)
        if length > MAX_HEADER_BYTES:
            raise _WorkerGone
        encoded = bytearray(length)
        self._receive_into(memoryview(encoded), deadline)
        answer = json.loads(encoded)
        if not isinstance(answer, dict):
            raise _WorkerGone
        return answer

    def _receive_into(self, view: memoryview, deadline: float) -> None:
        while view:
            self._connection.settimeout(_remaining(deadline))
            count = self._connection.recv_into(view)
            if count == 0:
                raise _WorkerGone
            view = view[count:]


def _remaining(deadline: float) -> float:
    remaining = deadline - time.monotonic()
    if remaining <= 0:
        raise TimeoutError
    return remaining


class VideoDecoder:
    """A fixed number of workers, each started when first needed; safe to use from several threads."""

    def __init__(self, num_workers: int, memory_bytes: int, timeout_seconds: float) -> None:
        """Start nothing yet.

        Args:
            num_workers: Most processes, and most videos decoded at once.
            memory_bytes: Address space of each.
            timeout_seconds: Time for one video, after which its worker is killed.
        """
        self._memory_bytes = memory_bytes
        self._timeout_seconds = timeout_seconds
        self._num_workers = num_workers
        self._slots: queue.LifoQueue[VideoWorker | None] = queue.LifoQueue()
        for _ in range(num_workers):
            self._slots.put(None)

    def decode(self, header: dict[str, Any], content: bytes) -> tuple[npt.NDArray[np.uint8], tuple[float, ...], float]:
        """Return `[frames, height, width, 3]` pixels, the seconds of each frame, and the seconds between two by the sampling rate.

        Raises:
            MediaError: `timeout`, `decoder_died`, `unreadable` or `oversized`; the next video gets a working decoder again.
            DataError: No decoder can be started.
        """
        worker = self._slots.get()
        answer: Answer
        try:
            worker, answer = self._answer(worker, header, content)
        except BaseException:
            worker = None  # it has ended, or is in the middle of an answer
            raise
        finally:
            self._slots.put(worker)
        if answer.pixels is None:
            raise MediaError(answer.reason, f"video: {answer.reason}: {answer.detail}; convert or remove the file")
        return answer.pixels, answer.timestamps, answer.seconds_per_frame

    def _answer(self, worker: VideoWorker | None, header: dict[str, Any], content: bytes) -> tuple[VideoWorker, Answer]:
        """Return the answer and the worker that gave it: the one at hand if it is fit, else a new one."""
        if worker is not None and worker.is_fit():
            try:
                return worker, self._ask(worker, header, content)
            except MediaError as error:
                if error.reason != "decoder_died":
                    raise
                logger.info("%s; asking a new decoder, because an earlier video may have been the cause", error)
        elif worker is not None:
            worker.kill()
        fresh = VideoWorker(self._memory_bytes)
        return fresh, self._ask(fresh, header, content)

    def _ask(self, worker: VideoWorker, header: dict[str, Any], content: bytes) -> Answer:
        """Return the worker's answer; a worker that hangs or breaks off has ended when this raises."""
        try:
            return worker.request(header, content, time.monotonic() + self._timeout_seconds)
        except TimeoutError as error:
            worker.kill()
            message = f"video: not decoded within {self._timeout_seconds:g} s; shorten it or raise data.decode_timeout_seconds"
            raise MediaError("timeout", message) from error
        except (OSError, ValueError, TypeError, KeyError, _WorkerGone) as error:
            how = worker.how_it_ended()
            raise MediaError("decoder_died", f"video: the decoder died on it ({how}); convert or remove the file") from error

    def close(self) -> None:
        """End all workers; the next video starts new ones."""
        workers = [self._slots.get() for _ in range(self._num_workers)]
        for worker in workers:
            if worker is not None:
                worker.kill()
            self._slots.put(None)
