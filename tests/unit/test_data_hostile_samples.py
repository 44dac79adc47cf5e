"""Samples that are damaged or made to harm: each is one bad sample, counted by its reason."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from data.errors import SampleError
from data.json_text import MAX_DEPTH
from data.lint import lint
from data.sample import media_order, parse_question
from data.shards import MAX_QUESTION_BYTES, ShardFolder
from tests.support.shard_samples import END, QUESTION, header, member, pax, png

GOOD = member("a.json", QUESTION)


BAD_KEYS = ("../../etc/a", "/etc/a", "a/../b", "a\nb", "\x1b[2Ja", "a\x85", os.fsdecode(b"\xff"))


@pytest.mark.parametrize(
    "content",
    [
        *(member(f"{key}.json", QUESTION) for key in BAD_KEYS),
        pax(b"path=b\0c.json") + member("b.json", QUESTION),
    ],
)
def test_a_key_that_could_not_be_written_down_is_one_bad_sample(
    tmp_path: Path, content: bytes
) -> None:
    (tmp_path / "a.tar").write_bytes(GOOD + content + END)
    folder = ShardFolder(tmp_path)
    first, second = folder.keys()
    assert folder.question(*first).answer == "2"
    with pytest.raises(SampleError, match="key is not allowed") as caught:
        folder.question(*second)
    assert caught.value.reason == "bad_key"
    assert str(caught.value).isprintable()
    folder.fingerprint()
    problems = lint([tmp_path])[1]
    assert [problem.reason for problem in problems] == ["bad_key"]
    assert problems[0].where.isprintable()


def fields(**changes: object) -> bytes:
    return json.dumps({**json.loads(QUESTION), **changes}).encode()


BAD_JSON = {
    "not a number": (QUESTION[:-1] + b', "x": NaN}', "bad_json", "NaN is not a JSON number"),
    "infinity": (
        QUESTION[:-1] + b', "x": -Infinity}',
        "bad_json",
        "-Infinity is not a JSON number",
    ),
    "a number of 5,000 digits": (
        QUESTION[:-1] + b', "x": ' + b"9" * 5000 + b"}",
        "bad_json",
        "not valid JSON",
    ),
    "a field twice": (
        QUESTION[:-1] + b', "answer": "3"}',
        "bad_json",
        "key 'answer' is there twice",
    ),
    "nested": (
        QUESTION[:-1] + b', "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        "bad_json",
        "not valid JSON",
    ),
    "an infinite answer": (fields(answer=0).replace(b" 0", b" 1e999"), "bad_field", "got inf"),
    "a nested answer": (
        fields(answer=0).replace(b" 0", b"[" * 900 + b"]" * 900),
        "bad_json",
        "nested too deeply",
    ),
    "a field nested as deep as JSON is read": (
        QUESTION[:-1] + b', "x": ' + b"[" * 480 + b"]" * 480 + b"}",
        "bad_json",
        "nested too deeply, expected at most 64 levels",
    ),
    "a marker with thousands of digits": (
        fields(question="<image 1> <image " + "9" * 20 + ">", media=[]),
        "missing_media",
        "got <image 1>",
    ),
    "half a surrogate pair": (fields(question="a\ud83d"), "bad_text", r"got 'a\\ud83d'"),
    "half a pair in another field": (fields(other=[{"\udc00": 1}]), "bad_text", "invalid text"),
    "half a pair as bytes": (
        fields(question="X").replace(b"X", b"\xed\xa0\x80"),
        "bad_json",
        "not valid JSON",
    ),
    "NUL": (fields(answer="2\0"), "bad_text", "without NUL"),
    "bytes that are not UTF-8": (
        fields(question="X").replace(b"X", b"\xff"),
        "bad_json",
        "not valid JSON",
    ),
    "thousands of pictures": (
        fields(media=["png"] * 5000),
        "bad_field",
        "too many media files, got 5000",
    ),
    "a long value": (fields(answer_type="x" * 1_000_000), "unknown_answer_type", r"xxx\.\.\.xxx"),
}


@pytest.mark.parametrize("name", BAD_JSON)
def test_hostile_json_is_one_bad_sample(tmp_path: Path, name: str) -> None:
    content, reason, message = BAD_JSON[name]
    (tmp_path / "a.tar").write_bytes(
        GOOD + member("b.json", content) + member("b.png", png()) + END
    )
    folder = ShardFolder(tmp_path)
    with pytest.raises(SampleError, match=message) as caught:
        folder.question(*folder.keys()[1])
    assert caught.value.reason == reason
    assert len(str(caught.value)) < 1000
    assert [problem.reason for problem in lint([tmp_path])[1]] == [caught.value.reason]


def test_a_question_too_large_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "a.tar").open("wb") as file:
        file.write(GOOD + header("b.json", MAX_QUESTION_BYTES + 512))
        file.seek(MAX_QUESTION_BYTES + 512, os.SEEK_CUR)
        file.write(END)
    folder = ShardFolder(tmp_path)
    with pytest.raises(SampleError, match=r"KEY\.json is too large, got 16777728 bytes") as caught:
        folder.question(*folder.keys()[1])
    assert caught.value.reason == "bad_json"


def test_extensions_of_5000_digits_are_ordered_like_others(tmp_path: Path) -> None:
    nines, ones = "9" * 4999 + ".png", "1" * 5000 + ".png"
    (tmp_path / "a.tar").write_bytes(
        member("a.json", QUESTION)
        + b"".join(
            member("l", f"a.{extension}\0".encode(), kind=b"L") + member("a", png())
            for extension in (ones, nines)
        )
        + END
    )
    question = ShardFolder(tmp_path).question(str(tmp_path / "a.tar"), "a")
    assert [ref.extension for ref in question.media] == [nines, ones]


def test_media_are_in_natural_order() -> None:
    names = [
        "img10.jpg",
        "img2.jpg",
        "b.jpg",
        "jpg",
        "3.jpg",
        "img2.left.jpg",
        "img02.png",
        "12.mp4",
        "a.jpg",
    ]
    # Without a number first; then numbers by value, before text; img02 and img2 are equal but for
    # their spelling.
    expected = [
        "jpg",
        "a.jpg",
        "b.jpg",
        "3.jpg",
        "12.mp4",
        "img02.png",
        "img2.jpg",
        "img2.left.jpg",
        "img10.jpg",
    ]
    assert media_order(names) == expected
    assert [
        ref.extension for ref in parse_question("s.tar", "k", QUESTION, names[::-1]).media
    ] == expected


def test_fields_may_be_nested_as_deep_as_the_limit() -> None:
    for depth, is_good in ((MAX_DEPTH - 1, True), (MAX_DEPTH, False)):
        content = QUESTION[:-1] + b', "x": ' + b"[" * depth + b"]" * depth + b"}"
        if is_good:
            assert parse_question("s.tar", "k", content, ()).answer == "2"
        else:
            with pytest.raises(SampleError, match="nested too deeply"):
                parse_question("s.tar", "k", content, ())


@pytest.mark.parametrize(
    "extension", ["tif", "TIFF", "0.heic", "avif", "jfif", "svg", "wmv", "mp3", "image"]
)
def test_a_medium_that_is_not_opened_is_not_left_out_of_its_question(
    tmp_path: Path, extension: str
) -> None:
    other = (
        member("a.json", QUESTION)
        + member(f"a.{extension}", b"x")
        + member("a.txt", b"x")
        + member("a.cls", b"1")
    )
    named = fields(id="r", media=["JPG"])
    (tmp_path / "a.tar").write_bytes(
        other
        + member("b.json", named)
        + member("b.JPG", png())
        + member(f"b.{extension}", b"x")
        + END
    )
    folder = ShardFolder(tmp_path)
    with pytest.raises(
        SampleError,
        match=f"unknown kind of media, got {extension.lower()}, .* or name the others in media",
    ) as caught:
        folder.question(*folder.keys()[0])
    assert caught.value.reason == "unknown_media"
    question = folder.question(*folder.keys()[1])
    assert [reference.extension for reference in question.media] == ["jpg"]


def test_markers_in_backticks_are_text(tmp_path: Path) -> None:
    texts = {
        "What does `<image>` do?": True,
        "And `<video 1>`?": True,
        "See <image>.": False,
        "See <image 0>.": False,
        "`a` <video> `b`": False,
    }
    content = b"".join(
        member(f"{key}.json", fields(id=str(key), question=text)) for key, text in enumerate(texts)
    )
    (tmp_path / "a.tar").write_bytes(content + END)
    problems = lint([tmp_path])[1]
    wanted = [
        f"{tmp_path}/a.tar:{key}" for key, is_text in enumerate(texts.values()) if not is_text
    ]
    assert [(problem.where, problem.reason) for problem in problems] == [
        (where, "missing_media") for where in wanted
    ]


@pytest.mark.parametrize(
    "value",
    [
        {"image": "a.jpg"},
        {"img": {"bytes": "x", "path": None}},
        [{"content": [{"image_url": {"url": "data:image/png;base64,AA"}}]}],
    ],
)
def test_media_deep_inside_a_field_that_is_not_read_are_found(
    tmp_path: Path, value: object
) -> None:
    (tmp_path / "a.tar").write_bytes(GOOD + member("b.json", fields(id="r", extra=value)) + END)
    assert [problem.reason for problem in lint([tmp_path])[1]] == ["unmapped_media"]
