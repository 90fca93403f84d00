"""Bind the loss and the hooks of a configuration to the signatures of their `_target_`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from halos import types
from halos.config.signature import bind, defaults, first_type, fit_all, import_target, legal_keys, load_target, positional
from halos.errors import UserError
from halos.types import TOKEN_STATISTICS, LossInput, RolloutInput, Sampled, TokenLogps


@dataclass(frozen=True, slots=True)
class LossSpec:
    """A loss with its hyperparameters bound, and what its signature requires of the run."""

    name: str  # last part of its module
    function: Callable[..., Any]  # of an `inputs`[, reference][, statistics]
    inputs: type[LossInput]
    needs_reference: bool
    statistics: Callable[..., Any] | None  # over the global batch, where the loss has a parameter `statistics`
    statistics_inputs: type | None
    examples: Callable[..., Any] | None  # rewrites an example before tokenisation
    example_type: type | None
    settings: dict[str, Any]
    takes_reference: bool = False  # has a parameter `reference`, which is None where the hyperparameters need no reference
    advantages: Callable[..., Any] | None = None  # of a loss on rollouts: computed from a sampled global batch
    adapt: Callable[..., float] | None = None  # returns the KL coefficient for the next global batch
    check_rewards: Callable[..., str | None] | None = None  # of data or of a sampled batch: a complaint, where they do not fit
    ratio_level: str = "token"  # of a loss on rollouts: its ratio pi / pi_old is of a token, or of a whole completion (sequence)

    @property
    def on_rollouts(self) -> bool:
        return issubclass(self.inputs, RolloutInput)

    @property
    def has_own_rows(self) -> bool:
        """Whether code of the user's own makes the rows: it may draw them, or make one of several items."""
        return self.inputs.rows.__module__.partition(".")[0] != "halos"


def bind_loss(settings: Mapping[str, Any], plugins: Sequence[str]) -> LossSpec:
    """Bind the loss of `settings` (the node `loss`). Raises UserError for keys and values that it does not take."""
    function, module = load_target(settings, "loss", plugins, example="halos.losses.dpo.dpo")
    name = module.__name__.rpartition(".")[2]
    arguments = positional(function) if inspect.isfunction(function) else []
    first = first_type(function) if arguments else None
    if not (inspect.isclass(first) and issubclass(first, LossInput)) or not set(arguments[1:]) <= {"reference", "statistics"}:
        kinds = ", ".join(kind.__name__ for kind in input_types())
        raise UserError(
            f"loss._target_: {settings['_target_']} is no loss: a loss is a function of one of {kinds} (or a LossInput of yours),"
            " then optionally `reference` and `statistics`, then keyword-only hyperparameters"
        )
    _check_token_statistics(first)
    statistics = vars(module).get("statistics") if "statistics" in arguments else None
    if "statistics" in arguments and statistics is None:
        raise UserError(f"{name} has a parameter `statistics`, but {module.__name__} has no function of that name")
    examples, check = vars(module).get("examples"), vars(module).get("check")
    advantages, adapt = vars(module).get("advantages"), vars(module).get("adapt")
    needs, level = vars(module).get("needs_reference"), vars(module).get("ratio_level")
    rewards = vars(module).get("check_rewards")
    if issubclass(first, RolloutInput) and advantages is None:
        raise UserError(f"{name} takes {first.__name__}, but {module.__name__} has no function `advantages`")
    functions = [
        each for each in (function, statistics, examples, advantages, adapt, check, needs, level, rewards) if each is not None
    ]
    hyperparameters = fit_all(settings, legal_keys(functions), "loss", name)
    complaint = bind(check, hyperparameters)() if check else None
    if complaint:
        raise UserError(f"loss {name}: {complaint}")
    return LossSpec(
        name=name,
        function=bind(function, hyperparameters),
        inputs=first,
        needs_reference=bind(needs, hyperparameters)() if needs else "reference" in arguments,
        takes_reference="reference" in arguments,
        statistics=bind(statistics, hyperparameters) if statistics else None,
        statistics_inputs=first_type(statistics) if statistics else None,
        examples=bind(examples, hyperparameters) if examples else None,
        example_type=first_type(examples) if examples else None,
        settings=hyperparameters,
        advantages=bind(advantages, hyperparameters) if advantages else None,
        adapt=bind(adapt, hyperparameters) if adapt else None,
        check_rewards=bind(rewards, hyperparameters) if rewards else None,
        ratio_level=bind(level, hyperparameters)() if level else "token",
    )


def input_types() -> list[type[LossInput]]:
    """Those of halos.types. A user's own stand where they are."""
    classes = [each for each in vars(types).values() if inspect.isclass(each) and issubclass(each, LossInput)]
    return [each for each in classes if each not in (LossInput, RolloutInput)]


def _check_token_statistics(inputs: type[LossInput]) -> None:
    """Raises UserError for a statistic that is unknown, or that a model without an LM head cannot have."""
    allowed = () if inputs.head == "score" else TOKEN_STATISTICS
    if unknown := [name for name in inputs.token_statistics if name not in allowed]:
        may = f"it may have {', '.join(allowed)}" if allowed else "a model that gives scores has none"
        raise UserError(f"{inputs.__name__}.token_statistics has {', '.join(unknown)}: {may}")


def refuse_if_not_a_policy_loss(name: str, loss: LossSpec) -> None:
    """Raises UserError where a loss (`name` is online.loss) cannot be trained online: what it trains cannot be sampled from."""
    if loss.inputs.head == "score":
        raise UserError(
            f"online.loss={name}: it trains a reward model, which cannot be sampled from; choose a loss that trains a policy"
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
