"""Holds samples against the student that will read them: images open, are large enough, and the
plain prompt is short enough.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from data.errors import MediaError, SampleError
from data.media.opening import Frames, MediaOpener
from data.question import MediaRef
from data.sample import ShardSample, parse_question
from zppo_mm.config.schema import RunConfig
from zppo_mm.rollout.processor import processor_overrides
from zppo_mm.rollout.prompt import PromptEncoder
from zppo_mm.run.build import student_folder
from zppo_mm.run.shared import media_limits
from zppo_mm.zone.prompts import load_templates


class PromptCheck:
    """Encodes the plain prompt of a sample as a run would.

    Args:
        config: The run; its student, its limits and its templates count.
        min_image_side: Fewest pixels of an image's shorter side.
    """

    def __init__(self, config: RunConfig, min_image_side: int) -> None:
        folder = student_folder(config.model)
        self._opener = MediaOpener(media_limits(config.data, folder))
        self._encoder = PromptEncoder(
            folder,
            self._open,
            overrides=processor_overrides(config.data),
            chat_template_kwargs=config.model.chat_template_kwargs,
        )
        self._templates = load_templates(config.zone.templates, self._encoder.chat.special_tokens)
        self._max_tokens = config.data.max_prompt_tokens
        self._min_side = min_image_side
        self._media: Mapping[str, bytes] = {}

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
        self._media = dict(sample.media)
        # Keys are those of rows, which repeat from file to file.
        self._encoder.forget_media()
        prompt, _ = self._encoder.encode(self._templates.plain_text(question), question)
        if len(prompt.token_ids) > self._max_tokens:
            raise SampleError(
                "long_prompt",
                f"{question.id}: the prompt is too long, got {len(prompt.token_ids)} tokens, "
                f"expected at most {self._max_tokens}",
            )

    def close(self) -> None:
        """End the decoding processes."""
        self._opener.close()

    def _open(self, reference: MediaRef) -> Frames:
        frames = self._opener.open(self._media[reference.extension], reference.kind)
        height, width = frames.pixels.shape[1:3]
        if min(height, width) < self._min_side:
            raise MediaError(
                "small_image",
                f"the image is too small, got {width}x{height}, expected at least "
                f"{self._min_side} pixels on both sides",
            )
        return frames
