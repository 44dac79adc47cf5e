"""The texts of the prompts, plain and reformulated, from replaceable templates."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from data.question import Question
from data.text import read_text_file
from zppo_mm.errors import ConfigError
from zppo_mm.special_tokens import escape_special_tokens, is_breakable

BUNDLED_TEMPLATES = Path(__file__).parent / "templates"
REQUIRED_FIELDS: dict[str, tuple[str, ...]] = {
    "bcq.txt": ("question", "candidates"),
    "ncq.txt": ("question", "answers", "candidates"),
    "hint.txt": ("question", "hint"),
    "candidate.txt": ("text",),
    "closing.txt": (),
}
MAX_LISTED_ANSWER_CHARS = 80
NO_ANSWER = "(none given)"
EMPTY_CANDIDATE = "(empty)"


@dataclass(frozen=True, slots=True)
class PromptTemplates:
    """Builds user texts. The closing format instruction is the last line of every one of them.

    Attributes:
        bcq: With the fields `{question}` and `{candidates}`.
        ncq: With the fields `{question}`, `{answers}` and `{candidates}`.
        hint: With the fields `{question}` and `{hint}`.
        candidate: One candidate block, with the field `{text}`.
        closing: The format instruction; no fields.
        special_tokens: The tokenizer's; they are escaped in candidate text besides everything
            that looks like a tag.
    """

    bcq: str
    ncq: str
    hint: str
    candidate: str
    closing: str
    special_tokens: tuple[str, ...] = ()

    def plain_text(self, question: Question) -> str:
        """Return the unchanged question: its text, its choices, the closing instruction."""
        return f"{question_text(question)}\n{self.closing}"

    def bcq_text(self, question: Question, candidates: Sequence[str]) -> str:
        """Return the binary candidate-included question; the candidates are escaped texts in the
        order shown.
        """
        return self.closed(
            _fill(
                self.bcq,
                {"question": question_text(question), "candidates": self.blocks(candidates)},
            )
        )

    def ncq_text(
        self, question: Question, answers: Sequence[str], candidates: Sequence[str]
    ) -> str:
        """Return the negative candidate-included question.

        Args:
            question: The question.
            answers: Distinct wrong answers as parsed.
            candidates: Wrong candidates, escaped.
        """
        listed = ", ".join(self._listed(answer) for answer in answers) or NO_ANSWER
        fields = {
            "question": question_text(question),
            "answers": listed,
            "candidates": self.blocks(candidates),
        }
        return self.closed(_fill(self.ncq, fields))

    def hint_text(self, question: Question, hint: str) -> str:
        """Return the question with a hint, which must be escaped."""
        return self.closed(_fill(self.hint, {"question": question_text(question), "hint": hint}))

    def escaped(self, text: str) -> str:
        """Return candidate text with special tokens, tags and the lines of the candidate block
        escaped.
        """
        return (
            escape_special_tokens(
                text, (*_marker_lines(self.candidate), *self.special_tokens)
            ).strip()
            or EMPTY_CANDIDATE
        )

    def blocks(self, candidates: Sequence[str]) -> str:
        """Return candidates, escaped, each in its block."""
        return "\n".join(_fill(self.candidate, {"text": text}) for text in candidates)

    def _listed(self, answer: str) -> str:
        line = " ".join(answer.split())
        return self.escaped(
            line if len(line) <= MAX_LISTED_ANSWER_CHARS else line[:MAX_LISTED_ANSWER_CHARS] + "…"
        )

    def closed(self, body: str) -> str:
        """Return a user text with the closing format instruction."""
        return f"{body}\n{self.closing}"


def load_templates(folder: str = "", special_tokens: Iterable[str] = ()) -> PromptTemplates:
    """Read the templates; a file that the folder does not have is taken from the bundled ones.

    Args:
        folder: May hold any of bcq.txt, ncq.txt, hint.txt, candidate.txt and closing.txt; empty
            means the bundled ones.
        special_tokens: The student tokenizer's special tokens.

    Raises:
        ConfigError: If the folder is missing, holds none of them or another .txt file, or a
            template lacks a field or is empty.
    """
    paths = {name: BUNDLED_TEMPLATES / name for name in REQUIRED_FIELDS}
    if folder:
        given = {path.name: path for path in sorted(Path(folder).glob("*.txt"))}
        wrong = sorted(given.keys() - paths.keys())
        if wrong or not given:
            what = f"unknown template {', '.join(wrong)}" if wrong else "no template found"
            raise ConfigError(
                f"zone.templates: {what}, got folder {folder!r}, expected any of "
                f"{', '.join(paths)}; name them so or leave the key empty"
            )
        paths.update(given)
    texts = {name: _checked(path, REQUIRED_FIELDS[name]) for name, path in paths.items()}
    return PromptTemplates(
        **{name.removesuffix(".txt"): text for name, text in texts.items()},
        special_tokens=tuple(special_tokens),
    )


def question_text(question: Question) -> str:
    """Return the question's text followed by its lettered choices, one a line."""
    choices = (
        f"{chr(ord('A') + index)}. {choice}" for index, choice in enumerate(question.choices)
    )
    return "\n".join((question.text.strip(), *choices))


def _checked(path: Path, fields: Sequence[str]) -> str:
    text = read_text_file(path, "zone.templates").strip()
    if not text:
        raise ConfigError(
            f"zone.templates: {path} is empty, expected a text; remove the file to use the "
            "bundled one"
        )
    for name in fields:
        if text.count(f"{{{name}}}") != 1:
            raise ConfigError(
                f"zone.templates: {path} needs the field {{{name}}} once, got it "
                f"{text.count(f'{{{name}}}')} times, expected exactly the fields "
                f"{', '.join(f'{{{field}}}' for field in fields)}; put it where its text belongs"
            )
    if path.name == "candidate.txt":
        _check_block(path, text)
    return text


def _check_block(path: Path, text: str) -> None:
    lines = _marker_lines(text)
    if not text.replace("{text}", "").strip() or not all(is_breakable(line) for line in lines):
        raise ConfigError(
            f"zone.templates: {path} does not set a candidate off, got {text!r}, expected lines of "
            "at least two characters around {text}; they are broken up where a candidate contains "
            "them, so that no candidate can end its own block"
        )


def _marker_lines(block: str) -> list[str]:
    return [
        line.strip() for part in block.split("{text}") for line in part.splitlines() if line.strip()
    ]


def _fill(template: str, fields: Mapping[str, str]) -> str:
    # One pass: a field name or a brace inside a question or a candidate is left as it is, unlike
    # with str.format.
    return re.sub(
        "|".join(rf"\{{{name}\}}" for name in fields),
        lambda match: fields[match.group()[1:-1]],
        template,
    )
