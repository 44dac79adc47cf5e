"""Indexes that are damaged, of another shard or made to harm: an error that names both sides, or
exactly what the shard holds.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from data.errors import DataError
from data.lint import lint
from data.media.opening import MediaLimits, MediaOpener
from data.question import MediaRef
from data.shard_writer import write_shards
from data.shards import ShardFolder, ShardReader
from data.tar_index import load_index, sidecar_path
from tests.support.shard_samples import END, png, sample


def test_the_size_that_the_index_knows_speaks_where_the_shard_looks_whole(tmp_path: Path) -> None:
    (shard,) = write_shards(tmp_path, [sample(index) for index in range(400)])
    # 400 headers and 400 blocks of JSON are 409,600 bytes, a whole number of records; the end of
    # the archive takes one more.
    assert shard.stat().st_size == 409_600 + 10_240
    whole = shard.read_bytes()
    shard.write_bytes(whole[:65536] + END)
    with pytest.raises(
        DataError,
        match=(
            r"got 66560 bytes in the shard, expected \d+ bytes with 400 samples as in shard-000000"
        ),
    ):
        ShardFolder(tmp_path)
    (problem,) = lint([tmp_path])[1]
    assert problem.reason == "wrong_index"
    assert "got 66560 bytes in the shard, expected 419840 bytes with 400 samples" in problem.message
    shard.write_bytes(whole[:65536])
    (problem,) = lint([tmp_path])[1]
    assert problem.reason == "bad_shard"
    assert "got 65536 bytes in the shard, expected 419840 bytes with 400 samples" in problem.message
    shard.write_bytes(whole[:65536] + END)
    sidecar_path(shard).unlink()
    assert len(ShardFolder(tmp_path)) == 64, (
        "without an index nothing says that this is no whole archive"
    )


def test_holes_where_content_should_be_are_found_when_they_are_read(tmp_path: Path) -> None:
    (shard,) = write_shards(tmp_path, [sample(index) for index in range(8)])
    whole = shard.read_bytes()
    shard.write_bytes(whole[:4096] + b"\0" * (len(whole) - 4096))
    folder = ShardFolder(tmp_path)
    assert len(folder) == 8
    with pytest.raises(
        DataError,
        match=(
            r"the index does not fit the shard, got no header .* at byte 4096, expected "
            r"000004\.json"
        ),
    ):
        folder.question(str(shard), "000004")
    assert [problem.reason for problem in lint([tmp_path])[1]] == ["wrong_index"]


def test_one_changed_bit_of_the_content_is_found_by_its_checksum(tmp_path: Path) -> None:
    (shard,) = write_shards(tmp_path, [sample(1, [("png", png())])])
    whole = bytearray(shard.read_bytes())
    whole[512 + 20] ^= 1
    whole[-9216 + 20] ^= 0
    picture = load_index(shard).samples["000001"][1]
    whole[picture.offset + 40] ^= 1
    shard.write_bytes(whole)
    folder = ShardFolder(tmp_path)
    with pytest.raises(
        DataError, match=r"000001\.json: the content is damaged, got checksum \d+, expected \d+"
    ):
        folder.question(str(shard), "000001")
    with pytest.raises(DataError, match=r"000001\.png: the content is damaged"):
        folder.media_bytes(MediaRef("image", str(shard), "000001", "png"))
    problems = lint([tmp_path], MediaOpener(MediaLimits()))[1]
    assert [(problem.where, problem.reason) for problem in problems] == [
        (f"{shard}:000001", "bad_shard")
    ]


def everything(reader: ShardReader, shard: str) -> list[tuple[str, str, list[bytes]]]:
    """Return key, question id and media of every sample."""
    questions = {key: reader.question(shard, key) for key in reader.index(shard).samples}
    return [
        (key, question.id, [reader.media_bytes(ref) for ref in question.media])
        for key, question in questions.items()
    ]


def edit(
    change: Callable[[dict[str, dict[str, list[object]]]], object],
) -> Callable[[dict[str, object]], object]:
    return lambda stored: change(stored["samples"])  # type: ignore[arg-type]


BAD_INDEXES = {
    "negative offset": edit(lambda samples: samples["000001"]["json"].__setitem__(0, -512)),
    "huge offset": edit(lambda samples: samples["000001"]["json"].__setitem__(0, 1 << 80)),
    "negative size": edit(lambda samples: samples["000001"]["json"].__setitem__(1, -1)),
    "huge size": edit(lambda samples: samples["000001"]["json"].__setitem__(1, 1 << 80)),
    "smaller size": edit(lambda samples: samples["000001"]["json"].__setitem__(1, 20)),
    "number as text": edit(lambda samples: samples["000001"]["json"].__setitem__(0, "512")),
    "infinite offset": edit(lambda samples: samples["000001"]["json"].__setitem__(0, float("inf"))),
    "no size": edit(lambda samples: samples["000001"].__setitem__("json", [512])),
    "another sample's entries": edit(
        lambda samples: samples.update({"000001": samples["000002"], "000002": samples["000001"]})
    ),
    "a sample less": edit(lambda samples: samples.pop("000001")),
    "the last sample less": edit(lambda samples: samples.pop("000003")),
    "a picture less": edit(lambda samples: samples["000001"].pop("png")),
    "a sample more": edit(lambda samples: samples.__setitem__("000009", samples["000001"])),
    "a sample without files": edit(lambda samples: samples.__setitem__("000009", {})),
    "another name of a picture": edit(
        lambda samples: samples["000001"].__setitem__("pxg", samples["000001"].pop("png"))
    ),
    "another key": edit(
        lambda samples: [samples.__setitem__(f"x{key}", samples.pop(key)) for key in list(samples)]
    ),
    "another order": edit(lambda samples: samples.__setitem__("000001", samples.pop("000001"))),
    "a key that no bytes spell": edit(
        lambda samples: samples.__setitem__("\ud800", samples.pop("000003"))
    ),
    "size of the shard as text": lambda stored: stored.__setitem__("tar_size", "1"),
    "size of the shard wrong": lambda stored: stored.__setitem__("tar_size", 1),
    "size of the shard infinite": lambda stored: stored.__setitem__("tar_size", float("inf")),
    "samples as a list": lambda stored: stored.__setitem__("samples", []),
    "nothing": lambda stored: stored.clear(),
}


@pytest.mark.parametrize("name", BAD_INDEXES)
def test_a_wrong_index_is_an_error_or_changes_nothing(tmp_path: Path, name: str) -> None:
    samples = [sample(index, [("png", png(value=index))]) for index in range(4)]
    (shard,) = write_shards(tmp_path, samples)
    stored = json.loads(sidecar_path(shard).read_text())
    BAD_INDEXES[name](stored)
    sidecar_path(shard).write_text(json.dumps(stored))
    assert [problem.reason for problem in lint([tmp_path])[1]] == ["wrong_index"]
    try:
        read = everything(ShardReader(), str(shard))
    except DataError as error:
        message = str(error)
    else:
        message = ""
        assert read == [
            (each.key, each.question["id"], [content for _, content in each.media])
            for each in samples
        ]
    assert (
        message == ""
        or "the shard and its index differ" in message
        or "the index does not fit the shard" in message
    )


def test_an_index_that_is_no_plain_file_or_too_large_is_not_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (shard,) = write_shards(tmp_path, [sample(0)])
    sidecar_path(shard).unlink()
    for make in (os.mkfifo, os.mkdir, lambda path: os.symlink(path, path)):
        caplog.clear()
        make(sidecar_path(shard))
        assert list(load_index(shard).samples) == ["000000"]
        assert "idx.json: the index" in caplog.text
        (os.rmdir if sidecar_path(shard).is_dir() else os.unlink)(sidecar_path(shard))
    with sidecar_path(shard).open("wb") as file:
        file.truncate(200 << 30)
    assert list(load_index(shard).samples) == ["000000"]
    assert "expected at most" in caplog.text
