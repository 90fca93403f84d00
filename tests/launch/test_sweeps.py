"""Sweeps from the command line: a job that fails, a sweep that is interrupted and given again, what comes back to the sweeper."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from tests import processes

ROOT = Path(__file__).resolve().parents[2]
LAUNCHER = ["hydra/launcher=accelerate", "hydra.launcher.max_parallel=2"]
RUN = ["loss=dpo", "model=tiny", "data=arithmetic", "train.batch_size=4", "train.eval_at_start=false",
       "data.eval=[{path: arithmetic, split: 'eval[:6]'}]"]  # fmt: skip


class Sweep:
    def __init__(self, place: Path, cache: Path) -> None:
        self.place, self.log = place / "sweep", place / "log"
        self.words = [*RUN, f"cache_dir={cache}", f"output_root={place}", "exp_name=sweep"]

    def start(self, *words: str) -> subprocess.Popen[str]:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(Path(__file__).parent)}
        command = [sys.executable, "train.py", "-m", *self.words, *words]
        with self.log.open("w") as log:
            return processes.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, text=True)

    def run(self, *words: str) -> tuple[int, str]:
        status = self.start(*words).wait(timeout=500)
        return status, self.log.read_text()

    def runs(self) -> dict[str, Path]:
        return {path.parent.name: path.parent for path in sorted(self.place.glob("*/config.yaml"))}

    def results(self) -> dict[str, dict[str, Any]]:
        return {name: json.loads((path / "result.json").read_text()) for name, path in self.runs().items()}

    def attempts(self) -> dict[str, int]:
        return {name: len(list((path / "attempts").iterdir())) for name, path in self.runs().items()}


@pytest.fixture
def sweep(tmp_path: Path, cache: Path) -> Sweep:
    return Sweep(tmp_path, cache)


def test_a_job_fails_the_other_is_reported_and_the_same_command_again_starts_only_what_is_missing(sweep: Sweep) -> None:
    grid = [*LAUNCHER, "train.steps=3", "train.max_length=4,200"]  # no row has four tokens
    status, told = sweep.run(*grid)
    assert status == 1
    assert "job 0 failed: train.max_length=4" in told
    assert "none of them can be used" in told
    assert "1 failed, 1 finished" in told
    assert "Traceback" not in told
    (name,) = sweep.runs()
    assert name.startswith("train.max_length-200-")
    with (sweep.place / "sweep.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert (row["run"], row["status"], row["step"]) == (name, "finished", "3")
    assert float(row["eval/rewards/accuracies"]) == sweep.results()[name]["metrics"]["rewards/accuracies"]
    before = (sweep.place / name / "result.json").stat().st_mtime_ns
    status, told = sweep.run(*grid)
    assert status == 1
    assert "job 1 finished" in told
    assert (sweep.place / name / "result.json").stat().st_mtime_ns == before
    assert sweep.attempts() == {name: 1}


def test_jobs_in_this_process_run_on_after_one_failed_and_are_not_trained_twice(sweep: Sweep) -> None:
    grid = ["train.steps=2", "train.max_length=4,200"]
    status, told = sweep.run(*grid)
    assert status == 1, told
    assert told.count("none of them can be used") == 1
    assert [result["status"] for result in sweep.results().values()] == ["finished"]
    assert (sweep.place / "sweep.csv").exists()
    status, told = sweep.run(*grid)
    assert "is finished already" in told
    assert list(sweep.attempts().values()) == [1]


def test_a_finished_job_whose_experiment_was_edited_since_is_refused_and_not_taken_for_it(sweep: Sweep, tmp_path: Path) -> None:
    experiment = tmp_path / "conf" / "experiment" / "mine.yaml"
    experiment.parent.mkdir(parents=True)
    grid = [*LAUNCHER, "--config-dir", str(tmp_path / "conf"), "experiment=mine", "train.steps=1", "seed=1"]

    def run(settings: str) -> tuple[int, str]:
        experiment.write_text(f"# @package _global_\n{settings}\n")
        return sweep.run(*grid)

    assert run("optim: {lr: 1e-3}")[0] == 0
    status, told = run("optim: {lr: 1e-3}  # the same")
    assert status == 0
    assert "job 0 finished before" in told, "its process is not started: " + told
    status, told = run("optim: {lr: 5e-2}")
    assert status == 1
    assert "would no longer compute what it began: optim.lr 0.001 -> 0.05" in told
    assert list(sweep.attempts().values()) == [1]
    status, told = run("optim: {lr: 5e-2}\noverwrite: true")
    assert status == 0, told
    (config,) = [yaml.safe_load((path / "config.yaml").read_text()) for path in sweep.runs().values()]
    assert config["optim"]["lr"] == 0.05


def test_a_sweep_over_losses_takes_the_keys_that_come_with_them(sweep: Sweep) -> None:
    sweep.words[0] = "loss=dpo,cdpo"
    words = ("hydra/launcher=basic", "train.steps=1", "checkpoint.every=null", "loss.beta=0.3", "objective.metric=loss",
             "objective.mode=min")  # fmt: skip
    status, told = sweep.run(*words)
    assert status == 0, told
    configs = [yaml.safe_load((path / "config.yaml").read_text()) for path in sweep.runs().values()]
    assert sorted((each["loss_choice"], each["loss"]["beta"], each["objective"]["metric"]) for each in configs) == [
        ("cdpo", 0.3, "loss"), ("dpo", 0.3, "loss")
    ]  # fmt: skip
    assert sweep.run(*words)[0] == 0
    assert set(sweep.attempts().values()) == {1}, "given again, it has nothing to do"
    status, told = sweep.run(*words, "loss.smoothing=0.1")
    assert (status, "dpo takes no 'smoothing'" in told) == (2, True)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_sweep_leaves_no_process_and_the_same_command_completes_it(
    sweep: Sweep, tmp_path: Path, cache: Path, number: signal.Signals
) -> None:
    grid = [*LAUNCHER, "train.steps=12", "train.eval_every=null", "checkpoint.every=4", "optim.lr=1e-3,2e-3", "loss.beta=0.1,0.5"]
    slow = ["plugins=[slow]", "+hooks.slow={_target_: slow.Slow, seconds: 0.5}"]
    process = sweep.start(*grid, *slow)
    while process.poll() is None and not any((path / "checkpoints").is_dir() for path in sweep.runs().values()):
        time.sleep(0.1)
    family = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(number)
    assert process.wait(timeout=120) == 75, sweep.log.read_text()
    assert not [each for each in family if each.is_running() and each.status() != psutil.STATUS_ZOMBIE]
    assert "stopped" in {result["status"] for result in sweep.results().values()}
    status, told = sweep.run(*grid, *slow)
    assert status == 0, told
    assert {result["status"] for result in sweep.results().values()} == {"finished"}
    assert len(sweep.results()) == 4
    assert max(sweep.attempts().values()) == 2
    whole = Sweep(tmp_path / "whole", cache)
    whole.place.parent.mkdir()
    assert whole.run(*grid, *slow)[0] == 0
    other = whole.results()
    assert {name: result["metrics"] for name, result in sweep.results().items()} == {
        name: other[name]["metrics"] for name in other
    }


@pytest.mark.slow
@pytest.mark.skipif(find_spec("optuna") is None, reason="needs hydra-optuna-sweeper")
def test_optuna_gets_the_seed_the_objective_and_its_direction(sweep: Sweep) -> None:
    grid = [*LAUNCHER, "train.steps=2", "hydra/sweeper=optuna", "hydra.sweeper.n_trials=4", "hydra.sweeper.n_jobs=2",
            "optim.lr=tag(log,interval(1e-4,1e-2))"]  # fmt: skip
    status, told = sweep.run(*grid)
    assert status == 0, told
    found = yaml.safe_load((sweep.place / "optimization_results.yaml").read_text())
    values = [result["metrics"]["rewards/accuracies"] for result in sweep.results().values()]
    assert len(values) == 4
    assert found["best_value"] == max(values)
    names = sorted(sweep.runs())
    assert sweep.run(*grid)[0] == 0
    assert sorted(sweep.runs()) == names, "the same command asks for the same jobs"
    assert set(sweep.attempts().values()) == {1}


@pytest.mark.slow
@pytest.mark.skipif(find_spec("submitit") is None, reason="needs hydra-submitit-launcher")
def test_submitit_runs_the_jobs(sweep: Sweep) -> None:
    status, told = sweep.run("hydra/launcher=submitit_local", "train.steps=2", "seed=1,2")
    assert status == 0, told
    assert [result["status"] for result in sweep.results().values()] == ["finished"] * 2
    assert (sweep.place / "sweep.csv").exists()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["hydra.launcher.config_file=nowhere.yaml"], "hydra.launcher.config_file: there is no file nowhere.yaml"),
        (["hydra.launcher.config_file=fsdp2_multinode"], "is for 2 machines"),
        (["hydra.launcher.max_parallel=0"], "max_parallel takes a whole number from 1"),
        (["hydra.launcher.max_paralel=2"], "max_paralel"),
        (["run_dir=one/place"], "two jobs of this sweep would run in one/place"),
        (["train.steps=4,x"], "train.steps takes a whole number or null, not 'x'"),
    ],
)
def test_an_impossible_sweep_is_refused_before_any_job_starts(words: list[str], told: str, sweep: Sweep) -> None:
    status, said = sweep.run("hydra/launcher=accelerate", "seed=1,2", *words)
    assert status == 2, said
    assert told in said
    assert "Traceback" not in said
    assert sweep.runs() == {}
