"""Small samples for the tests of shards and streams."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

from data.sample import ShardSample


def png(width: int = 8, height: int = 6, value: int = 100) -> bytes:
    """Return a grey PNG file."""
    file = io.BytesIO()
    Image.fromarray(np.full((height, width, 3), value, np.uint8)).save(file, "PNG")
    return file.getvalue()


def sample(index: int, media: Sequence[tuple[str, bytes]] = (), **fields: object) -> ShardSample:
    """Return a good sample; `fields` replace its own."""
    question = {"id": f"q{index}", "question": f"{index} + 1 = ?", "answer": str(index + 1), "answer_type": "math"}
    return ShardSample(f"{index:06d}", {**question, **fields}, media)
