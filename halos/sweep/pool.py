"""Runs jobs, so many at a time, and leaves no process behind, however the sweep ends."""

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

POLL_INTERVAL = 0.2  # seconds between two looks at the jobs
STOP_TIMEOUT = 600.0  # seconds in which a job that was told to stop saves what it has


@dataclass
class Outcome:
    """What has become of a job so far."""

    state: State = "waiting"
    reason: str = ""  # why it failed
    earlier: bool = False  # finished by an earlier start of the same sweep
    began: float = 0.0  # time.time()
    seconds: float = 0.0


@dataclass
class Running:
    job: Job
    place: Slot
    process: subprocess.Popen[bytes]
    family: set[psutil.Process] = field(default_factory=set)  # its launcher and all below it, as far as they were seen

    def look(self) -> None:
        """Remember who is there: after the launcher is gone nobody says whose children they were."""
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
    """`outcomes` has one entry a job, in their order; `watch` is called with them at every look."""

    def __init__(self, jobs: Sequence[Job], places: Sequence[Slot], command: Command, watch: Watch) -> None:
        self.jobs, self.command, self.watch = jobs, command, watch
        self.outcomes = [Outcome() for _ in jobs]
        self.stopped = False  # by a signal, before all jobs were done
        self._free, self._running = list(places), list[Running]()
        self._request = StopRequest()

    def run(self) -> list[Outcome]:
        """Until every job has ended, or a signal (SIGINT, SIGTERM) has stopped those that ran."""
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
                self._look()
                if self._request.count and not self.stopped:
                    self.stopped = True
                    self._stop()
                self.watch(self.outcomes)
                time.sleep(POLL_INTERVAL)
        self.watch(self.outcomes)
        return self.outcomes

    def _start(self, number: int) -> None:
        job, place = self.jobs[number], self._free.pop(0)
        job.log.parent.mkdir(parents=True, exist_ok=True)
        self.outcomes[number] = Outcome("running", began=time.time())
        confined.remove(job.log)  # not written into: a link that stood there would be followed
        with job.log.open("xb") as log:
            process = subprocess.Popen(
                self.command(job), stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                env={**os.environ, **place.environment}, start_new_session=True, preexec_fn=die_with_parent,
            )  # fmt: skip
        self._running.append(Running(job, place, process))

    def _look(self) -> None:
        for one in list(self._running):
            one.look()
            if one.process.poll() is None or (self.stopped and one.living()):
                continue
            self._running.remove(one)
            self._free.append(one.place)
            number = self.jobs.index(one.job)
            self.outcomes[number] = outcome_of(one.job, one.process.returncode, self.outcomes[number])
            _send_signal(one.living(), signal.SIGTERM)

    def _stop(self) -> None:
        """Ask every job to save and leave. Told again, or after PATIENCE, those that are still there are killed.

        Its launcher is told and nobody else: it, or the kernel when it dies, tells the ranks, which a second signal would end.
        """
        for one in self._running:
            one.look()
            one.process.terminate()
        until = time.monotonic() + STOP_TIMEOUT
        while self._running and time.monotonic() < until and self._request.count == 1:
            self._look()
            self.watch(self.outcomes)
            time.sleep(POLL_INTERVAL)
        for one in self._running:
            _send_signal(one.living(), signal.SIGKILL)
            one.process.wait()


def outcome_of(job: Job, status: int, outcome: Outcome) -> Outcome:
    """What has become of a job whose launcher has left with `status`: its own word, if it left one since it began."""
    seconds = time.time() - outcome.began
    result, path = job.run.read_result(), job.path / "result.json"
    said = result["status"] if result and path.stat().st_mtime >= outcome.began - 1 else None
    if said == "finished" or (status == 0 and (result is None or result["status"] == "finished")):  # no result: a dry run
        return Outcome("finished", began=outcome.began, seconds=seconds)
    if said == "stopped":
        return Outcome("stopped", began=outcome.began, seconds=seconds)
    reason = str(result.get("reason") or "") if result and said == "failed" else ""
    words = failure_reason(job.log)
    return Outcome("failed", f"{reason}\n{words}".strip() if reason not in words else words, began=outcome.began, seconds=seconds)


def _send_signal(processes: Sequence[psutil.Process], number: signal.Signals) -> None:
    for process in processes:
        try:
            process.send_signal(number)
        except psutil.NoSuchProcess:
            continue


def log_of(sweep: Path, run: Path) -> Path:
    """Beside the runs, since a run's directory is empty until it begins."""
    return sweep / "logs" / f"{run.name}.log"
