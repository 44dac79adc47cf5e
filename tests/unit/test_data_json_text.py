"""JSON from others: strict where Python's own reader would lose or keep what nobody can write."""

from __future__ import annotations

import pytest

from data.errors import SampleError
from data.json_text import InvalidText, load_json, load_object
from data.sample import parse_question

GOOD = b'{"id": "q", "question": "Why?", "answer": "1", "answer_type": "math"%s}'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": 1, "a": 2}', "key 'a' is there twice"),
        (b'{"x": [{"a": 1, "b": 2, "a": 1}]}', "key 'a' is there twice"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a": ' * 100_000, "nested too deeply"),
        (b"\xff\xfe{\0}\0", "invalid start byte"),
        (b'"\xed\xa0\xbd"', "invalid continuation byte"),  # half a pair in its own bytes
        (b"9" * 5000, "Exceeds the limit"),
        (b"", "Expecting value"),
    ],
)
def test_what_is_no_json(content: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_json(content)


@pytest.mark.parametrize(
    "content",
    [rb'"\ud83d"', rb'{"a": ["\udc00"]}', rb'{"\ud800": 1}', rb'"a\u0000b"', rb'"\ude00\ud83d"'],
)
def test_text_that_no_file_takes_is_refused_wherever_it_stands(content: bytes) -> None:
    with pytest.raises(InvalidText, match="invalid text, got '"):
        load_json(content)


def test_good_text_is_left_alone() -> None:
    assert load_json(rb'{"a": "\ud83d\ude00", "b": "caf\u00e9"}') == {
        "a": "\N{GRINNING FACE}",
        "b": "café",
    }
    assert load_json(b"\xef\xbb\xbf[1]") == [1]
    assert load_object("here", b'{"a": 1}') == {"a": 1}
    with pytest.raises(
        SampleError, match=r"here: not an object, got list, expected fields; correct it"
    ):
        load_object("here", b"[]")


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        (rb', "source": "\ud83d"', "bad_text"),
        (rb', "note": ["\udc00"]', "bad_text"),
        (b', "images": ["a.png"]', "unmapped_media"),
        (b', "picture_1": "a.png"', "unmapped_media"),
        (b', "question": "twice"', "bad_json"),
        (
            b', "image_id": "7", "has_image": "yes", "num_images": 2, '
            b'"image": 3, "clip_score": "0.5"',
            "",
        ),
    ],
)
def test_a_question_of_a_shard_is_held_to_the_same_rules(fields: bytes, reason: str) -> None:
    content = GOOD % fields
    if not reason:
        assert parse_question("s.tar", "k", content, ["json"]).id == "q"
        return
    with pytest.raises(SampleError) as caught:
        parse_question("s.tar", "k", content, ["json"])
    assert caught.value.reason == reason


@pytest.mark.parametrize(
    ("text", "extensions", "is_good"),
    [
        (b"<image> What?", ["jpg"], True),
        (b"<image> What?", [], False),
        (b"<image> and <image>?", ["0.jpg"], False),
        (b"<image> and <image>?", ["0.jpg", "1.jpg"], True),
        (b"<image> what?", ["0.jpg", "1.jpg"], False),
        (b"<image 1> or <image 2>?", ["0.jpg"], False),
        (b"<image 1> or <image 2>?", ["0.jpg", "1.jpg"], True),
        (b"<image 2>, <image 2>?", ["0.jpg", "1.jpg"], True),
        (b"<video> What?", ["jpg"], False),
        (b"<video> What?", ["mp4"], True),
        (b"a < image > b", [], True),
    ],
)
def test_markers_in_the_text_are_as_many_as_the_media(
    text: bytes, extensions: list[str], is_good: bool
) -> None:
    content = b'{"id": "q", "question": "%s", "answer": "1", "answer_type": "math"}' % text
    if is_good:
        assert len(parse_question("s.tar", "k", content, ["json", *extensions]).media) == len(
            extensions
        )
        return
    with pytest.raises(
        SampleError, match=r"the text does not fit its media, got .* expected as many"
    ) as caught:
        parse_question("s.tar", "k", content, ["json", *extensions])
    assert caught.value.reason == "missing_media"


def test_a_key_that_is_no_text_is_refused() -> None:
    with pytest.raises(SampleError, match=r"s\.tar:caf\\udce9: key is not allowed") as caught:
        parse_question("s.tar", "caf\udce9", GOOD % b"", ["json"])
    assert caught.value.reason == "bad_key"


def test_a_value_that_is_no_number_is_missing_in_a_table_and_refused_elsewhere() -> None:
    content = b'[{"a": NaN, "b": -Infinity, "c": 1}]'
    assert load_json(content, is_table=True) == [{"a": None, "b": None, "c": 1}]
    with pytest.raises(ValueError, match="NaN is not a JSON number"):
        load_json(content)
