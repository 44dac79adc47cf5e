"""Import and export of whole folders: every byte comes back, and what goes wrong leaves nothing
that looks whole.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support import network_checks, tiny_families, tiny_qwen
from tests.support.conversion_checks import check_opens, content
from tests.support.tiny_fp8 import LINEARS, quantise
from zppo_mm.config.load import save_config
from zppo_mm.config.schema import ModelConfig, ParallelConfig, RunConfig, TrainConfig
from zppo_mm.conversion.exporting import export_folder
from zppo_mm.conversion.importing import import_folder
from zppo_mm.errors import CheckpointError, ModelError
from zppo_mm.models.families.architecture import load_architecture
from zppo_mm.models.provider import build_model
from zppo_mm.parallel import groups as parallel
from zppo_mm.training import checkpoint
from zppo_mm.training.objective import PolicyObjective
from zppo_mm.training.policy import Policy
from zppo_mm.weights import boxes
from zppo_mm.weights.hf_export import export_hf_weights
from zppo_mm.weights.hf_writer import FolderWriter
from zppo_mm.weights.mapping import load_hf_weights
from zppo_mm.weights.safetensors_file import build_header
from zppo_mm.weights.safetensors_folder import SafetensorsFolder

pytestmark = pytest.mark.usefixtures("one_rank")

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "convert_checkpoint.py"
LAYOUT = ParallelConfig()


def released(path: Path) -> Path:
    """Save a tied folder as models are released: several files, mixed types, weights outside the
    network, files in folders.
    """
    model = tiny_qwen.vision_language_model(tied=True).to(torch.bfloat16)
    model.save_pretrained(path, max_shard_size="200KB")
    files = sorted(path.glob("*.safetensors"))
    index = json.loads((path / "model.safetensors.index.json").read_text())
    for file in files:
        # Values that bfloat16 does not have.
        tensors = {
            key: tensor.float() * 1.001
            if key.endswith(("A_log", "linear_attn.norm.weight"))
            else tensor
            for key, tensor in load_file(file).items()
        }
        if file == files[-1]:
            tensors["mtp.fc.weight"] = torch.randn(4, 8)
        save_file(tensors, file, metadata={"format": "pt"})
    index["weight_map"]["mtp.fc.weight"] = files[-1].name
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    (path / "assets").mkdir()
    (path / "assets" / "preprocessor.json").write_text('{ "odd":   "spacing" }')
    return path


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
    assert found.keys() == plain.places.keys()
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


@pytest.mark.parametrize("piece_bytes", [1, 1000, boxes.PIECE_BYTES])
@pytest.mark.medium
def test_an_imported_folder_opens_as_a_runs_checkpoint_does(
    source: Path, tmp_path: Path, piece_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(boxes, "PIECE_BYTES", piece_bytes)
    import_folder(source, tmp_path / "megatron", LAYOUT)
    check_opens(tmp_path / "megatron", network_checks.build(source, LAYOUT), LAYOUT)


def run_folder(source: Path, folder: Path) -> dict[str, torch.Tensor]:
    """Write what a run leaves after one step; returns its weights."""
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
    checkpoint.save(
        folder / checkpoint.CHECKPOINTS_FOLDER,
        1,
        policy,
        {"step": 1, "config": asdict(config)},
        keep=1,
    )
    export_hf_weights(network, source, folder / "hf")
    return dict(network.named_parameters())


def test_a_runs_newest_checkpoint_is_exported(source: Path, tmp_path: Path) -> None:
    run_folder(source, tmp_path / "run")
    export_folder(tmp_path / "run", tmp_path / "back", LAYOUT)
    assert content(tmp_path / "back") == content(tmp_path / "run" / "hf")
    assert content(tmp_path / "back") != content(source)
    damaged = next((tmp_path / "run" / "checkpoints" / "step_000001").glob("*.distcp"))
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


def left_whole(folder: Path) -> list[Path]:
    """Return the folders in here that a reader would take for a model."""
    whole = []
    for path in folder.rglob("*"):
        if path.is_dir() and (path / "config.json").is_file():
            try:
                SafetensorsFolder(path)
            except ModelError:
                continue
            whole.append(path)
    return whole


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


def writer(target: Path) -> FolderWriter:
    header = build_header({"a": (torch.float32, (2,)), "b": (torch.bfloat16, (3,))}, {})
    return FolderWriter(target, {"model.safetensors": header}, {"config.json": b"{}"})


def test_a_tensor_that_does_not_fit_its_place_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        ModelError,
        match=(
            r"target/model\.safetensors: the tensor a does not fit, got \[3\] of torch\.float32, "
            r"expected \[2\]"
        ),
    ):
        writer(tmp_path / "target").write("a", torch.zeros(3))
    with pytest.raises(
        ModelError,
        match=(
            r"the tensor b does not fit, got \[3\] of torch\.float32, expected \[3\] of "
            r"torch\.bfloat16"
        ),
    ):
        writer(tmp_path / "target").write("b", torch.zeros(3))


def test_a_folder_without_all_its_keys_is_not_finished(tmp_path: Path) -> None:
    half = writer(tmp_path / "target")
    half.write("a", torch.zeros(2))
    with pytest.raises(
        ModelError,
        match=(
            r"target/model\.safetensors: the key b was not written \(1 in all\), got 1 keys, "
            r"expected 2"
        ),
    ):
        half.finish()
    assert not (tmp_path / "target").exists()
    assert left_whole(tmp_path) == []
    half.discard()
    assert list(tmp_path.iterdir()) == []


def limited(largest_file: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the tool where no file may become larger, as on a disk that is full."""
    code = (
        f"import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, ({largest_file},) "
        "* 2); sys.argv = sys.argv[1:]; "
    )
    code += "runpy.run_path(sys.argv[0], run_name='__main__')"
    command = [sys.executable, "-c", code, str(TOOL), *arguments]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=200,
    )


@pytest.mark.medium
def test_a_full_disk_fails_the_import_and_leaves_nothing(source: Path, tmp_path: Path) -> None:
    result = limited(100_000, "import", str(source), str(tmp_path / "megatron"))
    assert result.returncode == 1, result.stderr
    assert "expected room and permission; check the disk" in result.stderr
    assert "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.medium
def test_a_full_disk_fails_the_export_before_anything_is_written(
    source: Path, tmp_path: Path
) -> None:
    import_folder(source, tmp_path / "megatron", LAYOUT)
    result = limited(100_000, "export", str(tmp_path / "megatron"), str(tmp_path / "back"))
    assert result.returncode == 1, result.stderr
    assert "back.incomplete/model-00001-of-00003.safetensors" in result.stderr
    assert "there must be room for" in result.stderr
    assert "Traceback" not in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["megatron"]


DIES_EXPORTING = """
import os, signal, sys
from pathlib import Path
from tests.support import network_checks
from zppo_mm.config.schema import ParallelConfig
from zppo_mm.parallel import groups as parallel
from zppo_mm.weights.hf_export import write_weights
from zppo_mm.weights.safetensors_folder import SafetensorsFolder
from zppo_mm.weights.mapping import parameter_mappings

def rounds(mappings):
    yield mappings[: len(mappings) // 2]
    os.kill(os.getpid(), signal.SIGKILL)

source, target = Path(sys.argv[1]), Path(sys.argv[2])
parallel.initialize(ParallelConfig(), seed=0)
network = network_checks.build(source, ParallelConfig())
write_weights(network, rounds(list(parameter_mappings(network))), SafetensorsFolder(source), target)
"""
DIES_IMPORTING = """
import os, signal, sys
from pathlib import Path
from zppo_mm.config.schema import ParallelConfig
from zppo_mm.conversion import importing
from zppo_mm.parallel import groups as parallel

class Dying(importing.SafetensorsFolder):
    def read(self, key):
        if key.endswith("layers.2.mlp.down_proj.weight"):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().read(key)

importing.SafetensorsFolder = Dying
parallel.initialize(ParallelConfig(), seed=0)
importing.import_folder(Path(sys.argv[1]), Path(sys.argv[2]), ParallelConfig())
"""


@pytest.mark.parametrize("script", [DIES_EXPORTING, DIES_IMPORTING], ids=["export", "import"])
@pytest.mark.medium
def test_a_killed_conversion_leaves_nothing_that_looks_whole(
    source: Path, tmp_path: Path, script: str
) -> None:
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "earlier").write_text("export")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, "-c", script, str(source), str(tmp_path / "target")],
        env=environment,
        cwd=ROOT,
        timeout=200,
    )
    assert result.returncode == -signal.SIGKILL
    assert sorted(path.name for path in tmp_path.iterdir()) == ["target", "target.incomplete"]
    assert content(tmp_path / "target") == {"earlier": b"export"}
    assert left_whole(tmp_path) == []
    assert not (tmp_path / "target.incomplete" / "metadata.json").exists()
    for file in (tmp_path / "target.incomplete").rglob("*.safetensors"):
        with pytest.raises(Exception, match=r"(?i)header"):
            load_file(file)
    export_hf_weights(network_checks.build(source, LAYOUT), source, tmp_path / "target")
    assert content(tmp_path / "target") == content(source)
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_a_failing_round_fails_the_export(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = network_checks.build(source, LAYOUT)
    real = os.pwrite

    def full(file: int, data: Any, position: int) -> int:
        if position > 50_000:
            raise OSError(28, "No space left on device")
        return real(file, data, position)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(
        ModelError,
        match=(
            r"No space left on device while writing the key model\.\S+: "
            r".*back\.incomplete/model-0000"
        ),
    ):
        export_hf_weights(network, source, tmp_path / "back")
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_of_another_network_is_refused(tmp_path: Path) -> None:
    for name, size in (("small", 112), ("large", 128)):
        folder = tiny_qwen.save(tiny_qwen.text_model(tied=True, vocab_size=size), tmp_path / name)
        import_folder(folder, tmp_path / f"{name} megatron", LAYOUT)
    for part in ("source", "headers", "passed_through.safetensors"):
        path = tmp_path / "small megatron" / part
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        (tmp_path / "large megatron" / part).rename(path)
    with pytest.raises(
        CheckpointError,
        match=(
            r"small megatron: shape mismatch of the tensor \S+, got \[112, 64\], expected \[128, "
            r"64\]"
        ),
    ):
        export_folder(tmp_path / "small megatron", tmp_path / "back", LAYOUT)
    assert not list(tmp_path.glob("back*"))
