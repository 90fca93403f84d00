"""Worker processes that call reward functions, so that none can block or crash the run."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import count
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from queue import SimpleQueue
from types import ModuleType
from typing import Any

from halos.config.plugins import make_importable
from halos.redaction import write_traceback
from halos.rollout.scorers._evaluate import Function, Outcome, Rows, evaluate, evaluate_async
from halos.rollout.scorers._reward_functions import Part
from halos.rollout.types import Sample

IMPORTS = 60.0  # seconds more for calls that wait for Python to start and for the functions' imports
GRACE = 5.0  # seconds more for async calls, which time themselves out unless one of them blocks the others


@dataclass(eq=False, slots=True)
class Task:
    """A call of some functions, by their numbers, on one sample or on all of a prompt, by theirs."""

    parts: tuple[int, ...]
    numbers: tuple[int, ...]
    samples: Sequence[Sample]
    is_suspect: bool = False  # a process died, or was blocked, with it in flight: it is tried once more, alone

    def failed(self, problem: str) -> tuple[Task, list[Outcome]]:
        return self, [Outcome(problem=problem)] * len(self.samples)


class Pool:
    """Processes that call the same functions: each one task at a time, or, of async functions, one with many in flight."""

    def __init__(
        self, parts: Mapping[int, Part], plugins: Sequence[str], *, processes: int, in_flight: int, timeout: float,
        check: Callable[[], None],
    ) -> None:  # fmt: skip
        """`check` raises where no further process may be started."""
        self.parts, self.plugins, self.processes, self.in_flight = dict(parts), list(plugins), processes, in_flight
        self.timeout, self.check = timeout, check
        self.waiting: deque[Task] = deque()
        self.workers: list[Worker] = []  # reused by the next call

    @property
    def is_busy(self) -> bool:
        return bool(self.waiting) or any(worker.tasks for worker in self.workers)

    def submit(self, tasks: Sequence[Task]) -> None:
        self.waiting.extend(tasks)

    def feed(self) -> list[Any]:
        """Send tasks to the workers that have room; return what to wait for."""
        while len(self.workers) < min(self.processes, len(self.waiting)):
            self.workers.append(self._start())
        for number, worker in enumerate(self.workers):
            if not worker.tasks and not worker.process.is_alive():  # it died while idle
                self._replace(number)
            while self.waiting and self.workers[number].has_room_for(self.waiting[0]):
                self.workers[number].send(self.waiting.popleft())
        busy = [worker for worker in self.workers if worker.tasks]
        return [each for worker in busy for each in (worker.pipe, worker.process.sentinel)]

    def collect(self) -> Iterator[tuple[Task, list[Outcome]]]:
        """Yield finished tasks, and those that were given up."""
        for number, worker in enumerate(self.workers):
            alive = worker.process.is_alive()  # before the results are read, so that none of a dead one is missed
            try:
                yield from worker.receive()
            except (EOFError, OSError):
                alive = False
            if worker.tasks and not alive:
                yield from self._give_up(number, f"its process died (exit status {worker.status()})", retries=True)
            elif worker.is_late():
                yield from self._give_up(number, late(self.timeout), retries=len(worker.tasks) > 1)

    def _give_up(self, number: int, problem: str, *, retries: bool) -> Iterator[tuple[Task, list[Outcome]]]:
        """Replace a worker. Which of its tasks is to blame is seen when each is tried again alone, after all others."""
        tasks = list(self.workers[number].tasks.values())
        self._replace(number)
        for task in tasks:
            if retries and not task.is_suspect:
                task.is_suspect = True
                self.waiting.append(task)
            else:
                yield task.failed(problem)

    def _replace(self, number: int) -> None:
        self.workers[number].kill()
        self.workers[number] = self._start()

    def _start(self) -> Worker:
        self.check()
        return Worker(self.parts, self.plugins, in_flight=self.in_flight, timeout=self.timeout)

    def close(self) -> None:
        """Kill the workers, and drop what they were to do."""
        for worker in self.workers:
            worker.kill()
        self.workers = []
        self.waiting.clear()


def late(timeout: float) -> str:
    return f"took longer than {timeout:g} s"


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
    """A process that calls functions."""

    def __init__(self, parts: Mapping[int, Part], plugins: Sequence[str], *, in_flight: int, timeout: float) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, worker_end = context.Pipe()
        self.is_async = any(part.is_async for part in parts.values())
        self.in_flight, self.timeout = in_flight, timeout
        arguments = (worker_end, dict(parts), list(plugins), timeout if self.is_async else None)
        self.process: BaseProcess = context.Process(target=_main, args=arguments, daemon=True)
        with _without_main():
            self.process.start()
        worker_end.close()
        self.tasks: dict[int, Task] = {}
        self._since: dict[int, float] = {}
        self._tickets, self._is_ready = count(), False
        # rows are sent by a thread: a process that hangs reads nothing, and a row may be larger than the pipe's buffer
        self._outbox: SimpleQueue[Any] = SimpleQueue()
        self._sender = threading.Thread(target=_send_all, args=(self.pipe, self._outbox), daemon=True)
        self._sender.start()

    def has_room_for(self, task: Task) -> bool:
        if task.is_suspect:
            return not self.tasks
        return len(self.tasks) < self.in_flight and not any(each.is_suspect for each in self.tasks.values())

    def send(self, task: Task) -> None:
        ticket = next(self._tickets)
        self.tasks[ticket], self._since[ticket] = task, time.monotonic()
        self._outbox.put((ticket, task.parts, Rows.of(task.samples)))

    def receive(self) -> Iterator[tuple[Task, list[Outcome]]]:
        """Yield what has come. Raises EOFError or OSError where the process is dead."""
        while self.tasks and self.pipe.poll():
            ticket, outcomes = self.pipe.recv()
            if ticket is None:
                self._is_ready, self._since = True, dict.fromkeys(self._since, time.monotonic())
                continue
            del self._since[ticket]
            yield self.tasks.pop(ticket), outcomes

    def is_late(self) -> bool:
        limit = self.timeout + (GRACE if self.is_async else 0.0) + (0.0 if self._is_ready else IMPORTS)
        return any(time.monotonic() - since > limit for since in self._since.values())

    def status(self) -> int | None:
        self.process.join(1)
        return self.process.exitcode

    def kill(self) -> None:
        """Kill the process, with those that its functions have started."""
        if self.process.is_alive() and self.process.pid is not None:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()
        self.process.join()
        self._outbox.put(None)
        self._sender.join(1)
        if not self._sender.is_alive():  # else a process that outlives the worker holds the other end
            self.pipe.close()


def _send_all(pipe: Connection, outbox: SimpleQueue[Any]) -> None:
    with suppress(OSError, ValueError):  # the process is dead, which the receiving side sees too
        while (message := outbox.get()) is not None:
            pipe.send(message)


# --- in the process of a worker ------------------------------------------------------------------------------------------


def _main(pipe: Connection, parts: Mapping[int, Part], plugins: Sequence[str], timeout: float | None) -> None:
    os.setpgid(0, 0)  # so that what the functions start can be killed with it
    threading.Thread(target=_end_with_parent, daemon=True).start()
    work(pipe, parts, plugins, timeout)


def _end_with_parent() -> None:
    """End at the death of the process that started this one, with what the functions have started, even if one hangs."""
    if (parent := multiprocessing.parent_process()) is not None:
        parent.join()
        os.killpg(os.getpgrp(), signal.SIGKILL)


def work(pipe: Connection, parts: Mapping[int, Part], plugins: Sequence[str], timeout: float | None) -> None:
    """Call functions until the other end of the pipe is closed: one task after the other, or, with `timeout` seconds for each,
    many async ones at once."""
    try:
        make_importable(plugins)
        functions = {number: (part, part.load()) for number, part in parts.items()}
        pipe.send((None, []))  # from now on calls are timed
        if timeout is not None:
            asyncio.run(_answer_all(pipe, functions, timeout))
        while True:
            ticket, numbers, rows = pipe.recv()
            pipe.send((ticket, evaluate([functions[number] for number in numbers], rows)))
    except (EOFError, ConnectionError, KeyboardInterrupt):
        return
    except Exception as error:  # such as that of a user's import
        write_traceback(type(error), error, error.__traceback__)
        sys.exit(1)


async def _answer_all(pipe: Connection, functions: Mapping[int, Function], timeout: float) -> None:
    """Raises EOFError when the other end of the pipe is closed."""
    loop, running, closed = asyncio.get_running_loop(), set[asyncio.Task[None]](), asyncio.Event()

    async def answer(ticket: int, numbers: Sequence[int], rows: Rows) -> None:
        problem = late(timeout)
        try:
            async with asyncio.timeout(timeout):
                outcomes = await evaluate_async([functions[number] for number in numbers], rows)
        except (TimeoutError, asyncio.CancelledError) as error:
            problem = problem if isinstance(error, TimeoutError) else "its function cancelled itself"
            outcomes = [Outcome(problem=problem)] * rows.count
        pipe.send((ticket, outcomes))

    def read() -> None:
        try:
            message = pipe.recv()
        except (EOFError, OSError):
            loop.remove_reader(pipe.fileno())
            closed.set()
            return
        task = loop.create_task(answer(*message))
        running.add(task)
        task.add_done_callback(running.discard)

    loop.add_reader(pipe.fileno(), read)
    await closed.wait()
    raise EOFError
