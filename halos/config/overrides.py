"""Check overrides against the existing choices and keys before Hydra composes, so that the messages are ours."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Any

from halos.config.schema import Scope, keys_of
from halos.config.suggest import about_loss, kind_of, nearest, schema_keys, unknown_key
from halos.config.values import describe, show
from halos.errors import UserError
from halos.repository import COMMAND

Choices = Mapping[str, Sequence[str]]
_QUOTED_KEY = re.compile(r"""([{,]\s*)(['"])([\w./*-]+)\2\s*:""")


@dataclass(frozen=True, slots=True)
class Override:
    """One override of the command line. `values` holds its value, or those of a sweep; empty where they cannot be enumerated."""

    sign: str  # "", "+", "++" or "~"
    key: str
    package: str | None
    value_text: str  # as typed, quotes included
    values: tuple[Any, ...]
    is_sweep: bool

    @property
    def text(self) -> str:
        package = f"@{self.package}" if self.package else ""
        return f"{self.sign}{self.key}{package}" + ("" if self.sign == "~" and not self.value_text else f"={self.value_text}")

    @property
    def is_hydra(self) -> bool:
        return self.key.startswith(("hydra.", "hydra/")) or self.package is not None

    def chooses(self, choices: Choices) -> bool:
        """Return whether it picks an option of a group, as in loss=dpo, rather than setting a key."""
        return self.key in choices and not any(isinstance(value, Mapping) for value in self.values)


def unreadable(text: str, reason: str) -> str:
    """Return the message for an override that Hydra's parser cannot read: nearly always a character needs quotes."""
    key, equal, value = text.partition("=")
    if key.startswith("-"):
        return f"there is no option {key}: keys are written without dashes, {key.lstrip('-')}={value or '...'}; --help lists them"
    if not equal:
        return f"{text!r} is not key=value; a value with spaces needs quotes around the whole, 'key=[a, b]'"
    if not key.lstrip("+~") or not set(key.lstrip("+~")) <= set(_KEY):
        return f"{text!r} is not key=value: {key!r} cannot be a key; entries of a list are named by a dot, data.train.0.path="
    opened = sum(value.count(mark) for mark in "[{(") - sum(value.count(mark) for mark in "]})")
    if opened > 0:
        return f"{text!r} ends inside a bracket: leave out the space after it, or put quotes around the whole, '{text} ...'"
    if (unquoted := _QUOTED_KEY.sub(r"\1\3:", value)) != value:
        return f"cannot read {text!r}: keys of a mapping have no quotes: {shlex.quote(f'{key}={unquoted}')}"
    if value.startswith("["):
        return f"cannot read {text!r} ({reason}); quote the item that cannot be read, and the whole for the shell"
    inner = value.strip("'\"").replace('"', r"\"")
    shown = shlex.quote(f'{key}="{inner}"')
    return f"cannot read {text!r} ({reason}); quote the value, twice because the shell takes one pair: {shown}"


_KEY = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.-/@:$"


def check_choices(overrides: Sequence[Override], choices: Choices, *, multirun: bool) -> None:
    """Raises UserError for a choice that does not exist, and for commas outside a sweep."""
    for override in overrides:
        if override.is_sweep and not multirun:
            raise UserError(_comma(override, choices))
        if override.is_hydra or not override.chooses(choices):
            continue
        options = ", ".join(choices[override.key]) or f"none yet; put a file into config/{override.key}"
        if override.sign:
            problem = (
                "cannot be removed"
                if override.sign == "~"
                else f"is a choice that always exists: write {override.key}={override.value_text}"
            )
            raise UserError(f"{override.text}: {override.key} {problem}; choices: {options}")
        for value in override.values:
            if not isinstance(value, str) or value not in choices[override.key]:
                raise UserError(unknown_choice(override.key, value, choices))


def unknown_choice(group: str, value: Any, choices: Choices) -> str:
    """Return the message for a choice that a group does not have; it ends with the likely intention where there is one."""
    options = ", ".join(choices[group]) or f"none yet; put a file into config/{group}"
    if group == "logging" and isinstance(value, list):
        return _several_trackers([str(each) for each in value], choices)
    if group == "loss" and (explanation := about_loss(str(value))):
        return f"loss has no choice {show(value)}: {explanation}. Choices: {options}"
    return f"{group} has no choice {show(value)}; choices: {options}{_suggestion(group, str(value), choices)}"


def unknown_inner_loss(value: str, known: Sequence[str]) -> str:
    """Return the message for an unknown online.loss, which names a loss and is no choice of a group."""
    near, explanation = nearest(value, known), about_loss(value)
    hint = f"{explanation}." if explanation else f"did you mean {near}?" if near else "it is no loss of config/loss."
    return f"online.loss={value}: {hint} It takes {', '.join(known)}"


def _several_trackers(names: Sequence[str], choices: Choices) -> str:
    """Return the message that says how to use several trackers: one by logging=, each other one as a hook."""
    if any(name not in TRACKERS or name not in choices["logging"] for name in names) or len(names) < 2:
        return f"logging takes one choice, of {', '.join(choices['logging'])}, not {show(list(names))}"
    first, *others = sorted(names, key=lambda name: name != "wandb")
    more = " ".join(shlex.quote(f"+hooks.{name}={{_target_: {TRACKERS[name]}}}") for name in others)
    return f"logging takes one choice; for {' and '.join(names)} at once pass logging={first} {more}"


TRACKERS = {"wandb": "halos.hooks.trackers.Wandb", "tensorboard": "halos.hooks.trackers.TensorBoard"}


def resolve_keys(overrides: Sequence[Override], choices: Choices, known: Sequence[str]) -> list[Override]:
    """Return the overrides with the sign that Hydra needs for each key. Raises UserError for keys that do not exist.

    `known` are the keys of the configuration that the choices alone compose to. Children of a free mapping
    (`peft.rank_pattern.q_proj=8`) need no plus sign.
    """
    return [
        override if override.is_hydra or override.chooses(choices) else _resolve_one(override, choices, known)
        for override in overrides
    ]


def _resolve_one(override: Override, choices: Choices, known: Sequence[str]) -> Override:
    if override.key in keys_of(Scope.RECORD):
        raise UserError(f"there is no key {override.key!r}: a run records it; {COMMAND} --help lists the keys")
    kind = kind_of(override.key)
    exists = override.key in known
    if kind == "unknown" and not exists:
        raise UserError(unknown_key(override.key, [*known, *choices]))
    if override.sign == "~":
        if kind == "free" and exists:
            return override
        if kind == "free":
            raise UserError(f"{override.text}: {unknown_key(override.key, known)}")
        raise UserError(f"{override.text}: a key cannot be removed; give it a value, or null where it takes null")
    if override.sign == "+" and (exists or kind == "value"):
        raise UserError(f"{override.text}: {override.key} exists already: write {override.key}={override.value_text}")
    if override.key in choices:
        return replace(override, sign="")  # a mapping for a whole section, which Hydra merges into it
    plain = exists and not any(isinstance(value, Mapping) for value in override.values)
    return replace(override, sign="" if plain else "++")  # the keys of a mapping need not exist


def _comma(override: Override, choices: Choices) -> str:
    several = f"{override.key}={override.value_text}"
    if describe(schema_keys().get(override.key)) == "a list":
        return f"{several}: {override.key} takes a list, in brackets: '{override.key}=[{override.value_text}]'"
    if override.key == "logging" and all(str(value) in TRACKERS for value in override.values):
        return f"{_several_trackers([str(value) for value in override.values], choices)}; to try each, sweep with {COMMAND} -m"
    if override.key in choices:
        return f"{several}: {override.key} takes one choice; to try each, sweep with {COMMAND} -m"
    quoted = f"'{override.key}=\"{override.value_text}\"'"
    return (
        f"{several} means one run for each value, which needs -m; for the text itself, commas included, quote it twice: {quoted}"
    )


def _suggestion(group: str, value: str, choices: Choices) -> str:
    near = nearest(value, choices[group])
    if group == "peft" and value.lower() == "qlora":
        return "; QLoRA is peft=lora model.quantize=4bit"
    if near:
        return f" (did you mean {group}={near}?)"
    if group == "experiment":
        return f"; one of yours is a file config/experiment/{value}.yaml"
    is_path = "/" in value or "." in value
    if group == "model" and is_path:
        return f"; a directory, hub id or file goes into model.name_or_path={value}"
    if group == "data" and is_path:
        return f"; files go into 'data.train=[{value}]' 'data.eval=[...]'"
    other = next((name for name, options in choices.items() if get_close_matches(value, options, 1, 0.8)), None)
    return f" (did you mean {other}={value}?)" if other else ""


def quote_nested(override: str) -> str:
    """Quote each override within `online.overrides=[loss.beta=0.3]` for Hydra's grammar; return other overrides unchanged."""
    key, sign, value = override.partition("=")
    value = value.strip()
    if key.lstrip("+") != "online.overrides" or not sign or not (value.startswith("[") and value.endswith("]")):
        return override
    items = [item.strip() for item in _split(value[1:-1])]
    return f"{key}=[{','.join(_in_quotes(item) for item in items if item)}]"


def _in_quotes(item: str) -> str:
    if item[0] in "'\"" and item[-1] == item[0]:
        return item
    escaped = item.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


def typed_keys(overrides: Sequence[str]) -> list[str]:
    """Return the keys of a command line, those inside a mapping that is given for a section included."""
    return [key for text in overrides for key in _keys_of(*text.lstrip("+~").partition("=")[::2])]


def _keys_of(key: str, value: str) -> Iterator[str]:
    yield key
    if value.strip().startswith("{") and value.strip().endswith("}"):
        for item in _split(value.strip()[1:-1]):
            name, colon, inner = item.partition(":")
            if colon:
                yield from _keys_of(f"{key}.{name.strip()}", inner)


def _split(text: str) -> list[str]:
    """Split at commas outside brackets and quotes."""
    items, depth, quote = [""], 0, ""
    for char in text:
        if quote:
            quote = "" if char == quote else quote
        elif char in "'\"":
            quote = char
        depth += (char in "[{(") - (char in ")}]") if not quote else 0
        if char == "," and not depth and not quote:
            items.append("")
        else:
            items[-1] += char
    return items
