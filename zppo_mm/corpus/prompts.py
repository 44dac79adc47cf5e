"""Holds samples against the student that will read them: images open, are large enough, and the
plain prompt is short enough.
"""

from __future__ import annotations

import json

from data.errors import MediaError, SampleError
from data.health import TOO_LONG
from data.media.opening import Frames, MediaOpener
from data.sample import ShardSample, parse_question
from zppo_mm.config.schema import RunConfig
from zppo_mm.run.prompt_lengths import PromptLengths


class PromptCheck:
    """Checks the plain prompt of a sample as a run would encode it.

    Args:
        config: The run; its student, its limits and its templates count.
        min_image_side: Fewest pixels of an image's shorter side.
    """

    def __init__(self, config: RunConfig, min_image_side: int) -> None:
        self._lengths = PromptLengths(config)
        self._opener = MediaOpener(self._lengths.media_limits)
        self._min_side = min_image_side

    def check(self, sample: ShardSample) -> None:
        """Refuse a sample that a run could not ask.

        Raises:
            ReasonedError: The reason says why: a broken or small image, a prompt that is too long,
                a question that breaks the rules of shards.
        """
        content = json.dumps(dict(sample.question)).encode()
        question = parse_question(
            "corpus", sample.key, content, (extension for extension, _ in sample.media)
        )
        files = dict(sample.media)
        media = {ref: self._image(files[ref.extension]) for ref in question.media}
        num_tokens = self._lengths.num_tokens(question, media)
        if num_tokens > self._lengths.max_tokens:
            raise SampleError(
                TOO_LONG,
                f"{question.id}: the prompt is too long, got {num_tokens} tokens, expected at most "
                f"{self._lengths.max_tokens}",
            )

    def close(self) -> None:
        """End the decoding processes."""
        self._opener.close()

    def _image(self, content: bytes) -> Frames:
        frames = self._opener.open(content, "image")
        height, width = frames.pixels.shape[1:3]
        if min(height, width) < self._min_side:
            raise MediaError(
                "small_image",
                f"the image is too small, got {width}x{height}, expected at least "
                f"{self._min_side} pixels on both sides",
            )
        return frames
