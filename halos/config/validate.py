"""Validate a composed configuration as a whole before anything loads; every message names the key, the value and the remedy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    InterpolationResolutionError,
    MissingMandatoryValue,
    OmegaConfBaseException,
    ValidationError,
)

from halos.config import renamed_keys
from halos.config.bind_optim import bind_optimizer, bind_schedule, fit_shared
from halos.config.cross_checks import check_combinations, check_loss_traits
from halos.config.custom_formats import custom_formats, load_format, load_reader
from halos.config.legacy_sections import with_target
from halos.config.mixture_parts import completed, is_mixture
from halos.config.overrides import typed_keys
from halos.config.paths import check_paths
from halos.config.plugins import make_importable
from halos.config.ranges import check_ranges
from halos.config.schema import Config
from halos.config.secrets import refuse_secrets
from halos.config.suggest import schema_keys, unknown_key
from halos.config.values import describe, show
from halos.errors import UserError

Choices = Mapping[str, Sequence[str]]


def check(composed: DictConfig, overrides: Sequence[str] = (), choices: Choices | None = None) -> Config:
    """Return the configuration as plain dataclasses. Raises UserError.

    `overrides` are those of the command line, unchanged; `choices` the options of each group, for messages. Torch is imported
    last, by the loss, so that most mistakes are reported in well under a second.
    """
    plain = OmegaConf.to_container(composed)  # interpolations unresolved
    refuse_secrets(plain, overrides)
    if renamed_keys.move_sections(composed, overrides):
        plain = OmegaConf.to_container(composed)
    assert isinstance(plain, dict)
    _require_choices(composed, plain, choices or {})
    for key in schema_keys():
        refuse_other_container(key, _value_at(key, plain))
    try:
        merged = OmegaConf.merge(_schema(), composed)
        _refuse_numbers_for_truth(plain)
        resolved = _resolved(merged)
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise UserError(explain(error, composed)) from error
    assert isinstance(config, Config)
    _resolve_targets(config, overrides)
    typed = typed_keys(overrides)
    if "train.epochs" in typed and "train.steps" not in typed:
        config.train.steps = None  # an override wins over the steps that a model or an experiment sets
    refuse_secrets(resolved)
    check_ranges(resolved)
    check_combinations(config, overrides)
    make_importable(config.plugins)
    check_paths(config, choices or {})
    _bind(config, overrides)
    return config


def is_online_run(config: Config) -> bool:
    """Return whether this is an online run in rounds, which trains nothing itself."""
    return config.online is not None and config.online.steps is None


def _resolve_targets(config: Config, overrides: Sequence[str]) -> None:
    """Replace names by targets, those of a mixture's parts too, and convert the shared keys of optimizers to their types."""
    keys = typed_keys(overrides)
    config.optim, config.schedule = (with_target(name, getattr(config, name), keys) for name in ("optim", "schedule"))
    config.optim = fit_shared(config.optim)
    config.loss = completed(config.loss) if is_mixture(config.loss) else config.loss


def _resolved(merged: Any) -> Any:
    """The configuration with its interpolations resolved; where one cannot be, values out of their range are reported first."""
    try:
        return OmegaConf.to_container(merged, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException:
        check_ranges(OmegaConf.to_container(merged))
        raise


@cache
def _schema() -> DictConfig:
    """The schema as OmegaConf has it, which merges copies of it."""
    return OmegaConf.structured(Config)


def _refuse_numbers_for_truth(plain: object) -> None:
    """Raises UserError for a key of true or false with a number other than 1 and 0, which OmegaConf takes as true."""
    for key, kind in schema_keys().items():
        if kind in (bool, bool | None) and type(value := _value_at(key, plain)) is int and value not in (0, 1):
            raise UserError(f"{key} takes {_expected(key)}, not {value}")


def refuse_other_container(key: str, value: Any) -> None:
    """Raises UserError for a list where `key` takes a mapping, and for a mapping where it takes a list."""
    takes_list, takes_mapping = (what in (expected := _expected(key)) for what in ("a list", "a mapping"))
    if isinstance(value, Mapping) and takes_list and not takes_mapping:
        raise UserError(f"{key} takes {expected}, not {show(value)}: write '{key}=[...]', with brackets around its entries")
    if isinstance(value, list) and takes_mapping and not takes_list:
        raise UserError(f"{key} takes {expected}, not {show(value)}: write '{key}={{NAME: VALUE}}'")


def explain(error: OmegaConfBaseException, composed: DictConfig, known: Sequence[str] = ()) -> str:
    """Rewrite an error of OmegaConf as one message: the key, its value, what would work."""
    key = str(error.full_key or error.key or "")
    reason = str(error).partition("\n")[0]
    if isinstance(error, (ConfigKeyError, ConfigAttributeError)):
        return unknown_key(key, known)
    if isinstance(error, MissingMandatoryValue):
        return f"{key} is missing: it takes {_expected(key)}"
    value = _value_at(key, OmegaConf.to_container(composed))
    if isinstance(error, InterpolationResolutionError):
        return f"{key} is {value}, which cannot be resolved: {reason}"
    if isinstance(error, ValidationError):
        remedy = f": write '{key}=[{value}]'" if _expected(key) == "a list" and isinstance(value, str) else ""
        return f"{key} takes {_expected(key)}, not {show(value)}{remedy}"
    return f"{key}: {reason}" if key else reason


def _value_at(key: str, node: Any) -> Any:
    for part in key.replace("[", ".").replace("]", "").split("."):
        if isinstance(node, list):
            node = node[int(part)]
        elif isinstance(node, Mapping):
            node = node.get(part)
    return node


def _expected(key: str) -> str:
    """Describe the values that a key takes; an element of a list or mapping has the type of its container."""
    keys = schema_keys()
    name = key.partition("[")[0]
    while name not in keys and "." in name:
        name = name.rpartition(".")[0]
    if name not in keys:
        return "a value"
    if name == key:
        return describe(keys[name])
    element = getattr(keys[name], "__args__", (Any,))[-1]
    return describe(element)


def _require_choices(composed: DictConfig, plain: Mapping[Any, Any], choices: Choices) -> None:
    """Raises UserError for a required choice that is still null, with the options that it has."""

    def absent(section: str, name: str) -> bool:
        node = plain.get(section)
        return isinstance(node, dict) and node.get(name) is None

    if plain.get("loss") is None:
        raise UserError(f"loss is missing: choose one with loss=, of {_listed(choices, 'loss')}")
    if absent("model", "name_or_path"):
        raise UserError(
            f"model.name_or_path is missing: choose model= of {_listed(choices, 'model', besides='path')};"
            " or model.name_or_path= a directory, a hub id (org/name) or a .gguf file"
        )
    names = f"choose data= of {_listed(choices, 'data', besides='files')}"
    if absent("data", "train"):
        raise UserError(f"data.train is missing: {names}; or 'data.train=[a.jsonl,org/name,dir/]' 'data.eval=[b.jsonl]'")
    if absent("data", "eval") and not absent("data", "eval_fraction"):
        composed.data.eval = []
    elif absent("data", "eval"):
        raise UserError(f"data.eval is missing: {names}; or 'data.eval=[b.jsonl]', or 'data.eval=[]' for no evaluation")
    if plain.get("exp_name") is None:
        raise UserError("exp_name is missing: it names the run directory, for example exp_name=demo")


def _listed(choices: Choices, group: str, besides: str = "") -> str:
    return ", ".join(choice for choice in choices.get(group, ()) if choice != besides) or f"the files in config/{group}"


def _bind(config: Config, overrides: Sequence[str]) -> None:
    """Bind everything that has a `_target_` to its signature. loss=online has none: its inner loss is checked with it."""
    bind_schedule(config.schedule, config.plugins)
    for key, target in custom_formats(config.data).items():
        (load_reader if key.endswith("reader") else load_format)(target, key, config.plugins)
    from halos.config.bind import bind_hook, bind_loss, bind_trainer  # here: it imports torch, and nothing above needs it

    bind_optimizer(config.optim, config.plugins)
    if config.online is not None and config.loss and "_target_" not in config.loss:
        name, value = next(iter(config.loss.items()))
        raise UserError(f"loss.{name} is a key of the loss inside the online run: online.overrides=[loss.{name}={show(value)}]")
    if config.online is None or config.loss:
        loss = bind_loss(config.loss, config.plugins)
        check_loss_traits(config, loss, overrides)
        if config.trainer != {"_target_": None}:
            bind_trainer(config.trainer, loss, config.plugins)
    bind_hook("checkpoint", config.checkpoint, config.plugins)
    for name, settings in config.hooks.items():
        bind_hook(f"hooks.{name}", settings, config.plugins)
