"""The same questions in every form that a source can have."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
from PIL import Image
from pyarrow import ipc, parquet

from data.imports.convert import convert_jsonl
from tests.support.shard_samples import png

PICTURES = "pictures"
GROUP_ROWS = 4
PICTURE = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
FORMS = ("paths", "data_urls", "structs", "lists", "bytes", "saved", "stream")


def gif(num_frames: int = 4) -> bytes:
    """Return a small clip."""
    frames = [
        Image.fromarray(np.full((32, 32, 3), 50 * index, np.uint8)) for index in range(num_frames)
    ]
    file = io.BytesIO()
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:], duration=100)
    return file.getvalue()


def write_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Write JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_pictures(folder: Path, num_rows: int) -> list[list[str]]:
    """Write the media of so many questions and return their paths by question: none, one or two
    images, or a clip.
    """
    (folder / PICTURES).mkdir(parents=True)
    paths: list[list[str]] = []
    for index in range(num_rows):
        names = [[], [f"{index}.png"], [f"{index}.a.png", f"{index}.b.png"]][index % 3]
        if index % 7 == 4:
            names = [f"{index}.gif"]
        for position, name in enumerate(names):
            content = gif() if name.endswith(".gif") else png(32, 32, 2 * index + position)
            (folder / PICTURES / name).write_bytes(content)
        paths.append([f"{PICTURES}/{name}" for name in names])
    return paths


def rows_of(paths: Sequence[Sequence[str]]) -> list[dict[str, Any]]:
    """Return the fields of questions, every fifth with choices, and their media as paths."""
    return [
        {
            "id": f"q{index}",
            "question": f"{index} + 1 = ?",
            "answer": "B" if index % 5 == 0 else str(index + 1),
            "answer_type": "choice" if index % 5 == 0 else "math",
            **({"choices": ["0", str(index + 1)]} if index % 5 == 0 else {}),
            "source": "sums",
            "media": list(media),
        }
        for index, media in enumerate(paths)
    ]


def write_form(form: str, folder: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Write the questions of `rows_of`, whose media lie in `folder`, in one of `FORMS`; returns the
    path of the source.
    """
    if form == "paths":
        return write_lines(folder / "questions.jsonl", rows)
    if form == "data_urls":
        spelled = [
            {**row, "media": [_data_url(folder / path) for path in row["media"]]} for row in rows
        ]
        return write_lines(folder / "urls.jsonl", spelled)
    table = pyarrow.Table.from_pylist([_columns(form, folder, row) for row in rows], _schema(form))
    if form in ("structs", "lists", "bytes"):
        (folder / form / "data").mkdir(parents=True)
        half = len(rows) // 2
        for number, part in enumerate((table[:half], table[half:])):
            name = f"train-{number:05d}-of-00002.parquet"
            parquet.write_table(part, folder / form / "data" / name, row_group_size=GROUP_ROWS)
        return folder / form
    if form == "stream":
        with ipc.new_stream(folder / "stream.arrow", table.schema) as writer:
            writer.write_table(table, GROUP_ROWS)
        return folder / "stream.arrow"
    # What Dataset.save_to_disk writes.
    (folder / form).mkdir()
    with ipc.new_stream(folder / form / "data-00000-of-00001.arrow", table.schema) as writer:
        writer.write_table(table, GROUP_ROWS)
    (folder / form / "dataset_info.json").write_text("{}")
    (folder / form / "cache-0123.arrow").write_bytes(b"an intermediate result")
    state = {"_data_files": [{"filename": "data-00000-of-00001.arrow"}], "_fingerprint": "a1"}
    (folder / form / "state.json").write_text(json.dumps(state))
    return folder / form


def make_shards(folder: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Write the questions of `rows_of` as shards."""
    lines = write_lines(folder / "for_shards.jsonl", rows)
    convert_jsonl(lines, folder / "shards", samples_per_shard=5)
    return folder / "shards"


def _data_url(path: Path) -> str:
    kind = "video" if path.suffix == ".gif" else "image"
    content = base64.b64encode(path.read_bytes()).decode()
    return f"data:{kind}/{path.suffix[1:]};base64,{content}"


def _schema(form: str) -> pyarrow.Schema:
    texts = ("id", "question", "answer", "answer_type", "source")
    kind = {"bytes": pyarrow.binary(), "structs": PICTURE}.get(form, pyarrow.list_(PICTURE))
    names = ("image", "video") if form in ("bytes", "structs") else ("images", "videos")
    return pyarrow.schema(
        [(name, pyarrow.string()) for name in texts]
        + [("choices", pyarrow.list_(pyarrow.string()))]
        + [(name, kind) for name in names]
        + ([("image_2", kind)] if form in ("bytes", "structs") else [])
    )


def _columns(form: str, folder: Path, row: Mapping[str, Any]) -> dict[str, Any]:
    fields = {name: value for name, value in row.items() if name != "media"}
    clips = [folder / path for path in row["media"] if path.endswith(".gif")]
    images = [folder / path for path in row["media"] if not path.endswith(".gif")]
    if form in ("bytes", "structs"):
        one = (lambda path: path.read_bytes()) if form == "bytes" else _struct
        media = {"image": images[:1], "image_2": images[1:], "video": clips}
        return {**fields, **{name: one(each[0]) for name, each in media.items() if each}}
    return {
        **fields,
        "images": [_struct(path) for path in images],
        "videos": [_struct(path) for path in clips],
    }


def _struct(path: Path) -> dict[str, Any]:
    return {"bytes": path.read_bytes(), "path": path.name}
