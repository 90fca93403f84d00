"""A run that was killed and resumed ends bit for bit like an uninterrupted one."""

import json
import os
import random
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SMALL
from safetensors.torch import load_file

import train
from halos.config.schema import Config
from halos.run.lifecycle import run
from tests import processes

TIMED = {"seconds", "tokens_per_second", "peak_memory_mb"}
# 24 rows (48 for kto) in batches of 8: the steps cross epochs, the kill falls between saves and after an evaluation
SETTINGS = ["train.steps=9", "train.batch_size=8", "train.microbatch_size=3", "train.eval_every=7", "checkpoint.every=3",
            "optim.lr=1e-3", "data.train=[{path: arithmetic, split: 'train[:24]'}]"]  # fmt: skip
LORA = ["peft=lora", "peft.lora_dropout=0.1"]
MOVING = ["humanline=on", "reference.sync_every=3"]
SOFT = [*LORA, "reference.sync_every=1", "reference.sync_weight=0.6", "checkpoint.async_save=true"]
FAST = [("sft", []), ("dpo", LORA), ("kto", []), ("reward", LORA), ("dpo", MOVING), ("kto", SOFT)]
REST = [("sft", LORA), ("dpo", []), ("kto", LORA), ("reward", [])]


def killed(step: int, overrides: list[str]) -> None:
    script = [str(Path(__file__).with_name("after_step.py")), "kill", str(step)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = processes.run([sys.executable, *script, *overrides], env=environment, capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()


def rows(directory: Path) -> list[dict[str, Any]]:
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMED} for line in lines]


def weights(directory: Path) -> dict[str, Any]:
    return {f"{path.parent.name}/{name}": tensor for path in sorted((directory / "FINAL").rglob("*.safetensors"))
            for name, tensor in load_file(path).items()}  # fmt: skip


def same(one: Path, other: Path) -> None:
    assert rows(one) == rows(other)
    mine, theirs = weights(one), weights(other)
    assert mine.keys() == theirs.keys()
    assert mine
    for name, tensor in mine.items():
        assert tensor.equal(theirs[name]), name


@pytest.mark.parametrize(
    ("loss", "peft"), [pytest.param(*cell) for cell in FAST] + [pytest.param(*cell, marks=pytest.mark.slow) for cell in REST]
)
def test_a_killed_run_ends_where_an_uninterrupted_one_does(
    loss: str, peft: list[str], configure: Callable[..., Config], tmp_path: Path, cache: Path
) -> None:
    overrides = [f"loss={loss}", *peft, *SETTINGS]
    assert run(configure(*overrides, "exp_name=whole"), []) == 0
    killed(8, [*SMALL, f"cache_dir={cache}", f"output_root={tmp_path}", *overrides, "exp_name=killed"])
    assert rows(tmp_path / "killed")[-1]["step"] == 7
    assert not (tmp_path / "killed" / "FINAL").exists()
    assert train.start([f"resume={tmp_path / 'killed'}"]) == 0
    same(tmp_path / "whole", tmp_path / "killed")


def test_a_run_killed_before_its_first_checkpoint_starts_over(
    configure: Callable[..., Config], tmp_path: Path, cache: Path
) -> None:
    overrides = ["loss=sft", "train.steps=4", "train.batch_size=8", "checkpoint.every=null", "optim.lr=1e-3"]
    assert run(configure(*overrides, "exp_name=whole"), []) == 0
    killed(2, [*SMALL, f"cache_dir={cache}", f"output_root={tmp_path}", *overrides, "exp_name=killed"])
    assert train.start([f"resume={tmp_path / 'killed'}"]) == 0
    same(tmp_path / "whole", tmp_path / "killed")


def test_a_damaged_checkpoint_is_passed_over_and_the_reason_recorded(
    configure: Callable[..., Config], tmp_path: Path, cache: Path
) -> None:
    overrides = ["loss=sft", "train.steps=8", "train.batch_size=8", "checkpoint.every=2", "optim.lr=1e-3"]
    assert run(configure(*overrides, "exp_name=whole"), []) == 0
    killed(7, [*SMALL, f"cache_dir={cache}", f"output_root={tmp_path}", *overrides, "exp_name=killed"])
    damaged = tmp_path / "killed" / "checkpoints" / "step-00000006" / "model" / "model.safetensors"
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    assert train.start([f"resume={tmp_path / 'killed'}"]) == 0
    same(tmp_path / "whole", tmp_path / "killed")
    record = (tmp_path / "killed" / "attempts" / "001.yaml").read_text()
    assert "step-00000004" in record
    assert "step-00000006 passed over: model/model.safetensors: contents changed" in record


def test_a_checkpoint_asked_for_by_name_is_the_one_taken(configure: Callable[..., Config], tmp_path: Path) -> None:
    overrides = [
        "loss=sft",
        "train.steps=6",
        "train.batch_size=8",
        "checkpoint.every=2",
        "checkpoint.keep_last=3",
        "optim.lr=1e-3",
    ]
    assert run(configure(*overrides, "exp_name=run"), []) == 0
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    shutil.rmtree(tmp_path / "run" / "FINAL")
    (tmp_path / "run" / "result.json").unlink()
    assert train.start([f"resume={tmp_path / 'run' / 'checkpoints' / 'step-00000002'}"]) == 0
    same(tmp_path / "copy", tmp_path / "run")
    assert "step-00000002" in (tmp_path / "run" / "attempts" / "001.yaml").read_text()


def test_a_signal_saves_stops_and_the_run_goes_on_from_there_with_its_generators_too(
    configure: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = ["loss=sft", "train.steps=6", "train.batch_size=8", "checkpoint.every=null", "optim.lr=1e-3"]
    from halos.trainers.base import Trainer

    step, reduce, drawn, told, late = Trainer.step, Trainer._reduce, list[tuple[float, ...]](), [], list[int]()

    def drawing(self: Trainer, indices: Any) -> Any:
        """As hooks and plugins may."""
        drawn.append((random.random(), np.random.rand(), torch.rand(()).item()))
        if told and self.run.step == told[0]:
            signal.raise_signal(signal.SIGTERM)
        return step(self, indices)

    def reducing(self: Trainer, *given: Any) -> Any:
        totals = reduce(self, *given)
        if late and self.run.step == late[0]:
            signal.raise_signal(signal.SIGTERM)
        return totals

    monkeypatch.setattr(Trainer, "step", drawing)
    monkeypatch.setattr(Trainer, "_reduce", reducing)
    assert run(configure(*overrides, "exp_name=whole"), []) == 0
    whole, told = [*drawn], [2]
    drawn.clear()
    assert run(configure(*overrides, "exp_name=stopped"), []) == 75
    result = json.loads((tmp_path / "stopped" / "result.json").read_text())
    assert (result["status"], result["step"]) == ("stopped", 3), "at the end of the step that the signal came in"
    assert not (tmp_path / "stopped" / "FINAL").exists()
    told.clear()
    late.append(3)
    assert train.start([f"resume={tmp_path / 'stopped'}"]) == 75
    result = json.loads((tmp_path / "stopped" / "result.json").read_text())
    assert result["step"] == 5, "after the all-reduce of step 4 it is heard of in the next"
    late.clear()
    assert train.start([f"resume={tmp_path / 'stopped'}"]) == 0
    assert len(set(whole)) == 6
    assert drawn == whole
    same(tmp_path / "whole", tmp_path / "stopped")
