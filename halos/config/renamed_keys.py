"""Keys that were renamed: what is typed, saved or written in a YAML of the user's under an old name is taken for the new one."""

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
    """A dotted key by its name of today."""
    return next((new + key.removeprefix(old) for old, new in SECTIONS.items() if key == old or key.startswith(f"{old}.")), key)


def old_name(key: str) -> str | None:
    """A key's old name, where it had one."""
    return next((old + key.removeprefix(new) for old, new in SECTIONS.items() if key == new or key.startswith(f"{new}.")), None)


def rename_override(override: str) -> str:
    """An override with its key by its name of today."""
    signs, key, rest = _WORD.fullmatch(override).groups()  # type: ignore[union-attr]  # it matches everything
    return f"{signs}{current_name(key)}{rest}"


def deprecation_note(words: Collection[str]) -> str | None:
    """What there is to tell of overrides that were typed under an old name."""
    keys = [key.group(2) for key in map(_WORD.fullmatch, words) if key]
    old = next((key for key in keys if current_name(key) != key), None)
    return None if old is None else f"{old} is now {current_name(old)}; the old name is still taken"


def move_sections(composed: DictConfig, typed: Collection[str] = ()) -> None:
    """Old sections into new ones, in place. What was `typed` by the new name counts more than what a YAML has under the old."""
    keys = {key.group(2) for key in map(_WORD.fullmatch, typed) if key}
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


@cache  # a sweep composes the same YAML for each of its jobs
def _warn_once(old: str, new: str) -> None:
    if os.environ.get("LOCAL_RANK", "0") == "0":
        log.warning("%s, which a YAML of yours has, is now %s; the old name is still taken", old, new)


def with_current_names(settings: Mapping[str, Any]) -> dict[str, Any]:
    """A saved configuration with its sections by their names of today."""
    return dict(_renamed(settings, ""))


def _renamed(node: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in node.items():
        key = current_name(f"{prefix}{name}")
        within = isinstance(value, Mapping) and any(old.startswith(f"{key}.") for old in SECTIONS)
        yield key.rpartition(".")[2], dict(_renamed(value, f"{key}.")) if within else value
