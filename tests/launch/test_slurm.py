"""A batch job that is preempted saves, asks to be queued again, and goes on where it was."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

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
        "SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NODELIST": "localhost", "SLURM_NTASKS": "2", "SLURM_CPUS_PER_TASK": "1",
        "ACCELERATE_CONFIG": "launch/accelerate/cpu2.yaml", "STUB_REQUEUED": str(tmp_path / "requeued"),
        "STUB_TASKS": str(tmp_path / "tasks"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1",
    }  # fmt: skip


def test_a_preempted_job_is_queued_again_and_goes_on(slurm: dict[str, str], tmp_path: Path, cache: Path) -> None:
    words = [*RUN, f"cache_dir={cache}", f"output_root={tmp_path}", "exp_name=run"]
    batch = ["bash", str(ROOT / "launch" / "slurm" / "single_node.sbatch"), *words]
    job = subprocess.Popen(batch, env=slurm, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    metrics = tmp_path / "run" / "metrics.jsonl"
    while job.poll() is None and not (metrics.exists() and len(metrics.read_text().splitlines()) >= 3):
        time.sleep(0.1)
    for pid in Path(slurm["STUB_TASKS"]).read_text().split():
        os.kill(int(pid), signal.SIGUSR1)  # as slurmstepd does: every task, and not the script
    told, _ = job.communicate()
    assert job.returncode == 75, told
    assert Path(slurm["STUB_REQUEUED"]).read_text() == slurm["SLURM_JOB_ID"]
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
    done = subprocess.run([sys.executable, str(script), "x.yaml", "train.py"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "SLURM_PROCID is not set" in done.stderr
