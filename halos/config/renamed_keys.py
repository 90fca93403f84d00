"""Renamed keys: old names are still accepted in overrides, in saved runs and in a user's YAML files."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Collection, Iterator, Mapping
from functools import cache
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

log = logging.getLogger(__name__)

SECTIONS = {"online.labeller": "online.scorer"}  # old -> new
_WORD = re.compile(r"([+~]*)([^=@]*)(.*)", re.S)  # an override: signs, key, the rest


def current_name(key: str) -> str:
    """Return the current name of a dotted key."""
    return next((new + key.removeprefix(old) for old, new in SECTIONS.items() if key == old or key.startswith(f"{old}.")), key)


def old_name(key: str) -> str | None:
    """Return the old name of a key; None where it had none."""
    return next((old + key.removeprefix(new) for old, new in SECTIONS.items() if key == new or key.startswith(f"{new}.")), None)


def rename_override(override: str) -> str:
    """Return an override with the current name of its key."""
    signs, key, rest = _WORD.fullmatch(override).groups()  # type: ignore[union-attr]  # it matches everything
    return f"{signs}{current_name(key)}{rest}"


def deprecation_note(overrides: Collection[str]) -> str | None:
    """Return the message for overrides that use an old name; None where none does."""
    keys = [key.group(2) for key in map(_WORD.fullmatch, overrides) if key]
    old = next((key for key in keys if current_name(key) != key), None)
    return None if old is None else f"{old} is now {current_name(old)}; the old name is still accepted"


def move_sections(composed: DictConfig, overrides: Collection[str] = ()) -> bool:
    """Move old sections into new ones, in place; return whether there were any. `overrides` of the new name win over a YAML's
    values under the old one."""
    keys, moved = {key.group(2) for key in map(_WORD.fullmatch, overrides) if key}, False
    for old, new in SECTIONS.items():
        section = OmegaConf.select(composed, old)
        if section is None:
            continue
        parent, _, name = old.rpartition(".")
        with open_dict(composed):
            leaves = section.items_ex(resolve=False) if isinstance(section, DictConfig) else [("", section)]
            for leaf, value in leaves:
                if (key := f"{new}.{leaf}".rstrip(".")) not in keys:
                    OmegaConf.update(composed, key, value)
            del OmegaConf.select(composed, parent)[name]
        _warn_once(old, new)
        moved = True
    return moved


@cache  # a sweep composes the same YAML for each of its jobs
def _warn_once(old: str, new: str) -> None:
    if os.environ.get("LOCAL_RANK", "0") == "0":
        log.warning("%s, which a YAML of yours has, is now %s; the old name is still accepted", old, new)


def with_current_names(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return a saved configuration with the current names of its sections."""
    return dict(_renamed(settings, ""))


def _renamed(node: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in node.items():
        key = current_name(f"{prefix}{name}")
        within = isinstance(value, Mapping) and any(old.startswith(f"{key}.") for old in SECTIONS)
        yield key.rpartition(".")[2], dict(_renamed(value, f"{key}.")) if within else value
