"""A batch job that is preempted saves, requeues itself, and resumes."""

import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

from tests import processes

ROOT = Path(__file__).resolve().parents[2]
RUN = ["loss=sft", "model=tiny", "data=arithmetic", "train.steps=40", "train.batch_size=4", "train.eval_every=null",
       "train.eval_at_start=false", "checkpoint.every=null", "data.eval=[{path: arithmetic, split: 'eval[:6]'}]"]  # fmt: skip


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    """The environment of a job on two tasks, with stubs for Slurm's commands."""
    stubs = tmp_path / "bin"
    stubs.mkdir()
    for name in ("srun", "scontrol"):
        shutil.copy(Path(__file__).with_name("stub_slurm.py"), stubs / name)
        (stubs / name).write_text((stubs / name).read_text().replace("#!/usr/bin/env python3", f"#!{sys.executable}"))
        (stubs / name).chmod(0o755)
    return {
        **os.environ, "PATH": f"{stubs}:{os.environ['PATH']}", "HALOS_PYTHON": sys.executable, "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NODELIST": "localhost", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2",
        "SLURM_JOB_NUM_NODES": "1", "SLURM_CPUS_PER_TASK": "1",
        "ACCELERATE_CONFIG": "launch/accelerate/cpu2.yaml", "STUB_REQUEUED": str(tmp_path / "requeued"),
        "STUB_TASKS": str(tmp_path / "tasks"), "STUB_OPTIONS": str(tmp_path / "options"), "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }  # fmt: skip


BATCH = ["bash", str(ROOT / "launch" / "slurm" / "single_node.sbatch")]


def tell(slurm: dict[str, str]) -> None:
    """As slurmstepd does: every task, and not the script."""
    tasks = Path(slurm["STUB_TASKS"])
    until = time.monotonic() + 60
    while not (tasks.exists() and tasks.read_text()) and time.monotonic() < until:
        time.sleep(0.01)
    for pid in tasks.read_text().split():
        os.kill(int(pid), signal.SIGUSR1)


def test_a_preempted_job_is_requeued_and_resumes(slurm: dict[str, str], tmp_path: Path, cache: Path) -> None:
    words = [*RUN, f"cache_dir={cache}", f"output_root={tmp_path}", "exp_name=run"]
    batch = [*BATCH, *words]
    job = subprocess.Popen(batch, env=slurm, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    metrics = tmp_path / "run" / "metrics.jsonl"
    while job.poll() is None and not (metrics.exists() and len(metrics.read_text().splitlines()) >= 3):
        time.sleep(0.1)
    tell(slurm)
    told, _ = job.communicate()
    assert job.returncode == 75, told
    assert Path(slurm["STUB_REQUEUED"]).read_text() == slurm["SLURM_JOB_ID"]
    options = Path(slurm["STUB_OPTIONS"]).read_text().split()
    assert {"--cpus-per-task=1", "--ntasks=2", "--wait=120", "--kill-on-bad-exit=0"} <= set(options)
    stopped = json.loads((tmp_path / "run" / "result.json").read_text())
    assert stopped["status"] == "stopped"
    assert 0 < stopped["step"] < 40
    assert yaml.safe_load((tmp_path / "run" / "attempts" / "000.yaml").read_text())["world_size"] == 2
    again = subprocess.run(batch, env=slurm | {"SLURM_NTASKS": "1"}, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stdout + again.stderr
    record = yaml.safe_load((tmp_path / "run" / "attempts" / "001.yaml").read_text())
    assert record["resumed_from"] == f"checkpoints/step-{stopped['step']:08d}"
    assert json.loads((tmp_path / "run" / "result.json").read_text())["status"] == "finished"
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines() if '"train"' in line]
    assert steps == list(range(1, 41))


def test_a_rank_outside_slurm_says_what_it_is_for(tmp_path: Path) -> None:
    script = ROOT / "launch" / "slurm" / "rank.py"
    done = processes.run([sys.executable, str(script), "x.yaml", "train.py"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "SLURM_PROCID is not set" in done.stderr


def holds_back(pid: str) -> bool:
    """Whether a task has come so far that a signal waits for it, which takes it some milliseconds."""
    try:
        status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    except OSError:
        return False
    return bool(int(status["SigBlk"], 16) >> (signal.SIGUSR1 - 1) & 1)


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize("seconds", [0.0, *(pytest.param(at, marks=pytest.mark.slow) for at in (0.5, 2.0, 4.0))])
def test_a_job_that_is_signalled_while_it_starts_is_requeued(seconds: float, slurm: dict[str, str], tmp_path: Path) -> None:
    """Whatever it is doing then: its interpreter, its imports, the meeting of its ranks."""
    words = [*RUN, f"output_root={tmp_path}", "exp_name=run"]
    job = subprocess.Popen([*BATCH, *words], env=slurm, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    tasks, until = Path(slurm["STUB_TASKS"]), time.monotonic() + 60
    while not (tasks.exists() and len(pids := tasks.read_text().split()) == 2 and all(map(holds_back, pids))):
        assert time.monotonic() < until
        time.sleep(0.001)
    time.sleep(seconds)
    tell(slurm)
    told, _ = job.communicate()
    assert job.returncode == 75, told
    assert Path(slurm["STUB_REQUEUED"]).exists()


@pytest.mark.parametrize(
    ("changed", "queued"),
    [
        ({"STUB_STATUS": "75"}, True),
        ({"STUB_STATUS": "138"}, True),
        ({"STUB_STATUS": "75", "STUB_STATE": "COMPLETING"}, False),
        ({"STUB_STATUS": "75", "HALOS_REQUEUES": "3", "SLURM_RESTART_COUNT": "2"}, True),
        ({"STUB_STATUS": "75", "HALOS_REQUEUES": "3", "SLURM_RESTART_COUNT": "3"}, False),
        ({"STUB_STATUS": "1"}, False),
        ({"STUB_STATUS": "0"}, False),
    ],
)
def test_only_a_job_stopped_by_a_signal_is_requeued(changed: dict[str, str], queued: bool, slurm: dict[str, str]) -> None:
    done = subprocess.run([*BATCH, *RUN], env=slurm | changed, capture_output=True, text=True, check=False)
    assert done.returncode == {138: 75}.get(status := int(changed["STUB_STATUS"]), status), done.stderr
    assert Path(slurm["STUB_REQUEUED"]).exists() is queued, done.stdout


def test_a_job_that_was_submitted_from_elsewhere_says_from_where_to_submit(slurm: dict[str, str], tmp_path: Path) -> None:
    done = subprocess.run(BATCH, env=slurm | {"SLURM_SUBMIT_DIR": str(tmp_path)}, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == f"error: {tmp_path} is not the repository's root: submit from there, or export HALOS_ROOT\n"
    root = {"SLURM_SUBMIT_DIR": str(tmp_path), "HALOS_ROOT": str(ROOT), "STUB_STATUS": "0"}
    assert subprocess.run(BATCH, env=slurm | root, check=False).returncode == 0


def test_gloo_uses_the_interface_that_leads_to_the_other_hosts() -> None:
    rank = runpy.run_path(str(ROOT / "launch" / "slurm" / "rank.py"))
    loopback = next(name for name, given in psutil.net_if_addrs().items() if any(one.address == "127.0.0.1" for one in given))
    assert rank["interface_to"]("127.0.0.1") == loopback
    assert rank["interface_to"]("no.such.host.invalid") is None
    two = {"HALOS_HOSTS": "no.such.host.invalid 127.0.0.1"}
    assert rank["gloo_interface"]({**two, "SLURM_NODEID": "0"}) == {"GLOO_SOCKET_IFNAME": loopback}, (
        "the first asks for the second"
    )
    assert rank["gloo_interface"]({**two, "SLURM_NODEID": "1"}) == {}
    assert rank["gloo_interface"]({**two, "GLOO_SOCKET_IFNAME": "eth7"}) == {}
    assert rank["gloo_interface"]({"HALOS_HOSTS": "127.0.0.1"}) == {}
