"""Answers as lists of items, with and without brackets, and when their order counts."""

from __future__ import annotations

import re
from dataclasses import dataclass

from zppo_mm.rewards.quantities import is_grouped, parse_number, split_unit
from zppo_mm.rewards.structure import (
    as_interval,
    read_bracketed,
    read_cases,
    read_relation,
    split_items,
    split_label,
    split_union,
)

_OR = re.compile(r"(?<![A-Za-z\\])or(?![A-Za-z])|\\lor(?![A-Za-z])")


@dataclass(frozen=True, slots=True)
class Lists:
    """The items of two answers of which one at least is a list without brackets."""

    left: list[str]
    right: list[str]
    is_ordered: bool


def as_lists(left: str, right: str) -> Lists | None:
    """Return both answers as lists, `None` if neither is one; a tuple, a set, a union or a system
    of equations may be compared with a list.

    Order counts against a tuple, and where one side names all its items and the other none.
    """
    items = [_items(left, right), _items(right, left)]
    if len(items[0]) == 1 and len(items[1]) == 1:
        return None
    ordered = any(
        _gives_names(one) and not any("=" in item for item in other)
        for one, other in (items, items[::-1])
    )
    for index, text in ((0, left), (1, right)):
        if len(items[index]) > 1:
            continue
        label = split_label(relation) if (relation := read_relation(text)) else None
        bare = label[1] if label else text
        bracketed, cases = read_bracketed(bare), read_cases(bare)
        if cases is not None:
            items[index] = cases
        elif bracketed is not None and bracketed.is_list:
            ordered = ordered or not bracketed.is_set
            items[index] = [item for entry in bracketed.items for item in expand(entry)]
        else:
            items[index] = split_union(bare)
    return Lists(items[0], items[1], ordered)


def without_list_brackets(text: str) -> str:
    """Return what is in the brackets around a list."""
    return (
        text[2:-2]
        if text.startswith("\\{") and text.endswith("\\}")
        else text[1:-1]
        if read_bracketed(text)
        else text
    )


def _items(text: str, other: str) -> list[str]:
    """Return the items of a list without brackets, each `a \\pm b` as two; `1,000` is one unless it
    is compared with a list.
    """
    if read_bracketed(text) is not None:
        return [text]
    is_one = ",0" in text or len(split_items(other)) == 1
    if "," in text and ((is_grouped(text) and is_one) or _is_amount(text)):
        return [text]
    return [item for entry in split_items(text) for item in expand(entry)]


def _is_amount(text: str) -> bool:
    body, unit = split_unit(text)
    return bool(unit) and parse_number(body) is not None


def expand(item: str) -> list[str]:
    if "\\pm" not in item and "\\mp" not in item:
        return [item]
    signs = (("+", "-"), ("-", "+"))
    return [
        re.sub(r"\\mp(?![a-zA-Z]) ?", minus, re.sub(r"\\pm(?![a-zA-Z]) ?", plus, item))
        for plus, minus in signs
    ]


def joins_otherwise(left: str, right: str, lists: Lists) -> bool:
    """Return whether one side asks for one of several conditions on different variables, and the
    other for all of them.
    """
    variables = {interval[0] for item in lists.left if (interval := as_interval(item))}
    return len(variables) > 1 and (_OR.search(left) is None) != (_OR.search(right) is None)


def _gives_names(items: list[str]) -> bool:
    """Return whether every item is named, each by another name."""
    names = [
        label[0]
        for item in items
        if (relation := read_relation(item)) and (label := split_label(relation)) and label[0]
    ]
    return len(names) == len(items) > 1 and len(set(names)) == len(names)
