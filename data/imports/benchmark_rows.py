"""One row of a benchmark as a question, its media still where they lie."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from data.choices import Reading, option_letters
from data.errors import SampleError
from data.imports.benchmark_formats import BenchmarkFormat
from data.imports.directives import without_directives
from data.imports.row_view import HIDDEN_ANSWERS, RowView, spelled, split_columns
from data.question import ANSWER_TYPES, MediaKind
from data.sample import MAX_CHOICES, media_kind

SCORED_BY_FUNCTION = ("anls", "relaxed")
"""Scorings whose questions have an answer type of the same name, for a reward function."""
_NUMBER = re.compile(
    r"[-+]?\$?(?:\d[\d,]*\.?\d*|\.\d+)(?:e[-+]?\d+)?(?: ?/ ?\d+)?%?", re.IGNORECASE
)
_DECIMALS = re.compile(r"(\d+)(?:\.0*)?")
_MARKER = re.compile(r"<image (\d+)>")
_LETTER = re.compile(r"(?:(?<=[\s,;])|\A)(\(?)([A-Z])([.):])\s*")
_HEADING = re.compile(r"\s*(?:\b(?:Options|Choices)\s*:)?\s*\Z", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Draft:
    """A question before its media are read.

    Attributes:
        question: Fields of KEY.json but for the media.
        media: Kind and value of each: a path, the bytes, or `{"bytes": …, "path": …}`.
    """

    question: Mapping[str, Any]
    media: Sequence[tuple[MediaKind, Any]] = ()


def read_benchmark(name: str, known: BenchmarkFormat, view: RowView) -> Draft:
    """Read a row of a declared benchmark, whose name begins its id and its source; the question
    loses format directives of its own.

    Raises:
        SampleError: The row is no question.
    """
    text = without_directives(view.text("question", default=known.without_question or None))
    choices = view.choices()
    if known.options_in and not choices:
        text, choices = _with_options_in(view, known, text)
    question_id = _own_id(view)
    if known.shuffled:
        choices.sort(key=lambda choice: hashlib.blake2b(f"{text}\0{choice}".encode()).digest())
    answers = _answers(view, known)
    answer_type, answer = _graded(view, known, choices, answers)
    text += _stated_form(view, known, is_free=not choices)
    position_of, media = _media(view)
    if position_of is not None:
        text = _renumber(view, text, position_of)
        choices = [_renumber(view, choice, position_of) for choice in choices]
    found = re.fullmatch(known.source_pattern, question_id) if known.source_pattern else None
    source = view.text("source", default=found[1] if found else view.stem)
    fields = _fields(
        f"{name}/{question_id}", text, answer, answer_type, choices, f"{name}/{source}"
    )
    if answer_type in SCORED_BY_FUNCTION and len(answers) > 1:
        fields["metadata"] = {"answers": answers}
    return Draft(fields, media)


def read_fields(view: RowView) -> Draft:
    """Read a row of any table whose columns the user has named; the question loses format
    directives of its own.

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
    text = without_directives(view.text("question"))
    fields = _fields(_own_id(view), text, answer, answer_type, choices, source)
    return Draft({**fields, **view.metadata()}, media)


def split_options(text: str) -> tuple[str, list[str]]:
    """Return a text without the options that end it, and these; none if it has fewer than two
    with the letters from A on.
    """
    matches = list(_LETTER.finditer(text))
    for start in reversed([index for index, match in enumerate(matches) if match[2] == "A"]):
        form = matches[start][1], matches[start][3]
        own = [match for match in matches[start:] if (match[1], match[3]) == form]
        letters = [match[2] for match in own]
        if len(own) > 1 and letters == option_letters(len(own)) and len(own) <= MAX_CHOICES:
            ends = [*(match.start() for match in own[1:]), len(text)]
            options = [
                text[match.end() : end].strip().rstrip(",;").strip()
                for match, end in zip(own, ends, strict=True)
            ]
            return _HEADING.sub("", text[: own[0].start()]), options
    return text, []


def _with_options_in(view: RowView, known: BenchmarkFormat, text: str) -> tuple[str, list[str]]:
    """Return question and options of a row that has both, or the options, in one text."""
    if known.options_in == view.columns["question"]:
        return split_options(text)
    written = view.row.get(known.options_in)
    return text, split_options(written)[1] if isinstance(written, str) else []


def _answers(view: RowView, known: BenchmarkFormat) -> list[str]:
    """Return the right answers of a row.

    Raises:
        SampleError: There is none.
    """
    values = view.values("answer")
    several = values[0] if values else None
    if known.spellings and isinstance(several, str):
        several = spelled(several)
    if isinstance(several, list):
        answers = [text for each in several if (text := str(each).strip()) not in HIDDEN_ANSWERS]
        if not answers:
            raise view.no_answer(str(several))
        return answers
    answer = view.answer()
    if known.answer_after:
        answer = answer.rpartition(known.answer_after)[2].strip()
    return [known.answers.get(answer, answer)]


def _graded(
    view: RowView, known: BenchmarkFormat, choices: Sequence[str], answers: Sequence[str]
) -> tuple[str, str]:
    """Return answer type and reference answer of a row."""
    if choices:
        if known.reading == "index":
            return "choice", _letter_of_index(view, answers[0], choices)
        return "choice", view.letter(answers[0], choices, cast(Reading, known.reading))
    if known.scoring in SCORED_BY_FUNCTION:
        return known.scoring, answers[0]
    if known.scoring == "judge":
        return "open", " or ".join(answers)
    if known.spellings:
        number = next((each for each in answers if _NUMBER.fullmatch(each)), None)
        return ("open", " or ".join(answers)) if number is None else ("math", number)
    kind = view.text("answer_type", default="")
    return known.answer_types.get(kind, "math"), ", ".join(answers)


def _letter_of_index(view: RowView, answer: str, choices: Sequence[str]) -> str:
    letters = option_letters(len(choices))
    if not answer.isdecimal() or int(answer) >= len(letters):
        raise view.bad_choice(
            f"the answer is no option's index, got {answer!r:.200}, expected 0 to "
            f"{len(letters) - 1}; correct it"
        )
    return letters[int(answer)]


def _stated_form(view: RowView, known: BenchmarkFormat, is_free: bool) -> str:
    """Return unit and decimal places of an answer, which the question has to state."""
    unit = view.text("unit", default="") if "unit" in view.columns else ""
    decimals = None
    if known.rounded and is_free and view.text("answer_type", default="") == known.rounded:
        decimals = _DECIMALS.fullmatch(view.text("decimals", default=""))
    stated = f" (Unit: {unit})" if unit else ""
    if decimals:
        stated += (
            f" Round the answer to {decimals[1]} decimal place{'' if decimals[1] == '1' else 's'}."
        )
    return stated


def _media(view: RowView) -> tuple[Mapping[int, int] | None, list[tuple[MediaKind, Any]]]:
    """Return the media of a row, and of pictures in numbered columns which is the n-th: they all
    come before the text, whose `<image n>` are renumbered.
    """
    if len(split_columns(view.columns.get("image", ""))) < 2:
        return None, view.media(("image", "image"), ("video", "video"))
    held = [
        (number, value)
        for number, value in enumerate(view.all_values("image"), start=1)
        if value not in (None, "")
    ]
    position_of = {number: position for position, (number, _) in enumerate(held, start=1)}
    return position_of, [("image", value) for _, value in held]


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
