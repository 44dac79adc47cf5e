"""Small tables like those of known benchmarks, and their conversion."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow
from pyarrow import parquet

from data.health import SampleHealth
from data.imports.benchmarks import Conversion, convert_benchmark, read_conversion
from data.question import ANSWER_TYPES, Question
from data.shards import ShardFolder, ShardReader
from tests.support.shard_samples import png

Rows = Sequence[dict[str, Any]]

MATHVISTA: dict[str, Any] = {
    "pid": "1",
    "question": "How long is the bar?",
    "image": "images/1.jpg",
    "decoded_image": {"bytes": png(value=10), "path": "1.jpg"},
    "choices": None,
    "unit": "cm",
    "precision": 1.0,
    "answer": "1.2",
    "question_type": "free_form",
    "answer_type": "float",
    "metadata": {"source": "Ruler", "split": "testmini"},
    "query": "Hint: …",
}
MMMU: dict[str, Any] = {
    "id": "validation_Art_7",
    "question": "Compare <image 2> with <image 4>.",
    "options": "['older', 'same as <image 4>', \"it's newer\"]",
    "answer": "C",
    "question_type": "multiple-choice",
    **{f"image_{number}": None for number in range(1, 8)},
    "image_2": {"bytes": png(value=2), "path": "2.png"},
    "image_4": {"bytes": png(value=4), "path": "4.png"},
}
VIDEOMME: dict[str, Any] = {
    "video_id": "001",
    "duration": "short",
    "domain": "Knowledge",
    "videoID": "aB-_9",
    "question_id": "001-1",
    "question": "What happens?",
    "options": ["A. A goal.", "B. A foul.", "C. Nothing.", "D. Rain."],
    "answer": "B",
}


def write_table(path: Path, rows: Rows) -> Path:
    """Write rows in the format of the path's suffix."""
    if path.suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(list(rows)))
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(
                file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ","
            )
            writer.writeheader()
            writer.writerows(rows)
    return path


def convert(
    path: Path, rows: Rows | None = None, max_bad_fraction: float = 1.0, **options: Any
) -> tuple[list[Question], ShardFolder, Conversion]:
    """Convert a table, written from `rows` if they are given; return its questions and report."""
    if rows is not None:
        write_table(path, rows)
    out = path.parent / f"{path.name}.shards"
    conversion = convert_benchmark(path, out, health=SampleHealth(max_bad_fraction), **options)
    assert read_conversion(out) == conversion
    folder = ShardFolder(out, ShardReader(options.get("answer_types", ANSWER_TYPES)))
    return [folder.question(shard, key) for shard, key in list(folder.keys())], folder, conversion
