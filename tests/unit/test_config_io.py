"""Configuration: order of the layers, errors that name their origin, writing and reading back,
quick help.
"""

from __future__ import annotations

import operator
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest

from tests.support.running import run_python
from zppo_mm.config.help import describe_methods, describe_options, reference_page
from zppo_mm.config.load import load_config, save_config
from zppo_mm.config.schema import RunConfig
from zppo_mm.errors import ConfigError
from zppo_mm.methods import METHODS

OVERLAP = ("rollout.max_staleness=1", "rollout.engine=vllm", "rollout.servers=1")

"""Importing torch alone takes several seconds; the help measures 0.2 s, the rest is room for a busy
machine.
"""


def every_key(group: object, prefix: str = "") -> list[str]:
    keys = []
    for field in fields(group):  # type: ignore[arg-type]
        value = getattr(group, field.name)
        keys += (
            every_key(value, f"{prefix}{field.name}.")
            if is_dataclass(value)
            else [prefix + field.name]
        )
    return keys


def test_bundled_preset_applies_only_without_a_file(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("seed: 3\n")
    assert load_config(None).train.num_new_questions == 16
    assert load_config(path).train == RunConfig().train
    assert load_config(path).seed == 3


def test_later_sources_take_precedence(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("method: grpo\nzone: {ncq: true}\ntrain: {lr: 0.1, clip_grad: 2}\n")
    config = load_config(
        path,
        ["train.lr=1e-6", "train.lr=2e-6", "modality=video", "data.train=[{path: a, weight: 2}]"],
    )
    assert config.train.lr == 2e-6
    assert config.train.clip_grad == 2.0
    assert (config.zone.bcq, config.zone.ncq, config.zone.replay) == (False, True, False)
    assert config.modality == "video"
    assert config.data.train[0].weight == 2.0


@pytest.mark.parametrize("method", METHODS)
def test_method_sets_its_keys_and_an_override_before_it_takes_precedence(method: str) -> None:
    config = load_config(None, ["zone.bcq=false", f"method={method}"])
    expected = {**METHODS[method].settings, "zone.bcq": False}
    assert {key: operator.attrgetter(key)(config) for key in expected} == expected


def test_every_method_is_there_with_and_without_replay() -> None:
    parts = {"grpo", "bcq", "ncq", "hint", "prefix", "inject", "off_distill", "on_distill"}
    assert set(METHODS) == {*parts, *(f"{part}_replay" for part in parts), "bcq_ncq", "zppo"}
    assert METHODS["zppo"].settings == {**METHODS["bcq_ncq"].settings, "zone.replay": True}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["method=on_distill", "zone.bcq=true"],
            "distill.source: distillation trains on no reformulated prompt, got 'student' with "
            "zone.bcq",
        ),
        (["method=off_distill", "zone.max_sampling_rounds=2"], "distillation uses no rewards"),
        (["method=off_distill", "algorithm.importance_cap=2"], "distillation uses no rewards"),
        (["rollout.partial_rollouts=true"], "nothing is under way when the weights change"),
        (["rollout.max_staleness=1"], "the network cannot sample while it trains"),
        (
            [*OVERLAP, "method=on_distill"],
            "distillation corrects nothing for rollouts of earlier weights, got 1 .*'student'",
        ),
        (
            [*OVERLAP, "algorithm.importance_level=none"],
            "rollouts of earlier weights need importance weights",
        ),
        (
            ["method=on_distill", "algorithm.rejection_bound=1.1"],
            "distillation uses no rewards.*algorithm.rejection_bound, expected",
        ),
        (
            ["algorithm.importance_level=none", "algorithm.importance_cap=2"],
            "algorithm.importance_cap: nothing is weighted, got 2 with .*'none'",
        ),
        (
            ["algorithm.rejection_bound=1"],
            "algorithm.rejection_bound: would reject every response, got 1, expected 0 or more",
        ),
        (
            ["algorithm.rejection_token_bound=0.5"],
            "algorithm.rejection_token_bound: would reject every response, got 0.5",
        ),
        (
            ["method=on_distill", "fallback_teachers=[{model: x}]"],
            "fallback_teachers: distillation has one teacher, got 1 more",
        ),
        (
            ["fallback_teachers=[{compressor: rule}]"],
            r"fallback_teachers\[0\].compressor: only the first teacher has this key, got",
        ),
        (
            ["method=ncq_replay", "fallback_teachers=[{model: x}]"],
            "fallback_teachers: none would be asked, got 1 .*one of zone.bcq, zone.hint",
        ),
        (["distill.top_k=4"], "distill.top_k: nothing is distilled, got 4"),
        (
            ["fallback_teachers=[{num_rollouts: 0}]"],
            r"fallback_teachers\[0\].num_rollouts: out of range, got 0",
        ),
        (
            ["fallback_teachers=[{video: none}]"],
            r"fallback_teachers\[0\].video: not a choice, got 'none'",
        ),
        (
            ["fallback_teachers=[{endpoints: ['http://x/v1']}]"],
            r"fallback_teachers\[0\].model: missing",
        ),
        (
            ["fallback_teachers=[{num_ranks: 1}]"],
            r"fallback_teachers\[0\].num_ranks: only the first teacher",
        ),
    ],
)
def test_methods_that_contradict_themselves_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(None, overrides)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["teacher.endpoints=['http://x/v1']", "teacher.model=t"],
            "teacher.num_ranks: a served teacher needs no ranks, got 3 with 1 endpoints",
        ),
        (
            ["teacher.tensor_model_parallel_size=2"],
            "teacher.num_ranks: cannot be split into tensor 2 x pipeline 1, got 3, .*multiple of 2",
        ),
        (
            ["teacher.num_ranks=0", "teacher.pipeline_model_parallel_size=2"],
            "for a teacher on its own ranks, got tensor 1 x pipeline 2",
        ),
        (
            ["reward.judge_max_wait_seconds=600"],
            "reward.judge_max_wait_seconds: too long, got 600, expected less than the 600 s",
        ),
    ],
)
def test_teacher_ranks_that_cannot_be_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(None, ["teacher.num_ranks=3", *overrides])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "train.lrr=3",
            r"argument `train.lrr=3`: unknown key, got train.lrr, .*did you mean train.lr\?",
        ),
        ("trian.lr=1", r"unknown key, got trian, .*did you mean train\?"),
        ("num_new_questions=1", r"did you mean train.num_new_questions\?"),
        (
            "data.train=[{path: x, wieght: 2}]",
            r"got data.train.wieght, .*did you mean data.train.weight\?",
        ),
        ("qqqqqq=1", r"got qqqqqq, .*see --help"),
        ("train.lr=abc", r"argument `train.lr=abc`: train.lr has the wrong type"),
        ("train.train_iters=1.5", "train.train_iters has the wrong type"),
        ("train.train_iters=true", "train.train_iters has the wrong type"),
        ("zone.bcq=maybe", "zone.bcq has the wrong type"),
        ("name=null", "name has the wrong type"),
        ("train=3", "argument `train=3`: .*wrong type"),
        ("train.lr.x=3", "train.lr has the wrong type"),
        ("foo", "not an option, got 'foo', expected key=value"),
        ("a..b=3", "not an option"),
        ("train.lr=[", "not valid YAML"),
        ("name=${nope}", "Interpolation key 'nope' not found"),
        ("method=zpo", r"unknown method, got 'zpo', expected one of grpo, .*did you mean zppo\?"),
        ("method=[zppo]", "unknown method"),
        ("modality=audio", "modality: not a choice, got 'audio', expected one of 'text'"),
        ("zone.tau=1.5", "zone.tau: out of range, got 1.5, expected at least 0 and at most 1"),
        (
            "rollout.top_p=0",
            "rollout.top_p: out of range, got 0.0, expected more than 0 and at most 1",
        ),
        ("train.adam_beta1=1", "expected at least 0 and less than 1"),
        ("algorithm.clip_ratio_c=1", "expected more than 1"),
        ("train.lr=.nan", "train.lr: out of range, got nan"),
        ("train.lr=.inf", "train.lr: out of range, got inf"),
        (
            "observability.profile_steps=[3, 0]",
            r"observability\.profile_steps: out of range, got 0, expected at least 1; correct it",
        ),
        # YAML reads `on` as true, which is why the choices are other words.
        (
            "train.share_prompts=on",
            "train.share_prompts: not a choice, got 'True', expected one of 'auto', 'always', "
            "'never'",
        ),
        (
            "train.num_new_questions=15",
            "train.num_new_questions: does not split into equal updates, got 15 questions for 2 "
            "updates",
        ),
        (
            "train.freeze=[vison]",
            "train.freeze: not a choice, got 'vison', expected one of 'vision'",
        ),
        ("train.freeze=[vision,projector,language]", "at most two of vision, projector, language"),
        ("parallel.sequence_parallel=true", "parallel.sequence_parallel: needs tensor parallelism"),
        ("name=a/b", "name: not a folder name, got 'a/b'"),
        ("data.train=[{weight: 1}]", r"data.train\[0\].path: missing"),
        ("data.held_out=[{path: x, weight: 0}]", r"data.held_out\[0\].weight: out of range"),
    ],
)
def test_wrong_override_is_named(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(None, [override])


def test_fp8_without_transformer_engine_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"model\.fp8: needs Transformer Engine"):
        load_config(None, ["model.fp8=e4m3", "model.transformer_impl=local"])


@pytest.mark.parametrize("other", ["model.transformer_impl=transformer_engine", "model.fp8=e4m3"])
def test_context_parallelism_with_transformer_engine_is_refused(other: str) -> None:
    with pytest.raises(
        ConfigError,
        match=r"parallel\.context_parallel_size: not with Transformer Engine's layers, got 2",
    ):
        load_config(None, ["parallel.context_parallel_size=2", other])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("train: {lrr: 1}\n", r"run.yaml: unknown key, got train.lrr"),
        ("- 1\n", "run.yaml: the root is wrong, got a list"),
        ("train: [\n", "run.yaml: not valid YAML"),
        ("seed: 1\nseed: 2\n", "run.yaml: not valid YAML: .*duplicate"),
        ("train: {lr: fast}\n", "run.yaml: train.lr has the wrong type"),
    ],
)
def test_wrong_file_is_named(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError, match="(?s)" + message):
        load_config(path)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no\.yaml: cannot be read \(No such file"):
        load_config(tmp_path / "no.yaml")


def test_empty_value_is_the_empty_string() -> None:
    assert load_config(None, ["name=x", "name="]).name == ""


def test_written_config_reads_equal(tmp_path: Path) -> None:
    config = load_config(
        None,
        [
            "method=bcq_replay",
            "zone.ncq=true",
            "train.lr=1.23456789e-7",
            "train.freeze=[vision]",
            "data.train=[{path: 'a b'}]",
            "name=true",
            "model.student=1.0",
        ],
    )
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


def test_empty_file_is_the_paper(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("")
    assert load_config(tmp_path / "run.yaml") == RunConfig()


def test_help_describes_every_key_with_its_meaning() -> None:
    text = describe_options()
    for key in every_key(RunConfig()):
        assert f"  {key}  " in text
    assert (
        "train.lr  float = 1e-06\n      Learning rate, the highest one where it rises or falls. "
        "[at least 0]"
    ) in text


def test_help_names_every_method() -> None:
    lines = [line.split()[0] for line in describe_methods().splitlines()]
    assert lines == list(METHODS)


def test_reference_page_is_what_the_declarations_say() -> None:
    page = (Path(__file__).parents[2] / "docs/configuration.md").read_text()
    assert page == reference_page(), (
        "stale; run python -m zppo_mm.config.help > docs/configuration.md"
    )


def test_help_imports_no_torch() -> None:
    program = (
        "import sys; from zppo_mm.config.help import describe_options; from zppo_mm.config.load "
        "import load_config\ndescribe_options(); load_config(None)\nprint(sorted({'torch', "
        "'numpy', 'transformers'} & set(sys.modules)))"
    )
    run = run_python("-c", program)
    assert run.stdout.strip() == "[]", run.stderr


@pytest.mark.parametrize(
    "path",
    sorted((Path(__file__).parents[2] / "examples").rglob("run.yaml")),
    ids=lambda path: path.parent.name,
)
def test_every_example_loads(path: Path) -> None:
    load_config(path)
