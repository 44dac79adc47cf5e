"""Train a student.

`torchrun --nproc-per-node 2 tools/train_zppo.py --modality video [key.sub=value …]`
"""

from __future__ import annotations

import argparse
import sys

from zppo_mm.config.help import add_options, describe_methods, describe_options
from zppo_mm.config.load import load_config
from zppo_mm.config.schema import RunConfig
from zppo_mm.errors import ConfigError
from zppo_mm.interruption import Interruption
from zppo_mm.observability.logs import quiet_libraries


def parse(arguments: list[str]) -> RunConfig:
    """Read the command line into a checked configuration."""
    parser = argparse.ArgumentParser(
        description="Train a vision-language student by ZPPO or one of its baselines. Without "
        "--config: the bundled tiny student and teacher on the bundled digit questions.",
        epilog=f"Methods:\n\n{describe_methods()}\n\nOptions, each given as key=value or "
        f"key.sub=value:\n\n{describe_options()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", help="YAML file with any of the options below")
    parser.add_argument("--modality", help="bundled questions to use: text, image, video, mixed")
    parser.add_argument("--method", help="one of the methods below")
    parser.add_argument("--name", help="name of the run's folder under output_dir")
    add_options(parser)
    known = parser.parse_intermixed_args(arguments)
    named = [
        f"{key}={getattr(known, key)}"
        for key in ("modality", "method", "name")
        if getattr(known, key) is not None
    ]
    return load_config(known.config, [*named, *known.options])


def main() -> int:
    """Handle signals, read the configuration, then import what needs torch and train."""
    # Before any other thread starts: threads inherit the blocked signals.
    interruption = Interruption()
    interruption.listen()
    try:
        config = parse(sys.argv[1:])
    except ConfigError as error:
        print(f"train_zppo: {error}", file=sys.stderr)
        return 2
    quiet_libraries()
    from zppo_mm.run.session import exit_code
    from zppo_mm.train import folder_of, train

    try:
        train(config, interruption)
    except Exception as error:
        return exit_code(error, folder_of(config))
    return 0


if __name__ == "__main__":
    sys.exit(main())
