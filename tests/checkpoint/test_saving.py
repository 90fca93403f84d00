"""Saves in the background: one at a time, their errors raised at the next step, and waited for at the end."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from halos.checkpoint import manifest, select, weights
from halos.checkpoint.saving import Copier
from halos.config.schema import Config
from halos.trainers.base import Trainer

Make = Callable[..., Trainer]
IN_BACKGROUND = ["loss=sft", "train.steps=4", "checkpoint.async_save=true", "checkpoint.keep_last=9", "train.eval_every=null"]


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Nothing is written before it is set."""
    opened, real = threading.Event(), weights.save_weights

    def wait(*arguments: Any) -> None:
        assert opened.wait(60)
        real(*arguments)

    monkeypatch.setattr(weights, "save_weights", wait)
    return opened


def steps(trainer: Trainer) -> list[int]:
    return [select.step_of(path) for path in select.checkpoints(trainer.run.directory.checkpoints)]


def test_steps_go_on_while_a_checkpoint_is_written_and_do_not_change_it(trainer: Make, gate: threading.Event) -> None:
    made = trainer(*IN_BACKGROUND)
    made.step(made.order.batch(0))
    before = {name: value.clone() for name, value in made.run.module.state_dict().items()}
    made.checkpointer.save(final=False)
    made.step(made.order.batch(1))
    assert (steps(made), made.run.step) == ([], 2)
    gate.set()
    made.checkpointer.finish_save()
    path = made.run.directory.checkpoints / select.name_of(1)
    assert manifest.verify(path) == []
    assert select.metrics_of(path)["step"] == 1
    saved = load_file(path / "model" / "model.safetensors")
    assert saved
    assert all(torch.equal(value, before[f"model.{name}"]) for name, value in saved.items())


def test_a_save_waits_for_the_one_before_it_and_final_for_both(trainer: Make, gate: threading.Event) -> None:
    made = trainer(*IN_BACKGROUND)
    made.step(made.order.batch(0))
    made.checkpointer.save(final=False)
    threading.Timer(0.5, gate.set).start()
    made.step(made.order.batch(1))
    made.checkpointer.save(final=False)
    assert steps(made) == [1]
    made.checkpointer.save(final=True)
    assert steps(made) == [1, 2]
    assert manifest.verify(made.run.directory.final) == []


def test_what_went_wrong_in_the_background_is_raised_by_the_next_step(trainer: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("the cable was pulled")

    made = trainer(*IN_BACKGROUND)
    made.step(made.order.batch(0))
    monkeypatch.setattr(weights, "save_weights", fail)
    made.checkpointer.save(final=False)
    assert made.checkpointer._pending is not None
    assert made.checkpointer._pending._thread is not None
    made.checkpointer._pending._thread.join()
    with pytest.raises(RuntimeError, match="the cable was pulled"):
        made.step(made.order.batch(1))
    assert steps(made) == []
    assert not list(made.run.directory.checkpoints.iterdir()), "nothing half-written is left"


def test_a_run_that_saves_beside_its_steps_is_the_run_that_waits(configure: Callable[..., Config], tmp_path: Path) -> None:
    from halos.run.lifecycle import run

    for name, background in (("background", "true"), ("foreground", "false")):
        assert (
            run(configure(*IN_BACKGROUND, f"checkpoint.async_save={background}", "checkpoint.every=1", f"exp_name={name}"), [])
            == 0
        )
    one, other = (tmp_path / name for name in ("background", "foreground"))
    assert len(select.checkpoints(one / "checkpoints")) == 4
    for file in [*(one / "checkpoints").rglob("model.safetensors"), one / "FINAL" / "model.safetensors"]:
        assert file.read_bytes() == (other / file.relative_to(one)).read_bytes()


def test_copies_lie_in_the_same_place_every_time() -> None:
    copier, tensor = Copier(), torch.arange(4.0)
    first = copier.copy({"part": {"a": tensor, "b": 1}})["part"]
    place = first["a"].data_ptr()
    tensor += 1
    assert first["a"].tolist() == [0, 1, 2, 3]
    second = copier.copy({"part": {"a": tensor, "b": 1}})["part"]
    assert (second["a"].data_ptr(), second["a"].tolist()) == (place, [1, 2, 3, 4])


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[DeviceMesh]:
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield DeviceMesh("cpu", [0])
    dist.destroy_process_group()


def test_copies_of_shards_are_shards_in_the_same_buffers(mesh: DeviceMesh) -> None:
    copier, copies = Copier(), []
    shard = nn.Parameter(distribute_tensor(torch.arange(6.0).view(3, 2), mesh, [Shard(0)]))
    for _ in range(2):
        copies.append(copier.copy({"weights": {"a": shard, "tied": shard.detach()}})["weights"])
        with torch.no_grad():
            shard.to_local().add_(1)
    (first, tied), (second, _) = (table.values() for table in copies)
    assert isinstance(second, DTensor)
    assert (second.placements, second.device_mesh, second.shape) == (shard.placements, mesh, shard.shape)
    assert second.to_local().flatten().tolist() == [1, 2, 3, 4, 5, 6]
    assert not second.requires_grad
    assert first.to_local().data_ptr() == second.to_local().data_ptr() == tied.to_local().data_ptr()


def test_copies_of_tied_tensors_are_tied() -> None:
    tied = nn.Parameter(torch.arange(4.0))
    copied = Copier().copy({"weights": {"head": tied, "embedding": tied.detach(), "transposed": tied.view(2, 2)}})["weights"]
    assert copied["head"].data_ptr() == copied["embedding"].data_ptr() != tied.data_ptr()
    assert copied["transposed"].shape == (2, 2)
    assert not copied["head"].requires_grad
