"""Keys that have other values than in the checkpoint that a run continues from, and consent to
that.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from zppo_mm.config.keys import may_change_on_resume
from zppo_mm.config.load import flat_keys
from zppo_mm.config.schema import RunConfig


@dataclass(frozen=True, slots=True)
class KeyChange:
    """One key with another value than before.

    Attributes:
        key: As in `flat_keys`.
        old: Its value in the checkpoint.
        new: Its value now.
    """

    key: str
    old: Any
    new: Any

    @property
    def to_allow(self) -> str:
        """What `checkpoint.allow_changes` names: of the entries of a list of sections the list."""
        parts = self.key.split(".")
        return ".".join(
            itertools.takewhile(lambda part: not part.isdigit() and part != "count", parts)
        )

    def __str__(self) -> str:
        return f"{self.key} was {self.old!r}, is {self.new!r}"


@dataclass(frozen=True, slots=True)
class Changes:
    """All of them, by what they need.

    Attributes:
        free: Those that change nothing that an earlier step means.
        allowed: Those that `checkpoint.allow_changes` names.
        lacking_consent: Those that it could name, and does not.
        refused: Those that would need a new run.
    """

    free: tuple[KeyChange, ...]
    allowed: tuple[KeyChange, ...]
    lacking_consent: tuple[KeyChange, ...]
    refused: tuple[KeyChange, ...]


def find_changes(saved: Mapping[str, Any], config: RunConfig) -> Changes:
    """Compare a configuration with that of a checkpoint.

    Args:
        saved: The whole configuration as nested mappings.
        config: Of the run that is to continue.
    """
    # A checkpoint that is older than a key was made with its default.
    before = _meant({**flat_keys(asdict(RunConfig())), **flat_keys(saved)})
    changed = [
        KeyChange(key, before.get(key), value)
        for key, value in _meant(flat_keys(asdict(config))).items()
        if before.get(key) != value
    ]
    consent = config.checkpoint.allow_changes
    kinds = [(each, may_change_on_resume(RunConfig, each.key)) for each in changed]
    by_consent = [each for each, kind in kinds if kind == "consent"]
    return Changes(
        free=tuple(each for each, kind in kinds if kind is True),
        allowed=tuple(each for each in by_consent if _is_named(each.key, consent)),
        lacking_consent=tuple(each for each in by_consent if not _is_named(each.key, consent)),
        refused=tuple(each for each, kind in kinds if kind is False),
    )


def _is_named(key: str, named: list[str]) -> bool:
    return any(key == each or key.startswith(f"{each}.") for each in named)


def _meant(values: dict[str, Any]) -> dict[str, Any]:
    """Return values of `flat_keys` with what a default stands for where it follows from other keys:
    a learning rate that falls until the last step is another one if there are more steps.
    """
    if values["train.lr_decay_style"] == "constant":
        return values
    whole_run = values["train.train_iters"] * values["train.updates_per_step"]
    return {**values, "train.lr_decay_updates": values["train.lr_decay_updates"] or whole_run}
