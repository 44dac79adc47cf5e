"""tools/evaluate.py as a user starts it: one number on any layout, an interruption that costs
nothing, the numbers of a run.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from data.media.disk_cache import ENDING
from data.shard_writer import write_shards
from data.shards import ShardFolder
from data.toy.digits_shards import build_digit_shards, digit_samples
from tests.support.fault_proxy import PASS, stand_between
from tests.support.loopback_server import TinyModel, serve
from tests.support.running import CLONE, launcher, lines, run, run_python
from zppo_mm.bundled import TEACHER_DIR

STUDENT = CLONE / "zppo_mm" / "bundled" / "student"
NUM_PER_MODALITY = 6
SHORT = "rollout.max_response_tokens=64"


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return folders of held-out digit questions, text, image and video."""
    folder = tmp_path_factory.mktemp("digits")
    for modality in ("text", "image", "video"):
        build_digit_shards(folder / modality, modality, "held_out", NUM_PER_MODALITY, 0)
    return [str(folder / modality) for modality in ("text", "image", "video")]


def evaluate(*arguments: str, processes: int = 1, cwd: Path = CLONE) -> tuple[int, str]:
    """Return exit code and output of one evaluation."""
    tool = str(CLONE / "tools" / "evaluate.py")
    done = run_python(*launcher(processes), tool, *arguments, cwd=cwd)
    return done.returncode, done.stdout + done.stderr


def results(output: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((output / "results.json").read_text(encoding="utf-8"))
    return found


@pytest.fixture(scope="module")
def alone(shards: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Return the folder of an evaluation by one process, and what it said."""
    output = tmp_path_factory.mktemp("alone") / "out"
    code, said = evaluate(
        str(STUDENT), "--data", *shards, "--num-rollouts", "4", "--output", str(output), SHORT
    )
    assert code == 0, said
    return output, said


def test_every_response_is_written_and_the_numbers_follow_from_them(
    alone: tuple[Path, str],
) -> None:
    output, said = alone
    answers, found = lines(output / "answers.jsonl"), results(output)
    assert [each["index"] for each in answers] == list(range(3 * NUM_PER_MODALITY))
    assert [len(each["responses"]) for each in answers] == [4] * len(answers)
    assert [len(each["media"]) for each in answers] == [0] * NUM_PER_MODALITY + [
        1
    ] * 2 * NUM_PER_MODALITY
    right = [sum(response["reward"] for response in each["responses"]) for each in answers]
    assert found["overall"]["pass_at"]["1"]["value"] == pytest.approx(sum(right) / 4 / len(right))
    assert found["overall"]["pass_at"]["4"]["value"] == pytest.approx(
        sum(count > 0 for count in right) / len(right)
    )
    assert 0 < sum(right) < 4 * len(right)
    assert set(found["by_modality"]) == {"text", "image", "video"}
    assert found["settings"]["sampling"]["presence_penalty"] == 1.5
    assert "pass@4 [95 %]" in said
    assert "modality video" in said


@pytest.mark.parametrize(
    "layout",
    [(), ("parallel.tensor_model_parallel_size=2",), ("parallel.pipeline_model_parallel_size=2",)],
)
def test_two_ranks_give_the_same_answers(
    alone: tuple[Path, str], shards: list[str], tmp_path: Path, layout: tuple[str, ...]
) -> None:
    words = [
        "--data",
        *shards,
        "--num-rollouts",
        "4",
        "--output",
        str(tmp_path),
        "--questions-per-chunk",
        "7",
        SHORT,
        f"data.video_cache_dir={tmp_path / 'frames'}",
        *layout,
    ]
    code, said = evaluate(str(STUDENT), *words, processes=2)
    assert code == 0, said
    assert lines(tmp_path / "answers.jsonl") == lines(alone[0] / "answers.jsonl")
    assert results(tmp_path)["overall"] == results(alone[0])["overall"]
    # Each clip once, whichever rank shows it.
    assert len(list((tmp_path / "frames").glob(f"*{ENDING}"))) == NUM_PER_MODALITY


def test_an_interrupted_evaluation_goes_on_and_refuses_other_settings(
    alone: tuple[Path, str], shards: list[str], tmp_path: Path
) -> None:
    words = ["--data", *shards, "--num-rollouts", "4", "--output", str(tmp_path), SHORT]
    whole = lines(alone[0] / "answers.jsonl")
    # What an evaluation leaves that was killed after its first chunk; a mark shows that these
    # answers are not sampled again.
    (tmp_path / "settings.json").write_bytes((alone[0] / "settings.json").read_bytes())
    (tmp_path / "answers").mkdir()
    marked = [{**each, "prompt": "kept"} for each in whole[:5]]
    (tmp_path / "answers" / "part_00000001.jsonl").write_text(
        "".join(json.dumps(each) + "\n" for each in marked)
    )
    code, said = evaluate(str(STUDENT), *words, "evaluation.temperature=1.0")
    assert code == 1
    assert "sampling.temperature was 0.6, is 1.0" in said
    code, said = evaluate(str(STUDENT), *words)
    assert code == 0, said
    assert "5 of 18 questions are answered already" in said
    assert lines(tmp_path / "answers.jsonl") == marked + whole[5:]
    assert not (tmp_path / "answers").exists()


def test_a_finished_run_is_evaluated_as_it_evaluated_itself(tmp_path: Path) -> None:
    own = (
        "evaluation.num_questions=20",
        "evaluation.num_rollouts=3",
        "evaluation.temperature=0.8",
        "rollout.max_response_tokens=40",
    )
    folder = run(tmp_path, "own", "modality=mixed", "train.train_iters=1", "train.lr=3e-4", *own)
    code, said = evaluate(str(folder), "--output", str(tmp_path / "out"), f"output_dir={tmp_path}")
    assert code == 0, said
    found, during = results(tmp_path / "out"), lines(folder / "evaluation.jsonl")[-1]
    assert during["step"] == 1
    assert 0 < during["accuracy"] < 1
    assert found["overall"]["pass_at"]["1"]["value"] == pytest.approx(during["accuracy"], rel=1e-12)
    assert {
        name: part["pass_at"]["1"]["value"] for name, part in found["by_source"].items()
    } == pytest.approx(during["accuracy_by_source"])
    assert (found["num_questions"], found["num_skipped"]) == (
        during["num_questions"],
        during["num_skipped"],
    )
    assert found["overall"]["truncated"] == pytest.approx(during["truncated"])


def test_a_benchmark_file_is_converted_once_and_what_cannot_be_asked_is_counted(
    shards: list[str], tmp_path: Path
) -> None:
    source = ShardFolder(shards[1])
    rows = []
    for number, (shard, key) in enumerate(list(source.keys())):
        question = source.question(shard, key)
        (tmp_path / f"{number}.png").write_bytes(source.media_bytes(question.media[0]))
        rows.append(
            {
                "query": question.text,
                "label": question.answer,
                "opts": list(question.choices),
                "picture": f"{number}.png",
            }
        )
    rows[1]["picture"] = "gone.png"
    rows[2] |= {"opts": [], "type": "open"}
    kind = {"type": "math"}
    rows = [{**kind, **row, **({"type": "choice"} if row["opts"] else {})} for row in rows]
    (tmp_path / "own.json").write_text(json.dumps([*rows, {**rows[0], "label": "?"}]))
    (tmp_path / "4.png").write_bytes(b"no picture")
    fields = [
        "--fields",
        "question=query",
        "answer=label",
        "choices=opts",
        "image=picture",
        "answer_type=type",
    ]
    words = [
        "--data",
        str(tmp_path / "own.json"),
        *fields,
        "--output",
        str(tmp_path / "out"),
        f"output_dir={tmp_path}",
        SHORT,
    ]
    code, said = evaluate(str(STUDENT), *words, processes=2)
    assert code == 0, said
    found = results(tmp_path / "out")
    assert found["skipped"] == {
        "missing_media": 1,
        "no_answer": 1,
        "needs_judge": 1,
        "unsupported_container": 1,
    }
    assert (found["num_questions"], found["skipped_fraction"]) == (3, 4 / 7)
    assert [each["skipped"] for each in lines(tmp_path / "out" / "answers.jsonl")] == [
        "",
        "",
        "unsupported_container",
        "",
    ]
    assert (
        "skipped 4 (57.1%): missing_media 1, needs_judge 1, no_answer 1, unsupported_container 1"
        in said
    )
    again, said = evaluate(str(STUDENT), *words)
    assert again == 0, said
    assert "converting" not in said
    assert results(tmp_path / "out") == found


def test_open_questions_are_asked_again_when_the_judge_is_back(tmp_path: Path) -> None:
    samples = digit_samples("text", "held_out", 6, 0)
    open_ones = [
        replace(sample, question={**sample.question, "answer_type": "open", "choices": []})
        for sample in samples
    ]
    write_shards(tmp_path / "open", open_ones)
    words = [
        "--data",
        str(tmp_path / "open"),
        "--num-rollouts",
        "2",
        "--output",
        str(tmp_path / "out"),
        SHORT,
    ]
    words += ["teacher.model=tiny", "teacher.num_retries=0", "reward.judge_max_tokens=4"]
    with serve(TinyModel(TEACHER_DIR)) as server:
        with stand_between(server.url, lambda number: PASS if number == 0 else "500") as proxy:
            code, said = evaluate(str(STUDENT), *words, f"teacher.endpoints=[{proxy.url}]")
        assert code == 0, said
        assert "judge_failures 12" in said
        assert results(tmp_path / "out")["skipped"] == {"ungraded": 6}
        code, said = evaluate(str(STUDENT), *words, f"teacher.endpoints=[{server.url}]")
    assert code == 0, said
    found = results(tmp_path / "out")
    assert (found["num_questions"], found["num_skipped"], found["overall"]["num_responses"]) == (
        6,
        0,
        12,
    )
    assert list(found["by_answer_type"]) == ["open"]
    # The tiny model knows no JSON, and what is no verdict counts as wrong.
    assert found["overall"]["pass_at"]["2"]["value"] == 0


def test_a_suite_evaluates_what_lies_on_disk_and_lists_what_does_not(tmp_path: Path) -> None:
    declared, data, before = tmp_path / "declared", tmp_path / "data", tmp_path / "before"
    for folder in (declared, before):
        folder.mkdir()
    declaration = "family: text\nfiles: ['*.jsonl']\ncolumns: {question: question, answer: answer}"
    rows = [{"question": f"{number} + 1?", "answer": str(number + 1)} for number in range(3)]
    scorings = {"sums": "rules", "names": "anls", "gone": "rules", "open": "judge"}
    for name, scoring in scorings.items():
        text = f"title: {name}\nscoring: {scoring}\n{declaration}\n"
        (declared / f"{name}.yaml").write_text(text)
        (data / name).mkdir(parents=True)
        if name != "gone":
            lines_of_rows = "".join(json.dumps(row) + "\n" for row in rows)
            (data / name / "rows.jsonl").write_text(lines_of_rows)
    known = {"title": "sums", "family": "text", "num_questions": 3, "skipped_fraction": 0.0}
    known |= {"value": -1.0, "in_paper": False}
    (before / "suite.json").write_text(json.dumps({"scores": {"sums": known}}))
    words = [str(STUDENT), "--suite", str(declared), "--data", str(data), SHORT]
    words += ["--output", str(tmp_path / "out"), f"output_dir={tmp_path}"]
    code, said = evaluate(*words, "--baseline", str(before))
    assert code == 0, said
    found = json.loads((tmp_path / "out" / "suite.json").read_text(encoding="utf-8"))
    assert list(found["scores"]) == ["names", "sums"]
    assert list(found["missing"]) == ["gone"]
    assert found["left_out"] == {"open": "needs a judge"}
    names, sums = (results(tmp_path / "out" / name) for name in ("names", "sums"))
    assert found["scores"]["names"]["value"] == names["overall"]["reward"]
    assert found["scores"]["sums"]["value"] == sums["overall"]["pass_at"]["1"]["value"]
    assert found["gains"] == {"sums": found["scores"]["sums"]["value"] + 1}
    assert list(names["by_answer_type"]) == ["anls"]
    assert "text: 2 of 4" in said
