"""The audit of transcripts: counts by hand, agreement with the metrics of the run itself, and kinds
that it does not know.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import pytest

from tests.support.simulated_run import make_group, make_question, make_rollout, simulate_run
from tests.support.tools import load_tool
from zppo_mm.comparison.transcript_audit import (
    ROWS,
    Lengths,
    Proportion,
    TranscriptAudit,
    as_json,
    audit_run,
    audit_table,
    faithfulness,
)
from zppo_mm.errors import ConfigError
from zppo_mm.experience import Candidate, Group, GroupKind, Rollout
from zppo_mm.observability.transcripts import write_transcript
from zppo_mm.report.run_record import read_run
from zppo_mm.run_folder import RunFolder

ROOT = Path(__file__).parents[2]
NUM_STEPS = 12


def candidate(answer: str | None, correct: bool, text: str | None = None) -> Candidate:
    return Candidate(
        f"\\boxed{{{answer}}}" if text is None else text,
        "teacher" if correct else "student",
        correct,
        answer,
    )


def rollouts(answers: Sequence[str | None], right: str) -> list[Rollout]:
    return [make_rollout(answer, float(answer == right)) for answer in answers]


def audit(tmp_path: Path, *groups: Group) -> TranscriptAudit:
    write_transcript(RunFolder(tmp_path), 1, groups, {}, {})
    return audit_run(tmp_path)


def test_bcq_by_hand(tmp_path: Path) -> None:
    one, two = make_question(1), make_question(2)
    right_first = (candidate("7", True, "a long way to \\boxed{7}"), candidate("8", False))
    wrong_first = (candidate("5", False), candidate("6", True))
    found = audit(
        tmp_path,
        make_group(one, "new", rollouts(["7", "9", "9", "9"], "7")),
        make_group(two, "replayed", rollouts(["5", "5", None, "5"], "6")),
        make_group(make_question(3), "new", rollouts(["1", "1", "1", "1"], "1")),
        make_group(one, "bcq", rollouts([" 7. ", "7", "8", "3"], "7"), candidates=right_first),
        make_group(two, "bcq", rollouts(["5", "6", "5", None], "6"), candidates=wrong_first),
    )
    assert found.groups == {"bcq": 2, "new": 2, "replayed": 1}
    # " 7. " equals the right candidate's answer, though this reward says that it is wrong.
    assert (found.bcq_right, found.bcq_wrong, found.bcq_neither, found.bcq_none) == (
        Proportion(3, 8),
        Proportion(3, 8),
        Proportion(1, 8),
        Proportion(1, 8),
    )
    # Plain rollouts of the two questions asked with candidates: 1 of 4 and 0 of 4; the third
    # question is not among them.
    assert (found.bcq_accuracy, found.bcq_plain_accuracy) == (Proportion(2, 8), Proportion(1, 8))
    # First candidate: " 7. ", 7 and 5, 5; second: 8 and 6.
    assert found.first == Proportion(4, 6)
    assert (found.right_first, found.right_second) == (Proportion(1, 4), Proportion(1, 4))
    # 23 and 9 characters; 9 and 9 are of equal length and in neither count.
    assert (found.right_longer, found.right_length, found.wrong_length) == (
        Proportion(1, 1),
        Lengths(16.0, 16.0),
        Lengths(9.0, 9.0),
    )


def test_ncq_by_hand(tmp_path: Path) -> None:
    question = make_question(1)
    listed = (candidate("8", False), candidate("9", False), candidate(None, False, "so it is"))
    found = audit(
        tmp_path,
        make_group(question, "new", rollouts(["8", "9", "8", None], "7")),
        make_group(question, "ncq", rollouts(["8", "7", "3", None], "7"), candidates=listed),
    )
    assert (found.ncq_listed, found.ncq_other, found.ncq_none) == (
        Proportion(1, 4),
        Proportion(2, 4),
        Proportion(1, 4),
    )
    assert (found.ncq_accuracy, found.ncq_plain_accuracy) == (Proportion(1, 4), Proportion(0, 4))
    assert (found.kept, found.changed, found.lost) == (
        Proportion(3, 3),
        Proportion(0, 3),
        Proportion(0, 3),
    )


@pytest.mark.parametrize(
    ("text", "answer", "expected"),
    [
        ("so \\boxed{0.5}", "1/2", "kept"),  # as the grader compares
        ("so \\boxed{ the Cat }", "the cat", "kept"),
        ("so \\boxed{x+1}", "x+1", "kept"),
        ("\\boxed{3} no, \\boxed{4}", "3", "changed"),
        ("so \\boxed{4}", None, "changed"),
        ("so it is 4", "4", "lost"),
        ("so it is", None, "kept"),
    ],
)
def test_faithfulness(text: str, answer: str | None, expected: str) -> None:
    assert faithfulness({"text": text, "answer": answer}) == expected


def test_position_is_not_asked_of_equal_or_missing_answers(tmp_path: Path) -> None:
    question = make_question(1)
    found = audit(
        tmp_path,
        make_group(
            question,
            "bcq",
            rollouts(["7", "7"], "7"),
            candidates=(candidate("7", True), candidate("$7$", False)),
        ),
        make_group(
            question,
            "bcq",
            rollouts(["7", "8"], "7"),
            candidates=(candidate(None, False, "no"), candidate("7", True)),
        ),
    )
    assert found.first == Proportion(0, 0)


@pytest.mark.parametrize("kind", ["hint", "prefix", "inject", "teacher"])
def test_other_kinds_are_counted_and_nothing_else(tmp_path: Path, kind: GroupKind) -> None:
    question = make_question(1)
    known = [
        make_group(question, "new", rollouts(["7", "9"], "7")),
        make_group(
            question,
            "bcq",
            rollouts(["7", "8"], "7"),
            candidates=(candidate("7", True), candidate("8", False)),
        ),
        make_group(question, "ncq", rollouts(["7", "8"], "7"), candidates=(candidate("9", False),)),
    ]
    before = as_json(audit(tmp_path, *known))
    other = make_group(
        question, kind, rollouts(["7", "8"], "7"), candidates=(candidate("8", True),)
    )
    after = as_json(audit(tmp_path, *known, other))
    assert after.pop("groups") == {**before.pop("groups"), kind: 1}
    assert after == before


def test_ungraded_rollouts_are_left_out(tmp_path: Path) -> None:
    group = make_group(
        make_question(1),
        "bcq",
        rollouts(["7", "8"], "7"),
        candidates=(candidate("7", True), candidate("8", False)),
    )
    path = write_transcript(RunFolder(tmp_path), 1, [group], {}, {})
    record = json.loads(path.read_text())
    record["rollouts"][0]["reward"] = None
    path.write_text(json.dumps(record) + "\n")
    found = audit_run(tmp_path)
    assert (found.bcq_accuracy, found.bcq_right, found.bcq_wrong) == (
        Proportion(0, 1),
        Proportion(0, 1),
        Proportion(1, 1),
    )


def test_the_audit_agrees_with_the_metrics_of_the_run(tmp_path: Path) -> None:
    simulate_run(tmp_path, NUM_STEPS)
    run, met = read_run(tmp_path), 0
    for row in run.metrics:
        found = audit_run(tmp_path, row["step"], row["step"])
        for metric, fraction in (
            ("audit/bcq_right", found.bcq_right),
            ("audit/bcq_wrong", found.bcq_wrong),
            ("audit/ncq_listed", found.ncq_listed),
            ("accuracy/bcq", found.bcq_accuracy),
            ("accuracy/ncq", found.ncq_accuracy),
        ):
            met += fraction.total > 0
            assert (row.get(metric) is None) == (fraction.total == 0)
            assert fraction.total == 0 or row[metric] == pytest.approx(
                fraction.count / fraction.total
            )
    assert met > NUM_STEPS
    whole = audit_run(tmp_path)
    assert whole.num_steps == NUM_STEPS
    assert whole.bcq_right.total == sum(
        audit_run(tmp_path, step, step).bcq_right.total for step in range(1, NUM_STEPS + 1)
    )


def test_the_table_has_every_number(tmp_path: Path) -> None:
    simulate_run(tmp_path, 3)
    table = audit_table({"one": audit_run(tmp_path), "two": audit_run(tmp_path, 2)})
    assert table.header == ("", "one", "two")
    assert table.rows[0] == ("steps", "3", "2")
    names = [row[0] for row in table.rows]
    assert [text for text in ROWS.values() if text not in names] == []
    assert set(ROWS) | {"num_steps", "groups", "right_length", "wrong_length"} == set(
        TranscriptAudit.__slots__
    )


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    return load_tool("audit")


@pytest.mark.parametrize(
    ("text", "steps"), [("3-7", (3, 7)), ("3-", (3, None)), ("-7", (0, 7)), ("5", (5, 5))]
)
def test_ranges_of_steps(tool: ModuleType, text: str, steps: tuple[int, int | None]) -> None:
    assert tool.parse_steps(text) == steps


def test_errors(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError,
        match="nothing to audit, got no transcripts, expected transcripts of the steps asked for",
    ):
        audit_run(tmp_path)
    write_transcript(RunFolder(tmp_path), 4, [], {}, {})
    with pytest.raises(ConfigError, match="got steps 4 to 4"):
        audit_run(tmp_path, 5)
