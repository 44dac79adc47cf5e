"""Train a student.

`torchrun --nproc-per-node 2 tools/train_zppo.py --modality video [key.sub=value …]`
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping

from zppo_mm.config.help import (
    add_options,
    describe_methods,
    describe_options,
    parse_with_options,
)
from zppo_mm.config.load import load_config
from zppo_mm.config.schema import RunConfig
from zppo_mm.errors import ConfigError
from zppo_mm.interruption import EXIT_CODE, Interruption
from zppo_mm.observability.logs import quiet_libraries


def parse(arguments: list[str]) -> tuple[RunConfig, bool]:
    """Read the command line into a checked configuration, and whether an earlier run in its folder
    is moved aside.
    """
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
    parser.add_argument(
        "--restart",
        action="store_true",
        help="start from step 1 where the run's folder holds an earlier run, which is moved to "
        "earlier_1/ in it; not when a scheduler or torchrun starts the same command again",
    )
    add_options(parser)
    known = parse_with_options(parser, arguments)
    named = [
        f"{key}={getattr(known, key)}"
        for key in ("modality", "method", "name")
        if getattr(known, key) is not None
    ]
    restart = known.restart and not is_started_again(os.environ)
    return load_config(known.config, [*named, *known.options]), restart


def is_started_again(environment: Mapping[str, str]) -> bool:
    """Return whether the launcher says that this start continues an earlier one."""
    counts = ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT")
    return any(environment.get(name, "0") not in ("", "0") for name in counts)


def main() -> int:
    """Handle signals, read the configuration, then import what needs torch and train."""
    # Before any other thread starts: threads inherit the blocked signals.
    interruption = Interruption()
    interruption.listen()
    try:
        config, restart = parse(sys.argv[1:])
    except ConfigError as error:
        print(f"train_zppo: {error}", file=sys.stderr)
        return 2
    quiet_libraries()
    from zppo_mm.run.session import exit_code
    from zppo_mm.train import folder_of, train

    try:
        train(config, interruption, restart)
    except Exception as error:
        code = exit_code(error, folder_of(config))
        if restart and code == EXIT_CODE:
            print("train_zppo: leave --restart out to continue this run", file=sys.stderr)
        return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
