"""What the copy of a run costs: processor time of a pass that uploads nothing, and per gigabyte.

`python benchmarks/mirror.py [--steps 10000] [--megabytes 512]` writes below /tmp and removes it.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path

from zppo_mm.mirror.upload import Mirror
from zppo_mm.run_folder import RunFolder
from zppo_mm.training.checkpoint_files import STATE_FILE, folder_of_step, publish

TENSORS = "__0_0.distcp"


def seconds_of(action: Callable[[], object]) -> float:
    """Return the processor time of all threads of this process."""
    started = time.process_time()
    action()
    return time.process_time() - started


def write_records(folder: RunFolder, num_steps: int) -> None:
    """Write the files of some steps."""
    for path_of in (folder.transcript_of, folder.buffer_of):
        path_of(1).parent.mkdir(parents=True)
        for step in range(1, num_steps + 1):
            path_of(step).write_text("a line\n")


def write_checkpoint(folder: RunFolder, content: bytes) -> None:
    """Write a checkpoint of one large file."""
    target = folder_of_step(folder.checkpoints, 1)
    partial = target.with_name(f".{target.name}.partial")
    partial.mkdir(parents=True)
    (partial / STATE_FILE).write_text("{}")
    (partial / TENSORS).write_bytes(content)
    publish(partial, target, {TENSORS: zlib.crc32(content)}, keep=1)


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--megabytes", type=int, default=512)
    options = parser.parse_args()
    scratch = Path(tempfile.mkdtemp())
    try:
        folder = RunFolder(scratch / "run")
        write_records(folder, options.steps)
        mirror = Mirror(folder, f"file://{scratch}/store/run", keep=1)
        mirror.begin({}, 0)
        first = seconds_of(mirror.finish)
        second = seconds_of(mirror.finish)
        print(f"records of {options.steps} steps: first pass {first:.2f} s, later {second:.2f} s")
        write_checkpoint(folder, bytes(options.megabytes << 20))
        copied = seconds_of(mirror.finish) - second
        source = folder_of_step(folder.checkpoints, 1) / TENSORS
        plain = seconds_of(lambda: shutil.copyfile(source, scratch / "copy"))
        print(f"checkpoint of {options.megabytes} MiB: {copied:.2f} s, a plain copy {plain:.2f} s")
    finally:
        shutil.rmtree(scratch)


if __name__ == "__main__":
    main()
