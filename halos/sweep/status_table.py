"""A sweep's jobs as a table that stays in its place on a terminal, and as a line for each change in a log."""

import shutil
import sys
import time
from collections.abc import Sequence
from typing import TextIO

from halos.sweep.job import Job, Progress, progress
from halos.sweep.pool import Outcome

MIN_INTERVAL = 1.0  # seconds between two looks at the jobs' files
SUMMARY_INTERVAL = 60.0  # seconds between two summaries in a log
ORDER = ("running", "failed", "stopped", "finished", "waiting")


class StatusTable:
    """Call it with the outcomes as often as you like."""

    def __init__(self, jobs: Sequence[Job], stream: TextIO = sys.stderr) -> None:
        self.jobs, self.stream = jobs, stream
        self._drawn, self._looked, self._said = 0, 0.0, time.monotonic()
        self._known: dict[int, str] = {}
        self._from: dict[int, tuple[float, int]] = {}  # when each job was first seen in a step, and in which

    def __call__(self, outcomes: Sequence[Outcome]) -> None:
        now, changed = time.monotonic(), {n: one.state for n, one in enumerate(outcomes)} != self._known
        if now - self._looked < MIN_INTERVAL and not changed:
            return
        self._looked = now
        if self.stream.isatty():
            self._redraw(outcomes)
        else:
            self._tell(outcomes, now)
        self._known = {number: one.state for number, one in enumerate(outcomes)}

    def row(self, number: int, outcome: Outcome) -> tuple[str, ...]:
        """Number, state, step, loss, time left, and what was typed."""
        job = self.jobs[number]
        if outcome.earlier:
            return (str(job.number), "finished", "", "", "before", job.told)
        seen = progress(job) if outcome.state != "waiting" else Progress(0, None, None)
        step = f"{seen.step}/{seen.total}" if seen.total else ""
        loss = "" if seen.loss is None else f"{seen.loss:.4f}"
        left = self._left(number, seen) if outcome.state == "running" else duration(outcome.seconds) if outcome.seconds else ""
        return (str(job.number), outcome.state, step, loss, left, job.told)

    def _left(self, number: int, seen: Progress) -> str:
        if not seen.total or not seen.step:
            return ""
        when, first = self._from.setdefault(number, (time.monotonic(), seen.step))
        if seen.step <= first:
            return ""
        return duration((seen.total - seen.step) * (time.monotonic() - when) / (seen.step - first)) + " left"

    def _redraw(self, outcomes: Sequence[Outcome]) -> None:
        wide, high = shutil.get_terminal_size()
        numbers = sorted(range(len(outcomes)), key=lambda number: (ORDER.index(outcomes[number].state), number))
        shown = sorted(numbers[: max(1, high - 4)])
        lines = table([("job", "state", "step", "loss", "time", "overrides")] + [self.row(n, outcomes[n]) for n in shown])
        lines.append(counts(outcomes))
        up = f"\x1b[{self._drawn}F" if self._drawn else ""
        self.stream.write(up + "".join(f"{line[: wide - 1]}\x1b[K\n" for line in lines) + "\x1b[J")
        self.stream.flush()
        self._drawn = len(lines)

    def _tell(self, outcomes: Sequence[Outcome], now: float) -> None:
        fresh = [n for n, one in enumerate(outcomes) if one.state not in ("waiting", self._known.get(n))]
        if not fresh and now - self._said > SUMMARY_INTERVAL:
            fresh = [n for n, one in enumerate(outcomes) if one.state == "running"]
        for number in fresh:
            job, state, *rest = self.row(number, outcomes[number])
            self.stream.write(f"job {job} {state:8s} {'  '.join(word for word in rest if word)}\n")
        if fresh:
            self._said = now
            self.stream.flush()


def counts(outcomes: Sequence[Outcome]) -> str:
    """`3 finished, 1 running, 4 waiting`."""
    states = [outcome.state for outcome in outcomes]
    return ", ".join(f"{states.count(state)} {state}" for state in ORDER if state in states)


def table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Columns under each other."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def duration(seconds: float) -> str:
    """`2:05` minutes and seconds, `1:02:05` with hours."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
