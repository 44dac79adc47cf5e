"""Samples per second of the question stream beside plain webdataset, on the same shards in the same
run.

    python benchmarks/data_stream.py [--num-samples 2000] [--rounds 5]

Both read each sample's JSON and JPEG (224 x 224). Ours reads in shuffled order over all shards;
webdataset in shard order with its shuffle buffer. `raw` ends with the bytes, `decoded` with RGB
pixels, ours decoded in a worker process, whose start and CPU time count too; `rank` is the part of
it that is spent in the reading process itself. The two take turns, so that a busy machine slows
both.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import webdataset
from PIL import Image

from data.media.opening import MediaLimits, MediaOpener
from data.sample import ShardSample
from data.shard_writer import write_shards
from data.shards import ShardFolder
from data.stream import QuestionStream

PIXELS = 224
SHUFFLE_BUFFER = 1000


def make_samples(count: int) -> list[ShardSample]:
    """Return samples with a picture that compresses like a photo: smooth colours and some noise."""
    rng = np.random.default_rng(0)
    samples = []
    for index in range(count):
        coarse = Image.fromarray(rng.integers(0, 255, (14, 14, 3), np.uint8)).resize(
            (PIXELS, PIXELS), Image.Resampling.BICUBIC
        )
        pixels = np.asarray(coarse).astype(np.int16) + rng.integers(-8, 8, (PIXELS, PIXELS, 3))
        file = io.BytesIO()
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=85)
        fields = {
            "id": f"q{index}",
            "question": "What is shown?",
            "answer": "1",
            "answer_type": "math",
            "source": "bench",
        }
        samples.append(ShardSample(f"{index:06d}", fields, [("jpg", file.getvalue())]))
    return samples


def ours(folder: Path, decode: bool) -> int:
    """Read one epoch through the stream and return the number of samples; indexes are loaded
    again.
    """
    source = ShardFolder(folder)
    stream = QuestionStream([(source, 1.0)], seed=0)
    opener = MediaOpener(MediaLimits())
    for question in stream.take(len(source)):
        if decode:
            opener.open_ref(question.media[0], source.reader)
        else:
            source.media_bytes(question.media[0])
    opener.close()
    return len(source)


def plain_webdataset(folder: Path, decode: bool) -> int:
    """Read one epoch with webdataset and return the number of samples."""
    shards = sorted(map(str, folder.glob("*.tar")))
    dataset = webdataset.WebDataset(shards, shardshuffle=False).shuffle(
        SHUFFLE_BUFFER, initial=SHUFFLE_BUFFER
    )
    if decode:
        return sum(
            1 for sample in dataset.decode("rgb8") if sample["json"]["id"] and sample["jpg"].size
        )
    return sum(1 for sample in dataset if json.loads(sample["json"])["id"] and sample["jpg"])


def measure(count: int, rounds: int) -> dict[str, tuple[float, float, float]]:
    """Return samples per second for `raw` and `decoded`, the median over the rounds: ours, in the
    reading process alone, webdataset.
    """
    results = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_shards(folder, make_samples(count), max(1, count // 4))
        for name, decode in (("raw", False), ("decoded", True)):
            own, theirs = [], []
            for _ in range(rounds):
                own.append(seconds(ours, folder, decode, count))
                theirs.append(seconds(plain_webdataset, folder, decode, count)[0])
            medians = [
                statistics.median(count / each for each in column)
                for column in (*zip(*own, strict=True), theirs)
            ]
            results[name] = (medians[0], medians[1], medians[2])
    return results


def seconds(
    reader: Callable[[Path, bool], int], folder: Path, decode: bool, count: int
) -> tuple[float, float]:
    """Return the CPU seconds of one epoch, with and without worker processes: the machine may be
    shared, and nothing waits for a disk.
    """
    start = os.times()
    num_read = reader(folder, decode)
    assert num_read == count
    end = os.times()
    alone = end.user + end.system - start.user - start.system
    return (
        alone
        + end.children_user
        + end.children_system
        - start.children_user
        - start.children_system,
        alone,
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--num-samples", type=int, default=2000, help="samples in 4 shards (default %(default)s)"
    )
    parser.add_argument(
        "--rounds", type=int, default=5, help="epochs per reader (default %(default)s)"
    )
    arguments = parser.parse_args()
    print(
        f"samples per CPU second, {arguments.num_samples} samples, median of {arguments.rounds}; "
        f"{os.cpu_count()} cores"
    )
    print(f"{'':10}{'zppo_mm':>12}{'rank':>12}{'webdataset':>12}{'ratio':>8}")
    for name, (own, alone, theirs) in measure(arguments.num_samples, arguments.rounds).items():
        print(f"{name:10}{own:12.0f}{alone:12.0f}{theirs:12.0f}{own / theirs:8.2f}")


if __name__ == "__main__":
    main()
