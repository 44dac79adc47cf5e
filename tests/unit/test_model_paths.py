"""A model path that is none is answered in one line with what to write instead."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from zppo_mm.bundled import STUDENT_DIR
from zppo_mm.config.load import load_config
from zppo_mm.errors import ConfigError, ZppoError
from zppo_mm.run.model_paths import check_model_path, check_model_paths

RUN_CONVERSION = "convert_checkpoint.py export {root}/run HF_DIR"
MEGATRON_CONVERSION = "convert_checkpoint.py export {root}/megatron HF_DIR"


@pytest.mark.parametrize(
    ("files", "given", "found", "advice"),
    [
        (["model.safetensors"], "model.safetensors", "a file", "give its folder, {root}"),
        (
            ["run/config.yaml", "run/hf/config.json"],
            "run",
            "the folder of a run",
            "give its exported model, {root}/run/hf",
        ),
        (["run/config.yaml"], "run", "the folder of a run that is not finished", RUN_CONVERSION),
        (
            ["run/checkpoints/step_000004/manifest.json"],
            "run/checkpoints/step_000004",
            "a checkpoint of a run",
            RUN_CONVERSION,
        ),
        (["megatron/.metadata"], "megatron", "a Megatron folder", MEGATRON_CONVERSION),
        (
            ["megatron/iter_0000010/mp_rank_00/model_optim_rng.pt"],
            "megatron",
            "a Megatron folder",
            MEGATRON_CONVERSION,
        ),
        (
            ["models--a--b/snapshots/0af3/config.json"],
            "models--a--b",
            "a folder without config.json",
            "give {root}/models--a--b/snapshots/0af3, which has one",
        ),
        (
            ["models/student/config.json"],
            "models",
            "a folder without config.json",
            "give {root}/models/student, which has one",
        ),
        (
            ["adapter/adapter_config.json"],
            "adapter",
            "adapters without their model",
            "give the folder of the merged model",
        ),
        (
            ["model/config.json", "model/pytorch_model.bin"],
            "model",
            "a folder with weights that are not read here (pytorch_model.bin)",
            "model.safetensors",
        ),
        (["model/config.json"], "model", "a folder with no weights", "model.safetensors"),
        (
            ["model/config.json", "model/model.safetensors"],
            "model",
            "a folder without a tokenizer",
            "copy the model's tokenizer.json",
        ),
        ([], "", "a folder without config.json", "correct the path"),
    ],
)
def test_what_is_there_but_no_model(
    files: list[str], given: str, found: str, advice: str, tmp_path: Path
) -> None:
    for name in files:
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("{}", encoding="utf-8")
    path = tmp_path / given
    with pytest.raises(ConfigError) as raised:
        check_model_path("teacher.model", str(path), "teacher.endpoints")
    text = str(raised.value)
    assert text.startswith(
        f"teacher.model: {found}, got '{path}', expected a Hugging Face folder; "
    )
    assert advice.format(root=tmp_path) in text
    assert "teacher.endpoints" not in text  # what is there is no served name
    assert "\n" not in text


@pytest.mark.parametrize(
    ("value", "found", "advice"),
    [
        (
            "Qwen/Qwen3.5-0.8B",
            "nothing is downloaded",
            "hf download Qwen/Qwen3.5-0.8B --local-dir models/Qwen3.5-0.8B",
        ),
        ("Qwen3.5-27B", "no such folder", "correct the path"),
        ("models/typo/deeper", "no such folder", "correct the path"),
        ("https://huggingface.co/Qwen/Qwen3.5-0.8B", "an address", "give its folder"),
        ("s3://bucket/model", "an address", "give its folder"),
        ("null\0byte", "no such folder", "correct the path"),
        ("x" * 5000, "cannot be read (File name too long)", "correct its permissions or the path"),
    ],
)
def test_what_is_not_there(value: str, found: str, advice: str) -> None:
    for key, endpoints in (("model.student", ""), ("teacher.model", "teacher.endpoints")):
        with pytest.raises(ConfigError, match=f"^{key}: ") as raised:
            check_model_path(key, value, endpoints)
        text = str(raised.value)
        assert found in text
        assert advice in text
        if found.startswith("no"):
            assert (
                "or set teacher.endpoints if this is the name of a served model" in text
            ) == bool(endpoints)


def test_a_real_folder_is_taken_and_its_faults_are_those_of_inspect(tmp_path: Path) -> None:
    check_model_path("model.student", str(STUDENT_DIR))
    copy = shutil.copytree(STUDENT_DIR, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "model_type": "gpt2"}))
    with pytest.raises(ZppoError, match=r"config.json: model_type is not supported, got 'gpt2'"):
        check_model_path("model.student", str(copy))
    (copy / "config.json").write_text(json.dumps(config))
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ZppoError, match=r"model\.safetensors"):
        check_model_path("model.student", str(copy))


def test_every_model_of_a_run_is_looked_at() -> None:
    def check(options: list[str]) -> None:
        config = load_config(None, options)
        check_model_paths(config.model, [config.teacher, *config.fallback_teachers])

    check([])
    served = ["teacher.endpoints=['http://a/v1']", "teacher.model=Large/One"]
    check(served)
    for options, named in (
        (["model.student=nowhere"], "model.student"),
        (["teacher.model=nowhere"], "teacher.model: .*set teacher.endpoints"),
        (
            [*served, "fallback_teachers=[{model: nowhere}]"],
            r"fallback_teachers\[0\].model: .*set fallback_teachers\[0\].endpoints",
        ),
    ):
        with pytest.raises(ConfigError, match=named):
            check(options)


def test_a_configuration_without_end_is_not_read_whole(tmp_path: Path) -> None:
    copy = tmp_path / "model"
    shutil.copytree(STUDENT_DIR, copy)
    with open(copy / "config.json", "wb") as stream:
        stream.truncate(1 << 40)
    with pytest.raises(
        ZppoError, match=r"config\.json: cannot be read as JSON, got more than 67108864 bytes"
    ):
        check_model_path("model.student", str(copy))
