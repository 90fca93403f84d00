"""Run jobs in parallel, one per slot, and leave no process behind, however the sweep ends."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from halos import confined
from halos.distributed.children import die_with_parent, failure_reason
from halos.distributed.signals import StopRequest, restore_signals_and_argv
from halos.sweep.job import Job, State
from halos.sweep.slots import Slot

POLL_INTERVAL = 0.2  # seconds between two checks of the jobs
STOP_TIMEOUT = 600.0  # seconds that a job has to save after a stop request


@dataclass
class Outcome:
    """State of a job, and how it ended."""

    state: State = "waiting"
    reason: str = ""  # why it failed
    earlier: bool = False  # finished in an earlier start of the same sweep
    began: float = 0.0  # time.time()
    seconds: float = 0.0


@dataclass
class Running:
    job: Job
    slot: Slot
    process: subprocess.Popen[bytes]
    family: set[psutil.Process] = field(default_factory=set)  # its launcher and all descendants seen so far

    def update_family(self) -> None:
        """Record the descendants: once the launcher is gone, their parent is unknown."""
        try:
            launcher = psutil.Process(self.process.pid)
            self.family |= {launcher, *launcher.children(recursive=True)}
        except psutil.NoSuchProcess:
            pass

    def living(self) -> list[psutil.Process]:
        return [each for each in self.family if each.is_running() and each.status() != psutil.STATUS_ZOMBIE]


Command = Callable[[Job], list[str]]
Watch = Callable[[Sequence[Outcome]], None]


class Pool:
    """`outcomes` has one entry per job, in their order; `watch` is called with them at every check."""

    def __init__(self, jobs: Sequence[Job], slots: Sequence[Slot], command: Command, watch: Watch) -> None:
        self.jobs, self.command, self.watch = jobs, command, watch
        self.outcomes = [Outcome() for _ in jobs]
        self.stopped = False  # by a signal, before all jobs had ended
        self._free, self._running = list(slots), list[Running]()
        self._request = StopRequest()

    def run(self) -> list[Outcome]:
        """Run until every job has ended, or a signal (SIGINT, SIGTERM) has stopped the running ones."""
        waiting = []
        for number, job in enumerate(self.jobs):
            if job.is_done():
                self.outcomes[number] = Outcome("finished", earlier=True)
            else:
                waiting.append(number)
        with restore_signals_and_argv():
            self._request.listen(signals=(signal.SIGINT, signal.SIGTERM), second_interrupt_kills=False)
            while (waiting and not self._request.count) or self._running:
                while waiting and self._free and not self._request.count:
                    self._start(waiting.pop(0))
                self._check()
                if self._request.count and not self.stopped:
                    self.stopped = True
                    self._stop()
                self.watch(self.outcomes)
                time.sleep(POLL_INTERVAL)
        self.watch(self.outcomes)
        return self.outcomes

    def _start(self, number: int) -> None:
        job, slot = self.jobs[number], self._free.pop(0)
        job.log.parent.mkdir(parents=True, exist_ok=True)
        self.outcomes[number] = Outcome("running", began=time.time())
        confined.remove(job.log)  # a link there would be followed
        with job.log.open("xb") as log:
            process = subprocess.Popen(
                self.command(job), stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                env={**os.environ, **slot.environment}, start_new_session=True, preexec_fn=die_with_parent,
            )  # fmt: skip
        self._running.append(Running(job, slot, process))

    def _check(self) -> None:
        for one in list(self._running):
            one.update_family()
            if one.process.poll() is None or (self.stopped and one.living()):
                continue
            self._running.remove(one)
            self._free.append(one.slot)
            number = self.jobs.index(one.job)
            self.outcomes[number] = outcome_of(one.job, one.process.returncode, self.outcomes[number])
            _send_signal(one.living(), signal.SIGTERM)

    def _stop(self) -> None:
        """Request every job to save and exit; at a second signal, or after STOP_TIMEOUT, kill those that remain.

        Only the launcher gets the signal, and forwards it to its ranks; if it dies first, the kernel sends them a stop request.
        """
        for one in self._running:
            one.update_family()
            one.process.terminate()
        deadline = time.monotonic() + STOP_TIMEOUT
        while self._running and time.monotonic() < deadline and self._request.count == 1:
            self._check()
            self.watch(self.outcomes)
            time.sleep(POLL_INTERVAL)
        for one in self._running:
            _send_signal(one.living(), signal.SIGKILL)
            one.process.wait()


def outcome_of(job: Job, status: int, outcome: Outcome) -> Outcome:
    """Return the outcome of a job whose launcher exited with `status`: that of its result.json, if written since it began."""
    seconds = time.time() - outcome.began
    result, path = job.run.read_result(), job.path / "result.json"
    status_in_result = result["status"] if result and path.stat().st_mtime >= outcome.began - 1 else None
    if status_in_result == "finished" or (
        status == 0 and (result is None or result["status"] == "finished")
    ):  # no result: a dry run
        return Outcome("finished", began=outcome.began, seconds=seconds)
    if status_in_result == "stopped":
        return Outcome("stopped", began=outcome.began, seconds=seconds)
    reason = str(result.get("reason") or "") if result and status_in_result == "failed" else ""
    words = failure_reason(job.log)
    return Outcome("failed", f"{reason}\n{words}".strip() if reason not in words else words, began=outcome.began, seconds=seconds)


def _send_signal(processes: Sequence[psutil.Process], signum: signal.Signals) -> None:
    for process in processes:
        try:
            process.send_signal(signum)
        except psutil.NoSuchProcess:
            continue


def log_of(sweep: Path, run: Path) -> Path:
    """Return the path of a job's log: next to the runs, since a run directory is empty until the run starts."""
    return sweep / "logs" / f"{run.name}.log"
