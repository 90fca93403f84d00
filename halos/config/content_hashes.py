"""What a run stands on, by content: what an earlier start of it recorded against what lies there now."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from halos.config import arithmetic_version, renamed_keys
from halos.config.resume_policy import Change
from halos.hashes import short

ROWS = ("data.train", "data.eval")  # keys whose hash is of rows as they are trained on
RECORDED = ("content", "sources")  # keys of an attempt's record and of a lineage


@dataclass(frozen=True, slots=True)
class ContentHashes:
    """Hashes under the keys that name what was hashed; None where the run has no such thing.

    Of data there is one hash for the rows as they are trained on, and one for each source, which only says where rows that
    are other ones come from: the same rows out of other files are the same.
    """

    hashes: dict[str, str | None]
    sources: dict[str, list[dict[str, Any]]] = field(default_factory=dict)  # by purpose: an entry of the config, and its hash

    @classmethod
    def read(cls, record: Mapping[str, Any]) -> ContentHashes | None:
        """What a record holds; None of one that is older than such records."""
        hashes, sources = (record.get(name) for name in RECORDED)
        if not isinstance(hashes, Mapping) or not isinstance(sources, Mapping):
            return None
        return cls(_by_key(hashes), {name: list(entries) for name, entries in sources.items()})

    @classmethod
    def of_lineage(cls, run: Mapping[str, Any]) -> ContentHashes | None:
        """What the last run of a lineage stood on; of an older one what it has: the base's weights and the data's sources."""
        base, data = run.get("base"), run.get("data")
        if not isinstance(base, Mapping) or not isinstance(data, Mapping):
            return None
        hashes = run.get("content")
        return cls(_by_key(hashes) if isinstance(hashes, Mapping) else {"model.weights": base.get("sha256")}, dict(data))

    def record(self) -> dict[str, Any]:
        return {"content": self.hashes, "sources": self.sources}


def _by_key(hashes: Mapping[str, str | None]) -> dict[str, str | None]:
    return {renamed_keys.current_name(key): value for key, value in hashes.items()}


def changes_record(**changes: Sequence[Change]) -> dict[str, Any]:
    """Changes as an attempt's record has them, under the names they are given by; nothing of those that there are none of."""
    return {name: {change.key: [change.old, change.new] for change in some} for name, some in changes.items() if some}


def compare(before: ContentHashes, now: ContentHashes, places: Mapping[str, str]) -> list[Change]:
    """What is no longer what it was. What was not recorded is not compared. `places` say where it lies now."""
    found = []
    for key, value in now.hashes.items():
        if key == arithmetic_version.KEY:
            continue  # which runs a change of it concerns is known there
        purpose = key.removeprefix("data.")
        if key not in before.hashes and key in ROWS and before.sources:
            found += _sources(key, before.sources.get(purpose, []), now.sources.get(purpose, []))
        elif key in before.hashes and before.hashes[key] != value:
            files = _sources(key, before.sources.get(purpose, []), now.sources.get(purpose, [])) if purpose != key else []
            where = places.get(key) or places.get(key.partition(".")[0])
            found += files or [
                Change(
                    f"{key} {where} (content)" if where else f"{key} (content)",
                    short(before.hashes[key]),
                    short(value),
                    _why(key),
                )
            ]
    return found


def _why(key: str) -> str:
    same = "its files are the same: the tokenizer, the template, a format of yours or a library makes other rows of them"
    return same if key in ROWS else ""


def _sources(key: str, before: Sequence[Mapping[str, Any]], now: Sequence[Mapping[str, Any]]) -> list[Change]:
    """The entries whose content is another one, in the place where they stand."""
    pairs = zip(before, now, strict=False)
    found = [Change(f"{key} {new['path']} (content)", short(old["hash"]), short(new["hash"]), "")
             for old, new in pairs if old.get("hash") != new.get("hash")]  # fmt: skip
    if len(before) != len(now):
        found.append(Change(f"{key} (number of sources)", len(before), len(now), ""))
    return found
