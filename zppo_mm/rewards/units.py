"""Names of units: which words are one, and which are the same. No unit is converted into
another.
"""

from __future__ import annotations

import re
from collections import Counter

_NAMES = (
    "$=dollar,dollars,usd,USD €=euro,euros,eur,EUR £=pound,pounds,gbp,GBP "
    "¥=yen,yuan,rmb,RMB,cny,CNY,jpy,JPY,元,円 ₹=rupee,rupees,rs,Rs,inr,INR ₽=rub,RUB,руб "
    "₩=won,krw,KRW,원 ¢=cent,cents mm=millimeter,millimeters,millimetre,millimetres "
    "cm=centimeter,centimeters,centimetre,centimetres,см m=meter,meters,metre,metres,м "
    "km=kilometer,kilometers,kilometre,kilometres,км in=inch,inches ft=foot,feet yd=yard,yards "
    "mi=mile,miles mg=milligram,milligrams g=gram,grams,г kg=kilogram,kilograms,kilo,kilos,кг "
    "lb=lbs oz=ounce,ounces mL=ml,milliliter,milliliters,millilitre,millilitres "
    "L=l,liter,liters,litre,litres,л s=sec,secs,second,seconds min=mins,minute,minutes,мин "
    "h=hr,hrs,hour,hours,ч day=days week=weeks month=months year=years,yr,yrs N=newton,newtons "
    "J=joule,joules W=watt,watts V=volt,volts A=amp,amps,ampere,amperes K=kelvin,kelvins "
    "C=celsius,coulomb,coulombs F=fahrenheit,farad,farads Hz=hertz rad=radian,radians Ohm=ohm,ohms "
    "Pa=pascal,pascals T=tesla,teslas Wb=weber H=henry,henries mol=moles,mole eV= "
    "cal=calorie,calories bit=bits byte=bytes lm=lumen lx=lux dB= atm= unit=units ha=hectare,"
    "hectares acre=acres gal=gallon,gallons pc=pcs,piece,pieces ppm= bpm= pts=pt,points hp= TB= "
    "am=a.m,a.m.,A.M,A.M.,AM pm=p.m,p.m.,P.M,P.M.,PM rpm="
)
_PREFIXES = "pnumcdkMGT"
_PREFIXED = "m g s A K N J W V F Hz Pa C T Ohm L mol eV B bit cal Wb H"
_WHOLE_UNITS = {"kmh": "km/h", "kph": "km/h", "kmph": "km/h", "mph": "mi/h", "mps": "m/s"}
_CANONICAL = {
    **{prefix + unit: prefix + unit for prefix in _PREFIXES for unit in _PREFIXED.split()},
    **{
        name: unit
        for unit, names in (entry.split("=") for entry in _NAMES.split())
        for name in (unit, *names.split(","))
        if name
    },
}
# These change the value, join two answers, or stand for a number or a function: never a unit.
_NOT_UNIT_WORDS = (
    "or and to by of is are not than plus minus times over mod pi e i x y z n sqrt sin cos tan "
    "log ln exp inf infinity infty hundred hundreds thousand thousands million millions billion "
    "billions trillion dozen dozens half halves third thirds quarter quarters percent percentage "
    "pct base repeating recurring factorial point negative positive root squared cubed score but "
    "if when where for mil bn mn mln bln tn mio mrd mille lakh lakhs crore crores pair pairs "
    "couple couples tens ones gross fold below under less fewer lower off double doubled triple "
    "tripled quadruple multiplied divided choose wrong false incorrect more most least greater "
    "higher larger bigger smaller longer shorter taller older younger faster slower heavier "
    "lighter wider earlier later increase increased decrease decreased reduced growth zero one "
    "two three four five six seven eight nine ten eleven twelve twenty eins zwei drei vier fünf "
    "sechs sieben acht neun zehn elf zwölf deux trois quatre cinq sept huit neuf dix onze douze "
    "uno dos tres cuatro cinco seis siete ocho nueve diez due tre quattro cinque sei sette otto "
    "nove dieci um dois quatro sete oito dez hundert tausend cent cien cento"
)
_NOT_UNITS = frozenset(_NOT_UNIT_WORDS.split())
_VALUE_CHARACTERS = frozenset("万萬亿億千百十兆半分割成倍억만천백십")
_STEMS = "тыс млн млрд милли полов مليون مليار ألف लाख करोड़ हज़ार 배 折"
_VALUE_STEMS = tuple(_STEMS.split())
# `3 eighths`, `5 millones`, `5 Milliarden`.
_VALUE_WORD = re.compile(
    r"(?:four|fif|six|seven|eigh|nin|ten|eleven|twelf|[a-z]+teen|[a-z]+tie|hundred|thousand)ths?|[a-z]*ill(?:ion|iard|on)[a-z]*",
    re.IGNORECASE,
)
# As products of symbols these are as common as they are as units.
_PRODUCTS = "mg mV mT mA mC mF mH mK mN ms kT kA kC pV nT"
_LIKE_PRODUCTS = frozenset(_PRODUCTS.split())
AMBIGUOUS = _LIKE_PRODUCTS | {name for name in _CANONICAL if re.fullmatch("[A-Za-z]", name)}
"""Units that as plain letters may be symbols; `notation.normalise` writes upright ones, such as
`\\text{V}`, with `UPRIGHT`.
"""
UPRIGHT = "unit"
_AREA = re.compile(r"m ?\^ ?\{? ?[23] ?\}?")
_VOWEL = re.compile("[aeiouy]", re.IGNORECASE)
_LETTERS = re.compile(r"[^\W\d_]+")
_GREEK = re.compile(r"\\(?:(mu)|Omega) ?")
_CHINESE_PAIRS = (
    "千米=km 公里=km 米=m 厘米=cm 毫米=mm 分米=dm 千克=kg 公斤=kg 克=g 毫克=mg 吨=ton 升=L 毫升=mL "
    "小时=h 分钟=min 秒=s 天=day 千瓦=kW 千帕=kPa"
)
_CHINESE = dict(pair.split("=") for pair in _CHINESE_PAIRS.split())
_CHINESE_SQUARED = {"平方": 2, "立方": 3}
_SQUARED = {"square": 2, "sq": 2, "cubic": 3, "cu": 3}
_SQUARED_BEHIND = {"squared": 2, "cubed": 3}
_TOKEN = re.compile(r"(?:[AaPp]\.[Mm]\b\.?)|[^\W\d_]+|/|\\cdot|[*·()]|\^ ?\{? ?(-?[0-9]) ?\}?")
_CURRENCY = re.compile(r"(-?) ?(US\$|USD|EUR|RMB|Rs\.?|\\?\$|[€£¥₹₽₩]) ?([^$€£¥₹₽₩\\]+)")
_CURRENCY_SIGN = re.compile(r"[$€£¥₹₽₩¢]|US|EU|RM|Rs")
_CURRENCY_BEHIND = re.compile(r"([^$€£¥₹₽₩\\]+?) ?(\\?\$|[€£¥₹₽₩¢])")


def canonical_unit(text: str, free_words: bool) -> str | None:
    """Return a unit in one spelling, `None` if the words are no unit.

    Args:
        text: Normalised, such as `km/h`, `m s^{-1}`, `square feet` or `red apples`.
        free_words: Whether words that are no measuring unit may be one.
    """
    text = _GREEK.sub(lambda match: "u" if match[1] else "Ohm", text)
    powers: Counter[str] = Counter()
    last, factor, sign, inside = "", 1, 1, False
    words: list[str] = []
    for match in _TOKEN.finditer(text):
        token = match[0]
        if match[1] is not None and last:
            powers[last] *= int(match[1])
        elif token in ("/", "per"):
            sign = -1
        elif token in "()":
            inside = token == "("
            sign = sign if inside else 1
        elif token in _SQUARED:
            factor = _SQUARED[token]
        elif token in _SQUARED_BEHIND and last:
            powers[last] *= _SQUARED_BEHIND[token]
        elif token not in ("\\cdot", "*", "·"):
            name = _name(token)
            if name is None:
                if not free_words or not _is_free(token):
                    return None
                words.append(token)
                name = token.lower().removesuffix("s")
            last = name
            powers[last] += sign * factor
            factor, sign = 1, sign if inside else 1
    if not powers or len(words) > 4:
        return None
    if len(words) == len(powers) and all(power == 1 for power in powers.values()):
        # "red apples" is no product.
        return " ".join(word.lower() for word in words).removesuffix("s")
    return _joined(powers)


def is_like_product(word: str) -> bool:
    """Return whether letters that touch a number may be a product of symbols: `3g`, `3mg`, `3mv`,
    but not `3cm`.
    """
    name = _name(word)
    return len(word) == 1 or (len(word) <= 3 and (name is None or name in _LIKE_PRODUCTS))


def is_unmistakable(unit: str) -> bool:
    """Return whether a unit as it is written cannot be a symbol or a product of symbols.

    One letter, letters such as `mg`, and one-letter units beside each other may be; a name, an
    abbreviation of several letters, an upright letter, an area or a volume, and what has a stroke,
    a dot or a negative power may not.
    """
    return (
        any(sign in unit for sign in "/·*-\\")
        or _AREA.fullmatch(unit.strip()) is not None
        or not AMBIGUOUS.issuperset(_LETTERS.findall(unit) or [""])
    )


def split_currency(text: str) -> tuple[str, str] | None:
    """Return the amount and the currency of `$5`, `-€3` or `5 €`, `None` for all else."""
    if not _CURRENCY_SIGN.search(text):
        return None
    match = _CURRENCY.fullmatch(text)
    if match:
        symbol = match[2].replace("US$", "$").lstrip("\\").rstrip(".")
        return match[1] + match[3].strip(), _CANONICAL.get(symbol, symbol)
    match = _CURRENCY_BEHIND.fullmatch(text)
    return (match[1].strip(), match[2].lstrip("\\")) if match else None


def _name(token: str) -> str | None:
    power = _CHINESE_SQUARED.get(token[:2])
    if power and token[2:] in _CHINESE:
        return f"{_CHINESE[token[2:]]}^{power}"
    if token.removesuffix(UPRIGHT) in AMBIGUOUS:
        token = token.removesuffix(UPRIGHT)
    name = _CANONICAL.get(token, _CHINESE.get(token))
    if name is None and len(token) > 1:
        name = _CANONICAL.get(token.lower())
    return name if name is not None else _WHOLE_UNITS.get(token.lower())


def _is_free(token: str) -> bool:
    if token.lower() in _NOT_UNITS:
        return False
    if not token.isascii():
        return not (_VALUE_CHARACTERS & set(token)) and not token.lower().startswith(_VALUE_STEMS)
    # `mv`, `mgh` and `abc` are products.
    is_product = len(token) < 4 and (list(token) == sorted(token) or len(token) < 3)
    is_word = not is_product and _VOWEL.search(token) is not None
    return is_word and not _VALUE_WORD.fullmatch(token)


def _joined(powers: Counter[str]) -> str:
    """Write a product of units: `km/h` stands for its parts."""
    split: Counter[str] = Counter()
    for name, power in powers.items():
        above, _, below = name.partition("/")
        split[above] += power
        if below:
            split[below] -= power
    return " ".join(
        name if power == 1 else f"{name}^{power}" for name, power in sorted(split.items()) if power
    )
