"""What a step computes, by version: a line for each change after which a run would not go on as it began.

Each start of a run and each of its saves is on record with the number of the arithmetic that it was computed with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from halos.config.resume_policy import Change
from halos.config.schema import Config

PAIRED = ("dpo", "cdpo", "ipo", "simpo", "slic", "bradley_terry")
KEY = "arithmetic"  # of the number, in an attempt's record, in a lineage and in a manifest


@dataclass(frozen=True, slots=True)
class RunFacts:
    """What decides whether a change of the arithmetic concerns a run."""

    config: Config
    before: Mapping[str, Any]  # its configuration as the run has it on record
    model: Mapping[str, Any]  # its config.json, or the text model's part of it
    half: bool  # weights, or the products of an autocast, are in half precision
    reads: str  # what the model is read through: language | value | score (types.py)
    refers: bool  # the loss compares with a reference
    packed: bool  # rows are packed (logps/plan.py)
    head: str  # the way from hidden states to log-probs: layer | own | whole (logps/plan.py)


@dataclass(frozen=True, slots=True)
class Revision:
    """One change: of the steps of the runs that it concerns, or only of what is measured of them or made of them at the end."""

    number: int
    date: str
    what: str
    concerns: Callable[[RunFacts], bool]
    of: Literal["steps", "metrics", "FINAL"] = "steps"


def _sums_head_in_parts(now: RunFacts) -> bool:
    """A head is trained, and not in one product of float32: of a small vocabulary the sum is the same to the bit."""
    if now.config.peft.name != "none" or now.reads == "score":
        return False
    rows = 2 * now.config.train.microbatch_size * now.config.train.max_length  # at most
    bent = [now.model.get(name) for name in ("final_logit_softcapping", "logit_scale", "logits_scaling")]
    return now.half or any(bent) or rows * int(now.model["vocab_size"]) > 2**25


def _trains_biases(now: RunFacts) -> bool:
    return now.refers and now.config.peft.name == "lora" and now.config.peft.bias != "none"


def _samples_by_directory(now: RunFacts) -> bool:
    data = now.before.get("data") or {}
    entries = [entry for purpose in ("train", "eval") for entry in data.get(purpose) or []]
    paths = [entry.get("path") if isinstance(entry, Mapping) else entry for entry in entries]
    return now.config.online is not None and any("/" in str(path) for path in paths)


def _merges(now: RunFacts) -> bool:
    return now.config.peft.name == "lora" and bool(now.config.checkpoint.get("merge_lora"))


def _of_loss(*names: str) -> Callable[[RunFacts], bool]:
    return lambda now: str(now.config.loss.get("_target_")).rpartition(".")[2] in names


def _imitates_live(now: RunFacts) -> bool:
    online = now.config.online
    return _of_loss("sft")(now) and online is not None and online.steps is not None


# The oldest first. To change the arithmetic is to add a line here, with a number of its own.
HISTORY = (
    Revision(1, "2026-11-26", "a trained head's gradient is summed in float32 over its chunks", _sums_head_in_parts),
    Revision(1, "2026-11-26", "this model's rows are not packed, since they would read each other", lambda now: not now.packed),
    Revision(1, "2026-11-26", "log-probs are read off this model's own head, which is more than a layer, a scale and a soft cap",
             lambda now: now.reads != "score" and now.head != "layer"),
    Revision(1, "2026-11-26", "the reference of a policy with trained biases has the base's", _trains_biases),
    Revision(1, "2026-11-26", "what is sampled for a prompt depends on the name of its file, and not on the directory",
             _samples_by_directory),
    Revision(1, "2026-11-26", "adapters are merged in float64 and rounded once", _merges, of="FINAL"),
    Revision(1, "2026-11-26", "of completions that tie, accuracies count half", _of_loss(*PAIRED), of="metrics"),
    Revision(1, "2026-11-26", "kl is as estimated, and may be below 0; z0 is what the loss takes", _of_loss("kto"), of="metrics"),
    Revision(2, "2026-11-27", "a live loop imitates the samples that are desirable (online.feedback), as rounds do, and not all",
             _imitates_live),
)  # fmt: skip
VERSION = HISTORY[-1].number


def recorded_version(record: Mapping[str, Any] | None) -> int:
    """What a record says; 0 for one that is older than such numbers, or is none."""
    found = str((record or {}).get(KEY))
    return int(found) if found.isdecimal() else 0


def changes_since(since: int, now: RunFacts) -> list[Change]:
    """What the steps of a run would be changed by that was computed with the arithmetic of number `since`."""
    if since > VERSION:
        return [Change(KEY, since, VERSION, "a newer version of halos computed it: go on with that one")]
    steps = [f"since {one.date} {one.what}" for one in _between(since, now) if one.of == "steps"]
    return [Change(KEY, since, VERSION, "; ".join(steps))] if steps else []


def notes_since(since: int, now: RunFacts) -> list[str]:
    """What changes no step of such a run, and is other than it was."""
    return [f"{one.of}: since {one.date} {one.what}" for one in _between(since, now) if one.of != "steps"]


def _between(since: int, now: RunFacts) -> Iterator[Revision]:
    return (one for one in HISTORY if one.number > since and one.concerns(now))
