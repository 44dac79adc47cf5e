"""A question and its text to a tokenised prompt: chat template, media placeholders, positions; and
back from ids to text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path

import numpy as np

from data.errors import SampleError
from data.media.clip_cache import ClipCache
from data.media.node_cache import NodeCache
from data.media.opening import Frames
from data.question import MediaRef, Question
from encoders.config import NO_OVERRIDES
from encoders.positions import mrope_positions
from encoders.processor import VisionInput
from zppo_mm.errors import ConfigError
from zppo_mm.experience import IntArray, Prompt, Rollout
from zppo_mm.reasoning import THINK_CLOSE, THINK_OPEN
from zppo_mm.rollout.chat import ChatFormat, Piece
from zppo_mm.rollout.opened_media import DEFAULT_CACHE_BYTES, OpenedMedia
from zppo_mm.rollout.opened_media import PromptError as PromptError
from zppo_mm.rollout.processor import read_processor


class PromptEncoder:
    """Turns questions into prompts for one model; also the `MediaSource` that training opens media
    with.

    Args:
        hf_dir: Folder with the tokenizer, its chat template, config.json and, for a model that
            sees, the processor settings.
        media: Opens a media reference to pixels; a MediaError makes the question unusable, any
            other error is the run's.
        overrides: Processor settings that are not to be those of the folder.
        chat_template_kwargs: Variables of the chat template, e.g. `{"enable_thinking": False}`.
        system_prompt: Text of the system message of questions without one; empty for none but the
            template's own.
        max_cached_bytes: Most bytes of patches that this encoder keeps.
        cache: Where the processes of this machine keep them; `None` shares nothing.
        clips: Opens videos and keeps their frames on a disk; `None` keeps none.

    Attributes:
        chat: The model's chat format.
        processor: How media are processed; `None` for a model that takes none.
        media: Opened ones.

    Raises:
        ConfigError: The folder lacks a part or contradicts itself.
    """

    def __init__(
        self,
        hf_dir: str | Path,
        media: Callable[[MediaRef], Frames],
        *,
        overrides: Mapping[str, int | float] = NO_OVERRIDES,
        chat_template_kwargs: Mapping[str, object] | None = None,
        system_prompt: str = "",
        max_cached_bytes: int = DEFAULT_CACHE_BYTES,
        cache: NodeCache | None = None,
        clips: ClipCache | None = None,
    ) -> None:
        self.folder = Path(hf_dir)
        self.chat_template_kwargs = dict(chat_template_kwargs or {})
        self.system_prompt = system_prompt
        self.chat = ChatFormat(hf_dir, self.chat_template_kwargs, system_prompt)
        self.processor = read_processor(hf_dir, overrides)
        self.media = OpenedMedia(media, self.processor, max_cached_bytes, cache, clips)

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """Tokens that end a response, from the folder's generation_config.json or the tokenizer."""
        return self.chat.stop_token_ids

    def encode(self, text: str, question: Question) -> tuple[Prompt, tuple[VisionInput, ...]]:
        """Return the prompt that asks `text` after the question's earlier messages: media where the
        texts name them, or first.

        Literal special tokens inside the texts stay plain text, whoever wrote them.

        Args:
            text: The whole text of the last message, closing format instruction included.
            question: Whose media and earlier messages are shown.

        Raises:
            PromptError: The media cannot be opened or processed, or do not fit the placeholders; or
                the template cannot show the messages.
        """
        vision = self.vision_inputs(question)
        kinds = [reference.kind for reference in question.media]
        try:
            rendered = self.chat.render(text, kinds, question.earlier)
        except SampleError as error:
            raise PromptError(error.reason, f"prompt: question {question.id}: {error}") from error
        shown = [
            self.chat.media_kinds[piece]
            for piece in rendered.pieces
            if piece in self.chat.media_kinds
        ]
        if shown != [item.kind for item in vision]:
            raise PromptError(
                "placeholders",
                f"prompt: question {question.id}: placeholders do not fit its media, got {shown}, "
                f"expected {[item.kind for item in vision]}; the chat template must show every "
                "image and video once, in order",
            )
        token_ids = np.array(
            self.chat.tokenize(self._expand(rendered.pieces, vision)), dtype=np.int64
        )
        grids = tuple(item.grid for item in vision)
        merge_size = self.processor.merge_size if self.processor else 1
        placeholders = (self.chat.image_token_id, self.chat.video_token_id)
        seconds = [item.seconds_per_patch for item in vision]
        positions, next_position = mrope_positions(
            token_ids, grids, *placeholders, merge_size, self.chat.video_layout, seconds
        )
        self._check_counts(token_ids, vision, question)
        return Prompt(rendered.text, token_ids, positions, next_position, grids), vision

    def vision_inputs(self, question: Question) -> tuple[VisionInput, ...]:
        """Return one input per media reference, in prompt order.

        Raises:
            PromptError: A medium cannot be opened or processed, or the model takes none.
        """
        return self.media.of(question)

    def check_same_inputs(self, other: PromptEncoder, where: str) -> None:
        """Check that another model reads this one's tokens and patches as this one does.

        Args:
            other: Of the other model.
            where: Configuration key that asks for it.

        Raises:
            ConfigError: Names the first difference.
        """
        difference = self.chat.difference_from(other.chat)
        if not difference and self.processor is not None:
            names = [field.name for field in fields(self.processor)]
            pairs = (
                (name, getattr(self.processor, name), getattr(other.processor, name, None))
                for name in names
            )
            difference = next(
                (
                    f"{name} of the processors is {one} and {another}"
                    for name, one, another in pairs
                    if one != another
                ),
                "",
            )
        if difference:
            raise ConfigError(
                f"{where}: teacher and student do not read the same input, got a student and a "
                f"teacher whose {difference}, expected equal tokenizers and processors; use a "
                "teacher of the student's family, or a method that shows the teacher's text"
            )

    def forget_media(self) -> None:
        """Drop the media that this encoder keeps; see `OpenedMedia.forget`."""
        self.media.forget()

    def decode(self, ids: Sequence[int] | IntArray) -> str:
        """Return the text of a response without the special tokens at its end."""
        return self.chat.decode([int(token) for token in ids])

    def decode_whole(self, ids: Sequence[int] | IntArray) -> str:
        """Return as `decode`, after the `<think>` that this model's prompts open: without it, a
        reasoning that was cut would look like an answer.
        """
        text = self.decode(ids)
        return f"{THINK_OPEN}\n{text}" if self.chat.prefix.thinking == "opened" else text

    def response_ids(self, rollout: Rollout) -> list[int]:
        """Return the tokens that this model would have a response in that another one wrote.

        A response that opens its reasoning itself loses that tag where this model's prompts open it
        already. One whose own prompt opened it gets the tag where this model's prompts do not.
        """
        text = rollout.text
        prompt_opens = self.chat.prefix.thinking == "opened"
        if prompt_opens and text.lstrip().startswith(THINK_OPEN):
            text = text.lstrip().removeprefix(THINK_OPEN).removeprefix("\n")
        elif not prompt_opens and THINK_CLOSE in text.partition(THINK_OPEN)[0]:
            text = f"{THINK_OPEN}\n{text}"
        ids = self.chat.tokenize([text])
        return [*ids, self.stop_token_ids[0]] if rollout.finish_reason == "stop" else ids

    def _expand(self, pieces: Sequence[Piece], vision: Sequence[VisionInput]) -> list[Piece]:
        """Repeat each placeholder once per feature; where the family wants timestamps, a video
        becomes one block per temporal patch.

        The template shows a video as start, placeholder, end: start and end go around every such
        block instead.
        """
        if self.processor is None or not vision:
            return list(pieces)
        chat = self.chat
        expanded: list[Piece] = []
        remaining = iter(vision)
        skip_end = False
        for piece in pieces:
            kind = chat.media_kinds.get(piece)
            if kind is None:
                if not (skip_end and piece == chat.vision_end_id):
                    expanded.append(piece)
                skip_end = False
                continue
            item = next(remaining)
            t, h, w = item.grid
            num_features = h * w // self.processor.merge_size**2
            if kind == "image" or not chat.video_layout.timestamped:
                expanded.extend([piece] * (t * num_features))
                continue
            if expanded and expanded[-1] == chat.vision_start_id:
                expanded.pop()
                skip_end = True
            for seconds in item.timestamps:
                expanded.extend(
                    [
                        f"<{seconds:.1f} seconds>",
                        chat.vision_start_id,
                        *[piece] * num_features,
                        chat.vision_end_id,
                    ]
                )
        return expanded

    def _check_counts(
        self, token_ids: IntArray, vision: Sequence[VisionInput], question: Question
    ) -> None:
        """Refuse a prompt in which placeholder tokens and features differ, which would train on the
        wrong pixels.
        """
        merged = self.processor.merge_size**2 if self.processor else 1
        for kind, token in (
            ("image", self.chat.image_token_id),
            ("video", self.chat.video_token_id),
        ):
            got = int((token_ids == token).sum())
            expected = sum(
                int(np.prod(item.grid)) // merged for item in vision if item.kind == kind
            )
            if got != expected:
                raise PromptError(
                    "placeholders",
                    f"prompt: question {question.id}: {kind} placeholders do not fit, got {got} "
                    f"tokens, expected {expected}; check the chat template and the tokenizer's "
                    "special tokens",
                )
