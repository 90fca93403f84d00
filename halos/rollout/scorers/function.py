"""Verifiable rewards: functions of the text, run in worker processes so that none can block or crash the run."""

from __future__ import annotations

import multiprocessing
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from types import ModuleType
from typing import Any

from halos.config.plugins import code_hash, make_importable
from halos.config.schema import Scorer as Settings
from halos.errors import UserError
from halos.hashes import json_hash
from halos.redaction import write_traceback
from halos.rollout.scorers._reward_functions import OWN, Part, parts_of, row_of, scored_by, source_hash
from halos.rollout.scorers.scorer import Context, Option, Scorer
from halos.rollout.types import Prompt, Sample, Score


class Functions(Scorer):
    """A weighted sum of functions. A sample for which one raises, hangs or crashes twice gets no score, and is counted."""

    option = Option(
        "--reward", "a function of halos.online.rewards, a dotted path, or a mapping such as '{function: length, weight: 0.1,"
        " target: 50}'; several are added up", key="functions", metavar="NAME",
    )  # fmt: skip
    takes = ("functions", "processes", "timeout")
    addresses = ()
    recorded_since = ("code",)
    full_marks = 1.0  # of exact_match, maths and most of a user's own

    @classmethod
    def code(cls, settings: Settings, *, plugins: Sequence[str]) -> dict[str, str | None]:
        codes = {part.path: code_hash(part.path) for part in parts_of(settings.functions, plugins)}
        return {"functions": json_hash(codes) if any(codes.values()) else None}

    @classmethod
    def open(cls, settings: Settings, context: Context) -> Functions:
        return cls(parts_of(settings.functions, context.plugins), settings, context.plugins)

    def __init__(self, parts: Sequence[Part], settings: Settings, plugins: Sequence[str]) -> None:
        self.parts, self.settings, self.plugins = list(parts), settings, list(plugins)
        self._codes = self._code_hashes()
        self._workers: list[Worker] = []  # reused by the next call
        self._crashed: set[int] = set()  # id() of samples on which a worker has died once

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        """Raises UserError where a function reads a column that no prompt has, tried on a made-up answer to the first prompt."""
        sample = Sample(prompts[0], 0, "1", finish="stop", tokens=1, seed=0, temperature=1.0, generator="policy")
        for part in self.parts:
            for column in self._try(part, sample).lacking:
                if any(prompt.columns.get(column) is not None for prompt in prompts):
                    continue
                raise UserError(
                    f"online.scorer.functions: {part.path.removeprefix(f'{OWN}.')} needs {_describe(column)}, and none of the"
                    f" {len(prompts)} prompts of data.train has one"
                )

    def _try(self, part: Part, sample: Sample) -> Score:
        """Try one function on one sample: a bundled one in this process, a user's in a worker, where it cannot block the run."""
        if part.path.startswith(f"{OWN}."):
            return scored_by([(part, part.load())], row_of(sample))
        alone = Functions([part], replace(self.settings, processes=1), self.plugins)
        try:
            return next(score for _, score in alone.score([sample]))
        finally:
            alone.close()

    def name(self) -> str:
        return " + ".join(part.path.removeprefix(f"{OWN}.") if part.weight == 1 else f"{part.weight:g} {part.path}"
                          for part in self.parts)  # fmt: skip

    def request(self) -> dict[str, Any]:
        """Everything that decides the scores, the functions' source code and all that a user's own import included."""
        codes = self._code_hashes()
        return {"functions": [[part.path, part.weight, dict(part.settings), source_hash(part.path)] for part in self.parts],
                **({"code": json_hash(codes)} if codes else {}), "timeout": self.settings.timeout}  # fmt: skip

    def _code_hashes(self) -> dict[str, str]:
        """Hash the user's own functions, by path."""
        return {part.path: code for part in self.parts if (code := code_hash(part.path)) is not None}

    def score(self, samples: Sequence[Sample]) -> Iterator[tuple[Sample, Score]]:
        """Yield scores as they come; each worker scores one sample at a time."""
        waiting, workers = list(reversed(samples)), self._workers
        self._crashed.clear()
        while len(workers) < min(self.settings.processes, len(waiting)):
            workers.append(self._start_worker())
        try:
            while waiting or any(worker.sample for worker in workers):
                yield from self._round(waiting)
        finally:
            if any(worker.sample for worker in workers):
                self.close()  # the caller has stopped: nobody will receive what they are computing

    def _round(self, waiting: list[Sample]) -> Iterator[tuple[Sample, Score]]:
        """Feed idle workers; collect finished and timed-out ones. A sample whose worker died (out of memory, say) is retried
        once."""
        for number, worker in enumerate(self._workers):
            if worker.sample is None and waiting:
                try:
                    worker.send(waiting[-1])
                    waiting.pop()
                except ConnectionError:  # it died while idle
                    self._replace(number)
            elif worker.sample is not None and worker.is_late(self.settings.timeout):
                late = worker.sample
                self._replace(number)
                yield late, Score(None, f"took longer than {self.settings.timeout:g} s")
        ready = wait([worker.pipe for worker in self._workers if worker.sample is not None], timeout=0.2)
        for number, worker in enumerate(self._workers):
            if worker.pipe not in ready or worker.sample is None:
                continue
            sample = worker.sample
            try:
                score = worker.receive()
            except (EOFError, ConnectionError):
                score = Score(None, f"its process died (exit status {worker.status()})")
                self._replace(number)
                if id(sample) not in self._crashed:
                    self._crashed.add(id(sample))
                    waiting.append(sample)
                    continue
            yield sample, score

    def _replace(self, number: int) -> None:
        self._workers[number].kill()
        self._workers[number] = self._start_worker()

    def _start_worker(self) -> Worker:
        """Raises UserError for code that was edited: a new process would import another version than those before it."""
        now = self._code_hashes()
        if edited := [path for path, code in self._codes.items() if now.get(path) != code]:
            raise UserError(f"the code of the reward {edited[0]} has been edited since this process read it: start a new process")
        return Worker(self.parts, self.plugins)

    def close(self) -> None:
        """Kill the workers."""
        for worker in self._workers:
            worker.kill()
        self._workers = []


@contextmanager
def _without_main() -> Iterator[None]:
    """Processes spawned in here do not import the program that was started: train.py would import Hydra in each."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


class Worker:
    """A process that scores one sample at a time."""

    def __init__(self, parts: Sequence[Part], plugins: Sequence[str]) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, worker_end = context.Pipe()
        self.process: BaseProcess = context.Process(target=_work, args=(worker_end, list(parts), list(plugins)), daemon=True)
        with _without_main():
            self.process.start()
        worker_end.close()
        self.sample: Sample | None = None
        self._since, self._ready = 0.0, False

    def send(self, sample: Sample) -> None:
        self.sample, self._since = sample, time.monotonic()
        self.pipe.send(row_of(sample))

    def receive(self) -> Score:
        score = self.pipe.recv()
        self.sample, self._ready = None, True
        return score

    def is_late(self, timeout: float) -> bool:
        # the first sample also waits for Python to start and for the functions' imports
        return time.monotonic() - self._since > (timeout if self._ready else timeout + 60)

    def status(self) -> int | None:
        self.process.join(1)
        return self.process.exitcode

    def kill(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


def _work(pipe: Connection, parts: Sequence[Part], plugins: Sequence[str]) -> None:
    """Main function of a worker, until the other end of the pipe is closed."""
    try:
        make_importable(plugins)
        functions = [(part, part.load()) for part in parts]
        while True:
            pipe.send(scored_by(functions, pipe.recv()))
    except (EOFError, ConnectionError, KeyboardInterrupt):
        return
    except Exception as error:  # such as that of a user's import
        write_traceback(type(error), error, error.__traceback__)
        sys.exit(1)


def _describe(column: str) -> str:
    """A column as users write it in their data."""
    return "a column `solution` or `answer` (or a right completion)" if column == "solution" else f"a column `{column}`"


SCORER = Functions
