"""The result of a check, in one line."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Verdict = Literal["pass", "FAIL", "exempt", "-"]  # exempt: it fails, as the loss declares with a reason; -: it does not apply


@dataclass(frozen=True, slots=True)
class Finding:
    """`evidence` says what was seen, or why the check does not apply."""

    verdict: Verdict
    evidence: str


@dataclass(frozen=True, slots=True)
class Check:
    """A finding under the name of its check."""

    name: str
    verdict: Verdict
    evidence: str

    @classmethod
    def of(cls, name: str, finding: Finding) -> Check:
        return cls(name, finding.verdict, finding.evidence)


def passed(evidence: str) -> Finding:
    return Finding("pass", evidence)


def failed(evidence: str) -> Finding:
    return Finding("FAIL", evidence)


def not_applicable(why: str) -> Finding:
    return Finding("-", why)


def judged(problem: str | None, good: str) -> Finding:
    return passed(good) if problem is None else failed(problem)
