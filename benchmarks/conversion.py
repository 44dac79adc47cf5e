"""Import and export of a folder of at least 2 GB beside the disk's own copy speed, in the same run,
with peak memory.

    python benchmarks/conversion.py [--rounds 3] [--folder PLACE] [--config config.json]

The folder is a text network shaped like a real one, random bfloat16 weights in several files. A
round copies its files with `shutil.copyfile`, imports it and exports what was imported, each in a
process of its own, each ending with everything synced to disk. The three take turns. All of them
read what was written just before, so none waits for the disk's reads where memory holds the folder.
The seconds leave out the start of the process; peak memory is what the process had resident at
most, beyond what it had when it began.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

FILE_BYTES = 600_000_000
LEAST_BYTES = 2_000_000_000
# As large as a published text network of a billion parameters, with layers of both kinds.
CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3_5ForCausalLM"],
    "model_type": "qwen3_5_text",
    "dtype": "bfloat16",
    "vocab_size": 151936,
    "hidden_size": 1536,
    "intermediate_size": 6144,
    "num_hidden_layers": 24,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "full_attention_interval": 4,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 16,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 262144,
    "tie_word_embeddings": True,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 1e7,
        "partial_rotary_factor": 0.25,
        "mrope_section": [11, 11, 10],
        "mrope_interleaved": True,
    },
}


def make_folder(folder: Path, config: dict[str, Any]) -> None:
    """Write random weights for a configuration, tensor by tensor."""
    import torch

    from zppo_mm.config.schema import ParallelConfig
    from zppo_mm.models.families.architecture import parse_architecture
    from zppo_mm.parallel import groups as parallel
    from zppo_mm.weights.hf_writer import FolderWriter
    from zppo_mm.weights.mapping import parameter_mappings, split_tensors
    from zppo_mm.weights.megatron_folder import build_without_weights
    from zppo_mm.weights.safetensors_file import Header, build_header

    parallel.initialize(ParallelConfig(), seed=0)
    architecture = parse_architecture(config)
    model = build_without_weights(architecture, ParallelConfig())
    shapes: dict[str, tuple[int, ...]] = {}
    for mapping in parameter_mappings(model):
        pieces = split_tensors(mapping.parameter, mapping.rule, architecture)
        shapes |= {key: tuple(piece.shape) for key, piece in zip(mapping.keys, pieces, strict=True)}
    files: list[dict[str, tuple[torch.dtype, tuple[int, ...]]]] = [{}]
    room = FILE_BYTES
    for key, shape in shapes.items():
        size = 2 * math.prod(shape)
        if size > room and files[-1]:
            files.append({})
            room = FILE_BYTES
        room -= size
        files[-1][key] = (torch.bfloat16, shape)
    names = [
        f"model-{number:05}-of-{len(files):05}.safetensors" for number in range(1, len(files) + 1)
    ]
    headers: dict[str, Header] = {
        name: build_header(part, {"format": "pt"}) for name, part in zip(names, files, strict=True)
    }
    weight_map = {key: name for name, part in zip(names, files, strict=True) for key in part}
    index = {
        "metadata": {"total_size": sum(2 * math.prod(shape) for shape in shapes.values())},
        "weight_map": weight_map,
    }
    others: dict[str, Path | bytes] = {
        "config.json": json.dumps(config, indent=2).encode(),
        "model.safetensors.index.json": json.dumps(index).encode(),
    }
    writer = FolderWriter(folder, headers, others)
    for key, shape in shapes.items():
        writer.write(key, torch.randn(shape, dtype=torch.bfloat16))
    writer.finish()
    parallel.shutdown()


def copy(source: Path, target: Path) -> None:
    """Copy a folder's files and sync each."""
    target.mkdir()
    for file in sorted(source.iterdir()):
        shutil.copyfile(file, target / file.name)
        handle = os.open(target / file.name, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


def resident(field: str) -> int:
    """Return VmRSS, what is resident now, or VmHWM, the most so far, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status: no {field}")


def measure(what: str, source: Path, target: Path) -> dict[str, float]:
    """Do one thing in this process."""
    from zppo_mm.config.schema import ParallelConfig
    from zppo_mm.conversion.exporting import export_folder
    from zppo_mm.conversion.importing import import_folder
    from zppo_mm.parallel import groups as parallel

    layout = ParallelConfig()
    parallel.initialize(layout, seed=0)
    os.sync()
    # The system forgets the highest mark so far.
    Path("/proc/self/clear_refs").write_text("5")
    before, started, busy = resident("VmRSS"), time.perf_counter(), time.process_time()
    if what == "copy":
        copy(source, target)
    elif what == "import":
        import_folder(source, target, layout)
    else:
        export_folder(source, target, layout)
    seconds = time.perf_counter() - started
    result = {
        "seconds": seconds,
        "cpu_seconds": time.process_time() - busy,
        "peak_bytes": resident("VmHWM") - before,
    }
    parallel.shutdown()
    return result


def in_process(what: str, source: Path, target: Path) -> dict[str, float]:
    """Measure in a fresh process."""
    command = [sys.executable, __file__, "--measure", what, str(source), str(target)]
    output = subprocess.run(
        command,
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    ).stdout
    result: dict[str, float] = json.loads(output.splitlines()[-1])
    return result


def run_rounds(folder: Path, num_rounds: int, config: dict[str, Any]) -> None:
    """Make the folder, take the rounds and print the table."""
    source = folder / "source"
    make_folder(source, config)
    files = sorted(source.glob("*.safetensors"))
    size = sum(file.stat().st_size for file in files)
    assert size >= LEAST_BYTES, f"the folder has {size} bytes, expected {LEAST_BYTES}"
    jobs = {
        "copy": (source, folder / "copied"),
        "import": (source, folder / "imported"),
        "export": (folder / "imported", folder / "exported"),
    }
    found: dict[str, list[dict[str, float]]] = {what: [] for what in jobs}
    for _ in range(num_rounds):
        for what, (start, end) in jobs.items():
            found[what].append(in_process(what, start, end))
        for file in files:
            assert (folder / "exported" / file.name).read_bytes() == file.read_bytes(), (
                f"{file.name} did not come back"
            )
        for _, end in jobs.values():
            shutil.rmtree(end)
    print(
        f"{size / 1e9:.2f} GB in {len(files)} files, largest file "
        f"{max(file.stat().st_size for file in files) / 1e9:.2f} GB"
    )
    largest = max(
        2 * config["vocab_size"] * config["hidden_size"],
        2 * 2 * config["intermediate_size"] * config["hidden_size"],
    )
    print(
        f"largest tensor {largest / 1e6:.0f} MB; medians of {num_rounds} rounds (slowest to "
        "fastest)"
    )
    print(
        "| | GB/s | of the copy's | CPU seconds | peak MB beyond the start |\n|---|---|---|---|---|"
    )
    copied = statistics.median(row["seconds"] for row in found["copy"])
    for what, rows in found.items():
        seconds = [row["seconds"] for row in rows]
        middle = statistics.median(seconds)
        cpu, peak = (
            statistics.median(row["cpu_seconds"] for row in rows),
            max(row["peak_bytes"] for row in rows),
        )
        speeds = (
            f"{size / middle / 1e9:.2f} ({size / max(seconds) / 1e9:.2f} to "
            f"{size / min(seconds) / 1e9:.2f})"
        )
        print(f"| {what} | {speeds} | {copied / middle:.2f} | {cpu:.1f} | {peak / 1e6:.0f} |")


def main() -> None:
    """Read the command line and measure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--folder", help="where to write; about four times the folder's size is needed"
    )
    parser.add_argument("--config", type=Path, help="another network's config.json")
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        what, source, target = arguments.measure
        print(json.dumps(measure(what, Path(source), Path(target))))
        return
    config = json.loads(arguments.config.read_text()) if arguments.config else CONFIG
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        run_rounds(Path(folder), arguments.rounds, config)


if __name__ == "__main__":
    main()
