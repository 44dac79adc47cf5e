"""Shards: bytes, indexes, the rules of webdataset, and what a sample must hold."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest
import webdataset
from hypothesis import given
from hypothesis import strategies as st
from webdataset.tariterators import base_plus_ext

import data.shard_writer
from data.errors import DataError, SampleError
from data.lint import lint
from data.question import MediaRef, Question
from data.sample import ShardSample, media_order, parse_question
from data.shard_writer import write_shards
from data.shards import ShardFolder, ShardReader
from data.tar_index import MEMBER_NAME, load_index, same_entries, scan_tar, sidecar_path
from tests.support.shard_samples import png, sample


def some_samples(count: int = 25) -> list[ShardSample]:
    return [
        sample(index, [("0.png", png(value=index)), ("1.mp4", b"clip" * index)])
        for index in range(count)
    ]


def write_tar(
    path: Path, members: list[tuple[str, bytes]], tar_format: int = tarfile.GNU_FORMAT
) -> Path:
    with tarfile.open(path, "w", format=tar_format) as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def test_same_samples_give_the_same_bytes(tmp_path: Path) -> None:
    first = write_shards(tmp_path / "a", some_samples(), 10)
    second = write_shards(tmp_path / "b", some_samples(), 10)
    assert [path.name for path in first] == [
        "shard-000000.tar",
        "shard-000001.tar",
        "shard-000002.tar",
    ]
    for one, other in zip(first, second, strict=True):
        assert one.read_bytes() == other.read_bytes()
        assert sidecar_path(one).read_bytes() == sidecar_path(other).read_bytes()
    names = {path.name for path in (tmp_path / "a").iterdir()}
    assert names == {name for path in first for name in (path.name, sidecar_path(path).name)}, (
        "nothing is left aside"
    )


def test_a_shard_with_much_media_is_closed_early(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data.shard_writer, "MAX_SHARD_BYTES", 20)
    written = write_shards(
        tmp_path, [sample(index, [("mp4", b"0123456789")]) for index in range(5)], 3
    )
    # 10 bytes each: two of them reach 20.
    assert [len(load_index(path).samples) for path in written] == [2, 2, 1]


def test_every_sample_is_read_again_by_shard_and_key(tmp_path: Path) -> None:
    samples = some_samples()
    write_shards(tmp_path, samples, 10)
    folder = ShardFolder(tmp_path)
    assert len(folder) == 25
    assert [key for _, key in list(folder.keys())] == [each.key for each in samples]
    assert [folder.keys()[index] for index in range(25)] == list(folder.keys()) == folder.keys()[:]
    assert folder.keys()[-1] == folder.keys()[24]
    for each, (shard, key) in reversed(list(zip(samples, folder.keys(), strict=True))):
        question = folder.question(shard, key)
        assert (question.id, question.text, question.answer) == (
            each.question["id"],
            each.question["question"],
            each.question["answer"],
        )
        assert [(ref.kind, ref.extension) for ref in question.media] == [
            ("image", "0.png"),
            ("video", "1.mp4"),
        ]
        assert [folder.media_bytes(ref) for ref in question.media] == [
            content for _, content in each.media
        ]
    with pytest.raises(IndexError):
        folder.keys()[25]


def test_plain_webdataset_reads_the_same_samples(tmp_path: Path) -> None:
    samples = some_samples()
    shards = write_shards(tmp_path, samples, 10)
    read = list(webdataset.WebDataset([str(path) for path in shards], shardshuffle=False))
    assert [each["__key__"] for each in read] == [each.key for each in samples]
    for theirs, ours in zip(read, samples, strict=True):
        assert json.loads(theirs["json"]) == ours.question
        assert [(extension, theirs[extension]) for extension, _ in ours.media] == list(ours.media)


@given(st.text(alphabet="abA./0 é", max_size=12))
def test_member_names_split_as_in_webdataset(name: str) -> None:
    match = MEMBER_NAME.fullmatch(name)
    ours = (match[1], match[2]) if match else (None, None)
    theirs = base_plus_ext(name)
    hidden = theirs[0] is not None and theirs[0].endswith(
        "/"
    )  # folder/.name, which webdataset gives the key "folder/"
    assert ours == ((None, None) if hidden else theirs)


@pytest.mark.parametrize(
    "tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]
)
@pytest.mark.parametrize(
    "stem", ["k", "folder/k", "é", "long/" + "x" * 90, "y" * 90 + "/" + "z" * 90]
)
def test_scan_finds_what_tarfile_finds(tmp_path: Path, tar_format: int, stem: str) -> None:
    members = [
        (f"{stem}{index}.{extension}", bytes([index]) * size)
        for index in range(3)
        for extension, size in (("json", 700), ("JPG", 512))
    ]
    path = write_tar(tmp_path / "a.tar", [("readme", b"skipped"), *members], tar_format)
    index = scan_tar(path)
    assert list(index.samples) == [f"{stem}{number}" for number in range(3)]
    reader = ShardReader()
    for name, content in members:
        key, extension = name.rsplit(".", 1)
        assert reader.media_bytes(MediaRef("image", str(path), key, extension.lower())) == content


def test_missing_and_unreadable_indexes_are_replaced_by_a_scan(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (shard,) = write_shards(tmp_path, some_samples(3))
    expected = load_index(shard)
    sidecar_path(shard).unlink()
    assert same_entries(load_index(shard), expected)
    assert caplog.text == ""
    for content in (
        b"{",
        b"[]",
        b'{"version": 1}',
        b'{"version": 99, "tar_size": 0, "samples": {}}',
        b"[" * 100_000,
        b"\xff",
    ):
        caplog.clear()
        sidecar_path(shard).write_bytes(content)
        assert same_entries(load_index(shard), expected)
        assert "the index is unreadable" in caplog.text
        assert [problem.reason for problem in lint([tmp_path])[1]] == ["wrong_index"]


def test_an_index_of_other_content_of_the_same_size_is_noticed_when_read(tmp_path: Path) -> None:
    (shard,) = write_shards(tmp_path / "a", [sample(1), sample(2)])
    (other,) = write_shards(tmp_path / "b", [sample(3), sample(4)])
    assert shard.stat().st_size == other.stat().st_size
    shard.write_bytes(other.read_bytes())
    with pytest.raises(DataError, match=r"000001\.json: the index does not fit the shard"):
        ShardFolder(tmp_path / "a").question(str(shard), "000001")


def test_damaged_shards_are_named(tmp_path: Path) -> None:
    (shard,) = write_shards(tmp_path, some_samples(3))
    whole = shard.read_bytes()
    for content, message in (
        (b"", "not a tar archive .empty file"),
        (b"\xff" * 2048, "not a tar archive"),
        (whole[:3000], "the shard is cut off, got 440 bytes"),
        (whole[: -512 * 12], "cut off|ends inside a member"),
        (whole[:1] + b"X" + whole[2:], "not a tar archive .bad checksum."),
    ):
        shard.write_bytes(content)
        sidecar_path(shard).unlink(missing_ok=True)
        with pytest.raises(DataError, match=message):
            ShardFolder(tmp_path)
    with pytest.raises(DataError, match="no shards, got no folder"):
        ShardFolder(tmp_path / "nowhere")


def test_rules_of_webdataset_are_kept_when_scanning(tmp_path: Path) -> None:
    apart = write_tar(
        tmp_path / "apart.tar", [("a.json", b"{}"), ("b.json", b"{}"), ("a.jpg", b"x")]
    )
    with pytest.raises(DataError, match="side by side"):
        scan_tar(apart)
    twice = write_tar(tmp_path / "twice.tar", [("a.jpg", b"x"), ("a.JPG", b"y")])
    with pytest.raises(DataError, match="jpg twice"):
        scan_tar(twice)


def test_writing_refuses_what_could_not_be_read(tmp_path: Path) -> None:
    for key in ("a.b", "", "/a", "a b"):
        with pytest.raises(DataError, match="key is not allowed"):
            write_shards(tmp_path / "k", [ShardSample(key, {})])
    with pytest.raises(DataError, match="key is used twice, got '000001'"):
        write_shards(tmp_path / "t", [sample(1), sample(1)])
    for extension in ("txt", "JPG", "json", "a/b.jpg"):
        with pytest.raises(DataError, match="not a media file's"):
            write_shards(tmp_path / "e", [sample(1, [(extension, b"")])])
    write_shards(tmp_path / "full", some_samples(25), 10)
    with pytest.raises(DataError, match="has shards already"):
        write_shards(tmp_path / "full", some_samples(3))
    write_shards(tmp_path / "full", some_samples(3), overwrite=True)
    assert len(ShardFolder(tmp_path / "full")) == 3


GOOD = {
    "id": "a",
    "question": "b?",
    "answer": "B",
    "answer_type": "choice",
    "choices": ["x", "y"],
    "source": "s",
}


def parse(fields: object, extensions: tuple[str, ...] = ("json", "jpg")) -> object:
    return parse_question("s.tar", "k", json.dumps(fields).encode(), extensions)


@pytest.mark.parametrize(
    ("change", "reason", "message"),
    [
        ({"id": " "}, "bad_field", "field id is wrong, got ' '"),
        ({"id": 7}, "bad_field", "field id is wrong, got 7"),
        ({"question": None}, "bad_field", "field question is wrong"),
        (
            {"answer_type": "mcq"},
            "unknown_answer_type",
            "got 'mcq', expected one of math, choice, open",
        ),
        ({"answer_type": ["math"]}, "unknown_answer_type", "unknown answer_type"),
        (
            {"metadata": "x" * 65_535},
            "bad_field",
            "field metadata is too long, got 65537 characters of JSON, expected at most 65536",
        ),
        (
            {"answer": "C"},
            "bad_choice",
            "the answer is not an option, got 'C', which names no option, expected A to B",
        ),
        (
            {"answer": "b"},
            "bad_choice",
            "the answer is not an option, got 'b', which names no option",
        ),
        (
            {"answer": "B. x"},
            "bad_choice",
            "the answer is not an option, got 'B. x', which names no option",
        ),
        (
            {"answer": "x", "choices": ["x", "x"]},
            "bad_choice",
            "the answer is not an option, got 'x', which names A and B",
        ),
        ({"answer": "z"}, "bad_choice", "the answer is not an option, got 'z'"),
        ({"choices": ["x"]}, "bad_choice", "wrong number of choices, got 1"),
        ({"choices": ["x", ""]}, "bad_field", "field choices is wrong"),
        ({"answer_type": "math"}, "bad_choice", "choices given, got answer_type math"),
        ({"media": ["png"]}, "missing_media", "got members json, jpg, expected png"),
        ({"media": ["json"]}, "unknown_media", "got json"),
        ({"media": "jpg"}, "bad_field", "field media is wrong"),
        ({"source": 3}, "bad_field", "field source is wrong"),
    ],
)
def test_every_broken_rule_of_a_sample_is_named(
    change: dict[str, object], reason: str, message: str
) -> None:
    with pytest.raises(SampleError, match=message) as caught:
        parse({**GOOD, **change})
    assert caught.value.reason == reason
    assert str(caught.value).startswith("s.tar:k: ")


@pytest.mark.parametrize(
    ("answer", "choices", "letter"),
    [
        ("B", ["x", "y"], "B"),
        ("y", ["x", "y"], "B"),
        ("B. y", ["x", "y"], "B"),
        ("(B) y", ["x", "y"], "B"),
        ("B. y", ["A. x", "B. y"], "B"),
        ("B", ["B", "A"], "B"),
    ],
)
def test_a_right_option_is_given_by_letter_by_text_or_by_both(
    answer: str, choices: list[str], letter: str
) -> None:
    question = parse({**GOOD, "answer": answer, "choices": choices})
    assert isinstance(question, Question)
    assert question.answer == letter


def test_json_that_is_none_is_bad() -> None:
    for content in (b"", b"{", b"\xff\xfe", b"[1]", b"[" * 100_000):
        with pytest.raises(SampleError) as caught:
            parse_question("s.tar", "k", content, ("json",))
        assert caught.value.reason == "bad_json"


def test_media_default_to_all_files_in_order() -> None:
    assert media_order(["10.jpg", "json", "2.mp4", "cls", "jpg"]) == ["jpg", "2.mp4", "10.jpg"]
    question = parse_question("s.tar", "k", json.dumps(GOOD).encode(), ("json", "10.jpg", "9.mp4"))
    assert [(ref.kind, ref.shard, ref.key, ref.extension) for ref in question.media] == [
        ("video", "s.tar", "k", "9.mp4"),
        ("image", "s.tar", "k", "10.jpg"),
    ]
    assert (
        parse_question(
            "s.tar", "k", json.dumps({**GOOD, "media": []}).encode(), ("json", "jpg")
        ).media
        == ()
    )


def test_reader_names_what_is_missing(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [("a.jpg", b"x")])
    reader = ShardReader()
    with pytest.raises(SampleError, match="the sample has no question, got members jpg"):
        reader.question(str(path), "a")
    with pytest.raises(DataError, match="no sample of that key, got 'b'"):
        reader.question(str(path), "b")
    with pytest.raises(SampleError, match="media file is missing, expected png"):
        reader.media_bytes(MediaRef("image", str(path), "a", "png"))
    with pytest.raises(DataError, match=r"gone\.tar: the shard cannot be opened"):
        reader.question(str(tmp_path / "gone.tar"), "a")
    reader.close()
    assert reader.media_bytes(MediaRef("image", str(path), "a", "jpg")) == b"x"
