"""A model folder's chat format: template, tokenizer and special tokens, safe against text that
imitates them.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from data.question import MediaKind
from encoders.config import TIMESTAMPED, VideoLayout
from zppo_mm.errors import ConfigError
from zppo_mm.experience import NO_TOKEN
from zppo_mm.models.families.table import FAMILIES
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

_NO_LIMIT = 1 << 62
_ASKED, _ANSWERED = "zppoquestion", "zppoanswer"
"""Texts that no template has and none changes."""

Piece = int | str
"""The id of a special token, or plain text that is never read as one."""


@dataclass(frozen=True, slots=True)
class Rendered:
    """A rendered chat: as a person reads it, and in pieces."""

    text: str
    pieces: tuple[Piece, ...]


class ChatFormat:
    """Renders one user message and turns pieces into token ids.

    Args:
        hf_dir: Folder with tokenizer, chat template and config.json.
        template_kwargs: Passed to the chat template.

    Raises:
        ConfigError: No chat template or one that cannot render a question, no stop token, tokens
            that the tokenizer or the embedding does not know, or a family that is not known.
    """

    def __init__(
        self, hf_dir: str | Path, template_kwargs: Mapping[str, object] | None = None
    ) -> None:
        self._folder = Path(hf_dir)
        self._tokenizer: Any = _load_tokenizer(self._folder)
        self._template_kwargs = dict(template_kwargs or {})
        config = _read_json(self._folder / "config.json")
        self.takes_media = "vision_config" in config
        self._use_media_template()
        self._check_template()
        names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
        tokens = [
            self._media_token(config, name) if self.takes_media else NO_TOKEN for name in names
        ]
        self.image_token_id, self.video_token_id, self.vision_start_id, self.vision_end_id = tokens
        self.media_kinds: dict[Piece, MediaKind] = (
            {self.image_token_id: "image", self.video_token_id: "video"} if self.takes_media else {}
        )
        self.video_layout = self._find_video_layout(config) if self.takes_media else TIMESTAMPED
        self._special_ids = self._find_special_ids(tokens)
        self._pattern = _any_of(self._special_ids)
        self._literal_pattern = _any_of([*self._special_ids, MARK_OPEN, MARK_CLOSE])
        generation = self._folder / GENERATION_FILE
        stops = configured_stops(
            self._folder,
            _read_json(generation) if generation.is_file() else {},
            config,
            self._tokenizer,
        )
        self.stop_token_ids = stops_with_turn_end(
            self._folder, stops, self._find_turn_end(), num_embedding_rows(config)
        )
        self._check_prompts(num_embedding_rows(config))

    def render(self, text: str, media: Sequence[MediaKind]) -> Rendered:
        """Render one user message, media first, and the start of the answer.

        Literal special tokens inside the text are hidden from the template's own and come back as
        plain text.

        Args:
            text: The user's text.
            media: Kinds of media in order.
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

        marked = self._literal_pattern.sub(hide, text)
        shown: list[dict[str, str]] = [{"type": kind} for kind in media]
        content = [*shown, {"type": "text", "text": marked}] if media else marked
        rendered = self._apply_template([{"role": "user", "content": content}])
        pieces: list[Piece] = []
        position = 0
        for match in self._pattern.finditer(rendered):
            pieces.extend(
                [restore(rendered[position : match.start()]), self._special_ids[match.group()]]
            )
            position = match.end()
        pieces.append(restore(rendered[position:]))
        return Rendered(restore(rendered), tuple(piece for piece in pieces if piece != ""))

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
        """Return the ids of all tokens by the bytes that they stand for; of equals an added token,
        which tokenising finds first.

        Raises:
            ConfigError: The tokenizer is not of the byte-level kind.
        """
        added = {
            int(token_id): str(token.content)
            for token_id, token in self._tokenizer.added_tokens_decoder.items()
        }
        plain = {
            token: token_id
            for token, token_id in self._tokenizer.get_vocab().items()
            if token_id not in added
        }
        alphabet = _byte_alphabet()
        foreign = next((token for token in plain if not alphabet.keys() >= set(token)), None)
        if foreign is not None:
            raise ConfigError(
                f"{self._folder}: a server's tokens cannot be found in this tokenizer, got the "
                f"entry {foreign!r}, expected a byte-level vocabulary; distil from a teacher in "
                "this process"
            )
        spelled = {
            bytes(alphabet[character] for character in token): token_id
            for token, token_id in plain.items()
        }
        return spelled | {text.encode(): token_id for token_id, text in added.items()}

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
    def special_tokens(self) -> tuple[str, ...]:
        """Texts of the special tokens."""
        return tuple(self._special_ids)

    def count_tokens(self, text: str) -> int:
        """Return the length of a text in tokens, nothing in it taken for a special token."""
        return len(self._tokenize_plain(text))

    def _tokenize_plain(self, text: str) -> list[int]:
        """Tokenise text in which nothing is a special token.

        A tokenizer can be told to split what it lists as special; what a folder lists as an
        ordinary added token (media placeholders in some) it finds regardless, so there a zero-width
        space breaks the literal.
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

    def _apply_template(
        self, messages: Sequence[Mapping[str, object]], *, opens_answer: bool = True
    ) -> str:
        """Return a rendered conversation.

        Raises:
            ConfigError: The template cannot render it.
        """
        try:
            rendered: str = self._tokenizer.apply_chat_template(
                list(messages),
                tokenize=False,
                add_generation_prompt=opens_answer,
                **self._template_kwargs,
            )
        except Exception as error:
            # A template is a program: what it can raise has no bounds.
            raise ConfigError(
                f"{self._folder}: the chat template cannot render "
                f"{[message['role'] for message in messages]}, got {type(error).__name__}: "
                f"{' '.join(str(error).split())}, expected text; use the template that belongs to "
                "the model"
            ) from error
        return rendered

    def _check_template(self) -> None:
        template = self._tokenizer.chat_template
        if isinstance(template, dict) and "default" not in template:
            raise ConfigError(
                f"{self._folder}: no chat template, got {sorted(template)}, expected one that is "
                "named default; name it so"
            )
        if not template:
            raise ConfigError(
                f"{self._folder}: no chat template, got none, expected chat_template.jinja or an "
                "entry in tokenizer_config.json; add it"
            )

    def _find_turn_end(self) -> int | None:
        """Return the special token that the template puts after an answer; `None` if there is none,
        or it also opens what the user says.
        """
        messages = [
            {"role": role, "content": text}
            for role, text in (("user", _ASKED), ("assistant", _ANSWERED), ("user", _ASKED))
        ]
        try:
            rendered = self._apply_template(messages)
        except ConfigError as error:
            logger.warning("%s", error)
            return None
        before, _, rest = rendered.partition(_ASKED)
        opener = [match.group() for match in self._pattern.finditer(before)][-1:]
        after = rest.rpartition(_ANSWERED)[2]
        found = (
            self._pattern.match(after, len(after) - len(after.lstrip()))
            if _ANSWERED in rest
            else None
        )
        return (
            None if found is None or found.group() in opener else self._special_ids[found.group()]
        )

    def _check_prompts(self, num_rows: int | None) -> None:
        """Render a question of every kind, and check what comes out before it comes in the middle
        of a run.
        """
        decoded = self.decode(self._tokenize_plain(_ASKED))
        if "".join(decoded.split()) != "".join(_ASKED.split()):
            raise ConfigError(
                f"{self._folder}: the tokenizer loses text, got {decoded!r} back, expected "
                f"{_ASKED!r}; copy tokenizer.json from the original model folder"
            )
        used = {
            self.stop_token_ids[0],
            *(piece for piece in self.media_kinds if isinstance(piece, int)),
        }
        for media in ([], *([kind] for kind in self.media_kinds.values())):
            rendered = self.render(_ASKED, media)
            used |= {piece for piece in rendered.pieces if isinstance(piece, int)}
            if rendered.text.count(_ASKED) != 1:
                raise ConfigError(
                    f"{self._folder}: the chat template does not show what it is given, got the "
                    f"text of a question with {media or 'no media'} {rendered.text.count(_ASKED)} "
                    "times, expected once; use the template that belongs to the model"
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

    def _use_media_template(self) -> None:
        """Take the template that some folders keep for media apart from the tokenizer's, which may
        know text only.
        """
        if not self.takes_media:
            return
        # The newest way to keep one comes first; the tokenizer has read it.
        jinja = self._folder / "chat_template.jinja"
        found = {jinja.name: self._tokenizer.chat_template} if jinja.is_file() else {}
        for path in (self._folder / "processor_config.json", self._folder / "chat_template.json"):
            template = _read_json(path).get("chat_template") if path.is_file() else None
            found |= {path.name: template} if template is not None else {}
        if found:
            (name, self._tokenizer.chat_template), *others = found.items()
            different = [
                other for other, template in others if template != self._tokenizer.chat_template
            ]
            if different:
                logger.warning(
                    "%s: chat templates differ, that of %s is used and not that of %s",
                    self._folder,
                    name,
                    different,
                )

    def _find_video_layout(self, config: Mapping[str, Any]) -> VideoLayout:
        name = config.get("model_type")
        family = FAMILIES.get(name) if isinstance(name, str) else None
        if family is None:
            raise ConfigError(
                f"{self._folder}/config.json: model_type is not supported, got {name!r}, expected "
                f"one of {', '.join(FAMILIES)}; use a folder of one of these families"
            )
        try:
            return family.video_layout(config)
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"{self._folder}/config.json: its layout of videos is unusable, got {error}; "
                "correct the file"
            ) from error
        except KeyError as error:
            raise ConfigError(
                f"{self._folder}/config.json: the key {error} is missing, expected a complete "
                f"{family.title} config; download it again"
            ) from error

    def _media_token(self, config: Mapping[str, Any], name: str) -> int:
        token = config.get(name)
        if not isinstance(token, int) or not 0 <= token < len(self._tokenizer):
            raise ConfigError(
                f"{self._folder}/config.json: unusable {name}, got {token!r}, expected an id below "
                f"the tokenizer's {len(self._tokenizer)}; use the tokenizer that belongs to the "
                "model"
            )
        return token

    def _find_special_ids(self, media_tokens: Sequence[int]) -> dict[str, int]:
        """Return the special tokens by text: those the tokenizer flags as special, and the media
        tokens in any case.
        """
        added = self._tokenizer.added_tokens_decoder.items()
        special = {str(token.content): int(token_id) for token_id, token in added if token.special}
        special |= {
            str(self._tokenizer.convert_ids_to_tokens(token)): token
            for token in media_tokens
            if token != NO_TOKEN
        }
        if not special:
            raise ConfigError(
                f"{self._folder}: the tokenizer has no special tokens, got none, expected at least "
                "a stop token; add them"
            )
        return special


def _load_tokenizer(folder: Path) -> Any:
    """Return a folder's tokenizer; no code of the folder is run.

    Raises:
        ConfigError: It cannot be loaded.
    """
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    except Exception as error:
        # The tokenizers library raises bare exceptions.
        raise ConfigError(
            f"{folder}: the tokenizer cannot be loaded, got {type(error).__name__}: "
            f"{' '.join(str(error).split())}, expected files of a Hugging Face tokenizer; copy "
            "them from the original model folder"
        ) from error
    # Any value may stand there, and data.max_prompt_tokens is what bounds a prompt.
    tokenizer.model_max_length = _NO_LIMIT
    return tokenizer


def _byte_alphabet() -> dict[str, int]:
    """Return the byte that each character of a byte-level vocabulary stands for: printable ones for
    themselves, then those from 256 on.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + place): byte for place, byte in enumerate(others)
    }


def _any_of(literals: Sequence[str] | Mapping[str, int]) -> re.Pattern[str]:
    """Match any of the literals, the longest first."""
    return re.compile(
        "|".join(re.escape(literal) for literal in sorted(literals, key=len, reverse=True))
    )


def _read_json(path: Path) -> Mapping[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"{path}: not readable, got {error}, expected a JSON object; restore the file"
        ) from error
    if not isinstance(content, dict):
        raise ConfigError(
            f"{path}: wrong content, got {type(content).__name__}, expected a JSON object; restore "
            "the file"
        )
    return content
