"""The checks of `python -m halos.losses.certify` as a table over a peer's losses and some of ours."""

from collections.abc import Sequence
from typing import Any

from halos.certify.case import Case
from halos.certify.certificate import CHECKS, certify
from halos.certify.subjects import named
from halos.errors import first_line_of

SHOWN = [name for name in CHECKS if name != "cost"]  # worked numbers, mutants and cost are ours alone


def without_gradients(case: Case) -> None:
    for entry in case.policy.entries.values():
        for leaf in entry.values():
            leaf.grad = None


def printed(peer: str, subjects: Sequence[Any], ours: Sequence[str]) -> list[str]:
    """Print a row of verdicts for each of the peer's losses, and for each of `ours` by name; return what failed, in lines.

    The subjects have a `name` besides what halos.certify.case.Subject says.
    """
    print(_line("loss", SHOWN))
    print(_line("---", ["---"] * len(SHOWN)))
    notes = []
    for loss in subjects:
        verdicts = []
        for name in SHOWN:
            try:
                finding = CHECKS[name](loss)
                verdicts.append(finding.verdict)
                notes += [f"- {loss.name}, {name}: {finding.evidence}"] if finding.verdict == "FAIL" else []
            except Exception as error:  # of the peer's
                verdicts.append("raises")
                notes.append(f"- {loss.name}, {name}: it raises {type(error).__name__}: {first_line_of(error)}")
        print(_line(f"{peer} {loss.name}", verdicts), flush=True)
    for name in ours:
        found = {check.name: check.verdict for check in certify(named(name, {}, [], None)).checks}
        print(_line(f"halos `{name}`", [found[each] for each in SHOWN]), flush=True)
    return notes


def _line(name: str, verdicts: Sequence[str]) -> str:
    return f"| {name} | {' | '.join(verdicts)} |"
