"""Responses that the teacher rewrites, into candidates or hints."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from zppo_mm.special_tokens import escape_special_tokens
from zppo_mm.teacher.teacher import Trace

NUM_ATTEMPTS = 2
MARKS = re.compile(r"</?think>|<\|[^<>|\s]*\|>")
"""Tags of reasoning and special tokens, which a rewriter is not shown."""

Generate = Callable[[Sequence[str], int, int], Sequence[str | None]]
"""From user prompts, the step and the number of the attempt (for the random stream) to one response
each, `None` where the teacher did not answer. Every rank passes the same prompts and gets the same
responses.
"""


@dataclass(frozen=True, slots=True)
class TeacherRewriter:
    """Asks the teacher to rewrite responses, and again for what is refused.

    Attributes:
        generate: The teacher as a function of user texts.
        template: With the field `{response}`, optionally `{max_lines}`.
        max_lines: Most lines of a rewrite.
    """

    generate: Generate
    template: str
    max_lines: int

    def rewrite(
        self,
        traces: Sequence[Trace],
        step: int,
        read: Callable[[str], str | None],
        accepts: Callable[[str, Trace], bool],
    ) -> tuple[dict[int, str], list[int]]:
        """Return the accepted rewrites by index of the trace, and how many were refused of each.

        Each attempt is one call for all traces that still need it.

        Args:
            traces: The responses.
            step: Rollout step.
            read: From a reply to the rewrite in it, `None` if there is none.
            accepts: Whether a rewrite of a trace may be used.
        """
        accepted: dict[int, str] = {}
        rejects = [0] * len(traces)
        for attempt in range(NUM_ATTEMPTS):
            missing = [index for index in range(len(traces)) if index not in accepted]
            if not missing:
                break
            prompts = [
                fill_template(self.template, traces[index].text, self.max_lines)
                for index in missing
            ]
            replies = self.generate(prompts, step, attempt)
            for index, reply in zip(missing, replies, strict=True):
                text = read(reply) if reply is not None else None
                if text is None:
                    continue
                if accepts(text, traces[index]):
                    accepted[index] = text
                else:
                    rejects[index] += 1
        return accepted, rejects


def fill_template(template: str, response: str, max_lines: int) -> str:
    """Return the prompt that asks the teacher to rewrite a response, its tags escaped so that it
    cannot end its block.

    Args:
        template: With the fields `{response}` and `{max_lines}`.
        response: A whole response.
        max_lines: Most lines of the rewrite.
    """
    fields = {
        "response": escape_special_tokens(MARKS.sub(" ", response)).strip(),
        "max_lines": str(max_lines),
    }
    return re.sub(r"\{(\w+)\}", lambda match: fields.get(match[1], match[0]), template)
