"""Samples per second of the question stream from `s3://` beside the same shards on the local disk,
on one machine.

    pip install -e '.[test-s3]'
    python benchmarks/remote_stream.py [--num-samples 2000] [--rounds 5]

The server is moto's, in a process of its own. Both streams read each sample's JSON and JPEG
(224 x 224) in shuffled order over all shards, as in data_stream.py. `first` begins with an empty
cache, so that every shard is fetched; `later` finds them there. The readers take turns. Seconds are
those of the CPU in the reading process, and those that passed, once the source is open; `open` are
the CPU seconds before, in which a client of the store is made and the indexes are fetched.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from data_stream import make_samples

from data.media.opening import MediaLimits, MediaOpener
from data.remote_files import RemoteFiles
from data.shard_writer import write_shards
from data.sources.opening import open_source
from data.stream import QuestionStream

BUCKET = "bench"
SERVE = """
import sys, time
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print(*server.get_host_and_port(), sep=":", flush=True)
sys.stdin.read()
"""
READERS = ("local", "first", "later")


def read_epoch(path: str, cache: Path, decode: bool) -> tuple[float, float, float]:
    """Read one epoch through the stream, indexes loaded again; return the CPU seconds of the
    reading process and those that passed, and the CPU seconds of opening.
    """
    start = time.process_time()
    source = open_source(path, files=RemoteFiles(cache, 1 << 40))
    cpu, wall = time.process_time(), time.perf_counter()
    stream = QuestionStream([(source, 1.0)], seed=0)
    opener = MediaOpener(MediaLimits())
    for question in stream.take(len(source)):
        if decode:
            opener.open_ref(question.media[0], source.reader)
        else:
            source.media_bytes(question.media[0])
    opener.close()
    return time.process_time() - cpu, time.perf_counter() - wall, cpu - start


def measure(folder: Path, cache: Path, count: int, rounds: int, decode: bool) -> list[list[float]]:
    """Return samples per CPU second and per second of each reader, and its seconds of opening;
    medians over the rounds.
    """
    results: dict[str, list[tuple[float, float, float]]] = {name: [] for name in READERS}
    for _ in range(rounds):
        shutil.rmtree(cache, ignore_errors=True)
        for name in READERS:
            path = str(folder) if name == "local" else f"s3://{BUCKET}/set"
            results[name].append(read_epoch(path, cache, decode))
    medians = [map(statistics.median, zip(*results[name], strict=True)) for name in READERS]
    return [[count / cpu, count / wall, opening] for cpu, wall, opening in medians]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--num-samples", type=int, default=2000, help="samples in 4 shards")
    parser.add_argument("--rounds", type=int, default=5, help="epochs per reader")
    arguments = parser.parse_args()
    count = arguments.num_samples
    server = subprocess.Popen(
        [sys.executable, "-c", SERVE],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert server.stdout is not None
    os.environ.update(
        AWS_ENDPOINT_URL=f"http://{server.stdout.readline().strip()}",
        AWS_ACCESS_KEY_ID="bench",
        AWS_SECRET_ACCESS_KEY="bench",
        AWS_DEFAULT_REGION="us-east-1",
    )
    import boto3

    try:
        with tempfile.TemporaryDirectory() as temporary:
            folder, cache = Path(temporary, "set"), Path(temporary, "cache")
            write_shards(folder, make_samples(count), max(1, count // 4))
            client = boto3.client("s3")
            client.create_bucket(Bucket=BUCKET)
            for path in folder.iterdir():
                client.upload_file(str(path), BUCKET, f"set/{path.name}")
            size = sum(path.stat().st_size for path in folder.iterdir())
            print(f"{count} samples of {size / count:.0f} bytes, median of {arguments.rounds}")
            print(f"{'':10}{'reader':>10}{'per CPU s':>12}{'ratio':>8}{'per s':>12}", end="")
            print(f"{'ratio':>8}{'open':>8}")
            for kind in ("raw", "decoded"):
                rows = measure(folder, cache, count, arguments.rounds, kind == "decoded")
                for name, (cpu, wall, opening) in zip(READERS, rows, strict=True):
                    ratios = cpu / rows[0][0], wall / rows[0][1]
                    print(
                        f"{kind:10}{name:>10}{cpu:12.0f}{ratios[0]:8.2f}{wall:12.0f}{ratios[1]:8.2f}"
                        f"{opening:8.2f}"
                    )
    finally:
        server.terminate()


if __name__ == "__main__":
    main()
