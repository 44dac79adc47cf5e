"""From a command line to what is evaluated, on what, and how."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from zppo_mm.config.load import load_config
from zppo_mm.config.schema import EvaluationConfig, RunConfig
from zppo_mm.errors import ConfigError
from zppo_mm.run.build import student_folder
from zppo_mm.run_folder import RunFolder
from zppo_mm.training.checkpoint import latest

SAMPLING: dict[str, dict[str, float]] = {
    "greedy": {
        "evaluation.temperature": 0.0,
        "evaluation.top_p": 1.0,
        "evaluation.top_k": 0,
        "evaluation.min_p": 0.0,
        "evaluation.presence_penalty": 0.0,
    },
    "paper": {
        "evaluation.temperature": 0.6,
        "evaluation.top_p": 0.95,
        "evaluation.top_k": 20,
        "evaluation.min_p": 0.0,
        "evaluation.presence_penalty": 1.5,
        "rollout.max_response_tokens": 12288,
    },
}
"""Named ways to sample. Source: ZPPO (arXiv 2606.18216), evaluation."""
EVALUATIONS_FOLDER = "evaluations"
SUITE_FUNCTIONS = {
    "anls": "zppo_mm.rewards.ready.texts:anls",
    "relaxed": "zppo_mm.rewards.ready.readings:within_tolerance",
}
"""Reward functions of the scorings of benchmarks that have one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationRequest:
    """What the command line asks for.

    Attributes:
        model: A Hugging Face folder, or the folder of a finished run.
        data: Folders of shards and files of benchmarks; none means the held-out data of the run.
        suite: Name of declared benchmarks, or the folder of their declarations; `data` is then the
            one folder that has theirs.
        baseline: Results of the same suite, from which gains are counted.
        sampling: A name in `SAMPLING`; empty means the run's own settings, and `paper` for a
            Hugging Face folder.
        num_rollouts: Responses per question; 0 means the configuration's.
        output: Folder of the results; `None` means one named after the model.
        questions_per_chunk: Questions between two files of answers; 0 means a few batches.
        format: How files of benchmarks are read; empty means by their columns.
        fields: Columns of these files by part of a question.
        media_root: What media paths in these files start from; `None` means the folder of each.
        engine: What samples: `megatron`, this process, or `vllm`, servers of this very model at
            `rollout.endpoints`.
        options: `key.sub=value`, which take precedence over all of the above.
    """

    model: Path
    data: tuple[Path, ...] = ()
    suite: str = ""
    baseline: Path | None = None
    sampling: str = ""
    num_rollouts: int = 0
    output: Path | None = None
    questions_per_chunk: int = 0
    format: str = ""
    fields: Mapping[str, str] = field(default_factory=dict)
    media_root: Path | None = None
    engine: str = "megatron"
    options: tuple[str, ...] = ()


def read_config(request: EvaluationRequest) -> RunConfig:
    """Return the checked configuration of an evaluation; its student is the model that is
    evaluated.

    Raises:
        ConfigError: The folder is neither of the two, the run is not finished, there are no
            questions, or an option is wrong.
    """
    run = RunFolder(request.model)
    is_run = run.config.is_file()
    folder = _exported(run) if is_run else request.model
    if not (folder / "config.json").is_file():
        raise ConfigError(
            f"{request.model}: nothing to evaluate, got no config.json and no {run.config.name} in "
            "it, expected a Hugging Face folder or the folder of a run; check the path"
        )
    if not is_run and not request.data:
        raise ConfigError(
            f"{request.model}: no questions, got a Hugging Face folder and no --data, expected "
            "folders of shards or a file"
        )
    _check_suite(request)
    if (request.format or request.fields or request.media_root) and not any(
        path.is_file() for path in request.data
    ):
        raise ConfigError(
            "--format, --fields, --media-root: nothing to read by them, got no file in --data, "
            "expected one; leave them out"
        )
    layers = _layers(request, folder, is_run)
    # JSON is YAML, in which a path may look like a number.
    options = [*(f"{key}={json.dumps(value)}" for key, value in layers.items()), *request.options]
    config = load_config(run.config if is_run else None, options)
    if config.rollout.servers:
        raise ConfigError(
            f"rollout.servers: an evaluation starts no servers, got {config.rollout.servers}, "
            "expected 0; start one of the model (vllm serve) and name it in rollout.endpoints"
        )
    if student_folder(config.model) != folder:
        raise ConfigError(
            f"model.student: another model than the one to evaluate, got {config.model.student!r}, "
            f"expected {str(folder)!r}; name the folder as the first argument only"
        )
    return config


def _layers(request: EvaluationRequest, folder: Path, is_run: bool) -> dict[str, object]:
    """Return what an evaluation sets, by key; the options of the command line come after it."""
    # Bad questions are counted in the results instead of stopping; and no teacher has ranks here.
    layers: dict[str, object] = {"data.max_bad_fraction": 1.0, "model.student": str(folder)}
    layers |= {
        "teacher.num_ranks": 0,
        "teacher.tensor_model_parallel_size": 1,
        "teacher.pipeline_model_parallel_size": 1,
    }
    # The servers of a run that trains have its present weights.
    layers |= {
        "rollout.engine": request.engine,
        "rollout.endpoints": [],
        "rollout.servers": 0,
        "rollout.max_staleness": 0,
        "rollout.partial_rollouts": False,
    }
    if not is_run:
        # The preset's teacher cannot judge; a judge that is named can.
        layers["evaluation.judge"] = EvaluationConfig().judge
        layers["rollout.max_response_tokens"] = SAMPLING["paper"]["rollout.max_response_tokens"]
    layers |= SAMPLING[request.sampling or "paper"] if request.sampling or not is_run else {}
    if request.data:
        layers["evaluation.num_questions"] = 0
    if request.suite:
        layers |= {f"reward.functions.{name}": each for name, each in SUITE_FUNCTIONS.items()}
    if request.num_rollouts:
        layers["evaluation.num_rollouts"] = request.num_rollouts
    return layers


def _check_suite(request: EvaluationRequest) -> None:
    """Refuse a suite without its one folder, and what only a suite has.

    Raises:
        ConfigError: In both cases.
    """
    if request.suite and (len(request.data) != 1 or not request.data[0].is_dir()):
        raise ConfigError(
            f"--suite {request.suite}: no folder of benchmarks, got --data "
            f"{' '.join(map(str, request.data)) or 'nothing'}, expected the one folder that has a "
            "folder for each; name it with --data"
        )
    if request.baseline is not None and not request.suite:
        raise ConfigError(
            "--baseline: nothing to compare, got no --suite, expected one; leave it out"
        )


def output_folder(request: EvaluationRequest, output_dir: Path) -> Path:
    """Return where the results go."""
    folder = output_dir / EVALUATIONS_FOLDER / request.model.resolve().name
    return request.output or (folder / Path(request.suite).name if request.suite else folder)


def _exported(run: RunFolder) -> Path:
    """Return the trained model of a run.

    Raises:
        ConfigError: The run has not come to its end.
    """
    if run.hf.is_dir():
        return run.hf
    newest = latest(run.checkpoints)
    got = f"a newest checkpoint {newest.name}" if newest is not None else "no checkpoint either"
    raise ConfigError(
        f"{run}: the run is not finished, got no {run.hf.name}/ and {got}, expected an exported "
        "model; let it run to its end, or write its newest checkpoint as a Hugging Face folder and "
        f"evaluate that: tools/convert_checkpoint.py export {run} HF_DIR"
    )
