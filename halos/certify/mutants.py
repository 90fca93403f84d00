"""Mutants of a loss: its functions with one operator, operand, constant or call changed, and the constants of its module."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from types import CodeType, ModuleType
from typing import Any

PARTS = ("statistics", "advantages", "update", "start")  # functions of a loss's module that take part, besides the loss
OPPOSITE: dict[type[ast.AST], type[Any]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.Pow: ast.Mult, ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd, ast.Gt: ast.Lt, ast.Lt: ast.Gt, ast.GtE: ast.LtE, ast.LtE: ast.GtE, ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.And: ast.Or, ast.Or: ast.And,
}  # fmt: skip
ORDERED = (ast.Sub, ast.Div, ast.Pow)  # whose operands are not exchanged without a change
DROPPED = {"clamp", "detach", "abs", "exp", "log", "square", "sqrt", "relu", "logsigmoid", "sigmoid", "softplus", "expm1",
           "log1p", "tanh", "cumsum", "sort"}  # fmt: skip
EXCHANGED = {"sum": "mean", "mean": "sum", "minimum": "maximum", "maximum": "minimum", "chosen": "rejected", "rejected": "chosen",
             "amin": "amax", "amax": "amin", "min": "max", "max": "min"}  # fmt: skip
SHARED = ("length", "mask", "desirable", "margin")
DENOMINATORS = {"item": "token", "token": "item", "chosen_token": "rejected_token", "rejected_token": "chosen_token"}


@dataclass(frozen=True, slots=True)
class Mutant:
    """`namespace` is the module's, with the functions of the mutant."""

    line: int
    text: str  # before -> after
    namespace: Mapping[str, Any]


def mutants(module: ModuleType, function: str) -> Iterator[Mutant]:
    """Every mutant of `function`, of the module's other functions that take part, and of what these call in the module."""
    body = ast.parse(inspect.getsource(module)).body
    defined = {node.name: node for node in body if isinstance(node, ast.FunctionDef)}
    reached = _reached(defined, [function, *PARTS])
    yield from _constants(module, body, reached)
    for definition in reached:
        policy, others = _first(definition), _compiled(module, [each for each in reached if each is not definition])
        same = _same_in_both(definition)
        for parent, name, index, node in _places(definition):
            for changed in _changes(node, parent, None if id(node) in same else policy):
                shown = (
                    parent if isinstance(parent, ast.expr | ast.keyword) and isinstance(node, ast.Constant | ast.Name) else node
                )
                before = ast.unparse(shown)
                _put(parent, name, index, ast.fix_missing_locations(ast.copy_location(changed, node)))
                after = ast.unparse(changed if shown is node else shown)
                namespace = dict(vars(module))
                for code in (others, _compiled(module, [definition])):
                    exec(code, namespace)
                _put(parent, name, index, node)
                yield Mutant(getattr(node, "lineno", 0), f"{before} -> {after}", namespace)


def _constants(module: ModuleType, body: Sequence[ast.stmt], reached: list[ast.FunctionDef]) -> Iterator[Mutant]:
    """The numbers that the module gives a name, and functions that take part read."""
    read = {node.id for each in reached for node in ast.walk(each) if isinstance(node, ast.Name)}
    for statement in body:
        match statement:
            case ast.Assign(targets=[ast.Name(name)]) | ast.AnnAssign(target=ast.Name(name)) if name in read:
                value = vars(module)[name]
                if isinstance(value, int | float) and not isinstance(value, bool):
                    namespace = {**vars(module), name: value + 1}
                    exec(_compiled(module, reached), namespace)
                    yield Mutant(statement.lineno, f"{name} = {value} -> {name} = {value + 1}", namespace)


def survivors(
    every: Iterable[Mutant], problem: Callable[[Mapping[str, Any], Any], str | None], examples: Sequence[Any]
) -> list[tuple[int, str]]:
    """Line and text of the mutants in which `problem` finds none with any example."""
    alive = []
    for mutant in every:
        try:
            killed = any(problem(mutant.namespace, example) is not None for example in examples)
        except Exception:  # it cannot even be computed
            killed = True
        if not killed:
            alive.append((mutant.line, mutant.text))
    return alive


def _compiled(module: ModuleType, definitions: list[ast.FunctionDef]) -> CodeType:
    return compile(ast.Module(list(definitions), []), str(module.__file__), "exec", dont_inherit=True)


def _same_in_both(definition: ast.FunctionDef) -> set[int]:
    """Names in `policy.chosen.length` and the like, which policy and reference have alike."""
    shared = [node.value for node in ast.walk(definition) if isinstance(node, ast.Attribute) and node.attr in SHARED]
    return {id(node) for value in shared for node in ast.walk(value) if isinstance(node, ast.Name)}


def _reached(defined: Mapping[str, ast.FunctionDef], names: list[str]) -> list[ast.FunctionDef]:
    queue, reached = [name for name in names if name in defined], dict[str, ast.FunctionDef]()
    while queue:
        name = queue.pop()
        if name in reached:
            continue
        reached[name] = deepcopy(defined[name])
        called = {node.id for node in ast.walk(defined[name]) if isinstance(node, ast.Name)}
        queue += [each for each in defined if each in called]
    return list(reached.values())


def _first(definition: ast.FunctionDef) -> tuple[str, str] | None:
    """The names of the first argument and of the reference, where a function has both."""
    names = [argument.arg for argument in definition.args.args]
    return (names[0], "reference") if "reference" in names[1:] else None


def _places(definition: ast.FunctionDef) -> Iterator[tuple[ast.AST, str, int | None, ast.AST]]:
    """Every expression of a function's body with its parent, the parent's field and the index in it; not docstrings, annotations,
    assertions, and the names of metrics."""
    body = definition.body[1:] if ast.get_docstring(definition) is not None else definition.body
    stack: list[ast.AST] = list(reversed(body))
    while stack:
        parent = stack.pop()
        if isinstance(parent, ast.Assert | ast.Raise | ast.JoinedStr):
            continue
        if isinstance(parent, ast.UnaryOp) and _is_last_axis(parent):
            continue
        for name, value in ast.iter_fields(parent):
            if name in ("annotation", "ctx") or (isinstance(parent, ast.Dict) and name == "keys"):
                continue
            for index, child in enumerate(value) if isinstance(value, list) else [(None, value)]:
                if isinstance(child, ast.AST):
                    stack.append(child)
                    if isinstance(child, ast.expr):
                        yield parent, name, index, child


def _put(parent: ast.AST, name: str, index: int | None, node: ast.AST) -> None:
    if index is None:
        setattr(parent, name, node)
    else:
        getattr(parent, name)[index] = node


def _changes(node: ast.AST, parent: ast.AST, policy: tuple[str, str] | None) -> Iterator[ast.expr]:
    """What an expression is replaced by, one at a time."""
    if isinstance(parent, ast.Call) and any(node is argument for argument in parent.args) and _is_last_axis(node):
        return
    match node:
        case ast.BinOp(left, op, right):
            if type(op) in OPPOSITE:
                yield ast.BinOp(left, OPPOSITE[type(op)](), right)
            if isinstance(op, ORDERED) and not _is_squared(parent):
                yield ast.BinOp(right, op, left)
        case ast.UnaryOp(op=ast.USub() | ast.Invert() | ast.Not(), operand=operand):
            yield operand
        case ast.Compare(left, [op], [right]) if type(op) in OPPOSITE:
            yield ast.Compare(left, [OPPOSITE[type(op)]()], [right])
        case ast.BoolOp(op, values):
            yield ast.BoolOp(OPPOSITE[type(op)](), values)
        case ast.IfExp(test, body, orelse):
            yield ast.IfExp(test, orelse, body)
        case ast.Constant(value=bool(value)):
            if not (isinstance(parent, ast.keyword) and parent.arg == "strict"):
                yield ast.Constant(not value)
        case ast.Constant(value=int(value) | float(value)):
            yield ast.Constant(value + 1)
        case ast.Constant(value=str(value)) if isinstance(parent, ast.keyword) and parent.arg == "per" and value in DENOMINATORS:
            yield ast.Constant(DENOMINATORS[value])
        case ast.Name(name) if policy is not None and name in policy and isinstance(parent, ast.Attribute):
            yield ast.Name(policy[1 - policy.index(name)], ast.Load())
        case ast.Attribute(value, name) if name in EXCHANGED and not (
            isinstance(value, ast.Name) and value.id in ("Loss", "Mean")
        ):
            yield ast.Attribute(value, EXCHANGED[name], ast.Load())
        case ast.Call():
            yield from _calls(node)


def _is_last_axis(node: ast.AST) -> bool:
    """-1 as an argument: of tensors (rows, time) another number would be the same axis, or the wrong shape."""
    match node:
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=1)):
            return True
    return False


def _is_named(node: ast.AST, *names: str) -> bool:
    return isinstance(node, ast.Name) and node.id in names


def _is_squared(parent: ast.AST) -> bool:
    """A difference that is squared has no order."""
    match parent:
        case ast.BinOp(op=ast.Pow(), right=ast.Constant(value=2)) | ast.Attribute(attr="square"):
            return True
    return False


def _calls(call: ast.Call) -> Iterator[ast.expr]:
    match call.func, call.args:
        case ast.Attribute(value, "no_grad"), []:
            yield ast.Call(ast.Attribute(value, "enable_grad", ast.Load()), [], [])
        case ast.Attribute(value, name), _ if name in DROPPED and not _is_named(value, "torch"):
            yield value
        case ((ast.Attribute(attr=name) | ast.Name(id=name)), [argument]) if name in DROPPED:
            yield argument
        case ((ast.Attribute(attr="where") | ast.Name(id="where")), [test, one, other]):
            yield ast.Call(call.func, [test, other, one], call.keywords)
