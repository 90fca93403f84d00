"""The suite: starts checks side by side where they may share the card, kills what hangs, and writes gpu.json and gpu.md."""

import argparse
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from gpu import plan, table
from gpu.job import Job
from gpu.place import MODULES, Place
from gpu.plan import Check

LEAST = 12.0  # seconds that must be left for a check to start
MOST_LANES = 6

Row = dict[str, Any]
Command = Callable[[str, Path], list[str]]  # of a check's name, and the file to which it writes its result


def _command(name: str, output: Path) -> list[str]:
    return [sys.executable, "-m", "gpu.job", name, str(output)]


class Suite:
    """`seconds`: of the whole suite. `slower`: a factor of each check's seconds."""

    def __init__(
        self, checks: Sequence[Check], place: Place, *, seconds: float, slower: float = 1.0, lanes: int | None = None,
        command: Command = _command, say: Callable[[Row], None] = lambda _: None,
    ) -> None:  # fmt: skip
        self.pending, self.place, self.seconds, self.slower = list(checks), place, seconds, slower
        self.lanes, self.command, self.say = lanes, command, say
        self.running, self.rows = list[Job](), list[Row]()
        self.began, self._order = time.monotonic(), [check.name for check in checks]

    @property
    def spent(self) -> float:
        return time.monotonic() - self.began

    def run(self) -> list[Row]:
        """All rows, in the order of the checks; those of an unusable card are left out."""
        try:
            while self.pending or self.running:
                self._collect()
                if self.is_unusable():
                    break
                self._start()
                time.sleep(0.05)
        finally:
            for job in self.running:
                job.kill()
        return sorted(self.rows, key=lambda row: self._order.index(row["name"]))

    def _collect(self) -> None:
        for job in [job for job in self.running if job.finished()]:
            self.running.remove(job)
            self._note(job.row())

    def is_unusable(self) -> bool:
        """Whether no check can run."""
        return any(row["name"] == "environment" and row["status"] == "failed" for row in self.rows)

    def _note(self, row: Row) -> None:
        self.rows.append(row)
        if row["name"] == "environment":
            self.place = replace(self.place, card=row["data"])
        self.say(row)

    def _start(self) -> None:
        """Start what may start now. A check that needs the card alone waits for all before it, and all after it wait."""
        for check in list(self.pending):
            if reason := self._why_not(check):
                self.pending.remove(check)
                self._note({"name": check.name, "expected": check.expected, "seconds": 0.0, "data": {}, **reason})
            elif check.alone and (self.running or check is not self.pending[0]):
                return
            elif self._has_room(check):
                self.pending.remove(check)
                self.running.append(self._job(check))
                if check.alone:
                    return

    def _has_room(self, check: Check) -> bool:
        """Whether a lane is free, and what the check needs is done."""
        if any(job.check.alone for job in self.running):
            return False
        done = {row["name"] for row in self.rows}
        return len(self.running) < self._lanes() and all(name in done for name in check.needs)

    def _lanes(self) -> int:
        if self.lanes is not None:
            return self.lanes
        room = [MOST_LANES, (os.cpu_count() or 2) - 1, int(self.place.card.get("free_gib", MOST_LANES * 6) // plan.ONE_LANE)]
        return max(1, min(room))

    def _why_not(self, check: Check) -> Row | None:
        """Why a check cannot start, as the status and figure of its row."""
        card, status = self.place.card, {row["name"]: row["status"] for row in self.rows}
        if self.place.cuda and card and card["memory_gib"] < check.memory:
            return {"status": "skipped", "figure": f"needs {check.memory} GiB, the card has {card['memory_gib']:.0f}"}
        if self.place.cuda and card and check.half and not card["bfloat16"]:
            return {"status": "skipped", "figure": "the card has no bfloat16"}
        for name in check.needs:
            if status.get(name, "passed") != "passed":
                return {"status": status[name], "figure": f"needs {name}: {status[name]}"}
        if self.seconds - self.spent < LEAST:
            return {"status": "failed", "figure": f"not started: {self.seconds:.0f} s are over"}
        return None

    def _job(self, check: Check) -> Job:
        work = Path(self.place.work)
        output, log = work / "results" / f"{check.name}.json", self.place.log(f"check-{check.name}")
        output.parent.mkdir(parents=True, exist_ok=True)
        seconds = min(check.seconds * self.slower, self.seconds - self.spent)
        return Job(check, self.command(check.name, output), self.place.dump(), output=output, log=log, seconds=seconds)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("out", nargs="?", type=Path, default=Path("runs/gpu"))
    given = parser.parse_args()
    given.only, given.device = os.environ.get("ONLY", ""), os.environ.get("DEVICE", "cuda")
    if given.device not in ("cuda", "cpu"):
        parser.error(f"DEVICE is cuda or cpu, not {given.device!r}")
    try:
        given.checks = plan.chosen(given.only)
    except ValueError as error:
        parser.error(f"ONLY: {error}")
    return given


def prepare_environment(work: Path, device: str) -> None:
    """Set what all processes of the suite inherit."""
    paths = [*map(str, MODULES), *filter(None, [os.environ.get("PYTHONPATH")])]
    quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "WANDB_MODE": "offline", "PYTHONUNBUFFERED": "1"}
    threads = str(max(1, min(4, (os.cpu_count() or 1) // 4)))
    os.environ.update(quiet | {"PYTHONPATH": os.pathsep.join(paths), "HALOS_CACHE": str(work / "cache")})
    os.environ.setdefault("OMP_NUM_THREADS", threads)
    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def notes(place: Place) -> list[str]:
    card = place.card
    if not place.cuda:
        return ["On a CPU, at toy sizes: all models have under a million parameters, and no figure says anything of a GPU."]
    if not card:
        return []
    return [f"{card['name']}, {card['memory_gib']:.0f} GiB ({card['free_gib']:.0f} free), driver {card['driver']},"
            f" torch {card['packages']['torch']}, CUDA {card['cuda']}; {card['peak_is']}"]  # fmt: skip


def main() -> int:
    given = arguments()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(1))  # by way of `finally`: the checks have sessions of their own
    quick = given.only == "quick"
    with tempfile.TemporaryDirectory(prefix="halos-gpu-", ignore_cleanup_errors=True) as work:
        prepare_environment(Path(work), given.device)
        slower = 1.0 if given.device == "cuda" else plan.SLOWER
        place = Place(work, given.device, quick)

        def say(row: Row) -> None:
            figures = f"{row['name']:32} {row['status']:8} {row['seconds']:5.1f} s  {row['figure'][:140]}"
            print(f"[{suite.spent:4.0f} s] {figures}", flush=True)
            table.write(given.out, suite.rows, about())

        def about() -> dict[str, Any]:
            title = f"GPU suite: {suite.place.card.get('name', 'no card')}" if place.cuda else "GPU suite on a CPU"
            now = {"title": title, "seconds": suite.spent, "notes": notes(suite.place)}
            return {**now, "only": given.only, "device": place.device}

        suite = Suite(given.checks, place, seconds=plan.LIMITS[quick] * slower, slower=slower, say=say)
        try:
            rows = suite.run()
        finally:
            logs = given.out / "logs"
            shutil.rmtree(logs, ignore_errors=True)  # those of an earlier suite
            shutil.copytree(Path(work) / "logs", logs)
        table.write(given.out, rows, about())
        if suite.is_unusable():
            print(f"error: {rows[0]['figure']}", file=sys.stderr)
            return 2
        print("\n" + table.markdown(rows, about()) + f"\n{given.out}/gpu.json, gpu.md, logs/")
        return 0 if table.passed(rows) else 1


if __name__ == "__main__":
    sys.exit(main())
