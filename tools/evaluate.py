"""Evaluate a model, under torchrun too.

`python tools/evaluate.py HF_DIR|RUN_DIR --data SHARDS|FILE … [key.sub=value …]`
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from data.imports.benchmark_formats import PARTS, known_formats
from zppo_mm.config.help import add_options, parse_with_options
from zppo_mm.observability.logs import quiet_libraries

DESCRIPTION = """Sample responses to questions, grade them as in training, and write pass@1 and
pass@k with every answer.

The model is a Hugging Face folder or the folder of a finished run. Without --data
a run is evaluated on its own held-out questions, with its own settings. The same
command continues an interrupted evaluation. Details: docs/evaluation.md."""


def command_line() -> argparse.ArgumentParser:
    """Return the parser of the tool's arguments."""
    parser = argparse.ArgumentParser(
        description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, metavar="HF_DIR|RUN_DIR", help="the model")
    parser.add_argument(
        "--data",
        nargs="+",
        default=[],
        metavar="SHARDS|FILE",
        help="folders of shards, or benchmark files",
    )
    parser.add_argument(
        "--sampling",
        default="",
        choices=["greedy", "paper"],
        help="default: paper, or the run's own",
    )
    parser.add_argument(
        "--num-rollouts",
        type=positive,
        default=0,
        metavar="K",
        help="responses per question (default: 1, or the run's own)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="folder of the results (default: runs/evaluations/<model>)",
    )
    parser.add_argument(
        "--questions-per-chunk",
        type=positive,
        default=0,
        metavar="N",
        help="questions between two saves (default: what fits the batch)",
    )
    parser.add_argument(
        "--engine",
        default="megatron",
        choices=["megatron", "vllm"],
        help="what samples; vllm: servers of this model, rollout.endpoints=[URL,…] (default: "
        "megatron)",
    )
    add_suite_options(parser)
    add_table_options(parser)
    add_options(parser, "options of tools/train_zppo.py; they take precedence over all others")
    return parser


def add_suite_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of a suite of benchmarks."""
    parser.add_argument(
        "--suite",
        default="",
        metavar="NAME|DIR",
        help="paper, or a folder of declared benchmarks; --data then names the folder that has a "
        "folder for each",
    )
    parser.add_argument(
        "--baseline",
        type=Path,
        metavar="DIR",
        help="results of the same suite, such as those of the model before training; adds the gain",
    )


def add_table_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say how benchmark files are read."""
    parser.add_argument(
        "--format",
        default="",
        choices=[*known_formats()],
        help="format of benchmark files (default: recognised by their columns)",
    )
    parser.add_argument(
        "--fields",
        nargs="+",
        default=[],
        metavar="PART=COLUMN",
        help=f"column of {', '.join(PARTS)} in benchmark files",
    )
    parser.add_argument(
        "--media-root",
        type=Path,
        metavar="DIR",
        help="folder that media paths are relative to (default: the file's)",
    )


def parse(arguments: list[str]) -> dict[str, Any]:
    """Read the command line into the fields of an `EvaluationRequest`."""
    known = vars(parse_with_options(command_line(), arguments))
    # Options may follow --data and --fields, which take as many words as come.
    data = [word for word in known["data"] if "=" not in word or Path(word).exists()]
    fields = [word for word in known["fields"] if word.partition("=")[0] in PARTS]
    options = [
        word
        for word in [*known["data"], *known["fields"]]
        if word not in data and word not in fields
    ]
    return known | {
        "data": tuple(map(Path, data)),
        "fields": {part: column for part, _, column in (word.partition("=") for word in fields)},
        "options": (*options, *known["options"]),
    }


def positive(text: str) -> int:
    """Read a count."""
    count = int(text)
    if count < 1:
        raise argparse.ArgumentTypeError(f"no count, got {text}, expected 1 or more")
    return count


def main() -> int:
    """Read the command line, then import what needs torch and evaluate."""
    known = parse(sys.argv[1:])
    quiet_libraries()
    from zppo_mm.evaluation.run import run_evaluation
    from zppo_mm.evaluation.settings import EvaluationRequest

    code, text = run_evaluation(EvaluationRequest(**known))
    if text:
        print(text)
    return code


if __name__ == "__main__":
    sys.exit(main())
