"""The rule for text at every border."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.errors import DataError
from data.text import clean_text, is_valid_text, read_text_file
from zppo_mm.rewards.judge import load_judge_template
from zppo_mm.zone.prompts import load_templates

ANY = st.text(
    st.characters(categories=None, exclude_categories=()) | st.sampled_from("\0\ud83d\ude00a")
)


@pytest.mark.parametrize(
    ("given_text", "expected"),
    [
        ("", ""),
        ("é ≤ 🙂", "é ≤ 🙂"),
        ("a\ud83db", "a\ufffdb"),
        ("\ude00 a", "\ufffd a"),
        ("\ud83d", "\ufffd"),
        ("\ud83d\ud83d\ude00", "\ufffd\U0001f600"),
        (json.loads('"\\ud83d"') + json.loads('"\\ude00"'), "\U0001f600"),
        ("\ude00\ud83d", "\ufffd\ufffd"),
        ("a\0b", "a\ufffdb"),
        ("\ud83d\0\ude00", "\ufffd\ufffd\ufffd"),
    ],
)
def test_what_becomes_of_a_text(given_text: str, expected: str) -> None:
    assert clean_text(given_text) == expected
    assert is_valid_text(given_text) == (given_text == expected)


@given(ANY)
def test_what_comes_out_is_utf_8_and_stays_as_it_is(text: str) -> None:
    cleaned = clean_text(text)
    assert is_valid_text(cleaned)
    assert cleaned.encode().decode() == cleaned
    assert "\0" not in cleaned
    assert clean_text(cleaned) == cleaned
    assert (cleaned == text) == is_valid_text(text)


BAD_FILES = [
    (b"caf\xe9 {question}", "byte 0xe9 at 3"),
    (b"\xff\xfea\0", "byte 0xff at 0"),
    (b"\xed\xa0\xbd", "byte 0xed at 0"),
    (b"a\0", "a NUL"),
]


@pytest.mark.parametrize(("content", "problem"), BAD_FILES)
def test_a_file_that_is_no_text_is_named(tmp_path: Path, content: bytes, problem: str) -> None:
    file = tmp_path / "hint.txt"
    file.write_bytes(content)
    message = rf"hint\.txt is not UTF-8 text, got {problem}, expected UTF-8; save it as such"
    for read in (
        load_judge_template,
        lambda path: load_templates(str(Path(path).parent)),
    ):
        with pytest.raises(DataError, match=message):
            read(str(file))


def test_neither_a_byte_order_mark_nor_the_way_that_lines_end_is_text(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes(b"\xef\xbb\xbf\xc3\xa9\r\n\r\nb\rc\n")
    assert read_text_file(file, "here") == "\u00e9\n\nb\nc\n"


def test_what_is_no_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "bcq.txt").mkdir()
    with pytest.raises(DataError, match=r"bcq\.txt cannot be read, got Is a directory"):
        load_templates(str(tmp_path))
