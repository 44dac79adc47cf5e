"""Pictures of digits: scikit-learn's handwritten 8x8 digits as an image strip or as an H.264
clip.
"""

from __future__ import annotations

import gzip
import io
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import distribution

import numpy as np
import numpy.typing as npt
from PIL import Image

from data.toy.digits import HELD_OUT_FRACTION, Split

TILE_PIXELS = 32
FRAME_PIXELS = 40
"""decord reads rows of some narrow widths (32, 48, 96) wrongly; 40 is read right."""
GLYPH_FRACTION = 0.75
FRAMES_PER_DIGIT = 2
FRAMES_PER_SECOND = 2
"""Every digit stays one second. Sampling at 2 frames per second takes every frame, so that each
digit is one temporal patch.
"""
_SPLIT_SEED = 8

Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class DigitBank:
    """The handwritten digits of one split: `glyphs[d]` is `[examples, 8, 8]` uint8 for digit d."""

    glyphs: tuple[Pixels, ...]

    def tile(self, rng: np.random.Generator, digit: int, side: int = TILE_PIXELS) -> Pixels:
        """Return one example of a digit as `[side, side]` uint8, shifted and dimmed at random."""
        examples = self.glyphs[digit]
        glyph = Image.fromarray(examples[int(rng.integers(len(examples)))])
        glyph_side = round(side * GLYPH_FRACTION)
        drawn = np.asarray(
            glyph.resize((glyph_side, glyph_side), Image.Resampling.BICUBIC), dtype=np.float32
        )
        top, left = (int(offset) for offset in rng.integers(1, side - glyph_side, 2))
        tile = np.zeros((side, side), dtype=np.float32)
        tile[top : top + glyph_side, left : left + glyph_side] = drawn * rng.uniform(0.7, 1.0)
        return tile.round().astype(np.uint8)


def read_digits() -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    """Return scikit-learn's digits, `[examples, 8, 8]` from 0 to 16, and their labels `[examples]`.

    The file is read without importing the package, which would take a second of every run's start.
    """
    file = distribution("scikit-learn").locate_file("sklearn/datasets/data/digits.csv.gz")
    with gzip.open(str(file), "rt", encoding="utf-8") as lines:
        rows = np.loadtxt(lines, delimiter=",")
    return rows[:, :-1].reshape(-1, 8, 8), rows[:, -1].astype(np.int64)


def load_bank(split: Split) -> DigitBank:
    """Return the digits of a split; the two splits share no image."""
    images, labels = read_digits()
    pixels = (images * (255 / 16)).round().astype(np.uint8)
    held_out = np.random.default_rng(_SPLIT_SEED).random(len(pixels)) < HELD_OUT_FRACTION
    mine = held_out if split == "held_out" else ~held_out
    return DigitBank(tuple(pixels[mine & (labels == digit)] for digit in range(10)))


def strip(tiles: Sequence[Pixels]) -> Pixels:
    """Return tiles side by side as `[height, width, 3]` uint8."""
    return np.repeat(np.concatenate(tiles, axis=1)[:, :, None], 3, axis=2)


def encode_png(pixels: Pixels) -> bytes:
    """Return `[height, width, 3]` pixels as a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def encode_mp4(tiles: Sequence[Pixels]) -> bytes:
    """Return tiles shown one after another, one second each, as an H.264 mp4 file."""
    import av

    buffer = io.BytesIO()
    with av.open(buffer, mode="w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=FRAMES_PER_SECOND)
        stream.height, stream.width = tiles[0].shape
        stream.pix_fmt = "yuv420p"
        # One thread and no look-ahead: the same bytes on every machine.
        stream.options = {"crf": "16", "preset": "ultrafast", "threads": "1"}
        for tile in tiles:
            frame = av.VideoFrame.from_ndarray(strip([tile]), format="rgb24")
            for _ in range(FRAMES_PER_DIGIT):
                container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return buffer.getvalue()
