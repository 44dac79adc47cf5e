r"""How an answer is built: lists, brackets and relations, found in its text; nothing is
evaluated here.

Everything expects text in the spelling of `notation.normalise`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_BRACKET = re.compile(r"\\begin ?\{|\\end ?\{[a-zA-Z]*\*?\}|\\[{}]|\\.|[()\[\]{}]", re.DOTALL)
_OPENING = frozenset(("\\{", "(", "[", "{"))
_CLOSING = frozenset(("\\}", ")", "]", "}"))
_SEPARATOR = re.compile(r"[,;]? *(?:&|(?<![A-Za-z\\])(?:and|or)(?![A-Za-z])|\\lor(?![A-Za-z])) *|,")
# Beside ", " a comma between digits groups thousands, as in "1,000, 2,000".
_LOOSE_SEPARATOR = re.compile(_SEPARATOR.pattern + r"(?!(?<=[0-9],)[0-9]{3}(?![0-9]))")
_SEMICOLON = re.compile(";")
_AND = re.compile(r"(?<![A-Za-z\\])and(?![A-Za-z])|\\land(?![a-zA-Z])")
_FRENCH = re.compile(r"\](.+[,;].+)([\[\]])|([\[\]])(.+[,;].+)\[")
_RELATION = re.compile(
    r"<|>|=|\\le(?![a-zA-Z])|\\ge(?![a-zA-Z])|\\ne(?![a-zA-Z])|\\approx(?![a-zA-Z])|\\in(?![a-zA-Z])"
)
_CASES = re.compile(r"\\begin ?\{cases\*?\}((?:(?!\\begin).)*)\\end ?\{cases\*?\}")
_SYMBOL = (
    r"(?:[A-Za-z]|\\(?!in|le|ge|ne|frac|sqrt|infty|pi(?![a-z])|cup|cap|text)[a-zA-Z]+ ?)'*(?: ?_ "
    r"?(?:\{[^{}]*\}|[A-Za-z0-9]))?'*"
)
_INDEX = r"(?: ?_ ?(?:\{[^{}]*\}|\w))?"
_NAME = (
    rf"(?:(?:m ?)?\\(?:angle|triangle|overline|overrightarrow|vec|Delta) "
    rf"?\{{?)?(?:[A-Z]{{1,4}}'*|{_SYMBOL})\}}?{_INDEX}"
)
_LABEL = re.compile(
    rf"(?:\|? ?{_NAME} ?\|?|{_SYMBOL}(?: ?\^ ?\{{ ?-1 ?\}})? "
    rf"?\([^()]*\)|\\frac\{{ ?{_NAME} ?\}}\{{ ?{_NAME} ?\}}|{_NAME} ?/ ?{_NAME}|{_NAME}(?: ?: "
    rf"?{_NAME})+|\\(?:sin|cos|tan|cot|sec|csc) ?{_NAME}|\( ?{_SYMBOL}(?: ?, ?{_SYMBOL})+ ?\)"
    r"|\[ ?[A-Z]{3,6} ?\]|(?:m ?)?\\angle ?[0-9]|\\frac\{ ?d ?[a-z] ?\}\{ ?d ?[a-z] ?\}|(?:the "
    r")?[A-Za-z]{3,}(?: [A-Za-z]+){0,5}) ?"
)
_VARIABLE = re.compile(rf"{_SYMBOL}|{_SYMBOL} ?\( ?{_SYMBOL} ?\)|[A-Z]{{2}}")
_POINT = re.compile(r"([ABD-MO-Z]'?(?:_(?:\w|\{\w\}))?) ?(\((?=[^()]*[0-9])[^()]+[,;][^()]+\))")
_AROUND_SYMBOL = re.compile(r" ?([^\w\s]) ?")
_SET_BUILDER = re.compile(rf"\\\{{ ?({_SYMBOL})(?: ?\\in ?\\mathbb\{{R\}})? ?(?:\||:) ?(.+)\\\}}")


# Without any of these a text is no list.
LIST_SIGNS = (",", ";", "and", "or", "&")


@dataclass(frozen=True, slots=True)
class Bracketed:
    """A pair of brackets around items.

    Attributes:
        opening: `(`, `[` or `\\{`.
        closing: `)`, `]` or `\\}`.
        items: Between the separators.
    """

    opening: str
    closing: str
    items: list[str]

    @property
    def is_set(self) -> bool:
        return self.opening == "\\{"

    @property
    def is_interval(self) -> bool:
        """Whether it can only be an interval: a bound that is infinite, or one open and one
        closed.
        """
        return len(self.items) == 2 and (
            (self.opening, self.closing) != ("(", ")")
            or any("\\infty" in item for item in self.items)
        )

    @property
    def is_list(self) -> bool:
        """Whether it may be compared with a list without brackets."""
        return self.is_set or (not self.is_interval and self.opening != "]")


@dataclass(frozen=True, slots=True)
class Relation:
    """Members with signs between them, such as `a < x \\le b`; a member may be empty at the
    start.
    """

    members: list[str]
    signs: list[str]


def top_level(text: str) -> str:
    """Return the text with everything between brackets replaced by NUL, the brackets themselves
    included.
    """
    pieces: list[str] = []
    depth, position = 0, 0
    for match in _BRACKET.finditer(text):
        token = match[0]
        opens = token in _OPENING or token.startswith("\\begin")
        closes = token in _CLOSING or token.startswith("\\end")
        if not opens and not closes:
            continue
        pieces.append(
            "\0" * (match.start() - position) if depth else text[position : match.start()]
        )
        pieces.append("\0" * len(token))
        depth = depth + 1 if opens else max(depth - 1, 0)
        depth += token.startswith("\\begin")  # once for its brace, once for the environment
        position = match.end()
    pieces.append("\0" * (len(text) - position) if depth else text[position:])
    return "".join(pieces)


def split_items(text: str) -> list[str]:
    """Return the items of a list at its top level: parts between `;` if there are any, else between
    commas, `and` and `or`.
    """
    if not any(sign in text for sign in LIST_SIGNS):
        return [text]
    mask = top_level(text)
    pattern = _SEMICOLON if ";" in mask else _LOOSE_SEPARATOR if ", " in mask else _SEPARATOR
    items = _between(text, list(pattern.finditer(mask)))
    return [item for item in items if item] or [text]


def _between(text: str, matches: list[re.Match[str]]) -> list[str]:
    """Return what is between matches in a text."""
    starts = [0, *(match.end() for match in matches)]
    ends = [*(match.start() for match in matches), len(text)]
    return [text[start:end].strip() for start, end in zip(starts, ends, strict=True)]


def split_union(text: str) -> list[str]:
    """Return the parts of a union."""
    return [part.strip() for part in text.split("\\cup")] if "\\cup" in text else [text]


def read_bracketed(text: str) -> Bracketed | None:
    """Return what is in a pair of brackets that encloses the whole text, `None` if there is
    none.
    """
    french = _FRENCH.fullmatch(text) if text[:1] == "]" or text[-1:] == "[" else None
    if french:
        inside, closing = (french[1], french[2]) if french[1] else (french[4], "[")
        opening = "(" if text[0] == "]" else "["
        return Bracketed(opening, ")" if closing == "[" else "]", split_items(inside.strip()))
    opening = "\\{" if text.startswith("\\{") else text[:1]
    closing = "\\}" if text.endswith("\\}") else text[-1:]
    if (
        opening not in ("(", "[", "\\{")
        or closing not in (")", "]", "\\}")
        or (opening == "\\{") != (closing == "\\}")
    ):
        return None
    if len(text) < len(opening) + len(closing) or not _encloses(text):
        return None
    inside = text[len(opening) : -len(closing)].strip()
    return Bracketed(opening, closing, split_items(inside) if inside else [])


def without_group(text: str) -> str:
    """Return what is in braces, or in round brackets that hold one item, around the whole
    text.
    """
    while True:
        text = text.strip()
        in_braces = text[:1] == "{" and text[-1:] == "}" and not text.endswith("\\}")
        in_parentheses = (
            text[:1] == "("
            and text[-1:] == ")"
            and text[1:-1].strip()
            and len(split_items(text[1:-1])) == 1
        )
        if (in_braces or in_parentheses) and _encloses(text):
            text = text[1:-1]
        else:
            return text


def without_builder(text: str) -> str:
    """Return the condition of `\\{x : condition\\}`, any other text as it is."""
    builder = _SET_BUILDER.fullmatch(text) if text.startswith("\\{") else None
    return builder[2].strip() if builder else text


def named_point(text: str) -> str:
    """Return `P(1,2)` as `P=(1,2)`, any other text as it is."""
    point = _POINT.fullmatch(text)
    return f"{point[1]}={point[2]}" if point else text


def joined_inequalities(text: str) -> str:
    """Return `x > a and x < b` as `a < x < b`, any other text as it is."""
    parts = (
        _AND.split(text) if "<" in text or ">" in text or "\\le" in text or "\\ge" in text else []
    )
    bounds = [as_interval(part.strip()) for part in parts] if len(parts) == 2 else []
    if len(bounds) != 2 or bounds[0] is None or bounds[1] is None or bounds[0][0] != bounds[1][0]:
        return text
    below, above = sorted(
        (bounds[0][1], bounds[1][1]), key=lambda bound: bound.items[0] == "-\\infty"
    )
    if below.items[1] != "\\infty" or above.items[0] != "-\\infty":
        return text
    signs = ["<" if bracket in "()" else "\\le " for bracket in (below.opening, above.closing)]
    return f"{below.items[0]} {signs[0]} {bounds[0][0]} {signs[1]} {above.items[1]}"


def read_relation(text: str) -> Relation | None:
    """Return members and signs, `None` without a sign at the top level."""
    if not any(sign in text for sign in "<>=\\"):
        return None
    signs = list(_RELATION.finditer(top_level(text)))
    return Relation(_between(text, signs), [match[0] for match in signs]) if signs else None


def read_cases(text: str) -> list[str] | None:
    """Return the lines of a system of equations, `None` if the text is anything else."""
    match = _CASES.fullmatch(text)
    if match is None:
        return None
    rows = [" ".join(cell.strip() for cell in row.split("&")) for row in match[1].split("\\\\")]
    return [row.strip().rstrip(",;. ") for row in rows if row.strip()]


def split_label(relation: Relation) -> tuple[str, str] | None:
    """Return a name and the value that an equation gives it, `None` for any other relation.

    Of `x = 5+6 = 11` the value is 11, of `x = 1/3 \\approx 0.33` it is 1/3.
    """
    members, signs = relation.members, relation.signs
    if any(sign not in ("=", "\\approx") for sign in signs) and signs != ["\\in"]:
        return None
    if not members[0]:
        return ("", members[1]) if len(members) == 2 and signs[0] != "\\in" and members[1] else None
    exact = signs.index("\\approx") + 1 if "\\approx" in signs else len(members)
    if not is_label(members[0]):
        if len(members) > 2 and exact == len(members) and is_label(members[-2]):
            return squeeze(members[-2]), members[-1]  # of 1 = x = 0 as well
        return ("", members[0]) if exact == 1 else None
    value = members[1] if exact == 1 else members[exact - 1]
    name = squeeze(members[0])
    return (name.casefold() if len(members[0]) > 4 else name, value) if value else None


def is_label(text: str) -> bool:
    """Return whether a text names a quantity: a symbol, `f(x)`, `AB`, `m\\angle ABC`, a ratio of
    names, a few words.
    """
    return len(text) <= 80 and _LABEL.fullmatch(text) is not None


def as_interval(text: str) -> tuple[str, Bracketed] | None:
    """Return the variable and the interval of an inequality in one variable, `None` for all else;
    `\\le 5` has no variable.
    """
    relation = read_relation(text)
    if relation is None or not 2 <= len(relation.members) <= 3:
        return None
    members, signs = relation.members, relation.signs
    if set(signs) <= {">", "\\ge"}:
        members, signs = members[::-1], ["<" if sign == ">" else "\\le" for sign in signs[::-1]]
    if not set(signs) <= {"<", "\\le"}:
        return None
    if len(members) == 2:
        first, second = (not text or _VARIABLE.fullmatch(text) for text in members)
        if members[1] and first and not (members[0] and second):
            members, signs = ["-\\infty", *members], ["<", *signs]
        else:
            members, signs = [*members, "\\infty"], [*signs, "<"]
    below, variable, above = members
    if (variable and not _VARIABLE.fullmatch(variable)) or not below or not above:
        return None
    opening, closing = "(" if signs[0] == "<" else "[", ")" if signs[1] == "<" else "]"
    return squeeze(variable), Bracketed(opening, closing, [below, above])


def squeeze(text: str) -> str:
    """Drop the spaces that mean nothing; one between two letters or digits stays, for "1 0" is not
    "10".
    """
    return _AROUND_SYMBOL.sub(r"\1", text) if " " in text else text


def _encloses(text: str) -> bool:
    """Return whether the first bracket is closed by the last."""
    depth = 0
    for match in _BRACKET.finditer(text):
        token = match[0]
        if token in _OPENING:
            depth += 1
        elif token in _CLOSING:
            depth -= 1
            if depth <= 0:
                return match.end() == len(text)
        elif token.startswith("\\begin"):
            depth += 2
        elif token.startswith("\\end"):
            depth -= 1
    return False
