"""Comparison of final answers: decided here where it is plain, handed on to a worker where it takes
algebra.

Nothing here evaluates what a model wrote; the work is bounded by the length of the text. What
counts as the same is in docs/rewards.md.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fractions import Fraction

from zppo_mm.rewards.lists import Lists, as_lists, expand, joins_otherwise, without_list_brackets
from zppo_mm.rewards.marks import without_marks
from zppo_mm.rewards.notation import normalise
from zppo_mm.rewards.quantities import (
    compare_decimal_comma,
    is_rounded,
    parse_in_base,
    parse_number,
    parse_ratio,
    split_unit,
    split_units,
)
from zppo_mm.rewards.structure import (
    LIST_SIGNS,
    Bracketed,
    as_interval,
    joined_inequalities,
    named_point,
    read_bracketed,
    read_relation,
    split_items,
    split_label,
    squeeze,
    without_builder,
    without_group,
)
from zppo_mm.rewards.words import as_formula, in_one_spelling, is_textual, is_word

MAX_ANSWER_CHARS = 1000
MAX_DEPTH = 6
MAX_UNORDERED_ITEMS = 24

Leaf = Callable[[str, str], bool | None]
"""Decides whether two expressions are equal; `None` where it cannot."""

_INTEGER = re.compile(r"[+-]?[0-9]{1,18}")
_SET_NOTATION = re.compile(r"\\(?:mathbb|setminus|cap|cup|emptyset)(?![a-zA-Z])|\\backslash")


@dataclass(frozen=True, slots=True)
class Undecided:
    """What is left to compare by algebra, normalised."""

    parsed: str
    gold: str


def compare(parsed: str, gold: str) -> bool | Undecided:
    """Decide whether two answers are the same, as far as their text decides it.

    Args:
        parsed: The answer in a response.
        gold: The reference answer.

    Returns:
        The verdict, or `Undecided` with the pair to be compared by algebra.
    """
    if parsed == gold or parsed.strip() == gold.strip():
        return True
    if max(len(parsed), len(gold)) > MAX_ANSWER_CHARS:
        return False
    if _INTEGER.fullmatch(parsed) and _INTEGER.fullmatch(gold):
        return int(parsed) == int(gold)
    left, right = normalise(parsed), normalise(gold)
    verdict = is_same(left, right, lambda _left, _right: None)
    return Undecided(left, right) if verdict is None else verdict


def is_same(parsed: str, gold: str, leaf: Leaf) -> bool | None:
    """Compare two normalised answers, and what is left of them after taking them apart by
    `leaf`.
    """
    (left, left_marks), (right, right_marks) = without_marks(parsed), without_marks(gold)
    if left_marks and right_marks and left_marks != right_marks:
        return False
    if left_marks != right_marks and split_unit(left if right_marks else right)[1] not in (
        "",
        "C",
        "F",
    ):
        return False  # 5° and 5 rad, 5% and 5 ppm
    return _Comparison(leaf).same(left, right, MAX_DEPTH)


class _Comparison:
    """One comparison; the first answer is the response's, the second the reference."""

    def __init__(self, leaf: Leaf) -> None:
        self._leaf = leaf

    def same(self, left: str, right: str, depth: int) -> bool | None:
        if squeeze(left) == squeeze(right):
            return bool(left)
        left, right = (
            joined_inequalities(without_builder(named_point(without_group(text))))
            for text in (left, right)
        )
        if not left or not right or depth == 0:
            return False
        if squeeze(left) == squeeze(right):
            return True
        numbers = parse_number(left), parse_number(right)
        if None not in numbers:
            return numbers[0] == numbers[1]
        if "\\ldots" in left or "\\ldots" in right:
            return self._progressions(left, right, depth)
        by_comma = compare_decimal_comma((left, right), numbers)
        if by_comma is not None:
            return by_comma
        if any(sign in left or sign in right for sign in (*LIST_SIGNS, "\\pm", "\\mp")):
            lists = as_lists(left, right)
            if lists is not None:
                return not joins_otherwise(left, right, lists) and self._lists(lists, depth)
        return self._related(left, right, depth)

    def _lists(self, lists: Lists, depth: int) -> bool | None:
        compare_items = self._ordered if lists.is_ordered else self._unordered
        return compare_items(lists.left, lists.right, depth)

    def _ordered(self, left: list[str], right: list[str], depth: int) -> bool | None:
        if len(left) != len(right):
            return False
        return _all(self.same(*pair, depth - 1) for pair in zip(left, right, strict=True))

    def _unordered(self, left: list[str], right: list[str], depth: int) -> bool | None:
        """Match items one to one, whatever their order."""
        if len(left) != len(right):
            return False
        keys = [Counter(_key(item) for item in items) for items in (left, right)]
        rest = [
            [key for key, count in (keys[i] - keys[1 - i]).items() for _ in range(count)]
            for i in (0, 1)
        ]
        if not rest[0]:
            return True
        if all(isinstance(key, Fraction) for key in (*rest[0], *rest[1])):
            return False
        if len(rest[0]) > MAX_UNORDERED_ITEMS:
            return self._ordered(left, right, depth)
        texts = {_key(item): item for item in (*left, *right)}
        open_right = [texts[key] for key in rest[1]]
        is_unknown = False
        for key in rest[0]:
            verdicts = [self.same(texts[key], other, depth - 1) for other in open_right]
            if True in verdicts:
                open_right.pop(verdicts.index(True))
            elif None in verdicts:
                is_unknown = True
            else:
                return False
        return None if is_unknown else not open_right

    def _progressions(self, left: str, right: str, depth: int) -> bool | None:
        """Lists with an ellipsis are the same if they are written the same, item by item: what the
        dots stand for is not guessed.
        """
        items = split_items(without_list_brackets(left)), split_items(without_list_brackets(right))
        if (
            len(items[0]) < 3
            or len(items[0]) != len(items[1])
            or any(("\\ldots" in a) != ("\\ldots" in b) for a, b in zip(*items, strict=True))
        ):
            return False
        return _all(
            ("\\ldots" in a and squeeze(a) == squeeze(b)) or self.same(a, b, depth - 1)
            for a, b in zip(*items, strict=True)
        )

    def _related(self, left: str, right: str, depth: int) -> bool | None:
        """Compare equations, inequalities and named values with one another and with bare
        values.
        """
        relations = read_relation(left), read_relation(right)
        if relations == (None, None):
            return self._composed(left, right, depth)
        labels = [split_label(relation) if relation else None for relation in relations]
        if labels[0] and labels[1]:
            if labels[0][0] == labels[1][0] or not labels[0][0] or not labels[1][0]:
                return self.same(labels[0][1], labels[1][1], depth - 1)
            is_set = any(relation and relation.signs == ["\\in"] for relation in relations)
            is_set = is_set or any(label and read_bracketed(label[1]) for label in labels)
            return False if is_set else self._leaf(left, right)
        intervals = as_interval(left), as_interval(right)
        views = [
            _view(text, label, interval)
            for text, label, interval in zip((left, right), labels, intervals, strict=True)
        ]
        if any(intervals) and views[0] and views[1]:
            if views[0][0] and views[1][0] and views[0][0] != views[1][0]:
                return False
            return self._brackets(views[0][1], views[1][1], depth)
        if labels[0] and relations[1] is None:
            return self.same(labels[0][1], right, depth - 1)
        if labels[1] and relations[0] is None:
            return self.same(left, labels[1][1], depth - 1)
        if relations[0] and relations[1]:
            return self._leaf(left, right)
        bare, relation = (right, relations[0]) if relations[0] else (left, relations[1])
        assert relation is not None
        is_set = read_bracketed(bare) is not None or _SET_NOTATION.search(bare) is not None
        is_inequality = not {"=", "\\approx"} & set(relation.signs)
        return self._leaf(left, right) if is_set and is_inequality else False

    def _composed(self, left: str, right: str, depth: int) -> bool | None:
        """Compare what is in brackets."""
        if "\\begin" in left or "\\begin" in right:
            return self._leaf(left, right)
        brackets = read_bracketed(left), read_bracketed(right)
        if brackets[0] and brackets[1]:
            return self._brackets(brackets[0], brackets[1], depth)
        if _SET_NOTATION.search(left) or _SET_NOTATION.search(right):
            return self._leaf(left, right)
        bracketed, other = (brackets[0], right) if brackets[0] else (brackets[1], left)
        if bracketed is not None:
            if not bracketed.is_set or len(bracketed.items) != 1 or depth < MAX_DEPTH:
                return False if parse_number(other) is not None else self._leaf(left, right)
            (item,) = bracketed.items
            return self.same(*((item, right) if brackets[0] else (left, item)), depth - 1)
        return self._quantities(left, right)

    def _brackets(self, left: Bracketed, right: Bracketed, depth: int) -> bool | None:
        """Compare tuples, sets and intervals; only what can be nothing but an interval may have
        rounded bounds.
        """
        if left.is_set != right.is_set:
            return False
        if left.is_set:
            items = [
                list(dict.fromkeys(squeeze(part) for item in each.items for part in expand(item)))
                for each in (left, right)
            ]
            return self._unordered(items[0], items[1], depth)
        if len(left.items) == 2 and (left.opening, left.closing) != (right.opening, right.closing):
            return False
        if left.is_interval and right.is_interval and len(left.items) == len(right.items):
            return _all(
                is_rounded(*pair) or self.same(*pair, depth - 1)
                for pair in zip(left.items, right.items, strict=True)
            )
        return self._ordered(left.items, right.items, depth)

    def _quantities(self, left: str, right: str) -> bool | None:
        """Compare numbers with units, ratios, numbers in a base, and words."""
        formulas = [as_formula(side) for side in (left, right)]
        if None not in formulas:
            return formulas[0] == formulas[1]
        bases = parse_in_base(left), parse_in_base(right)
        if bases != (None, None):
            return bases[0] == bases[1]
        (left_body, left_unit), (right_body, right_unit) = split_units(left, right)
        if left_unit and right_unit and left_unit != right_unit:
            return False
        if squeeze(left_body) == squeeze(right_body):
            return True
        ratios = parse_ratio(left_body), parse_ratio(right_body)
        if ratios != (None, None):
            return ratios[0] == ratios[1]
        numbers = parse_number(left_body), parse_number(right_body)
        if None not in numbers:
            return numbers[0] == numbers[1]
        by_comma = compare_decimal_comma((left_body, right_body), numbers)
        if by_comma is not None:
            return by_comma
        # Algebra reads words as products of letters, for which "listen" is "silent".
        if (
            is_textual(left_body)
            or is_textual(right_body)
            or (is_word(left_body) and is_word(right_body))
        ):
            return in_one_spelling(left_body) == in_one_spelling(right_body)
        verdict = self._leaf(without_group(left_body), without_group(right_body))
        # What looks like a unit may be a product: `2 m g`.
        return self._leaf(left, right) if verdict is False and left_unit != right_unit else verdict


def _all(verdicts: Iterable[bool | None]) -> bool | None:
    """Return false if any is, else `None` if any is, else true."""
    is_unknown = False
    for verdict in verdicts:
        if verdict is False:
            return False
        is_unknown = is_unknown or verdict is None
    return None if is_unknown else True


def _view(
    text: str, label: tuple[str, str] | None, interval: tuple[str, Bracketed] | None
) -> tuple[str, Bracketed] | None:
    """Return the variable and the interval that a text describes, without a variable if it names
    none.
    """
    if interval is not None:
        return interval
    name, body = label or ("", text)
    bracketed = read_bracketed(body)
    return (
        (name, bracketed)
        if bracketed is not None and not bracketed.is_set and len(bracketed.items) == 2
        else None
    )


def _key(item: str) -> Fraction | str:
    value = parse_number(item)
    return squeeze(item) if value is None else value
