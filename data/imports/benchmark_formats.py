"""What a row of a known benchmark means: its columns as a question, its media still where they lie.

A format is a table from the parts of a question to columns, which a user may change, and the few
rules that the table cannot say.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from data.errors import SampleError
from data.imports.row_view import RowView, spelled
from data.question import ANSWER_TYPES, AnswerType, MediaKind
from data.sample import media_kind

PARTS = (
    "id",
    "question",
    "answer",
    "answer_type",
    "choices",
    "source",
    "metadata",
    "image",
    "video",
    "media",
    "ignore",
)
"""What columns can be given for; `ignore` are those whose pictures and videos are left out on
purpose.
"""
_NUMBER = re.compile(
    r"[-+]?\$?(?:\d[\d,]*\.?\d*|\.\d+)(?:e[-+]?\d+)?(?: ?/ ?\d+)?%?", re.IGNORECASE
)
_DECIMALS = re.compile(r"(\d+)(?:\.0*)?")
_MARKER = re.compile(r"<image (\d+)>")
_SUBJECT = re.compile(r"(?:dev|validation|test)_(.+)_\d+")


@dataclass(frozen=True, slots=True)
class Draft:
    """A question before its media are read.

    Attributes:
        question: Fields of KEY.json but for the media.
        media: Kind and value of each: a path, the bytes, or `{"bytes": …, "path": …}`.
    """

    question: Mapping[str, Any]
    media: Sequence[tuple[MediaKind, Any]] = ()


def read_mathvista(view: RowView) -> Draft:
    """Read a row of MathVista: unit and decimal places of the answer are stated in the question,
    as its own prompts do.
    """
    answer, choices = view.answer(), view.choices()
    kind = view.text("answer_type", default="text")
    text = view.text("question")
    unit, decimals = view.row.get("unit"), _DECIMALS.fullmatch(str(view.row.get("precision")))
    if unit and isinstance(unit, str):
        text += f" (Unit: {unit})"
    answer_type: AnswerType = "math"
    if choices:
        answer_type, answer = "choice", view.letter(answer, choices, "text")
    elif kind == "float" and decimals:
        text += (
            f" Round the answer to {decimals[1]} decimal place{'' if decimals[1] == '1' else 's'}."
        )
    elif kind == "text":
        answer_type = "open"
    source = f"mathvista/{view.text('source', default=view.stem)}"
    return Draft(
        _fields(f"mathvista/{_own_id(view)}", text, answer, answer_type, choices, source),
        view.media(("image", "image")),
    )


def read_mmmu(view: RowView) -> Draft:
    """Read a row of MMMU: `<image n>` in question and options names the n-th of the pictures, which
    all come before the text.

    An open question may have several spellings of its answer: the first that is a number, or else
    all of them for a judge.
    """
    answer, choices = view.answer(), view.choices()
    answer_type: AnswerType = "choice"
    if choices:
        answer = view.letter(answer, choices, "letter")
    else:
        several = spelled(answer)
        spellings = [
            str(entry).strip()
            for entry in (several if isinstance(several, list) and several else [answer])
        ]
        number = next((entry for entry in spellings if _NUMBER.fullmatch(entry)), None)
        answer_type, answer = (
            ("open", " or ".join(spellings)) if number is None else ("math", number)
        )
    media = [
        (number, value)
        for number, value in enumerate(view.all_values("image"), start=1)
        if value not in (None, "")
    ]
    position_of = {number: position for position, (number, _) in enumerate(media, start=1)}
    question_id = _own_id(view)
    subject = _SUBJECT.fullmatch(question_id)
    source = view.text("source", default=subject[1] if subject else view.stem)
    fields = _fields(
        f"mmmu/{question_id}",
        _renumber(view, view.text("question"), position_of),
        answer,
        answer_type,
        [_renumber(view, choice, position_of) for choice in choices],
        f"mmmu/{source}",
    )
    return Draft(fields, [("image", value) for _, value in media])


def read_videomme(view: RowView) -> Draft:
    """Read a row of Video-MME: its video lies beside the table as `<videoID>.mp4`, also in
    `video/`, `videos/` or `data/`.
    """
    choices = view.choices()
    answer = view.letter(view.answer(), choices, "letter")
    source = f"videomme/{view.text('source', default=view.stem)}"
    fields = _fields(
        f"videomme/{_own_id(view)}", view.text("question"), answer, "choice", choices, source
    )
    return Draft(fields, view.media(("video", "video")))


def read_fields(view: RowView) -> Draft:
    """Read a row of any table whose columns the user has named.

    Without an answer type, options make a question multiple choice, and all others are compared as
    mathematics.
    """
    answer, choices = view.answer(), view.choices()
    named = view.columns.get("answer_type", "")
    answer_type = (
        named
        if named in ANSWER_TYPES and named not in view.row
        else view.text("answer_type", default="choice" if choices else "math")
    )
    if answer_type == "choice":
        answer = view.letter(answer, choices)
    paths = [path for _, path in view.media(("media", "image"))]
    media = view.media(("image", "image"), ("video", "video")) + [
        (media_kind(str(path).lower()) or "image", path) for path in paths
    ]
    source = view.text("source", default=view.stem)
    fields = _fields(_own_id(view), view.text("question"), answer, answer_type, choices, source)
    return Draft({**fields, **view.metadata()}, media)


@dataclass(frozen=True, slots=True)
class BenchmarkFormat:
    """How rows of one kind are read.

    Attributes:
        read: From a row to a question.
        columns: By part of a question, where the format has them.
        marks: Columns by which a table of this kind is recognised.
    """

    read: Callable[[RowView], Draft]
    columns: Mapping[str, str]
    marks: frozenset[str]


FORMATS: Mapping[str, BenchmarkFormat] = {
    "mathvista": BenchmarkFormat(
        read_mathvista,
        {
            "id": "pid",
            "question": "question",
            "answer": "answer",
            "answer_type": "answer_type",
            "choices": "choices",
            "source": "metadata.source",
            "image": "image",
            "ignore": "",
        },
        frozenset({"pid", "question", "choices", "precision"}),
    ),
    "mmmu": BenchmarkFormat(
        read_mmmu,
        {name: name for name in ("id", "question", "answer", "source")}
        | {
            "choices": "options",
            "image": ",".join(f"image_{number}" for number in range(1, 8)),
            "ignore": "",
        },
        frozenset({"options", "image_1"}),
    ),
    "videomme": BenchmarkFormat(
        read_videomme,
        {
            "id": "question_id",
            "question": "question",
            "answer": "answer",
            "choices": "options",
            "source": "duration",
            "video": "videoID",
            "ignore": "",
        },
        frozenset({"videoID", "options"}),
    ),
    "fields": BenchmarkFormat(read_fields, {part: part for part in PARTS}, frozenset()),
}


def _fields(
    question_id: str, text: str, answer: str, answer_type: str, choices: Sequence[str], source: str
) -> dict[str, Any]:
    fields = {
        "id": question_id,
        "question": text,
        "answer": answer,
        "answer_type": answer_type,
        "source": source,
    }
    return {**fields, "choices": list(choices)} if choices else fields


def _own_id(view: RowView) -> str:
    return view.text("id", default=f"{view.stem}/{view.number}")


def _renumber(view: RowView, text: str, position_of: Mapping[int, int]) -> str:
    """Let markers count only the pictures that are there."""

    def renumbered(match: re.Match[str]) -> str:
        if int(match[1]) not in position_of:
            got = f"got {match[0]} in the text and no image_{match[1]}"
            raise SampleError(
                "missing_media",
                f"{view.where}: a picture is missing, {got}, expected it; download the file again",
            )
        return f"<image {position_of[int(match[1])]}>"

    return _MARKER.sub(renumbered, text)
