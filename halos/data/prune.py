"""Choose parts of the cache of tokenised rows that are not worth their space, and remove them, but for those that a run holds."""

from __future__ import annotations

import shutil
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from halos.data.cache import alone
from halos.data.stored import Stored


@dataclass(frozen=True, slots=True)
class Rule:
    """What is to go: parts that meet any of these."""

    older: float | None = None  # seconds since they were last used
    size: int | None = None  # bytes that the others may take; those go first that were used the longest ago
    unusable: bool = False  # those that no run of this version can use

    def chosen(self, stored: Sequence[Stored]) -> Iterator[tuple[Stored, str]]:
        """Yield the parts to remove, and why. `stored` are all, the last used first."""
        now, kept = time.time(), 0
        for each in stored:
            if self.unusable and each.unusable:
                yield each, each.unusable
            elif self.older is not None and now - each.used > self.older:
                yield each, "not used for so long"
            elif self.size is not None and kept + each.size > self.size:
                yield each, "over the size"
            else:
                kept += each.size


def remove(each: Stored) -> bool:
    """Remove a part, unless a run holds it; return whether it is gone. An interruption leaves an unfinished part."""
    hidden = each.path.with_name(f".{each.key}-{uuid.uuid4().hex[:8]}")
    with alone(each.part) as is_free:
        if not is_free:
            return False
        try:
            each.path.rename(hidden)  # at once, so that nobody opens half of it
        except FileNotFoundError:  # another prune was first
            return True
    shutil.rmtree(hidden)
    return True


def is_held(each: Stored) -> bool:
    """Return whether a run reads or writes a part now."""
    with alone(each.part) as is_free:
        return not is_free
