"""Write easy sums as JSON lines for tools/make_shards.py: OUT_DIR/train.jsonl and
OUT_DIR/held_out.jsonl.
"""

from __future__ import annotations

import sys

from data.toy.command_line import write_from_command_line
from data.toy.sums import write_sums

if __name__ == "__main__":
    sys.exit(write_from_command_line(__doc__, "sums", num_train=400, write=write_sums))
