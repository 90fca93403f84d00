"""Reward functions: parsed from their configuration, loaded, and called on one sample."""

from __future__ import annotations

import hashlib
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import Any

from halos.config.plugins import make_importable
from halos.config.suggest import nearest
from halos.errors import UserError
from halos.rollout.types import Row, Sample, Score, text_of

OWN = "halos.online.rewards"  # the dotted path that users write and files record
MODULES = {OWN: "halos.rollout.rewards"}  # where the code is
PACKAGES = {"math_verify": "math-verify"}  # import name to pip's name


@dataclass(frozen=True, slots=True)
class Part:
    """One reward function of a weighted sum, with its keys."""

    path: str
    weight: float
    settings: Mapping[str, Any]

    def load(self) -> Callable[[str, Mapping[str, Any]], float]:
        function = _function(self.path)
        return lambda completion, row: function(completion, row, **self.settings)


def parts_of(entries: Sequence[Any], plugins: Sequence[str]) -> list[Part]:
    """Parse `functions`: names in halos.online.rewards, dotted paths, or {function, weight, ...keys}.

    Raises UserError for anything that is no reward function, or is in a package not listed in plugins.
    """
    if not entries:
        raise UserError("online.scorer.functions is []: name one, such as [exact_match]")
    make_importable(plugins)
    return [_part(entry, plugins) for entry in entries]


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
                 and list(inspect.signature(part).parameters)[:2] == ["completion", "row"]]  # fmt: skip
        near = nearest(name, known)
        raise UserError(f"there is no reward {path}{f'; did you mean {near}?' if near else ''}; {module} has {', '.join(known)}")
    _check_keys(path, members[name], settings)
    needed = next((package for package in PACKAGES if package in inspect.getsource(members[name])), None)
    if needed:
        try:
            import_module(needed)
        except ImportError as error:
            raise UserError(f"the reward {path} needs the package {PACKAGES[needed]}: pip install {PACKAGES[needed]}") from error
    return Part(path, float(weight), settings)


def _check_keys(path: str, function: Callable[..., Any], settings: Mapping[str, Any]) -> None:
    parameters = list(inspect.signature(function).parameters.values())
    if len(parameters) < 2 or any(each.kind is not each.KEYWORD_ONLY for each in parameters[2:]):
        raise UserError(f"{path} is no reward: it takes (completion, row, *, ...)")
    keys = {each.name: each for each in parameters[2:]}
    takes = ", ".join(keys) or "no keys"
    if wrong := [name for name in settings if name not in keys]:
        raise UserError(f"{path} takes no {wrong[0]!r}; it takes {takes}")
    if missing := [name for name, each in keys.items() if each.default is each.empty and name not in settings]:
        raise UserError(f"{path} lacks {missing[0]}; it takes {takes}: {{function: {path}, {missing[0]}: ...}}")


class TrackedRow(dict[str, Any]):
    """A sample's row that records which missing columns were read."""

    def __init__(self, row: Mapping[str, Any]) -> None:
        super().__init__(row)
        self.lacking: dict[str, None] = {}

    def __missing__(self, name: str) -> Any:
        self.lacking[name] = None
        raise KeyError(name)

    def get(self, name: str, default: Any = None) -> Any:
        if super().get(name) is None:
            self.lacking[name] = None
        return super().get(name, default)


def row_of(sample: Sample) -> Row:
    """A sample's row as functions see it: without its tokens."""
    return {name: value for name, value in sample.to_row().items() if name not in ("output_ids", "logps")}


def scored_by(functions: Sequence[tuple[Part, Callable[[str, Mapping[str, Any]], float]]], row: Row) -> Score:
    parts, total = {}, 0.0
    for part, function in functions:
        tracked = TrackedRow(row)
        try:
            value = function(text_of(row["output"]), tracked)
        except Exception as error:  # an error in a user's function costs only this sample its score
            return Score(None, f"{part.path} raised {type(error).__name__}: {error}", lacking=tuple(tracked.lacking))
        if not isinstance(value, int | float) or not math.isfinite(value):
            return Score(None, f"{part.path} returned {value!r}, which is no finite number")
        name = part.path.rpartition(".")[2]
        same = sum(each.partition("~")[0] == name for each in parts)  # a function may be given twice, with other keys
        parts[f"{name}~{same + 1}" if same else name] = float(value)
        total += part.weight * float(value)
    return Score(total, parts=parts if len(functions) > 1 else {})


def source_hash(path: str) -> str:
    return hashlib.sha256(inspect.getsource(_function(path)).encode()).hexdigest()[:16]


def _function(path: str) -> Callable[..., Any]:
    module, _, name = path.rpartition(".")
    return vars(_module(module))[name]


def _module(name: str) -> ModuleType:
    return import_module(MODULES.get(name, name))
