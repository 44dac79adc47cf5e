"""The folder of an evaluation, and the numbers that its answers give."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from zppo_mm.errors import ConfigError
from zppo_mm.evaluation.answers import AnsweredQuestion, AnswerFolder, Response
from zppo_mm.evaluation.student import text_files_digest
from zppo_mm.evaluation.summary import summarise_answers, summary_table

SETTINGS = {"model": "m", "sampling": {"temperature": 0.6}, "data": [{"path": "a"}]}


def answered(
    index: int, rewards: list[float | None], skipped: str = "", **fields: str
) -> AnsweredQuestion:
    """Return a question; a response of reward 0 meets the length limit without an answer, and
    response i has i + 1 tokens.
    """
    responses = tuple(
        Response(
            f"t{row}",
            None if reward == 0 else "1",
            reward,
            "length" if reward == 0 else "stop",
            row + 1,
        )
        for row, reward in enumerate(rewards)
    )
    known = {"source": "s", "modality": "text", "answer_type": "math"} | fields
    return AnsweredQuestion(
        index=index,
        id=f"q{index}",
        prompt="p",
        media=[],
        answer="1",
        responses=responses,
        skipped=skipped,
        **known,
    )


def test_answers_come_back_in_order_from_chunks_and_from_the_end(tmp_path: Path) -> None:
    folder = AnswerFolder(tmp_path / "out")
    assert folder.open(SETTINGS) == []
    answers = [answered(index, [1.0, 0.0], source="\u2028 line") for index in range(5)]
    folder.add(answers[3:])
    folder.add(answers[:3])
    assert AnswerFolder(tmp_path / "out").open(SETTINGS) == [0, 1, 2, 3, 4]
    assert folder.read() == answers
    folder.finish(answers, {"n": 1})
    assert sorted(path.name for path in folder.folder.iterdir()) == [
        "answers.jsonl",
        "results.json",
        "settings.json",
    ]
    assert folder.read() == answers
    assert folder.open(SETTINGS) == [0, 1, 2, 3, 4]


def test_what_no_judge_graded_is_asked_again_and_its_new_answers_win(tmp_path: Path) -> None:
    folder = AnswerFolder(tmp_path)
    folder.open(SETTINGS)
    answers = [
        answered(0, [1.0]),
        answered(1, [1.0, None]),
        answered(2, [], "ungraded"),
        answered(3, [], "truncated"),
        answered(4, [], "no_room"),
    ]
    folder.add(answers)
    folder.finish(folder.read(), {})
    assert folder.open(SETTINGS) == [0, 3]
    again = [answered(1, [1.0, 1.0]), answered(2, [0.0])]
    folder.add(again)
    assert folder.read() == [answers[0], *again, *answers[3:]]


def test_a_chunk_of_a_second_start_takes_no_answers_of_the_first_away(tmp_path: Path) -> None:
    folder = AnswerFolder(tmp_path)
    folder.open(SETTINGS)
    folder.add([answered(0, [1.0]), answered(1, [None])])
    folder.add([answered(2, [None]), answered(3, [0.0]), answered(4, [None])])
    again = AnswerFolder(tmp_path)
    assert again.open(SETTINGS) == [0, 3]
    # The first new chunk begins before an old one that has question 2 ungraded, the second one with
    # an old one's first question.
    again.add([answered(1, [1.0]), answered(4, [0.0])])
    again.add([answered(2, [1.0]), answered(5, [1.0])])
    assert [each.graded[0].reward for each in again.read_complete(6)] == [
        1.0,
        1.0,
        1.0,
        0.0,
        0.0,
        1.0,
    ]
    again.finish(again.read(), {})
    assert AnswerFolder(tmp_path).open(SETTINGS) == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(("num_questions", "first"), [(1, 2), (2, 1), (4, 1)])
def test_an_evaluation_with_a_missing_or_a_foreign_answer_does_not_end(
    tmp_path: Path, num_questions: int, first: int
) -> None:
    folder = AnswerFolder(tmp_path)
    folder.open(SETTINGS)
    folder.add([answered(0, [1.0]), answered(2, [1.0])])
    with pytest.raises(
        ConfigError,
        match=(
            rf"got 2 answers, expected one to each of {num_questions} questions; .* index {first}; "
            rf"start"
        ),
    ):
        folder.read_complete(num_questions)


def test_a_file_that_was_not_finished_is_not_read(tmp_path: Path) -> None:
    folder = AnswerFolder(tmp_path)
    folder.open(SETTINGS)
    folder.add([answered(0, [1.0])])
    (tmp_path / "answers" / ".part_00000002.jsonl.tmp").write_text('{"ind')
    assert folder.open(SETTINGS) == [0]
    folder.finish(folder.read(), {})
    assert not (tmp_path / "answers").exists()


def test_a_changed_chat_template_or_tokenizer_is_another_model_and_a_copy_is_not(
    tmp_path: Path,
) -> None:
    names = (
        "chat_template.jinja",
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
        "preprocessor_config.json",
    )
    for name in (*names, "README.md"):
        (tmp_path / name).write_text("old", encoding="utf-8")
    before = text_files_digest(tmp_path)
    assert text_files_digest(shutil.copytree(tmp_path, tmp_path / "copy")) == before
    (tmp_path / "README.md").write_text("new", encoding="utf-8")
    assert text_files_digest(tmp_path) == before
    for name in names:
        (tmp_path / name).write_text("new", encoding="utf-8")
        assert text_files_digest(tmp_path) != before, name
        (tmp_path / name).write_text("old", encoding="utf-8")


def test_other_settings_are_named(tmp_path: Path) -> None:
    AnswerFolder(tmp_path).open(SETTINGS)
    other = {**SETTINGS, "sampling": {"temperature": 1.0}, "data": [{"path": "a"}, {"path": "b"}]}
    with pytest.raises(
        ConfigError,
        match=(
            r"data\.1\.path was None, is 'b'; sampling\.temperature was 0\.6, is 1\.0; go on with "
            r"the old"
        ),
    ):
        AnswerFolder(tmp_path).open(other)


def test_answers_of_unknown_settings_and_damaged_ones_are_refused(tmp_path: Path) -> None:
    (tmp_path / "answers.jsonl").write_text("")
    with pytest.raises(ConfigError, match=r"answers without settings, got no settings\.json"):
        AnswerFolder(tmp_path).open(SETTINGS)
    AnswerFolder(tmp_path / "b").open(SETTINGS)
    (tmp_path / "b" / "answers.jsonl").write_text('{"index": 0}\n')
    with pytest.raises(
        ConfigError, match=r"answers\.jsonl: a line is not readable .* remove the file"
    ):
        AnswerFolder(tmp_path / "b").open(SETTINGS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("caf", "caf\xe9"), "a line is not readable"),
        (("caf", "\\ud83d"), "a line is not readable .*invalid text"),
        (
            ('"index": 0', '"index": "0"'),
            r"a line has no index, got '0', expected a whole number; remove the file",
        ),
        (('"index": 0', '"index": 0, "index": 1'), "key 'index' is there twice"),
    ],
)
def test_a_damaged_line_is_named(tmp_path: Path, change: tuple[str, str], message: str) -> None:
    folder = AnswerFolder(tmp_path)
    folder.open(SETTINGS)
    folder.finish([AnsweredQuestion(0, "q", "s", "text", "math", "caf", [], "1")], {})
    path = tmp_path / "answers.jsonl"
    path.write_bytes(path.read_text().replace(*change).encode("latin-1"))
    with pytest.raises(ConfigError, match=message):
        folder.read()


def test_numbers_by_hand() -> None:
    answers = [
        answered(0, [1.0, 0.0, 0.0, 1.0], source="a", modality="image"),
        answered(1, [0.0, 0.0, 0.0, 0.0], source="a", modality="video"),
        answered(2, [1.0, 1.0, None, None], source="b", modality="video", answer_type="open"),
        answered(3, [], "oversized", source="b"),
    ]
    summary = summarise_answers(
        answers, {"bad_json": 2, "oversized": 1}, seed=0, max_prompt_tokens=100
    )
    overall = summary.overall
    # pass@1 = (2/4 + 0 + 2/2) / 3; pass@2 = (1 - C(2,2)/C(4,2) + 0 + 1) / 3 = (5/6 + 1) / 3; pass@4
    # has the first two: (1 + 0) / 2.
    assert {k: (each.value, each.num_questions) for k, each in overall.pass_at.items()} == {
        1: (pytest.approx(0.5), 3),
        2: (pytest.approx(11 / 18), 3),
        4: (0.5, 2),
    }
    # 10 graded responses: 2 + 4 of the first two met the limit without an answer. Tokens 1+2+3+4,
    # twice, and 1+2.
    assert (overall.num_responses, overall.num_ungraded, overall.truncated, overall.unparsed) == (
        10,
        2,
        0.6,
        0.6,
    )
    assert overall.response_tokens == 2.3
    assert (summary.num_questions, summary.num_skipped, summary.skipped_fraction) == (
        3,
        4,
        pytest.approx(4 / 7),
    )
    assert summary.skipped == {"bad_json": 2, "oversized": 2}
    assert summary.num_too_long == 0
    assert {name: part.num_questions for name, part in summary.by_source.items()} == {
        "a": 2,
        "b": 1,
    }
    assert {name: part.pass_at[1].value for name, part in summary.by_modality.items()} == {
        "image": 0.5,
        "video": 0.5,
    }
    assert {name: part.num_questions for name, part in summary.by_answer_type.items()} == {
        "math": 2,
        "open": 1,
    }
    assert list(summary.by_source["b"].pass_at) == [1, 2]
    json.dumps(asdict(summary), allow_nan=False)
    longer = [replace(each, num_prompt_tokens=100 + each.index) for each in answers]
    summary = summarise_answers(longer, {}, seed=0, max_prompt_tokens=100)
    assert (summary.num_questions, summary.num_too_long) == (3, 2), "still answered"
    assert "longer than data.max_prompt_tokens: 2" in summary_table(summary)


def test_the_table_has_a_line_for_every_part_and_what_is_missing() -> None:
    lines = summary_table(
        summarise_answers(
            [answered(0, [1.0, None]), answered(1, [], "empty")], {}, seed=0, max_prompt_tokens=100
        )
    ).splitlines()
    assert [line.split("  ")[0] for line in lines[2:6]] == [
        "all",
        "source s",
        "modality text",
        "answer type math",
    ]
    assert "1.000 [1.000, 1.000]" in lines[2]
    assert lines[6:] == [
        "skipped 1 (50.0%): empty 1",
        "responses that could not be graded, left out: 1",
    ]
    assert (
        summary_table(
            summarise_answers([answered(0, [], "empty")], {}, seed=0, max_prompt_tokens=100)
        ).splitlines()[-1]
        == "skipped 1 (100.0%): empty 1"
    )
