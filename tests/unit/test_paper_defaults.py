"""A configuration that says nothing has the paper's values, and every method does what the paper
says of it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.paper_values import HYPERPARAMETERS
from zppo_mm.config.load import PRESETS_FOLDER, load_config
from zppo_mm.config.schema import RunConfig
from zppo_mm.evaluation.settings import SAMPLING
from zppo_mm.methods import METHODS

EXAMPLES = Path(__file__).parents[2] / "examples"

# Source: the paper's tables of symbols and hyperparameters (arXiv 2606.18216), by our keys.
PAPER: dict[str, Any] = HYPERPARAMETERS | {
    "zone.bcq": True,
    "zone.ncq": True,
    "zone.replay": True,
    "zone.hint": False,
    "zone.prefix": False,
    "zone.inject": False,
    "zone.prefix_fraction": 0.4,
    "zone.max_sampling_rounds": 1,
    "algorithm.importance_cap": 0.0,
    "distill.source": "none",
    "distill.top_k": 0,
    "train.freeze": [],
    "lora.rank": 0,
    "fallback_teachers": [],
}
# Where the paper has bfloat16.
OTHERWISE: dict[str, Any] = {
    "model.params_dtype": "auto",  # bfloat16 on a GPU
    "train.optimizer_state_dtype": "float32",  # docs/algorithm.md says why
}


def values(config: RunConfig, keys: dict[str, Any]) -> dict[str, Any]:
    found = {}
    for key in keys:
        value: Any = config
        for name in key.split("."):
            value = getattr(value, name)
        found[key] = value
    return found


@pytest.fixture
def resolved(tmp_path: Path) -> RunConfig:
    path = tmp_path / "run.yaml"
    path.write_text("")
    return load_config(path)


def test_a_file_that_says_nothing_is_the_paper(resolved: RunConfig) -> None:
    assert values(resolved, PAPER) == PAPER
    assert values(resolved, OTHERWISE) == OTHERWISE


def test_the_evaluation_tool_samples_as_the_paper_does() -> None:
    ours = SAMPLING["paper"]
    assert ours == {key: PAPER[key] for key in ours}
    assert {key for key in PAPER if key.startswith("evaluation.")} <= set(ours)


@pytest.mark.parametrize("name", list(METHODS))
def test_updates_and_questions_of_every_method(tmp_path: Path, name: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(f"method: {name}\n")
    config = load_config(path)
    base = name.removesuffix("_replay")
    # The two distillation baselines update once per step, on the whole batch.
    assert config.train.updates_per_step == (1 if base in ("off_distill", "on_distill") else 4)
    # Hint and prefix ask the teacher only about what the pre-cap keeps.
    assert config.zone.asks_pre_capped == (base in ("hint", "prefix"))
    given = {key: value for key, value in PAPER.items() if key not in METHODS[name].settings}
    given["method"] = name
    assert values(config, given) == given


def test_together_with_a_kind_that_asks_about_all_hard_questions_all_are_asked() -> None:
    for options in (["method=zppo", "zone.hint=true"], ["method=inject", "zone.prefix=true"]):
        assert not load_config(None, options).zone.asks_pre_capped
    assert load_config(None, ["method=prefix", "zone.hint=true"]).zone.asks_pre_capped


def test_what_uses_the_bundled_teacher_compresses_by_rule() -> None:
    files = [*PRESETS_FOLDER.glob("*.yaml"), *EXAMPLES.glob("*/run.yaml")]
    bundled = [
        path
        for path in files
        if not (config := load_config(path)).teacher.model and config.zone.kinds
    ]
    assert {path.name for path in bundled} == {"tiny.yaml", "run.yaml"}
    assert [path for path in bundled if load_config(path).teacher.compressor != "rule"] == []
    own = set(files) - set(bundled)
    by_rule = [path.parent.name for path in own if load_config(path).teacher.compressor == "rule"]
    # The teachers cannot rewrite: one is the student, far too small, the other can only add.
    assert sorted(by_rule) == ["smollm2_additions", "smollm2_text"]
