"""Serve the teacher that adds by rule: chat completions at http://127.0.0.1:PORT/v1, until Ctrl-C
or SIGTERM.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from zppo_mm.bundled.rule_teacher import NAME, RuleTeacher, RuleTeacherServer
from zppo_mm.errors import ConfigError


def main() -> int:
    """Read the command line and serve."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tokenizer", type=Path, help="the student's folder")
    parser.add_argument("--port", type=int, default=8321, help="default: %(default)s")
    parser.add_argument(
        "--error-rate",
        type=float,
        default=0.1,
        help="probability of a wrong solution (default: %(default)s)",
    )
    arguments = parser.parse_args()
    try:
        teacher = RuleTeacher(arguments.tokenizer, arguments.error_rate)
    except ConfigError as error:
        print(f"serve_rule_teacher: {error}", file=sys.stderr)
        return 2
    with RuleTeacherServer(teacher, arguments.port) as server:
        print(f"{NAME!r} at {server.url}", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            return 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
