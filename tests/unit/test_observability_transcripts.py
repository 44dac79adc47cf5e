"""Transcripts and buffer files: the public format, and what a stranger can recompute from it."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from data.question import MediaRef
from tests.support.simulated_run import make_group, make_question, make_rollout, simulate_run
from zppo_mm.experience import BufferUpdate, Candidate
from zppo_mm.observability.transcripts import (
    discard_steps_after,
    write_buffer,
    write_held_out_answers,
    write_transcript,
)
from zppo_mm.run_folder import RunFolder

GROUP_KEYS = [
    "step",
    "uid",
    "question_id",
    "kind",
    "prompt",
    "media",
    "answer",
    "accuracy",
    "candidates",
    "num_prefix_tokens",
    "rollouts",
]
RESPONSE_KEYS = ["text", "parsed", "reward", "parts", "num_tokens", "finish_reason"]
ROLLOUT_KEYS = [*RESPONSE_KEYS, "advantage", "minibatch", "author", "policy_version"]


def test_format_of_a_group(tmp_path: Path) -> None:
    question = make_question(4, (MediaRef("video", "shards/000.tar", "k4", "mp4"),))
    candidates = (
        Candidate("so \\boxed{3}", "student", False, "3"),
        Candidate("so \\boxed{4}", "teacher", True, "4"),
    )
    group = make_group(
        question,
        "bcq",
        [make_rollout("4", 1.0, num_tokens=9), make_rollout(None, 0.0, num_tokens=12)],
        7,
        candidates,
        "ask",
    )
    path = write_transcript(
        RunFolder(tmp_path), 7, [group], {group.uid: [1.25, -0.5]}, {group.uid: [0, -1]}
    )
    assert path == tmp_path / "transcripts" / "step_000007.jsonl"
    (line,) = path.read_text().splitlines()
    record = json.loads(line)
    assert list(record) == GROUP_KEYS
    assert [list(rollout) for rollout in record["rollouts"]] == [ROLLOUT_KEYS, ROLLOUT_KEYS]
    assert record["media"] == [
        {"kind": "video", "shard": "shards/000.tar", "key": "k4", "extension": "mp4"}
    ]
    assert record["candidates"][1] == {
        "text": "so \\boxed{4}",
        "source": "teacher",
        "correct": True,
        "answer": "4",
    }
    assert (record["step"], record["kind"], record["prompt"], record["accuracy"]) == (
        7,
        "bcq",
        "ask",
        0.5,
    )
    assert record["rollouts"][1] == {
        "text": group.rollouts[1].text,
        "parsed": None,
        "reward": 0.0,
        "parts": {},
        "advantage": -0.5,
        "num_tokens": 12,
        "finish_reason": "length",
        "minibatch": -1,
        "author": "student",
        "policy_version": 1,
    }


def test_a_group_that_was_not_trained_on_keeps_its_rewards(tmp_path: Path) -> None:
    group = make_group(make_question(1), "new", [make_rollout("1", 1.0), make_rollout("2", 0.0)])
    record = json.loads(write_transcript(RunFolder(tmp_path), 1, [group], {}, {}).read_text())
    assert [
        (each["reward"], each["advantage"], each["minibatch"]) for each in record["rollouts"]
    ] == [(1.0, None, -1), (0.0, None, -1)]


def test_format_of_held_out_answers(tmp_path: Path) -> None:
    ungraded = make_rollout("5", math.nan)
    group = make_group(
        make_question(4, (MediaRef("video", "shards/000.tar", "k4", "mp4"),)),
        "new",
        [make_rollout("4", 1.0, num_tokens=9)],
    )
    group = replace(group, ungraded=(ungraded,))
    path = write_held_out_answers(
        RunFolder(tmp_path),
        20,
        [group, make_group(make_question(5), "new", [make_rollout(None, 0.0)])],
    )
    assert path == tmp_path / "evaluations" / "step_000020.jsonl"
    first, second = [json.loads(line) for line in path.read_text().splitlines()]
    assert list(first) == [
        "step",
        "question_id",
        "source",
        "modality",
        "answer",
        "accuracy",
        "rollouts",
    ]
    assert [list(rollout) for rollout in first["rollouts"]] == [RESPONSE_KEYS, RESPONSE_KEYS]
    assert (first["step"], first["question_id"], first["source"], first["modality"]) == (
        20,
        group.question.id,
        "digits-video",
        "video",
    )
    # The answer that was not graded is shown, and is no part of the accuracy.
    assert ([rollout["reward"] for rollout in first["rollouts"]], first["accuracy"]) == (
        [1.0, None],
        1.0,
    )
    assert (second["modality"], second["rollouts"][0]["parsed"]) == ("text", None)


@pytest.mark.parametrize(
    "text", ["line\u2028separator", "lone \udc80 surrogate", 'quote " and \\ and \n', "数字 🙂"]
)
def test_any_text_is_one_line_and_reads_back(tmp_path: Path, text: str) -> None:
    group = make_group(make_question(1), "new", [make_rollout("1", 1.0)], text=text)
    path = write_transcript(
        RunFolder(tmp_path), 1, [group, group], {group.uid: [0.0]}, {group.uid: [0]}
    )
    with path.open(encoding="utf-8", newline="\n") as file:
        assert [json.loads(line)["prompt"] for line in file] == [text, text]


def test_one_value_per_rollout_is_demanded(tmp_path: Path) -> None:
    group = make_group(make_question(1), "new", [make_rollout("1", 1.0), make_rollout("2", 0.0)])
    with pytest.raises(ValueError, match="shorter"):
        write_transcript(RunFolder(tmp_path), 1, [group], {group.uid: [0.0]}, {group.uid: [0, 0]})
    assert not RunFolder(tmp_path).transcript_of(1).exists()


def test_format_of_a_buffer_file(tmp_path: Path) -> None:
    path = write_buffer(
        RunFolder(tmp_path), 3, BufferUpdate(("b", "c"), ("a",), (), ("x", "b", "c"))
    )
    assert path == tmp_path / "buffer" / "step_000003.json"
    assert json.loads(path.read_text()) == {
        "step": 3,
        "admitted": ["b", "c"],
        "graduated": ["a"],
        "evicted": [],
        "content": ["x", "b", "c"],
    }
    assert [each.name for each in path.parent.iterdir()] == ["step_000003.json"]


def test_steps_after_the_checkpoint_are_discarded(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        write_buffer(RunFolder(tmp_path), step, BufferUpdate((), (), (), ()))
        write_transcript(RunFolder(tmp_path), step, [], {}, {})
        write_held_out_answers(RunFolder(tmp_path), step, [])
    (tmp_path / "buffer" / "step_mine.json").write_text("a user's own")
    discard_steps_after(RunFolder(tmp_path), 2)
    assert (tmp_path / "buffer" / "step_mine.json").exists()
    assert [RunFolder(tmp_path).answers_of(step).exists() for step in (1, 2, 3)] == [
        True,
        True,
        False,
    ]
    assert [RunFolder(tmp_path).buffer_of(step).exists() for step in (1, 2, 3)] == [
        True,
        True,
        False,
    ]
    assert [RunFolder(tmp_path).transcript_of(step).exists() for step in (1, 2, 3)] == [
        True,
        True,
        False,
    ]


def test_a_stranger_can_follow_the_buffer(tmp_path: Path) -> None:
    num_steps, tau, capacity = 6, 0.5, 40
    simulate_run(tmp_path, num_steps)
    content: list[str] = []
    for step in range(1, num_steps + 1):
        with RunFolder(tmp_path).transcript_of(step).open(encoding="utf-8") as file:
            plain = [
                record for record in map(json.loads, file) if record["kind"] in ("new", "replayed")
            ]
        hard = {
            record["question_id"]
            for record in plain
            if sum(r["reward"] for r in record["rollouts"]) < tau * len(record["rollouts"])
        }
        graduated = [
            record["question_id"]
            for record in plain
            if record["question_id"] in content and record["question_id"] not in hard
        ]
        admitted = [
            record["question_id"]
            for record in plain
            if record["question_id"] in hard and record["question_id"] not in content
        ]
        content = [
            question_id for question_id in content if question_id not in graduated
        ] + admitted
        evicted, content = content[: max(0, len(content) - capacity)], content[-capacity:]
        written = json.loads(RunFolder(tmp_path).buffer_of(step).read_text())
        assert written == {
            "step": step,
            "admitted": admitted,
            "graduated": graduated,
            "evicted": evicted,
            "content": content,
        }
