"""Some responses of a step, for a terminal."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from zppo_mm.experience import Group, Rollout

MAX_CHARACTERS = 500
"""Of a prompt and of a response; of a longer one beginning and end are shown."""
logger = logging.getLogger(__name__)


def log_samples(step: int, groups: Sequence[Group], count: int) -> None:
    """Log one response of each of some groups, spread evenly over the step in its order: the best
    of the first, the worst of the second, and so on.

    Args:
        step: Rollout step.
        groups: Of the step.
        count: How many, at most.
    """
    graded = [group for group in groups if group.rollouts]
    count = min(count, len(graded))
    for index in range(count):
        group = graded[index * len(graded) // count]
        choose = min if index % 2 else max
        rollout = choose(group.rollouts, key=lambda each: each.reward)
        logger.info("%s", _shown(step, group, rollout))


def _shown(step: int, group: Group, rollout: Rollout) -> str:
    question = group.question
    media = f", {len(question.media)} media" if question.media else ""
    return (
        f"sample of step {step}: {group.kind} {_plain(question.id)}{media}, accuracy of the group "
        f"{group.accuracy:.2f}\n"
        f"  prompt:   {_plain(group.instance.text)}\n"
        f"  response: {_plain(rollout.text)}\n"
        f"  reward {rollout.reward:.2f}, {rollout.author}, {len(rollout.response_ids)} tokens "
        f"({rollout.finish_reason}), answer {_plain(question.answer)}, got "
        f"{_plain(rollout.parsed or 'none')}"
    )


def _plain(text: str) -> str:
    """Return a text in one line, shortened, and with what could steer a terminal escaped."""
    if len(text) > MAX_CHARACTERS:
        half = MAX_CHARACTERS // 2
        text = f"{text[:half]} […] {text[-half:]}"
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode()
        for character in text
    )
