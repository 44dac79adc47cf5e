"""Hints: from a correct response of the teacher to a few lines that help without giving the answer
away.

Source: the `hint` baseline of ZPPO (arXiv 2606.18216).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence

from data.messages import whole_text
from zppo_mm.reasoning import without_reasoning
from zppo_mm.rewards.boxes import last_boxed
from zppo_mm.teacher.teacher import Hint, Trace
from zppo_mm.zone.compress import RuleCompressor
from zppo_mm.zone.rewriting import Generate, TeacherRewriter

logger = logging.getLogger(__name__)

_BOX_START = "\\boxed"


class RuleHintWriter:
    """Keeps the first lines of the reasoning that do not contain the answer. Implements
    `HintWriter`.

    If every line contains it, the first line is kept up to the answer.

    Args:
        rule: Holds the caps, those of a candidate.
    """

    def __init__(self, rule: RuleCompressor) -> None:
        self.rule = rule

    def write(self, traces: Sequence[Trace], step: int) -> list[Hint]:
        """Return one hint per trace; the step is not used."""
        return [Hint(self._hint(trace)) for trace in traces]

    def _hint(self, trace: Trace) -> str | None:
        lines = self.rule.lines(trace.text.partition(_BOX_START)[0])
        kept = [line for line in lines if not reveals(line, trace)]
        if not kept and lines:
            found = _appearance(lines[0], trace)
            kept = [lines[0][: found.start()].strip()] if found else []
        return self.beginning(kept)

    def beginning(self, lines: Sequence[str]) -> str | None:
        """Return as many of the first lines as the caps allow; `None` if that is none."""
        kept = list(lines[: self.rule.max_lines])
        while kept and self.rule.count_tokens("\n".join(kept)) > self.rule.max_tokens:
            kept.pop()
        return "\n".join(kept) or None


class TeacherHintWriter:
    """Lets the teacher write hints and refuses those that give the answer away. Implements
    `HintWriter`.

    A refused hint is retried once. Then the rule makes one, as it does if the teacher does not
    answer.

    Args:
        generate: The teacher as a function of user texts.
        rule: Makes the hints that the teacher did not write.
        template: `PromptTemplates.write_hint`.
    """

    def __init__(self, generate: Generate, rule: RuleHintWriter, template: str) -> None:
        self._rewriter = TeacherRewriter(generate, template, rule.rule.max_lines)
        self._rule = rule

    def write(self, traces: Sequence[Trace], step: int) -> list[Hint]:
        """Return one hint per trace."""
        written, rejects = self._rewriter.rewrite(
            traces,
            step,
            read=lambda reply: text if self._beginning(text := without_reasoning(reply)) else None,
            # The whole of it, lest a cut hides that the teacher did not do as it was asked.
            accepts=lambda text, trace: not reveals(text, trace),
        )
        if sum(rejects):
            logger.info(
                "hints at step %d: %d gave the answer away, %d of %d by rule",
                step,
                sum(rejects),
                len(traces) - len(written),
                len(traces),
            )
        by_rule = self._rule.write(traces, step)
        return [
            Hint(
                self._beginning(written[index]) if index in written else by_rule[index].text,
                rejects[index],
            )
            for index in range(len(traces))
        ]

    def _beginning(self, text: str) -> str | None:
        return self._rule.beginning(self._rule.rule.lines(text))


def reveals(text: str, trace: Trace) -> bool:
    """Return whether a text boxes something, contains the answer as a word of its own, or names the
    correct option.

    An answer that is part of the question anyway, as the texts of options are, may be repeated.
    """
    return last_boxed(text) is not None or _appearance(text, trace) is not None


def _appearance(text: str, trace: Trace) -> re.Match[str] | None:
    """Return the first match of the answer, of the response or of the question, as a word of a
    text.
    """
    question = trace.question
    if question.choices:
        # A single letter is a word in many languages; it names an option only after such a noun.
        patterns = [
            re.compile(
                rf"\b(?:answer|option|choice)\b\W*(?:is\W*)?{re.escape(question.answer)}\b",
                re.IGNORECASE,
            )
        ]
    else:
        answers = {
            answer.strip()
            for answer in (trace.answer, question.answer)
            if answer and answer.strip()
        }
        asked = whole_text(question)
        words = [
            re.compile(rf"(?<![\w.]){re.escape(answer)}(?!\w|\.\d)", re.IGNORECASE)
            for answer in sorted(answers)
        ]
        patterns = [word for word in words if not word.search(asked)]
    found = [match for match in (pattern.search(text) for pattern in patterns) if match]
    return min(found, key=lambda match: match.start(), default=None)
