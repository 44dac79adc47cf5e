"""Convert checkpoints between Hugging Face and Megatron folders, and check folders.

`python tools/convert_checkpoint.py import HF_DIR MEGATRON_DIR`
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from zppo_mm.config.load import load_config
from zppo_mm.config.schema import ParallelConfig
from zppo_mm.errors import ConfigError
from zppo_mm.observability.logs import quiet_libraries

COMMANDS = {
    "import": (
        ["HF_DIR", "MEGATRON_DIR"],
        "write a Hugging Face folder as a Megatron checkpoint that loads at any parallel layout; "
        "needs memory for the largest tensor, no GPU",
    ),
    "export": (
        ["MEGATRON_DIR|RUN_DIR", "HF_DIR"],
        "write an imported folder, or the newest checkpoint of a run, as a Hugging Face folder",
    ),
    "verify": (
        ["HF_DIR", "[HF_DIR_2]"],
        "load a folder through Megatron and through transformers and compare keys, types, values "
        "and logits; or compare two folders",
    ),
    "inspect": (
        ["HF_DIR"],
        "show family, sizes, parameters, possible layouts, memory per GPU and how prompts end; "
        "reads no weights",
    ),
}


def parse(arguments: list[str]) -> tuple[str, list[Path], ParallelConfig]:
    """Read the command line: command, folders, layout.

    Raises:
        ConfigError: An option is unknown, or none of the layout's.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, (folders, meaning) in COMMANDS.items():
        command = commands.add_parser(name, help=meaning, description=meaning)
        for index, folder in enumerate(folders):
            command.add_argument(
                f"folder_{index}",
                type=Path,
                metavar=folder.strip("[]"),
                nargs="?" if folder.startswith("[") else None,
            )
        if name in ("import", "export"):
            text = (
                "parallel layout, such as parallel.tensor_model_parallel_size=2, under torchrun "
                "with as many processes"
            )
            command.add_argument("options", nargs="*", metavar="parallel.KEY=VALUE", help=text)
    known = vars(parser.parse_args(arguments))
    options = known.get("options", [])
    wrong = [option for option in options if not option.startswith("parallel.")]
    if wrong:
        raise ConfigError(
            f"argument `{wrong[0]}`: not an option here, got {wrong[0]!r}, expected "
            "parallel.KEY=VALUE; see --help"
        )
    folders = [
        value for key, value in known.items() if key.startswith("folder_") and value is not None
    ]
    return known["command"], folders, load_config(None, options).parallel


def main() -> int:
    """Read the command line, then import what needs torch and run the command."""
    try:
        command, folders, layout = parse(sys.argv[1:])
    except ConfigError as error:
        print(f"convert_checkpoint: {error}", file=sys.stderr)
        return 2
    if command != "verify":
        # Moving tensors between files needs no GPU, and a machine without one must do the same.
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    quiet_libraries()
    from zppo_mm.conversion.command import run_command

    outcome = run_command(command, folders, layout)
    if outcome.text:
        print(
            outcome.text,
            file=sys.stderr if outcome.exit_code and command != "verify" else sys.stdout,
        )
    return outcome.exit_code


if __name__ == "__main__":
    sys.exit(main())
