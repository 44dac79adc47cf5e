"""Which keys may change between two parts of a run."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from zppo_mm.config.load import load_config
from zppo_mm.errors import CheckpointError, ConfigError
from zppo_mm.run.resume import check_same_run
from zppo_mm.run_folder import RunFolder

TEACHER = "{endpoints: ['http://a/v1'], model: large}"
WHERE = RunFolder(Path("runs/one"))


def saved(*overrides: str) -> dict[str, Any]:
    return asdict(load_config(None, overrides))


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("teacher.max_concurrency=4", "teacher.max_concurrency=8"),
        (
            f"fallback_teachers=[{TEACHER}]",
            "fallback_teachers=[{endpoints: ['http://b/v1'], model: large, on_failure: ncq_only}]",
        ),
        ("train.train_iters=3", "train.train_iters=9"),
        # A copy of a run's folder is continued under another name.
        ("name=one", "name=two"),
    ],
)
def test_where_and_how_long_may_change(before: str, after: str) -> None:
    check_same_run(load_config(None, [after]), saved(before), WHERE)


@pytest.mark.parametrize(
    ("before", "after", "named"),
    [
        (
            f"fallback_teachers=[{TEACHER}]",
            "fallback_teachers=[{endpoints: ['http://a/v1'], model: small}]",
            "fallback_teachers.0.model",
        ),
        (
            f"fallback_teachers=[{TEACHER}]",
            "fallback_teachers=[]",
            "fallback_teachers.count was 1, is 0",
        ),
        ("data.train=[{path: x}]", "data.train=[{path: y}]", "data.train.0.path was 'x', is 'y'"),
        ("zone.tau=0.5", "zone.tau=0.4", "zone.tau was 0.5, is 0.4"),
    ],
)
def test_what_a_step_means_may_not(before: str, after: str, named: str) -> None:
    with pytest.raises(CheckpointError, match=named):
        check_same_run(load_config(None, [after]), saved(before), WHERE)


def test_a_checkpoint_that_is_older_than_a_key_was_made_with_its_default() -> None:
    older = saved("method=grpo")
    del older["algorithm"]["importance_cap"], older["zone"]["inject"], older["distill"]
    check_same_run(load_config(None, ["method=grpo"]), older, WHERE)
    for changed, named in (
        ("algorithm.importance_cap=2", "importance_cap was 0.0"),
        ("zone.inject=true", "zone.inject was False"),
    ):
        with pytest.raises(CheckpointError, match=named):
            check_same_run(load_config(None, ["method=grpo", changed]), older, WHERE)


@pytest.mark.parametrize(
    ("before", "after", "named", "changed"),
    [
        ("train.lr=1e-6", "train.lr=2e-6", "train.lr", "train.lr was 1e-06, is 2e-06"),
        # A section stands for its keys.
        ("rollout.top_p=1", "rollout.top_p=0.9", "rollout", "rollout.top_p was 1.0, is 0.9"),
        (
            f"fallback_teachers=[{TEACHER}]",
            "fallback_teachers=[]",
            "fallback_teachers",
            "fallback_teachers.count was 1, is 0",
        ),
    ],
)
def test_consent_is_for_the_keys_that_it_names(
    before: str, after: str, named: str, changed: str
) -> None:
    consent = load_config(None, [after, f"checkpoint.allow_changes=[{named}]"])
    assert [str(each) for each in check_same_run(consent, saved(before), WHERE)] == [changed]
    other = load_config(None, [after, "checkpoint.allow_changes=[algorithm]"])
    with pytest.raises(CheckpointError, match=changed):
        check_same_run(other, saved(before), WHERE)


def test_a_key_is_no_section_of_those_that_begin_like_it() -> None:
    after = ["train.lr_warmup_updates=3", "checkpoint.allow_changes=[train.lr]"]
    with pytest.raises(CheckpointError, match=r"train\.lr_warmup_updates was 0, is 3"):
        check_same_run(load_config(None, after), saved(), WHERE)


def test_the_refusal_says_how_to_go_on(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    other = load_config(None, ["train.lr=2e-6", "zone.tau=0.4"])
    start = f"start a new run from the trained weights: another name, model.student={folder.hf}"
    with pytest.raises(CheckpointError) as refused:
        check_same_run(other, saved(), folder)
    allow = "allow them with 'checkpoint.allow_changes=[zone.tau,train.lr]', or "
    export = f" after `python tools/convert_checkpoint.py export {tmp_path} {folder.hf}`"
    assert str(refused.value).endswith(allow + start + export)
    folder.hf.mkdir()
    with pytest.raises(CheckpointError) as refused:
        check_same_run(other, saved(), folder)
    assert str(refused.value).endswith(allow + start)
    # Where one of them cannot be allowed, the others are of no use.
    with pytest.raises(CheckpointError, match=r"seed was 0, is 1; .*zone.tau was") as refused:
        check_same_run(load_config(None, ["seed=1", "zone.tau=0.4"]), saved(), folder)
    assert "allow" not in str(refused.value)
    assert str(refused.value).endswith(start)


@pytest.mark.parametrize(
    ("before", "after", "named"),
    [
        (
            ["data.held_out=[{path: x}]"],
            ["data.held_out=[{path: y},{path: z}]", "train.lr=2"],
            "data.held_out,train.lr",
        ),
        (
            [f"fallback_teachers=[{TEACHER}]", "model.chat_template_kwargs={a: 1}"],
            ["fallback_teachers=[]", "model.chat_template_kwargs={b: 2}"],
            "model.chat_template_kwargs,fallback_teachers",
        ),
    ],
)
def test_what_the_refusal_says_works(before: list[str], after: list[str], named: str) -> None:
    with pytest.raises(CheckpointError) as refused:
        check_same_run(load_config(None, after), saved(*before), WHERE)
    advice = f"checkpoint.allow_changes=[{named}]"
    assert f"'{advice}'" in str(refused.value)
    assert check_same_run(load_config(None, [*after, advice]), saved(*before), WHERE)


def test_more_steps_need_consent_where_the_learning_rate_falls_until_the_last() -> None:
    falls = ("train.lr_decay_style=cosine", "train.updates_per_step=2", "train.train_iters=10")
    more = [*falls, "train.train_iters=20"]
    said = "train.lr_decay_updates was 20, is 40"
    with pytest.raises(CheckpointError, match=said):
        check_same_run(load_config(None, more), saved(*falls), WHERE)
    allow = "checkpoint.allow_changes=[train.lr_decay_updates]"
    [change] = check_same_run(load_config(None, [*more, allow]), saved(*falls), WHERE)
    assert str(change) == said
    # Written out, it is the same curve, with a tail at its end.
    same = load_config(None, [*more, "train.lr_decay_updates=20"])
    assert check_same_run(same, saved(*falls), WHERE) == ()


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ("learning_rate", "unknown key, got 'learning_rate', .*did you mean train.lr[?]"),
        ("train.l", "unknown key, got 'train.l'"),
        ("train.freeze", "a run keeps this key, got 'train.freeze'"),
        ("lora", "a run keeps this key, got 'lora'"),
    ],
)
def test_consent_for_nothing_is_refused(named: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"checkpoint.allow_changes: {message}"):
        load_config(None, [f"checkpoint.allow_changes=[{named}]"])
