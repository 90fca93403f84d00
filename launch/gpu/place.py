"""Where a check runs, what it is given, and what it returns."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
MODULES = [ROOT / "launch", ROOT / "launch" / "compare", ROOT]  # for PYTHONPATH: this package, what it shares, halos

Run = subprocess.CompletedProcess[str]


@dataclass(frozen=True, slots=True)
class Place:
    work: str  # a scratch directory that all checks share, deleted at the end
    device: str  # cuda, or cpu at toy sizes
    quick: bool
    card: dict[str, Any] = field(default_factory=dict)  # what the check `environment` has found out

    @property
    def cuda(self) -> bool:
        return self.device == "cuda"

    def model(self, name: str) -> Path:
        return Path(self.work) / "models" / name

    def run(self, name: str) -> Path:
        return Path(self.work) / "runs" / name

    def log(self, name: str) -> Path:
        return Path(self.work) / "logs" / f"{name}.txt"

    def dump(self) -> str:
        return json.dumps(asdict(self))

    def train(self, name: str, *words: str, start: Sequence[str] = (), more: Mapping[str, str] | None = None) -> Run:
        """Run train.py with these words in the run directory `name`; its output is also appended to the log of that name.
        `start`: arguments of the interpreter before train.py, such as a launcher's. `more`: environment variables."""
        command = [sys.executable, *start, str(ROOT / "train.py"), f"output_root={Path(self.work) / 'runs'}", f"exp_name={name}"]
        return self.command(name, [*command, *words], more)

    def resume(self, name: str, *words: str) -> Run:
        return self.command(name, [sys.executable, str(ROOT / "train.py"), f"resume={self.run(name)}", *words])

    def command(self, name: str, command: Sequence[str], more: Mapping[str, str] | None = None) -> Run:
        """Run a command; what it says goes to the log as it comes, so that a check that is killed leaves it there."""
        path = self.log(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+") as log:
            print(f"$ {' '.join(command)}", file=log, flush=True)
            start = log.tell()
            environment = {**os.environ, **(more or {})}
            status = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=environment, check=False).returncode
        said = path.read_bytes()[start:].decode(errors="replace")
        with path.open("a") as log:
            print(f"exit status {status}", file=log)
        return subprocess.CompletedProcess(list(command), status, said, "")

    def metrics(self, name: str, split: str = "train") -> list[dict[str, Any]]:
        path = self.run(name) / "metrics.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
        return [row for row in rows if row.get("split") == split]


@dataclass(frozen=True, slots=True)
class Result:
    status: str  # passed | failed | skipped
    figure: str  # one line for the table: the measurement, or why it failed or was skipped
    data: dict[str, Any] = field(default_factory=dict)  # everything measured, for the JSON

    @classmethod
    def of(cls, passed: bool, figure: str, **data: Any) -> "Result":
        return cls("passed" if passed else "failed", figure, data)

    @classmethod
    def crash(cls, done: Run, what: str = "") -> "Result":
        """Of a command that should have succeeded: its exit status and what it said last."""
        said = [line.strip() for line in done.stdout.splitlines() if line.strip()]
        end = said[-1][:300] if said else "no output"
        return cls("failed", f"{what}exit status {done.returncode}: {end}", {"said": said[-15:]})
