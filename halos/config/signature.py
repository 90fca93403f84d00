"""Import the target of a node, and check the node's keys and values against the target's parameters and annotations.

Everything that a user may replace goes through it: losses, hooks, optimizers, schedules, data formats. It does not import torch.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import import_module
from types import ModuleType
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from halos.config.plugins import code_hash
from halos.config.suggest import EXPLANATIONS, nearest, of_losses
from halos.config.values import MisfitError, describe, fit, show
from halos.errors import UserError
from halos.ranges import Range

CHOSEN = ("loss", "optim", "schedule")  # nodes whose choices bring keys, which a custom target may not have


def load_target(settings: Mapping[str, Any], key: str, plugins: Sequence[str], *, example: str) -> tuple[Any, ModuleType]:
    """Import the `_target_` of the node `key`; return it and its module. `example` is a valid target, for messages."""
    if not isinstance(settings, Mapping):
        raise UserError(f"{key} takes a mapping with a _target_ such as {example}, not {show(settings)}")
    return import_target(settings.get("_target_"), f"{key}._target_", plugins, example=example)


def import_target(target: Any, key: str, plugins: Sequence[str], *, example: str) -> tuple[Any, ModuleType]:
    """Import the object at a dotted path; return it and its module. Only halos and packages of `plugins` are ever imported."""
    if not isinstance(target, str) or "." not in target or not all(part.isidentifier() for part in target.split(".")):
        raise UserError(f"{key} takes a dotted path such as {example}, not {show(target)}")
    if not any(target.startswith(f"{package}.") for package in ("halos", *plugins)):
        package = target.partition(".")[0]
        raise UserError(f"{key} is {target}, outside halos: if you trust that package, add plugins=[{package}]")
    module_name, _, name = target.rpartition(".")
    try:
        module = import_module(module_name)
    except ModuleNotFoundError as error:
        if f"{module_name}.".startswith(f"{error.name}."):
            raise UserError(f"{key} is {target}, but there is no module {error.name}") from error
        raise UserError(f"{key}: {target} needs the package {error.name}: pip install {error.name}") from error
    except (ImportError, SyntaxError) as error:
        raise UserError(f"{key} is {target}, but {module_name} cannot be imported: {error}") from error
    if name not in vars(module):
        public = [word for word, part in vars(module).items() if getattr(part, "__module__", None) == module_name]
        raise UserError(f"{key}: {module_name} has no {name!r}; it has {', '.join(sorted(public)) or 'nothing to call'}")
    code_hash(target)  # now that it is imported: an edit from here on is noticed
    return vars(module)[name], module


def positional(function: Callable[..., Any]) -> list[str]:
    parameters = inspect.signature(function).parameters.values()
    return [parameter.name for parameter in parameters if parameter.kind is not inspect.Parameter.KEYWORD_ONLY]


def keywords(function: Callable[..., Any]) -> list[str]:
    parameters = inspect.signature(function).parameters.values()
    return [parameter.name for parameter in parameters if parameter.kind is inspect.Parameter.KEYWORD_ONLY]


def parameters_after(function: Callable[..., Any], excluded: Sequence[str]) -> list[str]:
    """Return the names of a function's parameters except `excluded`."""
    parameters = inspect.signature(function).parameters.values()
    loose = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [parameter.name for parameter in parameters if parameter.kind not in loose and parameter.name not in excluded]


def defaults(function: Callable[..., Any]) -> dict[str, Any]:
    parameters = inspect.signature(function).parameters.values()
    return {parameter.name: parameter.default for parameter in parameters if parameter.default is not parameter.empty}


def required(function: Callable[..., Any]) -> list[str]:
    return [name for name in parameters_after(function, ()) if name not in defaults(function)]


def hints_of(function: Callable[..., Any]) -> dict[str, Any]:
    try:
        return get_type_hints(function.__init__ if inspect.isclass(function) else function, include_extras=True)
    except NameError as error:  # a name that is imported for type checkers alone
        raise UserError(f"{function.__module__}.{function.__qualname__}: an annotation cannot be read: {error}") from error


def first_type(function: Callable[..., Any]) -> Any:
    names = positional(function)
    return hints_of(function).get(names[0]) if names else None


def legal_keys(functions: Sequence[Callable[..., Any]]) -> dict[str, Any]:
    """Return key -> annotation for the keyword-only parameters of all functions; the first that has a key decides."""
    legal: dict[str, Any] = {}
    for function in functions:
        hints = hints_of(function)
        legal |= {name: hints.get(name, Any) for name in keywords(function) if name not in legal}
    return legal


def bind(function: Callable[..., Any], values: Mapping[str, Any], names: Sequence[str] | None = None) -> Callable[..., Any]:
    return partial(function, **{name: values[name] for name in (keywords(function) if names is None else names)})


def fit_all(settings: Mapping[str, Any], legal: Mapping[str, Any], key: str, owner: str) -> dict[str, Any]:
    """Return the values of exactly the `legal` keys, converted to their types and within their ranges. Raises UserError."""
    takes = ", ".join(legal) or "no keys"
    for name in settings:
        if name not in legal and name != "_target_":
            near, last = nearest(str(name), legal), key.partition(".")[0]
            hint = (of_losses(str(name), legal) or EXPLANATIONS.get(str(name))) if last == "loss" else None
            meant = f" ({hint})" if hint else f" (did you mean {near}?)" if near else ""
            # a _target_ override keeps the keys of the choice that it replaces
            left = f"; where the choice brought it, '~{key}.{name}' removes it" if key in CHOSEN else ""
            raise UserError(f"{key}.{name}: {owner} takes no {str(name)!r}; it takes {takes}{meant}{left}")
    for name, annotation in legal.items():
        if name not in settings:
            raise UserError(f"{key}.{name} is missing: {owner} takes {takes}; {name} is {expected(annotation)}")
    return {name: fit_one(settings[name], annotation, f"{key}.{name}") for name, annotation in legal.items()}


def _split(annotation: Any) -> tuple[Any, Range]:
    """Return a key's type and its range, which is unbounded where the annotation has none."""
    if get_origin(annotation) is not Annotated:
        return annotation, Range()
    kind, *notes = get_args(annotation)
    return kind, next((note for note in notes if isinstance(note, Range)), Range())


def expected(annotation: Any) -> str:
    kind, limits = _split(annotation)
    bounds = limits.violated_by(math.nan)  # nan violates all bounds, so that all are named
    return describe(kind).replace("number", f"number ({bounds})") if bounds else describe(kind)


def fit_one(value: Any, annotation: Any, key: str) -> Any:
    kind, limits = _split(annotation)
    try:
        fitted = fit(value, kind)
    except MisfitError as error:
        raise UserError(f"{key} takes {expected(annotation)}, not {show(value)}") from error
    for part in fitted if isinstance(fitted, list | tuple) else [fitted]:
        if isinstance(part, (int, float)) and limits.violated_by(part):
            raise UserError(f"{key} takes {expected(annotation)}, not {show(value)}")
    return fitted
