"""Answers in words: which texts are, and when they say the same."""

from __future__ import annotations

import re

from zppo_mm.rewards.structure import squeeze

_COMMAND = re.compile(r"\\(?:begin|end) ?\{[^{}]*\}|\\[a-zA-Z]+")
_LETTERS = re.compile(r"[^\W\d_]+")
_MATH_NAMES = (
    "sqrt cbrt sin cos tan sec csc cot arcsin arccos arctan asin acos atan sinh cosh tanh log exp "
    "lim max min gcd lcm mod deg inf infinity infty pi frac binom cdot times"
)
_MATH_WORDS = frozenset(_MATH_NAMES.split())
_VOWEL = re.compile("[aeiouy]", re.IGNORECASE)
_SHORT_WORDS = frozenset(("no", "on", "up", "in", "so", "if", "we", "he", "it", "go", "us"))


_SIGNS = re.compile(r"[\\^_+*=/]|[0-9] ?[A-Za-z]|[A-Za-z] ?\(")
_FIGURE = re.compile(r"\\(?:angle|triangle|overline|overrightarrow)")
_SEGMENT = re.compile("(?![IVXLCDM]{2})[A-Z]{2}")
_ELEMENT = (
    "A[lrsgu]|B[aeri]?|C[adelorsu]?|F[er]?|G[ae]|H[egf]?|I[nr]?|K|L[iu]|M[gno]|N[aei]?"
    "|O|P[bdtu]?|R[abn]|S[bceinr]?|T[i]|U|V|W|Xe|Y|Z[nr]"
)
_FORMULA = re.compile(
    rf"(?:\(?(?:{_ELEMENT})\)?(?:_?[0-9]|_?\{{[0-9]+\}}|[0-9]+)?){{1,20}}(?:\^(?:[0-9]?[+-]|\{{[0-9]*[+-]\}}))?"
)
_FORMULA_WRAPPER = re.compile(r"^\\(?:mathrm|text|ce)\{(.*)\}$")
_MAX_PRODUCT = 4
_ARTICLE = re.compile(r"(?:the|an?) (?=\w{2})")


def is_textual(text: str) -> bool:
    """Return whether a normalised text has a word that is no name in mathematics; `mgh` beside
    signs is a product.
    """
    longest = _MAX_PRODUCT if _SIGNS.search(text) and not _FIGURE.search(text) else 2
    words = _LETTERS.findall(_COMMAND.sub(" ", text))
    return any(
        (len(word) > longest and word.lower() not in _MATH_WORDS) or word.lower() in _SHORT_WORDS
        for word in words
    )


def is_word(text: str) -> bool:
    """Return whether a text is letters only, whose order counts, as in `IV`; a segment `AB` is
    `BA`.
    """
    return len(text) > 1 and text.replace(" ", "").isalpha() and not _SEGMENT.fullmatch(text)


def as_formula(text: str) -> str | None:
    """Return a chemical formula with a number, such as `H_{2}O`, `Ca(OH)2` or `Cl^-`, in one
    spelling, `None` for all else.
    """
    text = _FORMULA_WRAPPER.sub(r"\1", text.replace(" ", ""))
    return re.sub(r"[_{}]", "", text) if _FORMULA.fullmatch(text) and not text.isalpha() else None


def in_one_spelling(text: str) -> str:
    """Return a text without articles, quotation marks, hyphens, and the case of words but not of
    symbols.
    """
    text = squeeze(text.replace("-", " ").replace('"', "")).strip("!? '")
    letters = text.replace(" ", "")
    if len(letters) <= _MAX_PRODUCT and letters.isascii() and _is_symbols(letters):
        return letters
    return _ARTICLE.sub("", text.casefold(), count=1)


def _is_symbols(letters: str) -> bool:
    if letters.lower() in _SHORT_WORDS:
        return False
    has_case = letters.isupper() or letters.islower() or letters.istitle()
    return len(letters) <= 2 or not has_case or not _VOWEL.search(letters)
