"""What a resume may change, where it may start, and which process may do it."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate import Accelerator
from conftest import SMALL
from test_resume import killed, rows, same, weights

import train
from halos.checkpoint import manifest, select, state
from halos.config.schema import Config
from halos.distributed.replicated import Replicated
from halos.errors import UserError
from halos.run.lifecycle import run
from halos.rundir import RunDir
from halos.trainers.base import Trainer
from tests import processes

FEW = ["loss=sft", "train.batch_size=8", "checkpoint.every=2", "checkpoint.keep_last=9", "optim.lr=1e-3", "train.eval_every=null"]
CONSTANT = ["schedule=constant", "schedule.warmup=2"]


def attempt(directory: Path, number: int) -> dict[str, Any]:
    return yaml.safe_load((directory / "attempts" / f"{number:03d}.yaml").read_text())


def result(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "result.json").read_text())


def steps(directory: Path) -> list[int]:
    return [row["step"] for row in rows(directory) if row["split"] == "train"]


def refused(*overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        train.start(list(overrides))
    return str(caught.value)


def everything(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


# --- changes


def test_a_finished_run_trains_on_to_where_a_longer_one_ends(configure: Callable[..., Config], tmp_path: Path) -> None:
    assert run(configure(*FEW, *CONSTANT, "train.steps=7", "exp_name=whole"), []) == 0
    directory = tmp_path / "longer"
    assert run(configure(*FEW, *CONSTANT, "train.steps=5", "exp_name=longer"), []) == 0
    config = (directory / "config.yaml").read_bytes()
    assert train.start([f"resume={directory}"]) == 0
    log = (directory / "train.log").read_text()
    assert not (directory / "attempts" / "001.yaml").exists(), "nothing was left to do"
    assert "5" in refused(f"resume={directory}", "train.steps=4")
    assert train.start([f"resume={directory}", "train.steps=7", "train.log_every=1"]) == 0
    assert attempt(directory, 1)["changed"] == {"train.steps": [5, 7]}
    assert "changed: train.steps 5 -> 7" in (directory / "train.log").read_text().removeprefix(log)
    assert (steps(directory), result(directory)["status"]) == ([1, 2, 3, 4, 5, 6, 7], "finished")
    for name, tensor in weights(tmp_path / "whole").items():
        assert tensor.equal(weights(directory)[name]), name
    assert (directory / "config.yaml").read_bytes() == config


def test_a_change_outlives_the_attempt_that_made_it(configure: Callable[..., Config], tmp_path: Path) -> None:
    directory = tmp_path / "run"
    assert run(configure(*FEW, *CONSTANT, "train.steps=4"), []) == 0
    killed(7, [f"resume={directory}", "train.steps=9", "checkpoint.every=3"])
    assert train.start([f"resume={directory}"]) == 0
    assert attempt(directory, 1)["changed"] == {"train.steps": [4, 9], "checkpoint.every": [2, 3]}
    assert "changed" not in attempt(directory, 2)
    assert attempt(directory, 2)["resumed_from"] == "checkpoints/step-00000006"
    assert (result(directory)["step"], steps(directory)) == (9, list(range(1, 10)))
    assert (directory / "checkpoints" / "step-00000009").is_dir()


def test_an_allowed_change_of_the_mathematics_is_loud_and_on_record(tmp_path: Path, cache: Path) -> None:
    directory = tmp_path / "run"
    overrides = [*SMALL, f"cache_dir={cache}", f"output_root={tmp_path}", *FEW, "train.steps=6", "exp_name=run"]
    killed(5, overrides)
    before = everything(directory)
    told = refused(f"resume={directory}", "seed=3", "optim.lr=1e-2", "train.steps=8", "train.log_every=1")
    assert all(part in told for part in ("seed 0 -> 3", "optim.lr 0.001 -> 0.01", "train.steps 6 -> 8", "cosine"))
    assert everything(directory) == before
    assert train.start([f"resume={directory}", "optim.lr=1e-2", "resume_changes=allow"]) == 0
    assert "CHANGED WHAT THE RUN COMPUTES, from step 4 on: optim.lr 0.001 -> 0.01" in (directory / "train.log").read_text()
    assert attempt(directory, 1)["changed"] == {"optim.lr": [0.001, 0.01]}
    assert max(row.get("lr", 0) for row in rows(directory)) > 0.001


def test_what_the_config_says_of_the_optimizer_holds_and_not_what_was_saved(tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 1)

    def made(weight_decay: float) -> torch.optim.AdamW:
        return torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=weight_decay)

    first, second = made(0.1), made(5.0)
    model(torch.ones(2)).backward()
    first.step()
    first.zero_grad()
    strategy = Replicated(Accelerator(cpu=True))
    state.save_optimizer(tmp_path, strategy.optimizer_state(model, first))
    state.load_optimizer(tmp_path, strategy, model, second)
    assert second.param_groups[0]["weight_decay"] == 5.0
    for parameter in model.parameters():
        assert torch.equal(second.state[parameter]["exp_avg"], first.state[parameter]["exp_avg"])
        assert second.state[parameter]["step"] == 1


def test_a_finished_run_that_kept_no_checkpoint_says_what_to_do(configure: Callable[..., Config], tmp_path: Path) -> None:
    directory = tmp_path / "run"
    assert run(configure(*FEW, *CONSTANT, "train.steps=3", "checkpoint.every=null"), []) == 0
    before = everything(directory)
    assert f"model.name_or_path={directory}/FINAL" in refused(f"resume={directory}", "train.steps=5")
    assert {name for name, content in everything(directory).items() if before.get(name) != content} <= {"train.log"}


def test_a_final_model_that_is_missing_is_made_again(configure: Callable[..., Config], tmp_path: Path) -> None:
    directory = tmp_path / "run"
    assert run(configure(*FEW, "train.steps=5"), []) == 0
    shutil.copytree(directory, tmp_path / "copy")
    shutil.rmtree(directory / "FINAL")
    assert train.start([f"resume={directory}"]) == 0
    same(tmp_path / "copy", directory)


# --- an earlier checkpoint


def test_checkpoints_of_a_branch_that_is_given_up_are_kept_and_not_resumed_from(
    configure: Callable[..., Config], tmp_path: Path
) -> None:
    directory = tmp_path / "run"
    assert run(configure(*FEW, "train.steps=8"), []) == 0
    shutil.copytree(directory, tmp_path / "copy")
    killed(3, [f"resume={directory / 'checkpoints' / 'step-00000002'}"])
    aside = directory / "checkpoints" / "superseded-001"
    moved = ["step-00000004", "step-00000006", "step-00000008"]
    assert sorted(os.listdir(aside)) == ["FINAL", "metrics.jsonl", *moved]
    assert all(manifest.verify(aside / name) == [] for name in moved)
    log = (directory / "train.log").read_text()
    assert f"set aside in {aside}" in log
    assert "step-00000008, step-00000006, step-00000004, FINAL" in log
    assert steps(directory) == [1, 2]
    assert [json.loads(line)["step"] for line in (aside / "metrics.jsonl").read_text().splitlines()] == [3, 4, 5, 6, 7, 8, 8]
    assert train.start([f"resume={directory}"]) == 0
    assert attempt(directory, 2)["resumed_from"] == "checkpoints/step-00000002"
    same(tmp_path / "copy", directory)
    assert sorted(path.name for path in (directory / "checkpoints").glob("step-*")) == ["step-00000002", *moved]
    assert "was set aside" in refused(f"resume={aside / 'step-00000004'}")


def test_a_damaged_checkpoint_does_not_count_among_the_newest(tmp_path: Path, cache: Path) -> None:
    directory = tmp_path / "run"
    killed(7, [*SMALL, f"cache_dir={cache}", f"output_root={tmp_path}", *FEW, "train.steps=8", "exp_name=run"])
    for step in (4, 6):
        (directory / "checkpoints" / f"step-{step:08d}" / "metrics.json").write_text("{}")
    killed(5, [f"resume={directory}", "checkpoint.keep_last=1"])
    there = ["step-00000002", "step-00000004", "superseded-001"]  # the older stays until a step has shown that the newer is good
    assert sorted(os.listdir(directory / "checkpoints")) == there
    assert manifest.verify(directory / "checkpoints" / "step-00000004") == []
    assert train.start([f"resume={directory}"]) == 0
    assert attempt(directory, 2)["resumed_from"] == "checkpoints/step-00000004"


# --- one process


def test_a_directory_in_which_a_process_trains_is_refused_and_after_its_death_is_not(tmp_path: Path, cache: Path) -> None:
    directory = tmp_path / "run"
    overrides = [*SMALL, f"cache_dir={cache}", f"output_root={tmp_path}", *FEW, "train.steps=4", "exp_name=run"]
    script = [sys.executable, str(Path(__file__).with_name("after_step.py")), "wait", "3", *overrides]
    child = processes.Popen(
        script, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert child.stdout is not None
    while child.stdout.readline() != "waiting\n":
        assert child.poll() is None
    (directory / "checkpoints" / ".partial-step-00000004").mkdir()
    before = everything(directory)
    for again in ([f"resume={directory}"], overrides, [*overrides, "overwrite=true"]):
        done = processes.run([sys.executable, "train.py", *again], capture_output=True, text=True, check=False)
        assert done.returncode == 2, done.stderr
        assert f"another process is training in {directory}: pid {child.pid} on" in done.stderr
    assert everything(directory) == before
    assert (directory / "checkpoints" / ".partial-step-00000004").is_dir(), "what the other one is writing is left alone"
    child.kill()
    child.communicate()
    assert train.start([f"resume={directory}"]) == 0
    assert "run.lock was left behind" in (directory / "train.log").read_text()
    assert not (directory / "run.lock").exists()


# --- what does not belong


@pytest.mark.parametrize("peft", [[], ["peft=lora"]], ids=["full", "lora"])
def test_a_checkpoint_of_another_model_is_refused_by_name(
    configure: Callable[..., Config], tmp_path: Path, peft: list[str]
) -> None:
    from halos.models import tiny

    small = tmp_path / "small"
    tiny.build(small)
    shape = json.loads((small / "config.json").read_text())
    from transformers import AutoModelForCausalLM, LlamaConfig

    other = LlamaConfig(**{**shape, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1})
    AutoModelForCausalLM.from_config(other).save_pretrained(small)
    overrides = [*FEW, *peft, "train.steps=4"]
    assert run(configure(*overrides, "exp_name=mine"), []) == 0
    elsewhere = [f"model.name_or_path={small}", f"run_dir={tmp_path / 'other'}"]
    assert run(configure(*overrides, "exp_name=mine", *elsewhere), []) == 0
    mine = tmp_path / "mine"
    shutil.rmtree(mine / "FINAL")
    shutil.rmtree(mine / "checkpoints" / "step-00000004")
    shutil.copytree(tmp_path / "other" / "checkpoints" / "step-00000004", mine / "checkpoints" / "step-00000004")
    before = everything(mine)
    where = mine / "checkpoints" / "step-00000004"
    assert f"model.name_or_path '{small}' -> 'tiny' (the first is sealed in {where})" in refused(f"resume={mine}")
    assert f"{where} is not what this run saved there: it is sealed" in refused(f"resume={mine}", "resume_changes=allow")
    (mine / "checkpoints.jsonl").unlink()  # as an older version left it, whose runs know less of what they saved
    before.pop("checkpoints.jsonl")
    told = refused(f"resume={mine}", "resume_changes=allow")
    assert str(where) in told
    assert "tiny-" in told
    assert ("hidden_size 32 instead of" in told) or ("instead of [" in told)
    after = everything(mine)
    assert {name for name in after if before.get(name) != after[name]} <= {"train.log"}


def test_a_checkpoint_that_was_put_or_renamed_here_is_refused(trainer: Callable[..., Trainer], tmp_path: Path) -> None:
    made = trainer("loss=sft", "train.steps=4", "checkpoint.every=1", "checkpoint.keep_last=9", "train.eval_at_start=false")
    for _ in range(2):
        made.step(made.order.batch(made.run.step))
        made.checkpointer.save(final=False)
    run, saves = RunDir(tmp_path / "run"), made.run.directory.checkpoints_by_step()
    config, copy = run.config.read_text(), run.checkpoints / select.name_of(3)
    assert select.select_checkpoint(run, None).path == saves[2]
    shutil.copytree(saves[1], copy)
    with pytest.raises(UserError, match=f"{copy} is not what this run saved there: it was saved at step 1"):
        select.select_checkpoint(run, None)
    shutil.rmtree(copy)
    run.commits.path.unlink()  # as an older version left it: what was saved is known by less
    run.config.write_text(config.replace("exp_name: run", "exp_name: other"))
    with pytest.raises(UserError, match="it is of another run, run"):
        select.select_checkpoint(run, None)
    run.config.write_text(config.replace("  name: none", "  name: lora"))
    with pytest.raises(UserError, match="it holds model/, and this run trains and saves adapter/"):
        select.select_checkpoint(run, None)
