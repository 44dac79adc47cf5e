"""The process that decodes videos. Started by `data.video` as a script; reads requests from the socket that is its standard input.

A request is an 8-byte length, a JSON header and the file; the answer is an 8-byte length, a JSON header and the pixels.
After its imports the process may open no file and no socket, write no file and take no more than a set address space:
whatever a forged file makes the decoder do, it can only die.
"""

from __future__ import annotations

import io
import json
import re
import resource
import socket
import struct
import sys
from bisect import bisect_right
from typing import Any

LENGTH = struct.Struct(">Q")
# A 16x16 GIF of one frame: decoded once behind the closed doors, so that a decoder that needs them open is found at the start.
TEST_CLIP = (
    "47494638376110001000810000000000ffffff0000000000002c00000000100010004008290001081c48b060c10008111a3c9830c0c2871023426ce8"
    "50a2c58b18334e6c2891a2c68f2043020808003b"
)
TEST_REQUEST = {"frames_per_second": 1.0, "max_frames": 1, "num_pixels": 256, "max_pixels": 256, "max_clip_bytes": 768}
MAX_FAULTY_SHARE = 0.02  # frames that the decoder may replace by their neighbours


def receive(connection: socket.socket, size: int) -> bytearray | None:
    """Return exactly `size` bytes, or `None` when the parent is gone."""
    content = bytearray(size)
    view = memoryview(content)
    while view:
        count = connection.recv_into(view)
        if count == 0:
            return None
        view = view[count:]
    return content


def send(connection: socket.socket, header: dict[str, Any], content: Any = b"") -> None:
    """Send an answer."""
    encoded = json.dumps(header).encode()
    connection.sendall(LENGTH.pack(len(encoded)) + encoded)
    connection.sendall(content)


def choose_frames(starts: list[float], ends: list[float], frames_per_second: float, max_frames: int) -> list[int]:
    """Return the frames shown at the middles of equal parts of the clip: as many parts as the rate asks for, at most `max_frames`.

    Args:
        starts: `[frames]` seconds at which each frame appears, ascending.
        ends: `[frames]` seconds at which it ends.
        frames_per_second: Rate of sampling.
        max_frames: Most frames.
    """
    duration = ends[-1] - starts[0]
    num_parts = min(max_frames, len(starts), max(1, round(duration * frames_per_second)))
    middles = [starts[0] + (part + 0.5) * (duration / num_parts) for part in range(num_parts)]
    # A frame that stays longer than a part is taken once.
    return sorted({min(max(bisect_right(starts, middle) - 1, 0), len(starts) - 1) for middle in middles})


def seconds_per_frame(duration: float, num_frames: int, frames_per_second: float) -> float:
    """Return the time from one sampled frame to the next: that of the rate asked for, or more where there were too few frames for it.

    A clip is rarely a whole number of parts long; what rounding their number takes from a part is not counted.

    Args:
        duration: Seconds of the whole clip.
        num_frames: Frames sampled from it.
        frames_per_second: Rate asked for.
    """
    return max(1 / frames_per_second, duration / num_frames)


def read_frames(reader: Any, frames: list[int]) -> Any:
    """Return `[frames, height, width, 3]` pixels."""
    import decord
    import numpy as np

    try:
        return np.ascontiguousarray(reader.get_batch(frames).asnumpy())
    except decord.DECORDError:
        # The decoder pads rows of some narrow widths (16, 32, 96, …), takes the padding for more channels, [height, width, more],
        # and then cannot copy them into a batch. One at a time they come as they are, and can be cut.
        padded = [reader[frame].asnumpy() for frame in frames]
        rows = [frame.reshape(frame.shape[0], -1)[:, : frame.shape[1] * 3] for frame in padded]
        return np.stack([row.reshape(frame.shape[0], frame.shape[1], 3) for row, frame in zip(rows, padded, strict=True)])


def decode(content: bytearray, request: dict[str, Any]) -> tuple[dict[str, Any], Any]:
    """Return the answer's header and the pixels of one video."""
    import decord
    import numpy as np

    reader = decord.VideoReader(io.BytesIO(content), ctx=decord.cpu(0), num_threads=1, fault_tol=MAX_FAULTY_SHARE)
    try:
        spans = np.asarray(reader.get_frame_timestamp(np.arange(len(reader))), dtype=np.float64)
        starts, ends = spans[:, 0].tolist(), spans[:, 1].tolist()
        if not np.isfinite(spans).all() or starts != sorted(starts) or ends[-1] < starts[0]:
            return {"reason": "unreadable", "detail": "its time stamps are not ascending"}, b""
        frames = choose_frames(starts, ends, request["frames_per_second"], request["max_frames"])
        needed = len(frames) * request["num_pixels"] * 3
        if needed > request["max_clip_bytes"]:
            detail = f"{len(frames)} frames take {needed} bytes, expected at most {request['max_clip_bytes']}"
            return {"reason": "oversized", "detail": detail}, b""
        pixels = read_frames(reader, frames)
    finally:
        # An idle reader decodes the rest of the clip into memory.
        del reader
    if pixels.shape[1] * pixels.shape[2] > request["max_pixels"]:
        return {"reason": "oversized", "detail": f"frames are {pixels.shape[2]}x{pixels.shape[1]}, more than the headers state"}, b""
    # The decoder keeps times in single precision; what is below a millisecond is noise.
    timestamps = [round(starts[frame] - starts[0], 3) for frame in frames]
    seconds = seconds_per_frame(round(ends[-1] - starts[0], 3), len(frames), request["frames_per_second"])
    return {"shape": pixels.shape, "timestamps": timestamps, "seconds_per_frame": seconds}, pixels.data.cast("B")


def plain(message: str) -> str:
    """Return the last line of a decoder's message without clock times and source files."""
    lines = message.strip().splitlines() or [""]
    return re.sub(r"\[\d\d:\d\d:\d\d\] \S+: ", "", lines[-1])[:200]


def serve(connection: socket.socket) -> None:
    """Answer requests until the parent is gone."""
    while (prefix := receive(connection, LENGTH.size)) is not None:
        header = receive(connection, LENGTH.unpack(prefix)[0])
        if header is None:
            return
        request = json.loads(header)
        content = receive(connection, request["size"])
        if content is None:
            return
        try:
            answer, pixels = decode(content, request)
        except MemoryError:
            answer, pixels = {"reason": "oversized", "detail": "decoding it needs more memory than the worker may take"}, b""
        except Exception as error:  # the decoder raises its own types, StopIteration and bare assertions
            answer, pixels = {"reason": "unreadable", "detail": f"{type(error).__name__}: {plain(str(error))}"}, b""
        send(connection, answer, pixels)


def main() -> None:
    """Import the decoder, close every door, say so, and serve."""
    connection = socket.socket(fileno=0)
    connection.settimeout(None)
    try:
        import decord

        decord.logging.set_level(decord.logging.QUIET)
        lock_down(int(sys.argv[1]))
        decode(bytearray.fromhex(TEST_CLIP), TEST_REQUEST)
    except Exception as error:  # a broken native library raises OSError, an older NumPy AttributeError
        send(connection, {"reason": "start", "detail": f"{type(error).__name__}: {error}"})
        return
    send(connection, {"ready": True})
    serve(connection)


def lock_down(memory_bytes: int) -> None:
    """Give up what decoding from memory does not need, for good."""
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # Descriptors 0 to 2 are taken and no new one may be opened: neither a file nor an address.
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))


if __name__ == "__main__":
    main()
