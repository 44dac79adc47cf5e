"""The command line of the conversion tool, and what verify and inspect find."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support import tiny_families, tiny_qwen
from tests.support.published_sizes import PUBLISHED
from tests.support.running import run_python
from tests.support.tiny_fp8 import LINEARS, quantise
from tests.support.tools import load_tool
from zppo_mm.config.schema import ParallelConfig
from zppo_mm.conversion.command import run_command
from zppo_mm.conversion.description import count_parameters, describe_folder, fitting_layouts
from zppo_mm.conversion.exporting import export_folder
from zppo_mm.conversion.importing import import_folder
from zppo_mm.conversion.verify import Report, verify_folder, verify_folders
from zppo_mm.errors import ConfigError
from zppo_mm.models.families.architecture import load_architecture, parse_architecture
from zppo_mm.parallel import groups as parallel
from zppo_mm.weights.mapping import parameter_mappings
from zppo_mm.weights.megatron_folder import build_without_weights
from zppo_mm.weights.safetensors_folder import SafetensorsFolder

pytestmark = pytest.mark.usefixtures("one_rank")

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "convert_checkpoint.py"
LAYOUT = ParallelConfig()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tiny_qwen.vision_language_model(tied=True).to(torch.bfloat16)
    return tiny_qwen.save(
        model, tmp_path_factory.mktemp("verify") / "source", mtp__fc__weight=torch.randn(4, 8)
    )


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    return load_tool("convert_checkpoint")


def test_the_command_line_is_read(tool: ModuleType) -> None:
    folders = [Path("a"), Path("b")]
    assert tool.parse(["verify", "a"]) == ("verify", [Path("a")], LAYOUT, "newest")
    assert tool.parse(["verify", "a", "b"]) == ("verify", folders, LAYOUT, "newest")
    for words, choice in (
        ([], "newest"),
        (["--step", "20"], 20),
        (["--best"], "best"),
    ):
        assert tool.parse(["export", "a", "b", *words]) == ("export", folders, LAYOUT, choice)
    layout = ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=4)
    options = ["parallel.tensor_model_parallel_size=2", "parallel.pipeline_model_parallel_size=4"]
    assert tool.parse(["import", "a", "b", *options]) == ("import", folders, layout, "newest")


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (
            "train.lr=1",
            r"argument `train\.lr=1`: not an option here, got 'train\.lr=1', expected "
            r"parallel\.KEY=VALUE",
        ),
        (
            "parallel.tensor_parallel=2",
            r"unknown key, got parallel\.tensor_parallel.*did you mean parallel\.\w+",
        ),
        ("parallel.tensor_model_parallel_size=x", "has the wrong type"),
    ],
)
def test_other_options_are_refused(tool: ModuleType, option: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tool.parse(["import", "a", "b", option])


def test_help_needs_no_torch() -> None:
    code = (
        "import runpy, sys\nsys.argv = sys.argv[1:]\ntry:\n runpy.run_path(sys.argv[0], "
        "run_name='__main__')\n"
    )
    code += (
        "except SystemExit as end:\n assert not end.code, end\nassert not {'torch', "
        "'transformers', 'megatron'} & set(sys.modules)"
    )
    for arguments in (["--help"], ["import", "--help"]):
        result = run_python("-c", code, str(TOOL), *arguments)
        assert "HF_DIR" in result.stdout or "inspect" in result.stdout


@pytest.mark.medium
def test_a_user_error_is_one_line(tmp_path: Path) -> None:
    result = run_python(str(TOOL), "inspect", str(tmp_path))
    assert result.returncode == 1
    assert "config.json: the file is missing" in result.stderr
    assert "Traceback" not in result.stderr


def findings(report: Report) -> dict[str, tuple[str, bool]]:
    return {what: (finding, good) for what, finding, good in report.rows}


@pytest.mark.parametrize("family", tiny_families.KINDS)
@pytest.mark.medium
def test_a_good_folder_is_found_good(family: str, tmp_path: Path) -> None:
    folder, _ = tiny_families.folder(family, tmp_path / "model")
    report = verify_folder(folder)
    assert report.good, report.text()
    kinds = {"text", "image", "video"} if "image" in tiny_families.KINDS[family] else {"text"}
    assert {
        what.removeprefix("logits, ") for what in findings(report) if what.startswith("logits")
    } == kinds


@pytest.mark.medium
def test_what_is_passed_through_is_counted(source: Path) -> None:
    found = findings(verify_folder(source))
    total = len(load_file(source / "model.safetensors"))
    assert found["keys"] == (f"{total - 1} in the network, 1 passed through", True)
    assert found["types"] == (f"{total - 1} bfloat16", True)
    assert found["values"] == (f"{total - 1} equal bit for bit", True)


@pytest.mark.medium
def test_a_quantised_folder_is_found_good_and_equal_to_its_export(tmp_path: Path) -> None:
    folder = tiny_qwen.save(tiny_qwen.text_model().to(torch.bfloat16), tmp_path / "fp8")
    quantise(folder, LINEARS)
    report = verify_folder(folder)
    assert report.good, report.text()
    import_folder(folder, tmp_path / "megatron", LAYOUT)
    export_folder(tmp_path / "megatron", tmp_path / "plain", LAYOUT)
    both = verify_folders(folder, tmp_path / "plain")
    assert both.good, both.text()


def changed(source: Path, target: Path, key: str, change: float) -> Path:
    """Copy a folder with one tensor scaled."""
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    tensors = load_file(target / "model.safetensors")
    tensors[key] = tensors[key] * change
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


@pytest.mark.medium
def test_folders_with_other_values_differ_in_the_logits_that_they_change(
    source: Path, tmp_path: Path
) -> None:
    key = "model.visual.merger.linear_fc2.weight"
    found = findings(verify_folders(changed(source, tmp_path / "other", key, 2.0), source))
    assert found["keys"][1]
    assert found["types"][1]
    assert found["values"][0].startswith(f"{key} differs by ")
    assert not found["values"][1]
    assert found["logits, text"][1]
    assert not found["logits, image"][1]
    assert not found["logits, video"][1]


@pytest.mark.medium
def test_folders_with_other_keys_and_types_differ(source: Path, tmp_path: Path) -> None:
    other = changed(source, tmp_path / "other", "mtp.fc.weight", 1.0)
    tensors = load_file(other / "model.safetensors")
    tensors["mtp.norm.weight"] = tensors.pop("mtp.fc.weight")
    key = "model.language_model.norm.weight"
    tensors[key] = tensors[key].float()
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    report = verify_folders(other, source)
    found = findings(report)
    assert found["keys"] == (
        "mtp.norm.weight is in the first only; mtp.fc.weight is in the second only",
        False,
    )
    assert found["types"] == (f"{key} is torch.float32, expected torch.bfloat16", False)
    assert found["values"][1]
    assert not report.good
    assert "DIFFERS" in report.text()


@pytest.mark.medium
def test_a_network_that_computes_something_else_is_found(source: Path, tmp_path: Path) -> None:
    """The same weights under another rotary base: transformers and Megatron agree again, an export
    with the old file does not.
    """
    other = changed(source, tmp_path / "other", "mtp.fc.weight", 1.0)
    config = json.loads((other / "config.json").read_text())
    config["text_config"]["rope_parameters"]["rope_theta"] = 50.0
    (other / "config.json").write_text(json.dumps(config))
    assert verify_folder(other).good
    found = findings(verify_folders(other, source))
    assert found["values"][1]
    assert not found["logits, text"][1]


@pytest.mark.medium
def test_the_exit_code_reports_a_difference(source: Path, tmp_path: Path) -> None:
    other = changed(source, tmp_path / "other", "model.language_model.norm.weight", 1.5)
    outcome = run_command("verify", [source, other], LAYOUT)
    parallel.initialize(LAYOUT, seed=0)
    assert outcome.exit_code == 1
    assert "DIFFERS" in outcome.text


def test_a_folder_is_described_without_reading_its_weights(source: Path, tmp_path: Path) -> None:
    folder = changed(source, tmp_path / "hollow", "mtp.fc.weight", 1.0)
    file = folder / "model.safetensors"
    length = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    with open(file, "r+b") as stream:
        stream.seek(length)
        stream.write(b"\xff" * (file.stat().st_size - length))
    tensors = load_file(source / "model.safetensors")
    counts = {"language": 0, "vision": 0, "passed through": 0}
    for key, tensor in tensors.items():
        counts[
            "vision"
            if ".visual." in key
            else "passed through"
            if key.startswith("mtp")
            else "language"
        ] += tensor.numel()
    text = describe_folder(folder)
    for part, count in counts.items():
        assert f"parameters, {part}".ljust(28) + f"{count:,}" in text
    assert f"{sum(counts.values()):,}" in text


def test_memory_is_that_of_the_fullest_rank() -> None:
    """Qwen3 of 0.6 billion: 28 layers of 15,730,944 parameters, an embedding of 155,582,464 that
    the last stage has again, one norm.
    """
    raw, _ = PUBLISHED["Qwen3-0.6B"]
    architecture = parse_architecture(raw)
    model = build_without_weights(architecture, LAYOUT)
    layouts = {
        (found.tensor, found.pipeline): found.num_parameters
        for found in fitting_layouts(architecture, list(parameter_mappings(model)))
    }
    embedding, hidden = 151_936 * 1024, 1024
    # Attention 2 x 1024 x 2048 (query, output) + 2 x 1024 x 1024 (key, value), feed-forward 3 x
    # 1024 x 3072, four norms.
    split, whole = 2 * 1024 * 2048 + 2 * 1024 * 1024 + 3 * 1024 * 3072, 2 * 1024 + 2 * 128
    assert layouts[1, 1] == 28 * (split + whole) + embedding + hidden
    assert layouts[2, 1] == 28 * (split // 2 + whole) + embedding // 2 + hidden
    assert layouts[1, 4] == 7 * (split + whole) + embedding + hidden
    assert layouts[8, 4] == 7 * (split // 8 + whole) + embedding // 8 + hidden
    # 28 layers have no eighth.
    assert sorted(layouts) == [
        (tensor, pipeline) for tensor in (1, 2, 4, 8) for pipeline in (1, 2, 4)
    ]


def test_the_counts_are_of_the_folder(source: Path) -> None:
    architecture = load_architecture(source)
    mappings = list(parameter_mappings(build_without_weights(architecture, LAYOUT)))
    counts = count_parameters(architecture, mappings, SafetensorsFolder(source))
    assert counts["passed through"] == 32
    assert counts["vision"] == sum(
        mapping.parameter.numel() for mapping in mappings if mapping.name.startswith("vision.")
    )
