"""What was typed, key by key, against the choices and keys that exist: before Hydra composes, so that we say what is wrong."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Any

from halos.config.suggest import about_loss, kind_of, nearest, schema_keys, unknown_key
from halos.config.values import describe, show
from halos.errors import UserError
from halos.repository import COMMAND

Choices = Mapping[str, Sequence[str]]


@dataclass(frozen=True, slots=True)
class Override:
    """One override. `values` holds its value, or those that a sweep would try; none where they cannot be counted."""

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
        """Whether it picks an option of a group, as in loss=dpo, rather than setting a key."""
        return self.key in choices and not any(isinstance(value, Mapping) for value in self.values)


def unreadable(text: str, reason: str) -> str:
    """The message for what Hydra's parser cannot read: nearly always a character that needs quotes."""
    key, equal, value = text.partition("=")
    if key.startswith("-"):
        return f"there is no option {key}: keys are typed without dashes, {key.lstrip('-')}={value or '...'}; --help lists them"
    if not equal:
        return f"{text!r} is not key=value; a value with spaces needs quotes around the whole, 'key=[a, b]'"
    if not key.lstrip("+~") or not set(key.lstrip("+~")) <= set(_KEY):
        return f"{text!r} is not key=value: {key!r} cannot be a key; entries of a list are named by a dot, data.train.0.path="
    opened = sum(value.count(mark) for mark in "[{(") - sum(value.count(mark) for mark in "]})")
    if opened > 0:
        return f"{text!r} ends inside a bracket: leave out the space after it, or put quotes around the whole, '{text} ...'"
    if value.startswith("["):
        return f"cannot read {text!r} ({reason}); quote the item that it stumbles over, and the whole for the shell"
    inner = value.strip("'\"").replace('"', r"\"")
    shown = shlex.quote(f'{key}="{inner}"')
    return f"cannot read {text!r} ({reason}); quote the value, twice because the shell takes one pair: {shown}"


_KEY = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.-/@:$"


def check_choices(typed: Sequence[Override], choices: Choices, *, multirun: bool) -> None:
    """Raises UserError for a choice that does not exist, and for commas outside a sweep."""
    for one in typed:
        if one.is_sweep and not multirun:
            raise UserError(_comma(one, choices))
        if one.is_hydra or not one.chooses(choices):
            continue
        options = ", ".join(choices[one.key]) or f"none yet; put a file into config/{one.key}"
        if one.sign:
            what = (
                "cannot be removed" if one.sign == "~" else f"is a choice that is always made: write {one.key}={one.value_text}"
            )
            raise UserError(f"{one.text}: {one.key} {what}; choices: {options}")
        for value in one.values:
            if not isinstance(value, str) or value not in choices[one.key]:
                raise UserError(unknown_choice(one.key, value, choices))


def unknown_choice(group: str, value: Any, choices: Choices) -> str:
    """The message for a choice that a group does not have: what is meant, as far as it can be told, comes last."""
    options = ", ".join(choices[group]) or f"none yet; put a file into config/{group}"
    if group == "logging" and isinstance(value, list):
        return _both_trackers([str(each) for each in value], choices)
    if group == "loss" and (told := about_loss(str(value))):
        return f"loss has no choice {show(value)}: {told}. Choices: {options}"
    return f"{group} has no choice {show(value)}; choices: {options}{_suggestion(group, str(value), choices)}"


def unknown_inner_loss(value: str, known: Sequence[str]) -> str:
    """The same for online.loss, which names a loss and chooses none."""
    near, told = nearest(value, known), about_loss(value)
    said = f"{told}." if told else f"did you mean {near}?" if near else "it is no loss of config/loss."
    return f"online.loss={value}: {said} It takes {', '.join(known)}"


def _both_trackers(asked: Sequence[str], choices: Choices) -> str:
    """How several trackers are had: one by its choice, each other one as a hook."""
    if any(name not in TRACKERS or name not in choices["logging"] for name in asked) or len(asked) < 2:
        return f"logging takes one choice, of {', '.join(choices['logging'])}, not {show(list(asked))}"
    first, *others = sorted(asked, key=lambda name: name != "wandb")
    more = " ".join(shlex.quote(f"+hooks.{name}={{_target_: {TRACKERS[name]}}}") for name in others)
    return f"logging takes one choice; for {' and '.join(asked)} at once type logging={first} {more}"


TRACKERS = {"wandb": "halos.hooks.trackers.Wandb", "tensorboard": "halos.hooks.trackers.TensorBoard"}


def resolve_keys(typed: Sequence[Override], choices: Choices, known: Sequence[str]) -> list[Override]:
    """Key overrides as Hydra shall apply them; raises UserError for keys that do not exist, however they were spelled.

    `known` are the keys of the configuration that the choices alone compose to. Children of a free mapping
    (`peft.rank_pattern.q_proj=8`) need no plus sign.
    """
    return [one if one.is_hydra or one.chooses(choices) else _resolve_one(one, choices, known) for one in typed]


def _resolve_one(one: Override, choices: Choices, known: Sequence[str]) -> Override:
    kind = kind_of(one.key)
    exists = one.key in known
    if kind == "unknown" and not exists:
        raise UserError(unknown_key(one.key, [*known, *choices]))
    if one.sign == "~":
        if kind == "free" and exists:
            return one
        if kind == "free":
            raise UserError(f"{one.text}: {unknown_key(one.key, known)}")
        raise UserError(f"{one.text}: a key cannot be removed; give it a value, or null where it takes null")
    if one.sign == "+" and (exists or kind == "value"):
        raise UserError(f"{one.text}: {one.key} exists already: write {one.key}={one.value_text}")
    if one.key in choices:
        return replace(one, sign="")  # a mapping for a whole section, which Hydra merges
    plain = exists and not any(isinstance(value, Mapping) for value in one.values)
    return replace(one, sign="" if plain else "++")  # of a mapping's own keys none need exist


def _comma(one: Override, choices: Choices) -> str:
    several = f"{one.key}={one.value_text}"
    if describe(schema_keys().get(one.key)) == "a list":
        return f"{several}: {one.key} takes a list, in brackets: {one.key}=[{one.value_text}]"
    if one.key == "logging" and all(str(value) in TRACKERS for value in one.values):
        return f"{_both_trackers([str(value) for value in one.values], choices)}; to try each, sweep with {COMMAND} -m"
    if one.key in choices:
        return f"{several}: {one.key} takes one choice; to try each, sweep with {COMMAND} -m"
    quoted = f"'{one.key}=\"{one.value_text}\"'"
    return f"{several} means one run for each value, which needs -m; for the text itself quote it twice: {quoted}"


def _suggestion(group: str, value: str, choices: Choices) -> str:
    near = nearest(value, choices[group])
    if near:
        return f" (did you mean {group}={near}?)"
    is_path = "/" in value or "." in value
    if group == "model" and is_path:
        return f"; a directory, hub id or file goes into model.name_or_path={value}"
    if group == "data" and is_path:
        return f"; files go into data.train=[{value}] data.eval=[...]"
    other = next((name for name, options in choices.items() if get_close_matches(value, options, 1, 0.8)), None)
    return f" (did you mean {other}={value}?)" if other else ""


def quote_nested(word: str) -> str:
    """`online.overrides=[loss.beta=0.3]` as Hydra's grammar takes it, each override in quotes; other words as they are."""
    key, sign, value = word.partition("=")
    value = value.strip()
    if key.lstrip("+") != "online.overrides" or not sign or not (value.startswith("[") and value.endswith("]")):
        return word
    items = [item.strip() for item in _split(value[1:-1])]
    return f"{key}=[{','.join(_in_quotes(item) for item in items if item)}]"


def _in_quotes(item: str) -> str:
    if item[0] in "'\"" and item[-1] == item[0]:
        return item
    escaped = item.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


def _split(text: str) -> list[str]:
    """At commas that stand in no bracket and no quotes."""
    items, depth, quote = [""], 0, ""
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"":
            quote = letter
        depth += (letter in "[{(") - (letter in ")}]") if not quote else 0
        if letter == "," and not depth and not quote:
            items.append("")
        else:
            items[-1] += letter
    return items
