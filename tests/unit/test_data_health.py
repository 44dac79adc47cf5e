"""Counting of bad samples."""

from __future__ import annotations

import json
import logging

import pytest

from data.errors import DataError
from data.health import MAX_LISTED, SampleHealth


def test_bad_samples_are_counted_by_reason_and_named_in_the_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    health = SampleHealth(max_bad_fraction=0.5)
    health.good(7)
    with caplog.at_level(logging.WARNING):
        health.bad("a.tar:1", "bad_json", "not valid JSON")
        health.bad("a.tar:2", "bad_json", "not valid JSON")
        health.bad("a.tar:3", "timeout", "too slow")
    assert health.counts == {"bad_json": 2, "timeout": 1}
    assert (health.num_good, health.num_bad, health.bad_fraction) == (7, 3, 0.3)
    assert [record.getMessage() for record in caplog.records][
        2
    ] == "skipped sample a.tar:3: timeout: too slow"


def test_an_id_from_outside_is_written_so_that_every_log_and_file_takes_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    health = SampleHealth(max_bad_fraction=1.0)
    health.bad("a.tar:\ud800\n\x1b[2J", "bad_key", "a.tar:\\ud800\\n\\x1b[2J: key is not allowed")
    assert health.listed == [("a.tar:\\ud800\\n\\x1b[2J", "bad_key", "key is not allowed")]
    assert [record.getMessage() for record in caplog.records] == [
        "skipped sample a.tar:\\ud800\\n\\x1b[2J: bad_key: key is not allowed"
    ]
    assert json.dumps(health.state_dict(), ensure_ascii=False).encode()


def test_the_fraction_is_checked_from_twenty_samples_on() -> None:
    health = SampleHealth(max_bad_fraction=0.1)
    health.good(16)
    for index in range(3):
        health.bad(f"s{index}", "r", "d")  # 3 of 19 is far above a tenth, but too few to say so
    with pytest.raises(
        DataError,
        match=(
            r"got 4 of 20 \(20.0%\), expected at most 10.0%.*\n  s0: r: d\n  s1: r: d\n  s2: r: "
            r"d\n  s3: r: d"
        ),
    ):
        health.bad("s3", "r", "d")


def test_the_fraction_is_checked_again_when_good_samples_make_it_twenty() -> None:
    health = SampleHealth(max_bad_fraction=0.1)
    for index in range(4):
        health.bad(f"s{index}", "r", "d")
    health.good(15)
    with pytest.raises(DataError, match="got 4 of 20"):
        health.good()


def test_exactly_the_allowed_fraction_passes() -> None:
    health = SampleHealth(max_bad_fraction=0.05)
    health.good(19)
    health.bad("s", "r", "d")  # 1 of 20 is 0.05
    with pytest.raises(DataError, match="got 2 of 21"):
        health.bad("t", "r", "d")


def test_strict_stops_at_the_first() -> None:
    with pytest.raises(DataError, match=r"sample a.tar:1 is bad \(timeout\): too slow"):
        SampleHealth(strict=True).bad("a.tar:1", "timeout", "too slow")


def test_a_sample_whose_media_fail_later_counts_once() -> None:
    health = SampleHealth(max_bad_fraction=1.0)
    health.good(4)
    health.bad("q", "truncated", "d", was_good=True)
    assert (health.num_good, health.num_bad, health.bad_fraction) == (3, 1, 0.25)


def test_state_continues_and_stays_small() -> None:
    health = SampleHealth(max_bad_fraction=1.0)
    health.good(1000)
    for index in range(MAX_LISTED + 50):
        health.bad(f"s{index}", "r", "d")
    assert len(health.listed) == MAX_LISTED
    resumed = SampleHealth(max_bad_fraction=1.0)
    resumed.load_state_dict(json.loads(json.dumps(health.state_dict())))
    assert resumed.state_dict() == health.state_dict()
    assert resumed.num_bad == MAX_LISTED + 50


def test_a_fraction_must_be_one() -> None:
    with pytest.raises(DataError, match="max_bad_fraction is not a fraction, got 5"):
        SampleHealth(max_bad_fraction=5)


def test_a_name_that_no_file_takes_can_be_logged_and_saved() -> None:
    health = SampleHealth(1.0)
    health.bad("caf\udce9.tar:k", "bad_text", "caf\udce9.tar:k: half a pair \ud83d")
    assert health.listed == [("caf\\udce9.tar:k", "bad_text", "half a pair \ufffd")]
    json.dumps(health.state_dict(), ensure_ascii=False).encode()


def test_samples_of_a_file_are_judged_at_its_end_and_named_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    health = SampleHealth(max_bad_fraction=0.1, option="--max-bad-fraction", at_end=True)
    for index in range(5):
        health.bad(f"s{index}", "r", "d")
    health.good(15)
    with pytest.raises(DataError, match=r"got 5 of 20 \(25.0%\).*or raise --max-bad-fraction\Z"):
        health.finish()
    health.good(30)
    health.finish()
    assert [record.getMessage() for record in caplog.records] == [
        f"skipped sample s{index}: r: d" for index in range(5)
    ]
    hopeless = SampleHealth(at_end=True)
    for index in range(MAX_LISTED - 1):
        hopeless.bad(f"s{index}", "r", "d")
    with pytest.raises(DataError, match=r"got 100 of 100 \(100.0%\)"):
        hopeless.bad("one more", "r", "d")


def test_what_is_left_out_is_counted_and_not_bad(caplog: pytest.LogCaptureFixture) -> None:
    health = SampleHealth(max_bad_fraction=0.0, strict=True)
    health.good(25)
    for index in range(20):
        health.leave_out(f"s{index}", "needs_judge", "no judge", was_good=True)
    assert (health.num_good, health.num_bad, health.left_out) == (5, 0, {"needs_judge": 20})
    assert [record.getMessage() for record in caplog.records] == [
        "skipped sample s0: needs_judge: no judge (no bad one; others are only counted)"
    ]
    kept = SampleHealth()
    kept.load_state_dict(json.loads(json.dumps(health.state_dict())))
    assert kept.left_out == {"needs_judge": 20}
