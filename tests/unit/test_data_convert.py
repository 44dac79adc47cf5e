"""JSON lines to shards, lint, and the easy-vqa package, through their front doors."""

from __future__ import annotations

import json
import subprocess
from collections import Counter
from dataclasses import replace
from importlib.metadata import distribution
from pathlib import Path

import pytest

from data.errors import DataError
from data.health import SampleHealth
from data.imports.convert import convert_jsonl
from data.lint import lint
from data.media.opening import MediaLimits, MediaOpener
from data.shard_writer import write_shards
from data.shards import ShardFolder, ShardReader
from data.sources.rows import RowRules
from data.tar_index import sidecar_path
from data.toy.easy_vqa import ANSWER_KINDS, easy_vqa_samples
from tests.support.running import run_python
from tests.support.shard_samples import png, sample
from tests.support.source_files import make_shards, rows_of, write_form, write_pictures

MAKE_SHARDS = Path(__file__).parents[2] / "tools" / "make_shards.py"
NUM_QUESTIONS = {"train": 38_575, "test": 9_673}


def write_lines(path: Path, lines: list[object]) -> Path:
    path.write_text(
        "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines),
        encoding="utf-8",
    )
    return path


def good(index: int, **fields: object) -> dict[str, object]:
    return {
        "id": f"q{index}",
        "question": f"Wie groß ist {index}?",
        "answer": str(index),
        "answer_type": "math",
        **fields,
    }


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return run_python(str(MAKE_SHARDS), *map(str, arguments))


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    """24 lines, 19 of them good; the bad ones each in another way."""
    (tmp_path / "pictures").mkdir()
    for name, content in (
        ("a.PNG", png(value=1)),
        ("b.png", png(value=2)),
        ("cut.png", png()[:45]),
        ("note.txt", b""),
    ):
        (tmp_path / "pictures" / name).write_bytes(content)
    choice = {"answer": "B", "answer_type": "choice", "choices": ["x", "y"]}
    unnamed = {key: value for key, value in good(2).items() if key != "id"}
    return write_lines(
        tmp_path / "questions.jsonl",
        [
            good(0, media=["pictures/a.PNG"]),
            good(1, media=["pictures/b.png", "pictures/a.PNG"], **choice),
            unnamed,
            "",
            "{no json",
            good(5, answer_type="essay"),
            good(6, media=["pictures/gone.png"]),
            good(7, media=["pictures/cut.png"]),
            good(8, media=["pictures/note.txt"]),
            good(0),
            *(good(index) for index in range(10, 26)),
        ],
    )


def test_lines_become_shards_and_bad_ones_are_counted(lines: Path, tmp_path: Path) -> None:
    health = SampleHealth(max_bad_fraction=0.5)
    shards = convert_jsonl(
        lines,
        tmp_path / "out",
        opener=MediaOpener(MediaLimits()),
        health=health,
        samples_per_shard=8,
    )
    assert len(shards) == 3
    assert health.num_good == 19
    assert health.counts == {
        "bad_json": 1, "unknown_answer_type": 1, "missing_media": 1, "truncated": 1,
        "unknown_media": 1, "duplicate_id": 1,
    }  # fmt: skip
    folder = ShardFolder(tmp_path / "out")
    first, second, third = [folder.question(*folder.keys()[index]) for index in range(3)]
    assert first.text == "Wie groß ist 0?"
    assert [ref.extension for ref in first.media] == ["png"]
    assert folder.media_bytes(first.media[0]) == png(value=1)
    assert [ref.extension for ref in second.media] == ["0.png", "1.png"]
    assert [folder.media_bytes(ref) for ref in second.media] == [png(value=2), png(value=1)]
    assert (second.choices, second.answer) == (("x", "y"), "B")
    assert third.id == "questions/3"
    assert lint([tmp_path / "out"], MediaOpener(MediaLimits())) == (19, [])


def test_strict_and_the_fraction_stop_the_conversion(lines: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"questions\.jsonl:5 is bad \(bad_json\)"):
        convert_jsonl(lines, tmp_path / "a", health=SampleHealth(strict=True))
    # Not the 5 bad of the first 20, but all of the file.
    with pytest.raises(DataError, match=r"too many bad samples, got 5 of 25 \(20.0%\)"):
        convert_jsonl(lines, tmp_path / "b")
    assert not list((tmp_path / "b").glob("*"))
    with pytest.raises(DataError, match=r"no good sample.*unknown answer_type"):
        convert_jsonl(
            write_lines(tmp_path / "one.jsonl", [good(1, answer_type="x")]),
            tmp_path / "c",
            health=SampleHealth(1.0),
        )
    with pytest.raises(DataError, match="no such file"):
        convert_jsonl(tmp_path / "gone.jsonl", tmp_path / "d")


def test_lint_lists_every_problem(tmp_path: Path) -> None:
    samples = [sample(index, [("png", png())]) for index in range(8)]
    samples[1] = sample(1, [("png", b"no picture")])
    samples[2] = replace(samples[2], question={**samples[2].question, "answer_type": "essay"})
    samples[3] = sample(3, id="q0")
    one, two = write_shards(tmp_path / "a", samples, 4)
    write_shards(tmp_path / "b", [sample(0, id="q7")])
    sidecar_path(two).write_text(sidecar_path(two).read_text().replace("000005", "900005"))
    broken = tmp_path / "a" / "zzz.tar"
    broken.write_bytes(b"nothing" * 200)
    count, problems = lint(
        [tmp_path / "a", tmp_path / "b", tmp_path / "gone"], MediaOpener(MediaLimits())
    )
    assert count == 5, "samples of shards that can be read"
    assert [(problem.where, problem.reason) for problem in problems] == [
        (f"{one}:000001", "unsupported_container"),
        (f"{one}:000002", "unknown_answer_type"),
        (f"{one}:000003", "duplicate_id"),
        (str(two), "wrong_index"),
        (str(broken), "bad_shard"),
        (str(tmp_path / "gone"), "no_shards"),
    ]
    sidecar_path(two).unlink()
    assert [problem.reason for problem in lint([tmp_path / "a", tmp_path / "b"])[1]][-2:] == [
        "bad_shard",
        "duplicate_id",
    ]


def test_own_answer_types_and_metadata_reach_the_questions(tmp_path: Path) -> None:
    metadata = {"box": [1, 2.5], "name": "größer", "of": None}
    file = write_lines(
        tmp_path / "boxes.jsonl",
        [good(0, answer_type="box", metadata=metadata), good(1, metadata="7"), good(2)],
    )
    with pytest.raises(DataError, match=r"got 'box', expected one of math, choice, open; .*reward"):
        convert_jsonl(file, tmp_path / "no", health=SampleHealth(strict=True))
    known = ("math", "choice", "open", "box")
    convert_jsonl(file, tmp_path / "out", answer_types=known)
    folder = ShardFolder(tmp_path / "out", ShardReader(known))
    keys = folder.keys()
    boxed, plain, none = (folder.question(*key) for key in keys)
    assert (boxed.answer_type, json.loads(boxed.metadata)) == ("box", metadata)
    assert (json.loads(plain.metadata), none.metadata) == ("7", "")
    assert len({boxed, plain, none}) == 3, "questions are hashable"
    assert [problem.reason for problem in lint([tmp_path / "out"])[1]] == ["unknown_answer_type"]
    assert lint([tmp_path / "out"], answer_types=known) == (3, [])


@pytest.mark.medium
def test_front_door(lines: Path, tmp_path: Path) -> None:
    made = run(lines, tmp_path / "out", "--max-bad-fraction", "0.5", "--samples-per-shard", "10")
    assert made.returncode == 0, made.stderr
    assert made.stdout.startswith(
        "19 samples in 2 shards, 6 skipped: bad_json 1, duplicate_id 1, missing_media 1"
    )
    assert f"skipped sample {lines}:8: truncated" in made.stderr
    clean = run("lint", tmp_path / "out")
    assert (clean.returncode, clean.stdout) == (0, "19 samples, 0 problems\n")
    unheeded = run("lint", tmp_path / "out", "--columns", "image=scan")
    assert (unheeded.returncode, "no table files, got columns" in unheeded.stderr) == (2, True)
    again = run(lines, tmp_path / "out")
    assert again.returncode == 2
    assert "has shards already" in again.stderr
    assert "Traceback" not in again.stderr
    write_shards(tmp_path / "bad", [sample(1, answer_type="essay")])
    found = run("lint", tmp_path / "bad")
    assert found.returncode == 1
    assert f"{tmp_path / 'bad' / 'shard-000000.tar'}:000001: unknown_answer_type: " in found.stdout
    assert "1 samples, 1 problems: unknown_answer_type 1" in found.stdout
    assert "lint FOLDER" in run("--help").stdout
    # Each bad line once, and the option of this tool.
    refused = run(lines, tmp_path / "refused")
    assert refused.returncode == 2
    assert refused.stderr.count(f"{lines}:8") == 1
    assert refused.stderr.splitlines()[-1] == (
        "data: too many bad samples, got 6 of 25 (24.0%), expected at most 5.0%; correct them or "
        "raise --max-bad-fraction"
    )


def package_records(split: str) -> list[tuple[str, str, int]]:
    path = distribution("easy-vqa").locate_file(f"easy_vqa/data/{split}/questions.json")
    records: list[tuple[str, str, int]] = json.loads(Path(str(path)).read_text())
    return records


@pytest.mark.medium
def test_easy_vqa_is_multiple_choice_among_answers_of_one_kind() -> None:
    assert {split: len(package_records(split)) for split in NUM_QUESTIONS} == NUM_QUESTIONS
    samples, records = (
        list(easy_vqa_samples(distribution("easy-vqa"), "test")),
        package_records("test"),
    )
    letters: Counter[tuple[int, str]] = Counter()
    positions: set[tuple[str, str]] = set()
    for each, (text, answer, image) in zip(samples, records, strict=True):
        question = each.question
        assert question["question"].lower() == text
        assert question["choices"][ord(question["answer"]) - ord("A")] == answer
        assert tuple(sorted(question["choices"])) in {tuple(sorted(kind)) for kind in ANSWER_KINDS}
        assert question["image"] == image
        letters[len(question["choices"]), question["answer"]] += 1
        positions.add((answer, question["answer"]))
    assert len(positions) == 2 * 2 + 3 * 3 + 8 * 8, (
        "every answer stands at every letter of its kind"
    )
    for size, tolerance in (
        (2, 0.04),
        (3, 0.15),
        (8, 0.4),
    ):  # over 3 standard deviations of a fair draw
        counts = [count for (choices, _), count in letters.items() if choices == size]
        assert len(counts) == size
        assert max(counts) / (sum(counts) / size) - 1 < tolerance, "no letter gives the answer away"


def test_easy_vqa_shards_hold_the_packages_pictures(tmp_path: Path) -> None:
    samples = [
        each
        for each, _ in zip(
            easy_vqa_samples(distribution("easy-vqa"), "test"), range(50), strict=False
        )
    ]
    write_shards(tmp_path, samples)
    folder = ShardFolder(tmp_path)
    opener = MediaOpener(MediaLimits())
    for index in range(50):
        question = folder.question(*folder.keys()[index])
        assert opener.open_ref(question.media[0], folder.reader).pixels.shape == (1, 64, 64, 3)
    assert lint([tmp_path]) == (50, [])


def test_media_fields_and_parquet_become_the_shards_of_paths(tmp_path: Path) -> None:
    paths = write_pictures(tmp_path, 8)
    rows = rows_of(paths)
    for row, media in zip(rows, paths, strict=True):
        del row["media"]
        if media and media[0].endswith(".gif"):
            row["video" if row["id"] == "q4" else "videos"] = media[0]
        elif media:
            row["images"] = media
    rows[1]["image"] = rows[1].pop("images")[0]
    expected = ShardFolder(make_shards(tmp_path, rows_of(paths)))
    (tmp_path / "q.data").write_bytes(
        min((write_form("structs", tmp_path, rows_of(paths)) / "data").iterdir()).read_bytes()
    )
    columns = RowRules({"image": "image,image_2"})
    for source, rules in ((write_lines(tmp_path / "own.jsonl", rows), RowRules()),
                          (tmp_path / "q.data", columns)):  # fmt: skip
        health = SampleHealth(strict=True)
        convert_jsonl(source, tmp_path / "out", health=health, rules=rules, overwrite=True)
        made = ShardFolder(tmp_path / "out")
        assert health.num_good == len(made) == (8 if rules is not columns else 4)
        for mine, theirs in zip(made.keys(), expected.keys(), strict=False):
            one, other = made.question(*mine), expected.question(*theirs)
            assert replace(one, media=()) == replace(other, media=())
            assert [made.media_bytes(ref) for ref in one.media] == [
                expected.media_bytes(ref) for ref in other.media
            ]


def test_files_of_other_kinds_are_sent_to_the_command_that_reads_them(tmp_path: Path) -> None:
    (tmp_path / "q.csv").write_text("question,answer\n1,1\n")
    with pytest.raises(DataError, match=r"got \.csv.*make_shards\.py benchmark \S+q\.csv FOLDER"):
        convert_jsonl(tmp_path / "q.csv", tmp_path / "out")
