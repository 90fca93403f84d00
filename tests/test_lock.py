"""One process holds a run directory, even if processes crash or race for it."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from halos import lock as module
from halos.errors import UserError
from halos.lock import Holder, RunLock

HOLD = """
import sys
from pathlib import Path
from halos.lock import RunLock
lock = RunLock(Path(sys.argv[1]))
lock.acquire(3)
print("held", flush=True)
sys.stdin.read()
lock.release()
"""
RACE = """
import sys
from pathlib import Path
from halos.errors import UserError
from halos.lock import RunLock
print("ready", flush=True)
sys.stdin.readline()
locks = []
for number in range(int(sys.argv[2])):
    locks.append(RunLock(Path(sys.argv[1]) / str(number)))
    try:
        locks[-1].acquire(0)
        print(number, flush=True)
    except UserError:
        pass
print("done", flush=True)
sys.stdin.read()
"""


def start(code: str, *words: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, words)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        cwd=Path(__file__).parents[1],
    )  # fmt: skip


def holding(path: Path) -> subprocess.Popen[str]:
    child = start(HOLD, path)
    assert child.stdout is not None
    assert child.stdout.readline() == "held\n"
    return child


def write(path: Path, **facts: object) -> None:
    path.write_text(json.dumps({**json.loads(_mine()), **facts}))


def _mine() -> str:
    mine = Holder.myself(0)
    return json.dumps({name: getattr(mine, name) for name in Holder.__slots__})


def dead_pid() -> int:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


def test_a_live_process_is_not_disturbed_and_named(tmp_path: Path) -> None:
    path = tmp_path / "run.lock"
    child = holding(path)
    before = path.read_bytes()
    for ask in (lambda: RunLock(path).acquire(1), RunLock(path).refuse_held):
        with pytest.raises(UserError, match=rf"training in {tmp_path}: pid {child.pid} on {socket.gethostname()}, since 2"):
            ask()
    assert path.read_bytes() == before
    child.communicate("")
    assert os.listdir(tmp_path) == [], "released, and no other file left"
    RunLock(path).refuse_held()


def test_what_a_killed_process_left_is_taken_over_with_a_line(tmp_path: Path) -> None:
    path = tmp_path / "run.lock"
    child = holding(path)
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # dead, and nobody has asked for its status yet
    with RunLock(path) as lock:
        lock.refuse_held()
        line = lock.acquire(4)
        assert line is not None
        assert f"{path} was left behind (pid {child.pid} on" in line
        assert "that process is gone" in line
        assert json.loads(path.read_text())["attempt"] == 4
    assert os.listdir(tmp_path) == []
    child.communicate()


def test_a_pid_that_was_reused_holds_no_lock(tmp_path: Path) -> None:
    path = tmp_path / "run.lock"
    child = holding(tmp_path / "other.lock")
    write(path, pid=child.pid, process_start=json.loads((tmp_path / "other.lock").read_text())["process_start"])
    with pytest.raises(UserError):
        RunLock(path).acquire(0)
    write(path, pid=child.pid, process_start="1")
    assert "its pid belongs to another" in str(RunLock(path).acquire(0))
    child.communicate("")


@pytest.mark.parametrize("facts", [{"host": "elsewhere"}, {"pid_namespace": "pid:[1]"}, None])
def test_an_uninspectable_holder_counts_by_its_heartbeat(tmp_path: Path, facts: dict[str, str] | None) -> None:
    path = tmp_path / "run.lock"
    write(path, pid=dead_pid(), **facts) if facts else path.write_text('{"host": "els')
    for ask in (lambda: RunLock(path).acquire(1), RunLock(path).refuse_held):
        with pytest.raises(UserError, match=rf"600 s without a heartbeat; if it surely is, delete {path}"):
            ask()
    old = time.time() - 601
    os.utime(path, (old, old))
    RunLock(path).refuse_held()
    assert "silent for 60" in str(RunLock(path).acquire(1))


def test_a_lock_of_an_earlier_start_of_the_batch_job_counts_for_a_minute_and_a_half(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, old = tmp_path / "run.lock", time.time() - 91
    for name, value in (("SLURM_JOB_ID", "17"), ("SLURM_RESTART_COUNT", "2")):
        monkeypatch.setenv(name, value)
    for job, restart, gone in (("17", 1, True), ("17", 2, False), ("17", 3, False), ("18", 1, False), ("", 1, False)):
        write(path, host="elsewhere", job=job, restart=restart)
        assert RunLock(path)._inspect(time.time()).alive, "its heart may just have beaten"
        os.utime(path, (old, old))
        state = RunLock(path)._inspect(time.time())
        assert state is not None
        assert state.alive is not gone, (job, restart)
    write(path, host="elsewhere", job="17", restart=1)
    monkeypatch.setattr(module, "EARLIER_SILENCE", 0.2)
    assert "left behind" in str(RunLock(path).acquire(4)), "waited for, though nobody asked to"
    monkeypatch.delenv("SLURM_JOB_ID")
    write(path, host="elsewhere", job="", restart=0)
    os.utime(path, (old, old))
    assert RunLock(path)._inspect(time.time()).alive, "no scheduler is no job in common"


def test_a_lock_of_an_uninspectable_holder_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, looks = tmp_path / "run.lock", []
    write(path, host="elsewhere")

    def beat_at(look: int) -> Callable[[float], None]:
        def sleep(_: float) -> None:
            looks.append(look)
            if len(looks) == look:
                os.utime(path)

        return sleep

    def grow_old(_: float) -> None:
        looks.append(0)
        monkeypatch.setattr(module, "SILENCE", module.SILENCE - 250)  # as if time went by, and nobody touched it

    for ask in (lambda: RunLock(path).refuse_held(wait=True), lambda: RunLock(path).acquire(1, wait=True)):
        looks.clear()
        monkeypatch.setattr(module.time, "sleep", beat_at(3))
        os.utime(path, (time.time() - 20, time.time() - 20))
        with pytest.raises(UserError, match="another process is training"):
            ask()
        assert len(looks) == 3, "refused when its heart was seen to beat, and not before"
    for ask in (lambda: RunLock(path).refuse_held(wait=True), lambda: RunLock(path).acquire(1, wait=True)):
        looks.clear()
        monkeypatch.setattr(module, "SILENCE", 600.0)
        monkeypatch.setattr(module.time, "sleep", grow_old)
        ask()
        assert len(looks) == 3
    assert json.loads(path.read_text())["attempt"] == 1


def test_patience_waits_for_a_live_holder(tmp_path: Path) -> None:
    path = tmp_path / "run.lock"
    child = holding(path)
    with pytest.raises(UserError):
        RunLock(path).refuse_held(wait=True)
    threading.Timer(1.0, lambda: child.communicate("")).start()
    RunLock(path).refuse_held(wait=True, patience=60)
    assert not path.exists()


@pytest.mark.parametrize("stale", [False, True], ids=["free", "left behind"])
def test_of_many_that_start_at_once_one_wins(tmp_path: Path, stale: bool) -> None:
    rounds, pid = 40, dead_pid()
    for number in range(rounds if stale else 0):
        write(tmp_path / str(number), pid=pid, token="old")
    children = [start(RACE, tmp_path, rounds) for _ in range(4)]
    for child in children:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
    for child in children:
        assert child.stdin is not None
        child.stdin.write("go\n")
        child.stdin.flush()
    won: list[str] = []
    for child in children:
        assert child.stdout is not None
        won += iter(child.stdout.readline, "done\n")
    assert sorted(map(int, won)) == list(range(rounds))
    for child in children:
        child.communicate("")


def test_a_taker_that_inspected_an_older_lock_looks_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run.lock"
    write(path, pid=dead_pid())
    taken = RunLock(path)
    inspect = RunLock._inspect

    def overtaken(self: RunLock, now: float) -> module.LockState | None:
        state = inspect(self, now)
        monkeypatch.setattr(RunLock, "_inspect", inspect)
        write(path, host="elsewhere")  # another one was faster
        return state

    monkeypatch.setattr(RunLock, "_inspect", overtaken)
    with pytest.raises(UserError, match="elsewhere"):
        taken.acquire(0)
    assert json.loads(path.read_text())["host"] == "elsewhere"


def test_one_process_at_a_time_takes_over_and_one_that_died_at_it_is_no_obstacle(tmp_path: Path) -> None:
    path = tmp_path / "run.lock"
    write(path, pid=dead_pid())
    before = path.read_bytes()
    child = holding(tmp_path / ".run.lock.claim")
    with pytest.raises(UserError, match="just taking over"):
        RunLock(path).acquire(1)
    assert path.read_bytes() == before
    child.kill()
    child.communicate()
    with RunLock(path) as lock:
        lock.acquire(1)
    assert os.listdir(tmp_path) == []


def test_a_lock_that_is_no_longer_ours_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "run.lock"
    with RunLock(path) as lock:
        lock.acquire(0)
        write(path, host="elsewhere")
    assert json.loads(path.read_text())["host"] == "elsewhere"


def test_it_is_released_when_the_body_fails_and_may_be_taken_again_by_the_same_process(tmp_path: Path) -> None:
    path = tmp_path / "run.lock"
    with suppress(ValueError), RunLock(path) as lock:
        lock.acquire(0)
        raise ValueError
    assert not path.exists()
    first, second = RunLock(path), RunLock(path)
    first.acquire(0, heartbeat=False)
    second.acquire(1, heartbeat=False)
    assert json.loads(path.read_text())["attempt"] == 1


def test_the_heart_beats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HEARTBEAT", 0.01)
    path = tmp_path / "run.lock"
    touched, touch = threading.Event(), os.utime
    monkeypatch.setattr(os, "utime", lambda place, **how: (touch(place, **how), touched.set()))
    with RunLock(path) as lock:
        lock.acquire(0)
        assert touched.wait(60)


def test_a_file_system_without_hard_links_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object) -> None:
        raise PermissionError("no links here")

    monkeypatch.setattr(os, "link", none)
    path = tmp_path / "run.lock"
    RunLock(path).acquire(0, heartbeat=False)
    write(path, host="elsewhere")
    with pytest.raises(UserError, match="elsewhere"):
        RunLock(path).acquire(0)
    assert os.listdir(tmp_path) == ["run.lock"]
