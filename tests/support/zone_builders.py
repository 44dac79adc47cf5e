"""Groups and questions for the tests of the zone, built from rewards and texts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from data.question import MediaRef, Question
from zppo_mm.experience import Group, GroupKind, Prompt, PromptInstance, Rollout
from zppo_mm.teacher.teacher import CompressedTrace, Trace


def question(question_id: str, choices: Sequence[str] = ()) -> Question:
    media = (MediaRef("image", "train/shard-000000.tar", question_id, "png"),)
    answer_type = "choice" if choices else "math"
    return Question(
        question_id,
        f"What is {question_id}?",
        media,
        "A" if choices else "42",
        answer_type,
        tuple(choices),
        "test",
    )


def rollout(text: str, parsed: str | None, reward: float) -> Rollout:
    return Rollout(
        np.array([5, 6]), np.array([-0.5, -0.25], np.float32), "stop", text, parsed, reward, 0
    )


def group(
    question_id: str, rewards: Sequence[float], kind: GroupKind = "new", step: int = 0
) -> Group:
    rollouts = tuple(
        rollout(
            f"work {question_id} {index}\n\\boxed{{{42 if reward else index}}}",
            "42" if reward else str(index),
            reward,
        )
        for index, reward in enumerate(rewards)
    )
    asked = question(question_id)
    prompt = Prompt("text", np.arange(3), np.zeros((3, 3), np.int64), 3)
    return Group(
        PromptInstance(f"{step}/{kind}/{question_id}", asked, kind, asked.text), prompt, rollouts
    )


class CountingCompressor:
    """Keeps the first line and remembers the calls."""

    def __init__(self) -> None:
        self.calls: list[list[Trace]] = []

    def compress(self, traces: Sequence[Trace], step: int) -> list[CompressedTrace]:
        self.calls.append(list(traces))
        return [
            CompressedTrace(f"short {trace.text.splitlines()[0]}", "cut", 1) for trace in traces
        ]
