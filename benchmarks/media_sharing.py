"""A step on videos with opened media shared between the ranks of the machine and prefetched, beside
one in which every rank opens what it needs.

    python benchmarks/media_sharing.py [--frames 32] [--side 448] [--questions 4] [--steps 4]
    [--layouts tensor data one] [key=v …]

Real runs (`on_distill`, the bundled student and teacher, two updates a step) on H.264 clips that
are made here: of two tensor ranks, two replicas, or one process, beside which a core is free for
prefetching. The variants are started one after the other and take turns step by step, the others
stopped meanwhile, so that a machine that slows down slows all alike. CPU seconds are those of all
processes of a run, decoders included. The first step, for which nothing could be prefetched, and
the last, in which the run ends, do not count; `opened` is of the whole run.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import av
import numpy as np
import psutil

from data.sample import ShardSample
from data.shard_writer import write_shards

CLONE = Path(__file__).resolve().parents[1]
POLL_SECONDS = 0.005
VARIANTS = {
    "each rank for itself": ("data.media_cache_bytes=0",),
    "shared": ("data.prefetch_media=false",),
    "shared and prefetched": (),
}
OPTIONS = (
    "method=on_distill",
    "parity.mode=none",
    "evaluation.num_questions=1",
    "evaluation.interval=0",
    "checkpoint.interval=1000",
    "observability.report=false",
    "observability.trackers=[]",
    "observability.progress_bar=false",
    "rollout.num_rollouts=2",
    "rollout.max_response_tokens=8",
    "train.updates_per_step=2",
    "data.max_prompt_tokens=100000",
    "data.decode_timeout_seconds=3600",
    "parallel.timeout_minutes=600",
    "train.micro_batch_tokens=8192",
)


def clip(num_frames: int, side: int, seed: int) -> bytes:
    """Return an H.264 file at 2 frames per second: squares that move upwards."""
    random = np.random.default_rng(seed)
    squares = random.integers(0, 256, (side // 16 + num_frames, side // 16, 3), dtype=np.uint8)
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream: Any = container.add_stream("libx264", rate=2)
        stream.width, stream.height, stream.pix_fmt = side, side, "yuv420p"
        for index in range(num_frames):
            picture = np.kron(
                squares[index : index + side // 16], np.ones((16, 16, 1), dtype=np.uint8)
            )
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return file.getvalue()


def write_questions(folder: Path, count: int, frames: int, side: int) -> None:
    """Write shards of questions with a clip each."""
    samples = []
    for index in range(count):
        fields = {"id": f"q{index}", "question": "?", "answer": "1", "answer_type": "math"}
        samples.append(ShardSample(f"k{index}", fields, [("mp4", clip(frames, side, index))]))
    write_shards(folder, samples)


@dataclass
class Turns:
    """A run that goes on for one step at a time."""

    name: str
    folder: Path
    process: subprocess.Popen[bytes]
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)

    def step(self) -> bool:
        """Go on until the next step is recorded; returns whether there was one."""
        before, cpu = self.num_steps(), self.cpu()
        started = time.perf_counter()
        self.signal(signal.SIGCONT)
        while self.num_steps() == before and self.process.poll() is None:
            time.sleep(POLL_SECONDS)
        seconds = time.perf_counter() - started
        if self.process.poll() is not None:
            return False
        self.signal(signal.SIGSTOP)
        self.seconds.append(seconds)
        self.cpu_seconds.append(self.cpu() - cpu)
        return True

    def num_steps(self) -> int:
        path = self.folder / "metrics.jsonl"
        return path.read_text().count("\n") if path.exists() else 0

    def tree(self) -> list[psutil.Process]:
        """Return all processes of the run."""
        try:
            parent = psutil.Process(self.process.pid)
            return [parent, *parent.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def cpu(self) -> float:
        total = 0.0
        for process in self.tree():
            try:
                times = process.cpu_times()
                total += times.user + times.system
            except psutil.NoSuchProcess:
                continue
        return total

    def signal(self, number: signal.Signals) -> None:
        for process in self.tree():
            process.send_signal(number)

    def metrics(self) -> list[dict[str, float]]:
        lines = (self.folder / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]


def start(name: str, work: Path, processes: int, options: Sequence[str]) -> Turns:
    """Start a run; the caller stops it after its first step."""
    folder = work / name.replace(" ", "_")
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes))
    command = [sys.executable, *launcher, str(CLONE / "tools" / "train_zppo.py")]
    process = subprocess.Popen(
        [*command, *options, f"output_dir={work}", f"name={folder.name}"],
        cwd=CLONE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=(work / f"{folder.name}.log").open("w"),
        start_new_session=True,
    )
    return Turns(name, folder, process)


def measure(layout: str, work: Path, arguments: argparse.Namespace) -> None:
    """Run all variants in one layout, and print a row for each."""
    tensor = 2 if layout == "tensor" else 1
    pixels = arguments.frames * arguments.side**2
    shared = [
        f"parallel.tensor_model_parallel_size={tensor}",
        f"train.num_new_questions={arguments.questions}",
        f"train.train_iters={arguments.steps + 2}",
        f"data.train=[{{path: {work / 'shards'}, weight: 1}}]",
        f"data.video_max_pixels={pixels}",
        f"data.video_max_frames={arguments.frames}",
        *arguments.options,
    ]
    runs = []
    for name, options in VARIANTS.items():
        runs.append(
            start(name, work / layout, 1 if layout == "one" else 2, [*OPTIONS, *shared, *options])
        )
        runs[-1].step()  # one after the other, so that no start takes part of another's step
    while all(each.step() for each in runs):
        pass
    for each in runs:
        each.signal(signal.SIGCONT)
        each.process.wait()
    first = None
    for each in runs:
        row = (statistics.mean(each.seconds[1:-1]), statistics.mean(each.cpu_seconds[1:-1]))
        first = first or row
        opened = sum(step.get("media/opened", 0) for step in each.metrics())
        prefetched = sum(step.get("media/prefetched", 0) for step in each.metrics())
        ratios = "  ".join(
            f"{value:8.2f} ({base / value:4.2f} x)" for value, base in zip(row, first, strict=True)
        )
        print(
            f"{layout:8} {each.name:22} {ratios}  opened {opened:g}, of these ahead {prefetched:g}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--frames", type=int, default=32)
    parser.add_argument("--side", type=int, default=448)
    parser.add_argument("--questions", type=int, default=4)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--layouts", nargs="+", default=["tensor", "data", "one"])
    parser.add_argument("options", nargs="*", metavar="key=v")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        count = arguments.questions * (arguments.steps + 3)
        write_questions(work / "shards", count, arguments.frames, arguments.side)
        print("seconds and CPU seconds of a step, and the first row's over them:", flush=True)
        for layout in arguments.layouts:
            (work / layout).mkdir()
            measure(layout, work, arguments)


if __name__ == "__main__":
    main()
