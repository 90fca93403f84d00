"""One process at a time trains in a run directory: run.lock, taken atomically and released at the end."""

from __future__ import annotations

import json
import logging
import os
import secrets
import socket
import subprocess
import threading
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import Self

from halos import confined
from halos.confined import UnreadableError
from halos.errors import UserError

log = logging.getLogger(__name__)

NAME = "run.lock"
HEARTBEAT = 30.0  # seconds
SILENCE = 600.0  # seconds without a heartbeat after which a process that cannot be looked at counts as gone
EARLIER = 90.0  # the same for one of this very batch job, which its scheduler has ended before it started us
PERIOD = 0.5  # seconds between two looks at a lock that is waited for
LARGEST = 2**16  # bytes of a lock


@dataclass(frozen=True, slots=True)
class Holder:
    """Who holds a lock. A pid means something only on its host and in its pid namespace, and only with its start time."""

    host: str
    pid: int
    process_start: str
    pid_namespace: str
    since: str
    attempt: int
    token: str  # of this one taking
    job: str = ""  # of a batch scheduler
    restart: int = 0  # how often the scheduler has started that job again

    @classmethod
    def myself(cls, attempt: int) -> Self:
        return cls(
            host=socket.gethostname(),
            pid=os.getpid(),
            process_start=_started(os.getpid()) or "",
            pid_namespace=_namespace(),
            since=time.strftime("%Y-%m-%d %H:%M:%S %z"),
            attempt=attempt,
            token=secrets.token_hex(8),
            job=os.environ.get("SLURM_JOB_ID", ""),
            restart=int(os.environ.get("SLURM_RESTART_COUNT") or 0),
        )

    def precedes(self, other: Holder) -> bool:
        """Whether this one ran in an earlier start of the other's batch job."""
        return bool(self.job) and self.job == other.job and self.restart < other.restart

    def __str__(self) -> str:
        return f"pid {self.pid} on {self.host}, since {self.since}"


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a lock that stands in the way is worth."""

    content: bytes
    alive: bool
    why: str
    touched: float | None = None  # the last heartbeat of a holder that cannot be looked at, which may be gone
    earlier: bool = False  # it ran in an earlier start of our batch job, which is always waited for


class Patience:
    """For whose lock may be waited: one of which it cannot be told whether he lives, and a living one for some seconds."""

    def __init__(self, seconds: float = 0.0) -> None:
        self._until = time.monotonic() + seconds
        self._first: Verdict | None = None

    def is_over(self, verdict: Verdict) -> bool:
        """Waits for a moment, unless it is."""
        if self._first is None:
            self._first = verdict
            log.warning("waiting: %s", verdict.why)
        beats = verdict.touched is None or verdict.touched != self._first.touched
        if beats and time.monotonic() >= self._until:
            return True
        time.sleep(PERIOD)
        return False


class RunLock:
    """Held from a run's start or resume to its end, by its first process.

    A lock whose holder ran on this host (and in this pid namespace) counts as long as that very process lives: a pid that
    is gone, or that another process has been given since, leaves a stale lock. A holder that cannot be looked at, on another
    host or in another container, counts until its heartbeat has been silent for ten minutes, or for a minute and a half
    where it ran in an earlier start of the same batch job: the holder touches the file every half minute. A stale lock is
    taken over.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._mine: Holder | None = None
        self._ended = threading.Event()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.release()

    @property
    def held(self) -> bool:
        return self._mine is not None

    def refuse_held(self, *, wait: bool = False, patience: float = 0.0) -> None:
        """Raises UserError where another process trains here now; changes nothing.

        `wait`: until it can be told of every holder whether he lives, and `patience` seconds for one that does.
        """
        waited = Patience(patience)
        while (verdict := self._judge(time.time())) is not None and verdict.alive:
            if not (wait or verdict.earlier) or waited.is_over(verdict):
                raise UserError(verdict.why)

    def acquire(self, attempt: int, *, heartbeat: bool = True, wait: bool = False) -> str | None:
        """Take the lock; of several processes that try at once one does. Raises UserError where it is held, if `wait` is
        set only when its holder has shown that he lives.

        Gives back a line about the stale lock that was taken over, if one was.
        """
        mine = Holder.myself(attempt)
        own = self.path.with_name(f".{self.path.name.lstrip('.')}.{mine.pid}-{mine.token}")
        _write(own, mine)
        line, waited = None, Patience()
        try:
            while not _link(own, self.path):
                os.utime(own)
                verdict = self._judge(own.stat().st_mtime)  # the file system's clock, which all hosts share
                if verdict is not None and verdict.alive:
                    if not (wait or verdict.earlier) or waited.is_over(verdict):
                        raise UserError(verdict.why)
                    continue
                if verdict is not None and self._take_over(own, verdict):
                    line = f"{self.path} was left behind ({verdict.why}): taken over"
                    break
        finally:
            own.unlink(missing_ok=True)
        self._mine = mine
        if heartbeat:
            threading.Thread(target=self._beat, name="run.lock", daemon=True).start()
        return line

    def release(self) -> None:
        """Give the lock back, if it is ours."""
        self._ended.set()
        if self._mine is not None and _read(self.path) == self._mine:
            self.path.unlink(missing_ok=True)
        self._mine = None

    def _take_over(self, own: Path, stale: Verdict) -> bool:
        """Replace a stale lock by ours; False where it is no longer the one that was judged.

        Whoever replaces holds a claim, itself a lock, so that nobody can replace what another has just put there.
        """
        claim = RunLock(self.path.with_name(f".{self.path.name.lstrip('.')}.claim"))
        try:
            claim.acquire(0, heartbeat=False)
        except UserError as error:
            raise UserError(f"another process is just taking over {self.path}: try again in a moment") from error
        with claim:
            try:
                if confined.read_bytes(self.path, within=self.path.parent, most=LARGEST) != stale.content:
                    return False
            except UnreadableError:
                return False
            os.replace(own, self.path)
            return True

    def _judge(self, now: float) -> Verdict | None:
        """None where there is no lock."""
        try:
            content, touched = confined.read_bytes(self.path, within=self.path.parent, most=LARGEST), self.path.stat().st_mtime
        except (UnreadableError, FileNotFoundError):
            if self.path.exists():
                raise
            return None
        holder, place = _parse(content), self.path.parent
        if holder is not None and (holder.host, holder.pid_namespace) == (socket.gethostname(), _namespace()):
            started = _started(holder.pid)
            if started is None:
                return Verdict(content, alive=False, why=f"{holder}: that process is gone")
            if started and holder.process_start and started != holder.process_start:
                return Verdict(content, alive=False, why=f"{holder}: that process is gone, its pid is another's now")
            alive = holder.pid != os.getpid()  # this very process may begin again
            copied = f"if {place} is a copy of the directory in which it does, delete {self.path}"
            return Verdict(content, alive=alive, why=f"another process is training in {place}: {holder}; {copied}")
        who = str(holder) if holder else "its lock cannot be read"
        silent = f"silent for {max(0, now - touched):.0f} s"
        earlier = holder is not None and holder.precedes(Holder.myself(0))
        patience = EARLIER if earlier else SILENCE
        if now - touched > patience:
            return Verdict(content, alive=False, why=f"{who}; {silent}")
        rule = f"it counts as gone after {patience:.0f} s without a heartbeat; if it surely is, delete {self.path}"
        why = f"another process is training in {place}: {who}; {silent}, and {rule}"
        return Verdict(content, alive=True, why=why, touched=touched, earlier=earlier)

    def _beat(self) -> None:
        while not self._ended.wait(HEARTBEAT):
            try:
                if _read(self.path) != self._mine:
                    if not self._ended.is_set():
                        log.error("%s is no longer ours: another process may be training in this directory", self.path)
                    return
                os.utime(self.path, follow_symlinks=False)
            except OSError as error:  # a network file system may come back
                log.warning("%s could not be touched: %s", self.path, error)


def _link(own: Path, path: Path) -> bool:
    """Put `own` at `path`, with its content, unless something is there."""
    try:
        os.link(own, path)
    except FileExistsError:
        return False
    except OSError:  # a file system without hard links
        try:
            with path.open("xb") as file:
                file.write(own.read_bytes())
        except FileExistsError:
            return False
    return True


def _write(path: Path, holder: Holder) -> None:
    with path.open("x", encoding="utf-8") as file:
        file.write(json.dumps(asdict(holder), indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())


def _read(path: Path) -> Holder | None:
    try:
        return _parse(confined.read_bytes(path, within=path.parent, most=LARGEST))
    except UserError:
        return None


def _parse(content: bytes) -> Holder | None:
    """None where a lock was not written by us, or only in part."""
    try:
        holder = Holder(**confined.parse_json(content.decode("utf-8"), NAME))
    except (ValueError, TypeError, UnreadableError):
        return None
    if any(type(getattr(holder, each.name)) is not (int if each.type == "int" else str) for each in fields(holder)):
        return None
    return holder if 0 < holder.pid < 2**31 else None


def _namespace() -> str:
    """In which pids are counted: containers may share a host's name and not its processes."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _started(pid: int) -> str | None:
    """When a process started, in the kernel's own words; empty where that cannot be told, None where there is no such process."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass  # someone else's, but there
    if Path("/proc/self/stat").exists():
        try:
            words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return ""
        return None if words[0] in "ZX" else words[19]
    shown = subprocess.run(["ps", "-o", "stat=,lstart=", "-p", str(pid)], capture_output=True, text=True, check=False)
    state, _, started = shown.stdout.strip().partition(" ")
    return None if state.startswith("Z") else " ".join(started.split())
