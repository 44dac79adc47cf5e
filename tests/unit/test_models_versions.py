"""megatron-core's versions differ in one module alone, and the network is built in one module."""

from __future__ import annotations

import ast
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import network_checks, tiny_qwen
from tests.support.running import run_python
from zppo_mm.config.schema import ParallelConfig
from zppo_mm.parallel import groups as parallel
from zppo_mm.training.optimizer import wrap_model

ROOT = Path(__file__).parents[2]
WITHOUT_TRITON = "import sys; sys.modules['triton'] = None; import zppo_mm.models.provider"


@pytest.fixture
def _one_rank() -> Iterator[None]:
    parallel.initialize(ParallelConfig(), seed=0)
    yield
    parallel.shutdown()


@pytest.mark.medium
def test_the_network_imports_without_triton() -> None:
    result = run_python("-c", WITHOUT_TRITON)
    assert result.returncode == 0, result.stderr


@pytest.mark.usefixtures("_one_rank")
def test_building_for_training_asks_nothing_of_the_user(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tiny_qwen.save(tiny_qwen.text_model(), tmp_path)
    with caplog.at_level(logging.WARNING, logger="megatron"):
        network = network_checks.build(folder, ParallelConfig())
        wrap_model(network, ParallelConfig(use_distributed_optimizer=True))
        # Only the notice is hidden, and only while building.
        logging.getLogger("megatron.core.models.gpt.gpt_model").warning(
            "GPTModel IS DEPRECATED, said by another"
        )
    assert [
        record.getMessage() for record in caplog.records if record.name.startswith("megatron")
    ] == ["GPTModel IS DEPRECATED, said by another"]


def test_the_newest_environment_differs_in_megatron_core_alone() -> None:
    pinned, latest = (
        set((ROOT / name).read_text().splitlines()[1:])
        for name in ("constraints.txt", "constraints-latest.txt")
    )
    assert {line.split("==")[0] for line in pinned - latest} == {"megatron-core"}, (
        "pin it in constraints-latest.txt too"
    )
    # What torch's CUDA build brings; its own CUDA packages are pinned by torch itself.
    assert {line.split("==")[0] for line in latest - pinned} == {
        "megatron-core",
        "setuptools",
        "triton",
    }


def callers(name: str) -> set[str]:
    """Return the files of the package that call or import a name."""
    found = set()
    for path in sorted((ROOT / "zppo_mm").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            called = (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Name)
                and node.func.id == name
            )
            imported = (
                isinstance(node, ast.ImportFrom)
                and not str(node.module).startswith("zppo_mm")
                and name in {a.name for a in node.names}
            )
            if called or imported:
                found.add(str(path.relative_to(ROOT)))
    return found


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("GPTModel", "zppo_mm/parallel/megatron_versions.py"),
        ("DistributedDataParallel", "zppo_mm/parallel/megatron_versions.py"),
        ("_split_tensor_factory", "zppo_mm/parallel/megatron_versions.py"),
        ("gpt_model", "zppo_mm/models/vision_language.py"),
        ("VisionLanguageModel", "zppo_mm/models/provider.py"),
    ],
)
@pytest.mark.medium
def test_each_is_used_in_one_module(name: str, module: str) -> None:
    assert callers(name) == {module}
