"""From the command line of tools/evaluate.py to the configuration of an evaluation."""

from __future__ import annotations

import shlex
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.support.tools import load_tool
from zppo_mm.bundled import STUDENT_DIR
from zppo_mm.config.load import load_config, save_config
from zppo_mm.errors import ConfigError
from zppo_mm.evaluation.settings import SAMPLING, EvaluationRequest, output_folder, read_config

ROOT = Path(__file__).parents[2]
SHARDS = (Path("shards"),)


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    return load_tool("evaluate")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Return the folder of a finished run with settings of its own."""
    folder = tmp_path / "123"
    folder.mkdir()
    save_config(
        load_config(None, ["evaluation.num_questions=7", "evaluation.temperature=0.3", "seed=5"]),
        folder / "config.yaml",
    )
    (folder / "hf").mkdir()
    (folder / "hf" / "config.json").write_text("{}")
    return folder


def sampling_of(request: EvaluationRequest) -> dict[str, Any]:
    config = read_config(request)
    keys = ("temperature", "top_p", "top_k", "min_p", "presence_penalty")
    named = {f"evaluation.{key}": getattr(config.evaluation, key) for key in keys}
    return named | {"rollout.max_response_tokens": config.rollout.max_response_tokens}


def test_words_behind_lists_go_where_they_belong(tool: ModuleType) -> None:
    words = (
        "m --data a b.json seed=1 --fields question=q media=m rollout.top_k=3 --sampling greedy "
        "--num-rollouts 4 parallel.x=2"
    )
    request = EvaluationRequest(**tool.parse(words.split()))
    assert (request.model, request.data, request.fields) == (
        Path("m"),
        (Path("a"), Path("b.json")),
        {"question": "q", "media": "m"},
    )
    assert (request.sampling, request.num_rollouts) == ("greedy", 4)
    assert sorted(request.options) == ["parallel.x=2", "rollout.top_k=3", "seed=1"]


def test_every_command_of_the_documents_is_accepted(tool: ModuleType) -> None:
    documents = [ROOT / "README.md", ROOT / "docs" / "evaluation.md"]
    shown = [
        line
        for document in documents
        for line in document.read_text(encoding="utf-8").replace("\\\n", " ").splitlines()
        if "tools/evaluate.py" in line
    ]
    commands = [
        shlex.split(line, comments=True)
        for line in shown
        if line.startswith(("python ", "torchrun "))
    ]
    assert len(commands) >= 5
    for words in commands:
        known = tool.parse(words[words.index("tools/evaluate.py") + 1 :])
        load_config(None, known["options"])


def test_counts_below_one_are_refused(tool: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    for option in ("--num-rollouts", "--questions-per-chunk"):
        with pytest.raises(SystemExit):
            tool.parse(["m", option, "0"])
        assert "no count, got 0, expected 1 or more" in capsys.readouterr().err


def test_a_folder_is_sampled_as_the_paper_does_by_default() -> None:
    assert sampling_of(EvaluationRequest(model=STUDENT_DIR, data=SHARDS)) == SAMPLING["paper"]
    greedy = EvaluationRequest(model=STUDENT_DIR, data=SHARDS, sampling="greedy")
    assert sampling_of(greedy) == SAMPLING["greedy"] | {"rollout.max_response_tokens": 12288}
    own = EvaluationRequest(
        model=STUDENT_DIR,
        data=SHARDS,
        options=("evaluation.min_p=0.1", "rollout.max_response_tokens=9"),
    )
    assert sampling_of(own) == SAMPLING["paper"] | {
        "evaluation.min_p": 0.1,
        "rollout.max_response_tokens": 9,
    }
    config = read_config(EvaluationRequest(model=STUDENT_DIR, data=SHARDS, num_rollouts=3))
    assert (
        config.evaluation.num_questions,
        config.evaluation.num_rollouts,
        config.data.max_bad_fraction,
    ) == (0, 3, 1.0)


def test_a_run_keeps_its_settings(run: Path) -> None:
    config = read_config(EvaluationRequest(model=run))
    assert (config.evaluation.num_questions, config.evaluation.temperature, config.seed) == (
        7,
        0.3,
        5,
    )
    assert config.model.student == str(run / "hf")
    assert read_config(EvaluationRequest(model=run, data=SHARDS)).evaluation.num_questions == 0
    assert read_config(EvaluationRequest(model=run, sampling="paper")).evaluation.temperature == 0.6
    assert output_folder(EvaluationRequest(model=run), Path(config.output_dir)) == Path(
        "runs/evaluations/123"
    )


def test_errors_say_what_to_do(run: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"nothing to evaluate, got no config\.json and no config\.yaml"
    ):
        read_config(EvaluationRequest(model=tmp_path / "gone", data=SHARDS))
    with pytest.raises(ConfigError, match=r"no questions, got a Hugging Face folder and no --data"):
        read_config(EvaluationRequest(model=STUDENT_DIR))
    with pytest.raises(
        ConfigError, match=r"model\.student: another model than the one to evaluate, got 'other'"
    ):
        read_config(
            EvaluationRequest(model=STUDENT_DIR, data=SHARDS, options=("model.student=other",))
        )
    with pytest.raises(
        ConfigError, match=r"unknown key, got evaluation\.topk.*did you mean evaluation\.top_k"
    ):
        read_config(
            EvaluationRequest(model=STUDENT_DIR, data=SHARDS, options=("evaluation.topk=3",))
        )
    with pytest.raises(
        ConfigError, match=r"--fields, --media-root: nothing to read by them, got no file in --data"
    ):
        read_config(EvaluationRequest(model=STUDENT_DIR, data=SHARDS, fields={"question": "q"}))
    (run / "hf").rename(run / "elsewhere")
    with pytest.raises(
        ConfigError,
        match=(
            r"the run is not finished, got no hf/ and no checkpoint either.*convert_checkpoint\.py "
            r"export"
        ),
    ):
        read_config(EvaluationRequest(model=run))
