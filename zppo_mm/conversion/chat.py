"""How the prompts of a Hugging Face folder end."""

from __future__ import annotations

from pathlib import Path

from zppo_mm.errors import ConfigError
from zppo_mm.rollout.chat import ChatFormat
from zppo_mm.rollout.chat_template import THINKING_SWITCH


def prefix_facts(hf_dir: Path) -> list[tuple[str, str]]:
    """Return the generation prefix, and that of either setting of a template that can turn
    reasoning off; titles and texts.
    """
    try:
        chat = ChatFormat(hf_dir)
    except ConfigError as error:
        return [("generation prefix", f"none: {error}")]
    facts = [("generation prefix", _described(chat))]
    for value in (True, False) if chat.can_switch_thinking else ():
        switched = ChatFormat(hf_dir, {THINKING_SWITCH: value})
        facts.append((f"with {THINKING_SWITCH}={str(value).lower()}", _described(switched)))
    return facts


def _described(chat: ChatFormat) -> str:
    return f"{chat.prefix.text!r}, <think> {chat.prefix.thinking}"
