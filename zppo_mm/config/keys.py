"""How a configuration key is declared: as a dataclass field whose metadata holds every fact about
it. Checks, `--help`, resume and the reference page read the metadata.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from typing import Any, Literal, TypeAlias, TypeVar, cast, get_args, get_type_hints

Value = TypeVar("Value")
Change: TypeAlias = bool | Literal["consent"]
"""Whether a resumed run may have another value: freely, if `checkpoint.allow_changes` names the
key, or never.
"""
_METADATA = "key"


@dataclass(frozen=True, slots=True)
class Key:
    """What is declared of a key beside its type and default.

    Attributes:
        help: What it means.
        choices: The strings that it, or every entry of a list, may be; empty allows any.
        at_least: Smallest allowed number.
        above: Number that it must exceed.
        at_most: Largest allowed number.
        below: Number that it must stay under.
        may_change_on_resume: Whether a resumed run may have another value. Of a section it holds
            for all of its keys that do not allow more.
        first_teacher_only: Whether it has no meaning for a fallback teacher.
        former_choices: What to write instead of values that it had in earlier versions.
        also_called: Names that it has elsewhere, for hints.
    """

    help: str
    choices: tuple[str, ...] = ()
    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    may_change_on_resume: Change = False
    first_teacher_only: bool = False
    former_choices: Mapping[str, str] = field(default_factory=dict)
    also_called: tuple[str, ...] = ()

    @property
    def range(self) -> str:
        """The allowed numbers in words; empty if all are allowed."""
        bounds = (
            ("at least", self.at_least),
            ("more than", self.above),
            ("at most", self.at_most),
            ("less than", self.below),
        )
        return " and ".join(f"{word} {bound:g}" for word, bound in bounds if bound is not None)

    def is_in_range(self, value: float) -> bool:
        """Return whether a number is finite and within the bounds."""
        return (
            math.isfinite(value)
            and (self.at_least is None or value >= self.at_least)
            and (self.above is None or value > self.above)
            and (self.at_most is None or value <= self.at_most)
            and (self.below is None or value < self.below)
        )


def key(
    default: Value,
    help: str,
    *,
    choices: Sequence[str] = (),
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    may_change_on_resume: Change = False,
    first_teacher_only: bool = False,
    former_choices: Mapping[str, str] | None = None,
    also_called: Sequence[str] = (),
) -> Value:
    """Declare a key; the arguments are the attributes of `Key`. A list or mapping is copied."""
    declared = Key(
        help,
        tuple(choices),
        at_least,
        above,
        at_most,
        below,
        may_change_on_resume,
        first_teacher_only,
        former_choices or {},
        tuple(also_called),
    )
    if isinstance(default, list | dict):
        made: Any = field(default_factory=default.copy, metadata={_METADATA: declared})
    else:
        made = field(default=default, metadata={_METADATA: declared})
    return cast(Value, made)


def section(kind: type[Value], *, may_change_on_resume: Change = False) -> Value:
    """Declare a section: a key whose value is a dataclass of further keys, with the dataclass's
    docstring as its help.
    """
    own = Key(" ".join(str(kind.__doc__).split()), may_change_on_resume=may_change_on_resume)
    return field(default_factory=kind, metadata={_METADATA: own})


def declared(own: Field[Any]) -> Key:
    """Return what is declared of a field."""
    return cast(Key, own.metadata[_METADATA])


def other_names(own: Field[Any]) -> tuple[str, ...]:
    """Return what a key is called elsewhere; nothing of a plain field."""
    return declared(own).also_called if _METADATA in own.metadata else ()


def default_of(own: Field[Any]) -> Any:
    """Return the default of a field."""
    return own.default if own.default_factory is MISSING else own.default_factory()


def entry_type(kind: Any) -> Any:
    """Return the dataclass that a key holds or whose entries it lists; `None` for plain values."""
    inner = kind if is_dataclass(kind) else (get_args(kind) or (None,))[0]
    return inner if is_dataclass(inner) else None


def walk(values: Any, prefix: str = "") -> Iterator[tuple[str, Field[Any], Any]]:
    """Yield path, field and value of every key below a section, entries of lists of sections
    included: `data.train[0].weight`.
    """
    for own in fields(values):
        value, path = getattr(values, own.name), f"{prefix}{own.name}"
        if is_dataclass(value):
            yield from walk(value, f"{path}.")
            continue
        yield path, own, value
        if isinstance(value, list):
            for index, entry in enumerate(value):
                if is_dataclass(entry):
                    yield from walk(entry, f"{path}[{index}].")


def may_change_on_resume(kind: Any, dotted: str) -> Change:
    """Return whether a resumed run may have another value at a key of `flat_keys`: the most that
    the key or a section around it allows.

    Args:
        kind: The dataclass of the whole configuration.
        dotted: Such as `fallback_teachers.0.model`, or `fallback_teachers.count`.
    """
    allowed: Change = False
    for name in dotted.split("."):
        own = next((each for each in fields(kind) if each.name == name), None)
        if own is None:
            # The index of an entry, or the number of entries.
            continue
        allowed = most_allowed(allowed, declared(own).may_change_on_resume)
        kind = entry_type(get_type_hints(kind)[name]) or kind
    return allowed


def most_allowed(*changes: Change) -> Change:
    """Return the one that allows most."""
    return max(changes, key=(False, "consent", True).index)
