"""What to say about a key that does not exist: the one that was probably meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import Field, fields, is_dataclass
from typing import Any, get_type_hints

from zppo_mm.config.keys import other_names


def key_hint(got: str, beside: Sequence[str], kind: Any) -> str:
    """Return `did you mean …?` for an unknown key, or where to look.

    Args:
        got: The key, dotted.
        beside: The keys of the section that it stands in, dotted.
        kind: The dataclass of the whole configuration.
    """
    own_name = got.rpartition(".")[2].lower()
    known = dict(every_key(kind))
    meant = [
        *(path for path, own in known.items() if own_name in other_names(own)),
        *difflib.get_close_matches(got, beside, n=1, cutoff=0.6),
        *(path for path in known if path.rpartition(".")[2] == own_name),
    ]
    return f"did you mean {meant[0]}?" if meant else "see --help for all keys"


def did_you_mean(got: str, known: Iterable[str]) -> str:
    """Return `; did you mean X?` when something known is close."""
    closest = difflib.get_close_matches(got, list(known), n=1)
    return f"; did you mean {closest[0]}?" if closest else ""


def every_key(kind: Any, prefix: str = "") -> Iterator[tuple[str, Field[Any]]]:
    """Yield every dotted key that can be set, with its declaration."""
    hints = get_type_hints(kind)
    for own in fields(kind):
        if is_dataclass(hints[own.name]):
            yield from every_key(hints[own.name], f"{prefix}{own.name}.")
        else:
            yield f"{prefix}{own.name}", own
