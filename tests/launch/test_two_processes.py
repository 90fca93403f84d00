"""Two real ranks under accelerate: the losses of one process, one writer, checkpoints that either can resume."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from halos.config.schema import Config
from halos.run.lifecycle import run
from tests import processes

Command = Callable[..., subprocess.CompletedProcess[str]]
# 13 rows in batches of 5, three at a time: ranks of unequal size, a last batch of 3, a rank with fewer micro-batches
SETTINGS = ["train.batch_size=5", "train.microbatch_size=2", "train.steps=6", "train.eval_every=3", "checkpoint.every=2",
            "optim.lr=1e-3", "data.train=[{path: arithmetic, split: 'train[:13]'}]"]  # fmt: skip
LORA = ["peft=lora"]


def rows(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def compare(one: Path, two: Path) -> None:
    mine, theirs = rows(one), rows(two)
    assert [(row["step"], row["split"]) for row in mine] == [(row["step"], row["split"]) for row in theirs]
    for a, b in zip(mine, theirs, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["examples"] == b["examples"]
        for name in a.keys() & {"kl", "rewards/margins", "rewards/shift", "accuracy", "grad_norm"}:
            assert a[name] == pytest.approx(b[name], rel=1e-3, abs=1e-5)


@pytest.mark.parametrize(
    ("loss", "peft"),
    [
        pytest.param("kto", LORA, marks=pytest.mark.slow),
        pytest.param("sft", [], marks=pytest.mark.slow),
        pytest.param("dpo", LORA, marks=pytest.mark.slow),
        pytest.param("reward", LORA, marks=pytest.mark.slow),
        pytest.param("prm", LORA, marks=pytest.mark.slow),
        pytest.param("kto", [], marks=pytest.mark.slow),
        pytest.param("bco", [], marks=pytest.mark.slow),
        pytest.param("mpo", LORA, marks=pytest.mark.slow),
    ],
)
def test_two_processes_train_with_the_losses_of_one(loss: str, peft: list[str], command: Command, tmp_path: Path) -> None:
    words = [f"loss={loss}", *peft, *SETTINGS]
    command(*words, "exp_name=one")
    done = command(*words, "exp_name=two", launch=2)
    assert yaml.safe_load((tmp_path / "two" / "attempts" / "000.yaml").read_text())["world_size"] == 2
    assert json.loads((tmp_path / "two" / "result.json").read_text())["status"] == "finished"
    assert (done.stdout + done.stderr).count("finished: ") == 1  # one process speaks
    compare(tmp_path / "one", tmp_path / "two")


@pytest.mark.parametrize(
    "config", ["cpu2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("cpu2_fsdp2", "cpu2_zero3"))]
)
def test_two_processes_compute_the_same_reference_log_probs_as_one(
    config: str, command: Command, cache: Path, tmp_path: Path
) -> None:
    found = []
    for name, launch in (("two", 2), ("one", 1)):
        shutil.rmtree(cache / "reference", ignore_errors=True)
        words = [
            "loss=kto",
            "reference.cache=always",
            "train.microbatch_tokens=30",
            "train.prove=off",
            *SETTINGS,
            "train.steps=2",
        ]
        command(*words, f"exp_name={name}", launch=launch, config=config)
        files = (cache / "reference").glob("*/*.npy")
        found.append(sorted(path.read_bytes() for path in files))  # of a sharded model under other names
    assert len(found[0]) == 12, "four tables of three files"
    assert found[0] == found[1], "to the bit, since the cut does not depend on the number of processes"
    compare(tmp_path / "one", tmp_path / "two")


@pytest.mark.cold
def test_one_process_resumes_a_checkpoint_of_two(command: Command, configure: Callable[..., Config], tmp_path: Path) -> None:
    words = ["loss=dpo", "peft=lora", *SETTINGS]
    assert run(configure(*words, "exp_name=one"), []) == 0
    command(*words, "exp_name=two", launch=2)
    for path in ("FINAL", "checkpoints/step-00000006"):
        subprocess.run(["rm", "-r", str(tmp_path / "two" / path)], check=True)
    (tmp_path / "two" / "result.json").unlink()
    command(f"resume={tmp_path / 'two'}")
    assert yaml.safe_load((tmp_path / "two" / "attempts" / "001.yaml").read_text())["resumed_from"] == "checkpoints/step-00000004"
    compare(tmp_path / "one", tmp_path / "two")


def test_a_launcher_that_starts_one_process_where_two_were_asked_for_is_refused(command: Command, tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[2]
    words = ["--cpu", "--num_processes", "2", str(root / "train.py"), "loss=sft", "model=tiny", "data=arithmetic", "exp_name=x",
             f"output_root={tmp_path}"]  # fmt: skip
    done = processes.run(
        [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", *words],
        capture_output=True, text=True, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert "accelerate was asked for 2 processes and started one" in done.stderr
    assert not (tmp_path / "x").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("config", "peft"), [("cpu2", []), ("cpu2_fsdp2", []), ("cpu2_fsdp2", LORA), ("cpu2_zero3", [])])
def test_a_hook_samples_the_same_text_under_every_strategy(
    config: str, peft: list[str], command: Command, tmp_path: Path
) -> None:
    words = ["loss=sft", *peft, *SETTINGS, "train.steps=2", "plugins=[tests.launch.asking]",
             "+hooks.asking._target_=tests.launch.asking.Asking"]  # fmt: skip
    command(*words, "exp_name=one")
    command(*words, "exp_name=two", launch=2, config=config)
    said = {path.name: json.loads(path.read_text()) for path in tmp_path.glob("two/said-*.json")}
    assert sorted(said) == ["said-0-0.json", "said-0-1.json", "said-2-0.json", "said-2-1.json"]
    assert said["said-0-0.json"] == said["said-0-1.json"] == json.loads((tmp_path / "one" / "said-0-0.json").read_text())
    assert said["said-2-0.json"] == said["said-2-1.json"]
    compare(tmp_path / "one", tmp_path / "two")
