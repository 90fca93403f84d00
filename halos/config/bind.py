"""Bind the loss and the hooks of a configuration to the signatures of their `_target_`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import ModuleType
from typing import Any

import torch

from halos import types
from halos.config.loss_spec import LossSpec as LossSpec
from halos.config.mixture import bind_mixture
from halos.config.mixture_parts import is_mixture
from halos.config.signature import bind, defaults, first_type, fit_all, import_target, legal_keys, load_target, positional
from halos.errors import UserError
from halos.reward_kind import RewardKind
from halos.types import TOKEN_STATISTICS, LossInput, RolloutInput, Sampled, TokenLogps

MORE = ("reference", "statistics", "state")  # positional parameters that a loss may have after its first
# functions that a loss's module may have, whose keyword-only parameters are keys of the loss too
OPTIONAL = ("examples", "advantages", "adapt", "check", "needs_reference", "ratio_level", "check_rewards", "adapt_entropy",
            "token_statistics", "candidates")  # fmt: skip
FUNCTIONS = {"statistics": ("statistics",), "state": ("start", "update")}  # of its module that they need


def bind_loss(settings: Mapping[str, Any], plugins: Sequence[str], key: str = "loss") -> LossSpec:
    """Bind the loss of `settings` (the node `key`). Raises UserError for keys and values that it does not take."""
    if is_mixture(settings):
        return bind_mixture(settings, plugins, bind_loss)
    function, module = load_target(settings, key, plugins, example="halos.losses.dpo.dpo")
    name = module.__name__.rpartition(".")[2]
    arguments = positional(function) if inspect.isfunction(function) else []
    first = first_type(function) if arguments else None
    if not (inspect.isclass(first) and issubclass(first, LossInput)) or arguments[1:] != [n for n in MORE if n in arguments]:
        kinds = ", ".join(kind.__name__ for kind in input_types())
        raise UserError(
            f"{key}._target_: {settings['_target_']} is no loss: a loss is a function of one of {kinds} (or a LossInput of"
            " yours), then optionally `reference`, `statistics` and `state`, in this order, then keyword-only hyperparameters"
        )
    _check_token_statistics(first)
    own = _functions_of(module, first, arguments)
    legal = legal_keys([function, *own.values()])
    given = {key: value for each in (*own.values(), function) for key, value in defaults(each).items() if key in legal}
    hyperparameters = fit_all({**given, **settings}, legal, key, name)
    bound = {each: bind(helper, hyperparameters) for each, helper in own.items()}
    if "check" in bound and (complaint := bound["check"]()):
        raise UserError(f"loss {name}: {complaint}")
    return LossSpec(
        name=name,
        function=bind(function, hyperparameters),
        inputs=first,
        needs_reference=bound["needs_reference"]() if "needs_reference" in bound else "reference" in arguments,
        takes_reference="reference" in arguments,
        statistics=bound.get("statistics"),
        statistics_inputs=first_type(own["statistics"]) if "statistics" in own else None,
        examples=bound.get("examples"),
        example_type=first_type(own["examples"]) if "examples" in own else None,
        settings=hyperparameters,
        advantages=bound.get("advantages"),
        adapt=bound.get("adapt"),
        check_rewards=bound.get("check_rewards"),
        start=_numbers(bound["start"](), name) if "start" in bound else None,
        update=bound.get("update"),
        ratio_level=bound["ratio_level"]() if "ratio_level" in bound else "token",
        candidates=bound["candidates"]() if "candidates" in bound else 0,
        adapt_entropy=bound.get("adapt_entropy"),
        token_statistics=(*first.token_statistics, *(bound["token_statistics"]() if "token_statistics" in bound else ())),
    )


def _functions_of(module: ModuleType, inputs: type[LossInput], arguments: Sequence[str]) -> dict[str, Callable[..., Any]]:
    """Return the functions that the module of a loss has beside it, by name. Raises UserError where one is missing that its first
    parameter, or its further `arguments`, ask for."""
    name, own = module.__name__.rpartition(".")[2], vars(module)
    for parameter, needed in FUNCTIONS.items():
        if parameter in arguments and (missing := [each for each in needed if own.get(each) is None]):
            which = "of that name" if missing[0] == parameter else f"`{missing[0]}`"
            raise UserError(f"{name} has a parameter `{parameter}`, but {module.__name__} has no function {which}")
    if issubclass(inputs, RolloutInput) and own.get("advantages") is None:
        raise UserError(f"{name} takes {inputs.__name__}, but {module.__name__} has no function `advantages`")
    asked = [each for parameter, needed in FUNCTIONS.items() if parameter in arguments for each in needed]
    return {each: own[each] for each in (*OPTIONAL, *asked) if own.get(each) is not None}


def _numbers(state: Any, name: str) -> dict[str, float]:
    """Return the initial state of a loss. Raises UserError for what a checkpoint would not keep as it is."""
    if not isinstance(state, Mapping) or not state or not all(isinstance(key, str) for key in state):
        raise UserError(f"start() of the loss {name} returns {state!r}: return a dict of numbers by name")
    if wrong := [key for key, value in state.items() if isinstance(value, bool) or not isinstance(value, int | float)]:
        raise UserError(f"start() of the loss {name} returns {state[wrong[0]]!r} as {wrong[0]}: return a number")
    return {key: float(value) for key, value in state.items()}


def input_types() -> list[type[LossInput]]:
    """Those of halos.types. A user's own stand where they are."""
    classes = [each for each in vars(types).values() if inspect.isclass(each) and issubclass(each, LossInput)]
    return [each for each in classes if each not in (LossInput, RolloutInput)]


def _check_token_statistics(inputs: type[LossInput]) -> None:
    """Raises UserError for a statistic that is unknown, or that a model without an LM head cannot have."""
    allowed = () if RewardKind.of(inputs.head) else TOKEN_STATISTICS
    if unknown := [name for name in inputs.token_statistics if name not in allowed]:
        may = f"it may have {', '.join(allowed)}" if allowed else "a model that gives scores has none"
        raise UserError(f"{inputs.__name__}.token_statistics has {', '.join(unknown)}: {may}")


def refuse_if_not_a_policy_loss(name: str, loss: LossSpec) -> None:
    """Raises UserError where a loss (`name` is online.loss) cannot be trained online: what it trains cannot be sampled from."""
    if loss.reward:
        raise UserError(
            f"online.loss={name}: it trains a reward model, which cannot be sampled from; choose a loss that trains a policy"
        )
    if loss.candidates:
        raise UserError(
            f"online.loss={name}: it learns from what a teacher says of given completions, and samples have no teacher:"
            " give a loss with a KL to its reference"
        )
    if loss.example_type is not None:
        raise UserError(
            f"online.loss={name}: it rewrites the rows that it trains on, so it would not learn from samples; choose another"
        )


def learns_from_single(loss: LossSpec) -> bool:
    """Return whether a loss on rollouts learns from prompts with a single completion, by trying a better and a worse one."""
    assert loss.advantages is not None, "bind_loss requires it of losses on rollouts"
    old = TokenLogps(torch.full((2, 2), -1.0), torch.ones(2, 2, dtype=torch.bool))
    values = torch.zeros(2, 2) if loss.inputs.head == "value" else None
    reference = old.values if loss.needs_reference else None
    sampled = Sampled(torch.tensor([0.0, 1.0], dtype=torch.float64), torch.tensor([0, 1]), old, reference, values)
    controlled = {"kl_coefficient": loss.settings["kl_coefficient"]} if loss.adapt is not None else {}
    advantages = loss.advantages(sampled, **controlled).advantages
    return not bool(torch.isclose(advantages[0], advantages[1], atol=1e-9).all())


def refuse_single_samples(loss: LossSpec, samples: int) -> None:
    """Raises UserError where a loss would compare the only sample of a prompt with others."""
    if samples == 1 and loss.on_rollouts and not learns_from_single(loss):
        raise UserError(
            f"online.samples_per_prompt=1: {loss.name} compares the samples of a prompt, and learns nothing from a single one:"
            " give 2 or more, or a loss for single ones, such as ppo"
        )


def bind_trainer(settings: Mapping[str, Any], loss: LossSpec, plugins: Sequence[str]) -> Callable[..., Any]:
    """Return a function from `Parts` to the trainer: of the class that the loss's input type names, or of the subclass of it that
    `trainer._target_` names. Raises UserError for another class, and for keys and values that it does not take."""
    inputs, target = loss.inputs, settings.get("_target_")
    base, _ = import_target(inputs.trainer, f"{inputs.__name__}.trainer", plugins, example=LossInput.trainer)
    trainer = base if target is None else load_target(settings, "trainer", plugins, example="mypackage.MyTrainer")[0]
    if not inspect.isclass(trainer) or not issubclass(trainer, base):
        raise UserError(
            f"trainer._target_: {target} is no trainer for loss={loss.name}, which takes {inputs.__name__}: derive a class from"
            f" {inputs.trainer}"
        )
    if others := positional(trainer)[1:]:
        raise UserError(
            f"trainer._target_: {target} takes {others[0]}, but the parameters of a trainer are `parts`, and keyword-only ones"
        )
    return partial(trainer, **fit_all({**defaults(trainer), **settings}, legal_keys([trainer]), "trainer", trainer.__name__))


def bind_hook(key: str, settings: Mapping[str, Any], plugins: Sequence[str]) -> Callable[[], Any]:
    """Bind the hook of the node `key` (`checkpoint` or `hooks.<name>`), not yet constructed. Raises UserError for keys and values
    that it does not take."""
    hook, _ = load_target(settings, key, plugins, example="halos.hooks.trackers.TensorBoard")
    base = "halos.hooks.checkpoint.CheckpointHook" if key == "checkpoint" else "halos.hooks.base.Hook"
    if not inspect.isclass(hook) or base not in [f"{parent.__module__}.{parent.__qualname__}" for parent in hook.__mro__]:
        raise UserError(f"{key}._target_: {settings['_target_']} is no hook: derive a class from {base}")
    if not_keywords := positional(hook):
        raise UserError(
            f"{key}._target_: {settings['_target_']} takes {not_keywords[0]}, but a hook's parameters are keyword-only"
        )
    return partial(hook, **fit_all({**defaults(hook), **settings}, legal_keys([hook]), key, hook.__name__))
