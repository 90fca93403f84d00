"""Command-line options of the stage commands, derived from the schema: one option per key, with the YAML's default and comment as
its help; and back, from settings to arguments."""

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
        """The settings from parsed arguments. Raises UserError for a value out of its range."""
        values = {name: getattr(args, self.names.get(name, name)) for name in self._keys()} | by_command
        check_ranges(values, self.schema, spelled=self.flag)
        return defaults.section(self.schema, **values)

    def arguments(self, settings: T) -> list[str]:
        """The command-line arguments for these settings, without the keys that the command parses itself."""
        arguments = []
        for name, kind in self._keys().items():
            value = getattr(settings, name)
            if kind is bool:
                arguments += [self.flag(name)] if value else []
            elif value is not None or getattr(defaults.section(self.schema), name) is not None:
                arguments += [self.flag(name), "null" if value is None else str(value)]
        return arguments

    def flag(self, name: str) -> str:
        return f"--{self.names.get(name, name).replace('_', '-')}"

    def _keys(self) -> dict[str, Any]:
        kinds = get_type_hints(self.schema)
        return {each.name: kinds[each.name] for each in fields(self.schema) if each.name not in self.by_command}


SAMPLER = Options(Sampler, {"name": "sampler", "model": "served_model"})
SCORER = Options(Scorer, by_command=("name", "functions", "model"))
FEEDBACK = Options(Feedback, by_command=("kind",))


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
