"""One row of a table, seen through the columns that stand for the parts of a question."""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from data.choices import Reading, named_options, option_letters
from data.errors import SampleError
from data.media_columns import unmapped_media
from data.question import MediaKind
from data.sample import MAX_CHOICES
from data.sources.rows import as_json

HIDDEN_ANSWERS = ("", "?", "N/A")
"""What test splits have instead of the answers that their authors keep."""


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
            SampleError: There is none and no default, or it is not text or number.
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
            raise self.no_answer(answer)
        return answer

    def no_answer(self, answer: str) -> SampleError:
        """Return the error of a row whose answer its authors keep."""
        return SampleError(
            "no_answer",
            f"{self.where}: no reference answer, got {answer!r}, expected one; use a split "
            "that has answers",
        )

    def metadata(self) -> dict[str, Any]:
        """Return the field `metadata` of KEY.json, nothing where the row has none.

        Raises:
            SampleError: It is no JSON value, or there are two.
        """
        values = self.values("metadata")
        if len(values) > 1:
            raise SampleError(
                "bad_field",
                f"{self.where}: two values for metadata, got columns {self.columns['metadata']}, "
                "expected one; name one column",
            )
        return {"metadata": as_json(self.where, values[0])} if values else {}

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
                else spelled(options)
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
                f"an option is not text, got {options!r:.200}, expected texts that are not empty; "
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
                entries = spelled(value) if isinstance(value, str) else value
                found += [
                    (kind, entry) for entry in (entries if isinstance(entries, list) else [value])
                ]
        return found

    def check_all_read(self, has_media: bool) -> None:
        """Refuse a row with media in a column that no part of a question is read from.

        Raises:
            SampleError: `unmapped_media`.
        """
        read = [column for columns in self.columns.values() for column in split_columns(columns)]
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


def split_columns(columns: str) -> list[str]:
    """Return the names of columns that are joined by commas."""
    return [name.strip() for name in columns.split(",") if name.strip()]


def _has_no_values(value: Any) -> bool:
    return isinstance(value, Mapping) and all(entry is None for entry in value.values())


def spelled(text: str) -> Any:
    """Return the list or object that a text spells in JSON or Python, `None` if it spells none."""
    # Other texts, such as a picture in base64, are not for a parser of Python.
    for read in (json.loads, ast.literal_eval) if text.lstrip()[:1] in ("[", "{") else ():
        try:
            value = read(text)
            repr(value)  # fails for numbers and depths that have no text
        except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
            continue
        if isinstance(value, list | dict):
            return value
    return None
