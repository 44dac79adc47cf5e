"""Every kind of group and every training method, one record each.

Configuration, checks, `--help`, prompts, figures and documentation read the records. How the
prompts of a reformulated kind are made is the business of `zppo_mm.zone.recipes`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

GroupKind: TypeAlias = str
"""Name of a record of `KINDS`."""


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of group.

    Attributes:
        name: In uids, transcripts and metrics. The switch of a kind that has one is `zone.<name>`.
        role: `plain`: the prompt is the unchanged question and all rollouts are the student's.
            `reformulated`: another prompt for a hard question. `training`: made only to be trained
            on, with rollouts of the teacher.
        label: In the legends of figures.
        title: Heading of such a group in the report.
        color: In figures.
        has_switch: Whether it is turned on by `zone.<name>`.
        uses_teacher: Whether it is made of a correct teacher rollout.
        asks_pre_capped: Whether the teacher is asked only about the hard questions that the pre-cap
            keeps. Kinds that are on together ask about all hard ones if any of them does.
        is_rewritten: Whether its rollouts are rewritten (compressed, or turned into a hint).
    """

    name: GroupKind
    role: Literal["plain", "reformulated", "training"]
    label: str
    title: str
    color: str
    has_switch: bool = True
    uses_teacher: bool = True
    asks_pre_capped: bool = False
    is_rewritten: bool = False


_PLAIN: Mapping[str, Any] = {"has_switch": False, "uses_teacher": False}

KINDS: tuple[Kind, ...] = (
    Kind("new", "plain", "new", "Plain prompt", "#3b6fb6", **_PLAIN),
    Kind("replayed", "plain", "replayed", "Plain prompt", "#9dbbe3", **_PLAIN),
    Kind("bcq", "reformulated", "BCQ", "BCQ prompt", "#1f9d78", is_rewritten=True),
    Kind(
        "ncq", "reformulated", "NCQ", "NCQ prompt", "#e08a2c", uses_teacher=False, is_rewritten=True
    ),
    Kind(
        "hint",
        "reformulated",
        "hint",
        "Hint prompt",
        "#7b4fb3",
        asks_pre_capped=True,
        is_rewritten=True,
    ),
    Kind("prefix", "reformulated", "prefix", "Continued response", "#8a94a6", asks_pre_capped=True),
    Kind("inject", "training", "inject", "Plain prompt with a teacher's response", "#8c564b"),
    Kind("teacher", "training", "teacher", "Teacher's responses", "#b79cd8", has_switch=False),
)
"""All kinds. The reformulated prompts of one question come in this order."""

PLAIN_KINDS: tuple[GroupKind, ...] = tuple(kind.name for kind in KINDS if kind.role == "plain")
REFORMULATED: tuple[Kind, ...] = tuple(kind for kind in KINDS if kind.role == "reformulated")
SWITCHED: tuple[Kind, ...] = tuple(kind for kind in KINDS if kind.has_switch)


@dataclass(frozen=True, slots=True)
class Method:
    """A named setting of configuration keys.

    Attributes:
        name: Value of the key `method`.
        label: In figures.
        color: In figures; the same with and without replay.
        summary: One line for `--help` and the documentation.
        settings: The keys that it sets, by their dotted names.
    """

    name: str
    label: str
    color: str
    summary: str
    settings: Mapping[str, Any]

    @property
    def needs_teacher(self) -> bool:
        """Whether the teacher is used even if it compresses nothing."""
        return self.settings["distill.source"] != "none" or any(
            kind.uses_teacher and self.settings[f"zone.{kind.name}"] for kind in SWITCHED
        )


_OFF: Mapping[str, Any] = {
    **{f"zone.{kind.name}": False for kind in SWITCHED},
    "distill.source": "none",
}

_BASES: tuple[tuple[str, str, str, str, Mapping[str, Any]], ...] = (
    ("grpo", "GRPO", "#8a94a6", "plain prompts only", {}),
    (
        "bcq",
        "BCQ",
        "#1f9d78",
        "hard questions again with one correct and one wrong candidate",
        {"zone.bcq": True},
    ),
    (
        "ncq",
        "NCQ",
        "#e08a2c",
        "hard questions again with the student's own wrong answers",
        {"zone.ncq": True},
    ),
    (
        "bcq_ncq",
        "BCQ + NCQ",
        "#3b6fb6",
        "BCQ and NCQ prompts of hard questions",
        {"zone.bcq": True, "zone.ncq": True},
    ),
    (
        "hint",
        "Hint",
        "#7b4fb3",
        "hard questions again with an answer-free hint by the teacher",
        {"zone.hint": True},
    ),
    (
        "prefix",
        "Prefix",
        "#b08968",
        "hard questions with the beginning of a correct teacher response",
        {"zone.prefix": True},
    ),
    (
        "inject",
        "Inject",
        "#8c564b",
        "one correct teacher response in the group of a hard question",
        {"zone.inject": True},
    ),
    (
        "off_distill",
        "Off-policy distillation",
        "#d9655b",
        "distillation on the teacher's correct responses to all questions",
        {"distill.source": "teacher", "train.updates_per_step": 1},
    ),
    (
        "on_distill",
        "On-policy distillation",
        "#4fb3bf",
        "distillation on the student's own responses",
        {"distill.source": "student", "train.updates_per_step": 1},
    ),
)
"""Name, label, color, summary and settings of every method without replay."""

_WITH_REPLAY: Mapping[str, tuple[str, str]] = {"bcq_ncq": ("zppo", "ZPPO")}
"""Name and label with replay, where they are not the name and the label with a suffix."""


def _both(
    name: str, label: str, color: str, summary: str, settings: Mapping[str, Any]
) -> tuple[Method, Method]:
    """Return a method without and with the replay buffer."""
    plain = Method(name, label, color, summary, {**_OFF, **settings, "zone.replay": False})
    full_name, full_label = _WITH_REPLAY.get(name, (f"{name}_replay", f"{label} + replay"))
    return plain, Method(
        full_name,
        full_label,
        color,
        f"{name} with the replay buffer",
        {**plain.settings, "zone.replay": True},
    )


METHODS: Mapping[str, Method] = {method.name: method for base in _BASES for method in _both(*base)}
"""All methods by name."""
