"""Compressors: from a whole response to a candidate of a few lines that keeps its final answer.

Right and wrong responses are treated alike, so that length and style do not distinguish them.
Source: ZPPO (arXiv 2606.18216), candidate compression.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence

from zppo_mm.reasoning import without_reasoning
from zppo_mm.rewards.boxes import final_answer, last_boxed
from zppo_mm.rewards.mathematics import compare
from zppo_mm.teacher.teacher import CompressedTrace, Trace
from zppo_mm.zone.rewriting import MARKS, Generate, TeacherRewriter

logger = logging.getLogger(__name__)

# The brace of the boxed answer and the end of the formula around it, so that an opened "$" stays
# closed.
_CLOSING = re.compile(r"(?:\\\s)?\s*\}[ }]*(\${1,2}|\\\)|\\\])")
_SUMMARY_START, _SUMMARY_END = "<summary>", "</summary>"


class RuleCompressor:
    """Keeps the last lines up to the final boxed answer, without thinking tags and special tokens.
    Implements `Compressor`.

    Text after the final answer is removed, then lines from the beginning. If one line is still too
    long, its beginning is removed. The boxed answer is cut only if it alone is over the cap.

    Args:
        count_tokens: Length of a text in the student's tokens.
        max_tokens: Cap of a candidate.
        max_lines: Most lines of a candidate.
    """

    def __init__(self, count_tokens: Callable[[str], int], max_tokens: int, max_lines: int) -> None:
        self.count_tokens = count_tokens
        self.max_tokens = max_tokens
        self.max_lines = max_lines

    def compress(self, traces: Sequence[Trace], step: int) -> list[CompressedTrace]:
        """Return one cut trace per trace; the step is not used."""
        return [CompressedTrace(self.cut(trace.text, trace.answer), "rule", 0) for trace in traces]

    def cut(self, text: str, answer: str | None) -> str:
        """Return the text within both caps, its boxed answer at the end.

        Args:
            text: A whole response.
            answer: Its parsed answer; `None` keeps the end of the text and boxes nothing.
        """
        body, boxed = _split_at_answer(MARKS.sub(" ", text), answer)
        lines = _lines(body)
        # An answer at the end of a line belongs to that line. On a line of its own it counts as
        # one of the lines.
        own_line = bool(boxed) and (not lines or body.rstrip(" \t").endswith("\n"))
        lines = (
            [*lines, boxed]
            if own_line
            else [*lines[:-1], f"{lines[-1]} {boxed}".strip()]
            if lines
            else []
        )
        lines = lines[-self.max_lines :]
        while len(lines) > 1 and self.count_tokens("\n".join(lines)) > self.max_tokens:
            lines.pop(0)
        return self._tail("\n".join(lines), boxed)

    def lines(self, text: str) -> list[str]:
        """Return the lines of a text without thinking tags, special tokens and extra spaces."""
        return _lines(MARKS.sub(" ", text))

    def _tail(self, line: str, boxed: str) -> str:
        """Return the longest end of a line within the cap, cut between words where the answer
        allows it.
        """
        if self.count_tokens(line) <= self.max_tokens:
            return line
        words = line.removesuffix(boxed).split()
        kept = _longest(
            len(words), lambda n: self._fits(" ".join((*words[len(words) - n :], boxed)).strip())
        )
        text = " ".join((*words[len(words) - kept :], boxed)).strip()
        if self._fits(text) and text:
            return text
        source = boxed or line
        return source[
            len(source) - _longest(len(source), lambda n: self._fits(source[len(source) - n :])) :
        ]

    def _fits(self, text: str) -> bool:
        return self.count_tokens(text) <= self.max_tokens


class TeacherCompressor:
    """Lets the teacher rewrite responses. Implements `Compressor`.

    A rewrite without a complete summary, or with another final answer, is refused and retried once.
    Then the response is cut by rule, as it is if the teacher does not answer. A faithful rewrite
    over the caps is cut as well.

    Args:
        generate: The teacher as a function of user texts.
        rule: Cuts what was not rewritten, or not short enough.
        template: `PromptTemplates.compress`.
    """

    def __init__(self, generate: Generate, rule: RuleCompressor, template: str) -> None:
        self._rewriter = TeacherRewriter(generate, template, rule.max_lines)
        self._rule = rule

    def compress(self, traces: Sequence[Trace], step: int) -> list[CompressedTrace]:
        """Return one compressed trace per trace."""
        rewritten, rejects = self._rewriter.rewrite(
            traces,
            step,
            # No summary is no faithful one, and counted like those.
            read=lambda reply: summary(reply) or "",
            accepts=lambda text, trace: _keeps_answer(text, trace.answer),
        )
        if sum(rejects):
            logger.info(
                "compression at step %d: %d rewrites had no complete summary or another final "
                "answer, %d of %d traces were cut instead",
                step,
                sum(rejects),
                len(traces) - len(rewritten),
                len(traces),
            )
        return [
            CompressedTrace(
                self._rule.cut(rewritten[index], final_answer(rewritten[index])),
                "rewritten",
                rejects[index],
            )
            if index in rewritten
            else CompressedTrace(self._rule.cut(trace.text, trace.answer), "cut", rejects[index])
            for index, trace in enumerate(traces)
        ]


def summary(reply: str) -> str | None:
    """Return the last complete summary of a reply, outside its reasoning; `None` without one."""
    text = without_reasoning(reply)
    start = text.rfind(_SUMMARY_START, 0, max(text.rfind(_SUMMARY_END), 0))
    inside = text[start + len(_SUMMARY_START) :].partition(_SUMMARY_END)[0]
    return inside.strip() if start >= 0 else None


def _split_at_answer(text: str, answer: str | None) -> tuple[str, str]:
    """Return what comes before the final boxed answer, and that answer boxed on one line; all of
    the text without one.
    """
    if answer is None:
        return text.rstrip(), ""
    boxed = f"\\boxed{{{' '.join(MARKS.sub(' ', answer).split())}}}"
    found = last_boxed(text)
    if found is None:
        return text, boxed
    start = text.rfind("\\boxed")
    closing = _CLOSING.match(text, text.index(found, start) + len(found))
    return text[:start], boxed + (closing[1] if closing else "")


def _lines(text: str) -> list[str]:
    return [" ".join(line.split()) for line in text.splitlines() if line.strip()]


def _keeps_answer(rewrite: str, answer: str | None) -> bool:
    """Return whether a rewrite boxes the same answer, or none where there was none; an unclear case
    counts as changed.
    """
    boxed = final_answer(rewrite)
    if boxed is None or answer is None:
        return boxed is None and answer is None and bool(rewrite)
    return compare(boxed, answer) is True


def _longest(limit: int, fits: Callable[[int], bool]) -> int:
    """Return the largest length up to `limit` that fits, by bisection; 0 if none does."""
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        if fits(middle):
            low = middle
        else:
            high = middle - 1
    return low
