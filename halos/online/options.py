"""Command-line options of the stage commands, derived from the schema: one option per key, with the YAML's default and comment as
its help; and back, from settings to arguments."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, fields
from datetime import date
from types import NoneType
from typing import Any, Generic, TypeVar, get_args, get_origin, get_type_hints

import yaml

from halos.config import defaults
from halos.config.cross_checks import idle_scorer_keys
from halos.config.ranges import check_ranges
from halos.config.rollout_modules import scorer_class, scorer_names
from halos.config.schema import Feedback, Sampler, Scorer
from halos.config.secrets import refuse_secrets
from halos.config.values import MisfitError, describe, fit
from halos.errors import UserError

T = TypeVar("T", Sampler, Scorer, Feedback)


@dataclass(frozen=True)
class Options(Generic[T]):
    """The options of one section of the configuration. A new key there becomes an option by itself."""

    schema: type[T]
    names: Mapping[str, str] = field(default_factory=dict)  # of options whose name differs from their key
    by_command: tuple[str, ...] = ()  # keys that the command parses itself

    def add(self, parser: argparse._ActionsContainer) -> None:
        texts, values = defaults.help_texts(self.schema), defaults.section(self.schema)
        for name, kind in self._keys().items():
            default, option, dest = getattr(values, name), self.flag(name), self.names.get(name, name)
            text = " ".join(filter(None, [texts[name], f"(default {default})" if default is not None else ""])).replace("%", "%%")
            if kind is bool:
                assert default is False, f"{name}: a flag cannot be turned off"
                parser.add_argument(option, action="store_true", dest=dest, help=text)
            else:
                metavar = "N" if {int, float} & {kind, *get_args(kind)} else dest.upper()
                parser.add_argument(option, type=_parser_of(kind), default=default, dest=dest, help=text, metavar=metavar)

    def read(self, args: argparse.Namespace, **by_command: Any) -> T:
        """The settings from parsed arguments. Raises UserError for a secret, and for a value out of its range."""
        values = {name: getattr(args, self.names.get(name, name)) for name in self._keys()} | by_command
        refuse_secrets(values, spelled=lambda key: self._spelled(key.partition(".")[0], values))
        check_ranges(values, self.schema, spelled=self.flag)
        return defaults.section(self.schema, **values)

    def arguments(self, settings: T, only: Collection[str] | None = None) -> list[str]:
        """The command-line arguments for these settings, or for `only` these keys of them, without what the command parses."""
        arguments = []
        for name, kind in self._keys().items():
            if only is not None and name not in only:
                continue
            value = getattr(settings, name)
            if kind is bool:
                arguments += [self.flag(name)] if value else []
            elif value is not None or getattr(defaults.section(self.schema), name) is not None:
                arguments += [self.flag(name), "null" if value is None else str(value)]
        return arguments

    def flag(self, name: str) -> str:
        return f"--{self.names.get(name, name).replace('_', '-')}"

    def _spelled(self, name: str, values: Mapping[str, Any]) -> str:
        return self.flag(name)

    def _keys(self) -> dict[str, Any]:
        kinds = get_type_hints(self.schema)
        return {each.name: kinds[each.name] for each in fields(self.schema) if each.name not in self.by_command}


@dataclass(frozen=True)
class ScorerOptions(Options[Scorer]):
    """The options of online.scorer. A scorer is chosen by the option that its class declares, which gives one of its keys."""

    def add_choice(self, parser: argparse._ActionsContainer) -> None:
        """Add the option of every scorer, one of which is required."""
        group = parser.add_mutually_exclusive_group(required=True)
        for name in scorer_names():
            option, takes = scorer_class(name).option, scorer_class(name).takes
            assert not {*takes} & ({*self.by_command} - {option.key}), f"{name}: no option gives one of its keys"
            text = option.help.replace("%", "%%")
            if option.key is None:
                group.add_argument(option.flag, dest=_dest(name), action="store_true", help=text)
            else:
                action = "append" if self._is_list(option.key) else "store"
                group.add_argument(option.flag, dest=_dest(name), action=action, metavar=option.metavar, help=text)

    def read_choice(self, args: argparse.Namespace) -> Scorer:
        """The settings of the scorer that was chosen. Raises UserError for a value that cannot be read or is out of its range."""
        name = next(name for name in scorer_names() if getattr(args, _dest(name)) not in (None, False))
        option, given = scorer_class(name).option, getattr(args, _dest(name))
        if given == "" or (isinstance(given, list) and "" in given):
            raise UserError(f"{option.flag} '' names nothing: it takes {option.help}")
        values: dict[str, Any] = {key: [] if self._is_list(key) else None for key in self.by_command if key != "name"}
        if option.key is not None:
            values[option.key] = [_parsed(entry, option.flag) for entry in given] if self._is_list(option.key) else given
        settings = self.read(args, name=name, **values)
        if idle := idle_scorer_keys(settings):
            takes = ", ".join(self.flag(key) for key in scorer_class(name).takes if key in self._keys()) or "no other option"
            raise UserError(f"{self.flag(idle[0])} has no effect with {option.flag}, which takes {takes}: leave it out")
        return settings

    def choice(self, settings: Scorer) -> list[str]:
        """The command-line arguments that choose the scorer of these settings."""
        option = scorer_class(settings.name).option
        if option.key is None:
            return [option.flag]
        value = getattr(settings, option.key)
        entries = value if isinstance(value, list) else [value]
        return [word for entry in entries for word in (option.flag, _flow(entry))]

    def _spelled(self, name: str, values: Mapping[str, Any]) -> str:
        return scorer_class(values["name"]).option.flag if name in self.by_command else self.flag(name)

    def _is_list(self, key: str) -> bool:
        return get_origin(get_type_hints(self.schema)[key]) is list


def _keys_of_choices() -> tuple[str, ...]:
    """The keys that the options of the scorers give."""
    return tuple(dict.fromkeys(key for name in scorer_names() if (key := scorer_class(name).option.key) is not None))


SAMPLER = Options(Sampler, {"name": "sampler", "model": "served_model"})
SCORER = ScorerOptions(Scorer, by_command=("name", *_keys_of_choices()))
FEEDBACK = Options(Feedback, by_command=("kind",))


def _dest(scorer: str) -> str:
    return f"scorer {scorer}"  # which no other option has


def _flow(entry: Any) -> str:
    """An entry of a list as one line of YAML."""
    return entry if isinstance(entry, str) else yaml.safe_dump(entry, default_flow_style=True, width=10_000).strip()


def _parsed(entry: str, flag: str) -> Any:
    try:
        return yaml.safe_load(entry)
    except yaml.YAMLError as error:
        raise UserError(f"{flag} cannot be read: {' '.join(str(error).split())}") from error


def _parser_of(kind: Any) -> Callable[[str], Any]:
    nullable = NoneType in get_args(kind)

    def parse(text: str) -> Any:
        if text == "null" and nullable:
            return None
        try:
            return fit(text, kind)
        except MisfitError as error:
            raise argparse.ArgumentTypeError(f"takes {describe(kind)}, not {text!r}") from error

    return parse


def day(text: str) -> date:
    """The value of an option that is a day, such as 2026-07-31."""
    return date.fromisoformat(text)
