"""What a check found, in one line."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Verdict = Literal["pass", "FAIL", "exempt", "-"]  # exempt: it fails, as the loss declares with a reason; -: it does not apply


@dataclass(frozen=True, slots=True)
class Finding:
    """`found` says what was seen, or why the check does not apply."""

    verdict: Verdict
    found: str


@dataclass(frozen=True, slots=True)
class Check:
    """A finding under the name of its check."""

    name: str
    verdict: Verdict
    found: str

    @classmethod
    def of(cls, name: str, finding: Finding) -> Check:
        return cls(name, finding.verdict, finding.found)


def passed(found: str) -> Finding:
    return Finding("pass", found)


def failed(found: str) -> Finding:
    return Finding("FAIL", found)


def not_applicable(why: str) -> Finding:
    return Finding("-", why)


def judged(problem: str | None, good: str) -> Finding:
    return passed(good) if problem is None else failed(problem)
