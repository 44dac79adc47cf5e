"""What a comparison says: by hand from chosen answers and metrics, with empty cells where there is
nothing to say.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.support.simulated_comparison import (
    STEPS,
    Rewards,
    held_out_groups,
    make_plan,
    write_evaluation,
    write_run,
)
from zppo_mm.comparison.accuracy import contrast, method_accuracy, parts_of
from zppo_mm.comparison.accuracy_tables import accuracies
from zppo_mm.comparison.cells import markdown
from zppo_mm.comparison.figures import FIGURES, styles_of
from zppo_mm.comparison.launch import Failure
from zppo_mm.comparison.measures import cost, fates, final_means
from zppo_mm.comparison.plan import Plan
from zppo_mm.comparison.report import write_comparison
from zppo_mm.comparison.results import read_answers, read_results
from zppo_mm.comparison.tables import tables
from zppo_mm.methods import METHODS
from zppo_mm.observability.transcripts import write_held_out_answers
from zppo_mm.run_folder import RunFolder

BEFORE: Rewards = {"text/1": (1,), "text/2": (0,), "clips/1": (0,), "clips/2": (0,)}
BASE_AFTER: Rewards = {"text/1": (1,), "text/2": (0,), "clips/1": (1,), "clips/2": (0,)}
ZPPO_MIDDLE: Rewards = {"text/1": (1,), "text/2": (1,), "clips/1": (0,), "clips/2": (0,)}
ZPPO_AFTER: Rewards = {"text/1": (1,), "text/2": (1,), "clips/1": (1,), "clips/2": (0,)}
BUFFER = {
    "buffer/size": 1,
    "buffer/admitted/0": 4,
    "buffer/graduated/0": 1,
    "buffer/evicted/0": 1,
    "buffer/admitted/37.5": 2,
}
BUFFER |= {"buffer/graduated_visits/2": 1, "buffer/evicted_visits/0": 1}
ZPPO_METRICS = (
    {
        "seconds/step": 3.0,
        "seconds/evaluation": 1.0,
        "accuracy/bcq": 0.5,
        "audit/bcq_right": 0.25,
        "teacher/tokens": 30,
        "rollout/tokens": 90,
    },
    {"seconds/step": 4.0, **BUFFER, "rollout/tokens": 110, "accuracy/plain": 0.5},
)
BASE_METRICS = (
    {"seconds/step": 1.0, "buffer/admitted/0": 2, "rollout/tokens": 60},
    {"seconds/step": 2.0, "buffer/admitted/0": 3},
)


def write_all(
    plan: Plan,
    base: Mapping[int, Rewards] | None = None,
    zppo: Mapping[int, Rewards] | None = None,
    skip: Sequence[str] = (),
) -> None:
    """Write every run of a plan of grpo_replay and zppo, but those to be skipped."""
    for run in plan.runs:
        if run.name in skip:
            continue
        if run.label == "zppo":
            write_run(run, zppo or {0: BEFORE, 1: ZPPO_MIDDLE, 2: ZPPO_AFTER}, ZPPO_METRICS)
        else:
            write_run(run, base or {0: BEFORE, 1: BEFORE, 2: BASE_AFTER}, BASE_METRICS)


def test_accuracy_by_hand(tmp_path: Path) -> None:
    plan = make_plan(tmp_path)
    write_all(plan)
    results = read_results(plan)
    parts = {part.name: part for part in parts_of(results)}
    # `text` is a modality and a source of the same questions, `clips` the source of all videos.
    assert list(parts) == ["all", "text", "video"]
    found = method_accuracy(results, "zppo", parts["all"])
    assert found is not None
    assert found.difference is not None
    assert found.curve_difference is not None
    assert (found.seeds, found.num_questions, found.num_unpaired) == ((0, 1), 8, 0)
    # Before 1/4, middle 2/4, after 3/4; the curve leaves step 0 out: (2/4 + 3/4) / 2. Baseline:
    # after 2/4, curve (1/4 + 2/4) / 2.
    assert (found.before, found.after.value, found.curve.value) == pytest.approx(
        (0.25, 0.75, 0.625)
    )
    assert (found.difference.value, found.curve_difference.value) == pytest.approx((0.25, 0.25))
    # After the last step the methods differ on one question of four, so a draw of two times four
    # questions has a difference of k / 8 with k binomial(8, 1/4): P(0) = 0.100, P(k <= 4) = 0.973,
    # P(k <= 5) = 0.996. The 97.5 % quantile is 5/8, the 2.5 % quantile 0.
    assert (found.difference.low, found.difference.high) == pytest.approx((0.0, 0.625))
    # On the text questions zppo has everything right in every draw, and the baseline the first of
    # two: k binomial(4, 1/2), P(0) = 0.0625.
    text = method_accuracy(results, "zppo", parts["text"])
    assert text is not None
    assert text.difference is not None
    assert (text.after.value, text.after.low, text.after.high) == (1.0, 1.0, 1.0)
    assert (text.difference.value, text.difference.low, text.difference.high) == pytest.approx(
        (0.5, 0.0, 1.0)
    )
    base = method_accuracy(results, "grpo_replay", parts["all"])
    assert base is not None
    assert (base.after.value, base.difference) == (0.5, None)


def test_named_parts_and_sums_by_hand(tmp_path: Path) -> None:
    parts = {"clips": ["clips"], "both": ["text", "clips"]}
    plan = make_plan(tmp_path, parts=parts, contrasts={"twice": {"zppo": 2, "grpo_replay": -1}})
    write_all(plan, zppo={0: BEFORE, 1: ZPPO_MIDDLE, 2: ZPPO_MIDDLE})
    # The first part is what methods are compared by: of two clips the baseline has one, zppo none.
    accuracy = cells(plan, "Held-out accuracy")["zppo"]
    assert accuracy["before"] == "0.0"
    assert accuracy["after, to grpo_replay"].startswith("-50.0")
    # Of four questions zppo has one before and two after: k binomial(8, 1/4) as above.
    gains = cells(plan, "Gains over the student before training")
    assert gains["before"] == {"clips": "0.0", "both": "25.0"}
    assert gains["zppo"] == {"clips": "+0.0 [+0.0, +0.0]", "both": "+25.0 [+0.0, +62.5]"}
    # 2 x 0 - 1/2 and 2 x 2/4 - 2/4.
    twice = cells(plan, "Contrasts")["twice"]
    assert (twice["clips"].strip("*")[:5], twice["both"].strip("*")[:5]) == ("-50.0", "+50.0")


def test_a_sum_is_over_the_seeds_that_all_its_methods_have(tmp_path: Path) -> None:
    plan = make_plan(tmp_path, contrasts={"gap": {"zppo": 1, "grpo_replay": -1}})
    results = read_results(plan)
    assert contrast(results, plan.contrasts["gap"], parts_of(results)[0]) is None
    write_all(plan, skip=["zppo-seed1"])
    results = read_results(plan)
    # The difference to the baseline is another way to the same draws.
    found = method_accuracy(results, "zppo", parts_of(results)[0])
    assert found is not None
    assert contrast(results, plan.contrasts["gap"], parts_of(results)[0]) == found.difference


def test_several_responses_count_as_their_mean(tmp_path: Path) -> None:
    plan = make_plan(tmp_path, seeds=[0])
    zppo = {step: dict.fromkeys(BEFORE, (1, 0, 0, 0)) for step in (0, 2)}
    write_all(plan, zppo=zppo)
    results = read_results(plan)
    found = method_accuracy(results, "zppo", parts_of(results)[0])
    assert found is not None
    assert found.after.value == 0.25


def test_a_question_that_one_method_did_not_answer_is_left_out_of_the_difference(
    tmp_path: Path,
) -> None:
    plan = make_plan(tmp_path, seeds=[0])
    without = {
        step: {name: value for name, value in BASE_AFTER.items() if name != "clips/1"}
        for step in (0, 2)
    }
    write_all(plan, base=without)
    results = read_results(plan)
    found = method_accuracy(results, "zppo", parts_of(results)[0])
    assert found is not None
    assert found.difference is not None
    # On text/1, text/2 and clips/2: zppo 2/3, baseline 1/3; zppo by itself has 3/4.
    assert (found.num_questions, found.num_unpaired, found.after.value) == (4, 1, 0.75)
    assert found.difference.value == pytest.approx(1 / 3)
    (table, *_) = tables(results, accuracies(results))
    assert "1 answers are no part of a difference" in table.note


def test_fates_and_cost_by_hand(tmp_path: Path) -> None:
    plan = make_plan(tmp_path)
    write_all(plan)
    results = read_results(plan)
    found, spent = fates(results, "zppo"), cost(results, "zppo")
    assert found is not None
    assert spent is not None
    # Two seeds with 4 + 2 admissions, a graduation and an eviction each: 12 - 2 - 2 are still
    # there.
    assert (found.admitted, found.graduated["0"], found.evicted["0"], found.num_left) == (
        {"0": 8, "37.5": 4},
        2,
        2,
        8,
    )
    # Steps without evaluation: 2, 4, 2, 4 s; the baseline's 1, 2, 1, 2 s.
    assert (spent.seconds, spent.ratio) == (3.0, 2.0)
    # A step in which the teacher was not asked has no tokens of it: (30 + 0) / 2. No loss tokens
    # were recorded.
    assert spent.tokens == {"sampled": 100.0, "of the teacher": 15.0, "trained on": None}
    means = final_means(results, "zppo")
    assert (means["BCQ accuracy"], means["plain accuracy"], means["NCQ accuracy"]) == (
        0.5,
        0.5,
        None,
    )


def test_graduations_are_compared_by_seed(tmp_path: Path) -> None:
    plan = make_plan(tmp_path)
    write_all(plan)
    # Both seeds of zppo graduate 1 of 4, those of the baseline 0 of 3.
    graduated = cells(plan, "Graduated, by accuracy at admission")
    assert graduated["zppo"]["at 0 %, to grpo_replay"] == "**+25.0** [+25.0, +25.0]"
    assert graduated["grpo_replay"]["at 0 %, to grpo_replay"] == ""


def test_only_the_last_steps_are_the_end(tmp_path: Path) -> None:
    plan = make_plan(tmp_path, seeds=[0], methods=["zppo"], options={"train.train_iters": 12})
    metrics = [{"accuracy/bcq": 0.0 if step <= 2 else 1.0} for step in range(1, 13)]
    write_run(plan.runs[0], {0: BEFORE, 12: ZPPO_AFTER}, metrics)
    assert final_means(read_results(plan), "zppo")["BCQ accuracy"] == 1.0


def cells(plan: Plan, title: str) -> dict[str, dict[str, str]]:
    """Return the cells of one table by row and column."""
    results = read_results(plan)
    table = next(table for table in tables(results, accuracies(results)) if table.title == title)
    return {row[0]: dict(zip(table.header[1:], row[1:], strict=True)) for row in table.rows}


@pytest.mark.medium
def test_without_replay_the_buffer_has_empty_cells(tmp_path: Path) -> None:
    plan = make_plan(tmp_path, methods=["grpo", "zppo"], seeds=[0])
    write_run(plan.runs[0], {0: BEFORE, 2: BASE_AFTER}, [{"buffer/size": 0}, {"buffer/size": 0}])
    write_run(plan.runs[1], {0: BEFORE, 2: ZPPO_AFTER}, ZPPO_METRICS)
    graduated = cells(plan, "Graduated, by accuracy at admission")
    assert set(graduated["grpo"].values()) == {""}
    assert graduated["zppo"] == {
        "at 0 %": "25% (1/4)",
        "at 37.5 %": "0% (0/2)",
        "all": "17% (1/6)",
        "of those that left": "50% (1/2)",
    }
    visits = cells(plan, "Fates of buffered questions")
    assert list(visits) == ["zppo"]
    assert visits["zppo"]["graduated after 2"] == "1"
    assert cells(plan, "Answers to reformulated prompts at the end")["grpo"]["BCQ accuracy"] == ""


def test_unfinished_runs_are_named_and_in_no_table(tmp_path: Path) -> None:
    plan = make_plan(tmp_path, methods=["grpo_replay", "zppo", "ncq"])
    write_all(
        Plan(
            tuple(run for run in plan.runs if run.label != "ncq"),
            *[getattr(plan, n) for n in Plan.__slots__[1:]],
        ),
        skip=["zppo-seed1"],
    )
    ncq = next(run for run in plan.runs if run.name == "ncq-seed0")
    write_run(ncq, {0: BEFORE}, [{}], exported=False)
    runs = cells(plan, "Runs")
    assert runs == {
        "grpo_replay": {"seed 0": "finished", "seed 1": "finished"},
        "zppo": {"seed 0": "finished", "seed 1": "not started"},
        "ncq": {"seed 0": f"step 1 of {STEPS}", "seed 1": "not started"},
    }
    accuracy = cells(plan, "Held-out accuracy")
    assert (accuracy["zppo"]["seeds"], accuracy["ncq"]["seeds"]) == ("1 of 2", "0 of 2")
    # The finished seed of zppo is compared with that of the baseline: k / 4 with k binomial(4,
    # 1/4), P(k <= 2) = 0.949, P(k <= 3) = 0.996.
    assert accuracy["zppo"]["after, to grpo_replay"] == "+25.0 [+0.0, +75.0]"
    assert {value for name, value in accuracy["ncq"].items() if name != "seeds"} == {""}


def test_methods_have_their_colors_and_variants_of_one_method_different_ones(
    tmp_path: Path,
) -> None:
    variants = {f"zppo-{rounds}": {"method": "zppo"} for rounds in (1, 2)}
    methods = {"grpo": None, "grpo_replay": None, "zppo": None, **variants}
    drawn = styles_of(read_results(make_plan(tmp_path, methods=methods, seeds=[0])))
    assert [style.name for style in drawn.values()] == [
        *("GRPO", "GRPO + replay", "ZPPO"),
        *variants,
    ]
    assert [style.linestyle for style in drawn.values()] == ["--", "-", "-", "-", "-"]
    assert drawn["grpo"].color == drawn["grpo_replay"].color == METHODS["grpo"].color
    assert len({drawn[label].color for label in ("grpo", "zppo", *variants)}) == 4


@pytest.mark.medium
def test_a_difference_without_zero_is_bold(tmp_path: Path) -> None:
    plan = make_plan(tmp_path)
    right, wrong = ({f"text/{index}": (value,) for index in range(20)} for value in (1.0, 0.0))
    write_all(plan, base={0: wrong, 2: wrong}, zppo={0: wrong, 2: right})
    assert (
        cells(plan, "Held-out accuracy")["zppo"]["after, to grpo_replay"]
        == "**+100.0** [+100.0, +100.0]"
    )
    write_comparison(plan)
    assert (
        "<td><b>+100.0</b> [+100.0, +100.0]</td>" in (plan.folder / "comparison.html").read_text()
    )


@pytest.mark.medium
def test_files(tmp_path: Path) -> None:
    plan = make_plan(tmp_path)
    write_all(plan)
    made = write_comparison(plan, [Failure(plan.runs[0], "no space left")])
    text, page = ((plan.folder / f"comparison.{suffix}").read_text() for suffix in ("md", "html"))
    assert "| zppo | 2 of 2 | 25.0 | 75.0 [" in text
    assert "## Failed: grpo_replay-seed0\n\n```\nno space left\n```" in text
    for table in made:
        assert markdown(table) in text
        assert f"<h2>{table.title}</h2>" in page
    drawn = [title for _, title, _, _ in FIGURES if title != "Plain accuracy in training"]
    assert [title for title in drawn if f"<h3>{title}</h3>" not in page] == []
    sources = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert all(source.startswith("data:image/svg+xml;base64,") for source in sources)
    assert re.search(r"url\(|@import|<script|<link", page) is None
    assert {path.name for path in (plan.folder / "figures").iterdir()} >= {
        "held_out.png",
        "held_out.svg",
        "graduated.png",
    }
    with (plan.folder / "comparison.csv").open() as file:
        rows = {(row["method"], row["seed"]): row for row in csv.DictReader(file)}
    assert len(rows) == 6
    whole = rows["zppo", "all"]
    assert [
        float(whole[name]) for name in ("after", "difference", "difference_low", "after/video")
    ] == pytest.approx([0.75, 0.25, 0.0, 0.5])
    assert (
        whole["graduated/0"],
        whole["seconds/ratio"],
        rows["zppo", "1"]["after"],
        rows["zppo", "1"]["status"],
    ) == (
        "2",
        "2.0",
        "0.75",
        "finished",
    )


@pytest.mark.medium
def test_the_report_is_the_same_twice(tmp_path: Path) -> None:
    plan = make_plan(tmp_path)
    write_all(plan)
    files = ("comparison.md", "comparison.csv", "comparison.html", "figures/held_out.svg")
    write_comparison(plan)
    first = [(plan.folder / name).read_bytes() for name in files]
    write_comparison(plan)
    assert [(plan.folder / name).read_bytes() for name in files] == first


def test_nothing_yet_is_a_report_that_says_so(tmp_path: Path) -> None:
    plan = make_plan(tmp_path)
    write_comparison(plan)
    assert "| zppo | not started | not started |" in (plan.folder / "comparison.md").read_text()


def test_evaluations_after_the_last_step_do_not_count(tmp_path: Path) -> None:
    # A run that was prolonged and is compared again at its old length.
    plan = make_plan(tmp_path, seeds=[0])
    write_all(plan)
    write_evaluation(plan.runs[1].folder, 3, dict.fromkeys(BEFORE, (0,)))
    results = read_results(plan)
    found = method_accuracy(results, "zppo", parts_of(results)[0])
    assert found is not None
    assert (found.after.value, found.curve.value) == pytest.approx((0.75, 0.625))


def test_two_sources_may_use_the_same_ids(tmp_path: Path) -> None:
    (run,) = make_plan(tmp_path, seeds=[0], methods=["zppo"]).runs
    groups = held_out_groups({"text/1": (1,), "clips/1": (0,)})
    write_held_out_answers(
        RunFolder(run.folder),
        0,
        [
            replace(g, instance=replace(g.instance, question=replace(g.question, id="1")))
            for g in groups
        ],
    )
    answers = read_answers(run.folder)[0].values()
    assert sorted((answered.source, answered.accuracy) for answered in answers) == [
        ("clips", 0.0),
        ("text", 1.0),
    ]


def test_scores_are_paired_by_question_not_by_index(tmp_path: Path) -> None:
    plan = make_plan(tmp_path, seeds=[0])
    rng = np.random.default_rng(0)
    rewards = {f"text/{index}": (float(rng.random() < 0.5),) for index in range(40)}
    turned = dict(reversed(rewards.items()))
    write_all(plan, base={0: rewards, 2: rewards}, zppo={0: turned, 2: turned})
    results = read_results(plan)
    found = method_accuracy(results, "zppo", parts_of(results)[0])
    assert found is not None
    assert found.difference is not None
    assert (found.difference.low, found.difference.high) == (0.0, 0.0)
