"""No file of a user's folder can run code: distributed checkpoints, model folders,
configurations.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import Metadata

from tests.support import network_checks, tiny_qwen
from tests.support.tiny_folder import build_folder
from zppo_mm.config.load import load_config
from zppo_mm.config.schema import AlgorithmConfig, ParallelConfig, TrainConfig
from zppo_mm.conversion.exporting import export_folder
from zppo_mm.conversion.importing import import_folder
from zppo_mm.conversion.verify import Report, transformers_logits
from zppo_mm.errors import CheckpointError, ConfigError, ModelError
from zppo_mm.models.families.architecture import load_architecture
from zppo_mm.parallel import groups as parallel
from zppo_mm.rollout.chat import ChatFormat
from zppo_mm.training import checkpoint
from zppo_mm.training.checkpoint_files import RANDOM_FILE, SCHEDULE_FILE, STATE_FILE, publish
from zppo_mm.training.objective import PolicyObjective
from zppo_mm.training.policy import Policy
from zppo_mm.weights.checkpoint_metadata import METADATA_FILE, read_metadata

pytestmark = pytest.mark.usefixtures("one_rank")

LAYOUT = ParallelConfig()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_qwen.save(tiny_qwen.text_model(tied=True), tmp_path_factory.mktemp("source"))


class Runs:
    """Unpickled, it calls something."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def attacks(marker: Path) -> dict[str, Any]:
    code = f"open({str(marker)!r}, 'w').close()"
    import builtins

    return {
        "system": Runs(os.system, f"touch '{marker}'"),
        "eval": Runs(eval, code),
        "exec": Runs(builtins.exec, code),
        "getattr": Runs(getattr, Runs(__import__, "os"), "system"),
        "open": Runs(open, str(marker), "w"),
        "torch.load": Runs(torch.load, str(marker)),
        "write": Runs(shutil.copyfile, "/etc/hostname", str(marker)),
    }


ATTACKS = sorted(attacks(Path("none")))


def hidden_in(metadata: Metadata, attack: Any) -> Iterator[Any]:
    """Yield an attack alone and at every field of a real description where anything fits."""
    yield attack
    yield dataclasses.replace(metadata, planner_data=attack)
    yield dataclasses.replace(metadata, storage_meta=attack)
    (key, value), *_ = metadata.state_dict_metadata.items()
    yield dataclasses.replace(
        metadata, state_dict_metadata={**metadata.state_dict_metadata, key: [value, attack]}
    )
    yield {"metadata": metadata, "more": attack}


@pytest.mark.parametrize("name", ATTACKS)
@pytest.mark.medium
def test_a_hostile_description_is_refused_and_runs_nothing(
    source: Path, tmp_path: Path, marker: Path, name: str
) -> None:
    folder = tmp_path / "megatron"
    import_folder(source, folder, LAYOUT)
    sound = read_metadata(folder / METADATA_FILE)
    for number, content in enumerate(hidden_in(sound, attacks(marker)[name])):
        for protocol in (0, 2, 4, 5):
            (folder / METADATA_FILE).write_bytes(pickle.dumps(content, protocol))
            with pytest.raises(
                CheckpointError,
                match=(
                    r"\.metadata: the description of the checkpoint cannot be used, got Unpickling"
                ),
            ):
                export_folder(folder, tmp_path / "back", LAYOUT)
        assert not marker.exists(), (number, name)
    assert not list(tmp_path.glob("back*"))


@pytest.mark.parametrize(
    "name",
    [
        "os\nsystem",
        "builtins\neval",
        "torch\nload",
        "torch.serialization\nload",
        "pathlib\nPath.write_text",
        "torch\nSize.__class__",
    ],
)
def test_only_the_names_of_the_format_are_known(tmp_path: Path, name: str) -> None:
    (tmp_path / METADATA_FILE).write_bytes(f"c{name}\n.".encode())
    with pytest.raises(CheckpointError, match="is no part of a checkpoint's description"):
        read_metadata(tmp_path / METADATA_FILE)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x80\x04.",
        b"\x80\x02Nr\xff\xff\xff\xff.",
        pickle.dumps([1]),
        pickle.dumps(None),
        b"(" * 5000,
        b"\x80\x04]" + b"\x85" * 100_000 + b".",
    ],
)
def test_what_is_no_description_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / METADATA_FILE).write_bytes(content)
    with pytest.raises(CheckpointError, match="the description of the checkpoint cannot be used"):
        read_metadata(tmp_path / METADATA_FILE)


def changed(metadata: Metadata, **values: Any) -> Metadata:
    """Return a description in which the first tensor lies elsewhere."""
    (index, stored), *_ = metadata.storage_data.items()
    return dataclasses.replace(
        metadata,
        storage_data={**metadata.storage_data, index: dataclasses.replace(stored, **values)},
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"relative_path": "../secret"}, "a file outside the folder"),
        ({"relative_path": "/etc/passwd"}, "a file outside the folder"),
        ({"relative_path": "pipe"}, "no plain file"),
        ({"relative_path": "missing.distcp"}, "no plain file"),
        ({"offset": -1}, "a location at -1"),
        ({"length": 1 << 60}, r"got \d+ bytes, expected \d+ bytes"),
        ({"offset": "0"}, "a location at '0'"),
    ],
)
def test_a_description_cannot_point_anywhere(
    source: Path, tmp_path: Path, values: dict[str, Any], message: str
) -> None:
    folder = tmp_path / "megatron"
    import_folder(source, folder, LAYOUT)
    os.mkfifo(folder / "pipe")
    sound = read_metadata(folder / METADATA_FILE)
    (folder / METADATA_FILE).write_bytes(pickle.dumps(changed(sound, **values)))
    with pytest.raises(CheckpointError, match=message):
        export_folder(folder, tmp_path / "back", LAYOUT)


def hostile_bytes(marker: Path) -> bytes:
    box = io.BytesIO()
    torch.save(attacks(marker)["system"], box)
    return box.getvalue()


def test_objects_beside_the_tensors_are_not_opened(
    source: Path, tmp_path: Path, marker: Path
) -> None:
    folder = tmp_path / "megatron"
    import_folder(source, folder, LAYOUT)
    (folder / "common.pt").write_bytes(hostile_bytes(marker))
    sound = read_metadata(folder / METADATA_FILE)
    stored = next(iter(sound.storage_data.values()))
    hostile = hostile_bytes(marker)
    (folder / "objects.distcp").write_bytes(hostile)
    objects = {
        index: dataclasses.replace(
            stored, relative_path="objects.distcp", offset=0, length=len(hostile)
        )
        for index in sound.storage_data
        if "_extra_state" in index.fqn
    }
    assert objects, "Megatron keeps objects beside the tensors"
    (folder / METADATA_FILE).write_bytes(
        pickle.dumps(dataclasses.replace(sound, storage_data={**sound.storage_data, **objects}))
    )
    export_folder(folder, tmp_path / "back", LAYOUT)
    assert (tmp_path / "back" / "config.json").is_file()
    # A hostile object instead of a tensor.
    tensors = {
        index: next(iter(objects.values()))
        for index in sound.storage_data
        if "_extra_state" not in index.fqn
    }
    (folder / METADATA_FILE).write_bytes(
        pickle.dumps(dataclasses.replace(sound, storage_data={**sound.storage_data, **tensors}))
    )
    with pytest.raises(CheckpointError, match="the checkpoint cannot be read, got UnpicklingError"):
        export_folder(folder, tmp_path / "again", LAYOUT)


def sealed_again(path: Path) -> None:
    """Give a changed checkpoint the manifest that fits it."""
    (path / "manifest.json").unlink()
    path.rename(path.with_name(".changed"))
    publish(path.with_name(".changed"), path, {}, keep=5)


def saved_run(source: Path, tmp_path: Path) -> tuple[Policy, Path]:
    """Return a policy and its only checkpoint."""
    policy = Policy(
        network_checks.build(source, LAYOUT),
        TrainConfig(),
        LAYOUT,
        PolicyObjective(AlgorithmConfig(), 1.0, parallel.tensor_group()),
    )
    path = checkpoint.save(tmp_path / "checkpoints", 1, policy, {"step": 1}, keep=1)
    return policy, path


@pytest.mark.parametrize("file", [METADATA_FILE, RANDOM_FILE, STATE_FILE, SCHEDULE_FILE])
def test_a_hostile_checkpoint_of_a_run_is_refused_and_runs_nothing(
    source: Path, tmp_path: Path, marker: Path, file: str
) -> None:
    policy, path = saved_run(source, tmp_path)
    assert checkpoint.load_latest(tmp_path / "checkpoints", policy) == {"step": 1}
    hostile = (
        pickle.dumps(attacks(marker)["system"]) if file == METADATA_FILE else hostile_bytes(marker)
    )
    for content in (hostile, b"[" * 100_000, b"null"):
        (path / file).write_bytes(content)
        sealed_again(path)
        with pytest.raises(CheckpointError, match=file):
            checkpoint.load_latest(tmp_path / "checkpoints", policy)


@pytest.mark.parametrize(
    ("file", "content", "problem"),
    [
        (SCHEDULE_FILE, b'{"num_updates": 1, "scheduler": null}', "got TypeError"),
        (SCHEDULE_FILE, b'{"num_updates": 1, "scheduler": {}}', "got KeyError"),
        (
            RANDOM_FILE,
            [{"device": "cpu", "torch": torch.zeros(3), "streams": {}}],
            "got TypeError",
        ),
        (
            STATE_FILE,
            b'{"another": "version"}',
            "got KeyError: 'step', expected what a run of this version saves",
        ),
        (
            SCHEDULE_FILE,
            None,
            "saved by another version of this program, got no schedule.json",
        ),
    ],
)
def test_a_checkpoint_of_another_version_is_refused(
    source: Path, tmp_path: Path, file: str, content: Any, problem: str
) -> None:
    policy, path = saved_run(source, tmp_path)
    if content is None:
        (path / file).unlink()
    elif isinstance(content, bytes):
        (path / file).write_bytes(content)
    else:
        torch.save(content, path / file)
    sealed_again(path)
    with pytest.raises(CheckpointError, match=problem):
        checkpoint.load_latest(tmp_path / "checkpoints", policy, lambda state: state["step"])


HOSTILE_MODULE = "open({marker!r}, 'w').close()\nclass Evil: pass\n"


def hostile_folder(source: Path, target: Path, marker: Path) -> Path:
    """Return a model folder that names its own code wherever transformers would look for it."""
    shutil.copytree(source, target)
    (target / "evil.py").write_text(HOSTILE_MODULE.format(marker=str(marker)))
    kinds = (
        "AutoConfig",
        "AutoModelForCausalLM",
        "AutoModelForImageTextToText",
        "AutoModel",
        "AutoProcessor",
        "AutoTokenizer",
    )
    for name in ("config.json", "tokenizer_config.json"):
        path = target / name
        content = json.loads(path.read_text()) if path.exists() else {}
        content["auto_map"] = {
            kind: ["evil.Evil", "evil.Evil"] if kind == "AutoTokenizer" else "evil.Evil"
            for kind in kinds
        }
        if name == "tokenizer_config.json":
            content["tokenizer_class"] = "EvilTokenizer"
        path.write_text(json.dumps(content))
    return target


def test_code_in_a_model_folder_is_not_imported(source: Path, tmp_path: Path, marker: Path) -> None:
    folder = hostile_folder(source, tmp_path / "hostile", marker)
    architecture = load_architecture(folder)
    network_checks.build(folder, LAYOUT)
    transformers_logits(folder, architecture, [], Report(), torch.float32)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "evil"}))
    with pytest.raises(ModelError):
        transformers_logits(folder, architecture, [], Report(), torch.float32)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("attn_implementation", "someone/kernels"),
        ("attn_implementation", "flash_attention_2"),
        ("_attn_implementation", "someone/kernels"),
        ("_attn_implementation", "flash_attention_2"),
        ("return_dict", False),
        ("output_hidden_states", True),
    ],
)
@pytest.mark.medium
def test_how_a_network_is_run_is_not_the_folders_to_say(
    source: Path, tmp_path: Path, key: str, value: object
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, key: value}))
    report = Report()
    transformers_logits(folder, load_architecture(folder), [], report, torch.float32)
    assert report.good


def test_adapters_beside_the_weights_are_not_applied(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(source, folder)
    (folder / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": "someone/else", "peft_type": "LORA"})
    )
    report = Report()
    transformers_logits(folder, load_architecture(folder), [], report, torch.float32)
    assert report.good


def test_code_beside_a_tokenizer_is_not_imported(tmp_path: Path, marker: Path) -> None:
    build_folder(tmp_path / "chat", vision=False)
    folder = hostile_folder(tmp_path / "chat", tmp_path / "hostile", marker)
    # Whether transformers falls back on its own class or refuses is its affair.
    with contextlib.suppress(ValueError):
        ChatFormat(folder).render("a question", [])


@pytest.mark.parametrize(
    "tag",
    ["!!python/object/apply:os.system", "!!python/name:os.system", "!!python/object/new:os.system"],
)
def test_a_configuration_runs_nothing(tmp_path: Path, marker: Path, tag: str) -> None:
    (tmp_path / "config.yaml").write_text(f"name: {tag} ['touch {marker}']\n")
    with pytest.raises(ConfigError):
        load_config(tmp_path / "config.yaml")
