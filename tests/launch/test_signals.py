"""Signals and failures of a rank or of the launcher: a complete checkpoint, no process left behind, an exact resume."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from safetensors.torch import load_file

import train
from halos.checkpoint import select
from halos.distributed import watchdog
from halos.distributed.device import is_accelerate_launch
from halos.distributed.signals import STOP_SIGNALS
from halos.hooks.base import Run
from halos.run import header as start_header
from halos.run import lifecycle
from tests import processes

ROOT = Path(__file__).resolve().parents[2]
RUN = ["loss=sft", "model=tiny", "data=arithmetic", "train.steps=6", "train.batch_size=4", "train.eval_every=3",
       "checkpoint.every=2", "data.train=[{path: arithmetic, split: 'train[:12]'}]",
       "data.eval=[{path: arithmetic, split: 'eval[:6]'}]"]  # fmt: skip
LAUNCHERS = {
    "alone": [],
    "accelerate-one": ["-m", "accelerate.commands.launch", "--config_file", "launch/accelerate/cpu1.yaml"],
    "ddp": ["-m", "accelerate.commands.launch", "--config_file", "launch/accelerate/cpu2.yaml"],
    "fsdp2": ["-m", "accelerate.commands.launch", "--config_file", "launch/accelerate/cpu2_fsdp2.yaml"],
    "zero3": ["-m", "accelerate.commands.launch", "--config_file", "launch/accelerate/cpu2_zero3.yaml"],
}


def start(launcher: str, words: list[str]) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": f"{ROOT / 'tests' / 'launch'}"}
    return processes.run(
        [sys.executable, *LAUNCHERS[launcher], "train.py", *words],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip


def sabotage(moment: str, step: int, deed: str, *, whom: str = "self", rank: int = 0) -> list[str]:
    settings = f"{{_target_: sabotage.Sabotage, moment: {moment}, step: {step}, deed: {deed}, whom: {whom}, rank: {rank}}}"
    return ["plugins=[sabotage]", f"+hooks.sabotage={settings}"]


def processes_of(run: Path, patience: float = 40.0) -> list[int]:
    """Those that still work on a run, once they have had time to end."""
    until = time.monotonic() + patience
    while time.monotonic() < until:
        left = [p.pid for p in psutil.process_iter(["cmdline"]) if any(str(run.parent) in w for w in p.info["cmdline"] or [])]
        if not left:
            return []
        time.sleep(0.2)
    return left


def losses(run: Path) -> list[tuple[int, str, float]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["split"], row["loss"]) for row in rows]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> dict[str, Path]:
    """Runs that nothing happened to, made when they are first asked for."""
    return {"root": tmp_path_factory.mktemp("whole"), "cache": cache}


def uninterrupted(whole: dict[str, Path], launcher: str) -> Path:
    name = "alone" if launcher == "accelerate-one" else launcher
    if name not in whole:
        done = start(name, [*RUN, f"cache_dir={whole['cache']}", f"output_root={whole['root']}", f"exp_name={name}"])
        assert done.returncode == 0, done.stderr
        whole[name] = whole["root"] / name
    return whole[name]


@pytest.mark.parametrize(
    ("words", "launcher"),
    [
        ("/venv/bin/python /venv/bin/accelerate launch train.py", True),
        ("python -m accelerate.commands.launch --config_file a.yaml train.py", True),
        ("python /site-packages/accelerate/commands/launch.py train.py", True),
        ("bash launch/quickstart.sh", False),
        ("bash -c accelerate test", False),
    ],
)
def test_a_launcher_is_known_by_its_command(words: str, launcher: bool) -> None:
    assert is_accelerate_launch(words.split()) is launcher


CASES = [
    ("ddp", "eval", 3, "SIGTERM", "self", 1),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in [
        ("alone", "eval", 3, "SIGTERM", "self", 0),
        ("alone", "step", 3, "SIGUSR1", "self", 0),
        ("zero3", "step", 3, "SIGTERM", "self", 1),
        ("ddp", "step", 5, "SIGTERM", "self", 1),
        ("fsdp2", "save", 4, "SIGTERM", "launcher", 0),
        ("alone", "start", 0, "SIGTERM", "self", 0),
        ("alone", "save", 2, "SIGTERM", "self", 0),
        ("alone", "step", 6, "SIGTERM", "self", 0),
        ("accelerate-one", "step", 3, "SIGTERM", "launcher", 0),
        ("accelerate-one", "eval", 3, "SIGUSR1", "launcher", 0),
        ("ddp", "step", 3, "SIGUSR1", "launcher", 0),
        ("ddp", "step", 3, "SIGTERM", "launcher", 0),
        ("ddp", "save", 4, "SIGUSR1", "self", 1),
        ("fsdp2", "step", 3, "SIGUSR1", "self", 1),
        ("fsdp2", "eval", 0, "SIGTERM", "launcher", 0),
    ]),
]  # fmt: skip


@pytest.mark.parametrize(("launcher", "moment", "step", "deed", "whom", "rank"), CASES)
def test_a_signal_leaves_a_complete_checkpoint_and_no_process(
    launcher: str, moment: str, step: int, deed: str, whom: str, rank: int, whole: dict[str, Path], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    words = [*RUN, f"cache_dir={whole['cache']}", f"output_root={tmp_path}", "exp_name=run"]
    done = start(launcher, words + sabotage(moment, step, deed, whom=whom, rank=rank))
    assert processes_of(run) == []
    if launcher == "alone":
        assert done.returncode == 75, done.stderr
    assert json.loads((run / "result.json").read_text())["status"] == "stopped", done.stderr
    newest = select.newest(run / "checkpoints")
    assert not newest.passed_over
    saved = select.step_of(newest.path) if newest.path else 0
    assert saved in (step, step + 1)  # a signal to the launcher takes its time
    assert not (run / "FINAL").exists()
    gone_on = start(launcher, [f"resume={run}", "plugins=[sabotage]"])
    assert gone_on.returncode == 0, gone_on.stderr
    expected = uninterrupted(whole, launcher)
    assert losses(run) == losses(expected)
    mine, theirs = (load_file(path / "FINAL" / "model.safetensors") for path in (run, expected))
    assert all(mine[name].equal(theirs[name]) for name in theirs)


@pytest.mark.parametrize(
    ("launcher", "rank"), [("ddp", 1), *(pytest.param(*case, marks=pytest.mark.slow) for case in (("ddp", 0), ("fsdp2", 1)))]
)
def test_a_failing_rank_ends_the_job_and_its_error_is_printed_last(launcher: str, rank: int, cache: Path, tmp_path: Path) -> None:
    words = [*RUN, f"cache_dir={cache}", f"output_root={tmp_path}", "exp_name=run"]
    done = start(launcher, words + sabotage("step", 3, "raise", rank=rank))
    assert done.returncode == 1
    assert processes_of(tmp_path / "run", patience=1) == []
    told = [line for line in done.stderr.splitlines() if "Error: " in line and "ChildFailedError" not in line]
    assert told
    assert all("sabotage: this is the error that people must see" in line for line in told), told
    assert json.loads((tmp_path / "run" / "result.json").read_text())["status"] == "failed"


@pytest.mark.slow
def test_a_killed_rank_ends_the_job(cache: Path, tmp_path: Path) -> None:
    words = [*RUN, f"cache_dir={cache}", f"output_root={tmp_path}", "exp_name=run"]
    done = start("ddp", words + sabotage("step", 3, "SIGKILL", rank=1))
    assert done.returncode == 1
    assert processes_of(tmp_path / "run", patience=1) == []
    assert start("ddp", [f"resume={tmp_path / 'run'}", "plugins=[sabotage]"]).returncode == 0


@pytest.mark.parametrize(
    ("first", "second", "status", "saved"),
    [
        ("SIGINT", "SIGINT", -signal.SIGINT, 2),
        ("SIGUSR1", "SIGTERM", 75, 3),
        pytest.param("SIGTERM", "SIGTERM", 75, 3, marks=pytest.mark.slow),
    ],
)
def test_a_second_ctrl_c_ends_a_run_at_once_and_schedulers_may_repeat_signals(
    first: str, second: str, status: int, saved: int, cache: Path, tmp_path: Path
) -> None:
    words = [*RUN, f"cache_dir={cache}", f"output_root={tmp_path}", "exp_name=run"]
    two = [*sabotage("step", 3, first), sabotage("save", 3, second)[1].replace("hooks.sabotage", "hooks.again")]
    assert start("alone", words + two).returncode == status
    assert select.newest(tmp_path / "run" / "checkpoints").path == tmp_path / "run" / "checkpoints" / select.name_of(saved)


LATE = """
import atexit, os, signal, sys
sys.path.insert(0, sys.argv.pop(1))
import train
for number in (signal.SIGTERM, signal.SIGUSR1):
    atexit.register(os.kill, os.getpid(), number)  # the first thing that the end of an interpreter does
train.main()
"""


@pytest.mark.parametrize("more", [["dry_run=true"], ["resume=nowhere"]], ids=["a run", "a refusal"])
def test_no_signal_changes_the_status_of_a_run_that_has_ended(more: list[str], cache: Path, tmp_path: Path) -> None:
    words = [*RUN, f"cache_dir={cache}", f"output_root={tmp_path}", "exp_name=run", *more]
    done = subprocess.run([sys.executable, "-c", LATE, str(ROOT), *words], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == (0 if "dry_run=true" in more else 2), done.stderr


def swallow(told: Callable[[], None]) -> None:
    """As a destructor does, or a callback of C code."""
    with contextlib.suppress(BaseException):
        told()


def disguise(told: Callable[[], None]) -> None:
    """As torch's readers of checkpoints do."""
    try:
        told()
    except BaseException as error:
        raise RuntimeError("something failed") from error


@pytest.mark.parametrize("library", [swallow, disguise])
def test_a_signal_at_the_start_stops_the_run_even_if_a_library_swallows_it(
    library: Callable[[Callable[[], None]], None], configure: Callable[..., Any], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    before = {number: signal.getsignal(number) for number in (*STOP_SIGNALS, watchdog.ORPHANED)}
    written = start_header.write
    monkeypatch.setattr(
        start_header, "write", lambda *given: (written(*given), library(lambda: signal.raise_signal(signal.SIGUSR1)))[0]
    )
    try:
        assert lifecycle.run(configure("loss=sft", "train.steps=4", "train.batch_size=4"), []) == 75
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (result["status"], result["reason"], result["step"]) == ("stopped", "SIGUSR1", 0)


@pytest.mark.parametrize("loss", ["grpo", "ppo"])
def test_a_stop_request_while_rollouts_are_read_stops_the_run(
    loss: str, configure: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [f"loss={loss}", "train.steps=2", "train.batch_size=6", "train.microbatch_size=2"]
    sync, steps = Run.sync_stop_request, []

    def request_at_the_third(self: Run) -> None:
        steps.append(self.step)
        self.stop_requested = "SIGTERM" if len(steps) == 3 else None
        sync(self)

    monkeypatch.setattr(Run, "sync_stop_request", request_at_the_third)
    assert lifecycle.run(configure(*words), []) == 75
    assert steps == [0, 0, 0]
    assert not list((tmp_path / "run").glob("rollouts/*")), "half of it is nothing"
    monkeypatch.setattr(Run, "sync_stop_request", sync)
    assert train.start([f"resume={tmp_path / 'run'}"]) == 0
