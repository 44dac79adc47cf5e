"""Convert checkpoints between Hugging Face and Megatron folders, and check folders.

`python tools/convert_checkpoint.py import HF_DIR MEGATRON_DIR`
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from zppo_mm.config.load import load_config
from zppo_mm.config.schema import ParallelConfig
from zppo_mm.errors import ConfigError
from zppo_mm.observability.logs import quiet_libraries
from zppo_mm.piped_output import ends_with_its_reader

if TYPE_CHECKING:
    from zppo_mm.conversion.choosing import Choice

COMMANDS = {
    "import": (
        ["HF_DIR", "MEGATRON_DIR"],
        "write a Hugging Face folder as a Megatron checkpoint that loads at any parallel layout; "
        "needs memory for the largest tensor, no GPU",
    ),
    "export": (
        ["MEGATRON_DIR|RUN_DIR", "HF_DIR"],
        "write an imported folder, or a checkpoint of a run, by default the newest, as a Hugging "
        "Face folder",
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


def parse(arguments: list[str]) -> tuple[str, list[Path], ParallelConfig, Choice]:
    """Read the command line: command, folders, layout, and which checkpoint of a run.

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
        if name == "export":
            add_choice(command)
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
    choice: Choice = known.get("step") or ("best" if known.get("best") else "newest")
    return known["command"], folders, load_config(None, options).parallel, choice


def add_choice(command: argparse.ArgumentParser) -> None:
    """Add the options that choose a checkpoint of a run."""
    choice = command.add_mutually_exclusive_group()
    choice.add_argument("--step", type=int, metavar="N", help="the checkpoint after step N")
    choice.add_argument(
        "--best",
        action="store_true",
        help="of the checkpoints that are left, the one with the highest held-out accuracy in "
        "evaluation.jsonl",
    )


def main() -> int:
    """Read the command line, then import what needs torch and run the command."""
    try:
        command, folders, layout, choice = parse(sys.argv[1:])
    except ConfigError as error:
        print(f"convert_checkpoint: {error}", file=sys.stderr)
        return 2
    if command != "verify":
        # Moving tensors between files needs no GPU, and a machine without one must do the same.
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    quiet_libraries()
    from zppo_mm.conversion.command import run_command

    outcome = run_command(command, folders, layout, choice)
    if outcome.text:
        failed = outcome.exit_code and command != "verify"
        with ends_with_its_reader():
            print(outcome.text, file=sys.stderr if failed else sys.stdout)
    return outcome.exit_code


if __name__ == "__main__":
    sys.exit(main())
