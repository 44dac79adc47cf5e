"""What a row of a known benchmark means: its columns as a question, its media still where they lie.

A format is a table from the parts of a question to columns, which a user may change, and the few
rules that the table cannot say.
"""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from data.choices import Reading, named_options, option_letters
from data.errors import SampleError
from data.media_columns import unmapped_media
from data.question import ANSWER_TYPES, AnswerType, MediaKind
from data.sample import MAX_CHOICES, media_kind

PARTS = (
    "id",
    "question",
    "answer",
    "answer_type",
    "choices",
    "source",
    "image",
    "video",
    "media",
    "ignore",
)
"""What columns can be given for; `ignore` are those whose pictures and videos are left out on
purpose.
"""
MEDIA_PARTS = ("image", "video", "media")
HIDDEN_ANSWERS = ("", "?", "N/A")
"""What test splits have in the place of the answers that their authors keep."""
_NUMBER = re.compile(
    r"[-+]?\$?(?:\d[\d,]*\.?\d*|\.\d+)(?:e[-+]?\d+)?(?: ?/ ?\d+)?%?", re.IGNORECASE
)
_PLACES = re.compile(r"(\d+)(?:\.0*)?")
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


@dataclass(frozen=True, slots=True)
class RowView:
    """One row, seen through the table of columns.

    Attributes:
        where: File and number of the row, for messages.
        number: Of the row, from 1.
        stem: Name of the file without its ending.
        row: Values by column.
        columns: Columns by part of a question, several with commas between them.
    """

    where: str
    number: int
    stem: str
    row: Mapping[str, Any]
    columns: Mapping[str, str]

    def values(self, part: str) -> list[Any]:
        """Return what the part's columns hold, without what is empty; a dot leads into an object.
        Bytes are never nothing.
        """
        return [
            value for value in self.all_values(part) if value is not None and value not in ("", [])
        ]

    def all_values(self, part: str) -> list[Any]:
        """Return what the part's columns hold, `None` for a missing one."""
        found = []
        for column in split_columns(self.columns.get(part, "")):
            value: Any = self.row
            for name in [column] if column in self.row else column.split("."):
                value = value.get(name) if isinstance(value, Mapping) else None
            # A number that is not equal to itself stands for nothing in tables of floats, and so do
            # fields without values.
            is_nothing = value != value if isinstance(value, float) else _has_no_values(value)
            found.append(None if is_nothing else value)
        return found

    def text(self, part: str, default: str | None = None) -> str:
        """Return the one value of a part as text.

        Raises:
            SampleError: There is none and no default, or it is no text or number.
        """
        values = self.values(part)
        if not values and default is not None:
            return default
        if (
            len(values) == 1
            and isinstance(values[0], str | int | float)
            and values[0] not in (math.inf, -math.inf)
        ):
            return str(values[0]).strip()
        column = self.columns.get(part, "")
        raise SampleError(
            "bad_field",
            f"{self.where}: no {part}, got {values!r:.200} in column {column!r}, expected one "
            "text; name it in --fields",
        )

    def answer(self) -> str:
        """Return the reference answer.

        Raises:
            SampleError: The benchmark keeps it to itself.
        """
        answer = self.text("answer", default="")
        if answer in HIDDEN_ANSWERS:
            raise SampleError(
                "no_answer",
                f"{self.where}: no reference answer, got {answer!r}, expected one; use a split "
                "that has answers",
            )
        return answer

    def choices(self) -> list[str]:
        """Return the options without their letters.

        They lie in several columns, or in one: a list, an object from letters to options, or a text
        that spells one of these in JSON or Python.

        Raises:
            SampleError: They are something else, one is empty, or there are too many.
        """
        options: Any = self.all_values("choices")
        if len(options) <= 1:
            options = options[0] if options else None
            options = (
                []
                if options is None or options == ""
                else _spelled(options)
                if isinstance(options, str)
                else options
            )
        if isinstance(options, Mapping) and list(options) == option_letters(len(options)):
            options = list(options.values())
        if not isinstance(options, list) or len(options) > MAX_CHOICES:
            raise self.bad_choice(
                f"no list of options, got {options!r:.200}, expected at most {MAX_CHOICES} of "
                "them; correct it"
            )
        while options and options[-1] in (
            None,
            "",
        ):  # questions with fewer options leave the last columns empty
            options = options[:-1]
        if not all(
            isinstance(option, str | int | float) and option == option and str(option).strip()
            for option in options
        ):
            raise self.bad_choice(
                f"an option is no text, got {options!r:.200}, expected texts that are not empty; "
                "correct it"
            )
        texts = [str(option).strip() for option in options]
        matches = [
            re.fullmatch(rf"\(?{letter}[.):]\s*(.+)", text, re.DOTALL)
            for letter, text in zip(option_letters(len(texts)), texts, strict=True)
        ]
        return [match[1] for match in matches if match] if all(matches) else texts

    def letter(self, answer: str, choices: Sequence[str], reading: Reading = "either") -> str:
        """Return the letter of the right option.

        Args:
            answer: As the benchmark has it.
            choices: Option texts.
            reading: As of `named_options`; `either` refuses where the readings differ.

        Raises:
            SampleError: It names no option, or two.
        """
        found = named_options(answer, choices, reading)
        if len(found) != 1:
            letters = ", ".join(option_letters(len(choices)))
            expected = f"expected one of {letters} or the text of one option"
            raise self.bad_choice(
                f"the answer names no single option, got {answer!r:.200}, {expected}; correct it"
            )
        return found[0]

    def bad_choice(self, message: str) -> SampleError:
        """Return the error of a row whose options or answer cannot be used."""
        return SampleError("bad_choice", f"{self.where}: {message}")

    def media(self, *parts: tuple[str, MediaKind]) -> list[tuple[MediaKind, Any]]:
        """Return the media of some parts in their order; a column may hold one, a list, or a text
        that spells a list.
        """
        found: list[tuple[MediaKind, Any]] = []
        for part, kind in parts:
            for value in self.values(part):
                entries = _spelled(value) if isinstance(value, str) else value
                found += [
                    (kind, entry) for entry in (entries if isinstance(entries, list) else [value])
                ]
        return found

    def check_all_read(self, has_media: bool) -> None:
        """Refuse a row with media in a column that no part of a question is read from.

        Raises:
            SampleError: `unmapped_media`.
        """
        read = [
            name
            for columns in self.columns.values()
            for column in split_columns(columns)
            for name in (column, column.split(".")[0])
        ]
        unread = unmapped_media(self.row, read, has_media)
        if unread:
            hint = (
                f"name them: --fields image={','.join(unread)}, or leave them out: --fields "
                f"ignore={','.join(unread)}"
            )
            raise SampleError(
                "unmapped_media",
                f"{self.where}: media in columns that are not read, got {', '.join(unread)}, "
                f"expected a part of the question; {hint}",
            )


def read_mathvista(view: RowView) -> Draft:
    """Read a row of MathVista: unit and decimal places of the answer are told in the question, as
    its own prompts do.
    """
    answer, choices = view.answer(), view.choices()
    kind = view.text("answer_type", default="text")
    text = view.text("question")
    unit, places = view.row.get("unit"), _PLACES.fullmatch(str(view.row.get("precision")))
    if unit and isinstance(unit, str):
        text += f" (Unit: {unit})"
    answer_type: AnswerType = "math"
    if choices:
        answer_type, answer = "choice", view.letter(answer, choices, "text")
    elif kind == "float" and places:
        text += f" Round the answer to {places[1]} decimal place{'' if places[1] == '1' else 's'}."
    elif kind == "text":
        answer_type = "open"
    source = f"mathvista/{view.text('source', default=view.stem)}"
    return Draft(
        _fields(f"mathvista/{_own_id(view)}", text, answer, answer_type, choices, source),
        view.media(("image", "image")),
    )


def read_mmmu(view: RowView) -> Draft:
    """Read a row of MMMU: `<image n>` in question and options names the n-th of the pictures, which
    all stand before the text.

    An open question may have several spellings of its answer: the first that is a number, or else
    all of them for a judge.
    """
    answer, choices = view.answer(), view.choices()
    answer_type: AnswerType = "choice"
    if choices:
        answer = view.letter(answer, choices, "letter")
    else:
        spelled = _spelled(answer)
        spellings = [
            str(entry).strip()
            for entry in (spelled if isinstance(spelled, list) and spelled else [answer])
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
    places = {number: place for place, (number, _) in enumerate(media, start=1)}
    question_id = _own_id(view)
    subject = _SUBJECT.fullmatch(question_id)
    source = view.text("source", default=subject[1] if subject else view.stem)
    fields = _fields(
        f"mmmu/{question_id}",
        _renumber(view, view.text("question"), places),
        answer,
        answer_type,
        [_renumber(view, choice, places) for choice in choices],
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
    return Draft(
        _fields(_own_id(view), view.text("question"), answer, answer_type, choices, source), media
    )


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


def _renumber(view: RowView, text: str, places: Mapping[int, int]) -> str:
    """Let markers name places among the pictures that are there."""

    def place(match: re.Match[str]) -> str:
        if int(match[1]) not in places:
            got = f"got {match[0]} in the text and no image_{match[1]}"
            raise SampleError(
                "missing_media",
                f"{view.where}: a picture is missing, {got}, expected it; download the file again",
            )
        return f"<image {places[int(match[1])]}>"

    return _MARKER.sub(place, text)


def split_columns(columns: str) -> list[str]:
    """Return the names of columns that are joined by commas."""
    return [name.strip() for name in columns.split(",") if name.strip()]


def _has_no_values(value: Any) -> bool:
    return isinstance(value, Mapping) and all(entry is None for entry in value.values())


def _spelled(text: str) -> Any:
    """Return the list or object that a text spells in JSON or Python, `None` if it spells none."""
    # Other texts, such as a picture in base64, are not for a parser of Python.
    for read in (json.loads, ast.literal_eval) if text.lstrip()[:1] in ("[", "{") else ():
        try:
            value = read(text)
            repr(value)  # fails for numbers and levels that nobody can write down
        except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
            continue
        if isinstance(value, list | dict):
            return value
    return None
