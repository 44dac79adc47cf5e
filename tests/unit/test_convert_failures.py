"""Conversions that fail half-way: what is named, and that nothing that looks whole is left."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.support import network_checks, tiny_qwen
from tests.support.conversion_checks import LAYOUT, content, left_whole, released
from tests.support.running import run_python
from zppo_mm.conversion.exporting import export_folder
from zppo_mm.conversion.importing import import_folder
from zppo_mm.errors import CheckpointError, ModelError
from zppo_mm.weights.hf_export import export_hf_weights
from zppo_mm.weights.hf_writer import FolderWriter
from zppo_mm.weights.safetensors_file import build_header

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.usefixtures("one_rank")

TOOL = ROOT / "tools" / "convert_checkpoint.py"

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


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return released(tmp_path_factory.mktemp("released") / "source")


def writer(target: Path) -> FolderWriter:
    header = build_header({"a": (torch.float32, (2,)), "b": (torch.bfloat16, (3,))}, {})
    return FolderWriter(target, {"model.safetensors": header}, {"config.json": b"{}"})


@pytest.mark.parametrize(("key", "expected"), [("a", r"\[2\]"), ("b", r"\[3\] of torch\.bfloat16")])
def test_a_tensor_of_another_shape_is_named(tmp_path: Path, key: str, expected: str) -> None:
    message = rf"{key} does not fit, got \[3\] of torch\.float32, expected {expected}"
    with pytest.raises(ModelError, match=rf"target/model\.safetensors: the tensor {message}"):
        writer(tmp_path / "target").write(key, torch.zeros(3))


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
    return run_python("-c", code, str(TOOL), *arguments)


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


@pytest.mark.parametrize("script", [DIES_EXPORTING, DIES_IMPORTING], ids=["export", "import"])
@pytest.mark.medium
def test_a_killed_conversion_leaves_nothing_that_looks_whole(
    source: Path, tmp_path: Path, script: str
) -> None:
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "earlier").write_text("export")
    result = run_python("-c", script, str(source), str(tmp_path / "target"))
    assert result.returncode == -signal.SIGKILL, result.stderr
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
    message = r"No space left on device while writing the key model\.\S+: .*back\.incomplete/model-"
    with pytest.raises(ModelError, match=message):
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
