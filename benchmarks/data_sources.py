"""CPU time to open a source, to read a question and to read its picture, from shards and tables.

python benchmarks/data_sources.py
"""

from __future__ import annotations

import argparse
import io
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow
from PIL import Image
from pyarrow import ipc, parquet

from data.imports.convert import convert_jsonl
from data.sources.opening import open_source
from data.sources.reader import SourceReader
from data.stream import QuestionStream

GROUP_ROWS = 100
SIDE = 160


def write_sources(folder: Path, num_questions: int) -> list[Path]:
    """Write the same questions, each with a JPEG, in every form; returns their paths."""
    rng = np.random.default_rng(0)
    (folder / "pictures").mkdir()
    rows = []
    for index in range(num_questions):
        pixels = rng.integers(0, 255, (SIDE, SIDE, 3), np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "JPEG", quality=85)
        path = f"pictures/{index}.jpg"
        (folder / path).write_bytes(file.getvalue())
        rows.append({"question": f"{index} + 1 = ?", "answer": str(index + 1), "image": path})
    lines, table = folder / "q.jsonl", folder / "q.parquet"
    lines.write_text("".join(json.dumps(row) + "\n" for row in rows))
    convert_jsonl(lines, folder / "shards")
    pictures = [
        {**row, "image": {"bytes": (folder / row["image"]).read_bytes(), "path": None}}
        for row in rows
    ]
    content = pyarrow.Table.from_pylist(pictures)
    parquet.write_table(content, table, row_group_size=GROUP_ROWS)
    with ipc.new_stream(folder / "q.arrow", content.schema) as writer:
        writer.write_table(content, 1000)
    return [folder / "shards", lines, table, folder / "q.arrow"]


def measure(path: Path, num_pictures: int) -> str:
    """Return a row of the table: milliseconds of CPU time."""
    start = time.process_time()
    source = open_source(path)
    opened = time.process_time()
    questions = QuestionStream([(source, 1.0)], 0).take(len(source))
    read = time.process_time()
    reader = SourceReader()
    reader.media_bytes(questions[0].media[0])
    begun = time.process_time()
    for question in questions[:num_pictures]:
        reader.media_size(question.media[0])
        reader.media_bytes(question.media[0])
    pictures = time.process_time() - begun
    times = (opened - start, (read - opened) / len(questions), pictures / num_pictures)
    return f"| {path.name} | " + " | ".join(f"{1000 * each:.3f}" for each in times) + " |"


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--questions", type=int, default=2000)
    parser.add_argument("--pictures", type=int, default=300)
    arguments = parser.parse_args()
    print("| source | open, ms | question, ms | picture, ms |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for path in write_sources(Path(folder), arguments.questions):
            print(measure(path, arguments.pictures))


if __name__ == "__main__":
    main()
