"""What vLLM's servers are asked for rollouts, and what is taken from their replies."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.media.opening import Frames
from data.question import MediaRef, Question
from encoders.config import TIMESTAMPED
from encoders.processor import process_image
from tests.support.drawing_students import Asked, TableStudent
from tests.support.vllm_replies import FAULTS, choice, media_of, spoil
from zppo_mm.bundled import STUDENT_DIR
from zppo_mm.rollout.engine import Generation, SamplingParams, VersionSpan
from zppo_mm.rollout.processor import read_processor
from zppo_mm.rollout.prompt import PromptEncoder
from zppo_mm.rollout.served.features import MediaReading, features, pixels_of, place_media
from zppo_mm.rollout.served.requests import ServedRequest
from zppo_mm.serving.fault import Fault
from zppo_mm.serving.received_text import ReceivedText

SAMPLING = SamplingParams(temperature=1.0, max_new_tokens=12, stop_token_ids=(3, 4))
PLACEHOLDERS = (7, 9)
RECEIVED = ReceivedText()
# Sums of 40 exponentials in float64, rounded to float32.
TOLERANCE = 2e-6
ASK = ServedRequest(
    token_ids=np.array([11, 12, 13]),
    media=(),
    num_rollouts=4,
    seed=5,
    sampling=SAMPLING,
    forbidden_ids=PLACEHOLDERS,
    vocabulary=40,
    run="run",
    versions=range(2, 3),
)
TABLE = TableStudent()
Change = Callable[[list[dict[str, Any]]], Any]


def reply_to(request: ServedRequest, version: str = "run/2") -> dict[str, Any]:
    """Return a server's reply."""
    body = json.loads(request.body())
    asked = Asked(body["token_ids"], {}, body["sampling_params"])
    drawn = TABLE.draw(asked)
    return {"choices": [choice(i, *each, asked, version) for i, each in enumerate(drawn)]}


def read(request: ServedRequest, reply: Any) -> tuple[Generation, ...]:
    return request.read(json.dumps(reply).encode(), RECEIVED)


@pytest.mark.parametrize("temperature", [0.01, 0.5, 1.0, 2.0, 0.0])
def test_logprobs_are_those_of_the_whole_distribution(temperature: float) -> None:
    """What is never drawn is in the sum that the others are divided by, as in training."""
    request = replace(ASK, sampling=replace(SAMPLING, temperature=temperature))
    generations = read(request, reply_to(request))
    assert len(generations) == 4
    for each in generations:
        before = [13, *each.response_ids[:-1]]
        logits = TABLE.logits[before] / (temperature or 1.0)
        naive = logits - np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1))[:, None]
        naive -= logits.max(1, keepdims=True)
        expected = naive[np.arange(len(before)), each.response_ids]
        np.testing.assert_allclose(
            each.rollout_logprobs, expected, atol=TOLERANCE * (1 + np.abs(expected).max())
        )
        assert not set(each.response_ids.tolist()) & set(PLACEHOLDERS)
        assert each.versions == (VersionSpan(2, len(each.response_ids)),)
        stopped = each.response_ids[-1] in SAMPLING.stop_token_ids
        assert each.finish_reason == ("stop" if stopped else "length")


def test_greedy_continuations_are_asked_for_once() -> None:
    """vLLM refuses several; all rollouts are the same one."""
    request = replace(ASK, sampling=replace(SAMPLING, temperature=0.0))
    assert json.loads(request.body())["sampling_params"]["n"] == 1
    first, *others = read(request, reply_to(request))
    assert [each.response_ids.tolist() for each in others] == [first.response_ids.tolist()] * 3


SPOILT = [fault for fault in FAULTS if fault not in
          ("reset", "half_body", "500", "503", "stall", "wrong_json")]  # fmt: skip


@pytest.mark.parametrize("fault", SPOILT)
def test_a_spoilt_reply_is_a_fault(fault: str) -> None:
    spoilt = spoil(fault, reply_to(ASK), json.loads(ASK.body()))
    kinds = {"other_weights": "other_weights", "aborted": "unfinished"}
    with pytest.raises(Fault) as raised:
        read(ASK, spoilt)
    assert raised.value.kind == kinds.get(fault, "bad_reply")
    assert not raised.value.is_refusal


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c[0].update(index=1), "expected each of 4 once"),
        (lambda c: c[0].update(index=True), "got bool, expected int"),
        (lambda c: c[0].update(token_ids=[]), "0 tokens"),
        (lambda c: c[0].update(token_ids=[1.0]), "got float"),
        (lambda c: c[0].update(token_ids=[-1]), "tokens -1 to"),
        (lambda c: c[0].update(logprobs=None), "TypeError"),
        (lambda c: c[0].pop("weight_versions"), "weight_versions"),
        (lambda c: c[0].update(weight_versions=None), "got NoneType"),
        (lambda c: c[0]["weight_versions"][0].update(start=1), "a span of weights from 1"),
        (lambda c: c[0]["weight_versions"][0].update(version=2), "got int, expected str"),
        (lambda c: c[0]["logprobs"]["content"][0].update(token_id=39), "token 39 for token"),
        (lambda c: c[0]["logprobs"]["content"][0].update(logprob="-1"), "the log-prob -1"),
        (lambda c: c[0]["logprobs"]["content"][0].update(top_logprobs=[]), "KeyError: 7"),
    ],
)
def test_what_is_wrong_is_said(change: Change, message: str) -> None:
    reply = reply_to(ASK)
    change(reply["choices"])
    with pytest.raises(Fault, match=message):
        read(ASK, reply)


def test_a_response_that_the_server_cut_is_a_fault() -> None:
    """Its limit of a sequence is below what was asked for."""
    long = replace(ASK, sampling=replace(SAMPLING, stop_token_ids=()))
    reply = reply_to(long)
    asked = replace(long, sampling=replace(long.sampling, max_new_tokens=13))
    with pytest.raises(Fault, match="max-model-len") as raised:
        read(asked, reply)
    # It would cut it again.
    assert raised.value.is_refusal


def test_tokens_after_a_stop_token_are_a_fault() -> None:
    long = replace(ASK, sampling=replace(SAMPLING, stop_token_ids=()))
    reply = reply_to(long)
    first = reply["choices"][0]["token_ids"][0]
    asked = replace(long, sampling=replace(long.sampling, stop_token_ids=(first,)))
    with pytest.raises(Fault, match="tokens after a stop token"):
        read(asked, reply)


def test_a_broken_network_is_no_fault_of_the_server() -> None:
    """vLLM writes NaN as -9999; the sampler finds the token and what to do about it."""
    reply = reply_to(ASK)
    reply["choices"][1]["logprobs"]["content"][0]["logprob"] = -9999.0
    sound, broken, *_ = read(ASK, reply)
    assert sound.num_sound_tokens is None
    assert broken.num_sound_tokens == 0
    assert math.isnan(broken.rollout_logprobs[0])


@pytest.mark.parametrize(
    "version", ["run/1", "run/3", "other/2", "default", "run/", "run/-2", "run/²", "2", "/2"]
)
def test_other_weights_are_found_out(version: str) -> None:
    with pytest.raises(Fault, match="expected run/range") as raised:
        read(ASK, reply_to(ASK, version))
    assert raised.value.kind == "other_weights"


def test_spans_of_several_weights_are_kept_where_they_may_be() -> None:
    request = replace(ASK, versions=range(2, 4), sampling=replace(SAMPLING, stop_token_ids=()))
    reply = reply_to(request)
    for each in reply["choices"]:
        each["weight_versions"] = [
            {"version": "run/2", "start": 0, "end": 5},
            {"version": "run/3", "start": 5, "end": 12},
        ]
    assert {each.versions for each in read(request, reply)} == {
        (VersionSpan(2, 5), VersionSpan(3, 7))
    }


def test_without_a_run_no_versions_are_read() -> None:
    request = replace(ASK, run="", versions=range(0))
    reply = reply_to(request)
    for each in reply["choices"]:
        del each["weight_versions"]
    assert {each.versions for each in read(request, reply)} == {()}


@pytest.mark.parametrize("version", ["default", "0a1b/7", "loading"])
def test_without_a_run_weights_of_another_one_are_refused(version: str) -> None:
    request = replace(ASK, run="", versions=range(0))
    reply = reply_to(request, version)
    if version == "default":
        assert len(read(request, reply)) == 4
        return
    with pytest.raises(Fault, match=r"a training run has sent.*start the server again") as raised:
        read(request, reply)
    assert raised.value.is_refusal


@given(st.binary(max_size=200))
def test_bytes_of_any_kind_are_a_fault(body: bytes) -> None:
    with pytest.raises(Fault):
        ASK.read(body, RECEIVED)


def open_media(reference: MediaRef) -> Frames:
    rng = np.random.default_rng(len(reference.key))
    frames, seconds = (1, (0.0,)) if reference.kind == "image" else (5, (0.0, 0.5, 1.0, 1.5, 2.0))
    return Frames(rng.integers(0, 256, (frames, 64, 96, 3), dtype=np.uint8), seconds)


@pytest.fixture(scope="module")
def encoder() -> PromptEncoder:
    return PromptEncoder(STUDENT_DIR, open_media)


def test_media_arrive_as_the_pixels_that_were_opened(encoder: PromptEncoder) -> None:
    """Every feature has its placeholder; frames of a video come one by one, each after its time."""
    media = (MediaRef("image", "", "a", "x"), MediaRef("video", "", "bb", "x"))
    prompt, vision = encoder.encode("q", Question("q", "q", media, "1", "open"))
    placeholders = (encoder.chat.image_token_id, encoder.chat.video_token_id)
    reading = MediaReading(placeholders, encoder.processor, encoder.chat.video_layout)
    assert encoder.processor is not None
    items = place_media(prompt.token_ids, vision, reading)
    frames = vision[1].grid[0]
    assert [item.grid for item in items] == [
        vision[0].grid, *[(1, *vision[1].grid[1:])] * frames
    ]  # fmt: skip
    sent = media_of(features(items))["image"]
    covered = [at + index for (at, _), item in zip(sent, items, strict=True)
               for index in range(item.length)]  # fmt: skip
    assert covered == np.flatnonzero(np.isin(prompt.token_ids, placeholders)).tolist()
    pixels = np.concatenate([each["pixel_values"] for _, each in sent])
    patches = np.concatenate([each.patches for each in vision])
    processor = encoder.processor
    mean, std = np.array(processor.image_mean)[:, None], np.array(processor.image_std)[:, None]
    normalised = (pixels.reshape(len(pixels), 3, -1) / 255 - mean) / std
    np.testing.assert_allclose(normalised.reshape(patches.shape), patches, atol=1e-6)
    assert [each["image_grid_thw"].tolist() for _, each in sent] == [[*item.grid] for item in items]


def test_equal_media_have_equal_names_and_others_others(encoder: PromptEncoder) -> None:
    media = tuple(MediaRef("image", "", key, "x") for key in ("a", "a", "bb"))
    prompt, vision = encoder.encode("q", Question("q", "q", media, "1", "open"))
    placeholders = (encoder.chat.image_token_id, encoder.chat.video_token_id)
    reading = MediaReading(placeholders, encoder.processor, TIMESTAMPED)
    one, two, three = features(place_media(prompt.token_ids, vision, reading))["mm_hashes"]["image"]
    assert one == two != three


@given(st.integers(0, 2**32 - 1))
def test_pixels_come_back_exactly(seed: int) -> None:
    processor = read_processor(STUDENT_DIR)
    assert processor is not None
    pixels = np.random.default_rng(seed).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    patches = process_image(pixels, processor).patches
    values = np.sort(pixels_of(patches, processor), axis=None)
    # An image repeats its one frame in time.
    repeated = np.repeat(np.sort(pixels, axis=None), processor.temporal_patch_size)
    assert (values == repeated).all()


def test_a_model_without_media_sends_none(tmp_path: Path) -> None:
    assert place_media(ASK.token_ids, (), MediaReading((), None, TIMESTAMPED)) == ()
    assert "features" not in json.loads(ASK.body())
