"""Conditions on a row's columns, `score_ratio >= 2 and lang == 'en'`: a part of Python's expressions, never run as Python."""

import ast
import operator
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from halos.data.numbers import exact
from halos.errors import UserError

Value = Callable[[Mapping[str, Any]], Any]  # of an expression, from the columns of a row

_ORDER: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt, ast.GtE: operator.ge,
}  # fmt: skip
_ARITHMETIC: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
}  # fmt: skip
_TRUE_OR_FALSE = {"true": True, "false": False}
TAKES = (
    "it takes columns (one whose name is no word as column('chosen-rating')), parts of them (meta['lang']), numbers, text in"
    " quotes, lists, and, or, not, ==, !=, <, <=, >, >=, in, not in, is None, is not None, + - * /, len() and lower()"
)


class _Mismatch(Exception):
    """Values that an expression cannot take."""


class RowFilter:
    """A condition, and the columns that it reads. Raises UserError for text that is none."""

    def __init__(self, text: str) -> None:
        self._text, self.columns = text, dict[str, None]()
        try:
            self._value = self._parsed(ast.parse(text.strip(), mode="eval").body)
        except (SyntaxError, ValueError, RecursionError) as error:
            raise UserError(f"filter={text!r} is not understood; {TAKES}") from error

    def holds(self, columns: Mapping[str, Any], where: str) -> bool:
        """Raises UserError, naming the row, for values that cannot be compared. A column that the row lacks is None."""
        try:
            return _truth(self._value(columns))
        except _Mismatch as error:
            raise UserError(f"{where}: filter={self._text!r}: {error}") from error
        except ZeroDivisionError as error:
            raise UserError(f"{where}: filter={self._text!r}: divides by zero") from error
        except OverflowError as error:
            raise UserError(f"{where}: filter={self._text!r}: its numbers are too large") from error

    def _parsed(self, node: ast.expr) -> Value:
        match node:
            case ast.Constant(value) if value is None or isinstance(value, str | int | float):
                return lambda columns: value
            case ast.Name(name) | ast.Call(ast.Name("column"), [ast.Constant(str(name))], []):
                self.columns[name] = None
                return lambda columns: columns.get(name)
            case ast.Subscript(of, part) if isinstance(key := ast.literal_eval(part), str | int):  # raises ValueError for others
                whole = self._parsed(of)
                return lambda columns: _part(whole(columns), key)
            case ast.List(elements) | ast.Tuple(elements) | ast.Set(elements):
                values = [self._parsed(element) for element in elements]
                return lambda columns: [value(columns) for value in values]
            case ast.BoolOp(op, operands):
                parts = [self._parsed(operand) for operand in operands]
                every = all if isinstance(op, ast.And) else any
                return lambda columns: every(_truth(part(columns)) for part in parts)
            case ast.UnaryOp(ast.Not(), operand):
                negated = self._parsed(operand)
                return lambda columns: not _truth(negated(columns))
            case ast.UnaryOp(ast.USub(), operand):
                positive = self._parsed(operand)
                return lambda columns: -_number(positive(columns))
            case ast.BinOp(left, op, right) if type(op) in _ARITHMETIC:
                function, one, other = _ARITHMETIC[type(op)], self._parsed(left), self._parsed(right)
                return lambda columns: function(_number(one(columns)), _number(other(columns)))
            case ast.Call(ast.Name("len" | "lower" as name), [argument], []):
                of = self._parsed(argument)
                return (lambda columns: _length(of(columns))) if name == "len" else (lambda columns: _lower(of(columns)))
            case ast.Compare(left, ops, rights):
                return self._comparison([left, *rights], ops)
        raise ValueError

    def _comparison(self, nodes: Sequence[ast.expr], ops: Sequence[ast.cmpop]) -> Value:
        for op, right in zip(ops, nodes[1:], strict=True):
            if isinstance(op, ast.Is | ast.IsNot) and not (isinstance(right, ast.Constant) and right.value is None):
                raise ValueError
        values = [self._parsed(node) for node in nodes]
        texts = [isinstance(node, ast.Constant) and isinstance(node.value, str) for node in nodes]
        quoted = [one or other for one, other in pairwise(texts)]

        def holds(columns: Mapping[str, Any]) -> bool:
            found = [value(columns) for value in values]
            return all(_compare(*each) for each in zip(ops, found, found[1:], quoted, strict=False))

        return holds


def _compare(op: ast.cmpop, one: Any, other: Any, quoted: bool) -> bool:
    """Compare two values, one of which is text in quotes where `quoted`: else text that is a number is one."""
    match op:
        case ast.Is() | ast.IsNot():
            return (one is None) == isinstance(op, ast.Is)
        case ast.Eq() | ast.NotEq():
            return _equal(one, other) == isinstance(op, ast.Eq)
        case ast.In() | ast.NotIn():
            return _contains(other, one) == isinstance(op, ast.In)
    if isinstance(one, str) and isinstance(other, str) and (quoted or exact(one) is None or exact(other) is None):
        return _ORDER[type(op)](one, other)
    return _ORDER[type(op)](_number(one), _number(other))


def _equal(one: Any, other: Any) -> bool:
    """Compare two values; text, of csv files say, with a number or with true and false by what it says."""
    for text, value in ((one, other), (other, one)):
        if isinstance(text, str) and isinstance(value, bool):
            return _TRUE_OR_FALSE.get(text.strip().lower()) is value
        if isinstance(text, str) and isinstance(value, int | float):
            return exact(text) == value
    return one == other


def _contains(whole: Any, part: Any) -> bool:
    if isinstance(whole, str) and isinstance(part, str):
        return part in whole
    if isinstance(whole, list):
        return any(_equal(each, part) for each in whole)
    raise _Mismatch(f"{_shown(part)} is looked for in {_shown(whole)}, which is neither a list nor text")


def _part(whole: Any, key: str | int) -> Any:
    if isinstance(whole, Mapping):
        return whole.get(key)
    if isinstance(whole, list) and isinstance(key, int):
        return whole[key] if -len(whole) <= key < len(whole) else None
    if whole is None:
        return None
    raise _Mismatch(f"{_shown(whole)} has no part [{key!r}]")


def _number(value: Any) -> int | float:
    number = exact(value)
    if number is None:
        hint = "; write `column is not None and ...`" if value is None else ""
        raise _Mismatch(f"{_shown(value)} is no number{hint}")
    return number


def _length(value: Any) -> int:
    if not isinstance(value, str | list | Mapping):
        raise _Mismatch(f"len() of {_shown(value)}{'; write `column is not None and ...`' if value is None else ''}")
    return len(value)


def _lower(value: Any) -> str | None:
    if value is not None and not isinstance(value, str):
        raise _Mismatch(f"lower() of {_shown(value)}, which is no text")
    return None if value is None else value.lower()


def _truth(value: Any) -> bool:
    known = _TRUE_OR_FALSE.get(value.strip().lower()) if isinstance(value, str) else value
    if not isinstance(known, bool):
        raise _Mismatch(f"{_shown(value)} is neither true nor false")
    return known


def _shown(value: Any) -> str:
    return "null" if value is None else repr(value)[:60]
