"""What the frames of videos that a disk keeps save: per clip, and per step of real runs.

    python benchmarks/video_cache.py [--clips 8] [--steps 6] [--cases 360p demo] [key=v …]

Clips: opened without a cache, then with one that has not got them, then with one that has, one
after the other for each clip; seconds and CPU seconds of this process and its decoder.

Steps: the demo on its video questions with two processes, and `on_distill` with one process on
questions with an H.264 clip of 10 seconds, 640 x 360, 30 frames per second, each asked once. Three
runs take turns step by step, the others stopped meanwhile: without a cache, with an empty one, and
with what a run before has filled. The first step, for which nothing was prefetched, and the last do
not count.
"""

from __future__ import annotations

import argparse
import io
import json
import signal
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import av
import numpy as np
import psutil

from benchmarks.media_sharing import OPTIONS, Turns, start
from data.media.clip_cache import ClipCache
from data.media.opening import MediaLimits
from data.media.store import MediaStore
from data.question import MediaRef
from data.sample import ShardSample
from data.shard_writer import write_shards
from encoders.processor import patchify_video, resize_video
from zppo_mm.bundled import STUDENT_DIR
from zppo_mm.rollout.processor import frame_sampling, read_processor

SECONDS, RATE, HEIGHT, WIDTH, BLOCK = 10, 30, 360, 640, 8
PER_STEP = 4
DEMO_OPTIONS = (
    "modality=video",
    "parity.mode=none",
    "evaluation.num_questions=1",
    "evaluation.interval=0",
    "checkpoint.interval=1000",
    "observability.report=false",
    "observability.progress_bar=false",
)


def clip(seed: int) -> bytes:
    """Return an H.264 file of squares that move upwards."""
    random = np.random.default_rng(seed)
    rows, frames = HEIGHT // BLOCK, SECONDS * RATE
    squares = random.integers(0, 256, (rows + frames, WIDTH // BLOCK, 3), dtype=np.uint8)
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream: Any = container.add_stream("libx264", rate=RATE, options={"preset": "veryfast"})
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for index in range(frames):
            first = index // 2
            picture = np.kron(squares[first : first + rows], np.ones((BLOCK, BLOCK, 1), np.uint8))
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return file.getvalue()


def write_questions(folder: Path, count: int) -> list[MediaRef]:
    """Write shards of questions with a clip each; returns the clips."""
    samples = []
    for index in range(count):
        fields = {"id": f"q{index}", "question": "?", "answer": "1", "answer_type": "math"}
        samples.append(ShardSample(f"k{index}", fields, [("mp4", clip(index))]))
    write_shards(folder, samples)
    [shard] = folder.glob("*.tar")
    return [MediaRef("video", str(shard), f"k{index}", "mp4") for index in range(count)]


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Return seconds and CPU seconds of this process and its children."""
    started, cpu = time.perf_counter(), cpu_seconds()
    work()
    return time.perf_counter() - started, cpu_seconds() - cpu


def cpu_seconds() -> float:
    own = psutil.Process()
    times = [each.cpu_times() for each in (own, *own.children(recursive=True))]
    return sum(each.user + each.system for each in times)


def measure_clips(work: Path, count: int) -> None:
    """Open clips in three ways, and print a row for each."""
    references = write_questions(work / "clips", count)
    processor = read_processor(STUDENT_DIR)
    assert processor is not None
    store = MediaStore(MediaLimits(sampling=frame_sampling(processor)))
    clips = ClipCache(store, work / "frames", 64 << 30)
    resize = partial(resize_video, config=processor)

    def decode(reference: MediaRef) -> None:
        frames = store.open(reference)
        patchify_video(resize(frames.pixels), frames.timestamps, processor)

    def find(reference: MediaRef) -> None:
        frames = clips.open(reference, "", resize)
        patchify_video(frames.pixels, frames.timestamps, processor)

    decode(references[0])  # starts the decoder
    ways = {"decoded": decode, "decoded and kept": find, "found": find}
    spent: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
    for reference in references:
        for way, open_clip in ways.items():
            spent[way].append(timed(partial(open_clip, reference)))
    assert clips.counts == {"misses": count, "hits": count}
    store.close()
    first = statistics.mean(cpu for _, cpu in spent["decoded"])
    for way, times in spent.items():
        seconds, cpu = (statistics.mean(column) for column in zip(*times, strict=True))
        print(
            f"clip  {way:17} {1000 * seconds:7.1f} ms  {1000 * cpu:7.1f} ms CPU "
            f"({first / cpu:5.2f} x)  {clips.num_bytes() / count / 1e6:5.2f} MB kept a clip",
            flush=True,
        )


def measure_steps(case: str, work: Path, arguments: argparse.Namespace) -> None:
    """Run with and without kept frames, and print a row for each."""
    work.mkdir()
    num_steps = arguments.steps + 2
    common = [f"train.train_iters={num_steps}"]
    if case == "demo":
        common, processes = [*DEMO_OPTIONS, *common], 2
    else:
        # The next step's questions are opened ahead.
        write_questions(work / "shards", PER_STEP * (num_steps + 1))
        source = f"data.train=[{{path: {work / 'shards'}, weight: 1}}]"
        common = [*OPTIONS, *common, source, f"train.num_new_questions={PER_STEP}"]
        processes = 1
    common += arguments.options
    filled = f"data.video_cache_dir={work / 'filled'}"
    start("before", work, processes, [*common, filled]).process.wait()
    variants = {
        "without": [],
        "empty at first": [f"data.video_cache_dir={work / 'empty'}"],
        "filled before": [filled],
    }
    runs = []
    for name, options in variants.items():
        runs.append(start(name, work, processes, [*common, *options]))
        runs[-1].step()  # one after the other, so that no start takes part of another's step
    order, is_going = list(runs), True
    while is_going:
        is_going = all([each.step() for each in order])  # noqa: C419 - all of them take the step
        order = [*order[1:], order[0]]
    for each in runs:
        each.signal(signal.SIGCONT)
        each.process.wait()
    print_steps(case, runs)


def print_steps(case: str, runs: list[Turns]) -> None:
    losses = {json.dumps([line.get("policy/loss") for line in each.metrics()]) for each in runs}
    assert len(losses) == 1, f"the runs differ: {losses}"
    base: tuple[float, float] | None = None
    for each in runs:
        row = statistics.mean(each.seconds[1:-1]), statistics.mean(each.cpu_seconds[1:-1])
        base = base or row
        ratios = "  ".join(
            f"{value:7.2f} ({first / value:4.2f} x)" for value, first in zip(row, base, strict=True)
        )
        counts = ", ".join(
            f"{name} {sum(step.get(f'video_cache/{name}', 0) for step in each.metrics()):g}"
            for name in ("hits", "misses")
        )
        print(f"{case:5} {each.name:15} {ratios}  {counts}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clips", type=int, default=8)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--cases", nargs="*", default=["360p", "demo"])
    parser.add_argument("options", nargs="*", metavar="key=v")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if arguments.clips:
            measure_clips(Path(folder), arguments.clips)
        print("seconds and CPU seconds of a step, and the first row's over them:", flush=True)
        for case in arguments.cases:
            measure_steps(case, Path(folder) / f"{case}-runs", arguments)


if __name__ == "__main__":
    main()
