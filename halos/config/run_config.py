"""A run's configuration on disk: resolved when written, plain values when read, so that it runs no code."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping
from copy import copy
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from halos import seals
from halos.config import legacy_sections, renamed_keys, resume_policy
from halos.config.content_hashes import ContentHashes
from halos.config.schema import Config
from halos.config.suggest import unknown_key
from halos.config.values import as_argument
from halos.confined import parse_yaml
from halos.errors import UserError, words_of

# Keys that are younger than a run and decide what a step computes, as it went without them
ADDED_KEYS: dict[tuple[str, str], Any] = {
    ("reference", "adapter"): "off", ("peft", "target_parameters"): [], ("train", "router_aux_loss"): 0.0,
    ("optim", "loraplus_lr_ratio"): None, ("optim", "lr_by_name"): {}, ("data", "format"): None,
}  # fmt: skip


def dump(config: Config) -> str:
    """What goes into config.yaml."""
    return yaml.safe_dump(asdict(config), sort_keys=False, allow_unicode=True, width=10_000)


def load(text: str, attempts: Mapping[str, str], run_dir: str) -> dict[str, Any]:
    """What the run in `run_dir` was last configured with: config.yaml, and on top what its attempts changed, in their order.

    `attempts` are name -> text. Raises UserError where one of the files is none of ours.
    """
    settings = _parsed(text, f"{run_dir}/config.yaml")
    if not settings:
        raise UserError(f"{run_dir}/config.yaml holds no configuration")
    settings = renamed_keys.with_current_names(settings)
    for (section, name), value in ADDED_KEYS.items():
        if isinstance(settings.get(section), dict):
            settings[section].setdefault(name, copy(value))
    legacy_sections.upgrade(settings)
    for name, record in attempts.items():
        changed = _parsed(record, f"{run_dir}/attempts/{name}").get("changed") or {}
        try:
            resume_policy.apply_changes(settings, {renamed_keys.current_name(key): values for key, values in changed.items()})
            legacy_sections.upgrade(settings)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{run_dir}/attempts/{name} cannot be read: `changed` is no {{key: [old, new]}}") from error
    try:
        OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.create(_escaped(settings)))
    except OmegaConfBaseException as error:
        raise UserError(f"{run_dir}/config.yaml does not fit this version: {_describe(error)}") from error
    return settings


def added_keys(text: str, run_dir: str) -> list[str]:
    """Keys of BEFORE that a run's config.yaml is too old to have, and the kernel that its optimizer went without."""
    settings = _parsed(text, f"{run_dir}/config.yaml")
    found = [f"{section}.{name}" for section, name in ADDED_KEYS if name not in (settings.get(section) or {})]
    return found + (["optim.fused"] if legacy_sections.predates_fused(settings.get("optim")) else [])


def changed_keys(record: str) -> Mapping[str, Any]:
    """Keys that an attempt has changed, by its record."""
    node = parse_yaml(record, "an attempt's record")
    found = node.get("changed") if isinstance(node, dict) else None
    return {renamed_keys.current_name(str(key)): value for key, value in found.items()} if isinstance(found, dict) else {}


def recorded_content(attempts: Mapping[str, str], run_dir: str) -> ContentHashes | None:
    """What the run in `run_dir` stood on when it last started; None where no whole record of a start says so."""
    for name, record in reversed(list(attempts.items())):
        if (
            seals.is_whole(record) is not False
            and (known := ContentHashes.read(_parsed(record, f"{run_dir}/attempts/{name}"))) is not None
        ):
            return known
    return None


def compose_for_resume(settings: dict[str, Any], run_dir: str, resume: str) -> DictConfig:
    """A saved configuration as one to go on with, where it lies now.

    What must be typed on this command is not taken from the files: plugins, overwrite, dry_run, resume_changes, and cache_dir,
    which is written into.
    """
    own = {
        "run_dir": run_dir, "resume": resume, "plugins": [], "overwrite": False, "dry_run": False, "resume_changes": "refuse",
        "cache_dir": default_cache(),
    }  # fmt: skip
    made = OmegaConf.create(_escaped({**settings, **own}))
    assert isinstance(made, DictConfig)
    return made


def default_cache() -> str:
    """cache_dir as config.yaml has it for everybody: a saved run's own names a place on the machine where it was begun."""
    node = OmegaConf.load(Path(__file__).resolve().parents[2] / "config" / "config.yaml")
    return os.path.expanduser(str(node.cache_dir))


def resume_arguments(config: Config, run_dir: Path) -> str:
    """What is typed to go on with a run: what is never taken from its files is typed again."""
    words = [as_argument("resume", run_dir)]
    words += [shlex.quote(f"plugins=[{','.join(config.plugins)}]")] if config.plugins else []
    words += [as_argument("cache_dir", config.cache_dir)] if config.cache_dir != default_cache() else []
    return " ".join(words)


def _parsed(text: str, name: str) -> dict[str, Any]:
    node = parse_yaml(text, name)
    return node if isinstance(node, dict) else {}


def _describe(error: OmegaConfBaseException) -> str:
    key = str(error.full_key or error.key or "")
    if isinstance(error, (ConfigKeyError, ConfigAttributeError)):
        return unknown_key(key, [])
    return f"{key}: {words_of(error)}"


def _escaped(node: Any) -> Any:
    """`${` escaped: what was saved is resolved already, and a stranger's file must not interpolate our environment."""
    if isinstance(node, dict):
        return {name: _escaped(value) for name, value in node.items()}
    if isinstance(node, list):
        return [_escaped(value) for value in node]
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", node) if isinstance(node, str) else node
