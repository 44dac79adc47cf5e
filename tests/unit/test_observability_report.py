"""The report: complete from a run's files, alone in one file, and made from whatever pieces there
are.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from data.errors import DataError
from data.question import MediaRef
from tests.support.simulated_run import make_group, make_question, make_rollout, simulate_run
from zppo_mm.experience import GroupKind
from zppo_mm.observability.sinks import append_line
from zppo_mm.observability.transcripts import write_transcript
from zppo_mm.report.examples import choose_examples, shortened, split_prompt
from zppo_mm.report.figures import FIGURES
from zppo_mm.report.page import MAX_POINTS, write_report
from zppo_mm.report.run_record import RunRecord
from zppo_mm.run_folder import RunFolder

MEDIA = (
    MediaRef("video", "train/000.tar", "clip", "mp4"),
    MediaRef("image", "train/001.tar", "strip", "png"),
)


def open_media(ref: MediaRef) -> npt.NDArray[np.uint8]:
    if ref.kind == "image":
        return np.full((1, 20, 50, 3), 200, np.uint8)
    return np.full((12, 24, 32, 3), 90, np.uint8)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "simulated"
    simulate_run(folder, num_steps=12, media=MEDIA)
    return folder


@pytest.fixture(scope="module")
def page(run_folder: Path) -> str:
    return write_report(run_folder, open_media, num_examples=3).read_text()


@pytest.mark.medium
def test_report_shows_everything_in_one_file(page: str) -> None:
    assert "<title>simulated" in page
    # Held-out accuracy is simulated to go from 0.35 to 0.35 + 0.3 * 10 / 12 = 0.6 at the last
    # evaluation.
    assert "35.0 % → 60.0 %" in page
    assert "+25.0 points" in page
    for title, _, _ in FIGURES:
        assert f"<h3>{title}</h3>" in page
    assert page.count('class="card example"') == 3
    for text in (
        "Plain prompt",
        "BCQ prompt",
        "NCQ prompt",
        "right candidate · teacher",
        "wrong candidate · student",
        "video, 8 of 12 frames",
    ):
        assert text in page
    sources = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert len(sources) > len(FIGURES)
    assert all(
        source.startswith(("data:image/svg+xml;base64,", "data:image/png;base64,"))
        for source in sources
    )
    assert re.search(r"url\(|@import|<script|<link", page) is None


@pytest.mark.medium
def test_report_is_the_same_twice(page: str, run_folder: Path) -> None:
    assert write_report(run_folder, open_media, num_examples=3).read_text() == page


def test_examples_are_questions_with_both_prompts_and_all_media(run_folder: Path) -> None:
    examples = choose_examples(run_folder, 4, open_media)
    assert len({example.question_id for example in examples}) == 4
    assert all(
        [group.title for group in example.groups] == ["Plain prompt", "BCQ prompt", "NCQ prompt"]
        for example in examples
    )
    assert {example.media[0].kind for example in examples} == {"image", "video"}
    assert all(example.groups[0].accuracy < 0.5 for example in examples)


def test_empty_folder_gives_a_page_that_says_so(tmp_path: Path) -> None:
    page = write_report(tmp_path).read_text()
    assert "no metrics yet" in page
    assert "no transcripts yet" in page


@pytest.mark.medium
def test_one_step_without_reformulation(tmp_path: Path) -> None:
    simulate_run(tmp_path, num_steps=1)
    path = tmp_path / "transcripts" / "step_000001.jsonl"
    path.write_text(
        "".join(line for line in path.read_text().splitlines(True) if '"kind": "new"' in line)
    )
    page = write_report(tmp_path, num_examples=2).read_text()
    assert "step 0, 64 questions" in page
    assert page.count('class="card example"') == 2
    assert "BCQ prompt" not in page


def test_groups_of_other_methods_are_shown_as_what_they_are(tmp_path: Path) -> None:
    kinds: tuple[GroupKind, ...] = ("new", "hint", "prefix", "inject", "teacher")
    groups = [make_group(make_question(0), kind, [make_rollout("1", 0.0)]) for kind in kinds]
    write_transcript(RunFolder(tmp_path), 1, groups, {}, {})
    (example,) = choose_examples(tmp_path, 1, None)
    assert [group.kind for group in example.groups] == list(kinds)
    assert [group.title for group in example.groups[:2]] == ["Plain prompt", "Hint prompt"]


def test_media_that_cannot_be_opened_is_named(run_folder: Path) -> None:
    def closed(ref: MediaRef) -> npt.NDArray[np.uint8]:
        raise DataError(f"{ref.shard}: gone")

    (example,) = choose_examples(run_folder, 1, closed)
    assert [(media.frames, media.problem) for media in example.media] == [
        ((), problem) for problem in [f"{MEDIA[0].shard}: gone"]
    ]


def test_a_model_cannot_write_into_the_page(tmp_path: Path) -> None:
    evil = "</div><script>alert(1)</script>"
    group = make_group(make_question(0), "new", [make_rollout(evil, 0.0)], text=evil)
    write_transcript(RunFolder(tmp_path), 1, [group], {group.uid: [0.0]}, {group.uid: [0]})
    page = write_report(tmp_path).read_text()
    assert "<script>" not in page
    assert "&lt;script&gt;" in page


@pytest.mark.medium
def test_a_line_being_written_and_a_null_are_left_out(tmp_path: Path) -> None:
    append_line(tmp_path / "metrics.jsonl", {"step": 1, "policy/loss": 0.5})
    append_line(tmp_path / "metrics.jsonl", {"step": 2, "policy/loss": float("nan")})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "poli')
    assert "<h3>Loss</h3>" in write_report(tmp_path).read_text()


def test_prompt_is_cut_at_its_candidates() -> None:
    candidates = [{"text": "one"}, {"text": "two"}, {"text": "lost"}, {"text": ""}]
    segments = split_prompt("a one b two c", candidates)
    assert [(segment.text, segment.candidate) for segment in segments] == [
        ("a ", None),
        ("one", candidates[0]),
        (" b ", None),
        ("two", candidates[1]),
        (" c", None),
        ("lost", candidates[2]),
        ("", candidates[3]),
    ]


def test_figures_of_a_long_run_show_means_over_steps() -> None:
    rows = [{"step": step, "a": float(step), "b": None} for step in range(1, 8)]
    rows[2]["a"] = None
    evaluations = [{"step": step} for step in range(7)]
    thin = RunRecord(Path(), rows, evaluations, {}).thinned(3)
    # Steps 1 to 3, whose third has no value: (1 + 2) / 2; 4 to 6: (4 + 5 + 6) / 3; then the last.
    assert thin.metrics == [{"step": 2, "a": 1.5}, {"step": 5, "a": 5.0}, rows[-1]]
    assert [row["step"] for row in thin.evaluations] == [0, 3, 6]
    short = RunRecord(Path(), rows[:3], evaluations[:3], {})
    assert short.thinned(3) == short


@pytest.mark.medium
def test_page_does_not_grow_with_the_steps(tmp_path: Path) -> None:
    sizes = []
    for num_steps in (MAX_POINTS, 10 * MAX_POINTS):
        folder = tmp_path / str(num_steps)
        folder.mkdir()
        lines = "".join(
            f'{{"step": {step}, "batch/easy": {step % 7}, "policy/loss": {step % 5}}}\n'
            for step in range(1, num_steps + 1)
        )
        (folder / "metrics.jsonl").write_text(lines)
        sizes.append(len(write_report(folder).read_text()))
    assert sizes[1] < 1.2 * sizes[0]


def test_long_texts_are_shown_without_their_middle(tmp_path: Path) -> None:
    assert shortened("abcdefgh", most=4) == "ab\n[… 4 characters …]\ngh"
    assert shortened("abcd", most=4) == "abcd"
    long = "x" * 200_000
    group = make_group(make_question(0), "new", [make_rollout(long, 0.0)] * 8, text=long)
    write_transcript(RunFolder(tmp_path), 1, [group], {}, {})
    assert len(write_report(tmp_path).read_text()) < 200_000
