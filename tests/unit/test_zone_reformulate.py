"""BCQ and NCQ prompts: eligibility, caps, order, what is shown, and how."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from tests.support.zone_builders import CountingCompressor, group, question, rollout
from zppo_mm.config.schema import ZoneConfig
from zppo_mm.experience import Rollout
from zppo_mm.teacher.teacher import Hint, Trace
from zppo_mm.zone.prompts import load_templates
from zppo_mm.zone.reformulate import Composition, Reformulation, Reformulator, composition

RIGHT = (
    rollout("wrong try", "7", 0.0),
    rollout("teacher A", "42", 1.0),
    rollout("teacher B", "42", 1.0),
)


def make(zone: ZoneConfig | None = None) -> tuple[Reformulator, CountingCompressor]:
    compressor = CountingCompressor()
    return Reformulator(load_templates(), zone or ZoneConfig(), 0, compressor), compressor


def kinds(result: Reformulation) -> list[str]:
    return [f"{instance.question.id}:{instance.kind}" for instance in result.instances]


def test_bcq_then_ncq_of_each_question_ascending_within_the_cap() -> None:
    hard = [group("mid", [1, 0, 0, 0]), group("low", [0, 0, 0, 0]), group("high", [1, 0, 1, 0, 0])]
    answers = {g.question.id: RIGHT for g in hard}
    reformulator, compressor = make(ZoneConfig(rho_aug=0.25))
    assert kinds(reformulator.reformulate(hard, answers, 3, 16)) == [
        "low:bcq",
        "low:ncq",
        "mid:bcq",
        "mid:ncq",
    ]
    # With one slot left for a question that has both, BCQ stays.
    assert kinds(reformulator.reformulate(hard, answers, 3, 12)) == [
        "low:bcq",
        "low:ncq",
        "mid:bcq",
    ]
    assert kinds(reformulator.reformulate(hard, answers, 3, 3)) == []
    assert [len(call) for call in compressor.calls] == [
        2 + 4 + 2 + 3,
        2 + 4 + 2,
    ]  # one call each, nothing beyond the cap


def test_what_the_pre_cap_cut_does_not_come_back() -> None:
    """Three slots, four hard questions: the fourth is cut before, although the third slot alone
    would be free for it.
    """
    hard = [
        group(name, [1] * right + [0] * (8 - right))
        for name, right in [("a", 0), ("b", 1), ("c", 2), ("d", 3)]
    ]
    reformulator, _ = make(ZoneConfig(rho_aug=0.5, ncq=False))
    result = reformulator.reformulate(hard, {"a": RIGHT, "d": RIGHT}, 0, 6)
    assert kinds(result) == ["a:bcq"]
    assert result.num_kept == 3


def test_eligibility_and_switches() -> None:
    hard = [
        group("solved", [0, 0, 0]),
        group("unsolved", [1, 0, 0]),
        group("missing", [1, 0, 0, 1, 0]),
    ]
    answers: dict[str, tuple[Rollout, ...]] = {"solved": RIGHT, "unsolved": RIGHT[:1]}
    for zone, expected in [
        (ZoneConfig(rho_aug=1), ["solved:bcq", "solved:ncq", "unsolved:ncq", "missing:ncq"]),
        (ZoneConfig(rho_aug=1, ncq=False), ["solved:bcq"]),
        (ZoneConfig(rho_aug=1, bcq=False), ["solved:ncq", "unsolved:ncq", "missing:ncq"]),
        (ZoneConfig(rho_aug=1, bcq=False, ncq=False), []),
    ]:
        assert kinds(make(zone)[0].reformulate(hard, answers, 0, 10)) == expected
    groups = [*hard, group("easy", [1, 1, 0]), group("x", [0], "bcq")]
    assert composition(groups, answers, 0.5) == Composition(
        num_easy=1, num_hard=3, num_bcq_eligible=1, num_ncq_eligible=3
    )


def test_bcq_shows_one_right_and_one_wrong_in_either_order_with_every_pick() -> None:
    hard = [group("q", [0, 0, 0, 1, 0, 0, 0, 0])]
    reformulator, _ = make(ZoneConfig(ncq=False))
    seen: Counter[str] = Counter()
    for step in range(300):
        (instance,) = reformulator.reformulate(hard, {"q": RIGHT}, step, 4).instances
        assert sorted((c.source, c.correct) for c in instance.candidates) == [
            ("student", False),
            ("teacher", True),
        ]
        assert instance.uid == f"{step}/bcq/q"
        assert instance.question == hard[0].question
        seen.update(c.text for c in instance.candidates)
        seen["teacher first"] += instance.candidates[0].source == "teacher"
        assert instance.text.index(instance.candidates[0].text) < instance.text.index(
            instance.candidates[1].text
        )
    assert 110 < seen["teacher first"] < 190  # 150 expected, deviation 8.7
    assert 110 < seen["short teacher A"] < 190
    assert "short wrong try" not in seen
    assert sum(text.startswith("short work q") for text in seen) == 7
    again = make(ZoneConfig(ncq=False))[0].reformulate(hard, {"q": RIGHT}, 299, 4)
    assert again.instances == (instance,)


def test_ncq_lists_distinct_answers_and_every_wrong_rollout_and_no_teacher() -> None:
    base = group("q", [0])
    texts = [
        ("one", "7", 0.0),
        ("two", None, 0.0),
        ("three", " 7", 0.0),
        ("four", "42", 1.0),
        ("five", "9", 0.0),
    ]
    hard = [type(base)(base.instance, base.prompt, tuple(rollout(*text) for text in texts))]
    (_, ncq) = make(ZoneConfig(rho_aug=1))[0].reformulate(hard, {"q": RIGHT}, 0, 4).instances
    assert [(c.text, c.source, c.correct, c.answer) for c in ncq.candidates] == [
        ("short one", "student", False, "7"),
        ("short two", "student", False, None),
        ("short three", "student", False, " 7"),
        ("short five", "student", False, "9"),
    ]
    assert r"Wrong final answers: \boxed{7}, \boxed{9}" in ncq.text
    assert "teacher" not in ncq.text
    assert "four" not in ncq.text
    assert ncq.text.count("<candidate>\n") == ncq.text.count("\n</candidate>") == 4


def test_the_closing_instruction_ends_every_prompt() -> None:
    templates = load_templates()
    plain = templates.plain_text(question("q", ["red", "blue"]))
    assert plain == f"What is q?\nA. red\nB. blue\n{templates.closing}"
    hard = [group("q", [0, 0])]
    for instance in make(ZoneConfig(rho_aug=1))[0].reformulate(hard, {"q": RIGHT}, 0, 4).instances:
        assert instance.text.startswith("What is q?")
        assert instance.text.endswith(f"\n{templates.closing}")
        assert instance.text.count(templates.closing) == 1
    assert r"\boxed{}" in templates.closing
    assert "<think>" in templates.closing


def test_a_question_met_twice_is_reformulated_once() -> None:
    hard = [group("q", [1, 0, 0]), group("q", [0, 0, 0], "replayed")]
    result = make(ZoneConfig(rho_aug=1))[0].reformulate(hard, {}, 0, 8)
    assert kinds(result) == ["q:ncq"]
    assert len(result.instances[0].candidates) == 3
    assert (result.num_candidates, result.num_compression_rejects, result.num_compression_cuts) == (
        3,
        3,
        3,
    )


@given(
    asked=st.lists(
        st.tuples(st.lists(st.integers(0, 1), min_size=2, max_size=4), st.booleans()),
        min_size=1,
        max_size=12,
    ),
    num_new=st.integers(0, 24),
    rho_aug=st.sampled_from([0.25, 0.5, 1.0]),
    switches=st.sampled_from([(True, True), (True, False), (False, True)]),
)
def test_what_is_asked_while_the_teacher_answers_changes_nothing(
    asked: list[tuple[list[int], bool]], num_new: int, rho_aug: float, switches: tuple[bool, bool]
) -> None:
    hard = [
        g
        for g in (group(f"q{i}", rewards) for i, (rewards, _) in enumerate(asked))
        if g.accuracy < 0.5
    ]
    answers = {f"q{i}": RIGHT if solved else RIGHT[:1] for i, (_, solved) in enumerate(asked)}
    zone = ZoneConfig(rho_aug=rho_aug, bcq=switches[0], ncq=switches[1])
    whole = make(zone)[0].reformulate(hard, answers, 5, num_new)
    reformulator, compressor = make(zone)
    early = reformulator.reformulate(hard, {}, 5, num_new, None, answers.keys())
    assert {instance.kind for instance in early.instances} <= {"ncq"}
    assert reformulator.reformulate(hard, answers, 5, num_new, early) == whole
    assert {instance.uid for instance in early.instances} <= {
        instance.uid for instance in whole.instances
    }
    assert sum(map(len, compressor.calls)) == whole.num_candidates  # nothing is compressed twice


def test_all_ncq_prompts_stand_if_every_question_has_both() -> None:
    hard = [group(name, [0, 0]) for name in "abcdef"]
    reformulator, _ = make(ZoneConfig(rho_aug=1.0))
    for num_new in range(8):
        whole = reformulator.reformulate(hard, dict.fromkeys("abcdef", RIGHT), 0, num_new)
        early = [
            instance.uid
            for instance in reformulator.reformulate(hard, {}, 0, num_new, None, "abcdef").instances
        ]
        assert early == [instance.uid for instance in whole.instances if instance.kind == "ncq"]


def test_answers_that_can_change_nothing_are_not_awaited() -> None:
    hard = [group(name, [0, 0]) for name in "abcdef"]
    both, bcq = make(ZoneConfig(rho_aug=1.0))[0], make(ZoneConfig(rho_aug=1.0, ncq=False))[0]
    order = [
        name[0] for name in kinds(both.reformulate(hard, {}, 0, 6))
    ]  # NCQ prompts of all, as the draw of the pre-cap has them
    # Four prompts: with the answer to the first question known, two are its own, and at most two
    # questions come after it.
    first = {order[0]: RIGHT}
    assert both.reformulate(hard, first, 0, 4, None, order[1:]).awaited == tuple(order[1:3])
    assert both.reformulate(hard, {}, 0, 4, None, order).awaited == tuple(order[:4])
    # Without NCQ every question that the pre-cap keeps may have a prompt, until enough have one.
    assert bcq.reformulate(hard, first, 0, 2, None, order[1:]).awaited == (order[1],)
    assert (
        bcq.reformulate(hard, dict.fromkeys(order[:2], RIGHT), 0, 2, None, order[2:]).awaited == ()
    )
    assert bcq.reformulate(
        hard, dict.fromkeys(order[:2], RIGHT[:1]), 0, 4, None, order[2:]
    ).awaited == tuple(order[2:4])
    # Nothing is made of answers here.
    assert (
        make(ZoneConfig(rho_aug=1.0, bcq=False))[0].reformulate(hard, {}, 0, 6, None, order).awaited
        == ()
    )


class NumberedHints:
    """Hints that name the response they were made of; none for "teacher B"."""

    def write(self, traces: Sequence[Trace], step: int) -> list[Hint]:
        return [
            Hint(None if trace.text == "teacher B" else f"hint of {trace.text}", rejects=1)
            for trace in traces
        ]


def student_ids(answer: Rollout) -> list[int]:
    return list(range(10))


def make_all(zone: ZoneConfig) -> Reformulator:
    return Reformulator(
        load_templates(),
        zone,
        0,
        CountingCompressor(),
        hints=NumberedHints(),
        student_ids=student_ids,
    )


def test_all_kinds_of_one_question_share_the_cap_in_their_order() -> None:
    hard = [group("low", [0, 0]), group("mid", [1, 0, 0])]
    answers = {"low": RIGHT[:2], "mid": RIGHT[:2]}
    zone = ZoneConfig(rho_aug=0.5, hint=True, prefix=True)
    assert kinds(make_all(zone).reformulate(hard, answers, 3, 12)) == [
        *("low:bcq", "low:ncq", "low:hint", "low:prefix"),
        *("mid:bcq", "mid:ncq"),
    ]


def test_hint_prompts_show_a_hint_of_a_right_response_and_are_missing_without_one() -> None:
    zone = ZoneConfig(rho_aug=1, bcq=False, ncq=False, hint=True)
    hard = [group("good", [0, 0]), group("bad", [0, 0]), group("unsolved", [0, 0])]
    result = make_all(zone).reformulate(
        hard, {"good": RIGHT[1:2], "bad": RIGHT[2:], "unsolved": RIGHT[:1]}, 1, 10
    )
    assert kinds(result) == ["good:hint"]
    (instance,) = result.instances
    assert "<hint>\nhint of teacher A\n</hint>" in instance.text
    assert instance.text.endswith(load_templates().closing)
    assert [(each.text, each.source, each.correct) for each in instance.candidates] == [
        ("hint of teacher A", "teacher", True)
    ]
    assert (result.num_hint_rejects, result.num_hint_failures, result.num_candidates) == (2, 1, 0)


def test_prefix_prompts_are_plain_with_the_first_part_of_a_right_response() -> None:
    zone = ZoneConfig(rho_aug=1, bcq=False, ncq=False, prefix=True)
    hard = [group("q", [0, 0]), group("unsolved", [0, 0])]
    (instance,) = (
        make_all(zone).reformulate(hard, {"q": RIGHT, "unsolved": RIGHT[:1]}, 1, 10).instances
    )
    assert instance.text == load_templates().plain_text(hard[0].question)
    assert instance.response_prefix == (0, 1, 2, 3)  # 40 % of ten tokens
    (short,) = (
        make_all(replace(zone, prefix_fraction=0.01))
        .reformulate(hard[:1], {"q": RIGHT}, 1, 10)
        .instances
    )
    assert short.response_prefix == (0,)


@given(
    st.integers(0, 12),
    st.tuples(*[st.booleans()] * 4),
    st.lists(st.tuples(st.booleans(), st.booleans(), st.integers(0, 1)), max_size=8),
)
def test_prompts_that_stand_are_in_the_step_whatever_is_answered_later(
    limit: int, switches: tuple[bool, bool, bool, bool], fates: list[tuple[bool, bool, int]]
) -> None:
    bcq, ncq, hint, prefix = switches
    zone = ZoneConfig(rho_aug=1.0, bcq=bcq, ncq=ncq, hint=hint, prefix=prefix)
    hard = [group(f"q{index}", [0, 0, right]) for index, (_, _, right) in enumerate(fates)]
    answers = {
        each.question.id: RIGHT[1:] if fate[0] else RIGHT[:1]
        for each, fate in zip(hard, fates, strict=True)
    }
    so_far = {
        each.question.id: answers[each.question.id]
        for each, fate in zip(hard, fates, strict=True)
        if fate[1]
    }
    reformulator = make_all(zone)
    first = reformulator.reformulate(hard, {}, 1, limit, None, answers.keys())
    second = reformulator.reformulate(hard, so_far, 1, limit, first, answers.keys() - so_far.keys())
    result = reformulator.reformulate(hard, answers, 1, limit, second)
    whole = make_all(zone).reformulate(hard, answers, 1, limit)
    assert {instance.kind for instance in first.instances} <= {"ncq"}
    assert set(kinds(first)) <= set(kinds(second)) <= set(kinds(result))
    assert len(result.instances) + result.num_hint_failures <= limit
    assert kinds(result) == kinds(whole)
    # What is not awaited makes no difference, be it answered well or not at all.
    for late in (RIGHT[1:], ()):
        others = {
            question_id: late
            for question_id in answers
            if question_id not in {*second.awaited, *so_far}
        }
        assert kinds(make_all(zone).reformulate(hard, answers | others, 1, limit)) == kinds(whole)
    if not second.awaited:
        assert kinds(second) == kinds(whole)
