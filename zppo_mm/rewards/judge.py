"""The judge of free-form answers: a language model that compares an answer with the reference, and
never solves.

Source: ZPPO (arXiv 2606.18216), reward.
"""

from __future__ import annotations

import json
import logging
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from data.question import Question
from data.text import read_text_file
from zppo_mm.errors import ConfigError
from zppo_mm.rewards.mathematics import compare
from zppo_mm.special_tokens import escape_special_tokens

logger = logging.getLogger(__name__)

JUDGE_TEMPLATE = "judge.txt"
"""Its name in a folder of templates."""
BUNDLED_TEMPLATE = Path(__file__).parent / "templates" / JUDGE_TEMPLATE
TEMPLATE_FIELDS = ("question", "reference", "answer")

COUNTED = ("judged", "judge_malformed", "judge_disagreements", "judge_failures")

Complete = Callable[[Sequence[str]], Sequence[str | None]]
"""From prompts to one greedy reply each; `None` if there was none."""


class LlmJudge:
    """Asks a model for `{"verdict": "correct"|"wrong"}`; any other reply counts as wrong.
    Implements `Judge`.

    Args:
        complete: The model at temperature 0.
        template: With the fields `{question}`, `{reference}` and `{answer}`.

    Attributes:
        counts: So far, under the names of the metrics without `reward/`: `judged` answers, those of
            them whose reply was `judge_malformed`, those where the rule grader says otherwise
            (`judge_disagreements`), and answers that got no reply (`judge_failures`).
    """

    def __init__(self, complete: Complete, template: str) -> None:
        self._complete = complete
        self._template = template
        self.counts: Counter[str] = Counter(dict.fromkeys(COUNTED, 0))

    def judge(self, items: Sequence[tuple[Question, str]]) -> list[bool | None]:
        """Return for every (question, parsed answer) whether it agrees with the reference, `None`
        where the model did not reply.

        Equal pairs are asked once.
        """
        pairs = list(dict.fromkeys(items))
        replies = dict(
            zip(pairs, self._complete([self._prompt(*pair) for pair in pairs]), strict=True)
        )
        return [
            self._decide(question, answer, replies[question, answer]) for question, answer in items
        ]

    def _decide(self, question: Question, answer: str, reply: str | None) -> bool | None:
        if reply is None:
            self.counts["judge_failures"] += 1
            return None
        verdict = read_verdict(reply)
        self.counts["judged"] += 1
        if verdict is None:
            self.counts["judge_malformed"] += 1
            logger.debug("judge: no verdict in %r", reply[:200])
        by_rule = compare(answer, question.answer)
        if isinstance(by_rule, bool) and by_rule != bool(verdict):
            self.counts["judge_disagreements"] += 1
        return bool(verdict)

    def _prompt(self, question: Question, answer: str) -> str:
        fields = {
            "question": question.text.strip(),
            "reference": question.answer.strip(),
            # As a JSON string the answer cannot end its own line and go on as if it were part of
            # the instructions.
            "answer": json.dumps(escape_special_tokens(answer), ensure_ascii=False),
        }
        return re.sub(r"\{(\w+)\}", lambda match: fields.get(match[1], match[0]), self._template)


def read_verdict(reply: str) -> bool | None:
    """Return the verdict of a strict reply, `None` for anything but the one JSON object with the
    one key.
    """
    try:
        pairs = json.loads(reply, object_pairs_hook=list)
    except (ValueError, RecursionError):
        return None
    verdicts = {"correct": True, "wrong": False}
    # As pairs, a key that is there twice does not vanish; an array of the same shape starts with
    # another bracket.
    if (
        not reply.lstrip().startswith("{")
        or len(pairs) != 1
        or pairs[0][0] != "verdict"
        or not isinstance(pairs[0][1], str)
    ):
        return None
    return verdicts.get(pairs[0][1])


def load_judge_template(path: str = "", folder: str = "") -> str:
    """Read the judge's prompt; an empty path means `judge.txt` of the folder, or the bundled one.

    Raises:
        ConfigError: If the file is missing or lacks a field.
        DataError: If it is no valid text.
    """
    in_folder = Path(folder) / JUDGE_TEMPLATE
    bundled = in_folder if folder and in_folder.is_file() else BUNDLED_TEMPLATE
    file = Path(path) if path else bundled
    if not file.is_file():
        raise ConfigError(
            f"reward.judge_template: no such file, got {str(file)!r}, expected a text file; "
            "correct the path"
        )
    text = read_text_file(file, "reward.judge_template").strip()
    missing = [f"{{{name}}}" for name in TEMPLATE_FIELDS if f"{{{name}}}" not in text]
    if missing:
        raise ConfigError(
            f"reward.judge_template: {file} lacks {', '.join(missing)}, expected the fields "
            f"{', '.join(f'{{{name}}}' for name in TEMPLATE_FIELDS)}; put them where their texts "
            "belong"
        )
    return text
