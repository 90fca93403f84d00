"""A seal on a small text: a hash of all that stands before it as its last line, so that a changed byte shows."""

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
BY_NAME = "sealed"  # in an attempt's record: hashes of what the start stood on, config.yaml and the record before
CHANGED = "contents changed"
OF_ROWS = "sha256"  # in the facts beside a file of rows: the hash of that file


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def seal(text: str) -> str:
    """`text` is YAML, and so is the result."""
    return f"{text}{SEAL}{digest(text)}\n"


def attempt(record: Mapping[str, Any], *, config: str, before: str | None) -> str:
    """The text of an attempt's record, which seals itself, the configuration and the record `before` it."""
    known = {"config": digest(config), "before": digest(before) if before is not None else None}
    return seal(yaml.safe_dump({**record, BY_NAME: known}, sort_keys=False, allow_unicode=True))


def is_whole(text: str) -> bool | None:
    """Whether a text is what was sealed; None for one that is older than seals."""
    parts = WHOLE.fullmatch(text)
    if parts:
        return digest(parts["text"]) == parts["seal"]
    return False if f"\n{BY_NAME}:" in text or f"\n{SEAL}" in text else None


def faults(config: str, records: Mapping[str, str]) -> dict[str, str]:
    """What is not as it was when it was written: `config.yaml`, or the names of attempts' `records`, which come in order."""
    broken, whole = dict[str, str](), dict[str, Mapping[str, Any]]()
    for name, text in records.items():
        if is_whole(text) and (known := _known(text)) is not None:
            whole[name] = known
        elif is_whole(text) is not None or whole:  # after one with a seal every other has one
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


def _known(record: str) -> Mapping[str, Any] | None:
    """What a record seals besides itself; None of what is no record, whoever put a seal under it."""
    try:
        node = yaml.load(record, Loader=confined.SafeLoader)
    except yaml.YAMLError:
        return None
    sealed = node.get(BY_NAME) if isinstance(node, dict) else None
    return sealed if isinstance(sealed, dict) else None


def are_written(rows: Path, facts: Path) -> bool | None:
    """Whether a file of rows is what was written, by the facts beside it; None where those are older than its seal."""
    known = confined.load_object(facts).get(OF_ROWS)
    return None if known is None else hashes.digest(rows) == known
