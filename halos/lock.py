"""run.lock: one process at a time trains in a run directory."""

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
SILENCE = 600.0  # seconds without a heartbeat after which an uninspectable holder counts as dead
EARLIER_SILENCE = 90.0  # for an earlier start of our batch job, which the scheduler has killed before it started us
PERIOD = 0.5  # seconds between two checks while waiting
LARGEST = 2**16  # bytes of a lock file


@dataclass(frozen=True, slots=True)
class Holder:
    """The process that holds a lock. A pid identifies it only with host, pid namespace and start time."""

    host: str
    pid: int
    process_start: str
    pid_namespace: str
    since: str
    attempt: int
    token: str  # unique to this acquisition
    job: str = ""  # id of the Slurm job
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
        """Return whether this process ran in an earlier start of the other's batch job."""
        return bool(self.job) and self.job == other.job and self.restart < other.restart

    def __str__(self) -> str:
        return f"pid {self.pid} on {self.host}, since {self.since}"


@dataclass(frozen=True, slots=True)
class LockState:
    """A lock that somebody holds, and whether that process counts as alive."""

    content: bytes
    alive: bool
    why: str
    touched: float | None = None  # the last heartbeat of an uninspectable holder
    earlier: bool = False  # the holder ran in an earlier start of our batch job, so we always wait


class Patience:
    """How long to wait for a held lock: until an uninspectable holder proves alive, and `seconds` for one that is alive."""

    def __init__(self, seconds: float = 0.0) -> None:
        self._until = time.monotonic() + seconds
        self._first: LockState | None = None

    def is_over(self, state: LockState) -> bool:
        """Return whether to give up; otherwise sleep for PERIOD first."""
        if self._first is None:
            self._first = state
            log.warning("waiting: %s", state.why)
        is_alive = state.touched is None or state.touched != self._first.touched
        if is_alive and time.monotonic() >= self._until:
            return True
        time.sleep(PERIOD)
        return False


class RunLock:
    """Held by rank 0 from a run's start or resume to its end.

    A lock whose holder ran on this host (and in this pid namespace) is valid as long as that process lives; if its pid is gone
    or belongs to another process, the lock is stale. A holder on another host or in another container cannot be inspected: it
    touches the file every half minute, and its lock is stale after ten minutes without a heartbeat, or after a minute and a half
    if it ran in an earlier start of the same batch job. A stale lock is taken over.
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
        """Raises UserError if another process trains here now; changes nothing.

        With `wait`, wait until it is known whether the holder is alive, and `patience` seconds for one that is.
        """
        waited = Patience(patience)
        while (state := self._inspect(time.time())) is not None and state.alive:
            if not (wait or state.earlier) or waited.is_over(state):
                raise UserError(state.why)

    def acquire(self, attempt: int, *, heartbeat: bool = True, wait: bool = False) -> str | None:
        """Take the lock atomically. Raises UserError if it is held; with `wait` only once its holder has proved alive.

        Returns a message about the stale lock that was taken over, if one was.
        """
        mine = Holder.myself(attempt)
        own = self.path.with_name(f".{self.path.name.lstrip('.')}.{mine.pid}-{mine.token}")
        _write(own, mine)
        line, waited = None, Patience()
        try:
            while not _link(own, self.path):
                os.utime(own)
                state = self._inspect(own.stat().st_mtime)  # the file system's clock, which all hosts share
                if state is not None and state.alive:
                    if not (wait or state.earlier) or waited.is_over(state):
                        raise UserError(state.why)
                    continue
                if state is not None and self._take_over(own, state):
                    line = f"{self.path} was left behind ({state.why}): taken over"
                    break
        finally:
            own.unlink(missing_ok=True)
        self._mine = mine
        if heartbeat:
            threading.Thread(target=self._beat, name="run.lock", daemon=True).start()
        return line

    def release(self) -> None:
        """Release the lock, if it is ours."""
        self._ended.set()
        if self._mine is not None and _read(self.path) == self._mine:
            self.path.unlink(missing_ok=True)
        self._mine = None

    def _take_over(self, own: Path, stale: LockState) -> bool:
        """Replace a stale lock by ours; return False if it has changed since it was inspected.

        The replacing process holds a second lock, the claim, so that nobody can replace a lock that was just put there.
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

    def _inspect(self, now: float) -> LockState | None:
        """Return the state of the lock; None if there is none."""
        try:
            content, touched = confined.read_bytes(self.path, within=self.path.parent, most=LARGEST), self.path.stat().st_mtime
        except (UnreadableError, FileNotFoundError):
            if self.path.exists():
                raise
            return None
        holder, directory = _parse(content), self.path.parent
        if holder is not None and (holder.host, holder.pid_namespace) == (socket.gethostname(), _namespace()):
            started = _started(holder.pid)
            if started is None:
                return LockState(content, alive=False, why=f"{holder}: that process is gone")
            if started and holder.process_start and started != holder.process_start:
                return LockState(content, alive=False, why=f"{holder}: that process is gone, and its pid belongs to another")
            alive = holder.pid != os.getpid()  # our own lock does not stop us
            copied = f"if {directory} is a copy of the directory in which it trains, delete {self.path}"
            return LockState(content, alive=alive, why=f"another process is training in {directory}: {holder}; {copied}")
        who = str(holder) if holder else "its lock cannot be read"
        silent = f"silent for {max(0, now - touched):.0f} s"
        earlier = holder is not None and holder.precedes(Holder.myself(0))
        patience = EARLIER_SILENCE if earlier else SILENCE
        if now - touched > patience:
            return LockState(content, alive=False, why=f"{who}; {silent}")
        rule = f"it counts as gone after {patience:.0f} s without a heartbeat; if it surely is, delete {self.path}"
        why = f"another process is training in {directory}: {who}; {silent}, and {rule}"
        return LockState(content, alive=True, why=why, touched=touched, earlier=earlier)

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
    """Create `path` atomically with the content of `own`; return False if it exists."""
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
    """Return the holder; None if the file is not a complete lock of ours."""
    try:
        holder = Holder(**confined.parse_json(content.decode("utf-8"), NAME))
    except (ValueError, TypeError, UnreadableError):
        return None
    if any(type(getattr(holder, each.name)) is not (int if each.type == "int" else str) for each in fields(holder)):
        return None
    return holder if 0 < holder.pid < 2**31 else None


def _namespace() -> str:
    """Return our pid namespace: containers may share a host name but not its processes."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _started(pid: int) -> str | None:
    """Return when a process started, as the kernel reports it; empty if unknown, None if there is no such process."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass  # another user's process
    if Path("/proc/self/stat").exists():
        try:
            fields_of_stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return ""
        return None if fields_of_stat[0] in "ZX" else fields_of_stat[19]
    listing = subprocess.run(["ps", "-o", "stat=,lstart=", "-p", str(pid)], capture_output=True, text=True, check=False)
    state, _, started = listing.stdout.strip().partition(" ")
    return None if state.startswith("Z") else " ".join(started.split())
