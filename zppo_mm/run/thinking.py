"""How the prompts of a run end, and whether they leave room for the reasoning that is asked for."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence

from zppo_mm.parallel import groups as parallel
from zppo_mm.reasoning import THINK_OPEN
from zppo_mm.rollout.chat_template import THINKING_SWITCH
from zppo_mm.rollout.prompt import PromptEncoder
from zppo_mm.text_table import text_table

logger = logging.getLogger(__name__)


def log_generation_prefixes(encoders: Sequence[PromptEncoder], closing: str) -> None:
    """Write a table of the models' generation prefixes to rank 0's log, with a warning for each
    that contradicts the closing instruction.

    Args:
        encoders: Of the student, then those of the teachers.
        closing: The closing instruction.
    """
    if parallel.rank() != 0:
        return
    logger.info("how prompts end:\n%s", prefix_table(encoders))
    for index, encoder in enumerate(encoders):
        problem = contradiction(encoder, closing, "teacher" if index else "model")
        if problem:
            logger.warning("%s", problem)


def prefix_table(encoders: Sequence[PromptEncoder]) -> str:
    """Return one line per model: its folder, variables, generation prefix and `<think>`."""
    rows = [
        [
            str(encoder.folder),
            json.dumps(encoder.chat_template_kwargs),
            repr(encoder.chat.prefix.text),
            encoder.chat.prefix.thinking,
        ]
        for encoder in encoders
    ]
    head = ["model", "chat_template_kwargs", "generation prefix", THINK_OPEN]
    return text_table(head, rows, num_left=len(head))


def contradiction(encoder: PromptEncoder, closing: str, section: str) -> str:
    """Return why a closing instruction cannot be followed, in words; empty if it can.

    Args:
        encoder: Of the model.
        closing: The closing instruction.
        section: Of the configuration, for the model.
    """
    prefix = encoder.chat.prefix
    if prefix.thinking != "closed" or THINK_OPEN not in closing:
        return ""
    switch = (
        f"set {section}.chat_template_kwargs={{{THINKING_SWITCH}: true}}, or "
        if encoder.chat.can_switch_thinking
        else ""
    )
    return (
        f"{section}: {encoder.folder}: the closing instruction asks for {THINK_OPEN}, but the chat "
        f"template has closed it, got the generation prefix {prefix.text!r}, expected one that "
        f"opens it or has none; {switch}give a closing.txt without {THINK_OPEN} in zone.templates"
    )
