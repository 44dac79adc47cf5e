"""The longest prompts for which the decoding cache must have room."""

from __future__ import annotations

import pytest

from zppo_mm.config.load import load_config
from zppo_mm.run.shared import longest_prompt, longest_teacher_prompt

LIMITS = (
    "data.max_prompt_tokens=100",
    "rollout.max_response_tokens=200",
    "rollout.num_rollouts=8",
    "teacher.max_response_tokens=300",
    "teacher.compression_max_tokens=10",
    "teacher.compressor=teacher",
)


@pytest.mark.parametrize(
    ("method", "changes", "student", "teacher"),
    [
        ("grpo", (), 100, 100),
        ("bcq", (), 100 + 2 * 10, 300),
        ("zppo", (), 100 + 8 * 10, 300),
        ("zppo", ("teacher.compressor=rule",), 100 + 8 * 10, 100),
        ("zppo", ("data.max_prompt_tokens=500",), 500 + 8 * 10, 500),
        ("ncq", ("rollout.max_response_tokens=400",), 100 + 8 * 10, 400),
        ("hint", (), 100 + 10, 300),
        # 0.4 of the teacher's longest response is continued.
        ("prefix", (), 100 + 120, 100),
        ("prefix", ("fallback_teachers=[{model: b, max_response_tokens: 500}]",), 100 + 200, 100),
    ],
)
def test_longest_prompts(method: str, changes: tuple[str, ...], student: int, teacher: int) -> None:
    config = load_config(None, [f"method={method}", *LIMITS, *changes])
    assert longest_prompt(config) == student
    assert longest_teacher_prompt(config) == teacher
