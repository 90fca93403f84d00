"""Reward functions: parsed from their configuration, their kind told by their signature, and loaded."""

from __future__ import annotations

import hashlib
import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import Any

from halos.config.plugins import make_importable
from halos.errors import UserError

OWN = "halos.online.rewards"  # the dotted path that users write and files record
MODULES = {OWN: "halos.rollout.rewards"}  # where the code is
PACKAGES = {"math_verify": "math-verify"}  # import name to pip's name


ONE, GROUP = ("completion", "row"), ("completions", "rows")  # the first parameters of the two kinds
KINDS = "(completion, row, *, ...) for one sample, or (completions, rows, *, ...) for all samples of a prompt, def or async def"


@dataclass(frozen=True, slots=True)
class Part:
    """One reward function of a sum, with its weight and its keys."""

    path: str
    weight: float
    settings: Mapping[str, Any]
    is_grouped: bool = False  # it gets all samples of a prompt, and returns a list
    is_async: bool = False

    def load(self) -> Callable[[Any, Any], Any]:
        function = _function(self.path)
        return lambda completion, row: function(completion, row, **self.settings)


def names_of(paths: Iterable[str]) -> list[str]:
    """The functions' names in scores and metrics; a function may be given twice, with other keys."""
    names = list[str]()
    for path in paths:
        name = path.rpartition(".")[2]
        same = sum(each.partition("~")[0] == name for each in names)
        names.append(f"{name}~{same + 1}" if same else name)
    return names


def parts_of(entries: Sequence[Any], plugins: Sequence[str]) -> list[Part]:
    """Parse `functions`: names in halos.online.rewards, dotted paths, or {function, weight, ...keys}.

    Raises UserError for anything that is no reward function, or is in a package not listed in plugins.
    """
    if not entries:
        raise UserError("online.scorer.functions is []: name one, such as [exact_match]")
    make_importable(plugins)
    return [_part(entry, plugins) for entry in entries]


def _source(function: Callable[..., Any]) -> str:
    """The source of a function; empty where there is none."""
    try:
        return inspect.getsource(function)
    except (OSError, TypeError):
        return ""


def _part(entry: Any, plugins: Sequence[str]) -> Part:
    fields = {"function": entry} if isinstance(entry, str) else entry
    if not isinstance(fields, Mapping) or not isinstance(fields.get("function"), str):
        raise UserError(f"a reward is a name, or {{function: NAME, weight: 1.0, ...}}, not {entry!r}")
    settings = {name: value for name, value in fields.items() if name not in ("function", "weight")}
    path, weight = fields["function"], fields.get("weight", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
        raise UserError(f"{path}: weight={weight!r} is no number")
    path = path if "." in path else f"{OWN}.{path}"
    if not any(path.startswith(f"{package}.") for package in ("halos", *plugins)):
        raise UserError(f"the reward {path} is outside halos: if you trust that package, add plugins=[{path.partition('.')[0]}]")
    module, _, name = path.rpartition(".")
    try:
        imported = _module(module)
    except ImportError as error:
        raise UserError(f"the reward {path} cannot be imported: {error}") from error
    members = vars(imported)
    if not inspect.isfunction(members.get(name)):
        known = [word for word, part in members.items() if inspect.isfunction(part) and part.__module__ == imported.__name__
                 and _first_names(part) in (ONE, GROUP)]  # fmt: skip
        from halos.config.suggest import nearest  # which imports the schema: no worker process needs it

        near = nearest(name, known)
        raise UserError(f"there is no reward {path}{f' (did you mean {near}?)' if near else ''}; {module} has {', '.join(known)}")
    is_grouped, is_async = _kind(path, members[name])
    _check_keys(path, members[name], settings)
    needed = next((package for package in PACKAGES if package in _source(members[name])), None)
    if needed:
        try:
            import_module(needed)
        except ImportError as error:
            raise UserError(f"the reward {path} needs the package {PACKAGES[needed]}: pip install {PACKAGES[needed]}") from error
    return Part(path, float(weight), settings, is_grouped, is_async)


def _kind(path: str, function: Callable[..., Any]) -> tuple[bool, bool]:
    """Whether a function gets all samples of a prompt, and whether it is async. Raises UserError for any other signature."""
    bare = inspect.unwrap(function)
    if inspect.isgeneratorfunction(bare) or inspect.isasyncgenfunction(bare):
        raise UserError(f"{path} is no reward: it yields, and a reward returns its result")
    parameters = list(inspect.signature(function).parameters.values())
    positional = all(each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD) for each in parameters[:2])
    first = _first_names(function)
    if first not in (ONE, GROUP) or not positional or any(each.kind is not each.KEYWORD_ONLY for each in parameters[2:]):
        raise UserError(f"{path} is no reward: its parameters are {inspect.signature(function)}, and those of a reward {KINDS}")
    return first == GROUP, inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(bare)


def _first_names(function: Callable[..., Any]) -> tuple[str, ...]:
    """The names of the first two parameters; an underscore, as of what is not used, does not count."""
    names = [name.strip("_") for name in list(inspect.signature(function).parameters)[:2]]
    if len(names) == 2 and names[1] == "":
        names[1] = {ONE[0]: ONE[1], GROUP[0]: GROUP[1]}.get(names[0], "")
    return tuple(names)


def _check_keys(path: str, function: Callable[..., Any], settings: Mapping[str, Any]) -> None:
    parameters = list(inspect.signature(function).parameters.values())
    keys = {each.name: each for each in parameters[2:]}
    takes = ", ".join(keys) or "no keys"
    if wrong := [name for name in settings if name not in keys]:
        raise UserError(f"{path} takes no {wrong[0]!r}; it takes {takes}")
    if missing := [name for name, each in keys.items() if each.default is each.empty and name not in settings]:
        raise UserError(f"{path} lacks {missing[0]}; it takes {takes}: {{function: {path}, {missing[0]}: ...}}")


def source_hash(path: str) -> str:
    return hashlib.sha256(inspect.getsource(_function(path)).encode()).hexdigest()[:16]


def _function(path: str) -> Callable[..., Any]:
    module, _, name = path.rpartition(".")
    return vars(_module(module))[name]


def _module(name: str) -> ModuleType:
    return import_module(MODULES.get(name, name))
