"""Gaps between log-probs, what is said about them, and how the media of a prompt are counted."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from zppo_mm.parity.compare import Gap, Limit, Response, describe_gap, measure
from zppo_mm.parity.media import MediaCount, media_in_prompt
from zppo_mm.parity.record import ParityRecord, count_modality, parity_table, write_record
from zppo_mm.run_folder import RunFolder

EXACT = Limit("parity.max_gap", 1e-3, of_divergence=False)
COARSE = Limit("parity.max_kl", 0.05, of_divergence=True)
IMAGE, VIDEO = 90, 91


def response(
    question: str, training: list[float], rollout: list[float], source: list[float] | None = None
) -> Response:
    arrays = [
        np.array(values, dtype=np.float32) if values is not None else None
        for values in (training, rollout, source)
    ]
    return Response("image", question, np.arange(7, 7 + len(training)), *arrays)


def test_a_gap_by_hand() -> None:
    gap = measure(
        [response("a", [-1.0, -2.0], [-1.0, -2.5]), response("b", [-0.5], [-0.25])], "rollout"
    )
    # Differences 0, 0.5, -0.25; the tokens were drawn by the engine, so r = training / rollout.
    wanted = (0 + (math.exp(0.5) - 1 - 0.5) + (math.exp(-0.25) - 1 + 0.25)) / 3
    assert gap == Gap(3, 0.5, 0.25, pytest.approx(wanted))


def test_the_source_is_measured_where_it_was_compared() -> None:
    compared = response("a", [-1.0], [-1.0], [-1.5])
    # The training forward pass stands for the engine that drew: r = source / training = exp(-0.5).
    wanted = Gap(1, 0.5, 0.5, pytest.approx(math.exp(-0.5) - 1 + 0.5))
    assert measure([response("b", [-9.0], [-1.0]), compared], "source") == wanted
    assert measure([response("b", [-9.0], [-1.0])], "source") is None
    assert measure([], "rollout") is None


@pytest.mark.parametrize(
    ("gap", "limit", "exceeds"),
    [
        (Gap(5, 9e-4, 5e-4, 0), EXACT, False),
        (Gap(5, 2e-3, 4e-4, 0), EXACT, True),
        (Gap(5, 0.3, 0.2, 0.02), COARSE, False),
        (Gap(5, 0.3, 0.02, 0.06), COARSE, True),
        (Gap(5, math.nan, math.nan, math.nan), EXACT, True),
        (Gap(5, math.nan, math.nan, math.nan), COARSE, True),
    ],
)
def test_a_limit_holds_for_every_token_or_for_the_divergence(
    gap: Gap, limit: Limit, exceeds: bool
) -> None:
    assert gap.exceeds(limit) is exceeds


def test_the_first_token_above_the_limit_is_named() -> None:
    responses = [
        response("good", [-1.0, -2.0], [-1.0, -2.0]),
        response("bad", [-1.0, -2.0, -3.0], [-1.0005, -2.5, -9.0]),
    ]
    gap = measure(responses, "rollout")
    assert gap is not None
    said = describe_gap(responses, "rollout", gap, EXACT, lambda ids: f"<{ids[0]}>")
    assert (
        "parity: image: sampling and the training forward pass disagree, got a largest gap of 6 "
        "nats over 5 tokens" in said
    )
    assert (
        "expected at most 0.001 (parity.max_gap); first at question 'bad', token 1 of the response "
        "(id 8, '<8>')" in said
    )
    assert "log-prob -2.50000 by sampling, -2.00000 in training; " in said
    assert said.endswith("parity.mode=warn goes on all the same")


def test_a_number_that_is_none_is_the_first_token() -> None:
    responses = [response("a", [-1.0, math.nan], [-1.0, -1.0])]
    gap = measure(responses, "rollout")
    assert gap is not None
    assert "got a divergence of nan nats over 2 tokens" in describe_gap(
        responses, "rollout", gap, COARSE, str
    )
    assert "token 1 of the response" in describe_gap(responses, "rollout", gap, COARSE, str)


def test_a_token_of_a_divergence_is_one_that_makes_it() -> None:
    # Token 0 differs by 0.1, about 0.005 of divergence; token 1 by 1: exp(1) - 2 = 0.72.
    responses = [response("a", [-1.0, -2.0], [-1.1, -3.0])]
    gap = measure(responses, "rollout")
    assert gap is not None
    said = describe_gap(responses, "rollout", gap, COARSE, str)
    assert (
        "got a divergence of 0.362 nats over 2 tokens, expected at most 0.05 (parity.max_kl); "
        "first at question 'a', token 1 " in said
    )


IMAGE_GRID, VIDEO_GRID = (1, 4, 4), (3, 4, 2)  # 4 features, and 3 x 2


@pytest.mark.parametrize(
    ("token_ids", "num_media"),
    [
        ([1, *[IMAGE] * 4, 2, *[VIDEO] * 2, 3, *[VIDEO] * 2, 3, *[VIDEO] * 2, 4], 2),
        ([1, *[IMAGE] * 4, 2, *[VIDEO] * 6, 4], 2),
        ([1, *[IMAGE] * 4, 2, *[VIDEO] * 2, 3, *[VIDEO] * 4, 4], 1),
        ([1, *[IMAGE] * 4, 2, *[VIDEO] * 2, 3, *[VIDEO] * 2, 4], 1),
        ([1, *[VIDEO] * 6, 2, *[IMAGE] * 4], 0),
        ([1, *[IMAGE] * 3, 2, *[VIDEO] * 7], 0),
        ([1, *[IMAGE] * 4, 2, *[VIDEO] * 6, 4, IMAGE], 3),
        ([1, *[IMAGE] * 4], 1),
        ([1, 2], 0),
    ],
    ids=[
        "frames",
        "one run",
        "frames joined",
        "frame lost",
        "swapped",
        "wrong lengths",
        "one too many",
        "video lost",
        "all lost",
    ],
)
def test_media_are_counted_by_their_placeholders(token_ids: list[int], num_media: int) -> None:
    assert (
        media_in_prompt(
            np.array(token_ids), ["image", "video"], [IMAGE_GRID, VIDEO_GRID], IMAGE, VIDEO, 2
        )
        == num_media
    )


@pytest.mark.parametrize(
    ("counts", "agrees"),
    [((2, 2, 10, 10), True), ((2, 1, 10, 10), False), ((2, 2, 10, 8), False), ((0, 0, 0, 0), True)],
)
def test_a_lost_medium_is_seen_and_named(counts: tuple[int, int, int, int], agrees: bool) -> None:
    count = MediaCount("video", "clip-7", *counts)
    assert count.agrees is agrees
    assert (
        f"'clip-7' do not reach the network whole, got {counts[0]} in the sample, {counts[1]} in "
        "the prompt" in count.describe()
    )


def test_the_record_is_a_line_of_json_and_a_table(tmp_path: Path) -> None:
    counts = [MediaCount("image", "a", 1, 1, 4, 4), MediaCount("image", "b", 2, 2, 8, 8)]
    rows = (
        count_modality("text", 1, [], Gap(9, math.nan, 1e-7, 0.0), None),
        count_modality("image", 2, counts, Gap(20, 2e-6, 1e-7, 0.0), Gap(10, 3e-6, 2e-7, 0.0)),
    )
    record = ParityRecord(0, "float32", EXACT, COARSE, 1.25, rows, "too large", ("something",))
    write_record(RunFolder(tmp_path), record)
    [line] = (tmp_path / "parity.jsonl").read_text().splitlines()
    written = json.loads(line)
    assert written["modalities"][0]["rollout"]["max"] is None
    assert [
        written["modalities"][1][name]
        for name in ("media", "media_in_prompt", "placeholders", "features")
    ] == [3, 3, 12, 12]
    assert (written["limit"]["value"], written["findings"], written["not_compared"]) == (
        1e-3,
        ["something"],
        "too large",
    )
    assert written["rollout_limit"] == {
        "key": "parity.max_kl",
        "value": 0.05,
        "of_divergence": True,
    }
    shown = parity_table(record).splitlines()
    assert shown[0] == (
        "parity at step 0, float32, limit 0.05 nats for a divergence (sampling) and 0.001 nats for "
        "a gap of any token (source), 1.2 s"
    )
    assert shown[4].split() == [
        "image",
        "2",
        "3",
        "3",
        "12",
        "12",
        "2.0e-06",
        "1.0e-07",
        "0.0e+00",
        "3.0e-06",
        "2.0e-07",
        "0.0e+00",
        "20",
    ]
    assert shown[5] == "source checkpoint not compared: too large"
