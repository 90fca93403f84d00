"""Display a sweep's jobs: a table redrawn in place on a terminal, or a line per change in a log."""

import shutil
import sys
import time
from collections.abc import Sequence
from typing import TextIO

from halos.sweep.job import Job, Progress, progress
from halos.sweep.pool import Outcome

MIN_INTERVAL = 1.0  # seconds between two readings of the jobs' files
SUMMARY_INTERVAL = 60.0  # seconds between two summaries in a log
ORDER = ("running", "failed", "stopped", "finished", "waiting")


class StatusTable:
    """Shows the outcomes that it is called with, at most once per MIN_INTERVAL unless one has changed."""

    def __init__(self, jobs: Sequence[Job], stream: TextIO = sys.stderr) -> None:
        self.jobs, self.stream = jobs, stream
        self._num_lines, self._last_read, self._last_summary = 0, 0.0, time.monotonic()
        self._states: dict[int, str] = {}
        self._first_seen: dict[int, tuple[float, int]] = {}  # job -> time and step at which it was first seen stepping

    def __call__(self, outcomes: Sequence[Outcome]) -> None:
        now, changed = time.monotonic(), {n: one.state for n, one in enumerate(outcomes)} != self._states
        if now - self._last_read < MIN_INTERVAL and not changed:
            return
        self._last_read = now
        if self.stream.isatty():
            self._redraw(outcomes)
        else:
            self._log(outcomes, now)
        self._states = {number: one.state for number, one in enumerate(outcomes)}

    def row(self, number: int, outcome: Outcome) -> tuple[str, ...]:
        """Return a job's number, state, step, loss, time left, and overrides."""
        job = self.jobs[number]
        if outcome.earlier:
            return (str(job.number), "finished", "", "", "before", job.label)
        seen = progress(job) if outcome.state != "waiting" else Progress(0, None, None)
        step = f"{seen.step}/{seen.total}" if seen.total else ""
        loss = "" if seen.loss is None else f"{seen.loss:.4f}"
        left = self._left(number, seen) if outcome.state == "running" else duration(outcome.seconds) if outcome.seconds else ""
        return (str(job.number), outcome.state, step, loss, left, job.label)

    def _left(self, number: int, seen: Progress) -> str:
        if not seen.total or not seen.step:
            return ""
        when, first = self._first_seen.setdefault(number, (time.monotonic(), seen.step))
        if seen.step <= first:
            return ""
        return duration((seen.total - seen.step) * (time.monotonic() - when) / (seen.step - first)) + " left"

    def _redraw(self, outcomes: Sequence[Outcome]) -> None:
        width, height = shutil.get_terminal_size()
        numbers = sorted(range(len(outcomes)), key=lambda number: (ORDER.index(outcomes[number].state), number))
        shown = sorted(numbers[: max(1, height - 4)])
        lines = table([("job", "state", "step", "loss", "time", "overrides")] + [self.row(n, outcomes[n]) for n in shown])
        lines.append(counts(outcomes))
        up = f"\x1b[{self._num_lines}F" if self._num_lines else ""
        self.stream.write(up + "".join(f"{line[: width - 1]}\x1b[K\n" for line in lines) + "\x1b[J")
        self.stream.flush()
        self._num_lines = len(lines)

    def _log(self, outcomes: Sequence[Outcome], now: float) -> None:
        changed = [n for n, one in enumerate(outcomes) if one.state not in ("waiting", self._states.get(n))]
        if not changed and now - self._last_summary > SUMMARY_INTERVAL:
            changed = [n for n, one in enumerate(outcomes) if one.state == "running"]
        for number in changed:
            job, state, *rest = self.row(number, outcomes[number])
            self.stream.write(f"job {job} {state:8s} {'  '.join(word for word in rest if word)}\n")
        if changed:
            self._last_summary = now
            self.stream.flush()


def counts(outcomes: Sequence[Outcome]) -> str:
    """Count the states: `3 finished, 1 running, 4 waiting`."""
    states = [outcome.state for outcome in outcomes]
    return ", ".join(f"{states.count(state)} {state}" for state in ORDER if state in states)


def table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Align the columns of rows."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def duration(seconds: float) -> str:
    """Format seconds as `2:05`, or `1:02:05` with hours."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
