"""Verifiable rewards: functions of the text, run in worker processes so that none can block or crash the run."""

from __future__ import annotations

import hashlib
import inspect
import math
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import import_module
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from types import ModuleType
from typing import Any

from halos.config.plugins import make_importable
from halos.config.schema import Scorer as Settings
from halos.config.suggest import nearest
from halos.errors import UserError
from halos.rollout.types import Row, Sample, Score, text_of

OWN = "halos.online.rewards"  # the dotted path that users write and files record
MODULES = {OWN: "halos.rollout.rewards"}  # where the code is
PACKAGES = {"math_verify": "math-verify"}  # import name to pip's name


@dataclass(frozen=True, slots=True)
class Part:
    """One reward function of a weighted sum, with its keys."""

    path: str
    weight: float
    settings: Mapping[str, Any]

    def load(self) -> Callable[[str, Mapping[str, Any]], float]:
        function = _function(self.path)
        return lambda completion, row: function(completion, row, **self.settings)


def parts_of(entries: Sequence[Any], plugins: Sequence[str]) -> list[Part]:
    """Parse `functions`: names in halos.online.rewards, dotted paths, or {function, weight, ...keys}.

    Raises UserError for anything that is no reward function, or is in a package not listed in plugins.
    """
    if not entries:
        raise UserError("online.scorer.functions is []: name one, such as [exact_match]")
    make_importable(plugins)
    return [_part(entry, plugins) for entry in entries]


def _part(entry: Any, plugins: Sequence[str]) -> Part:
    fields = {"function": entry} if isinstance(entry, str) else entry
    if not isinstance(fields, Mapping) or not isinstance(fields.get("function"), str):
        raise UserError(f"a reward is a name, or {{function: NAME, weight: 1.0, ...}}, not {entry!r}")
    settings = {name: value for name, value in fields.items() if name not in ("function", "weight")}
    path, weight = fields["function"], fields.get("weight", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
        raise UserError(f"{path}: weight={weight!r} is no number")
    path = path if "." in path else f"{OWN}.{path}"
    if not any(path.startswith(f"{package}.") for package in ("halos", *plugins)):
        raise UserError(f"the reward {path} is outside halos: if you trust that package, add plugins=[{path.partition('.')[0]}]")
    module, _, name = path.rpartition(".")
    try:
        imported = _module(module)
    except ImportError as error:
        raise UserError(f"the reward {path} cannot be imported: {error}") from error
    members = vars(imported)
    if not inspect.isfunction(members.get(name)):
        known = [word for word, part in members.items() if inspect.isfunction(part) and part.__module__ == imported.__name__
                 and list(inspect.signature(part).parameters)[:2] == ["completion", "row"]]  # fmt: skip
        near = nearest(name, known)
        raise UserError(f"there is no reward {path}{f'; did you mean {near}?' if near else ''}; {module} has {', '.join(known)}")
    _check_keys(path, members[name], settings)
    needed = next((package for package in PACKAGES if package in inspect.getsource(members[name])), None)
    if needed:
        try:
            import_module(needed)
        except ImportError as error:
            raise UserError(f"the reward {path} needs the package {PACKAGES[needed]}: pip install {PACKAGES[needed]}") from error
    return Part(path, float(weight), settings)


def _check_keys(path: str, function: Callable[..., Any], settings: Mapping[str, Any]) -> None:
    parameters = list(inspect.signature(function).parameters.values())
    if len(parameters) < 2 or any(each.kind is not each.KEYWORD_ONLY for each in parameters[2:]):
        raise UserError(f"{path} is no reward: it takes (completion, row, *, ...)")
    keys = {each.name: each for each in parameters[2:]}
    takes = ", ".join(keys) or "no keys"
    if wrong := [name for name in settings if name not in keys]:
        raise UserError(f"{path} takes no {wrong[0]!r}; it takes {takes}")
    if missing := [name for name, each in keys.items() if each.default is each.empty and name not in settings]:
        raise UserError(f"{path} lacks {missing[0]}; it takes {takes}: {{function: {path}, {missing[0]}: ...}}")


class TrackedRow(dict[str, Any]):
    """A sample's row that records which missing columns were read."""

    def __init__(self, row: Mapping[str, Any]) -> None:
        super().__init__(row)
        self.lacking: dict[str, None] = {}

    def __missing__(self, name: str) -> Any:
        self.lacking[name] = None
        raise KeyError(name)

    def get(self, name: str, default: Any = None) -> Any:
        if super().get(name) is None:
            self.lacking[name] = None
        return super().get(name, default)


def try_on(part: Part, sample: Sample, settings: Settings, plugins: Sequence[str]) -> Score:
    """Try one function on one sample: a bundled one in this process, a user's in a worker, where it cannot block the run."""
    if part.path.startswith(f"{OWN}."):
        return _scored([(part, part.load())], _row(sample))
    functions = Functions([part], replace(settings, processes=1), plugins)
    try:
        return next(score for _, score in functions.score([sample]))
    finally:
        functions.close()


class Functions:
    """A weighted sum of functions. A sample for which one raises, hangs or crashes twice gets no score, and is counted."""

    def __init__(self, parts: Sequence[Part], settings: Settings, plugins: Sequence[str]) -> None:
        self.parts, self.settings, self.plugins = list(parts), settings, list(plugins)
        self._workers: list[Worker] = []  # reused by the next call
        self._crashed: set[int] = set()  # id() of samples on which a worker has died once

    def name(self) -> str:
        return " + ".join(part.path.removeprefix(f"{OWN}.") if part.weight == 1 else f"{part.weight:g} {part.path}"
                          for part in self.parts)  # fmt: skip

    def request(self) -> dict[str, Any]:
        """Everything that decides the scores, the functions' source code included."""
        return {"functions": [[part.path, part.weight, dict(part.settings), _source(part.path)] for part in self.parts],
                "timeout": self.settings.timeout}  # fmt: skip

    def score(self, samples: Sequence[Sample]) -> Iterator[tuple[Sample, Score]]:
        """Yield scores as they come; each worker scores one sample at a time."""
        waiting, workers = list(reversed(samples)), self._workers
        self._crashed.clear()
        while len(workers) < min(self.settings.processes, len(waiting)):
            workers.append(Worker(self.parts, self.plugins))
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
        self._workers[number] = Worker(self.parts, self.plugins)

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
        self.pipe.send(_row(sample))

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
            pipe.send(_scored(functions, pipe.recv()))
    except (EOFError, ConnectionError, KeyboardInterrupt):
        return


def _row(sample: Sample) -> Row:
    """A sample's row as functions see it: without its tokens."""
    return {name: value for name, value in sample.to_row().items() if name not in ("output_ids", "logps")}


def _scored(functions: Sequence[tuple[Part, Callable[[str, Mapping[str, Any]], float]]], row: Row) -> Score:
    parts, total = {}, 0.0
    for part, function in functions:
        tracked = TrackedRow(row)
        try:
            value = function(text_of(row["output"]), tracked)
        except Exception as error:  # an error in a user's function costs only this sample its score
            return Score(None, f"{part.path} raised {type(error).__name__}: {error}", lacking=tuple(tracked.lacking))
        if not isinstance(value, int | float) or not math.isfinite(value):
            return Score(None, f"{part.path} returned {value!r}, which is no finite number")
        parts[part.path.rpartition(".")[2]] = float(value)
        total += part.weight * float(value)
    return Score(total, parts=parts if len(functions) > 1 else {})


def _source(path: str) -> str:
    return hashlib.sha256(inspect.getsource(_function(path)).encode()).hexdigest()[:16]


def _function(path: str) -> Callable[..., Any]:
    module, _, name = path.rpartition(".")
    return vars(_module(module))[name]


def _module(name: str) -> ModuleType:
    return import_module(MODULES.get(name, name))
