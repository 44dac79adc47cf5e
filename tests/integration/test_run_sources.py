"""A run on a JSON lines file with a folder of images, and on Parquet, is the run on shards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from data.shards import ShardFolder
from data.toy.digits_shards import build_digit_shards
from tests.support.running import buffer, lines, run, transcript

NUM_QUESTIONS = 14
STEPS = 3
# On the same layout; sums of a restarted process may be taken in another order.
LOSS_TOLERANCE = 1e-4
COLUMNS = "columns: {question: prompt, image: picture}"


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """Return the questions of a folder of shards as rows with other names, `picture` as bytes."""
    shards = ShardFolder(folder)
    keys = shards.keys()
    questions = [shards.question(*key) for key in keys]
    return [
        {
            "id": question.id,
            "prompt": question.text,
            "answer": question.answer,
            "source": question.source,
            "choices": list(question.choices),
            "picture": shards.media_bytes(question.media[0]),
        }
        for question in questions
    ]


def write_lines(folder: Path, rows: list[dict[str, Any]]) -> Path:
    (folder / "images").mkdir()
    with (folder / "questions.jsonl").open("w") as file:
        for number, row in enumerate(rows):
            path = f"images/{number}.png"
            (folder / path).write_bytes(row["picture"])
            file.write(json.dumps({**row, "picture": path}) + "\n")
    return folder / "questions.jsonl"


def write_parquet(folder: Path, rows: list[dict[str, Any]]) -> Path:
    pictures = [{**row, "picture": {"bytes": row["picture"], "path": None}} for row in rows]
    table = pyarrow.Table.from_pylist(pictures)
    parquet.write_table(table, folder / "questions.parquet", row_group_size=5)
    return folder / "questions.parquet"


@pytest.mark.medium
def test_lines_and_parquet_train_as_shards_do_also_resumed(tmp_path: Path) -> None:
    folders = [tmp_path / "0", tmp_path / "1"]
    for seed, folder in enumerate(folders):
        build_digit_shards(folder, "image", "train", NUM_QUESTIONS, seed)
    tables = [
        write_lines(tmp_path, rows_of(folders[0])),
        write_parquet(tmp_path, rows_of(folders[1])),
    ]
    in_shards = ", ".join(f"{{path: {folder}}}" for folder in folders)
    in_tables = ", ".join(f"{{path: {table}, {COLUMNS}}}" for table in tables)
    options = ("modality=image", "parity.mode=none", f"train.train_iters={STEPS}")
    shards = run(tmp_path, "shards", f"data.train=[{in_shards}]", *options)
    run(tmp_path, "tables", f"data.train=[{in_tables}]", *options, f"train.train_iters={STEPS - 1}")
    resumed = run(tmp_path, "tables", f"data.train=[{in_tables}]", *options)
    kinds = set()
    for step in range(1, STEPS + 1):
        left, right = transcript(shards, step), transcript(resumed, step)
        assert [group["uid"] for group in left] == [group["uid"] for group in right]
        assert [[r["text"] for r in group["rollouts"]] for group in left] == [
            [r["text"] for r in group["rollouts"]] for group in right
        ]
        assert buffer(shards, step) == buffer(resumed, step)
        kinds |= {(group["kind"], group["media"][0]["shard"]) for group in right}
    assert {("new", f"{tmp_path}/"), ("new", f"{tables[1]}")} <= kinds
    assert "replayed" in {kind for kind, _ in kinds}
    for name in ("policy/loss", "policy/grad_norm", "accuracy/plain"):
        assert [line[name] for line in lines(shards / "metrics.jsonl")] == pytest.approx(
            [line[name] for line in lines(resumed / "metrics.jsonl")], abs=LOSS_TOLERANCE
        )
