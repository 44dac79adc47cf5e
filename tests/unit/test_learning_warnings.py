"""What a run that cannot learn says: cause and key, once per spell."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import pytest

from zppo_mm.config.load import load_config
from zppo_mm.observability.learning_warnings import NUM_STEPS, LearningWatch, warn_of_few_questions

CONFIG = load_config(None, ["rollout.max_response_tokens=64"])
GOOD = {
    "accuracy/plain": 0.4,
    "advantage/nontrivial_groups": 0.5,
    "batch/questions": 8.0,
    "policy/lr": 1e-6,
    "policy/updates": 2.0,
    "policy/skipped_updates": 0.0,
    "response/truncated": 0.2,
    "response/unparsed": 0.3,
    "rollout/failed_groups": 0.0,
}


def said(
    changes: Mapping[str, float | None], watch: LearningWatch | None = None, steps: int = NUM_STEPS
) -> list[str]:
    """Return what is said over some equal steps; `None` takes a metric away."""
    watch = watch or LearningWatch(CONFIG.rollout, CONFIG.distill)
    values = {name: value for name, value in {**GOOD, **changes}.items() if value is not None}
    return [text for _ in range(steps) for text in watch.find_new(values)]


def test_a_run_that_learns_says_nothing() -> None:
    assert said({}, steps=2 * NUM_STEPS) == []


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (
            {"advantage/nontrivial_groups": 0.0, "accuracy/plain": 0.0},
            "every response is wrong: take easier questions .data.train.",
        ),
        (
            {"advantage/nontrivial_groups": 0.0, "accuracy/plain": 1.0},
            "every response is right: take harder questions .data.train.",
        ),
        (
            {"advantage/nontrivial_groups": 0.0, "accuracy/plain": 0.5},
            "all alike: raise rollout.temperature",
        ),
        (
            {"advantage/nontrivial_groups": None, "accuracy/plain": 0.0},
            "all rewards of each group are equal",
        ),
        (
            {"response/truncated": 0.8},
            r"at least 80% in the last 3 steps.*rollout.max_response_tokens .now 64.",
        ),
        (
            {"response/unparsed": 0.9},
            "no boxed answer, though they end by themselves.*zone.templates",
        ),
        ({"rollout/failed_groups": 6.0}, "most prompts have no group.*reward.judge_endpoints"),
        (
            {"policy/updates": 0.0, "policy/skipped_updates": 2.0},
            "every update .* was skipped.*train.lr",
        ),
        ({"policy/lr": 0.0}, "the learning rate is 0"),
    ],
)
def test_each_cause_is_named_with_its_key_once(
    changes: dict[str, float | None], named: str
) -> None:
    watch = LearningWatch(CONFIG.rollout, CONFIG.distill)
    assert said(changes, watch, NUM_STEPS - 1) == []
    (text,) = said(changes, watch, 5)
    with pytest.raises(AssertionError, match=named):
        raise AssertionError(text)
    assert said({}, watch) == []
    assert len(said(changes, watch)) == 1  # a new spell


def test_a_cause_comes_before_what_follows_from_it() -> None:
    texts = said(
        {
            "response/truncated": 1.0,
            "response/unparsed": 1.0,
            "advantage/nontrivial_groups": 0.0,
            "accuracy/plain": 0.0,
        }
    )
    assert [text.split("learning: ")[1][:20] for text in texts] == [
        "most responses reach",
        "most responses have ",
        "all rewards of each ",
    ]
    assert "because they are cut off" in texts[1]


def test_distillation_does_not_need_different_rewards() -> None:
    config = load_config(None, ["method=on_distill"])
    watch = LearningWatch(config.rollout, config.distill)
    assert said({"advantage/nontrivial_groups": 0.0, "accuracy/plain": 0.0}, watch) == []


def test_a_watch_is_a_sink(caplog: pytest.LogCaptureFixture) -> None:
    watch = LearningWatch(CONFIG.rollout, CONFIG.distill)
    with caplog.at_level(logging.WARNING):
        for step in range(NUM_STEPS):
            watch.write(step, {**GOOD, "policy/lr": 0.0})
    watch.close()
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_fewer_questions_than_a_step_takes(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        warn_of_few_questions(CONFIG.train.num_new_questions, CONFIG.train.num_new_questions)
        assert caplog.records == []
        warn_of_few_questions(CONFIG.train.num_new_questions, CONFIG.train.num_new_questions - 1)
    assert "data.train" in caplog.text
    assert f"train.num_new_questions={CONFIG.train.num_new_questions}" in caplog.text
