"""The lengths of the plain prompts of a run, without its network."""

from __future__ import annotations

from collections.abc import Mapping

from data.media.opening import Frames
from data.question import MediaRef, Question
from zppo_mm.config.schema import RunConfig
from zppo_mm.rollout.processor import processor_overrides
from zppo_mm.rollout.prompt import PromptEncoder
from zppo_mm.run.build import student_folder
from zppo_mm.run.shared import media_limits
from zppo_mm.zone.prompts import load_templates


class PromptLengths:
    """Counts the tokens that a run's student reads of a question, media included.

    Attributes:
        max_tokens: More than so many are not trained on.
        media_limits: What of the media has to be opened for that.
        answer_types: Those that the run can grade.

    Raises:
        ConfigError: The student's folder or a template cannot be used.
    """

    def __init__(self, config: RunConfig) -> None:
        folder = student_folder(config.model)
        self.max_tokens = config.data.max_prompt_tokens
        self.media_limits = media_limits(config.data, folder)
        self.answer_types = config.reward.answer_types
        self._media: Mapping[MediaRef, Frames] = {}
        self._encoder = PromptEncoder(
            folder,
            lambda ref: self._media[ref],
            overrides=processor_overrides(config.data),
            chat_template_kwargs=config.model.chat_template_kwargs,
            system_prompt=config.model.system_prompt,
        )
        self._templates = load_templates(config.zone.templates, self._encoder.chat.special_tokens)

    def num_tokens(self, question: Question, media: Mapping[MediaRef, Frames]) -> int:
        """Return the length of a plain prompt.

        Args:
            question: What is asked.
            media: Its media, opened within `media_limits`.

        Raises:
            PromptError: The media do not fit the prompt.
        """
        self._media = media
        try:
            prompt, _ = self._encoder.encode(self._templates.plain_text(question), question)
        finally:
            self._encoder.forget_media()
        return len(prompt.token_ids)
