"""From a YAML node to a callable: the keyword-only parameters of its target are its legal keys, their annotations its values."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from types import ModuleType
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from halos.config.suggest import nearest
from halos.config.values import MisfitError, describe, fit, show
from halos.errors import UserError
from halos.types import INPUTS, LossInput, Range


@dataclass(frozen=True, slots=True)
class LossSpec:
    """A loss with its knobs bound, and what its signature says about the run around it."""

    name: str  # last part of its module
    function: Callable[..., Any]  # takes what `inputs` says[, reference][, statistics]
    inputs: type[LossInput]
    needs_reference: bool
    statistics: Callable[..., Any] | None  # over the global batch, where the loss has a parameter of that name
    statistics_inputs: type | None
    examples: Callable[..., Any] | None  # one example to another, before tokenisation
    example_type: type | None
    settings: dict[str, Any]
    takes_reference: bool = False  # has a parameter of that name, which is None where the knobs need no reference
    advantages: Callable[..., Any] | None = None  # of a loss on rollouts: from a global batch as it was sampled
    adapt: Callable[..., float] | None = None  # the KL coefficient for the next global batch

    @property
    def on_rollouts(self) -> bool:
        return self.inputs.sampled


def bind_loss(settings: Mapping[str, Any], plugins: Sequence[str]) -> LossSpec:
    """The loss that `settings` (the node `loss`) names. Raises UserError for whatever it does not take."""
    function, module = _locate(settings, "loss", plugins)
    name = module.__name__.rpartition(".")[2]
    positional = _positional(function) if inspect.isfunction(function) else []
    first = _first_type(function) if positional else None
    if not (inspect.isclass(first) and issubclass(first, LossInput)) or not set(positional[1:]) <= {"reference", "statistics"}:
        kinds = ", ".join(kind.__name__ for kind in INPUTS)
        raise UserError(
            f"loss._target_: {settings['_target_']} is no loss: a loss is a function of one of {kinds}, then optionally"
            " `reference` and `statistics`, then keyword-only knobs"
        )
    statistics = vars(module).get("statistics") if "statistics" in positional else None
    if "statistics" in positional and statistics is None:
        raise UserError(f"{name} has a parameter `statistics`, but {module.__name__} has no function of that name")
    examples, check = vars(module).get("examples"), vars(module).get("check")
    advantages, adapt = vars(module).get("advantages"), vars(module).get("adapt")
    needs = vars(module).get("needs_reference")
    if first.sampled and advantages is None:
        raise UserError(f"{name} takes {first.__name__}, but {module.__name__} has no function `advantages`")
    functions = [part for part in (function, statistics, examples, advantages, adapt, check, needs) if part is not None]
    knobs = _fit_all(settings, _legal(functions), "loss", name)
    complaint = _bound(check, knobs)() if check else None
    if complaint:
        raise UserError(f"loss {name}: {complaint}")
    return LossSpec(
        name=name,
        function=_bound(function, knobs),
        inputs=first,
        needs_reference=_bound(needs, knobs)() if needs else "reference" in positional,
        takes_reference="reference" in positional,
        statistics=_bound(statistics, knobs) if statistics else None,
        statistics_inputs=_first_type(statistics) if statistics else None,
        examples=_bound(examples, knobs) if examples else None,
        example_type=_first_type(examples) if examples else None,
        settings=knobs,
        advantages=_bound(advantages, knobs) if advantages else None,
        adapt=_bound(adapt, knobs) if adapt else None,
    )


def refuse_no_policy(name: str, loss: LossSpec) -> None:
    """Raises UserError where what a loss trains could not be sampled from and trained again: `name` is online.loss."""
    if loss.inputs.head == "score":
        raise UserError(f"online.loss={name}: it trains a reward model, which says nothing; choose a loss that trains a policy")
    if loss.example_type is not None:
        raise UserError(
            f"online.loss={name}: it rewrites the rows that it trains on, so it does not learn what is sampled; choose another"
        )


def bind_hook(key: str, settings: Mapping[str, Any], plugins: Sequence[str]) -> Callable[[], Any]:
    """Makes the hook that the node `key` (`checkpoint` or `hooks.<name>`) names. Raises UserError for what it does not take."""
    hook, _ = _locate(settings, key, plugins)
    base = "halos.hooks.checkpoint.CheckpointHook" if key == "checkpoint" else "halos.hooks.base.Hook"
    if not inspect.isclass(hook) or base not in [f"{parent.__module__}.{parent.__qualname__}" for parent in hook.__mro__]:
        raise UserError(f"{key}._target_: {settings['_target_']} is no hook: derive a class from {base}")
    if others := _positional(hook):
        raise UserError(f"{key}._target_: {settings['_target_']} takes {others[0]}, but a hook's parameters are keyword-only")
    defaults = {
        name: given.default for name, given in inspect.signature(hook).parameters.items() if given.default is not given.empty
    }
    return partial(hook, **_fit_all({**defaults, **settings}, _legal([hook]), key, hook.__name__))


def _locate(settings: Mapping[str, Any], key: str, plugins: Sequence[str]) -> tuple[Any, ModuleType]:
    """What `_target_` names, and its module. Nothing is imported that is neither ours nor a package the user typed."""
    example = "halos.losses.dpo.dpo" if key == "loss" else "halos.hooks.trackers.TensorBoard"
    if not isinstance(settings, Mapping):
        raise UserError(f"{key} takes a mapping with a _target_ such as {example}, not {show(settings)}")
    target = settings.get("_target_")
    if not isinstance(target, str) or "." not in target or not all(part.isidentifier() for part in target.split(".")):
        raise UserError(f"{key}._target_ takes a dotted path such as {example}, not {show(target)}")
    if not any(target.startswith(f"{package}.") for package in ("halos", *plugins)):
        package = target.partition(".")[0]
        raise UserError(f"{key}._target_ is {target}, outside halos: if you trust that package, type plugins=[{package}]")
    module_name, _, name = target.rpartition(".")
    try:
        module = import_module(module_name)
    except ModuleNotFoundError as error:
        if f"{module_name}.".startswith(f"{error.name}."):
            raise UserError(f"{key}._target_ is {target}, but there is no module {error.name}") from error
        raise UserError(f"{key}: {target} needs the package {error.name}: pip install {error.name}") from error
    except (ImportError, SyntaxError) as error:
        raise UserError(f"{key}._target_ is {target}, but {module_name} cannot be imported: {error}") from error
    if name not in vars(module):
        public = [word for word, part in vars(module).items() if getattr(part, "__module__", None) == module_name]
        raise UserError(f"{key}._target_: {module_name} has no {name!r}; it has {', '.join(sorted(public)) or 'nothing to call'}")
    return vars(module)[name], module


def _positional(function: Callable[..., Any]) -> list[str]:
    parameters = inspect.signature(function).parameters.values()
    return [parameter.name for parameter in parameters if parameter.kind is not inspect.Parameter.KEYWORD_ONLY]


def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    return get_type_hints(function.__init__ if inspect.isclass(function) else function, include_extras=True)


def _first_type(function: Callable[..., Any]) -> Any:
    positional = _positional(function)
    return _hints(function).get(positional[0]) if positional else None


def _names(function: Callable[..., Any]) -> list[str]:
    parameters = inspect.signature(function).parameters.values()
    return [parameter.name for parameter in parameters if parameter.kind is inspect.Parameter.KEYWORD_ONLY]


def _legal(functions: Sequence[Callable[..., Any]]) -> dict[str, Any]:
    """Knob -> annotation, over all functions; the first that names a knob says what it may be."""
    legal: dict[str, Any] = {}
    for function in functions:
        hints = _hints(function)
        legal |= {name: hints.get(name, Any) for name in _names(function) if name not in legal}
    return legal


def _bound(function: Callable[..., Any], knobs: Mapping[str, Any]) -> Callable[..., Any]:
    return partial(function, **{name: knobs[name] for name in _names(function)})


def _fit_all(settings: Mapping[str, Any], legal: Mapping[str, Any], key: str, owner: str) -> dict[str, Any]:
    """The knobs, each of its type and in its range: exactly those that the target names."""
    takes = ", ".join(legal) or "no keys"
    for name in settings:
        if name not in legal and name != "_target_":
            near = nearest(str(name), legal)
            meant = f" (did you mean {near}?)" if near else ""
            # a target that was typed meets the keys that the choice before it came with
            left = f"; where the choice came with it, '~{key}.{name}' leaves it out" if key == "loss" else ""
            raise UserError(f"{key}.{name}: {owner} takes no {str(name)!r}; it takes {takes}{meant}{left}")
    for name, annotation in legal.items():
        if name not in settings:
            raise UserError(f"{key}.{name} is missing: {owner} takes {takes}; {name} is {_wanted(annotation)}")
    return {name: _fit_one(settings[name], annotation, f"{key}.{name}") for name, annotation in legal.items()}


def _split(annotation: Any) -> tuple[Any, Range]:
    """A knob's type, and its range, which is unbounded where none is written."""
    if get_origin(annotation) is not Annotated:
        return annotation, Range()
    kind, *notes = get_args(annotation)
    return kind, next((note for note in notes if isinstance(note, Range)), Range())


def _wanted(annotation: Any) -> str:
    kind, limits = _split(annotation)
    bounds = limits.violated_by(math.nan)  # which lies within no bounds, so that it names them all
    return describe(kind).replace("number", f"number ({bounds})", 1) if bounds else describe(kind)


def _fit_one(value: Any, annotation: Any, key: str) -> Any:
    kind, limits = _split(annotation)
    try:
        fitted = fit(value, kind)
    except MisfitError as error:
        raise UserError(f"{key} takes {_wanted(annotation)}, not {show(value)}") from error
    for part in fitted if isinstance(fitted, list) else [fitted]:
        if isinstance(part, (int, float)) and limits.violated_by(part):
            raise UserError(f"{key} takes {_wanted(annotation)}, not {show(value)}")
    return fitted
