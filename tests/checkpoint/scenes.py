"""Saves that may be cut short: what lies in the run's directory before, what is done, and what may be found after."""

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

LAST = 4  # where the trainer stands; complete checkpoints of this step and those before are on the shelf
KINDS = {"full": ["loss=sft"], "lora": ["loss=dpo", "peft=lora", "peft.r=2"]}
SETTINGS = ["train.steps=6", "train.batch_size=8", "train.microbatch_size=8", "train.eval_every=null", "checkpoint.every=1",
            "checkpoint.keep_last=9", "optim.lr=1e-3"]  # fmt: skip


def small_model(place: Path) -> Path:
    """One narrow layer under model=tiny's tokenizer: quick to save."""
    if not place.exists():
        tiny.build(place)
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 8}
        LlamaForCausalLM(LlamaConfig.from_pretrained(place, num_key_value_heads=2, **sizes)).save_pretrained(place)
    return place


def snapshot(run: Run) -> dict[str, Any]:
    """What the next step depends on, copied."""
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


class Stage:
    """A trainer at step LAST, what each checkpoint must give back, and complete checkpoints on a shelf."""

    def __init__(self, kind: str, place: Path, cache: Path) -> None:
        self.kind, self.place, self.cache, self.shelf = kind, place, cache, place / "shelf"
        self.trainer = self.assembled(self.shelf)
        run, self.known = self.trainer.run, {}
        for _ in range(LAST):
            self.trainer.step(self.trainer.order.batch(run.step))
            self.known[run.step] = copied(snapshot(run))
            self.trainer.checkpointer.save(final=False)
            if run.step == LAST - 1:
                self.trainer.checkpointer.save(final=True)
                run.directory.final.rename(self.shelf / "older")
        self.trainer.checkpointer.save(final=True)

    def config(self, run_dir: Path, *overrides: str) -> Config:
        words = [*SMALL, *KINDS[self.kind], *SETTINGS, f"model.name_or_path={small_model(self.cache / 'small')}",
                 f"cache_dir={self.cache}", "exp_name=run", f"run_dir={run_dir}", *overrides]  # fmt: skip
        return config_of(*words)

    def assembled(self, run_dir: Path, *overrides: str) -> Trainer:
        config = self.config(run_dir, *overrides)
        trainer = assemble(config, [], make_accelerator(config.train.precision, config.model.dtype))
        assert trainer is not None
        return trainer

    def lay_out(self, scene: "Scene", run_dir: Path) -> None:
        """The run's directory as it is before the scene."""
        shutil.copytree(self.shelf / "attempts", run_dir / "attempts")
        for name in ("config.yaml", "metrics.jsonl", "result.json"):
            shutil.copy(self.shelf / name, run_dir / name)
        for step in scene.before:
            shutil.copytree(self.checkpoint(step), run_dir / "checkpoints" / select.name_of(step))
        scene.prepare(self, run_dir)

    def checkpoint(self, step: int) -> Path:
        return self.shelf / "checkpoints" / select.name_of(step)

    def act(self, scene: "Scene", run_dir: Path) -> None:
        """The scene itself, by a trainer that has just come to step LAST; `run_dir` is laid out."""
        logging.disable()
        run = self.trainer.run
        run.directory, run.stop, run.failure = RunDir(run_dir), None, None
        state.restore_random_state(self.known[LAST]["random"])
        self.trainer.checkpointer._pruner._whole = set(scene.before)
        for name, value in scene.settings.items():
            vars(self.trainer.checkpointer.policy)[name] = value
        scene.act(self.trainer)

    def go_on(self, scene: "Scene", run_dir: Path, whole: Path | None = None) -> None:
        """Check that a resume finds what the scene allows and that nothing is left over; `whole` is where it ran undisturbed."""
        shelves = [self.shelf] if whole is None else [self.shelf, whole]
        found = select.select_checkpoint(RunDir(run_dir), None)
        step = found.path and select.step_of(found.path)
        assert step in scene.after, f"went on from {step}: {found.passed_over}"
        if found.path:
            assert any(alike(found.path, shelf / "checkpoints" / found.path.name) for shelf in shelves)
        bad = {select.step_of(path) for path in select.checkpoints(run_dir / "checkpoints") if manifest.verify(path)}
        assert bad <= scene.damaged, f"{bad} can be seen and are not whole"
        final = RunDir(run_dir).final
        if final.exists():
            assert manifest.verify(final) == []
            assert any(alike(final, shelf / name) for shelf in shelves for name in scene.finals if (shelf / name).exists())
        else:
            assert not scene.final_before
        hidden = [path for path in run_dir.rglob("*") if path.name.startswith((commit.HIDDEN, commit.REPLACED))]
        assert hidden == []
        assert [row["step"] for row in RunDir(run_dir).read_metrics()] == []
        assert RunDir(run_dir).read_result()

    def resumed(self, run_dir: Path) -> Trainer:
        """A trainer as `resume=` makes it: the real thing."""
        return self.assembled(run_dir, f"resume={run_dir}")


def save(trainer: Trainer) -> None:
    trainer.checkpointer.save(final=False)


def save_apart(trainer: Trainer) -> None:
    """With async_save: copied, and written in a thread."""
    checkpointer = trainer.checkpointer
    checkpointer.policy.async_save, checkpointer._copier = True, Copier()
    trainer.checkpointer.save(final=False)
    checkpointer.finish_save()
    checkpointer.end()  # one thread again: the points have an order
    trainer.run.sync_stop_request()  # as after the next step: the processes meet again


def save_final(trainer: Trainer) -> None:
    trainer.checkpointer.save(final=True)


def begin_again(trainer: Trainer) -> None:
    """What a resume itself changes on the disk before it trains."""
    directory = trainer.run.directory
    select.select_checkpoint(directory, None)
    directory.start_attempt({"resumed_from": "here"})
    directory.truncate_metrics(trainer.run.step)
    directory.write_result("running", trainer.run.step, {})


def nothing(stage: Stage, run_dir: Path) -> None:
    pass


def older_final(stage: Stage, run_dir: Path) -> None:
    shutil.copytree(stage.shelf / "older", run_dir / "FINAL")


def damaged_last(stage: Stage, run_dir: Path) -> None:
    (run_dir / "checkpoints" / select.name_of(LAST) / "metrics.json").write_text("damaged")


def leftovers(stage: Stage, run_dir: Path) -> None:
    """Of a save and a retention that died: half a checkpoint, one moved aside, one half deleted."""
    checkpoints = run_dir / "checkpoints"
    half = checkpoints / (commit.HIDDEN + select.name_of(LAST))
    shutil.copytree(stage.checkpoint(LAST), half)
    (half / manifest.NAME).unlink()
    (checkpoints / select.name_of(3)).rename(checkpoints / (commit.REPLACED + select.name_of(3)))
    shutil.copytree(stage.checkpoint(1), checkpoints / (commit.HIDDEN + "old-" + select.name_of(1)))
    (run_dir / ".result.json.12").write_text("{")


@dataclass(frozen=True)
class Scene:
    """A new kind of save joins SCENES with its own `act`."""

    name: str
    act: Callable[[Trainer], None]
    before: tuple[int, ...]  # steps whose checkpoints lie there
    after: frozenset[int | None]  # steps that a resume may go on from; None begins anew
    prepare: Callable[[Stage, Path], None] = nothing
    settings: dict[str, Any] = None  # type: ignore[assignment]
    finals: tuple[str, ...] = ()  # what FINAL may be
    final_before: bool = False
    damaged: frozenset[int] = frozenset()
    shared: bool = False  # worth playing with several processes


def scene(name: str, act: Callable[[Trainer], None], before: list[int], after: list[int | None], **rest: Any) -> Scene:
    return Scene(name, act, tuple(before), frozenset(after), **{"settings": {}, **rest})


# one interval is one step: whatever happens while step LAST is saved, LAST - 1 is the least that is found
SCENES = [
    scene("the first save", save, [], [None, LAST], shared=True),
    scene("beside older ones", save, [2, 3], [3, LAST], shared=True),
    scene("with retention", save, [1, 2, 3], [3, LAST], settings={"keep_last": 1}, shared=True),
    scene("over a damaged one", save, [3, LAST], [3, LAST], prepare=damaged_last, damaged=frozenset([LAST])),
    scene("over a whole one", save, [LAST], [LAST]),
    scene("FINAL", save_final, [3, LAST], [LAST], finals=("FINAL",), shared=True),
    scene("over an older FINAL", save_final, [LAST], [LAST], prepare=older_final, finals=("FINAL", "older"), final_before=True),
    scene("a restart over leftovers", begin_again, [2, 3], [3], prepare=leftovers),
    scene("the first save, in the background", save_apart, [], [None, LAST], shared=True),
    scene("with retention, in the background", save_apart, [1, 2, 3], [3, LAST], settings={"keep_last": 1}, shared=True),
]
