"""Import and export of whole folders: every byte comes back, and what goes wrong leaves nothing
that looks whole.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support import network_checks, tiny_families, tiny_qwen
from tests.support.conversion_checks import LAYOUT, check_opens, content, released
from tests.support.tiny_fp8 import LINEARS, quantise
from zppo_mm.config.load import save_config
from zppo_mm.config.schema import ModelConfig, RunConfig, TrainConfig
from zppo_mm.conversion.choosing import Choice
from zppo_mm.conversion.exporting import export_folder
from zppo_mm.conversion.importing import import_folder
from zppo_mm.errors import CheckpointError, ModelError
from zppo_mm.models.families.architecture import load_architecture
from zppo_mm.models.provider import build_model
from zppo_mm.observability.sinks import append_line
from zppo_mm.parallel import groups as parallel
from zppo_mm.run_folder import RunFolder
from zppo_mm.training import checkpoint
from zppo_mm.training.objective import PolicyObjective
from zppo_mm.training.policy import Policy
from zppo_mm.weights import tensor_shards
from zppo_mm.weights.hf_export import export_hf_weights
from zppo_mm.weights.mapping import load_hf_weights
from zppo_mm.weights.safetensors_folder import SafetensorsFolder

pytestmark = pytest.mark.usefixtures("one_rank")

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return released(tmp_path_factory.mktemp("released") / "source")


def test_import_and_export_give_the_same_bytes(source: Path, tmp_path: Path) -> None:
    import_folder(source, tmp_path / "megatron", LAYOUT)
    # The source is not needed any more.
    (tmp_path / "megatron").rename(tmp_path / "moved")
    export_folder(tmp_path / "moved", tmp_path / "back", LAYOUT)
    assert content(tmp_path / "back") == content(source)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "moved"]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", tiny_families.KINDS)
@pytest.mark.medium
def test_every_family_comes_back(family: str, tied: bool, tmp_path: Path) -> None:
    folder, _ = tiny_families.folder(family, tmp_path / "source", tied=tied)
    import_folder(folder, tmp_path / "megatron", LAYOUT)
    export_folder(tmp_path / "megatron", tmp_path / "back", LAYOUT)
    assert content(tmp_path / "back") == content(folder)


def test_an_exported_network_gives_the_same_bytes(source: Path, tmp_path: Path) -> None:
    export_hf_weights(network_checks.build(source, LAYOUT), source, tmp_path / "back")
    assert content(tmp_path / "back") == content(source)


def test_a_quantised_folder_comes_back_plain(tmp_path: Path) -> None:
    folder = tiny_qwen.save(
        tiny_qwen.vision_language_model(tied=True).to(torch.bfloat16), tmp_path / "fp8"
    )
    quantise(folder, LINEARS)
    plain = SafetensorsFolder(folder)
    import_folder(folder, tmp_path / "megatron", LAYOUT)
    export_folder(tmp_path / "megatron", tmp_path / "back", LAYOUT)
    export_hf_weights(network_checks.build(folder, LAYOUT), folder, tmp_path / "direct")
    assert content(tmp_path / "back") == content(tmp_path / "direct")
    found = load_file(tmp_path / "back" / "model.safetensors")
    assert found.keys() == plain.weight_map.keys()
    assert all(
        tensor.equal(plain.read(key)) and tensor.dtype == torch.bfloat16
        for key, tensor in found.items()
    )
    before, after = (
        json.loads((path / "config.json").read_text()) for path in (folder, tmp_path / "back")
    )
    assert list(after) == [key for key in before if key != "quantization_config"]
    assert after == {**{key: before[key] for key in after}, "dtype": "bfloat16"}
    assert not SafetensorsFolder(tmp_path / "back").is_quantised


def test_the_index_of_a_quantised_folder_is_rewritten(tmp_path: Path) -> None:
    folder = tiny_qwen.save(tiny_qwen.text_model(tied=True).to(torch.bfloat16), tmp_path / "fp8")
    quantise(folder, LINEARS)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = {
        key: "b.safetensors" if key.endswith("_scale_inv") else "a.safetensors" for key in tensors
    }
    for name in set(names.values()):
        save_file(
            {key: tensor for key, tensor in tensors.items() if names[key] == name}, folder / name
        )
    index = {"metadata": {"total_size": 1, "total_parameters": 5}, "weight_map": names}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    export_hf_weights(network_checks.build(folder, LAYOUT), folder, tmp_path / "back")
    found = json.loads((tmp_path / "back" / "model.safetensors.index.json").read_text())
    written = load_file(tmp_path / "back" / "a.safetensors")
    assert found["weight_map"] == dict.fromkeys(written, "a.safetensors")
    assert found["metadata"] == {
        "total_size": sum(tensor.nbytes for tensor in written.values()),
        "total_parameters": 5,
    }
    assert not (tmp_path / "back" / "b.safetensors").exists()


@pytest.mark.parametrize("chunk_bytes", [1, 1000, tensor_shards.CHUNK_BYTES])
@pytest.mark.medium
def test_an_imported_folder_opens_as_a_runs_checkpoint_does(
    source: Path, tmp_path: Path, chunk_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensor_shards, "CHUNK_BYTES", chunk_bytes)
    import_folder(source, tmp_path / "megatron", LAYOUT)
    check_opens(tmp_path / "megatron", network_checks.build(source, LAYOUT), LAYOUT)


def run_folder(source: Path, folder: Path) -> dict[str, torch.Tensor]:
    """Write the output of a run after one and two steps; returns its weights."""
    config = RunConfig(model=ModelConfig(student=str(source), params_dtype="float32"))
    network = build_model(load_architecture(source), config.model, LAYOUT)
    load_hf_weights(network, source)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.5)
    policy = Policy(
        network,
        TrainConfig(),
        LAYOUT,
        PolicyObjective(config.algorithm, 1.0, parallel.tensor_group()),
    )
    folder.mkdir(parents=True)
    save_config(config, folder / "config.yaml")
    for step in (1, 2):
        state = {"step": step, "config": asdict(config)}
        checkpoint.save(RunFolder(folder).checkpoints, step, policy, state, keep=2)
        export_hf_weights(network, source, folder / f"hf_{step}")
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(0.5 * (step == 1))
    return dict(network.named_parameters())


def test_a_checkpoint_of_a_run_is_exported(source: Path, tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    run_folder(source, run.path)
    append_line(run.evaluations, {"step": 1, "accuracy": 0.5})
    append_line(run.evaluations, {"step": 2, "accuracy": 0.4})
    first, second = content(run.path / "hf_1"), content(run.path / "hf_2")
    assert first != second != content(source) != first
    choices: tuple[tuple[Choice, object], ...] = (
        ("newest", second),
        (1, first),
        ("best", first),
    )
    for choice, wanted in choices:
        export_folder(run.path, tmp_path / "back", LAYOUT, choice)
        assert content(tmp_path / "back") == wanted
    damaged = next((run.checkpoints / "step_000002").glob("*.distcp"))
    damaged.write_bytes(damaged.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"\.distcp: the checkpoint is incomplete"):
        export_folder(tmp_path / "run", tmp_path / "again", LAYOUT)
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    with pytest.raises(CheckpointError, match="the run has no checkpoint"):
        export_folder(tmp_path / "run", tmp_path / "again", LAYOUT)
    assert not (tmp_path / "again").exists()


def test_a_folder_that_is_neither_is_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="nothing to export, got no imported folder and no run"):
        export_folder(source, tmp_path / "back", LAYOUT)


def damage(folder: Path, kind: str) -> str:
    """Break a copy of the source; returns what the message must say."""
    files = sorted(folder.glob("*.safetensors"))
    key = "model.language_model.layers.1.mlp.down_proj.weight"
    file = next(file for file in files if key in load_file(file))
    if kind == "missing file":
        file.unlink()
        return rf"{file.name}: the file is missing"
    if kind == "truncated":
        file.write_bytes(file.read_bytes()[:-10])
        return (
            rf"{file.name}: cannot be read as safetensors, got \d+ bytes, too few for the key \S+, "
            rf"expected"
        )
    tensors = load_file(file)
    if kind == "shape":
        tensors[key] = tensors[key][:, 1:].contiguous()
        message = (
            rf"{file.name}: the shape of {key} does not fit, got \[64, 95\], expected \[64, 96\]"
        )
    elif kind == "unknown key":
        tensors["model.language_model.strange"] = torch.zeros(1)
        message = rf"{file.name}: the key model\.language_model\.strange belongs to nothing"
    else:
        del tensors[key]
        message = rf"{file.name}: the key {key} is missing"
    save_file(tensors, file, metadata={"format": "pt"})
    return message


@pytest.mark.parametrize(
    "kind", ["missing file", "truncated", "shape", "unknown key", "missing key"]
)
def test_a_damaged_source_is_named_and_nothing_is_left(
    source: Path, tmp_path: Path, kind: str
) -> None:
    network = network_checks.build(source, LAYOUT)
    shutil.copytree(source, tmp_path / "damaged")
    message = damage(tmp_path / "damaged", kind)
    with pytest.raises(ModelError, match=message):
        import_folder(tmp_path / "damaged", tmp_path / "target", LAYOUT)
    with pytest.raises(
        ModelError,
        match=message
        if kind != "shape"
        else r"the tensor \S+down_proj\.weight does not fit, got \[64, 96\]",
    ):
        export_hf_weights(network, tmp_path / "damaged", tmp_path / "target")
    assert [path.name for path in tmp_path.iterdir()] == ["damaged"]


@pytest.mark.parametrize("file", ["__0_0.distcp", ".metadata", "passed_through.safetensors"])
def test_a_damaged_import_is_refused(source: Path, tmp_path: Path, file: str) -> None:
    import_folder(source, tmp_path / "megatron", LAYOUT)
    path = tmp_path / "megatron" / file
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises((ModelError, CheckpointError), match="megatron"):
        export_folder(tmp_path / "megatron", tmp_path / "back", LAYOUT)
    assert [path.name for path in tmp_path.iterdir()] == ["megatron"]


def test_a_target_inside_the_source_is_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="lies inside the source folder"):
        export_hf_weights(network_checks.build(source, LAYOUT), source, source / "export")
    with pytest.raises(ModelError, match="lies inside the source folder"):
        import_folder(source, source / "megatron", LAYOUT)
    assert not (source / "export").exists()
