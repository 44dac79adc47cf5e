"""Equality of two expressions by algebra: math-verify's parser reads them, values at points decide.

math-verify's own comparison rounds: at any fixed number of decimals e^-40 is e^-41. Here
expressions are evaluated to many significant digits, at points for their symbols, and the
difference is held against their size. Runs in the killable worker only.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import sympy
from latex2sympy2_extended import latex2sympy
from latex2sympy2_extended.latex2sympy2 import ConversionConfig
from sympy.core.evalf import PrecisionExhausted
from sympy.core.function import AppliedUndef

MAX_EXPRESSION_CHARS = 600
DIGITS = 40
MAX_DIGITS = 1000
# Of the digits that are evaluated, some are lost to cancellation.
TOLERANCE = sympy.Float(10) ** -(DIGITS - 10)
NUM_POINTS = 6
# Primes over primes: no two symbols share a value, and no relation of small integers holds among
# them.
_PRIMES = ((97, 71), (-53, 89), (61, 83), (-113, 37), (43, 31), (-29, 109), (67, 101), (-127, 59))
POINTS = tuple(sympy.Rational(*pair) for pair in _PRIMES)

# What the parser would read as something else: it drops subscripts of numbers, transposition, text
# and what it takes for separators.
_REFUSED = re.compile(
    r"\\ldots|[0-9] +[0-9]|[0-9]_|\\(?:pmod|bmod|equiv|text)|\\(?:pm|mp)(?![a-zA-Z])|[?:;\"]|!="
    r"|\^ ?\{? ?(?:T|\\top|\\dagger|\\circ)(?![a-zA-Z])"
    # Dates, ranges and names with a number.
    r"|^[0-9]+(?:(?: ?- ?[0-9]+){2,}|(?: ?/ ?[0-9]+){2,})$|^0[0-9]+ ?/ ?[0-9]+$"
    r"|^[0-9]+ ?/ ?0[0-9]+$"
    r"|\.[0-9]+\.|(?<![\\A-Za-z_^])[A-Za-z][0-9]"
    # An inverse or an iterate of a function.
    r"|(?<![\\A-Za-z])[fghFGH] ?\^ ?(?:[0-9]|\{[^{}]*\}) ?\("
    r"|\\(?:nabla|partial)|\\frac ?\{ ?d ?[A-Za-z]+ ?\} ?\{ ?d ?[A-Za-z] ?\}"
    # Products of vectors and of matrices have an order.
    r"|(?<![\\A-Za-z])[A-Za-z] ?\\times ?[A-Za-z](?![A-Za-z])|\\(?:vec|overrightarrow) "
    r"?\{?[A-Za-z]+\}? ?\\times|(?:[A-Z] ?[A-Z]\)?|[A-Z]) ?\^ ?\{ ?-1 ?\} ?[A-Z]|[A-Z] ?[A-Z]\)? "
    r"?\^ ?\{ ?-1"
)
_RANGE = re.compile(r"\+?([0-9]+) ?- ?([0-9]+)")
# Where all symbols are such, they may be matrices, whose products have an order.
_MATRICES = frozenset("ABCDMNPQSTUVXY")
_FUNCTIONS = (
    "arcsin|arccos|arctan|sinh|cosh|tanh|sqrt|sin|cos|tan|cot|sec|csc|log|exp|ln|max|min|gcd|lcm"
)
_BARE_FUNCTION = re.compile(rf"(?<![\\A-Za-z])({_FUNCTIONS})(?![A-Za-z])")
_BARE_ROOT = re.compile(r"\\sqrt ?\(([^()]*)\)")
_INDEX_BEFORE_DIGIT = re.compile(r"(?<=[_^])([0-9A-Za-z])(?= [0-9])")
_WITHOUT = re.compile(r"(\\mathbb\{[A-Z]\}) ?- ?\\\{")
_PRIME = re.compile(r"([A-Za-z])('+)")
_EXPONENT_IN_PARENTHESES = re.compile(r"\^ ?\(([^()]*)\)")
_CONVERSION = ConversionConfig(lowercase_symbols=False)


class NotReadError(ValueError):
    """A text is no expression that can be compared."""


def is_equal_expression(parsed: str, gold: str) -> bool:
    """Return whether two normalised expressions, relations, sets or matrices are equal for certain;
    what cannot be read is not.
    """
    parsed, gold = _INDEX_BEFORE_DIGIT.sub(r"{\1}", parsed), _INDEX_BEFORE_DIGIT.sub(r"{\1}", gold)
    if (
        _REFUSED.search(parsed)
        or _REFUSED.search(gold)
        or _is_range(parsed)
        or _is_range(gold)
        or max(len(parsed), len(gold)) > MAX_EXPRESSION_CHARS
    ):
        return False
    try:
        left, right = _read(parsed), _read(gold)
        return _equal(left, right)
    except NotReadError:
        return False
    except TypeError:
        return False  # of kinds that have no difference, such as a matrix and a number


def _is_range(text: str) -> bool:
    """Return whether a text reads like a range or a telephone number: `5-6`, `12-15`."""
    match = _RANGE.fullmatch(text)
    return match is not None and (
        len(match[1]) > 1 or len(match[2]) > 1 or int(match[1]) < int(match[2])
    )


def _read(text: str) -> Any:
    """Return a text as SymPy's object, decimals exact.

    Raises:
        NotReadError: The parser refuses it.
    """
    text = _WITHOUT.sub(r"\1 \\setminus \\{", text)
    text = _PRIME.sub(lambda match: f"{match[1]}_{{{'p' * len(match[2])}rime}}", text)
    if "'" in text:
        raise NotReadError("a prime that belongs to no symbol")
    text = _BARE_ROOT.sub(r"\\sqrt{\1}", _BARE_FUNCTION.sub(r"\\\1", text))
    text = _EXPONENT_IN_PARENTHESES.sub(r"^{\1}", text)
    try:
        read = latex2sympy(
            text,
            is_real=True,
            convert_degrees=False,
            normalization_config=None,
            conversion_config=_CONVERSION,
        )
    except Exception as error:  # the parser raises whatever comes to it
        raise NotReadError(str(error)[:200]) from error
    return _exact(read)


def _exact(read: Any) -> Any:
    """Return an expression with its floats as the decimals that were written, and `i` as the
    imaginary unit.
    """
    if isinstance(read, sympy.MatrixBase):
        return read.applyfunc(_exact)
    if isinstance(read, sympy.Eq) and isinstance(read.rhs, sympy.Set):
        return _exact(read.rhs)
    if not isinstance(read, sympy.Basic):
        raise NotReadError(f"not an expression, got {type(read).__name__}")
    values: dict[Any, Any] = {
        number: sympy.Rational(str(number)) for number in read.atoms(sympy.Float)
    }
    values |= {symbol: sympy.I for symbol in read.free_symbols if symbol.name == "i"}
    read = read.xreplace(values) if values else read
    # An unknown function has no values; `f(x)` then is a name.
    names = {applied: sympy.Symbol(str(applied), real=True) for applied in read.atoms(AppliedUndef)}
    return read.xreplace(names) if names else read


def _equal(left: Any, right: Any) -> bool:
    if isinstance(left, sympy.MatrixBase) or isinstance(right, sympy.MatrixBase):
        return _equal_matrices(left, right)
    if isinstance(left, sympy.Set) or isinstance(right, sympy.Set):
        return _equal_sets(left, right)
    if _is_relation(left) or _is_relation(right):
        return _equal_relations(left, right)
    if isinstance(left, sympy.Expr) and isinstance(right, sympy.Expr):
        return _equal_values(left, right)
    return bool(left == right)


def _equal_values(left: Any, right: Any) -> bool:
    """Compare expressions by their values; where those are unavailable, by simplification."""
    left, right = _done(left), _done(right)
    if left == right:
        return True
    if left.is_infinite or right.is_infinite or left is sympy.nan or right is sympy.nan:
        return False
    if _differ_as_matrices(left, right):
        return False
    left, right = _with_complex_z(left, right)
    real, complex_ = 0, 0
    for values in _values(left, right):
        if not _close(*values):
            if all(_is_real(value) for value in values):
                return False
            complex_ = -1
        elif all(_is_real(value) for value in values):
            real += 1
        elif complex_ >= 0:
            complex_ += 1
    # Where roots and logarithms are real decides; elsewhere they have branches that an answer does
    # not speak of.
    if real or complex_ > 0:
        return not _differ_slightly(left, right)
    if complex_:
        return False
    return bool(sympy.simplify(left - right) == 0)


def _differ_as_matrices(left: Any, right: Any) -> bool:
    """Return whether expressions in names of matrices alone differ where products have an order."""
    symbols = left.free_symbols | right.free_symbols
    has_sum = left.has(sympy.Add) or right.has(sympy.Add)
    if len(symbols) < 2 or not has_sum or not {each.name for each in symbols} <= _MATRICES:
        return False
    matrices = {symbol: sympy.Symbol(symbol.name, commutative=False) for symbol in symbols}
    difference = left.xreplace(matrices) - right.xreplace(matrices)
    return bool(sympy.expand(difference) != 0 and not difference.has(sympy.Function))


def _with_complex_z(left: Any, right: Any) -> tuple[Any, Any]:
    """Return expressions with `z` as a complex number where its absolute value is asked for and it
    is no coordinate.
    """
    names = {symbol.name: symbol for symbol in left.free_symbols | right.free_symbols}
    z = names.get("z")
    if z is None or names.keys() & {"x", "y"} or not (left.has(sympy.Abs) or right.has(sympy.Abs)):
        return left, right
    value = z * (1 + sympy.I / 3)
    return left.xreplace({z: value}), right.xreplace({z: value})


def _equal_relations(left: Any, right: Any) -> bool:
    """Compare equations and inequalities: the same up to a factor, or true of the same numbers."""
    if isinstance(left, sympy.core.relational.Relational) and isinstance(
        right, sympy.core.relational.Relational
    ):
        (left_kind, left_side), (right_kind, right_side) = _one_side(left), _one_side(right)
        if left_kind != right_kind or not left_side.free_symbols or not right_side.free_symbols:
            return False
        ratios = [a / b for a, b in _values(left_side, right_side) if a != 0 and b != 0]
        if len(ratios) >= 2 and all(_close(ratio, ratios[0]) for ratio in ratios):
            return left_kind in (sympy.Eq, sympy.Ne) or bool(ratios[0].is_real and ratios[0] > 0)
    if (
        len(left.free_symbols) != 1
        or left.free_symbols != right.free_symbols
        or isinstance(left, sympy.Eq)
    ):
        return False
    return _equal_sets(left, right)


def _equal_sets(left: Any, right: Any) -> bool:
    try:
        sets = [_as_set(side) for side in (left, right)]
        return bool(sets[0] == sets[1] or sets[0].symmetric_difference(sets[1]).is_empty)
    except (NotImplementedError, TypeError, ValueError, AttributeError):
        return False  # SymPy cannot decide, so they are not the same for certain


def _as_set(side: Any) -> Any:
    if isinstance(side, sympy.Set):
        return sympy.FiniteSet(*side.args) if isinstance(side, sympy.FiniteSet) else side
    if not _is_relation(side):
        raise TypeError("neither a set nor a relation")
    return (sympy.And(*side.args) if isinstance(side, sympy.And) else side).as_set()


def _equal_matrices(left: Any, right: Any) -> bool:
    matrices = [side.doit() if isinstance(side, sympy.Basic) else side for side in (left, right)]
    if (
        not all(isinstance(side, sympy.MatrixBase) for side in matrices)
        or matrices[0].shape != matrices[1].shape
    ):
        return False
    return all(_equal(a, b) for a, b in zip(matrices[0].flat(), matrices[1].flat(), strict=True))


def _is_relation(read: Any) -> bool:
    return isinstance(read, sympy.core.relational.Relational | sympy.And)


def _one_side(relation: Any) -> tuple[Any, Any]:
    """Return a relation as its kind and an expression that is 0, not 0, above 0 or not below 0."""
    if isinstance(relation, sympy.Eq | sympy.Ne):
        return (sympy.Eq if isinstance(relation, sympy.Eq) else sympy.Ne), _done(
            relation.lhs - relation.rhs
        )
    strict = isinstance(relation, sympy.StrictGreaterThan | sympy.StrictLessThan)
    return (sympy.StrictGreaterThan if strict else sympy.GreaterThan), _done(
        relation.gts - relation.lts
    )


def _done(expression: Any) -> Any:
    """Return an expression with its sums, integrals, limits and derivatives carried out."""
    open_kinds = (
        sympy.Sum,
        sympy.Product,
        sympy.Integral,
        sympy.Limit,
        sympy.Derivative,
        sympy.UnevaluatedExpr,
    )
    return expression.doit() if expression.has(*open_kinds) else expression


def _values(*expressions: Any) -> Iterator[tuple[Any, ...]]:
    """Yield the values of the expressions at points where all have one."""
    symbols = sorted(
        set().union(*(each.free_symbols for each in expressions)), key=lambda symbol: symbol.name
    )
    for point in range(NUM_POINTS if symbols else 1):
        chosen = {
            symbol: POINTS[(index + point) % len(POINTS)] for index, symbol in enumerate(symbols)
        }
        if point % 2 == 0:  # roots and logarithms have real values there
            chosen = {symbol: abs(value) for symbol, value in chosen.items()}
        values = tuple(_value(each.xreplace(chosen)) for each in expressions)
        if None not in values:
            yield values


def _value(expression: Any) -> Any:
    """Return the value to `DIGITS` digits, `None` without one or where 0 cannot be ruled out."""
    try:
        value = expression.evalf(DIGITS, maxn=MAX_DIGITS, strict=True)
    except (
        PrecisionExhausted,
        ArithmeticError,
        ValueError,
        TypeError,
        AttributeError,
        NotImplementedError,
    ):
        return None
    parts = value.as_real_imag() if isinstance(value, sympy.Expr) else ()
    return value if parts and all(part.is_Float or part.is_Rational for part in parts) else None


def _differ_slightly(left: Any, right: Any) -> bool:
    """Return whether two expressions whose values agree to many digits differ all the same, such as
    e^100 and e^100 + 1.
    """
    symbols = sorted((left - right).free_symbols, key=lambda symbol: symbol.name)
    chosen = {symbol: abs(POINTS[index % len(POINTS)]) for index, symbol in enumerate(symbols)}
    try:
        return bool((left - right).xreplace(chosen).evalf(5, maxn=MAX_DIGITS, strict=True) != 0)
    except PrecisionExhausted:
        return False  # 0 as far as the digits show


def _is_real(value: Any) -> bool:
    real, imaginary = value.as_real_imag()
    return bool(abs(imaginary) <= TOLERANCE * abs(real))


def _close(left: Any, right: Any) -> bool:
    return bool(abs(left - right) <= TOLERANCE * max(abs(left), abs(right)))
