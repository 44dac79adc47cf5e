"""Reading of plain numbers and units, exactly and without evaluating anything."""

from __future__ import annotations

import re
from fractions import Fraction

MAX_EXPONENT = 64
MAX_POWER_BASE_DIGITS = 6

_UNSIGNED = r"(?:[0-9]{1,3}(?:[, ][0-9]{3})+|[0-9]+)?(?:\.[0-9]+)?"
_DECIMAL = re.compile(rf"[+-]? ?(?=[0-9.])({_UNSIGNED})\.?(?:[eE]([+-]?[0-9]{{1,3}}))?")
_TIMES_POWER = re.compile(r"(.+?) ?(?:\\times|\\cdot|\*|x) ?10\^ ?(?:\{ ?([+-]?[0-9]{1,3}) ?\}|([+-]?[0-9]{1,3}))")
_POWER = re.compile(rf"([+-]?)([0-9]{{1,{MAX_POWER_BASE_DIGITS}}})\^ ?(?:\{{ ?([0-9]{{1,2}}) ?\}}|([0-9]))")
_SLASH = re.compile(r"([^/]+)/([^/]+)")
_FRAC = re.compile(r"([+-]?) ?\\frac ?(?:\{([^{}]*)\}|([0-9]))? ?(?:\{([^{}]*)\}|([0-9]))?")
_MIXED = re.compile(r"([+-]?) ?([0-9]+) ?((?<= )[0-9]+ ?/ ?[0-9]+|\\frac.+)")
# Spaces belong to the terms: an optional one beside each colon could be matched in two ways, and a long ratio in 2^n.
_RATIO = re.compile(r"[^:]+(?::[^:]+)+")
_WRAPPED = re.compile(r"\(([^()]*)\)|\{([^{}]*)\}")

_ALIASES = {
    "$": ("dollar", "dollars", "usd"),
    "€": ("euro", "euros", "eur"),
    "£": ("pound", "pounds", "gbp"),
    "mm": ("millimeter", "millimeters", "millimetre", "millimetres"),
    "cm": ("centimeter", "centimeters", "centimetre", "centimetres"),
    "m": ("meter", "meters", "metre", "metres"),
    "km": ("kilometer", "kilometers", "kilometre", "kilometres"),
    "in": ("inch", "inches"),
    "ft": ("foot", "feet"),
    "mi": ("mile", "miles"),
    "mg": ("milligram", "milligrams"),
    "g": ("gram", "grams"),
    "kg": ("kilogram", "kilograms"),
    "ml": ("mL", "milliliter", "milliliters", "millilitre", "millilitres"),
    "L": ("l", "liter", "liters", "litre", "litres"),
    "s": ("sec", "second", "seconds"),
    "min": ("mins", "minute", "minutes"),
    "h": ("hr", "hrs", "hour", "hours"),
    "day": ("days",),
    "year": ("years", "yr", "yrs"),
    "N": ("newton", "newtons"),
    "J": ("joule", "joules"),
    "W": ("watt", "watts"),
    "V": ("volt", "volts"),
    "A": ("amp", "amps", "ampere", "amperes"),
    "K": ("kelvin",),
    "C": ("celsius",),
    "F": ("fahrenheit",),
    "Hz": ("hertz",),
    "rad": ("radian", "radians"),
    "km/h": ("kmh", "kph"),
    "m/s": (),
    "mph": (),
    "unit": ("units",),
}
_CANONICAL = {name: unit for unit, names in _ALIASES.items() for name in (unit, *names)}
# These change the value, join two answers or stand for a number or a function: never a unit.
_NOT_UNIT_WORDS = (
    "or and to by of is are not than plus minus times over mod pi e i x y z n sqrt sin cos tan log ln exp inf infinity hundred thousand "
    "million billion trillion dozen half third quarter percent base"
)
_NOT_UNITS = frozenset(_NOT_UNIT_WORDS.split())
_UNIT = re.compile(r"(.*?[0-9)}.]) ?((?:[A-Za-z]+)(?:[ /][A-Za-z]+){0,3})(?: ?\^ ?\{? ?([23]) ?\}?)?")
_CURRENCY = re.compile(r"(\\?\$|€|£)?([^$€£\\]+)(\\?\$|€|£)?")
_SQUARED = {"square": "2", "sq": "2", "cubic": "3", "cu": "3"}


def parse_number(text: str) -> Fraction | None:
    """Return the exact value of a plain number, `None` for everything else.

    Read are integers and decimals (with thousands separators), powers of ten, small integer powers, fractions of those, and mixed
    numbers. The work is bounded by the length of the text.

    Args:
        text: Normalised (see `mathematics.normalise`).
    """
    text = text.strip()
    wrapped = _WRAPPED.fullmatch(text)
    if wrapped:
        text = (wrapped[1] if wrapped[1] is not None else wrapped[2]).strip()
    value = _parse_simple(text)
    return value if value is not None else _parse_compound(text)


def parse_ratio(text: str) -> tuple[Fraction, ...] | None:
    """Return the terms of `a : b : ...`, `None` for everything else."""
    if not _RATIO.fullmatch(text):
        return None
    terms = [parse_number(term) for term in text.split(":")]
    return None if None in terms else tuple(term for term in terms if term is not None)


def split_unit(text: str) -> tuple[str, str]:
    """Return a quantity's body and its canonical unit, an empty unit if it has none.

    After a plain number any few words that do not change its value are a unit ("5 red apples"); after an expression only measuring
    units are.
    """
    currency = _CURRENCY.fullmatch(text)
    if currency and parse_number(currency[2]) is not None and bool(currency[1]) != bool(currency[3]):
        return currency[2].strip(), (currency[1] or currency[3]).lstrip("\\")
    match = _UNIT.fullmatch(text)
    if match is None:
        return text, ""
    body, words, power = match[1], match[2].split(), match[3] or ""
    if len(words) > 1 and words[0].lower() in _SQUARED:
        words, power = words[1:], _SQUARED[words[0].lower()]
    name = " ".join(words)
    unit = _CANONICAL.get(name) or _CANONICAL.get(name.lower())
    if unit is None:
        free = not any(word.lower() in _NOT_UNITS or len(word) < 2 for word in re.split(r"[ /]", name))
        if not free or parse_number(body) is None:
            return text, ""
        unit = name.lower().removesuffix("s")
    return body.strip(), f"{unit}^{power}" if power else unit


def _parse_simple(text: str) -> Fraction | None:
    """Integers, decimals, powers of ten, small powers."""
    match = _DECIMAL.fullmatch(text)
    if match:
        digits = match[1].replace(",", "").replace(" ", "")
        if not digits or digits == ".":
            return None
        exponent = int(match[2] or 0)
        if abs(exponent) > MAX_EXPONENT:
            return None
        value = Fraction(digits) * Fraction(10) ** exponent
        return -value if text.startswith("-") else value
    match = _TIMES_POWER.fullmatch(text)
    if match:
        exponent = int(match[2] or match[3])
        mantissa = _parse_simple(match[1])
        return None if mantissa is None or abs(exponent) > MAX_EXPONENT else mantissa * Fraction(10) ** exponent
    match = _POWER.fullmatch(text)
    if match and int(match[3] or match[4]) <= MAX_EXPONENT:
        power = Fraction(int(match[2])) ** int(match[3] or match[4])
        return -power if match[1] == "-" else power
    return None


def _parse_compound(text: str) -> Fraction | None:
    """Fractions and mixed numbers."""
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
        above, below = match[2] or match[3], match[4] or match[5]
        sign = -1 if match[1] == "-" else 1
    else:
        match = _SLASH.fullmatch(text)
        if not match:
            return None
        above, below, sign = match[1], match[2], 1
    numerator, denominator = _parse_part(above), _parse_part(below)
    if numerator is None or not denominator:
        return None
    return sign * numerator / denominator


def _parse_part(text: str | None) -> Fraction | None:
    if text is None:
        return None
    wrapped = _WRAPPED.fullmatch(text.strip())
    return _parse_simple((wrapped[1] or wrapped[2] or "").strip() if wrapped else text.strip())
