"""The results of checks: what was checked, and what was found where it does not hold."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from halos.errors import UserError

Level = Literal["error", "warning", "note"]  # an error refuses the run; a note is true of sound data too


@dataclass(frozen=True, slots=True)
class Finding:
    """One sentence on the data, with the first places and a remedy."""

    level: Level
    text: str
    places: tuple[str, ...] = ()
    remedy: str = ""

    def line(self) -> str:
        """Format as `3 prompts have no words (a.jsonl:4, a.jsonl:9, ...): remedy`."""
        places = f" ({', '.join(self.places)})" if self.places else ""
        return f"{self.text}{places}{f': {self.remedy}' if self.remedy else ''}"


@dataclass(frozen=True, slots=True)
class Check:
    """What was checked, as a sentence that holds if there are no findings."""

    name: str
    findings: tuple[Finding, ...] = ()

    @property
    def level(self) -> Level | None:
        """That of the worst finding; None if the check holds."""
        levels: tuple[Level, ...] = ("error", "warning", "note")
        return next((level for level in levels if any(each.level == level for each in self.findings)), None)


def refuse_errors(checks: Iterable[Check]) -> None:
    """Raises UserError with the first finding that is an error."""
    for check in checks:
        for finding in check.findings:
            if finding.level == "error":
                raise UserError(finding.line())


def counted(number: int, one: str, many: str) -> str:
    """Format a number with its noun: `1 row has`, `3 rows have`."""
    return f"{number} {one if number == 1 else many}"


def first_places(places: Sequence[str], total: int) -> tuple[str, ...]:
    """Return places for a message, with dots if there are more."""
    known = tuple(dict.fromkeys(places))[:3]
    return (*known, "...") if known and total > len(known) else known
