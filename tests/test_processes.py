"""A forked process is equivalent to one that was started."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests import processes

LOOK = """
import atexit, json, os, signal, sys, threading
handlers = {name: str(signal.getsignal(getattr(signal, name))) for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGPIPE", "SIGCHLD")}
print(json.dumps({
    "argv": sys.argv, "path": sys.path, "name": __name__, "directory": os.getcwd(), "environment": sorted(os.environ.items()),
    "session": os.getsid(0) == os.getpid(), "handlers": handlers, "command": open("/proc/self/cmdline").read().rstrip(chr(0)),
    "blocked": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, [])), "descriptors": sorted(os.listdir("/proc/self/fd"))[:3],
    "main": sys.modules["__main__"].__dict__ is globals(), "threads": threading.active_count(), "input": sys.stdin.read(),
}))
threading.Timer(0.1, lambda: print("a thread's", flush=True)).start()
atexit.register(print, "at exit")
print("to stderr", file=sys.stderr)
"""
NESTED = """
import ctypes, signal, subprocess, sys, time
die = lambda: ctypes.CDLL(None).prctl(1, signal.SIGKILL)
child = subprocess.Popen([sys.executable, "-c", "import time; print('here', flush=True); time.sleep(60)"], preexec_fn=die)
print(child.pid, flush=True)
time.sleep(60)
"""
BUSY = """
import atexit, logging, os, signal, subprocess, sys, tempfile
atexit.register(print, "the parent's end")
logging.basicConfig(level=logging.INFO)
signal.signal(signal.SIGTERM, lambda *_: None)
directory = tempfile.TemporaryDirectory()
look = (
    "import logging, os, signal, sys, tempfile; own = tempfile.TemporaryDirectory()\\n"
    "print(logging.root.handlers, logging.root.level, signal.getsignal(signal.SIGTERM), sys.argv)"
)
print(subprocess.run([sys.executable, "-c", look, "a"], capture_output=True, text=True, env={**os.environ, "A": "1"}))
print(os.path.isdir(directory.name))
"""
pytestmark = pytest.mark.skipif(processes.ALWAYS_COLD, reason="nothing is forked")


def both(command: list[str], **settings: Any) -> list[subprocess.CompletedProcess[str]]:
    """Forked and started."""
    words = {"capture_output": True, "text": True, "check": False, **settings}
    return [runner([sys.executable, *command], **words) for runner in (processes.run, subprocess.run)]


@pytest.mark.parametrize("how", ["code", "script", "module"])
def test_it_sees_of_itself_what_a_started_one_sees(how: str, tmp_path: Path) -> None:
    (tmp_path / "looks.py").write_text(LOOK)
    command = {"code": ["-c", LOOK], "script": ["looks.py"], "module": ["-m", "looks"]}[how]
    environment = {**os.environ, "PYTHONPATH": "/somewhere", "OWN": "ä"}
    forked, started = both(
        [*command, "one", "two words"], cwd=tmp_path, env=environment, input="said", start_new_session=how == "script"
    )
    assert forked.stdout == started.stdout
    assert (forked.returncode, forked.stderr) == (started.returncode, started.stderr) == (0, "to stderr\n")
    assert "a thread's\nat exit\n" in started.stdout


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("raise SystemExit(75)", 75),
        ("raise SystemExit('words')", 1),
        ("raise SystemExit", 0),
        ("import os; os._exit(3)", 3),
        ("1 / 0", 1),
        ("raise KeyboardInterrupt", -signal.SIGINT),
        ("import os; os.kill(os.getpid(), 9)", -signal.SIGKILL),
    ],
)
def test_it_ends_as_a_started_one(code: str, status: int) -> None:
    forked, started = both(["-c", code])
    assert (forked.returncode, forked.stdout, forked.stderr) == (started.returncode, started.stdout, started.stderr)
    assert forked.returncode == status


def test_what_it_starts_dies_with_it_where_that_was_asked_for() -> None:
    parent = processes.Popen([sys.executable, "-c", NESTED], stdout=subprocess.PIPE, text=True)
    said = {parent.stdout.readline().strip(), parent.stdout.readline().strip()}
    child = psutil.Process(int(next(iter(said - {"here"}))))
    assert child.ppid() == parent.pid
    assert "time.sleep(60)" in child.cmdline()[2]
    assert processes.zygote().pid in [each.pid for each in child.parents()], "it was forked"
    parent.kill()
    assert parent.wait() == -signal.SIGKILL
    until = time.monotonic() + 30
    while child.is_running() and child.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < until
        time.sleep(0.01)


def test_what_it_starts_inherits_no_more_than_it_would() -> None:
    forked, started = both(["-c", BUSY])
    assert forked.stdout == started.stdout
    assert "True\nthe parent's end\n" in started.stdout


@pytest.mark.cold
def test_a_test_marked_cold_starts_its_own() -> None:
    process = processes.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    assert psutil.Process(process.pid).ppid() == os.getpid()
    process.kill()
    process.wait()
