"""Import and export at tensor and pipeline sizes above one: the same bytes whatever the layout, and
a failure on one rank is one on all.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support import network_checks, tiny_families
from tests.support.conversion_checks import check_opens, content
from tests.support.launch import run_ranks
from zppo_mm.config.schema import ParallelConfig
from zppo_mm.conversion import importing
from zppo_mm.conversion.exporting import export_folder
from zppo_mm.errors import ZppoError
from zppo_mm.parallel import groups as parallel
from zppo_mm.weights import hf_export as export
from zppo_mm.weights.hf_export import export_hf_weights
from zppo_mm.weights.hf_writer import FolderWriter
from zppo_mm.weights.safetensors_folder import SafetensorsFolder

LAYOUTS = {"whole": (1, 1), "tensor": (2, 1), "pipeline": (1, 2), "both": (2, 2)}
# One family with layers of two kinds and a tower, tied; one whose layers are all alike, untied.
FAMILIES = {"qwen3_5": True, "qwen3": False}
CHAIN = {
    "qwen3_5": (("whole", "both"), ("both", "tensor"), ("pipeline", "whole")),
    "qwen3": (("tensor", "pipeline"), ("both", "whole")),
}
"""Per family, the layout of an import and the one that it is opened at."""
NUM_RANKS = 4


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("models")
    saved = {}
    for family, tied in FAMILIES.items():
        model = tiny_families.model(family, tied=tied).to(torch.bfloat16)
        model.save_pretrained(base / family, max_shard_size="200KB")
        saved[family] = base / family
        if tied:
            add_output_layer(base / family)
    return saved


def add_output_layer(folder: Path) -> None:
    """Put the output layer beside the embedding that it is, as some published folders have it."""
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    [embedding] = [key for key in content["weight_map"] if key.endswith("embed_tokens.weight")]
    file = folder / content["weight_map"][embedding]
    tensors = load_file(file)
    save_file(
        {**tensors, "lm_head.weight": tensors[embedding].clone()}, file, metadata={"format": "pt"}
    )
    content["weight_map"]["lm_head.weight"] = file.name
    index.write_text(json.dumps(content))


def layout(name: str) -> ParallelConfig:
    tensor, pipeline = LAYOUTS[name]
    return ParallelConfig(
        tensor_model_parallel_size=tensor, pipeline_model_parallel_size=pipeline, timeout_minutes=3
    )


@pytest.fixture(scope="module")
def converted(
    folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[list[str]]]:
    """Return where four ranks wrote everything, and what each of them said about the conversions
    that must fail.
    """
    base = tmp_path_factory.mktemp("converted")
    return base, run_ranks(convert_everywhere, NUM_RANKS, folders, base)


def test_the_layout_leaves_no_trace(
    folders: dict[str, Path], converted: tuple[Path, list[list[str]]]
) -> None:
    for family, folder in folders.items():
        results = sorted(path for path in converted[0].glob(f"{family} export *"))
        assert len(results) == len(CHAIN[family]) + 1
        for result in results:
            assert content(result) == content(folder), result.name


def test_a_failure_on_one_rank_is_one_on_all(converted: tuple[Path, list[list[str]]]) -> None:
    base, messages = converted
    for writing, reading in messages:
        assert "No space left on device" in writing
        assert "Input/output error" in reading
    assert [path.name for path in base.iterdir() if path.name.startswith(("failed", "."))] == []


def convert_everywhere(folders: dict[str, Path], base: Path) -> list[str]:
    """Run on every rank: import at one layout, open and export at another; export a loaded network;
    fail twice.
    """
    for family, folder in folders.items():
        for imported, opened in CHAIN[family]:
            parallel.initialize(layout(imported), seed=0)
            importing.import_folder(folder, base / f"{family} {imported}", layout(imported))
            parallel.initialize(layout(opened), seed=0)
            network = network_checks.build(folder, layout(opened))
            check_opens(base / f"{family} {imported}", network, layout(opened))
            export_folder(
                base / f"{family} {imported}",
                base / f"{family} export {imported} {opened}",
                layout(opened),
            )
        parallel.initialize(layout("both"), seed=0)
        export_hf_weights(
            network_checks.build(folder, layout("both")), folder, base / f"{family} export network"
        )
    messages = fail_everywhere(folders["qwen3_5"], base)
    parallel.shutdown()
    return messages


class Unreadable(SafetensorsFolder):
    """A folder of which one rank cannot read a tensor."""

    def read(self, key: str) -> torch.Tensor:
        if parallel.rank() == NUM_RANKS - 1 and key.endswith("layers.3.mlp.down_proj.weight"):
            raise OSError(5, "Input/output error", str(self.where(key)))
        return super().read(key)


class Full(FolderWriter):
    """A writer whose disk is full after some tensors."""

    def write(self, key: str, tensor: torch.Tensor) -> None:
        if key.endswith("layers.2.mlp.down_proj.weight"):
            raise OSError(28, "No space left on device", str(self.aside))
        super().write(key, tensor)


def fail_everywhere(folder: Path, base: Path) -> list[str]:
    """Fail at an export that only the first rank notices, and at an import that only the last one
    does; returns the messages.
    """
    network = network_checks.build(folder, layout("both"))
    messages = []
    export.FolderWriter = Full
    importing.SafetensorsFolder = Unreadable
    for convert in (
        lambda: export_hf_weights(network, folder, base / "failed export"),
        lambda: importing.import_folder(folder, base / "failed import", layout("both")),
    ):
        with pytest.raises(ZppoError) as caught:
            convert()
        messages.append(str(caught.value))
    return messages
