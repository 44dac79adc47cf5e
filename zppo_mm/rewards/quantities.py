"""Reading of plain numbers, ratios, numbers in a base and units, exactly, evaluating nothing."""

from __future__ import annotations

import re
from decimal import ROUND_HALF_UP, Decimal, localcontext
from fractions import Fraction

from zppo_mm.rewards.units import canonical_unit, is_like_product, is_unmistakable, split_currency

MAX_EXPONENT = 999
MAX_POWER_BASE_DIGITS = 6

_UNSIGNED = r"(?:[1-9][0-9]{0,2}(?:[, ][0-9]{3})+|[0-9]+)?(?:\.[0-9]+)?"
_DECIMAL = re.compile(rf"[+-]? ?(?=[0-9.])({_UNSIGNED})\.?(?:[eE]([+-]?[0-9]{{1,3}}))?")
_EXPONENT = r"\^ ?(?:\{ ?([+-]?[0-9]{1,3}) ?\}|\( ?([+-]?[0-9]{1,3}) ?\)|([+-]?[0-9]{1,3}))"
_TIMES_POWER = re.compile(rf"(.+?) ?(?:\\times|\\cdot|\*|x) ?10 ?{_EXPONENT}")
_POWER = re.compile(rf"([+-]?) ?([0-9]{{1,{MAX_POWER_BASE_DIGITS}}}) ?{_EXPONENT}")
_REPEATING = re.compile(
    r"([+-]?)([0-9]*)\.([0-9]*)"
    r"(?:\\overline ?\{ ?([0-9]{1,40}) ?\}|\\overline ?([0-9])"
    r"|\\dot ?\{?([0-9])\}?|\(([0-9]{1,40})\))"
)
_SCALES = {"thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_SCALED = re.compile(rf"(.*[0-9]) ?({'|'.join(_SCALES)})")
_SLASH = re.compile(r"(?!0[0-9])([^/]+)/(?! ?0[0-9])([^/]+)")  # `01/02` is a date
_FRAC = re.compile(r"([+-]?) ?\\frac ?\{([^{}]*)\} ?\{([^{}]*)\}")
_MIXED = re.compile(r"([+-]?) ?([0-9]+) ?((?<= )[0-9]+ ?/ ?[0-9]+|\\frac.+)")
# Spaces belong to the terms: an optional one beside each colon could be matched in two ways, and a
# long ratio in 2^n.
_RATIO = re.compile(r"[^:]+(?::[^:]+)+")
_WRAPPED = re.compile(r"\(([^()]*)\)|\{([^{}]*)\}")
_DECIMAL_COMMA = re.compile(r"([+-]?[0-9]{1,3}(?:[. ][0-9]{3})+|[+-]?[0-9]+),([0-9]+)")
_GROUPED = re.compile(r"[+-]?[1-9][0-9]{0,2}(?:,[0-9]{3})+")

_IN_BASE = re.compile(
    r"\(?([0-9][0-9A-Fa-f]*|[A-F][0-9A-F]+)\)? ?"
    r"(?:_ ?(?:\{ ?\(? ?(?:base )?([0-9]+|[a-z]+) ?\)? ?\}|([0-9]))"
    r"|\(?(?:in )?base[ -]?([0-9]+|[a-z]+)\)?)"
)
_BASES = (
    "two=2 binary=2 three=3 four=4 five=5 six=6 seven=7 eight=8 octal=8 nine=9 ten=10 decimal=10 "
    "eleven=11 twelve=12 thirteen=13 fourteen=14 fifteen=15 sixteen=16 hex=16"
)
_BASE_NAMES = {
    name: int(number) for name, _, number in (pair.partition("=") for pair in _BASES.split())
}
_UNIT_WORD = r"(?:[A-Za-z]?\\(?:mu|Omega) ?[A-Za-z]*|[^\W\d_]+)"
_WORD = re.compile("[A-Za-z]+")
# `5 (cm)`, but not `5 (m)`, which may be a product.
_UNIT_IN_PARENTHESES = re.compile(r"(?<=[0-9}\]]) ?\( ?([^()]{2,}) ?\)$")
_QUANTITY = re.compile(
    rf"(.*?(?:[0-9)}}.\]]|\\pi)) ?((?:(?:per|/) ?)?{_UNIT_WORD}(?:\.(?=[ a-z]))?"
    rf"(?:(?: ?(?:\\cdot|[/*·]) ?\(?| ){_UNIT_WORD}|\.[^\W\d_]\.?"
    rf"| ?\^ ?(?:\{{ ?-?[0-9] ?\}}|-?[0-9])){{0,8}}\)?)"
)


def parse_number(text: str) -> Fraction | None:
    """Return the exact value of a plain number, `None` for everything else.

    Read are integers and decimals (with thousands separators or repeating digits), powers of ten,
    small powers of integers, fractions of those, and mixed numbers. The work is bounded by the
    length of the text.

    Args:
        text: Normalised (see `notation.normalise`).
    """
    text = text.strip()
    wrapped = _WRAPPED.fullmatch(text)
    if wrapped:
        text = (wrapped[1] if wrapped[1] is not None else wrapped[2]).strip()
    value = _parse_simple(text)
    return value if value is not None else _parse_compound(text)


def parse_decimal_comma(text: str) -> Fraction | None:
    """Return the value of `1000,99` or `1.000,99`.

    `None` for all else and for what could be grouped thousands, such as `1,000`.
    """
    match = _DECIMAL_COMMA.fullmatch(text)
    if match is None or _GROUPED.fullmatch(text):
        return None
    return Fraction(f"{match[1].replace('.', '').replace(' ', '')}.{match[2]}")


def is_grouped(text: str) -> bool:
    """Return whether a number groups its thousands by commas, and could be read as a list."""
    return "," in text and _GROUPED.fullmatch(text) is not None


def parse_ratio(text: str) -> tuple[Fraction, ...] | None:
    """Return the terms of `a : b : ...`, `None` for everything else."""
    if ":" not in text or not _RATIO.fullmatch(text):
        return None
    terms = [parse_number(term) for term in text.split(":")]
    return None if None in terms else tuple(term for term in terms if term is not None)


def parse_in_base(text: str) -> tuple[str, int] | None:
    """Return the digits and the base of `1011_2` or `1011 base 2`, `None` for everything else."""
    match = _IN_BASE.fullmatch(text) if "_" in text or "base" in text else None
    if match is None:
        return None
    name = match[2] or match[3] or match[4]
    base = int(name) if name.isdigit() else _BASE_NAMES.get(name, 0)
    if base < 2 or (not match[1].isdigit() and base < 11):
        return None
    return match[1].lstrip("0").upper() or "0", base


def split_unit(text: str) -> tuple[str, str]:
    """Return a quantity's body and its canonical unit, an empty unit if it has none.

    After a plain number any few words that do not change its value are a unit ("5 red apples");
    after an expression only measuring units are. Letters that touch the number are none if they may
    be symbols: `5m` may be five times m.
    """
    if text.replace(".", "", 1).isdigit():
        return text, ""
    currency = split_currency(text)
    if currency is not None and parse_number(currency[0]) is not None:
        return currency
    opened = _UNIT_IN_PARENTHESES.sub(r" \1", text)
    match = _QUANTITY.fullmatch(opened)
    if match is None or _touches(match):
        return text, ""
    body = match[1].strip()
    is_number = parse_number(body) is not None
    unit = canonical_unit(match[2], is_number and opened == text)
    if unit is None or (unit in ("am", "pm") and not (is_number or parse_ratio(body))):
        return text, ""
    return body, unit


def split_units(left: str, right: str) -> tuple[tuple[str, str], tuple[str, str]]:
    """Return body and unit of two quantities that are compared.

    Letters that touch a number are a unit if the other side has the same unit. A unit that may be a
    symbol counts only if the other side has one too.
    """
    texts, sides = (left, right), [split_unit(left), split_unit(right)]
    for one, other in ((0, 1), (1, 0)):
        if sides[one][1] and not sides[other][1]:
            touching = _letter_behind_number(texts[other])
            if touching is not None and touching[1] == sides[one][1]:
                sides[other] = touching
            else:
                sides[one] = _without_doubtful_unit(texts[one])
    return sides[0], sides[1]


def _without_doubtful_unit(text: str) -> tuple[str, str]:
    """Return body and unit as `split_unit`, without a unit that may be a symbol: `3 V`. Behind a
    power of ten it is none.
    """
    body, unit = split_unit(text)
    written = text.removeprefix(body) if text.startswith(body) else ""
    is_clear = not written or is_unmistakable(written) or _TIMES_POWER.fullmatch(body)
    return (body, unit) if is_clear else (text, "")


def _letter_behind_number(text: str) -> tuple[str, str] | None:
    """Return the number and the unit of `5m`, which may be a product as well; else `None`."""
    match = _QUANTITY.fullmatch(text)
    if match is None or not _touches(match) or parse_number(match[1]) is None:
        return None
    unit = canonical_unit(match[2], False)
    return None if unit is None else (match[1], unit)


def _touches(match: re.Match[str]) -> bool:
    """Return whether letters that may be symbols follow at once, or one of them behind π."""
    word = _WORD.match(match[2])
    if word is None or "\\" in match[2] or "/" in match[2]:
        return False
    if match.end(1) < match.start(2):
        return match[1].endswith("\\pi") and len(word[0]) == 1
    return is_like_product(word[0])


def _parse_simple(text: str) -> Fraction | None:
    """Integers, decimals, powers of ten, small powers."""
    match = _DECIMAL.fullmatch(text)
    if match:
        digits = match[1].replace(",", "").replace(" ", "")
        if not digits or digits == ".":
            return None
        value = _decimal(digits)
        if match[2]:
            value *= Fraction(10) ** int(match[2])
        return -value if text.startswith("-") else value
    if "^" in text:
        return _parse_power(text)
    scaled = _SCALED.fullmatch(text) if text.endswith("n") or text.endswith("d") else None
    if scaled:
        amount = _parse_simple(scaled[1])
        return None if amount is None else amount * Fraction(10 ** _SCALES[scaled[2]])
    match = _REPEATING.fullmatch(text) if "." in text else None
    if match:
        digits = match[4] or match[5] or match[6] or match[7]
        value = Fraction(f"{match[2] or 0}.{match[3] or 0}") + Fraction(
            int(digits), (10 ** len(digits) - 1) * 10 ** len(match[3])
        )
        return -value if match[1] == "-" else value
    return None


def _decimal(digits: str) -> Fraction:
    whole, _, decimals = digits.partition(".")
    return (
        Fraction(int(whole + decimals), 10 ** len(decimals)) if decimals else Fraction(int(whole))
    )


def _parse_power(text: str) -> Fraction | None:
    match = _TIMES_POWER.fullmatch(text)
    if match:
        mantissa = _parse_simple(match[1])
        return (
            None
            if mantissa is None
            else mantissa * Fraction(10) ** int(match[2] or match[3] or match[4])
        )
    match = _POWER.fullmatch(text)
    if match is None:
        return None
    base, exponent = int(match[2]), int(match[3] or match[4] or match[5])
    if base == 0 and exponent <= 0:
        return None
    power = Fraction(base) ** exponent
    return -power if match[1] == "-" else power


def _parse_compound(text: str) -> Fraction | None:
    """Fractions and mixed numbers."""
    if "/" not in text and "\\frac" not in text:
        return None
    match = _MIXED.fullmatch(text)
    if match:
        part = _parse_fraction(match[3])
        if part is None or not 0 <= part < 1:
            return None
        value = int(match[2]) + part
        return -value if match[1] == "-" else value
    return _parse_fraction(text)


def _parse_fraction(text: str) -> Fraction | None:
    match = _FRAC.fullmatch(text)
    if match:
        above, below, sign = match[2], match[3], -1 if match[1] == "-" else 1
    else:
        match = _SLASH.fullmatch(text)
        if not match:
            return None
        above, below, sign = match[1], match[2], 1
    numerator, denominator = _parse_part(above), _parse_part(below)
    if numerator is None or not denominator:
        return None
    return sign * numerator / denominator


def _parse_part(text: str) -> Fraction | None:
    wrapped = _WRAPPED.fullmatch(text.strip())
    return _parse_simple((wrapped[1] or wrapped[2] or "").strip() if wrapped else text.strip())


def compare_decimal_comma(
    texts: tuple[str, str], numbers: tuple[Fraction | None, Fraction | None]
) -> bool | None:
    """Read `1000,99` as a decimal where the other side is a plain number; `None` if it is not
    so.
    """
    for text, number in ((texts[0], numbers[1]), (texts[1], numbers[0])):
        if number is not None and "," in text:
            value = parse_decimal_comma(text)
            if value is not None:
                return value == number
    return None


def is_rounded(left: str, right: str) -> bool:
    """Return whether one number is the other, which has no end as a decimal, rounded to its own
    decimals, of which there are enough.
    """
    return any(
        _rounds_to(parse_number(exact), short) for exact, short in ((left, right), (right, left))
    )


def _rounds_to(exact: Fraction | None, short: str) -> bool:
    match = re.fullmatch(r"-?[0-9]{0,15}\.([0-9]{4,15})", short)
    if match is None or exact is None or (10**20) % exact.denominator == 0:
        return False
    with localcontext() as context:
        context.prec = 60
        return (Decimal(exact.numerator) / exact.denominator).quantize(
            Decimal(1).scaleb(-len(match[1])), ROUND_HALF_UP
        ) == Decimal(short)
