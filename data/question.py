"""The question: small, hashable, never holding pixels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from data.errors import DataError

AnswerType: TypeAlias = str
"""One of `ANSWER_TYPES`, or one that a run has a reward function of its own for."""
MediaKind = Literal["image", "video"]
Role = Literal["system", "user", "assistant"]

ANSWER_TYPES: tuple[AnswerType, ...] = ("math", "choice", "open")


@dataclass(frozen=True, slots=True)
class MediaRef:
    """Names one media file without holding it.

    Attributes:
        kind: `image` or `video`.
        shard: Path of the shard (tar) that holds the file.
        key: Sample key inside the shard.
        extension: Member name after the key and its dot, e.g. `jpg`, `0.png`, `mp4`.
    """

    kind: MediaKind
    shard: str
    key: str
    extension: str


@dataclass(frozen=True, slots=True)
class Turn:
    """One message of a conversation; `<image>` and `<video>` in its text place media."""

    role: Role
    text: str


@dataclass(frozen=True, slots=True)
class Question:
    """One question with its reference answer.

    Attributes:
        id: Unique over all sources of a run.
        text: The question as the user asks it, without the closing format instruction: the last
            message of the conversation. `<image>` and `<video>` in it place media.
        media: Images and videos, in the order in which the prompt shows them.
        answer: The reference answer; for `choice` the letter.
        answer_type: How the answer is verified.
        choices: Option texts of a multiple-choice question, first is A.
        source: Name of the data source.
        metadata: JSON of what else a reward function is to know; empty for nothing.
        earlier: Messages before `text`, oldest first; a message of the system comes first.
    """

    id: str
    text: str
    media: tuple[MediaRef, ...]
    answer: str
    answer_type: AnswerType
    choices: tuple[str, ...] = ()
    source: str = ""
    metadata: str = ""
    earlier: tuple[Turn, ...] = ()

    @property
    def modality(self) -> str:
        """`text`, `image`, `video`, or `mixed` with both kinds of media."""
        kinds = sorted({reference.kind for reference in self.media})
        return "text" if not kinds else kinds[0] if len(kinds) == 1 else "mixed"


def question_of(record: Mapping[str, Any]) -> Question:
    """Return the question of which a record is what `dataclasses.asdict` makes, also after a trip
    through JSON.

    Raises:
        KeyError: A field is missing; TypeError: one is of another kind.
    """
    return Question(
        **{
            **record,
            "media": tuple(MediaRef(**ref) for ref in record["media"]),
            "choices": tuple(record["choices"]),
            "earlier": tuple(Turn(**turn) for turn in record.get("earlier", ())),
        }
    )


def check_same_question(first: Question, second: Question) -> None:
    """Refuse two different questions of one id, which everything that goes by the id would mix up.

    Raises:
        DataError: The ids are equal and something else is not.
    """
    if first.id == second.id and first != second:
        raise DataError(
            f"data: two different questions have the id {first.id!r}, got {_location(first)} and "
            f"{_location(second)}, expected an id of its own for every question of all sources; "
            "rename one; tools/make_shards.py lint finds all such ids"
        )


def _location(question: Question) -> str:
    """Say where a question comes from as far as it knows: its source, its sample if it has media,
    and how it starts.
    """
    sample = f", {question.media[0].shard}:{question.media[0].key}" if question.media else ""
    return f"{question.text[:60]!r} (source {question.source!r}{sample})"
