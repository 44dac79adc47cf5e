"""The question: small, hashable, never holding pixels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

AnswerType = Literal["math", "choice", "open"]
MediaKind = Literal["image", "video"]

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
class Question:
    """One question with its reference answer.

    Attributes:
        id: Unique over all sources of a run.
        text: The question as the user asks it, without the closing format instruction.
        media: Images and videos, in the order in which the prompt shows them.
        answer: The reference answer; for `choice` the letter.
        answer_type: How the answer is verified.
        choices: Option texts of a multiple-choice question, first is A.
        source: Name of the data source.
    """

    id: str
    text: str
    media: tuple[MediaRef, ...]
    answer: str
    answer_type: AnswerType
    choices: tuple[str, ...] = ()
    source: str = ""
