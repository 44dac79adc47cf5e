"""The rule for text at every border."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.text import clean_text, is_valid_text

ANY = st.text(st.characters(categories=None, exclude_categories=()) | st.sampled_from("\0\ud83d\ude00a"))


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
