"""How the schema declares a key: its range, and what a resume with another value would change."""

from __future__ import annotations

from dataclasses import field
from enum import StrEnum
from typing import Any

from omegaconf import MISSING

# Values of `on_resume`: does what a step computes depend on the key?
MATHEMATICS = "mathematics"  # yes
SAFE = "safe"  # no
CONTENT = "content"  # on the content that the key names, wherever it is: compared once read, by content_hashes.py
# under a condition, which is in resume_policy.py
STEPS, MICROBATCH, OBJECTIVE, SCORER = "steps", "microbatch", "objective", "scorer"


class Scope(StrEnum):
    """Scope of a key."""

    RUN = "run"  # what is computed, saved and logged
    PLACE = "place"  # where the run directory is
    HOST = "host"  # this machine
    COMMAND = "command"  # this command alone
    CODE = "code"  # must be passed on every command, and is never read from a saved run
    RECORD = "record"  # for readers of a saved run: no key of a command


def key(
    *,
    above: float | None = None,
    least: float | None = None,
    most: float | None = None,
    one_of: tuple[str, ...] = (),
    words: tuple[str, ...] = (),
    on_resume: str = MATHEMATICS,
    scope: Scope = Scope.RUN,
    path: bool = False,
    shared: type | None = None,
) -> Any:
    """Declare a required key.

    `above` (exclusive), `least` and `most` (inclusive) bound its values; `words` are what it takes besides numbers; `on_resume`
    is what a resume with another value would change; `path` marks a file or directory of this machine, which is made absolute;
    `shared` is the schema of the keys that a node with a `_target_` has whatever its target.
    """
    limits = {"above": above, "least": least, "most": most, "one_of": one_of or None, "words": words or None}
    set_limits = {name: limit for name, limit in limits.items() if limit is not None}
    facts = {"limits": set_limits, "on_resume": on_resume, "scope": scope, "path": path, "shared": shared}
    return field(default=MISSING, metadata=facts)


def record() -> Any:
    """Declare a value that a command writes into its run for readers, and that no command sets; null in older runs."""
    return field(default=None, metadata={"limits": {}, "on_resume": SAFE, "scope": Scope.RECORD, "path": False, "shared": None})
