"""Fast python processes: `Popen` and `run` of subprocess, forked from a preloaded process where possible.

Nine tenths of a start of train.py are imports. A forked process has its own pid, session, signals, descriptors, environment,
command line and exit status, and the python processes that it starts are forked from it in turn. It cannot test the start
itself: the order of imports, or another hash seed in each process. So tests marked cold or slow start new processes
(conftest.py), as do all tests if HALOS_TESTS_COLD is set, and on other systems than Linux.
"""

from __future__ import annotations

import atexit
import inspect
import json
import os
import select
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from shutil import rmtree
from tempfile import mkdtemp
from typing import Any

from tests.forked import READ_AT_START, program_of

ROOT = Path(__file__).resolve().parents[1]
ALWAYS_COLD = sys.platform != "linux" or "HALOS_TESTS_COLD" in os.environ
VARIABLE = "HALOS_TESTS_ZYGOTE"  # pytest's workers inherit it
SOCKET = os.environ.get(VARIABLE) or f"{mkdtemp(prefix='halos-zygote-')}/socket"
if VARIABLE not in os.environ:
    os.environ[VARIABLE] = SOCKET
    atexit.register(rmtree, Path(SOCKET).parent, ignore_errors=True)
cold = ALWAYS_COLD  # whether the current test starts new processes instead of forks


class Zygote:
    """A process that has imported what runs need, and forks on request: one for all of pytest's workers, started by the first
    that needs it, which ends with the last of them."""

    def __init__(self) -> None:
        self._owner = os.getpid()
        self._requests = self._connect()
        self.pid = int(self._requests.recv(32))
        atexit.register(self.close)

    def _connect(self) -> socket.socket:
        while True:
            mine = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            try:
                mine.connect(SOCKET)
            except (FileNotFoundError, ConnectionRefusedError):
                mine.close()
                self._start()
            else:
                return mine

    def _start(self) -> None:
        """Start the process unless another worker does."""
        try:
            os.close(os.open(f"{SOCKET}.lock", os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            time.sleep(0.05)
            return
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
            listener.bind(SOCKET)
            listener.listen()
            environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
            room = " " * 2**15  # for the command lines of the forks
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.forked", str(listener.fileno()), SOCKET, room], cwd=ROOT, env=environment,
                stdin=subprocess.DEVNULL, pass_fds=[listener.fileno()],
            )  # fmt: skip

    def close(self) -> None:
        if os.getpid() == self._owner:
            self._requests.close()

    def fork(self, request: Mapping[str, Any], descriptors: Sequence[int]) -> tuple[int, socket.socket]:
        """Return the pid, and the socket on which its wait status will arrive."""
        mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            socket.send_fds(self._requests, [json.dumps(request).encode()], [*descriptors, theirs.fileno()])
        return int(mine.recv(32)), mine


zygote = cache(Zygote)


class Popen(subprocess.Popen[Any]):
    _status: socket.socket | None = None  # of a fork

    def _execute_child(self, *args: Any) -> None:
        given = inspect.signature(subprocess.Popen._execute_child).bind(self, *args).arguments
        environment = dict(os.environ if given["env"] is None else given["env"])
        if not _can_be_forked(given, environment):
            return super()._execute_child(*args)
        pipes = [given[name] for name in ("p2cread", "c2pwrite", "errwrite")]
        request = {
            "command": [os.fsdecode(word) for word in given["args"]],
            "environment": environment,
            "directory": os.fsdecode(given["cwd"] or os.getcwd()),
            "session": bool(given["start_new_session"]),
        }
        self.pid, self._status = zygote().fork(request, [n if pipe == -1 else pipe for n, pipe in enumerate(pipes)])
        self._child_created = True
        ends = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")
        self._close_pipe_fds(*(given[name] for name in ends))

    def _try_wait(self, flags: int) -> tuple[int, int]:
        if self._status is None:
            return super()._try_wait(flags)
        if flags & os.WNOHANG and not select.select([self._status], [], [], 0)[0]:
            return 0, 0
        with self._status:
            return self.pid, int(self._status.recv(32))

    def _internal_poll(self, *args: Any, **kwargs: Any) -> int | None:
        if self._status is None:
            return super()._internal_poll(*args, **kwargs)
        if self.returncode is None:
            pid, status = self._try_wait(os.WNOHANG)
            if pid:
                self._handle_exitstatus(status)
        return self.returncode


def _can_be_forked(given: Mapping[str, Any], environment: Mapping[str, str]) -> bool:
    if cold:
        return False
    unusual = given["preexec_fn"] or given["pass_fds"] or given["executable"] not in (None, given["args"][0]) or given["shell"]
    same = all(environment.get(name) == os.environ.get(name) for name in READ_AT_START)
    return not unusual and same and program_of(given["args"]) is not None


def run(
    command: Sequence[str], *, check: bool, capture_output: bool = False, input: str | None = None, **settings: Any
) -> subprocess.CompletedProcess[Any]:
    """Run a process to completion, as subprocess.run does."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} if capture_output else {}
    pipes |= {"stdin": subprocess.PIPE} if input is not None else {}
    with Popen(command, **pipes, **settings) as process:
        out, err = process.communicate(input)
    done = subprocess.CompletedProcess(command, process.returncode, out, err)
    if check:
        done.check_returncode()
    return done
