"""Read and write a run's config.yaml: resolved when written, plain values when read, so that it runs no code."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping
from copy import copy, deepcopy
from dataclasses import asdict
from datetime import date
from functools import lru_cache
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from halos import seals
from halos.config import arithmetic_version, legacy_sections, renamed_keys, resume_policy
from halos.config.content_hashes import ContentHashes
from halos.config.schema import Config
from halos.config.suggest import unknown_key
from halos.config.values import as_argument
from halos.confined import parse_yaml, to_yaml
from halos.errors import UserError, first_line_of
from halos.repository import CONFIG

# Keys added later that affect what a step computes, with the value that a run without them had
ADDED_KEYS: dict[tuple[str, str], Any] = {
    ("reference", "adapter"): "off", ("reference", "cache"): "never",
    ("reference", "sync_every"): None, ("reference", "sync_weight"): 1.0,
    ("peft", "target_parameters"): [], ("train", "router_aux_loss"): 0.0,
    ("optim", "loraplus_lr_ratio"): None, ("optim", "lr_by_name"): {}, ("data", "format"): None,
    ("data", "reader"): None, ("data", "columns"): {}, ("data", "filter"): None, ("data", "schemas"): False,
    ("data", "eval_fraction"): None, ("data", "near_duplicates"): None, ("data", "weights"): "rows",
    ("data", "stream"): False, ("data", "stream_block"): 20_000,
    ("data", "lost"): "error", ("data", "system"): "keep", ("data", "chat_template_kwargs"): {},
    ("data", "date"): None,
    ("train", "share_prompts"): False, ("train", "microbatch_tokens"): None, ("train", "compile"): False,
    ("train", "working_weights"): "microbatch",
    ("train", "correction"): "none", ("train", "correction_level"): None, ("train", "correction_cap"): 2.0,
    ("train", "correction_floor"): None,
    ("online", "minibatches"): 1, ("online", "epochs"): 1, ("online", "steps_per_round"): 8,
    ("online", "truncated"): "keep",
    ("online", "eval_samples"): 1, ("online", "eval_temperature"): 0.0, ("online", "pass_reward"): None,
    ("online", "correction"): "none", ("online", "correction_level"): None, ("online", "correction_cap"): 2.0,
    ("online", "correction_floor"): None,
    ("online.scorer", "aggregation"): "sum",
}  # fmt: skip
BUDGET = "microbatch_tokens"  # in an attempt's record: what `auto` meant
CHECKPOINTING = "activation_checkpointing"  # in an attempt's record: what null meant
DATE = "date"  # in an attempt's record: the day that the chat template writes
ADDED_SECTIONS: dict[str, Any] = {"trainer": {"_target_": None}, "humanline": {"low": None, "high": None}}


def dump(config: Config) -> str:
    """Return the text of config.yaml."""
    return to_yaml(asdict(config))


def load(text: str, attempts: Mapping[str, str], run_dir: str) -> dict[str, Any]:
    """Return the last configuration of the run in `run_dir`: config.yaml with the changes of its attempts applied in order.

    `text` is config.yaml's; `attempts` are name -> text. Raises UserError where halos has not written one of the files.
    """
    return deepcopy(_load(text, tuple(attempts.items()), run_dir))


@lru_cache(8)  # a resume reads its configuration several times, and OmegaConf takes a tenth of a second to check it
def _load(text: str, attempts: tuple[tuple[str, str], ...], run_dir: str) -> dict[str, Any]:
    settings = _parsed(text, f"{run_dir}/config.yaml")
    if not settings:
        raise UserError(f"{run_dir}/config.yaml holds no configuration")
    settings = renamed_keys.with_current_names(settings)
    for (section, name), value in _added_to(settings).items():
        if isinstance(node := _node(settings, section), dict):
            node.setdefault(name, copy(value))
    settings = {**deepcopy(ADDED_SECTIONS), **settings}
    legacy_sections.upgrade(settings)
    for name, record in attempts:
        changed = _parsed(record, f"{run_dir}/attempts/{name}").get("changed") or {}
        try:
            resume_policy.apply_changes(settings, {renamed_keys.current_name(key): values for key, values in changed.items()})
            legacy_sections.upgrade(settings)
            if _version(record, f"{run_dir}/attempts/{name}") < arithmetic_version.CISPO_BOUNDED_BELOW:
                legacy_sections.drop_unread_clip_low(settings)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{run_dir}/attempts/{name} cannot be read: `changed` is not {{key: [old, new]}}") from error
    try:
        OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.create(_escaped(settings)))
    except OmegaConfBaseException as error:
        raise UserError(f"{run_dir}/config.yaml does not fit this version: {_describe(error)}") from error
    return settings


def added_keys(text: str, run_dir: str) -> list[str]:
    """Return the keys that a run's config.yaml predates: those of ADDED_KEYS, and of its targets."""
    settings = _parsed(text, f"{run_dir}/config.yaml")
    keys = [f"{section}.{name}" for section, name in _added_to(settings) if name not in (_node(settings, section) or {})]
    return [*keys, *legacy_sections.added_keys(settings)]


def _added_to(settings: Mapping[str, Any]) -> dict[tuple[str, str], Any]:
    """Return the keys of ADDED_KEYS that concern this configuration."""
    return {key: value for key, value in ADDED_KEYS.items() if key[0].partition(".")[0] != "online" or settings.get("online")}


def _node(settings: Mapping[str, Any], section: str) -> Any:
    """Return a section of a saved configuration, or of a section of it; None where it has none."""
    node: Any = settings
    for name in section.split("."):
        node = node.get(name) if isinstance(node, Mapping) else None
    return node


def changed_keys(record: str) -> Mapping[str, Any]:
    """Return the keys that an attempt changed, from its record: key -> [old, new]."""
    node = parse_yaml(record, "an attempt's record")
    changes = node.get("changed") if isinstance(node, dict) else None
    return {renamed_keys.current_name(str(key)): value for key, value in changes.items()} if isinstance(changes, dict) else {}


def recorded_content(attempts: Mapping[str, str], run_dir: str) -> ContentHashes | None:
    """Return the input hashes of the last start of the run in `run_dir`; None where no intact record holds them."""
    for name, record in reversed(list(attempts.items())):
        if (
            seals.is_whole(record) is not False
            and (content := ContentHashes.from_record(_parsed(record, f"{run_dir}/attempts/{name}"))) is not None
        ):
            return content
    return None


def first_version(attempts: Mapping[str, str], run_dir: str) -> int:
    """Return the version of the arithmetic that the run in `run_dir` began with; this version's where it has not begun."""
    for name, record in attempts.items():
        return _version(record, f"{run_dir}/attempts/{name}")
    return arithmetic_version.VERSION


def _version(record: str, name: str) -> int:
    content = ContentHashes.from_record(_parsed(record, name))
    return arithmetic_version.recorded_version(content.hashes if content is not None else None)


def recorded_total(attempts: Mapping[str, str]) -> int | None:
    """Return the total number of steps of a run's last start, from its records (name -> text); None where it has none."""
    record = _parsed(next(reversed(list(attempts.values())), ""), "an attempt's record")
    total = record.get("total_steps")
    return total if type(total) is int else None


def recorded_budget(attempts: Mapping[str, str]) -> int | None:
    """Return the token budget that a run with train.microbatch_tokens=auto began with (name -> text); None where none is."""
    records = (_parsed(record, "an attempt's record").get(BUDGET) for record in attempts.values())
    return next((tokens for tokens in records if type(tokens) is int), None)


def recorded_checkpointing(attempts: Mapping[str, str]) -> bool | None:
    """Return whether a run with train.activation_checkpointing=null began with checkpointed activations (name -> text); None
    where no attempt has measured it."""
    records = (_parsed(record, "an attempt's record").get(CHECKPOINTING) for record in attempts.values())
    return next((measured for measured in records if type(measured) is bool), None)


def day_of(config: Config, attempts: Mapping[str, str]) -> date:
    """Return the day that the chat template is to write: data.date, else the one that the run has recorded in its attempts (name
    -> text), else today."""
    records = (_parsed(record, "an attempt's record").get(DATE) for record in attempts.values())
    day = config.data.date or next((recorded for recorded in records if recorded is not None), None)
    try:
        return date.today() if day is None else date.fromisoformat(str(day))
    except ValueError as error:
        raise UserError(f"data.date={day}: give a day, such as data.date={date.today()}") from error


def compose_for_resume(settings: dict[str, Any], run_dir: str, resume: str) -> DictConfig:
    """Return a saved configuration as the one to resume with, at the run's present path.

    plugins, overwrite, dry_run, dry_run_rows, resume_changes, and cache_dir, which is written into, are never taken from a saved
    run: each command passes them again.
    """
    fixed = {
        "run_dir": run_dir, "resume": resume, "plugins": [], "overwrite": False, "dry_run": False,
        "dry_run_rows": _default("dry_run_rows"), "resume_changes": "refuse", "cache_dir": default_cache(),
    }  # fmt: skip
    composed = OmegaConf.create(_escaped({**settings, **fixed}))
    assert isinstance(composed, DictConfig)
    return composed


def default_cache() -> str:
    """Return the default cache_dir of config/config.yaml: a saved run's own may not exist on this machine."""
    return os.path.expanduser(str(_default("cache_dir")))


def _default(key: str) -> Any:
    return OmegaConf.select(OmegaConf.load(CONFIG / "config.yaml"), key)


def resume_arguments(config: Config, run_dir: Path) -> str:
    """Return the arguments that resume a run, for messages: resume=, and the keys that are never read from a saved run."""
    arguments = [as_argument("resume", run_dir)]
    arguments += [shlex.quote(f"plugins=[{','.join(config.plugins)}]")] if config.plugins else []
    arguments += [as_argument("cache_dir", config.cache_dir)] if config.cache_dir != default_cache() else []
    return " ".join(arguments)


def _parsed(text: str, name: str) -> dict[str, Any]:
    node = parse_yaml(text, name)
    return node if isinstance(node, dict) else {}


def _describe(error: OmegaConfBaseException) -> str:
    key = str(error.full_key or error.key or "")
    if isinstance(error, (ConfigKeyError, ConfigAttributeError)):
        return unknown_key(key, [])
    return f"{key}: {first_line_of(error)}"


def _escaped(node: Any) -> Any:
    """Escape `${`: saved values are resolved already, and a stranger's file must not interpolate our environment."""
    if isinstance(node, dict):
        return {name: _escaped(value) for name, value in node.items()}
    if isinstance(node, list):
        return [_escaped(value) for value in node]
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", node) if isinstance(node, str) else node
