"""Hashes of a run's inputs (models, data, code): those that an earlier start recorded against those of now."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from halos.config import arithmetic_version, renamed_keys
from halos.config.resume_policy import Change
from halos.hashes import short

log = logging.getLogger(__name__)

ROWS = ("data.train", "data.eval")  # keys whose hash is of the tokenised rows
CODE = ("loss._target_", "optim._target_", "schedule._target_", "trainer._target_", "data.format", "online.scorer.functions")
RECORDED = ("content", "sources")  # keys of an attempt's record and of a lineage


@dataclass(frozen=True, slots=True)
class ContentHashes:
    """Hashes by the keys that name what was hashed; None where the run has no such input.

    Data have one hash of the tokenised rows, which decides, and one of each source, which only locates a difference: the same
    rows from other files are the same data.
    """

    hashes: dict[str, str | None]
    sources: dict[str, list[dict[str, Any]]] = field(
        default_factory=dict
    )  # by purpose: entries of the config, each with its hash

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> ContentHashes | None:
        """Return the hashes of an attempt's record; None where it predates them."""
        hashes, sources = (record.get(name) for name in RECORDED)
        if not isinstance(hashes, Mapping) or not isinstance(sources, Mapping):
            return None
        return cls(_by_key(hashes), {name: list(entries) for name, entries in sources.items()})

    @classmethod
    def from_lineage(cls, run: Mapping[str, Any]) -> ContentHashes | None:
        """Return the hashes of the last run of a lineage; an older one has only the base's weights and the data's sources."""
        base, data = run.get("base"), run.get("data")
        if not isinstance(base, Mapping) or not isinstance(data, Mapping):
            return None
        hashes = run.get("content")
        return cls(_by_key(hashes) if isinstance(hashes, Mapping) else {"model.weights": base.get("sha256")}, dict(data))

    def has_own_code(self) -> bool:
        """Return whether the run computes with code of the user's."""
        return any(self.hashes.get(key) is not None for key in CODE)

    def record(self) -> dict[str, Any]:
        return {"content": self.hashes, "sources": self.sources}


def _by_key(hashes: Mapping[str, str | None]) -> dict[str, str | None]:
    return {renamed_keys.current_name(key): value for key, value in hashes.items()}


def changes_record(**changes: Sequence[Change]) -> dict[str, Any]:
    """Return changes as an attempt's record holds them, {name: {key: [old, new]}}; a name without changes is left out."""
    return {name: {change.key: [change.old, change.new] for change in some} for name, some in changes.items() if some}


def log_changes(changed: Sequence[Change], since: str) -> None:
    """Log what a resume changes, and aloud what changes the run's results `since` a step or a round."""
    if safe := [str(change) for change in changed if change.why is None]:
        log.info("changed: %s", ", ".join(safe))
    if others := [change.explained for change in changed if change.why is not None]:
        log.warning("CHANGED WHAT THE RUN COMPUTES, from %s on: %s", since, ", ".join(others))


def compare(before: ContentHashes, now: ContentHashes, paths: Mapping[str, str]) -> list[Change]:
    """Return the inputs whose content has changed; what was not recorded is not compared. `paths` say where each input is now."""
    changes = []
    for key, value in now.hashes.items():
        if key == arithmetic_version.KEY:
            continue  # arithmetic_version.py decides which runs a change of it affects
        purpose = key.removeprefix("data.")
        if key not in before.hashes and key in ROWS and before.sources:
            changes += _sources(key, before.sources.get(purpose, []), now.sources.get(purpose, []))
        elif key in before.hashes and before.hashes[key] != value:
            files = _sources(key, before.sources.get(purpose, []), now.sources.get(purpose, [])) if purpose != key else []
            where = paths.get(key) or paths.get(key.partition(".")[0])
            changes += files or [
                Change(
                    f"{key} {where} (content)" if where else f"{key} (content)",
                    short(before.hashes[key]),
                    short(value),
                    _why(key),
                )
            ]
    return changes


def _why(key: str) -> str:
    same = "its files are the same, and the tokenizer, the template, a format of yours or a library makes different rows of them"
    return same if key in ROWS else ""


def _sources(key: str, before: Sequence[Mapping[str, Any]], now: Sequence[Mapping[str, Any]]) -> list[Change]:
    """Return the entries whose content differs, compared position by position."""
    pairs = zip(before, now, strict=False)
    changes = [Change(f"{key} {new['path']} (content)", short(old["hash"]), short(new["hash"]), "")
             for old, new in pairs if old.get("hash") != new.get("hash")]  # fmt: skip
    if len(before) != len(now):
        changes.append(Change(f"{key} (number of sources)", len(before), len(now), ""))
    return changes
