"""Which key was meant: the names that exist, and the one nearest to what was typed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields, is_dataclass
from difflib import SequenceMatcher
from functools import cache
from typing import Any, Literal, get_args, get_origin, get_type_hints

from halos.config.schema import Config
from halos.config.values import describe

# What the key is called elsewhere: in TRL, transformers, PEFT's wrappers and the HALOs repository.
ELSEWHERE = {
    "learning_rate": "optim.lr",
    "optimizer": "optim.name",
    "max_steps": "train.steps",
    "n_epochs": "train.epochs",
    "num_train_epochs": "train.epochs",
    "per_device_train_batch_size": "train.microbatch_size",
    "gradient_accumulation_steps": "train.microbatch_size",
    "gradient_checkpointing": "train.activation_checkpointing",
    "eval_steps": "train.eval_every",
    "logging_steps": "train.log_every",
    "save_steps": "checkpoint.every",
    "save_every": "checkpoint.every",
    "output_dir": "run_dir",
    "lora_r": "peft.r",
    "warmup_ratio": "schedule.warmup",
    "warmup_steps": "schedule.warmup",
    "load_in_4bit": "model.quantize",
    "datasets": "data.train",
}


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known name most like `word`, as a whole or in its last part; None where nothing is alike."""

    def likeness(name: str) -> float:
        whole = SequenceMatcher(None, word.lower(), name.lower()).ratio()
        last = SequenceMatcher(None, word.lower().rpartition(".")[2], name.lower().rpartition(".")[2]).ratio()
        return 0.75 * last + 0.25 * whole  # the section is what people leave out or get wrong

    known = list(known)
    if ELSEWHERE.get(word.rpartition(".")[2]) in known:
        return ELSEWHERE[word.rpartition(".")[2]]
    best = max(known, key=likeness, default=None)
    return best if best is not None and likeness(best) > 0.6 else None


@cache
def schema_keys() -> dict[str, Any]:
    """Every key of the schema, `train.steps`, with its type; sections themselves included."""
    return _keys_of(Config, "")


def _keys_of(schema: Any, prefix: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    hints = get_type_hints(schema)
    for field in fields(schema):
        kind = hints[field.name]
        kind = next((part for part in get_args(kind) if is_dataclass(part)), kind)  # a section that may be null
        found[prefix + field.name] = kind
        if is_dataclass(kind):
            found |= _keys_of(kind, f"{prefix}{field.name}.")
    return found


def kind_of(key: str) -> Literal["section", "value", "free", "unknown"]:
    """What the schema says about a dotted key; `free` lies below a mapping or list whose own keys the schema does not name."""
    keys = schema_keys()
    if key in keys:
        return "section" if is_dataclass(keys[key]) or get_origin(keys[key]) is dict else "value"
    parent = key.rpartition(".")[0]
    while parent:
        if parent in keys:
            free = keys[parent] is Any or get_origin(keys[parent]) in (dict, list)
            return "free" if free else "unknown"
        parent = parent.rpartition(".")[0]
    return "unknown"


def unknown_key(key: str, known: Iterable[str]) -> str:
    """The message for a key that does not exist."""
    known = set(known) | set(schema_keys())
    near = nearest(key, sorted(known - {""}))
    if near:
        return f"there is no key {key!r}; did you mean {near}?"
    if key.startswith("hydra."):
        return f"there is no key {key!r}; python train.py --hydra-help lists those of Hydra"
    section = key.rpartition(".")[0]
    if kind_of(section) == "value":
        return f"there is no key {key!r}; {section} takes {describe(schema_keys()[section])}"
    inside = sorted(name.removeprefix(f"{section}.") for name in known if name.rpartition(".")[0] == section)
    if section and inside:
        return f"there is no key {key!r}; {section} takes {', '.join(inside)}"
    return f"there is no key {key!r}; python train.py --help lists them"
