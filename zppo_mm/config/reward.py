"""Section of the configuration: how responses are graded."""

from __future__ import annotations

from dataclasses import dataclass

from data.question import ANSWER_TYPES
from zppo_mm.config.keys import key

JUDGE_MODES = ("open", "fallback", "never")


@dataclass(kw_only=True)
class RewardConfig:
    """Grading."""

    timeout_seconds: float = key(
        5.0,
        "Maximum CPU time for grading one answer. A rollout that exceeds it is left out.",
        above=0,
    )
    budget_seconds: float = key(
        60.0,
        "Maximum time of one grading call on a rank. Rollouts not graded by then are left out.",
        above=0,
    )
    num_workers: int = key(
        2, "Grading processes per rank, and as many again for `reward.functions`.", at_least=1
    )
    functions: dict[str, str] = key(
        {},
        "Reward functions by answer type, such as `{box: reward.py:iou}`: `module:function` or "
        "`file.py:function`, called with question, response, parsed and metadata. It returns a "
        "number from 0 to 1, or named parts. See docs/rewards.md.",
    )
    max_failed_fraction: float = key(
        0.25,
        "The run stops when more than this fraction of the calls of `functions` fails (checked "
        "after 20 calls).",
        at_least=0,
        at_most=1,
    )
    judge: str = key(
        "open",
        "What the judge decides, a language model behind a server or the teacher on its own ranks. "
        "`open`: questions of answer type `open`. `fallback`: also what the rules do not call "
        "right. `never`: nothing. Questions that nothing can grade are skipped.",
        choices=JUDGE_MODES,
        former_choices={"True": "open", "False": "never (and evaluation.judge: never)"},
    )
    judge_endpoints: list[str] = key(
        [],
        "Base URLs of the judge's servers. Empty: `teacher.endpoints`. API key, timeouts and "
        "concurrency are the teacher's.",
    )
    judge_model: str = key("", "Name of the judge's model. Empty: `teacher.model`.")
    judge_max_tokens: int = key(512, "Maximum length of the judge's reply.", at_least=1)
    judge_max_wait_seconds: float = key(
        300.0,
        "Maximum time for a reply of the judge, over all attempts. Then the rollout is left out.",
        above=0,
    )
    judge_max_response_chars: int = key(
        16384,
        "Maximum length of a response that the judge sees. Of a longer one it sees the end.",
        at_least=1,
    )
    judge_template: str = key(
        "",
        "File with the judge's prompt. Empty: judge.txt of `zone.templates`, or the bundled one.",
    )
    max_malformed_fraction: float = key(
        0.25,
        "The run stops when more than this fraction of the judge's replies is malformed (checked "
        "after 20 replies).",
        at_least=0,
        at_most=1,
    )

    @property
    def answer_types(self) -> tuple[str, ...]:
        """The answer types that questions may have."""
        own = [name for name in self.functions if name not in ANSWER_TYPES]
        return (*ANSWER_TYPES, *own)
