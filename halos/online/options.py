"""Options of the stage commands, read off the dataclasses of their settings: an option for each key, with the YAML's default and
its words; and back, from settings to what is typed."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from types import NoneType
from typing import Any, Generic, TypeVar, get_args, get_type_hints

from halos.config import defaults
from halos.config.ranges import check_ranges
from halos.config.schema import Feedback, Sampler, Scorer
from halos.config.values import MisfitError, describe, fit

T = TypeVar("T", Sampler, Scorer, Feedback)


@dataclass(frozen=True)
class Options(Generic[T]):
    """Of one section of the configuration. A new key of it is an option by itself."""

    schema: type[T]
    names: Mapping[str, str] = field(default_factory=dict)  # of options that are not called as their key is
    by_command: tuple[str, ...] = ()  # keys that the command takes in its own way

    def add(self, parser: argparse._ActionsContainer) -> None:
        said, values = defaults.help_texts(self.schema), defaults.section(self.schema)
        for name, kind in self._keys().items():
            default, option, dest = getattr(values, name), self.spelled(name), self.names.get(name, name)
            words = " ".join(filter(None, [said[name], f"(default {default})" if default is not None else ""])).replace("%", "%%")
            if kind is bool:
                assert default is False, f"{name}: an option that is there cannot say false"
                parser.add_argument(option, action="store_true", dest=dest, help=words)
            else:
                shown = "N" if {int, float} & {kind, *get_args(kind)} else dest.upper()
                parser.add_argument(option, type=_reader(kind), default=default, dest=dest, help=words, metavar=shown)

    def read(self, args: argparse.Namespace, **by_command: Any) -> T:
        """The settings that were typed. Raises UserError for what is out of its range."""
        values = {name: getattr(args, self.names.get(name, name)) for name in self._keys()} | by_command
        check_ranges(values, self.schema, spelled=self.spelled)
        return defaults.section(self.schema, **values)

    def words(self, settings: T) -> list[str]:
        """What is typed for these settings, but for what the command takes in its own way."""
        typed = []
        for name, kind in self._keys().items():
            value = getattr(settings, name)
            if kind is bool:
                typed += [self.spelled(name)] if value else []
            elif value is not None or getattr(defaults.section(self.schema), name) is not None:
                typed += [self.spelled(name), "null" if value is None else str(value)]
        return typed

    def spelled(self, name: str) -> str:
        return f"--{self.names.get(name, name).replace('_', '-')}"

    def _keys(self) -> dict[str, Any]:
        kinds = get_type_hints(self.schema)
        return {each.name: kinds[each.name] for each in fields(self.schema) if each.name not in self.by_command}


SAMPLER = Options(Sampler, {"name": "sampler", "model": "served_model"})
SCORER = Options(Scorer, by_command=("name", "functions", "model"))
FEEDBACK = Options(Feedback, by_command=("kind",))


def _reader(kind: Any) -> Callable[[str], Any]:
    nullable = NoneType in get_args(kind)

    def read(text: str) -> Any:
        if text == "null" and nullable:
            return None
        try:
            return fit(text, kind)
        except MisfitError as error:
            raise argparse.ArgumentTypeError(f"takes {describe(kind)}, not {text!r}") from error

    return read
