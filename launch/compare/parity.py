"""A row of a table that compares our losses with a peer's: two functions that give the same, or a reason why not."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tensors import Outcome

from halos.types import Loss

TOLERANCE = 2e-6  # relative, of float32 sums


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    ours: str
    theirs: str
    run_ours: Callable[[], Outcome]
    run_theirs: Callable[[], Outcome]
    why_not: str = ""  # how the conventions differ; empty where the two must be equal
    note: str = ""
    gradient_alone: bool = False  # the values may differ by a constant


def means(loss: Loss) -> dict[str, float]:
    return {name: (mean.total / mean.count).item() for name, mean in loss.metrics.items() if mean.count}


def far(ours: float, theirs: float) -> bool:
    return abs(ours - theirs) > 1e-5 * max(1.0, abs(theirs))


def compared(row: Row) -> tuple[str, bool]:
    """Return the row in Markdown, and whether its result is the expected one."""
    ours, theirs = row.run_ours(), row.run_theirs()
    assert ours.gradient.any() or theirs.gradient.any(), f"{row.ours}: there is nothing to compare"
    off = abs(ours.loss - theirs.loss).item()
    gap = (ours.gradient - theirs.gradient).abs().max().item()
    near = row.gradient_alone or off <= TOLERANCE * max(1.0, abs(theirs.loss.item()))
    equal = near and gap <= TOLERANCE * max(1.0, theirs.gradient.abs().max())
    shared = sorted(ours.metrics.keys() & theirs.metrics.keys())
    differing = [name for name in shared if far(ours.metrics[name], theirs.metrics[name])]
    metrics = "-" if not shared or not equal else f"{len(shared) - len(differing)} of {len(shared)}"
    alike = "**equal** gradient" if row.gradient_alone else "**equal**"
    verdict = alike if equal else f"differs: {row.why_not}" if row.why_not else "**DIFFERS, and should not**"
    numbers = f"{ours.loss.item():.7f} | {theirs.loss.item():.7f} | {gap:.0e}"
    return f"| {row.ours} | {row.theirs} | {numbers} | {metrics} | {verdict} | {row.note} |", equal == (not row.why_not)


def printed(peer: str, value: str, rows: Sequence[Row], of: str = "loss", gap: str = "gradient") -> bool:
    """Print a table, and return whether every row is as it is said to be. `peer` and `value` head their columns, `of` ours."""
    print(f"| ours | {peer} | our {of} | {value} | largest {gap} gap | metrics equal | verdict | note |")
    print("|---|---|---|---|---|---|---|---|")
    right = True
    for row in rows:
        line, as_expected = compared(row)
        print(line, flush=True)
        right &= as_expected
    return right
