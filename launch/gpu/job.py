"""A check in a process of its own, with a deadline; and the process that it is: `python -m gpu.job NAME OUTPUT < place.json`."""

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil

from gpu.place import Place, Result
from gpu.plan import BY_NAME, Check

LAST_LINES = 15  # of a failed check's output, for the JSON
GRACE = 5.0  # seconds for a killed process to go: one that waits for a broken driver may never do


class Job:
    """`command` writes its result to `output`."""

    def __init__(self, check: Check, command: list[str], given: str, *, output: Path, log: Path, seconds: float) -> None:
        self.check, self.output, self.log, self.seconds = check, output, log, seconds
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w") as file:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=file, stderr=file, text=True, start_new_session=True
            )
        self.began, self.was_killed = time.monotonic(), False
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(given)
            self.process.stdin.close()
        except BrokenPipeError:  # it has failed already
            pass

    @property
    def spent(self) -> float:
        return time.monotonic() - self.began

    def finished(self) -> bool:
        """Whether it has ended; one that is past its deadline is killed."""
        if self.process.poll() is not None:
            return True
        self.was_killed = self.spent >= self.seconds
        if self.was_killed:
            self.kill()
        return self.was_killed

    def kill(self) -> None:
        """Kill it and all that it has started, in sessions of their own too."""
        try:
            below = psutil.Process(self.process.pid).children(recursive=True)
        except psutil.Error:
            below = []
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        for each in below:
            with suppress(psutil.Error):
                each.kill()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(GRACE)

    def row(self) -> dict[str, Any]:
        """Its line of the table."""
        about = {"name": self.check.name, "expected": self.check.expected, "seconds": round(self.spent, 1)}
        if self.output.is_file():
            return about | json.loads(self.output.read_text())
        below = self.log.with_name(f"{self.check.name}.txt")  # of a run that it has started
        logs = [log.read_text(errors="replace").strip().splitlines() for log in (below, self.log) if log.is_file()]
        said = [line for lines in logs for line in lines[-LAST_LINES:]]
        if self.was_killed:
            why = f"killed after {self.seconds:.0f} s"
        else:
            why = f"status {self.process.poll()}: {said[-1][:300] if said else 'no output'}"
        return about | {"status": "failed", "figure": why, "data": {"said": said}}


def main() -> None:
    name, output = sys.argv[1:]
    place, check = Place(**json.loads(sys.stdin.read())), BY_NAME[name]
    module, function = check.function.split(".")
    result: Result = getattr(importlib.import_module(f"gpu.{module}"), function)(name, place)
    hidden = Path(f"{output}.part")
    hidden.write_text(json.dumps(asdict(result)))
    hidden.rename(output)


if __name__ == "__main__":
    main()
