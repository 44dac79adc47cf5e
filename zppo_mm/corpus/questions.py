"""From a row of a public set to a question: its text without markers and options, its gold answer,
and how that is graded.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from data.choices import named_options
from data.errors import SampleError
from data.imports.directives import without_directives
from data.imports.row_view import RowView
from data.question import AnswerType
from data.sample import MAX_CHOICES
from zppo_mm.corpus.recipe import CorpusRecipe, SourceSet
from zppo_mm.rewards.boxes import final_answer

MAX_RULE_WORDS = 2
"""Words of an answer without a kind that rules compare; a judge compares longer phrases."""

_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_THOUGHT = re.compile(r"<think>.*?</think>", re.DOTALL)
_LETTER = re.compile(r"[(\[]?([A-Z])[)\]]?[.:]?")
_LABEL = re.compile(r"(?:^|(?<=[\s;,]))(?:[(\[]([A-Z])[)\]][.:]?|([A-Z])(?:\)|[.:](?=\s)))\s*")
_HEADING = re.compile(r"\s*\b(?:answer )?(?:choices|options)\s*(?:are)?\s*:?\s*\Z", re.IGNORECASE)
_MARKER = re.compile(r"[ \t]*<image>[ \t]*\n?")
_TEX = re.compile(r"\\[a-zA-Z]+(?:\{[a-z]+\})?")
_WORD = re.compile(r"[^\W\d_]{2,}")


@dataclass(frozen=True, slots=True)
class Draft:
    """A question before its images are read.

    Attributes:
        text: Without markers of images and without options.
        answer: The gold answer; the letter of a choice.
        answer_type: How it is graded.
        choices: The options.
        num_markers: Images that the text called for.
    """

    text: str
    answer: str
    answer_type: AnswerType
    choices: tuple[str, ...]
    num_markers: int

    def fields(self) -> dict[str, Any]:
        """Return the fields of KEY.json that it decides."""
        fields = {"question": self.text, "answer": self.answer, "answer_type": self.answer_type}
        return {**fields, "choices": list(self.choices)} if self.choices else fields


def read_draft(view: RowView, recipe: CorpusRecipe, source: SourceSet) -> Draft:
    """Return the question of a row.

    Raises:
        SampleError: A filter that needs no image drops it; the reason says which.
    """
    _check_pass_rate(view, source)
    asked = _text(view, "question")
    text = without_directives(_MARKER.sub(" ", asked).strip())
    if not text:
        raise _dropped(view, "no_question", "no question", "a text")
    answer = gold_answer(view)
    if not answer:
        raise _dropped(view, "no_answer", "no gold answer", "one")
    if len(answer) > recipe.max_answer_chars:
        raise _dropped(
            view,
            "long_answer",
            f"an answer of {len(answer)} characters",
            f"at most {recipe.max_answer_chars}",
        )
    kind = ""
    if source.columns.answer_kind:
        named = _text(view, "answer_kind")
        kind = source.answer_kinds.get(named, "")
        if not kind:
            raise _dropped(
                view, "other_answer_kind", f"answer kind {named!r:.40}", "one that is graded here"
            )
    return _graded(text, answer, kind, asked.count("<image>"))


def gold_answer(view: RowView) -> str:
    """Return the gold answer of a row without the tags and the box around it, empty if there is
    none.
    """
    answer = _text(view, "answer")
    if answer:
        return _enclosed(answer) or answer
    return _enclosed(_text(view, "reasoned_answer")) or ""


def inline_options(text: str) -> tuple[str, tuple[str, ...]]:
    """Return a text without the lettered options at its end, and the options; none if there are no
    two of them, or not each is one line.
    """
    labels = [(match, match[1] or match[2]) for match in _LABEL.finditer(text)]
    first = max((index for index, (_, letter) in enumerate(labels) if letter == "A"), default=-1)
    if first < 0:
        return text, ()
    chosen = [labels[first][0]]
    for match, letter in labels[first + 1 :]:
        if ord(letter) == ord("A") + len(chosen):
            chosen.append(match)
    ends = [match.start() for match in chosen[1:]] + [len(text)]
    options = tuple(
        text[match.end() : end].strip().rstrip(";,").rstrip()
        for match, end in zip(chosen, ends, strict=True)
    )
    stem = _HEADING.sub("", text[: chosen[0].start()]).rstrip()
    separable = stem and all(option and "\n" not in option for option in options)
    if not separable or not 2 <= len(options) <= MAX_CHOICES:
        return text, ()
    return stem, options


def _graded(text: str, answer: str, kind: str, num_markers: int) -> Draft:
    """Return the draft with the way in which its answer is graded."""
    letter = _LETTER.fullmatch(answer)
    answer = letter[1] if letter else answer
    if letter or kind in ("", "choice"):
        stem, options = inline_options(text)
        named = named_options(answer, options, "letter")
        if len(named) == 1:
            return Draft(stem, named[0], "choice", options, num_markers)
    words = _WORD.findall(_TEX.sub(" ", answer))
    is_open = kind == "judge" or (not kind and len(words) > MAX_RULE_WORDS)
    # A letter whose options could not be separated is compared as it is.
    return Draft(text, answer, "open" if is_open else "math", (), num_markers)


def _check_pass_rate(view: RowView, source: SourceSet) -> None:
    if not source.columns.pass_rate:
        return
    values = view.values("pass_rate")
    if len(values) != 1 or not isinstance(values[0], int | float):
        raise _dropped(view, "no_pass_rate", f"pass rate {values!r:.40}", "a number")
    if values[0] > source.max_pass_rate:
        raise _dropped(
            view, "pass_rate", f"pass rate {values[0]}", f"at most {source.max_pass_rate}"
        )


def _enclosed(text: str) -> str | None:
    """Return what stands in the last `<answer>` or, there or in the whole text, is boxed last;
    reasoning does not count.
    """
    plain = _THOUGHT.sub("", text)
    tagged = next((found for found in reversed(_ANSWER.findall(plain)) if found.strip()), None)
    boxed = final_answer(plain if tagged is None else tagged)
    return boxed or (tagged.strip() if tagged is not None else None)


def _text(view: RowView, part: str) -> str:
    """Return a text or number of a row, empty for anything else."""
    values = view.values(part)
    if len(values) != 1 or not isinstance(values[0], str | int | float):
        return ""
    return str(values[0]).strip()


def _dropped(view: RowView, reason: str, got: str, expected: str) -> SampleError:
    return SampleError(reason, f"{view.where}: dropped, got {got}, expected {expected}")
