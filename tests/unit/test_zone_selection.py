"""What a step trains on: injected teacher rollouts, teacher text alone, dynamic sampling."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from tests.support.zone_builders import group, rollout
from zppo_mm.config.schema import DistillConfig, ZoneConfig
from zppo_mm.experience import Group, Prompt, PromptInstance, Rollout
from zppo_mm.zone.selection import Selection, with_signal

RIGHT = (
    rollout("wrong try", "7", 0.0),
    rollout("teacher A", "42", 1.0),
    rollout("teacher B", "42", 1.0),
)
ZONE = ZoneConfig(bcq=False, ncq=False)


def student_ids(answer: Rollout) -> Sequence[int]:
    return [ord(letter) for letter in answer.text[-3:]]


def adopt(
    instances: Sequence[PromptInstance], rollouts: Sequence[tuple[Rollout, ...]]
) -> list[Group]:
    """Make groups, as a sampler would, but for one whose prompt it cannot make."""
    prompt = Prompt("text", np.arange(3), np.zeros((3, 3), np.int64), 3)
    pairs = zip(instances, rollouts, strict=True)
    return [
        Group(instance, prompt, group)
        for instance, group in pairs
        if instance.question.id != "unreadable"
    ]


def make(zone: ZoneConfig, source: str = "none") -> Selection:
    return Selection(
        zone,
        DistillConfig(source=source),
        0,
        student_ids=student_ids,
        adopt=adopt,
        plain_text=lambda question: f"plain {question.id}",
    )


def test_without_switches_everything_is_trained_on_as_sampled() -> None:
    groups = [group("a", [0, 0]), group("a", [1, 0], "bcq"), group("b", [1, 1])]
    assert make(ZONE).choose(groups, (), {"a": RIGHT}, 1).groups == tuple(groups)


def test_inject_replaces_one_wrong_rollout_of_hard_questions_by_a_right_one_of_the_teacher() -> (
    None
):
    hard, easy, unsolved = (
        group("hard", [0, 1, 0, 0, 0]),
        group("easy", [1, 0]),
        group("unsolved", [0, 0]),
    )
    selection = make(replace(ZONE, inject=True))
    chosen = selection.choose(
        [hard, easy, unsolved], (), {"hard": RIGHT, "easy": RIGHT, "unsolved": RIGHT[:1]}, 3
    )
    injected = chosen.groups[0]
    assert (injected.uid, injected.kind, injected.prompt, chosen.num_injected) == (
        "3/inject/new/hard",
        "inject",
        hard.prompt,
        1,
    )
    assert chosen.groups[1:] == (easy, unsolved)
    changed = [index for index in range(5) if injected.rollouts[index] is not hard.rollouts[index]]
    assert len(changed) == 1
    assert changed[0] != 1  # the right one stays
    taken = injected.rollouts[changed[0]]
    assert (taken.author, taken.reward, taken.response_ids.tolist()) == (
        "teacher",
        1.0,
        student_ids(taken),
    )
    assert taken.rollout_logprobs is None
    # The plain group, by which the buffer goes, is as it was.
    assert [each.author for each in hard.rollouts] == ["student"] * 5


def test_inject_draws_every_wrong_index_and_every_right_answer_and_the_same_on_every_rank() -> None:
    selection = make(replace(ZONE, inject=True))
    hard = [group("q", [0, 1, 0, 0, 0], step=step) for step in range(60)]
    seen: Counter[tuple[int, str]] = Counter()
    for each in hard:
        one, again = (selection.choose([each], (), {"q": RIGHT}, 1).groups[0] for _ in range(2))
        indices = [
            (index, rollout.text)
            for index, rollout in enumerate(one.rollouts)
            if rollout.author == "teacher"
        ]
        assert indices == [
            (index, rollout.text)
            for index, rollout in enumerate(again.rollouts)
            if rollout.author == "teacher"
        ]
        seen.update(indices)
    assert set(seen) == {
        (index, text) for index in (0, 2, 3, 4) for text in ("teacher A", "teacher B")
    }


def test_distillation_on_teacher_text_trains_on_its_right_answers_to_all_questions_alone() -> None:
    groups = [group("a", [1, 1]), group("b", [0, 0]), group("unreadable", [0, 0])]
    questions = [each.question for each in groups]
    chosen = make(replace(ZONE, inject=False), "teacher").choose(
        groups, questions, {"a": RIGHT, "b": RIGHT[:1], "unreadable": RIGHT}, 4
    )
    (taught,) = chosen.groups
    assert chosen.num_failed == 1  # the prompt of the unreadable question could not be made
    assert (taught.uid, taught.kind, taught.instance.text) == ("4/teacher/a", "teacher", "plain a")
    assert [(each.text, each.author) for each in taught.rollouts] == [
        ("teacher A", "teacher"),
        ("teacher B", "teacher"),
    ]


def test_dynamic_sampling_drops_a_question_only_if_all_its_groups_are_trivial() -> None:
    groups = [
        group("plain useful", [1, 0]),
        group("plain useful", [0, 0], "bcq"),
        group("reformulated useful", [0, 0]),
        group("reformulated useful", [0, 1], "ncq"),
        group("useless", [0, 0]),
        group("useless", [1, 1], "bcq"),
        group("easy", [1, 1]),
    ]
    chosen = make(replace(ZONE, max_sampling_rounds=2)).choose(groups, (), {}, 1)
    assert [each.question.id for each in chosen.groups] == [
        "plain useful",
        "plain useful",
        "reformulated useful",
        "reformulated useful",
    ]
    assert chosen.num_dropped_questions == 2
    assert with_signal(groups) == list(chosen.groups)
    assert make(ZONE).choose(groups, (), {}, 1).num_dropped_questions == 0
