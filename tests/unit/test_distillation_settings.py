"""What cannot be distilled is refused before anything is trained, with the way out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.tiny_folder import build_folder
from zppo_mm.config.load import load_config
from zppo_mm.errors import ConfigError
from zppo_mm.rollout.prompt import PromptEncoder

SERVED = ["teacher.endpoints=['http://127.0.0.1:9/v1']", "teacher.model=m"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["method=on_distill", *SERVED, "distill.top_k=20"],
            r"cannot score the student.s text, .* run the teacher in this process",
        ),
        (
            ["method=off_distill", *SERVED],
            r"distill.top_k: .* got 0 with teacher.endpoints, .*at most 20",
        ),
        (
            ["method=off_distill", *SERVED, "distill.top_k=20", "rollout.temperature=0.7"],
            r"rollout.temperature: .* got 0.7",
        ),
        (
            ["method=on_distill", "parallel.pipeline_model_parallel_size=2"],
            r"pipeline_model_parallel_size: .* got 2, expected 1; use",
        ),
        (["method=off_distill", "teacher.num_ranks=1"], r"teacher.num_ranks: .* got 1, expected 0"),
    ],
)
def test_what_a_teacher_cannot_return_is_refused(options: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(None, options)


def test_what_it_can_return_is_not() -> None:
    assert (
        load_config(None, ["method=off_distill", *SERVED, "distill.top_k=20"]).distill.top_k == 20
    )
    served = [*SERVED, "distill.top_k=20", "parallel.pipeline_model_parallel_size=2"]
    assert load_config(None, ["method=off_distill_replay", *served]).distill.source == "teacher"
    assert load_config(None, ["method=on_distill"]).distill.top_k == 0


def never(_reference: Any) -> Any:
    raise AssertionError("no media")


def encoder(folder: Path, **processor: Any) -> PromptEncoder:
    path = folder / "video_preprocessor_config.json"
    if processor:
        path.write_text(json.dumps(json.loads(path.read_text()) | processor))
    return PromptEncoder(folder, never)


def test_equal_folders_read_the_same(tmp_path: Path) -> None:
    build_folder(tmp_path)
    encoder(tmp_path).check_same_inputs(encoder(tmp_path), "distill.source")


def test_the_first_difference_is_named(tmp_path: Path) -> None:
    for name in ("student", "tokens", "pixels", "text"):
        (tmp_path / name).mkdir()
        build_folder(tmp_path / name, vision=name != "text")
    student = encoder(tmp_path / "student")
    pixels = encoder(tmp_path / "pixels", size={"shortest_edge": 128, "longest_edge": 8192})
    with pytest.raises(
        ConfigError, match=r"distill.source: .* video_max_pixels of the processors is 4096 and 8192"
    ):
        student.check_same_inputs(pixels, "distill.source")
    with pytest.raises(ConfigError, match=r"image_token_id are \d+ and -1"):
        student.check_same_inputs(encoder(tmp_path / "text"), "distill.source")
    # Another token under an id that both have.
    path = tmp_path / "tokens" / "tokenizer.json"
    path.write_text(path.read_text().replace('"<think>"', '"<thought>"'))
    with pytest.raises(ConfigError, match=r"token \d+ is '<think>' and '<thought>'"):
        student.check_same_inputs(encoder(tmp_path / "tokens"), "distill.source")
