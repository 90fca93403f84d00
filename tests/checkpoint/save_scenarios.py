"""Scenarios of saves that may be interrupted: the run's directory before, the action, and what a resume may find after."""

import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from conftest import SMALL
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from halos.checkpoint import commit, manifest, select, state
from halos.checkpoint.saving import Copier
from halos.config.schema import Config
from halos.distributed.launch import make_accelerator
from halos.hooks.base import Run
from halos.models import tiny
from halos.run.assemble import assemble
from halos.rundir import RunDir
from halos.trainers.base import Trainer
from tests.composed import config_of

LAST = 4  # the step of the trainer; templates has complete checkpoints of this step and those before
KINDS = {"full": ["loss=sft"], "lora": ["loss=dpo", "peft=lora", "peft.r=2"]}
SETTINGS = ["train.steps=6", "train.batch_size=8", "train.microbatch_size=8", "train.eval_every=null", "checkpoint.every=1",
            "checkpoint.keep_last=9", "optim.lr=1e-3"]  # fmt: skip


def small_model(directory: Path) -> Path:
    """One narrow layer with model=tiny's tokenizer: quick to save."""
    if not directory.exists():
        tiny.build(directory)
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 8}
        LlamaForCausalLM(LlamaConfig.from_pretrained(directory, num_key_value_heads=2, **sizes)).save_pretrained(directory)
    return directory


def snapshot(run: Run) -> dict[str, Any]:
    """Copy what the next step depends on."""
    return {
        "weights": {name: tensor.clone() for name, tensor in run.module.state_dict().items()},
        "optimizer": run.optimizer.state_dict()["state"],
        "random": state.random_state(),
        "progress": {name: value for name, value in state.progress_of(run).items() if name != "hooks"},
    }


def copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    return {name: copied(part) for name, part in value.items()} if isinstance(value, dict) else value


def same(one: Any, other: Any) -> bool:
    """Bit for bit; nan is nan."""
    if isinstance(one, Tensor):
        return one.dtype == other.dtype and one.shape == other.shape and one.numpy().tobytes() == other.numpy().tobytes()
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[name]) for name, value in one.items())
    return one == other


def alike(one: Path, other: Path) -> bool:
    """Whether two whole directories hold the same files; safetensors orders its header's metadata as it likes."""
    mine, theirs = manifest.read(one), manifest.read(other)
    assert isinstance(mine, dict)
    assert isinstance(theirs, dict)
    return mine["files"].keys() == theirs["files"].keys() and all(
        facts == theirs["files"][name] or (name.endswith(".safetensors") and same(load_file(one / name), load_file(other / name)))
        for name, facts in mine["files"].items()
    )


class TrainedRun:
    """A trainer at step LAST, complete checkpoints in `templates`, and the state that each of them must restore."""

    def __init__(self, kind: str, directory: Path, cache: Path) -> None:
        self.kind, self.directory, self.cache, self.templates = kind, directory, cache, directory / "templates"
        self.trainer = self.assembled(self.templates)
        run, self.snapshots = self.trainer.run, {}
        for _ in range(LAST):
            self.trainer.step(self.trainer.order.batch(run.step))
            self.snapshots[run.step] = copied(snapshot(run))
            self.trainer.checkpointer.save(final=False)
            if run.step == LAST - 1:
                self.trainer.checkpointer.save(final=True)
                run.directory.final.rename(self.templates / "older")
        self.trainer.checkpointer.save(final=True)

    def config(self, run_dir: Path, *more: str) -> Config:
        overrides = [*SMALL, *KINDS[self.kind], *SETTINGS, f"model.name_or_path={small_model(self.cache / 'small')}",
                 f"cache_dir={self.cache}", "exp_name=run", f"run_dir={run_dir}", *more]  # fmt: skip
        return config_of(*overrides)

    def assembled(self, run_dir: Path, *overrides: str) -> Trainer:
        config = self.config(run_dir, *overrides)
        trainer = assemble(config, [], make_accelerator(config.train.precision, config.model.dtype))
        assert trainer is not None
        return trainer

    def prepare_directory(self, scenario: "Scenario", run_dir: Path) -> None:
        """Create the run's directory as it is before the scenario."""
        shutil.copytree(self.templates / "attempts", run_dir / "attempts")
        for name in ("config.yaml", "metrics.jsonl", "result.json"):
            shutil.copy(self.templates / name, run_dir / name)
        for step in scenario.before:
            shutil.copytree(self.checkpoint(step), run_dir / "checkpoints" / select.name_of(step))
        scenario.prepare(self, run_dir)

    def checkpoint(self, step: int) -> Path:
        return self.templates / "checkpoints" / select.name_of(step)

    def run_scenario(self, scenario: "Scenario", run_dir: Path) -> None:
        """Run the scenario with a trainer at step LAST, in a prepared `run_dir`."""
        logging.disable()
        run = self.trainer.run
        run.directory, run.stop, run.failure = RunDir(run_dir), None, None
        state.restore_random_state(self.snapshots[LAST]["random"])
        self.trainer.checkpointer._pruner._whole = set(scenario.before)
        for name, value in scenario.settings.items():
            vars(self.trainer.checkpointer.policy)[name] = value
        scenario.action(self.trainer)

    def check_resume(self, scenario: "Scenario", run_dir: Path, whole: Path | None = None) -> None:
        """Check that a resume finds what the scenario allows, and no leftovers. `whole`: the directory of an undisturbed run."""
        sources = [self.templates] if whole is None else [self.templates, whole]
        selection = select.select_checkpoint(RunDir(run_dir), None)
        step = selection.path and select.step_of(selection.path)
        assert step in scenario.after, f"resumed from {step}: {selection.passed_over}"
        if selection.path:
            assert any(alike(selection.path, source / "checkpoints" / selection.path.name) for source in sources)
        bad = {select.step_of(path) for path in select.checkpoints(run_dir / "checkpoints") if manifest.verify(path)}
        assert bad <= scenario.damaged, f"{bad} can be seen and are not whole"
        final = RunDir(run_dir).final
        if final.exists():
            assert manifest.verify(final) == []
            assert any(alike(final, source / name) for source in sources for name in scenario.finals if (source / name).exists())
        else:
            assert not scenario.final_before
        hidden = [path for path in run_dir.rglob("*") if path.name.startswith((commit.HIDDEN, commit.REPLACED))]
        assert hidden == []
        assert [row["step"] for row in RunDir(run_dir).read_metrics()] == []
        assert RunDir(run_dir).read_result()

    def resumed(self, run_dir: Path) -> Trainer:
        """Return the trainer of a real `resume=`."""
        return self.assembled(run_dir, f"resume={run_dir}")


def save(trainer: Trainer) -> None:
    trainer.checkpointer.save(final=False)


def save_in_background(trainer: Trainer) -> None:
    """Save with async_save: copied, and written in a thread."""
    checkpointer = trainer.checkpointer
    checkpointer.policy.async_save, checkpointer._copier = True, Copier()
    trainer.checkpointer.save(final=False)
    checkpointer.finish_save()
    checkpointer.end()  # wait for the pruning thread, so that the points have an order
    trainer.run.sync_stop_request()  # a collective of all ranks, as after the next step


def save_final(trainer: Trainer) -> None:
    trainer.checkpointer.save(final=True)


def restart(trainer: Trainer) -> None:
    """Make the changes on the disk that a resume makes before it trains."""
    directory = trainer.run.directory
    select.select_checkpoint(directory, None)
    directory.start_attempt({"resumed_from": "here"})
    directory.truncate_metrics(trainer.run.step)
    directory.write_result("running", trainer.run.step, {})


def nothing(trained: TrainedRun, run_dir: Path) -> None:
    pass


def older_final(trained: TrainedRun, run_dir: Path) -> None:
    shutil.copytree(trained.templates / "older", run_dir / "FINAL")


def damaged_last(trained: TrainedRun, run_dir: Path) -> None:
    (run_dir / "checkpoints" / select.name_of(LAST) / "metrics.json").write_text("damaged")


def leftovers(trained: TrainedRun, run_dir: Path) -> None:
    """Leave what an interrupted save and pruning leave: half a checkpoint, one moved aside, one half deleted."""
    checkpoints = run_dir / "checkpoints"
    half = checkpoints / (commit.HIDDEN + select.name_of(LAST))
    shutil.copytree(trained.checkpoint(LAST), half)
    (half / manifest.NAME).unlink()
    (checkpoints / select.name_of(3)).rename(checkpoints / (commit.REPLACED + select.name_of(3)))
    shutil.copytree(trained.checkpoint(1), checkpoints / (commit.HIDDEN + "old-" + select.name_of(1)))
    (run_dir / ".result.json.12").write_text("{")


@dataclass(frozen=True)
class Scenario:
    """A new kind of save joins SCENARIOS with its own `action`."""

    name: str
    action: Callable[[Trainer], None]
    before: tuple[int, ...]  # steps whose checkpoints exist
    after: frozenset[int | None]  # steps that may be resumed from; None: starts anew
    prepare: Callable[[TrainedRun, Path], None] = nothing
    settings: dict[str, Any] = None  # type: ignore[assignment]
    finals: tuple[str, ...] = ()  # what FINAL may be
    final_before: bool = False
    damaged: frozenset[int] = frozenset()
    shared: bool = False  # worth running with several ranks


def scenario(name: str, act: Callable[[Trainer], None], before: list[int], after: list[int | None], **rest: Any) -> Scenario:
    return Scenario(name, act, tuple(before), frozenset(after), **{"settings": {}, **rest})


# a checkpoint is saved at every step: whatever happens while step LAST is saved, LAST - 1 must be found
SCENARIOS = [
    scenario("the first save", save, [], [None, LAST], shared=True),
    scenario("with older checkpoints", save, [2, 3], [3, LAST], shared=True),
    scenario("with retention", save, [1, 2, 3], [3, LAST], settings={"keep_last": 1}, shared=True),
    scenario("over a damaged one", save, [3, LAST], [3, LAST], prepare=damaged_last, damaged=frozenset([LAST])),
    scenario("over a whole one", save, [LAST], [LAST]),
    scenario("FINAL", save_final, [3, LAST], [LAST], finals=("FINAL",), shared=True),
    scenario(
        "over an older FINAL", save_final, [LAST], [LAST], prepare=older_final, finals=("FINAL", "older"), final_before=True
    ),
    scenario("a restart over leftovers", restart, [2, 3], [3], prepare=leftovers),
    scenario("the first save, in the background", save_in_background, [], [None, LAST], shared=True),
    scenario(
        "with retention, in the background", save_in_background, [1, 2, 3], [3, LAST], settings={"keep_last": 1}, shared=True
    ),
]
