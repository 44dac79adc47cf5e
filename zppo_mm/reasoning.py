"""Reasoning in a response, between tags of its own."""

from __future__ import annotations

THINK_OPEN, THINK_CLOSE = "<think>", "</think>"


def without_reasoning(text: str) -> str:
    """Return what comes after the reasoning; empty if that came to no end."""
    # A reasoning that is opened after the last one was closed has no end.
    return text.rpartition(THINK_CLOSE)[2].partition(THINK_OPEN)[0].strip()
