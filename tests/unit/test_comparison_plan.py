"""The plan of a comparison: which runs follow from its file, and every error before the first run
starts.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.simulated_comparison import make_plan
from zppo_mm.comparison.plan import load_plan
from zppo_mm.config.load import load_config
from zppo_mm.errors import ConfigError

ROOT = Path(__file__).parents[2]
HALF_FORMED = ROOT / "examples/compare_half_formed"


def test_every_method_meets_every_seed(tmp_path: Path) -> None:
    plan = make_plan(tmp_path, seeds=[4, 5])
    assert [run.name for run in plan.runs] == [
        "grpo_replay-seed4",
        "zppo-seed4",
        "grpo_replay-seed5",
        "zppo-seed5",
    ]
    assert [run.folder for run in plan.runs] == [tmp_path / "out" / run.name for run in plan.runs]
    assert (plan.baseline, plan.labels, plan.seeds) == (
        "grpo_replay",
        ("grpo_replay", "zppo"),
        (4, 5),
    )
    assert [(run.config.method, run.config.seed, run.config.zone.bcq) for run in plan.runs[:2]] == [
        ("grpo_replay", 4, False),
        ("zppo", 4, True),
    ]


def test_arguments_mean_the_checked_configuration(tmp_path: Path) -> None:
    base = tmp_path / "run.yaml"
    base.write_text("train: {lr: 2.0e-6}\n")
    plan = make_plan(
        tmp_path,
        base=str(base),
        options={
            "modality": "text",
            "train.freeze": ["vision"],
            "train": {"updates_per_step": 4},
            "model.student": "a: b",
        },
    )
    for run in plan.runs:
        assert run.arguments[0] == f"--config={base}"
        assert load_config(base, run.arguments[1:]) == run.config
        assert (
            run.config.train.lr,
            run.config.train.freeze,
            run.config.train.updates_per_step,
        ) == (2e-6, ["vision"], 4)
        assert run.config.model.student == "a: b"


def test_a_method_may_stand_under_several_labels(tmp_path: Path) -> None:
    methods = {
        "zppo": None,
        "zppo_none": {"method": "zppo", "options": {"algorithm.advantage_normalization": "none"}},
        "zppo_8": {"method": "zppo", "options": {"train.updates_per_step": 8}},
    }
    plan = make_plan(tmp_path, methods=methods, baseline="zppo_8", seeds=[0])
    settings = [
        (
            run.label,
            run.config.method,
            run.config.algorithm.advantage_normalization,
            run.config.train.updates_per_step,
        )
        for run in plan.runs
    ]
    assert settings == [
        ("zppo", "zppo", "nonzero", 2),
        ("zppo_none", "zppo", "none", 2),
        ("zppo_8", "zppo", "nonzero", 8),
    ]
    assert plan.baseline == "zppo_8"


def test_arguments_win_over_the_file(tmp_path: Path) -> None:
    make_plan(tmp_path)
    plan = load_plan(
        tmp_path / "compare.yaml",
        ["seeds=[7]", "options.train.train_iters=5", "train.lr=1e-4", "parallel_runs=3"],
    )
    assert [run.seed for run in plan.runs] == [7, 7]
    assert {(run.config.train.train_iters, run.config.train.lr) for run in plan.runs} == {(5, 1e-4)}
    assert plan.parallel_runs == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": ["zppo"]}, r"compare.yaml: unknown key, got method, .* did you mean methods\?"),
        ({"parallel_runs": "many"}, r"compare.yaml: parallel_runs has the wrong type"),
        ({"parallel_runs": 0}, r"parallel_runs is out of range, got 0, expected at least 1"),
        (
            {"seeds": [1, 1]},
            r"seeds is wrong, got \[1, 1\], expected at least one seed and none twice",
        ),
        ({"methods": []}, r"methods is wrong, got \[\], expected a list of different methods"),
        ({"methods": ["zppo", "zppo"]}, r"methods is wrong, got \['zppo', 'zppo'\]"),
        (
            {"methods": ["zpo"]},
            r"methods.zpo: .* unknown method, got 'zpo', .*; did you mean zppo\?",
        ),
        ({"methods": {"a b": None}}, r"methods: got 'a b': {}, expected a label of letters"),
        (
            {"methods": {"zppo": {"option": {}}}},
            r"unknown key, got methods.zppo.option, .*did you mean options\?",
        ),
        (
            {"methods": {"zppo": {"options": {"train.lrr": 1}}}},
            r"methods.zppo: .* unknown key, got train.lrr, .* did you mean train.lr\?",
        ),
        (
            {"baseline": "zpo"},
            r"baseline names an unknown method, got 'zpo', expected .*; did you mean zppo\?",
        ),
        (
            {"contrasts": {"gap": {"zppo": 1, "grpo": -1}}},
            r"contrasts.gap names an unknown method, got 'grpo', expected one of grpo_replay, zppo",
        ),
        ({"contrasts": {"gap": {}}}, r"contrasts.gap has no method"),
        ({"parts": {"all of it": []}}, r"parts.all of it has no source"),
        (
            {"options": {"seed": 3}},
            r"options: seed follows from the comparison, .* expected seeds to say it",
        ),
        ({"base": "nowhere.yaml"}, r"nowhere.yaml: cannot be read"),
    ],
)
def test_errors(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_plan(tmp_path, **changes)


@pytest.mark.parametrize(
    "path",
    [
        *sorted(set((ROOT / "examples").rglob("compare*/*.yaml")) - {HALF_FORMED / "run.yaml"}),
        ROOT / "examples/paper/compare.yaml",
    ],
    ids=lambda path: f"{path.parent.name}/{path.name}",
)
@pytest.mark.medium
def test_shipped_comparisons_load(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert len(load_plan(path).labels) >= 3
