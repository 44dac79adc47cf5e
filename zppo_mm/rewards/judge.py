"""The judge: a language model that compares a response with the reference answer, and never solves.

Source: ZPPO (arXiv 2606.18216), reward.
"""

from __future__ import annotations

import copy
import json
import logging
import re
from collections import Counter, deque
from collections.abc import Callable, Sequence
from pathlib import Path

from data.choices import option_letters
from data.messages import whole_text
from data.question import Question
from data.text import read_text_file
from zppo_mm.errors import ConfigError
from zppo_mm.rewards.mathematics import compare
from zppo_mm.rewards.verify import JudgedResponse
from zppo_mm.special_tokens import escape_special_tokens

logger = logging.getLogger(__name__)

JUDGE_TEMPLATE = "judge.txt"
"""Its name in a folder of templates."""
BUNDLED_TEMPLATE = Path(__file__).parent / "templates" / JUDGE_TEMPLATE
TEMPLATE_FIELDS = ("question", "response", "reference")
LEFT_OUT = "[…] "
MAX_SHOWN_CHARS = 200

COUNTED = ("judged", "judge_malformed", "judge_disagreements", "judge_failures", "judge_cut")

# What follows a letter, as in LaTeX's "\frac{a}", is no field.
_OTHER_FIELD = re.compile(r"(?<![A-Za-z}])\{(?!(?:question|response|reference|options)\})\w+\}")
_FENCE = re.compile(r"\s*```\s*(?:json)?(.*)```\s*", re.DOTALL | re.IGNORECASE)

Complete = Callable[[Sequence[str]], Sequence[str | None]]
"""From prompts to one greedy reply each; `None` if there was none."""


class LlmJudge:
    """Asks a model for `{"verdict": "correct"|"wrong"}`; any other reply counts as wrong.
    Implements `Judge`.

    Args:
        complete: The model at temperature 0.
        template: With the fields `{question}`, `{response}` and `{reference}`, optionally
            `{options}`.
        max_response_chars: Longest response that is shown; of a longer one, the end.

    Attributes:
        counts: So far, under the names of the metrics without `reward/`: `judged` responses, those
            of them whose reply was `judge_malformed`, those where the rules say otherwise
            (`judge_disagreements`), responses that got no reply (`judge_failures`), and those of
            which only the end was shown (`judge_cut`).
    """

    def __init__(self, complete: Complete, template: str, max_response_chars: int) -> None:
        self._complete = complete
        self._template = template
        self._max_response_chars = max_response_chars
        self.counts: Counter[str] = Counter(dict.fromkeys(COUNTED, 0))
        self._malformed: deque[str] = deque([""], maxlen=1)

    @property
    def malformed_example(self) -> str:
        """Beginning of the last reply without a verdict."""
        return self._malformed[0]

    def with_template(self, template: str) -> LlmJudge:
        """Return one with another prompt; both count together."""
        other = copy.copy(self)
        other._template = template
        return other

    def judge(self, items: Sequence[JudgedResponse]) -> list[bool | None]:
        """Return for every response whether it agrees with the reference, `None` where the model
        did not reply.

        Equal items are asked once.
        """
        distinct = list(dict.fromkeys(items))
        replies = dict(
            zip(distinct, self._complete(list(map(self._prompt, distinct))), strict=True)
        )
        return [self._decide(item, replies[item]) for item in items]

    def _decide(self, item: JudgedResponse, reply: str | None) -> bool | None:
        self.counts["judge_cut"] += len(item.text) > self._max_response_chars
        if reply is None:
            self.counts["judge_failures"] += 1
            return None
        verdict = read_verdict(reply)
        self.counts["judged"] += 1
        if verdict is None:
            self.counts["judge_malformed"] += 1
            self._malformed.append(reply[:MAX_SHOWN_CHARS])
            logger.debug("judge: no verdict in %r", self.malformed_example)
        by_rule = compare(item.text, item.question.answer) if item.is_final_answer else None
        if isinstance(by_rule, bool) and by_rule != bool(verdict):
            self.counts["judge_disagreements"] += 1
        return bool(verdict)

    def _prompt(self, item: JudgedResponse) -> str:
        text = item.text
        if len(text) > self._max_response_chars:
            text = LEFT_OUT + text[-self._max_response_chars :]
        fields = {
            "question": whole_text(item.question),
            "options": _options(item.question),
            # As a JSON string the response cannot end its own line and go on as if it were part of
            # the instructions.
            "response": json.dumps(escape_special_tokens(text), ensure_ascii=False),
            "reference": item.question.answer.strip(),
        }
        return re.sub(r"\{(\w+)\}", lambda match: fields.get(match[1], match[0]), self._template)


def _options(question: Question) -> str:
    """Return the lettered options under a heading of their own; empty without any."""
    letters = option_letters(len(question.choices))
    lines = [f"{letter}. {text}" for letter, text in zip(letters, question.choices, strict=True)]
    return "\n\nOptions:\n" + "\n".join(lines) if lines else ""


def read_verdict(reply: str) -> bool | None:
    """Return the verdict of a strict reply, `None` for anything but the one JSON object with the
    one key, which may be in a Markdown fence.
    """
    fenced = _FENCE.fullmatch(reply)
    text = fenced[1] if fenced else reply
    try:
        pairs = json.loads(text, object_pairs_hook=list)
    except (ValueError, RecursionError):
        return None
    verdicts = {"correct": True, "wrong": False}
    # As pairs, a key that is there twice does not vanish; an array of the same shape starts with
    # another bracket.
    if (
        not text.lstrip().startswith("{")
        or len(pairs) != 1
        or pairs[0][0] != "verdict"
        or not isinstance(pairs[0][1], str)
    ):
        return None
    return verdicts.get(pairs[0][1])


def load_judge_template(path: str = "", folder: str = "") -> str:
    """Read the judge's prompt; an empty path means `judge.txt` of the folder, or the bundled one.

    Raises:
        ConfigError: If the file is missing, lacks a field or has another.
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
    others = [match.group() for match in _OTHER_FIELD.finditer(text)]
    if missing or others:
        what = f"lacks {', '.join(missing)}" if missing else f"has the unknown {', '.join(others)}"
        raise ConfigError(
            f"reward.judge_template: {file} {what}, expected the fields "
            f"{', '.join(f'{{{name}}}' for name in TEMPLATE_FIELDS)} and optionally {{options}}; "
            "put them where their texts belong, and no others"
        )
    return text
