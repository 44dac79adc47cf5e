r"""One spelling for what is written in many ways: Unicode and LaTeX notation, without touching
structure.

Row breaks, brackets, scripts and separators keep their meaning: `\\ ` is never read as `\ `, nor
`x¹²` as `x12`.
"""

from __future__ import annotations

import re
import unicodedata

from zppo_mm.rewards.units import AMBIGUOUS, UPRIGHT

_SUPERSCRIPTS, _SUBSCRIPTS = "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿⁱ", "₀₁₂₃₄₅₆₇₈₉₊₋₍₎ₙₓₐₑₖₘₜᵢ"
_PLAIN = str.maketrans(_SUPERSCRIPTS + _SUBSCRIPTS, "0123456789+-()ni0123456789+-()nxaekmti")
_RAISED = re.compile(f"[{_SUPERSCRIPTS}]+")
_LOWERED = re.compile(f"[{_SUBSCRIPTS}]+")
_DIGIT = re.compile(r"(?![0-9])\d")  # of any script
_VULGAR = re.compile(r"[¼-¾⅐-⅞↉]")
_GREEK = (
    "αalpha βbeta γgamma δdelta εvarepsilon ϵepsilon ζzeta ηeta θtheta ϑvartheta κkappa λlambda "
    "μmu µmu νnu ξxi πpi ρrho σsigma τtau φvarphi ϕphi χchi ψpsi ωomega ΓGamma ΔDelta ∆Delta "
    "ΘTheta ΛLambda ΞXi ΠPi ΣSigma ΦPhi ΨPsi ΩOmega \u2126Omega"
)
_OPERATORS = (
    "×times ·cdot ⋅cdot ∙cdot •cdot ±pm ∓mp ≤le ⩽le ≦le ≥ge ⩾ge ≧ge ≠ne ≈approx ≅cong ≡equiv ∼sim "
    "∞infty ∪cup ∩cap ∈in ∉notin ⊂subset ⊆subseteq ∅emptyset ⌀emptyset ∖setminus ∠angle ∡angle "
    "△triangle ∥parallel ⊥perp →to ⇒Rightarrow ∧land ∨lor ∫int ∑sum ∂partial ⌊lfloor ⌋rfloor "
    "⌈lceil ⌉rceil …ldots ⋯ldots ∘circ √sqrt"
)
# Applied before the compatibility forms of Unicode are taken, which would lose what these
# characters say.
_CHARACTERS = str.maketrans(
    {
        **dict.fromkeys("\u2212\u2013\u2014\u2010\u2011\u2012\ufe63\uff0d", "-"),
        **dict.fromkeys("\u200b\u200c\u200d\u200e\u200f\u2060\ufeff\u00ad", ""),
        **dict.fromkeys("\u00ba\u00b0\u02da", "^\\circ "),
        **dict.fromkeys("‘’ʼ′´", "'"),
        **dict.fromkeys("“”″", '"'),
        **dict.fromkeys("÷⁄∕", "/"),
        **{word[0]: f"\\{word[1:]} " for word in (*_GREEK.split(), *_OPERATORS.split())},
        **{letter: f"\\mathbb{{{plain}}}" for letter, plain in zip("ℝℤℕℚℂ", "RZNQC", strict=True)},
        "℃": "^\\circ C",
        "℉": "^\\circ F",
        **{
            square[0]: square[1:]
            for square in ("㎡m^2", "㎥m^3", "㎢km^2", "㎠cm^2", "㎤cm^3", "、,", "。.", "∣|")
        },
        "∛": "\\sqrt[3] ",
        "∜": "\\sqrt[4] ",
        "⟨": "(",
        "⟩": ")",
    }
)

_DROPPED = (
    "left right middle big Big bigg Bigg bigl bigr Bigl Bigr biggl biggr Biggl Biggr displaystyle "
    "textstyle scriptstyle limits nolimits rm bf it sf tt cal boldsymbol bm hline"
)
_SAME = (
    "dfrac=frac tfrac=frac cfrac=frac tbinom=binom dbinom=binom leq=le leqslant=le geq=ge "
    "geqslant=ge neq=ne varnothing=emptyset dots=ldots cdots=ldots dotsc=ldots dotsb=ldots "
    "infin=infty rightarrow=to longrightarrow=to implies=Rightarrow ohm=Omega vee=lor wedge=land "
    "thickapprox=approx lg=log tg=tan ctg=cot arctg=arctan bar=overline varepsilon=epsilon "
    "varphi=phi vartheta=theta smallsetminus=setminus backslash=setminus measuredangle=angle"
)
_WRITTEN = (
    "lt=< gt=> mid=| vert=| lvert=| rvert=| colon=: lbrace=\\{ rbrace=\\} lbrack=[ rbrack=] "
    "langle=( rangle=) degree=^\\circ textdegree=^\\circ celsius=^\\circ_C percent=% %=% #=# &=& "
    "_=_ cr=\\\\ tabularnewline=\\\\ textmu=\\mu micro=\\mu euro=€ pounds=£"
)
_COMMANDS = {
    **dict.fromkeys(_DROPPED.split(), ""),
    **dict.fromkeys(
        ["quad", "qquad", "space", "enspace", "thinspace", "newline", ",", ";", ":", ">", " "], " "
    ),
    **{name: f"\\{kept} " for name, _, kept in (pair.partition("=") for pair in _SAME.split())},
    **{
        name: written.replace("_", " ") or "_"
        for name, _, written in (pair.partition("=") for pair in _WRITTEN.split())
    },
    "_": "_",
    **{letter: f"\\mathbb{{{letter}}}" for letter in "RZNQ"},
    **{name: f"\\mathbb{{{name[0]}}}" for name in ("Reals", "Complex", "Integers")},
}
_ENVIRONMENT_BREAK = re.compile(r"\\\\(?: *\\\\)*(?: *\[[^\[\]]*\])?")
# In one pass over the tokens, a row break is seen before the space or the comma that follows its
# first backslash.
_LINES = re.compile(r"\\(begin|end) ?\{(?:aligned|align|gathered|gather|split|alignedat)\*?\}")
_TOKEN = re.compile(r"\\\\|\\([a-zA-Z]+) ?|\\(.)|~", re.DOTALL)
_ESCAPED_TWICE = re.compile(r"\\\\(?=[a-zA-Z])")
_WRAPPER = re.compile(
    r"\\(?:text(?:bf|it|rm|sf|tt|normal|md|up)?|math(?:rm|bf|it|sf|tt|normal)|mbox|hbox|fbox|boxed|operatorname\*?|emph|underline|pmb|ang|num"
    r"|boldsymbol|ensuremath) ?\{((?:[^{}\\]|\\.)*)\}"
)
_MATH_PAIR = re.compile(r"(?<![\\$])\$(?![\s$])([^$]*[^\s$\\])\$(?![\d$])")
_MATH_AROUND_WORD = re.compile(r" *\$ *(,|and|or) *\$ *")
_PAIRS = (
    ("$$", "$$"),
    ("$", "$"),
    ("\\(", "\\)"),
    ("\\[", "\\]"),
    ("**", "**"),
    ("__", "__"),
    ("``", "''"),
    ("`", "`"),
    ('"', '"'),
)
_FIRST_OF_PAIRS = frozenset(opening[0] for opening, _ in _PAIRS)
_TIGHT_COMMA = re.compile(r"(?<=[0-9]) *(\{ ?, ?\}|, *\\!) *(?=([0-9]{3})?(?![0-9]{4})([0-9])?)")
_ROOT_WITHOUT_BRACES = re.compile(
    r"\\sqrt *(\[[^\[\]]*\])? *(?:([0-9]+(?:\.[0-9]+)?)|\(([^()]*)\))"
)
_TAKES_ARGUMENTS = re.compile(r"\\(frac|binom|sqrt)(?![a-zA-Z])")
_DEGREE_OF_ROOT = re.compile(r" *\[[^\[\]]*\] *")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_PREAMBLE = re.compile(
    r"\A(?:\\(?:therefore|Rightarrow)(?![A-Za-z]) ?|(?:therefore|thus|hence|so)(?: ?,)? (?=\S))?"
    r"(?:(?:the )?(?:correct |final )?answer(?: is)? ?:? ?(?=\S))?"
    r"(?:(?:(?:about|approximately|approx\.?|roughly|around) |\\approx(?![A-Za-z]) ?)"
    r"(?=[-+$\\.0-9]))?",
    re.IGNORECASE,
)
_COLOUR = re.compile(r"\\(?:textcolor|color|colorbox) ?\{[^{}]*\}")
_UPRIGHT_UNIT = re.compile(
    r"\\(?:text(?:rm|normal)?|mathrm|mbox|hbox|operatorname|unit) ?\{(?: |~|\\[ ,])*"
    r"((?:[^{}\\]*[0-9])?) ?("
    + "|".join(sorted(AMBIGUOUS))
    + r") ?\}(?= *(?:\^ ?\{?-?[0-9]\}?)?[ .$]*(?:$|[,;)\]}]|\\[)\]}]))"
)
_NUMBER_BEFORE = re.compile(r"(?<!_)(?:[0-9]|(?<!\\circ)[})]|\\pi)(?: |~|\\[,;:! ])*$")
_INDEX_BEFORE = re.compile(r"_ ?\{[^{}]*\}(?: |~|\\[,;:! ])*$")
_CHOOSE = re.compile(
    r"\{ ?([^{}]+?) ?\\choose(?![a-z]) ?([^{}]+?) ?\}|^([^{}\\ ]+) ?\\choose ?([^{}\\ ]+)$"
)
_COMBINATION = re.compile(
    r"(?<![A-Za-z\\])C ?_ ?\{?(?P<n>[0-9]+|[nmN])\}? ?\^ ?\{?(?P<k>[0-9]+|[a-z])\}?"
    r"|(?:^|\{ ?\} ?)[_^] ?\{?(?P<n2>[0-9]+)\}? ?C ?_ ?\{?(?P<k2>[0-9]+)\}?"
    r"|(?<![A-Za-z\\])C ?\( ?(?P<n3>[0-9]+) ?, ?(?P<k3>[0-9]+) ?\)"
)
_BARE_NAME = re.compile(r"(?<![A-Za-z\\])(?:(pi)|infinity|infty)(?![A-Za-z])")
_ORDINAL = re.compile(r"([0-9])(?:(?<=1)st|(?<=2)nd|(?<=3)rd|th)(?![A-Za-z])")
# What begins with 0 is no item of a list.
_THOUSANDS_APART = re.compile(
    r"(?<![0-9.,])([1-9][0-9]{0,2}(?:,[0-9]{3})*), (?=0[0-9]{2}(?![0-9.]))"
)
_COMPARED = re.compile(r"([<>!]) ?=")
_SPACES = re.compile(r"  +")
_AFTER_COMMAND = re.compile(r"(\\[a-zA-Z]+) (?![a-zA-Z])")


def normalise(answer: str) -> str:
    """Return an answer in one spelling: no delimiters, layout commands or text wrappers, single
    spaces, LaTeX commands for symbols.
    """
    text = answer.strip()
    if text.isascii() and text.replace(".", "", 1).isdigit() and not text.endswith("."):
        return text
    if not text.isascii():
        text = _from_unicode(text).strip()
    if "\n" in text or "\t" in text or "\r" in text:
        text = " ".join(text.split())
    text = _undelimited(_without_period(text))
    if "{" in text or "\\!" in text:
        text = _TIGHT_COMMA.sub(_tight_comma, text)
    if "\\" in text or "~" in text:
        text = _one_latex(text)
    if "$" in text:
        text = _MATH_PAIR.sub(r"\1", _MATH_AROUND_WORD.sub(r" \1 ", text))
    if "..." in text:
        text = text.replace("...", "\\ldots ")
    if "=" in text:
        text = _COMPARED.sub(
            lambda match: {"<": "\\le ", ">": "\\ge ", "!": "\\ne "}[match[1]], text
        )
    text = _written_out(text.replace("**", "^"))
    if "  " in text:
        text = _SPACES.sub(" ", text)
    text = text.strip()
    text = _PREAMBLE.sub("", text)
    return _undelimited(_without_period(text.strip(" ,;")))


def _written_out(text: str) -> str:
    """Return a text with binomials, π, ∞, ordinals and thousands in their one spelling."""
    if "choose" in text:
        text = _CHOOSE.sub(
            lambda match: f"\\binom{{{match[1] or match[3]}}}{{{match[2] or match[4]}}}", text
        )
    if "C" in text:
        text = _COMBINATION.sub(_binomial, text)
    text = _BARE_NAME.sub(lambda match: "\\pi " if match[1] else "\\infty ", text)
    return _THOUSANDS_APART.sub(r"\1,", _ORDINAL.sub(r"\1", text))


def _binomial(match: re.Match[str]) -> str:
    above = match["n"] or match["n2"] or match["n3"]
    below = match["k"] or match["k2"] or match["k3"]
    if above.isdigit() and below.isdigit() and int(above) < int(below):
        return match[0]
    return f"\\binom{{{above}}}{{{below}}}"


def _upright_unit(match: re.Match[str]) -> str:
    """Mark a letter that is set upright behind a number as a unit."""
    before = match.string[: match.start()]
    if match[1] or (_NUMBER_BEFORE.search(before) and not _INDEX_BEFORE.search(before)):
        return f"{match[1]} {match[2]}{UPRIGHT}"
    return match[0]


def _from_unicode(text: str) -> str:
    text = _VULGAR.sub(lambda match: _vulgar(match[0]), text)
    text = _RAISED.sub(lambda match: f"^{{{match[0].translate(_PLAIN)}}}", text)
    text = _LOWERED.sub(lambda match: f"_{{{match[0].translate(_PLAIN)}}}", text)
    text = _DIGIT.sub(lambda match: str(unicodedata.decimal(match[0])), text)
    has_root = "√" in text
    text = unicodedata.normalize("NFKC", text.translate(_CHARACTERS)).replace("~", " ")
    # Unlike LaTeX's command, the sign takes the whole number that follows it, or what is in
    # parentheses.
    return (
        _ROOT_WITHOUT_BRACES.sub(
            lambda match: f"\\sqrt{match[1] or ''}{{{match[2] or match[3]}}}", text
        )
        if has_root
        else text
    )


def _vulgar(character: str) -> str:
    above, below = unicodedata.normalize("NFKC", character).split("⁄")
    return f"\\frac{{{above}}}{{{below}}}"


def _undelimited(text: str) -> str:
    if text[:1] not in _FIRST_OF_PAIRS:
        return text
    for opening, closing in _PAIRS:
        if (
            len(text) > len(opening) + len(closing)
            and text.startswith(opening)
            and text.endswith(closing)
        ):
            inside = text[len(opening) : -len(closing)]
            if opening not in inside and not inside.endswith("\\"):
                text = _without_period(inside.strip())
    return text


def _one_latex(text: str) -> str:
    if "\\begin" in text:
        text = _LINES.sub(r"\\\1{cases}", text)
        text = _ENVIRONMENT_BREAK.sub(r"\\\\", text)
    elif "\\\\" in text:
        text = _ESCAPED_TWICE.sub(r"\\", text)
    text = (
        text.replace("\\left.", "")
        .replace("\\right.", "")
        .replace("\\!", "")
        .replace("\\not=", "\\ne ")
    )
    text = _UPRIGHT_UNIT.sub(_upright_unit, _COLOUR.sub("", text))
    unwrapped = _WRAPPER.sub(r" \1 ", text)
    while unwrapped != text:
        text, unwrapped = unwrapped, _WRAPPER.sub(r" \1 ", unwrapped)
    text = _TOKEN.sub(_command, text)
    if _TAKES_ARGUMENTS.search(text):
        text = _braced_arguments(text)
    return _AFTER_COMMAND.sub(r"\1", _SPACES.sub(" ", text))


def _tight_comma(match: re.Match[str]) -> str:
    """Read a comma without space behind it: it groups thousands, or in braces marks decimals."""
    return "" if match[2] else "." if match[3] and match[1].startswith("{") else ","


def _command(match: re.Match[str]) -> str:
    token = match[0]
    if token == "~":
        return " "
    replacement = _COMMANDS.get(match[1] or match[2] or "")
    return token if replacement is None else replacement


def _braced_arguments(text: str) -> str:
    r"""Put braces around arguments of one token: `\frac12` is `\frac{1}{2}`."""
    pieces: list[str] = []
    position = 0
    while (match := _TAKES_ARGUMENTS.search(text, position)) is not None:
        pieces.append(text[position : match.end()])
        position = match.end()
        root = _DEGREE_OF_ROOT.match(text, position)
        if match[1] == "sqrt" and root:
            pieces.append(root[0].strip())
            position = root.end()
        for _ in range(2 if match[1] != "sqrt" else 1):
            argument, position = _argument(text, position)
            pieces.append(argument)
    return "".join([*pieces, text[position:]])


def _argument(text: str, position: int) -> tuple[str, int]:
    """Return the argument at a position, in braces, and where it ends; nothing if there is none."""
    start = position
    while text[start : start + 1] == " ":
        start += 1
    if text[start : start + 1].isalnum():
        return f"{{{text[start]}}}", start + 1
    end = closing_brace(text, start)
    return (
        (f"{{{_braced_arguments(text[start + 1 : end])}}}", end + 1)
        if end > start and text[start] == "{"
        else ("", position)
    )


def closing_brace(text: str, start: int) -> int:
    """Return the position of the brace that closes the one at `start`, -1 if there is none."""
    depth = 0
    for match in _BRACE.finditer(text, start):
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if depth <= 0:
            return match.start() if match[0] == "}" else -1
    return -1


def _without_period(text: str) -> str:
    return text[:-1].rstrip() if text.endswith(".") and not text.endswith("..") else text
