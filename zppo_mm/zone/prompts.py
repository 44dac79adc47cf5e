"""The texts of the prompts, plain and reformulated, from replaceable templates."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from data.messages import kinds_named
from data.question import Question
from data.text import read_text_file
from zppo_mm.errors import ConfigError
from zppo_mm.rewards.judge import JUDGE_TEMPLATE
from zppo_mm.special_tokens import escape_special_tokens, is_breakable

BUNDLED_TEMPLATES = Path(__file__).parent / "templates"
REQUIRED_FIELDS: dict[str, tuple[str, ...]] = {
    "bcq.txt": ("question", "candidates"),
    "ncq.txt": ("question", "answers", "candidates"),
    "hint.txt": ("question", "hint"),
    "candidate.txt": ("text",),
    "closing.txt": (),
    "compress.txt": ("response",),
    "write_hint.txt": ("response",),
}
OPTIONAL_FIELDS: dict[str, tuple[str, ...]] = {
    "compress.txt": ("max_lines",),
    "write_hint.txt": ("max_lines",),
}
MAX_LISTED_ANSWER_CHARS = 80
NO_ANSWER = "(none was boxed)"
EMPTY_CANDIDATE = "(empty)"
# Those of all templates, and "trace" and "answer", which older ones had. What follows a letter, as
# in "\boxed{answer}", is no field.
_FIELD = re.compile(
    r"(?<!\w)\{(question|candidates|answers|hint|text|response|max_lines|trace|answer)\}"
)
_BRACE_OR_ESCAPED = re.compile(r"\\.|\\\Z|[{}]", re.DOTALL)


@dataclass(frozen=True, slots=True)
class PromptTemplates:
    """Builds user texts. The closing format instruction ends every one of them, except for those
    that ask the teacher to rewrite a response. Of a conversation it is the last message that a
    template rewrites: its media stay in its text, and the messages before it as they are.

    Attributes:
        bcq: With the fields `{question}` and `{candidates}`.
        ncq: With the fields `{question}`, `{answers}` and `{candidates}`.
        hint: With the fields `{question}` and `{hint}`.
        candidate: One candidate block, with the field `{text}`.
        closing: The format instruction; no fields.
        compress: Asks the teacher for a candidate, with the field `{response}`, optionally
            `{max_lines}`.
        write_hint: Asks the teacher for a hint, with the same fields.
        special_tokens: The tokenizer's; they are escaped in candidate text besides everything
            that looks like a tag.
    """

    bcq: str
    ncq: str
    hint: str
    candidate: str
    closing: str
    compress: str
    write_hint: str
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
        listed = ", ".join(self._boxed(answer) for answer in answers) or NO_ANSWER
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

    def _boxed(self, answer: str) -> str:
        """Return an answer on one line in a box that it cannot leave, shortened if it is long."""
        line = " ".join(answer.split())
        if len(line) > MAX_LISTED_ANSWER_CHARS:
            line = line[:MAX_LISTED_ANSWER_CHARS] + "…"
        return f"\\boxed{{{_balanced(self.escaped(line))}}}"

    def closed(self, body: str) -> str:
        """Return a user text with the closing format instruction."""
        return f"{body}\n{self.closing}"


def load_templates(folder: str = "", special_tokens: Iterable[str] = ()) -> PromptTemplates:
    """Read the templates; a file that the folder does not have is taken from the bundled ones.

    Args:
        folder: May hold any of `REQUIRED_FIELDS`, and the judge's template, which is not read
            here; empty means the bundled ones.
        special_tokens: The student tokenizer's special tokens.

    Raises:
        ConfigError: If the folder is missing, holds none of them or another .txt file, or a
            template is empty, lacks a field or has one that it cannot have.
    """
    paths = {name: BUNDLED_TEMPLATES / name for name in REQUIRED_FIELDS}
    if folder:
        given = {path.name: path for path in sorted(Path(folder).glob("*.txt"))}
        wrong = sorted(given.keys() - paths.keys() - {JUDGE_TEMPLATE})
        if wrong or not given:
            what = f"unknown template {', '.join(wrong)}" if wrong else "no template found"
            raise ConfigError(
                f"zone.templates: {what}, got folder {folder!r}, expected any of "
                f"{', '.join((*paths, JUDGE_TEMPLATE))}; name them so or leave the key empty"
            )
        paths |= {name: path for name, path in given.items() if name in paths}
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
    if kinds_named(text):
        raise ConfigError(
            f"zone.templates: {path} places a medium, got <{kinds_named(text)[0]}>, expected media "
            "in questions alone; set it in backticks where it is text"
        )
    if path.name == "candidate.txt":
        _check_block(path, text)
    _check_other_fields(path, text, fields)
    return text


def _check_other_fields(path: Path, text: str, fields: Sequence[str]) -> None:
    """Refuse a field that is filled in elsewhere, or was once: models would read its name."""
    allowed = (*fields, *OPTIONAL_FIELDS.get(path.name, ()))
    others = [name for name in _FIELD.findall(text) if name not in allowed]
    if others:
        raise ConfigError(
            f"zone.templates: {path} has a field that is not filled in there, got "
            f"{{{others[0]}}}, expected {', '.join(f'{{{name}}}' for name in allowed) or 'none'}; "
            "remove it"
        )


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


def _balanced(text: str) -> str:
    """Return LaTeX whose braces match: those left open are closed at the end, and one that closes
    nothing becomes a literal brace.
    """
    depth = 0

    def matched(piece: re.Match[str]) -> str:
        nonlocal depth
        if piece[0] == "}" and depth == 0:
            return r"\}"
        depth += {"{": 1, "}": -1}.get(piece[0], 0)
        # A backslash at the end would make the box's own brace a literal one.
        return piece[0] if piece[0] != "\\" else ""

    return _BRACE_OR_ESCAPED.sub(matched, text) + "}" * depth


def _fill(template: str, fields: Mapping[str, str]) -> str:
    # One pass: a field name or a brace inside a question or a candidate is left as it is, unlike
    # with str.format.
    return re.sub(
        "|".join(rf"\{{{name}\}}" for name in fields),
        lambda match: fields[match.group()[1:-1]],
        template,
    )
