"""A model folder's chat format: template, tokenizer and special tokens, safe against text that
imitates them.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from data.errors import SampleError
from data.messages import Part, placed
from data.question import MediaKind, Turn
from encoders.config import TIMESTAMPED
from zppo_mm.errors import ConfigError
from zppo_mm.experience import NO_TOKEN
from zppo_mm.rollout.chat_template import QUESTION, THINKING_SWITCH, ChatTemplate, read_json
from zppo_mm.rollout.processor import find_video_layout
from zppo_mm.rollout.tokenizer import load_tokenizer, special_ids, token_bytes
from zppo_mm.rollout.vocabulary import (
    GENERATION_FILE,
    check_ids,
    configured_stops,
    num_embedding_rows,
    stops_with_turn_end,
)

logger = logging.getLogger(__name__)

MARK_OPEN, MARK_CLOSE = "\ue200", "\ue201"
"""Private-use characters that bracket the number of a literal special token while the template runs
over the text.
"""
ZERO_WIDTH_SPACE = "\u200b"

Piece = int | str
"""The id of a special token, or plain text that is never read as one."""


@dataclass(frozen=True, slots=True)
class Rendered:
    """A rendered chat: as a person reads it, and in pieces."""

    text: str
    pieces: tuple[Piece, ...]


class ChatFormat:
    """Renders conversations, behind a system message if there is one, and turns pieces into token
    ids.

    Args:
        hf_dir: Folder with tokenizer, chat template and config.json.
        template_kwargs: Variables of the chat template.
        system_prompt: Text of the system message of conversations without one; empty for none but
            the template's own.

    Attributes:
        prefix: What comes between a prompt's text and the answer.

    Raises:
        ConfigError: No chat template, one that cannot render a question or shows no system message,
            no stop token, tokens that the tokenizer or the embedding does not know, or a family
            that is not known.
    """

    def __init__(
        self,
        hf_dir: str | Path,
        template_kwargs: Mapping[str, object] | None = None,
        system_prompt: str = "",
    ) -> None:
        self._folder = Path(hf_dir)
        self._system_prompt = system_prompt
        self._tokenizer: Any = load_tokenizer(self._folder)
        config = read_json(self._folder / "config.json")
        self.takes_media = "vision_config" in config
        self._template = ChatTemplate(
            self._folder, self._tokenizer, self.takes_media, template_kwargs or {}
        )
        names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
        tokens = [
            self._media_token(config, name) if self.takes_media else NO_TOKEN for name in names
        ]
        self.image_token_id, self.video_token_id, self.vision_start_id, self.vision_end_id = tokens
        self.media_kinds: dict[Piece, MediaKind] = (
            {self.image_token_id: "image", self.video_token_id: "video"} if self.takes_media else {}
        )
        self.video_layout = (
            find_video_layout(self._folder, config) if self.takes_media else TIMESTAMPED
        )
        self._special_ids = special_ids(self._folder, self._tokenizer, tokens)
        self._pattern = _any_of(self._special_ids)
        self._literal_pattern = _any_of([*self._special_ids, MARK_OPEN, MARK_CLOSE])
        generation = self._folder / GENERATION_FILE
        stops = configured_stops(
            self._folder,
            read_json(generation) if generation.is_file() else {},
            config,
            self._tokenizer,
        )
        turn_end = self._template.turn_end(self._pattern)
        self.stop_token_ids = stops_with_turn_end(
            self._folder,
            stops,
            None if turn_end is None else self._special_ids[turn_end],
            num_embedding_rows(config),
        )
        self._check_prompts(num_embedding_rows(config))
        self.prefix = self._template.generation_prefix()

    def render(
        self, text: str, media: Sequence[MediaKind], earlier: Sequence[Turn] = ()
    ) -> Rendered:
        """Render a conversation and the start of the answer, its media where `data.messages.placed`
        has them.

        Literal special tokens inside the texts are hidden from the template's own and come back as
        plain text.

        Args:
            text: Of the last message, the user's.
            media: Kinds of media in order.
            earlier: Messages before it.

        Raises:
            SampleError: The texts name other media, or the template does not show the earlier
                messages.
        """
        literals: list[str] = []

        def hide(match: re.Match[str]) -> str:
            literals.append(match.group())
            return f"{MARK_OPEN}{len(literals) - 1}{MARK_CLOSE}"

        def restore(hidden: str) -> str:
            return re.sub(
                f"{MARK_OPEN}(\\d+){MARK_CLOSE}",
                lambda match: literals[int(match.group(1))],
                hidden,
            )

        def content(parts: Sequence[Part]) -> str | list[dict[str, str]]:
            typed: list[dict[str, str]] = [
                {"type": media[part]}
                if isinstance(part, int)
                else {"type": "text", "text": self._literal_pattern.sub(hide, part)}
                for part in parts
            ]
            return typed if [each["type"] for each in typed] != ["text"] else typed[0]["text"]

        turns = [*earlier, Turn("user", text)]
        if self._system_prompt and turns[0].role != "system":
            turns.insert(0, Turn("system", self._system_prompt))
        messages = [
            {"role": role, "content": content(parts)} for role, parts in placed(turns, media)
        ]
        rendered = self._apply(messages, has_earlier=bool(earlier))
        pieces: list[Piece] = []
        position = 0
        for match in self._pattern.finditer(rendered):
            pieces.extend(
                [restore(rendered[position : match.start()]), self._special_ids[match.group()]]
            )
            position = match.end()
        pieces.append(restore(rendered[position:]))
        return Rendered(restore(rendered), tuple(piece for piece in pieces if piece != ""))

    def _apply(self, messages: Sequence[Mapping[str, Any]], *, has_earlier: bool) -> str:
        """Apply the template. Not every one takes every order of roles: then it is the sample that
        cannot be asked.
        """
        if not has_earlier:
            return self._template.apply(messages)
        try:
            rendered = self._template.apply(messages)
        except ConfigError as error:
            raise SampleError("conversation", str(error)) from error
        # What the assistant wrote may be shortened: templates leave out earlier reasoning.
        asked = [message["content"] for message in messages if message["role"] != "assistant"]
        texts = [
            part if isinstance(part, str) else part.get("text", "")
            for content in asked
            for part in ([content] if isinstance(content, str) else content)
        ]
        lost = next((text for text in texts if text.strip() not in rendered), None)
        if lost is not None:
            raise SampleError(
                "conversation",
                f"{self._folder}: the chat template leaves out a message, got none with "
                f"{lost!r:.80}, expected all; use samples without such messages",
            )
        return rendered

    def tokenize(self, pieces: Sequence[Piece]) -> list[int]:
        """Return the ids of pieces; neighbouring plain pieces are tokenised as one text, as in a
        whole string.
        """
        ids: list[int] = []
        for plain, group in groupby(pieces, key=lambda piece: isinstance(piece, str)):
            if plain:
                ids.extend(self._tokenize_plain("".join(str(piece) for piece in group)))
            else:
                ids.extend(int(piece) for piece in group)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids without the special tokens at their end; special tokens elsewhere
        are shown.
        """
        special = set(self._special_ids.values())
        end = len(ids)
        while end and ids[end - 1] in special:
            end -= 1
        text: str = self._tokenizer.decode(
            list(ids[:end]), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return text

    def token_bytes(self) -> dict[bytes, int]:
        """Return the ids of all tokens by their bytes.

        Raises:
            ConfigError: The tokenizer is not of the byte-level kind.
        """
        return token_bytes(self._folder, self._tokenizer)

    def difference_from(self, other: ChatFormat) -> str:
        """Return the first difference in what token ids mean, in words; empty if there is none."""
        mine, theirs = (
            {token_id: token for token, token_id in chat._tokenizer.get_vocab().items()}
            for chat in (self, other)
        )
        for token_id in sorted(mine.keys() | theirs.keys()):
            if mine.get(token_id) != theirs.get(token_id):
                return f"token {token_id} is {mine.get(token_id)!r} and {theirs.get(token_id)!r}"
        for name in ("special_tokens", "image_token_id", "video_token_id", "video_layout"):
            one, another = getattr(self, name), getattr(other, name)
            if one != another:
                return f"{name} are {one} and {another}"
        return ""

    @property
    def can_switch_thinking(self) -> bool:
        """Whether the chat template reads `enable_thinking`."""
        return THINKING_SWITCH in self._template.variables

    @property
    def special_tokens(self) -> tuple[str, ...]:
        """Texts of the special tokens."""
        return tuple(self._special_ids)

    def count_tokens(self, text: str) -> int:
        """Return the length of a text in tokens, nothing in it taken for a special token."""
        return len(self._tokenize_plain(text))

    def _tokenize_plain(self, text: str) -> list[int]:
        """Tokenise text in which nothing is a special token.

        A tokenizer can split what it lists as special. What a folder lists as an ordinary added
        token (media placeholders in some) it finds regardless, so a zero-width space breaks the
        literal there.
        """
        ids: list[int] = self._tokenizer.encode(
            text, add_special_tokens=False, split_special_tokens=True
        )
        forbidden = set(self._special_ids.values())
        if not forbidden.intersection(ids):
            return ids
        broken = self._pattern.sub(
            lambda match: match.group()[0] + ZERO_WIDTH_SPACE + match.group()[1:], text
        )
        ids = self._tokenizer.encode(broken, add_special_tokens=False, split_special_tokens=True)
        assert not forbidden.intersection(ids), "a broken literal is no special token"
        return ids

    def _check_prompts(self, num_rows: int | None) -> None:
        """Render a question of every kind, and check what comes out before it comes in the middle
        of a run.
        """
        decoded = self.decode(self._tokenize_plain(QUESTION))
        if "".join(decoded.split()) != "".join(QUESTION.split()):
            raise ConfigError(
                f"{self._folder}: the tokenizer loses text, got {decoded!r} back, expected "
                f"{QUESTION!r}; copy tokenizer.json from the original model folder"
            )
        used = {
            self.stop_token_ids[0],
            *(piece for piece in self.media_kinds if isinstance(piece, int)),
        }
        for media in ([], *([kind] for kind in self.media_kinds.values())):
            rendered = self.render(QUESTION, media)
            used |= {piece for piece in rendered.pieces if isinstance(piece, int)}
            count = rendered.text.count(QUESTION)
            if self._system_prompt.strip() not in rendered.text:
                raise ConfigError(
                    f"{self._folder}: the chat template shows no system message, got "
                    f"{rendered.text!r:.300}, expected {self._system_prompt!r:.80} in it; put it "
                    "into the closing instruction (zone.templates) instead of model.system_prompt"
                )
            if count != 1:
                raise ConfigError(
                    f"{self._folder}: the chat template does not show what it is given, got the "
                    f"text of a question with {media or 'no media'} {count} times, expected once; "
                    "use the template that belongs to the model"
                )
            if (
                media
                and [
                    self.media_kinds[piece]
                    for piece in rendered.pieces
                    if piece in self.media_kinds
                ]
                != media
            ):
                logger.warning(
                    "%s: the chat template does not show one %s once; such questions will be "
                    "refused",
                    self._folder,
                    media[0],
                )
        if num_rows is not None:
            check_ids(self._folder, self._tokenizer, used, num_rows)

    def _media_token(self, config: Mapping[str, Any], name: str) -> int:
        token = config.get(name)
        if not isinstance(token, int) or not 0 <= token < len(self._tokenizer):
            raise ConfigError(
                f"{self._folder}/config.json: unusable {name}, got {token!r}, expected an id below "
                f"the tokenizer's {len(self._tokenizer)}; use the tokenizer that belongs to the "
                "model"
            )
        return token


def _any_of(literals: Sequence[str] | Mapping[str, int]) -> re.Pattern[str]:
    """Match any of the literals, the longest first."""
    return re.compile(
        "|".join(re.escape(literal) for literal in sorted(literals, key=len, reverse=True))
    )
