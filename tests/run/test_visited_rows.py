"""A run of a few steps reads the reference only of the rows in its steps, and its steps are those of a live reference."""

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from conftest import compose
from safetensors.torch import load_file
from test_reference_cache import SCORED, assembled, metrics
from world import World, pairs, resume, stopped

from halos.config import arithmetic_version
from halos.distributed.launch import make_accelerator
from halos.run import assemble as assembling
from halos.run.assemble import assemble
from halos.trainers.base import Trainer
from halos.trainers.reference import ReferenceLogps

ROWS = 40
FEW = ("train.steps=3", "train.batch_size=4", "train.prove=off", "checkpoint.every=null", "train.eval_at_start=true")


@pytest.fixture
def world(tmp_path: Path, cache: Path) -> World:
    shutil.rmtree(cache / "reference", ignore_errors=True)
    made = World(tmp_path / "world", cache)
    made.data.write_text("\n".join(pairs(ROWS)))
    return made


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """The rows of each source whose log-probs were computed."""
    counts, logps = Counter[str](), ReferenceLogps._forward

    def counted(self: ReferenceLogps, source: Any, plan: Any, batches: Any, bar: Any) -> Any:
        counts[source.name] += sum(map(len, batches))
        return logps(self, source, plan, batches, bar)

    monkeypatch.setattr(ReferenceLogps, "_forward", counted)
    return counts


def rows_read(world: World, read: Counter[str], name: str, *words: str) -> int:
    """Rows of the training data that a run reads of its reference before its first step."""
    shutil.rmtree(world.cache / "reference", ignore_errors=True)
    read.clear()
    assembled(world, name, *words).prepare_reference()
    return read["train"]


def test_only_rows_of_its_steps_are_read_and_the_steps_are_those_of_a_live_reference(
    world: World, read: Counter[str], capsys: pytest.CaptureFixture[str]
) -> None:
    for loss, sources in (("dpo", {"train": 24, "eval": 16}), ("kto", {"train": 12, "train, mismatched": 12})):
        read.clear()
        live, kept = (
            world.train(f"{loss}-{cache}", f"loss={loss}", *FEW, f"reference.cache={cache}") for cache in ("never", "auto")
        )
        assert yaml.safe_load((kept / "config.yaml").read_text())["reference"]["cache"] == "always"
        assert {name: read[name] for name in sources} == sources, "of 40 rows the 3 steps of 4 see 12, pairs have two each"
        for one, other in zip(metrics(live), metrics(kept), strict=True):
            assert one == pytest.approx(other, rel=1e-4, abs=1e-6)
    assert "train (12 of 40 items: those of the run's steps), 24 rows" in capsys.readouterr().out


def test_a_lost_table_is_computed_again_to_the_bit_and_more_steps_read_more(world: World, read: Counter[str]) -> None:
    words = ("train.steps=4", "train.batch_size=4", "train.prove=off")
    whole = world.train("whole", *words)
    directory = stopped(world.train("again", *words))
    shutil.rmtree(world.cache / "reference")
    read.clear()
    assert resume(directory) == 0
    assert read["train"] == 32
    assert [row["loss"] for row in metrics(directory)] == [row["loss"] for row in metrics(whole)]
    for name, value in load_file(whole / "FINAL" / "model.safetensors").items():
        assert value.equal(load_file(directory / "FINAL" / "model.safetensors")[name]), name
    for steps, count in ((5, 40), (6, 80)):
        read.clear()
        assert resume(directory, f"train.steps={steps}", "resume_changes=allow") == 0
        assert read["train"] == count, "20 rows are half of the data; of more all are read"
    live = world.train("live", *words, "reference.cache=never")
    for steps in (5, 6):
        assert resume(live, f"train.steps={steps}", "resume_changes=allow") == 0
    for one, other in zip(metrics(live), metrics(directory), strict=True):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-6)


def test_jobs_share_a_table_where_they_see_the_same_rows(world: World, read: Counter[str]) -> None:
    assembled(world, "first", *FEW).prepare_reference()
    read.clear()
    assembled(world, "rate", *FEW, "optim.lr=1e-2", "loss=ipo").prepare_reference()
    assembled(world, "cut", *FEW, "train.steps=4", "train.batch_size=3").prepare_reference()
    assert not read, "the same 12 rows"
    for loss in ("dpo", "kto"):
        assembled(world, f"{loss}-before", f"loss={loss}", *FEW).prepare_reference()
        other = assembled(world, f"{loss}-seed", f"loss={loss}", *FEW, "seed=7")
        other.prepare_reference()
        other.step(other.order.batch(0))  # finds its rows


def test_all_rows_are_read_where_more_than_the_steps_need_them(world: World, read: Counter[str], tmp_path: Path) -> None:
    everything = 2 * ROWS
    assert rows_read(world, read, "few", *FEW) == 24
    assert rows_read(world, read, "half", *FEW, "train.steps=5") == 40
    assert rows_read(world, read, "more", *FEW, "train.steps=6") == everything
    assert rows_read(world, read, "epochs", *FEW, "train.steps=11") == everything
    assert (
        rows_read(world, read, "trainer", *FEW, "trainer._target_=test_visited_rows.Mine", "plugins=[test_visited_rows]")
        == everything
    )
    weighted = [f"data.train=[{{path: {world.data}, epochs: 0.3}}]", "train.steps=null", "train.epochs=1"]
    assert rows_read(world, read, "weighted", *FEW, *weighted) == 24, "an epoch that draws 12 of them"
    teacher = shutil.copytree(world.base, world.place / "teacher")
    export = [f"reference.name_or_path={teacher}", f"reference.export={tmp_path / 'export'}", "data.eval=[]", "loss=gkd",
              "objective.metric=loss", "objective.mode=min", "loss.top_k=2"]  # fmt: skip
    asked = [json.dumps({"prompt": f"Count {n}", "completion": f"one {n}"}) for n in range(ROWS)]
    world.data.write_text("\n".join(asked))
    assert rows_read(world, read, "kept", *FEW, *export[:1], *export[2:]) == 12
    assert rows_read(world, read, "export", *FEW, *export) == ROWS
    world.data.write_text("".join(SCORED * 2))
    assert rows_read(world, read, "rollouts", *FEW, "loss=grpo", "loss.beta=0.1", "data.eval=[]", "objective.metric=loss",
                     "objective.mode=min", "train.steps=1", "train.batch_size=6") == 22, "all that differ"  # fmt: skip


class Mine(Trainer):
    """May read its reference of other rows."""


def test_an_older_run_goes_on_with_all_rows(world: World, read: Counter[str], monkeypatch: pytest.MonkeyPatch) -> None:
    config = compose(world.cache, world.place / "runs", *world.words("older", "reference.cache=always", *FEW))
    monkeypatch.setattr(assembling.run_config, "first_version", lambda *_: arithmetic_version.VISITED_ROWS - 1)
    trainer = assemble(config, [], make_accelerator(config.train.precision, config.model.dtype))
    assert trainer is not None
    trainer.prepare_reference()
    assert read["train"] == 2 * ROWS


def test_a_step_on_other_rows_reads_all_of_them(world: World, read: Counter[str]) -> None:
    """A trainer whose `step` is called by other code than its loop: the policy has moved by then."""
    few, live = assembled(world, "few", *FEW), assembled(world, "live", *FEW, "reference.cache=never")
    few.prepare_reference()
    for made in (few, live):
        made.step(made.order.batch(0))
    assert read["train"] == 24
    others = np.setdiff1d(np.arange(ROWS), np.concatenate([few.order.batch(n) for n in range(3)]))[:4]
    one, other = (made.step(others) for made in (few, live))
    assert read["train"] == 24 + 2 * ROWS
    assert one["loss"][0] == pytest.approx(other["loss"][0], rel=1e-5)
    few.step(few.order.batch(1))
