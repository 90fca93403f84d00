"""The package: `halos.train` in a process of yours, and a wheel that trains where the repository is not."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

import halos
from halos.distributed.signals import STOP_SIGNALS
from halos.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
WORDS = ["loss=dpo", "model=tiny", "data=arithmetic", "data.train=[{path: arithmetic, split: 'train[:16]'}]", "data.eval=[]",
         "train.steps=2", "train.batch_size=4", "exp_name=demo"]  # fmt: skip


@pytest.fixture
def words(tmp_path: Path, cache: Path) -> list[str]:
    return [*WORDS, f"output_root={tmp_path}", f"cache_dir={cache}"]


def test_train_returns_the_result_of_the_run(words: list[str], tmp_path: Path) -> None:
    argv, handlers = sys.argv, [signal.getsignal(number) for number in STOP_SIGNALS]
    result = halos.train(words)
    assert (result.status, result.exit_status, result.step) == ("finished", 0, 2)
    assert (result.run_dir, result.final) == (tmp_path / "demo", tmp_path / "demo" / "FINAL")
    assert result.metrics == {}  # without held-out data there is no evaluation
    assert sys.argv is argv
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == handlers
    again = halos.train([f"resume={tmp_path / 'demo'}", f"cache_dir={words[-1].partition('=')[2]}"])
    assert (again.status, again.step) == ("finished", 2)


def test_a_run_that_a_hook_stops_is_stopped_for_the_reason_that_it_gave(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "at_once.py").write_text(
        "from halos.hooks.base import Hook, Stop\n\n"
        "class AtOnce(Hook):\n    def on_step(self, run, metrics):\n        run.stop = Stop('seen enough', finished=False)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    result = halos.train([*words, "plugins=[at_once]", "+hooks.own._target_=at_once.AtOnce"])
    assert (result.status, result.exit_status, result.step, result.reason) == ("stopped", 1, 1, "seen enough")
    assert result.final is None


def test_runs_of_one_process_may_differ_in_precision_and_be_in_another_thread(words: list[str]) -> None:
    results = []
    for number, precision in enumerate(("float32", "bfloat16", "float32")):
        again = [*words, f"exp_name=run{number}", f"train.precision={precision}", "checkpoint.every=null"]
        thread = threading.Thread(target=lambda again=again: results.append(halos.train(again)))
        thread.start()
        thread.join()
    assert [result.status for result in results] == ["finished"] * 3
    losses = [json.loads((result.run_dir / "metrics.jsonl").read_text().splitlines()[-1])["loss"] for result in results]
    assert losses[0] == losses[2] != losses[1]


def test_a_dry_run_is_checked_and_leaves_a_page_and_nothing_in_the_process(words: list[str], tmp_path: Path) -> None:
    def generators() -> tuple[object, ...]:
        return random.getstate(), np.random.get_state()[1].tobytes(), torch.get_rng_state().tolist()

    before = generators()
    result = halos.train([*words, "dry_run=true", "train.deterministic=true"])
    assert (result.status, result.final) == ("checked", None)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [tmp_path / "demo" / "dry_run.html"]
    assert generators() == before, "a caller's random search would repeat itself"
    assert not torch.are_deterministic_algorithms_enabled()
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["train.batch_size=0"], "train.batch_size takes a whole number"),
        (["-m"], "-m is an option of the command line"),
        (["seed=1,2"], "needs -m"),
        (["hydra.run.dir=x"], "Hydra's own keys belong to the command line"),
    ],
)
def test_wrong_input_is_an_error_to_catch(words: list[str], more: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        halos.train([*words, *more])


def test_the_package_costs_nothing_to_import() -> None:
    told = "import sys, halos; print('torch' in sys.modules, 'hydra' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", told], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


@pytest.mark.cold
def test_a_wheel_trains_where_there_is_no_repository(tmp_path: Path, words: list[str]) -> None:
    build = ["-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), str(ROOT)]
    subprocess.run([sys.executable, *build], check=True, capture_output=True)
    site = tmp_path / "site"
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        wheel.extractall(site)
    (entry,) = site.glob("*.dist-info/entry_points.txt")
    assert "halos = halos.cli.command:main" in entry.read_text()
    installed = {**os.environ, "PYTHONPATH": str(site)}
    command = [sys.executable, "-m", "halos.cli", *words]
    started = subprocess.run(command, cwd=tmp_path, env=installed, capture_output=True, text=True, check=False)
    assert started.returncode == 0, started.stderr
    assert (tmp_path / "demo" / "FINAL" / "model.safetensors").is_file()
    (tmp_path / "demo" / "result.json").unlink()
    shutil.rmtree(tmp_path / "demo" / "FINAL")
    command = [sys.executable, "-m", "halos.cli", "resume=demo"]
    resumed = subprocess.run(command, cwd=tmp_path, env=installed, capture_output=True, text=True, check=False)
    assert resumed.returncode == 0, resumed.stderr
    assert (tmp_path / "demo" / "FINAL" / "model.safetensors").is_file()
    asked = "import halos; from halos.repository import COMMAND; print(halos.__file__, COMMAND)"
    command = [sys.executable, "-c", asked]
    said = subprocess.run(command, cwd=tmp_path, env=installed, capture_output=True, text=True, check=True).stdout.split()
    assert said == [str(site / "halos" / "__init__.py"), "halos"]


def test_a_process_that_tokenises_imports_no_torch() -> None:
    program = "import sys, halos.data.tokenise_worker, halos.data.shards; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
