"""Write pictures of rectangles, and where they are, for tools/make_shards.py: OUT_DIR/train.jsonl,
OUT_DIR/held_out.jsonl and OUT_DIR/pictures.
"""

from __future__ import annotations

import sys

from data.toy.boxes import write_boxes
from data.toy.command_line import write_from_command_line

if __name__ == "__main__":
    sys.exit(write_from_command_line(__doc__, "boxes", num_train=1000, write=write_boxes))
