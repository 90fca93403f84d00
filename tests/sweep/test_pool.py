"""Jobs run in parallel up to a limit; a stopped sweep leaves no process behind, and the next start resumes it."""

import io
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import psutil
import pytest

from halos.rundir import RunDir
from halos.sweep.job import Job
from halos.sweep.pool import Pool
from halos.sweep.slots import Slot
from halos.sweep.status_table import StatusTable

ROOT = Path(__file__).resolve().parents[2]
# A launcher with a child rank, as of `accelerate launch`: the kernel signals the rank when its launcher dies
RANK = textwrap.dedent("""
    import ctypes, os, signal, sys, time
    from pathlib import Path
    from halos.rundir import RunDir
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)
    run, kind = RunDir(Path(sys.argv[1])), sys.argv[2]
    def stop(number, _):
        time.sleep(0.3)
        run.write_result("stopped", 1, {})
        os._exit(75)
    signal.signal(signal.SIGTERM, signal.SIG_IGN if kind == "deaf" else stop)
    if not (run.path / "config.yaml").exists():
        run.create(overwrite=False)
        run.write_config("objective: {metric: loss, mode: min}\\n")
    run.write_result("running", 0, {})
    if kind == "fails":
        print("error: there is no such thing")
        sys.exit(2)
    if kind in ("long", "deaf"):
        time.sleep(60)
    with (run.path.parent / "times").open("a") as times:
        times.write(f"begin {time.time()}\\n")
        times.flush()
        time.sleep(0.4)
        times.write(f"end {time.time()}\\n")
    run.final.mkdir()
    run.write_result("finished", 2, {"loss": 0.5})
""")
LAUNCHER = "import subprocess, sys; sys.exit(subprocess.run([sys.executable, '-c', *sys.argv[1:]]).returncode)"


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


def pool(tmp_path, kinds, at_once):
    jobs = [Job(n, (kind,), kind, tmp_path / f"run{n}", tmp_path / "logs" / f"run{n}.log") for n, kind in enumerate(kinds)]
    seen = []

    def command(job):
        return [sys.executable, "-c", LAUNCHER, RANK, str(job.path), job.label]

    made = Pool(jobs, [Slot({"N": str(n)}) for n in range(at_once)], command, lambda outcomes: seen.append(list(outcomes)))
    return made, seen


def states(outcomes):
    return [outcome.state for outcome in outcomes]


def children():
    return {each for each in psutil.Process().children(recursive=True) if each.status() != psutil.STATUS_ZOMBIE}


@pytest.fixture
def before():
    """Return children of this process that other tests started, such as multiprocessing's resource tracker."""
    return children()


def test_at_most_as_many_jobs_as_slots_run_at_once(tmp_path):
    made, seen = pool(tmp_path, ["quick"] * 5, 2)
    assert states(made.run()) == ["finished"] * 5
    assert max(states(outcomes).count("running") for outcomes in seen) == 2
    events = sorted((float(when), what) for what, when in map(str.split, (tmp_path / "times").read_text().splitlines()))
    at_once = [sum(1 if what == "begin" else -1 for _, what in events[: n + 1]) for n in range(len(events))]
    assert max(at_once) == 2


def test_a_failed_job_has_a_reason_and_the_others_continue(tmp_path):
    made, _ = pool(tmp_path, ["fails", "quick"], 1)
    outcomes = made.run()
    assert states(outcomes) == ["failed", "finished"]
    assert outcomes[0].reason == "error: there is no such thing"


def test_finished_jobs_are_not_started_again(tmp_path):
    pool(tmp_path, ["quick", "fails"], 2)[0].run()
    before = (tmp_path / "times").read_text()
    made, _ = pool(tmp_path, ["quick", "quick"], 2)
    outcomes = made.run()
    assert states(outcomes) == ["finished", "finished"]
    assert [outcome.earlier for outcome in outcomes] == [True, False]
    assert (tmp_path / "times").read_text().count("begin") == before.count("begin") + 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_every_job_and_leaves_no_process_behind(tmp_path, before, number):
    made, _ = pool(tmp_path, ["long", "long", "quick"], 2)

    def tell():
        while not all((tmp_path / f"run{n}" / "result.json").exists() for n in (0, 1)):
            time.sleep(0.05)
        os.kill(os.getpid(), number)

    threading.Thread(target=tell).start()
    outcomes = made.run()
    assert made.stopped
    assert states(outcomes) == ["stopped", "stopped", "waiting"]
    assert [RunDir(tmp_path / f"run{n}").read_result()["status"] for n in (0, 1)] == ["stopped", "stopped"]
    assert children() <= before


def test_a_second_signal_kills_a_job_that_ignores_the_first(tmp_path, before):
    made, _ = pool(tmp_path, ["deaf"], 1)

    def tell():
        while not (tmp_path / "run0" / "result.json").exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=tell).start()
    made.run()
    assert made.stopped
    assert children() <= before


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells children when their parent dies")
def test_a_killed_sweep_kills_its_jobs(tmp_path):
    code = textwrap.dedent(f"""
        import sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from pathlib import Path
        from test_pool import pool
        pool(Path({str(tmp_path)!r}), ["long"], 1)[0].run()
    """)
    sweep = subprocess.Popen([sys.executable, "-c", code])
    while not (tmp_path / "run0" / "result.json").exists():
        time.sleep(0.05)
    sweep.kill()
    sweep.wait()
    until = time.monotonic() + 20
    while RunDir(tmp_path / "run0").read_result()["status"] != "stopped" and time.monotonic() < until:
        time.sleep(0.1)
    assert RunDir(tmp_path / "run0").read_result()["status"] == "stopped"


def test_the_status_table_logs_each_change_once_and_redraws_itself_on_a_terminal(tmp_path):
    made, seen = pool(tmp_path, ["quick", "fails"], 2)
    made.run()
    text = io.StringIO()
    board = StatusTable(made.jobs, text)
    for outcomes in seen:
        board(outcomes)
    lines = text.getvalue().splitlines()
    assert sorted(line.split()[:3] for line in lines) == [
        ["job", "0", "finished"],
        ["job", "0", "running"],
        ["job", "1", "failed"],
        ["job", "1", "running"],
    ]

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    screen = Terminal()
    board = StatusTable(made.jobs, screen)
    board(seen[0])
    first = screen.getvalue()
    assert first.splitlines()[0].split() == ["job", "state", "step", "loss", "time", "overrides\x1b[K"]
    board(seen[-1])
    again = screen.getvalue().removeprefix(first)
    assert again.startswith("\x1b[4F")  # heading, two jobs, counts
    assert "1 failed, 1 finished" in again
