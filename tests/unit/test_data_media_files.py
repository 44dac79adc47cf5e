"""Hostile lines of make_shards: each is one counted line, and no file outside of the media root or
above the limit is read.
"""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from data.errors import DataError, MediaError, SampleError
from data.health import SampleHealth
from data.imports.convert import convert_jsonl
from data.media_folder import MediaFolder
from data.shards import ShardFolder
from tests.support.shard_samples import png
from tests.unit.test_data_convert import good, run, write_lines

SPARSE_BYTES = 200 << 30


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A media root with good files, and with much that is none."""
    folder = tmp_path / "media"
    (folder / "inner").mkdir(parents=True)
    for path in (folder / "good.png", folder / "inner" / "good.png", tmp_path / "secret.png"):
        path.write_bytes(png())
    (folder / "empty.png").touch()
    with (folder / "sparse.png").open("wb") as file:
        file.truncate(SPARSE_BYTES)
    os.mkfifo(folder / "fifo.png")
    (folder / "folder.png").mkdir()
    (folder / "out.png").symlink_to(tmp_path / "secret.png")
    (folder / "in.png").symlink_to("inner/good.png")
    (folder / "loop.png").symlink_to("loop.png")
    (folder / "device.png").symlink_to("/dev/zero")
    (folder / "outside").symlink_to(tmp_path)
    (folder / "locked.png").symlink_to("gone.png")
    os.mknod(folder / "socket.png", stat.S_IFSOCK | 0o600)
    return folder


BAD_PATHS = {
    "empty.png": "empty",
    "sparse.png": "oversized",
    "fifo.png": "missing_media",
    "folder.png": "missing_media",
    "socket.png": "missing_media",
    "locked.png": "missing_media",
    "gone.png": "missing_media",
    "loop.png": "missing_media",
    "good.png/x.png": "missing_media",
    "x" * 300 + ".png": "missing_media",
    "out.png": "outside_root",
    "device.png": "outside_root",
    "../secret.png": "outside_root",
    "inner/../../secret.png": "outside_root",
    "outside/secret.png": "outside_root",
    "a\0.png": "bad_text",
    "\ud83d.png": "bad_text",
}


def test_bad_paths_are_each_one_counted_line(root: Path, tmp_path: Path) -> None:
    lines: list[Any] = [good(number, media=[path]) for number, path in enumerate(BAD_PATHS)]
    lines += [
        good(100, media=[str(tmp_path / "secret.png")]),
        good(101, media=["good.png", "in.png", "inner/../good.png", str(root / "good.png")]),
    ]
    source = write_lines(tmp_path / "q.jsonl", lines)
    health = SampleHealth(1.0)
    convert_jsonl(source, tmp_path / "out", media_root=root, health=health)
    assert [reason for _, reason, _ in health.listed] == [*BAD_PATHS.values(), "outside_root"]
    folder = ShardFolder(tmp_path / "out")
    [question] = [folder.question(*key) for key in list(folder.keys())]
    assert [folder.media_bytes(ref) for ref in question.media] == [png()] * 4


def test_links_are_followed_where_the_user_says_so(root: Path) -> None:
    folder = MediaFolder(root, 1000, follow_links=True)
    assert folder.read("here", "out.png") == folder.read("here", "outside/secret.png") == png()
    for path, reason in (("../secret.png", "outside_root"), ("device.png", "missing_media")):
        with pytest.raises(SampleError) as caught:
            folder.read("here", path)
        assert caught.value.reason == reason
    with pytest.raises(
        SampleError, match=r"media/fifo\.png is not a regular file, got a FIFO; put the file there"
    ):
        folder.read("here", "fifo.png")
    with pytest.raises(
        MediaError,
        match=(
            f"too large, got {SPARSE_BYTES} bytes, expected at most 1000; shrink it or raise "
            "--max-media-bytes"
        ),
    ):
        folder.read("here", "sparse.png")


BAD_LINES = {
    b'{"question": "\\ud83d", "answer": "1", "answer_type": "math"}': "bad_text",
    b'{"question": "q", "answer": "1", "answer_type": "math", "other": {"\\udc00": 1}}': "bad_text",
    b'{"question": "caf\xe9", "answer": "1", "answer_type": "math"}': "bad_json",
    b'{"question": "q", "answer": "1", "answer": "2", "answer_type": "math"}': "bad_json",
    b"[" * 50_000: "bad_json",
    b'{"question": "q", "answer": "1", "answer_type": "math", "image": "a.png"}': "missing_media",
    b'{"question": "q", "answer": "1", "answer_type": "math", "video": "a"}': "missing_media",
    b'{"question": "q", "answer": "1", "answer_type": "math", "scan": "a.png"}': "unmapped_media",
    b'{"question": "q", "answer": "1", "answer_type": "math", "images": [], '
    b'"picture": {"bytes": "", "path": null}}': "unmapped_media",
    b'{"question": "q", "answer": "1", "answer_type": "math", "images": [""]}': "bad_field",
    b'{"question": "q", "answer": "1", "answer_type": "math", "images": [null]}': "bad_field",
    b'{"question": "q", "answer": "1", "answer_type": "math", "media": false}': "bad_field",
    b'{"question": "q", "answer": "1", "answer_type": "math", "media": [null]}': "bad_field",
    b'{"question": "<image> q", "answer": "1", "answer_type": "math"}': "missing_media",
}


def test_bad_lines_are_each_counted_and_the_good_ones_written(tmp_path: Path) -> None:
    source = tmp_path / "q.jsonl"
    source.write_bytes(
        b"".join(line + b"\n" for line in BAD_LINES) + json.dumps(good(1)).encode() + b"\n"
    )
    health = SampleHealth(1.0)
    convert_jsonl(source, tmp_path / "out", health=health)
    assert health.num_good == 1
    assert [(where, reason) for where, reason, _ in health.listed] == [
        (f"{source}:{number}", reason) for number, reason in enumerate(BAD_LINES.values(), start=1)
    ]


def test_a_line_without_end_is_counted_and_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data.sources.json_lines.MAX_LINE_BYTES", 1000)
    source = write_lines(tmp_path / "q.jsonl", [good(0), good(1, note="x" * 5000), good(2)])
    health = SampleHealth(1.0)
    convert_jsonl(source, tmp_path / "out", health=health)
    assert (health.num_good, [entry[:2] for entry in health.listed]) == (
        2,
        [(f"{source}:2", "oversized")],
    )


def test_media_of_one_question_are_bounded_together(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data.media_folder.MAX_SAMPLE_BYTES", 3 * len(png()))
    source = write_lines(
        tmp_path / "q.jsonl", [good(0, media=["good.png"] * 4), good(1, media=["good.png"] * 3)]
    )
    health = SampleHealth(1.0)
    convert_jsonl(
        source, tmp_path / "out", media_root=root, max_media_bytes=len(png()), health=health
    )
    assert (health.num_good, health.counts) == (1, {"oversized": 1})


@pytest.mark.medium
def test_the_front_door_counts_them_too(root: Path, tmp_path: Path) -> None:
    source = write_lines(
        root / "q.jsonl",
        [
            good(0, media=["sparse.png"]),
            good(1, media=["out.png"]),
            good(2, question="\ud83d"),
            good(3),
        ],
    )
    made = run(source, tmp_path / "out", "--max-bad-fraction", "1", "--no-decode")
    assert (made.returncode, made.stdout) == (
        0,
        "1 samples in 1 shards, 3 skipped: bad_text 1, outside_root 1, oversized 1\n",
    ), made.stderr
    linked = run(
        source, tmp_path / "linked", "--max-bad-fraction", "1", "--no-decode", "--follow-links"
    )
    assert "2 samples" in linked.stdout
    with pytest.raises(DataError, match="no such file"):
        convert_jsonl(root / "fifo.png", tmp_path / "x")
