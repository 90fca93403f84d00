"""Seals of small text files: the last line is a hash of everything before it, so that any edit is detected."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from halos import confined, hashes

SEAL = "seal: "
WHOLE = re.compile(r"(?P<text>.*\n)seal: (?P<seal>[0-9a-f]{64})\n", re.DOTALL)
SEALED = "sealed"  # key of an attempt's record: hashes of config.yaml and of the record before
CHANGED = "contents changed"
ROWS_HASH = "sha256"  # key of the .meta.json next to a file of rows: the hash of that file


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def seal(text: str) -> str:
    """Append the seal. `text` is YAML, and so is the result."""
    return f"{text}{SEAL}{digest(text)}\n"


def attempt(record: Mapping[str, Any], *, config: str, before: str | None) -> str:
    """Return the text of an attempt's record, which seals itself, the configuration and the record `before` it."""
    hashes_of = {"config": digest(config), "before": digest(before) if before is not None else None}
    return seal(confined.to_yaml({**record, SEALED: hashes_of}))


def is_whole(text: str) -> bool | None:
    """Return whether a text matches its seal; None for one that was written before there were seals."""
    match = WHOLE.fullmatch(text)
    if match:
        return digest(match["text"]) == match["seal"]
    return False if f"\n{SEALED}:" in text or f"\n{SEAL}" in text else None


def faults(config: str, records: Mapping[str, str]) -> dict[str, str]:
    """Return what was changed since it was written, by name: `config.yaml`, or an attempt's record; `records` are in order."""
    broken, whole = dict[str, str](), dict[str, Mapping[str, Any]]()
    for name, text in records.items():
        if is_whole(text) and (sealed := _sealed_hashes(text)) is not None:
            whole[name] = sealed
        elif is_whole(text) is not None or whole:  # all records after a sealed one have seals
            broken[name] = CHANGED
    names = list(records)
    for name, sealed in whole.items():
        position = names.index(name)
        before = digest(records[names[position - 1]]) if position else None
        if sealed.get("before") != before:
            broken[names[position - 1] if position else name] = f"{CHANGED}, or a record between is missing"
    if whole and [*whole.values()][-1].get("config") != digest(config):
        broken["config.yaml"] = CHANGED
    return broken


def _sealed_hashes(record: str) -> Mapping[str, Any] | None:
    """Return the hashes in a record; None if the text is no record, though it has a seal."""
    try:
        node = yaml.load(record, Loader=confined.SafeLoader)
    except yaml.YAMLError:
        return None
    sealed = node.get(SEALED) if isinstance(node, dict) else None
    return sealed if isinstance(sealed, dict) else None


def rows_are_intact(rows: Path, facts: Path) -> bool | None:
    """Return whether a file of rows matches the hash in its .meta.json (`facts`); None if that has no hash."""
    recorded = confined.load_object(facts).get(ROWS_HASH)
    return None if recorded is None else hashes.digest(rows) == recorded
