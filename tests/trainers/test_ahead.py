"""A thread packs the next micro-batch: the step is the same to the bit, an error is its own step's, and no thread is left."""

import os
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from halos.examples import Completion, Item, PackRow
from halos.trainers.ahead import Later
from halos.trainers.base import Trainer
from halos.types import Loss, TokenLogps

WORDS = ("loss=dpo", "train.batch_size=6", "train.microbatch_size=2", "train.steps=3", "train.eval_every=2", "optim.lr=1e-2")
MAIN, PACKING = "MainThread", "halos packing"
PACKED = 3 * 3 + 2 * 6  # micro-batches of three steps, and of two evaluations of twelve rows


def watched(made: Trainer, damaged: str = "") -> list[str]:
    """The names of the threads that make rows, from now on; those of an item that is `damaged` raise an error."""
    threads, rows = list[str](), made.rows

    def record(items: Sequence[Item]) -> Any:
        threads.append(threading.current_thread().name)
        if damaged in (item.id for item in items):
            raise ValueError(f"row {damaged} is damaged, said {threads[-1]}")
        return rows(items)

    made.rows = record  # type: ignore[method-assign]
    return threads


def packing() -> bool:
    """Whether a thread packs that does not end by itself."""
    threads = [thread for thread in threading.enumerate() if thread.name == PACKING]
    for thread in threads:
        thread.join(60)
    return any(thread.is_alive() for thread in threads)


def weights(made: Trainer) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in made.run.module.parameters()])


def test_a_thread_packs_all_that_is_known_before_its_turn(trainer: Callable[..., Trainer]) -> None:
    ahead, alone = (trainer(*WORDS, "train.eval_at_start=false", f"exp_name={name}") for name in ("ahead", "alone"))
    alone.packs_ahead = False
    threads = [watched(made) for made in (ahead, alone)]
    for made in (ahead, alone):
        made.fit()
    assert set(threads[1]) == {MAIN}
    assert len(threads[0]) == len(threads[1]) == PACKED, "none is packed twice"
    assert threads[0].count(MAIN) == 1 + 2 * 2, "the first of the run, and of each batch of an evaluation"
    assert torch.equal(weights(ahead), weights(alone))
    assert not packing()


@pytest.mark.parametrize(("step", "item"), [(0, 2), (1, 0)])  # in the second micro-batch, and in the first of the next step
def test_an_error_of_the_thread_is_the_steps_own(step: int, item: int, trainer: Callable[..., Trainer]) -> None:
    messages = []
    for name in ("ahead", "alone"):
        made = trainer(*WORDS, "train.eval_at_start=false", f"exp_name={name}")
        made.packs_ahead = name == "ahead"
        damaged = made.train.rows[int(made.order.batch(step)[item])].id
        watched(made, damaged)
        with pytest.raises(ValueError, match="is damaged") as error:
            made.fit()
        assert made.run.step == step, "not before its turn"
        messages.append(str(error.value))
        assert not packing()
    assert messages == [f"row {damaged} is damaged, said {thread}" for thread in (PACKING, MAIN)]


def test_a_layer_that_a_hook_adds_between_steps_is_switched_too(trainer: Callable[..., Trainer]) -> None:
    made = trainer(*WORDS, "train.eval_at_start=false", "reference.cache=never")
    made.step(made.order.batch(0))
    before = made.modes
    layer = made.run.model.get_submodule("model.layers.0")
    layer.mlp = torch.nn.Sequential(layer.mlp, torch.nn.Dropout())
    seen = list[bool]()
    layer.mlp[1].register_forward_pre_hook(lambda each, _: seen.append(each.training))
    made.evaluate()
    assert not any(seen)
    seen.clear()
    made.step(made.order.batch(1))
    assert any(seen)
    assert made.modes is made.modes is not before, "found anew once"


DREW = list[str]()


@dataclass(frozen=True, slots=True)
class Drawn(TokenLogps):
    """Half of the tokens, drawn anew for every micro-batch."""

    @classmethod
    def rows(cls, items: Sequence[Item]) -> list[PackRow]:
        DREW.append(threading.current_thread().name)
        rows = [(item.prompt, item.completions[0]) for item in items]
        return [(prompt, Completion(each.ids, (torch.rand(len(each.ids)) < 0.5).numpy())) for prompt, each in rows]


def drawn(policy: Drawn) -> Loss:
    return Loss(-policy.sum, {})


def test_no_thread_draws_from_the_generators_of_the_step(
    trainer: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(__file__.rpartition("/")[0])
    made = trainer(*WORDS, "loss=sft", "plugins=[test_ahead]", "loss._target_=test_ahead.drawn", "train.eval_at_start=false")
    made.fit()
    assert set(sys.modules["test_ahead"].DREW) == {MAIN}


def test_a_value_is_computed_once_and_in_a_forked_process_too() -> None:
    parent, go_on, calls = os.getpid(), threading.Event(), list[str]()

    def make() -> int:
        calls.append(threading.current_thread().name)
        if os.getpid() == parent:
            go_on.wait(60)
        return 7

    later = Later(make)
    later.start(), later.start()
    child = os.fork()  # which has no such thread
    if not child:
        os._exit(later.result())
    go_on.set()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert later.result() == later.result() == 7
    assert calls == [PACKING]
    assert not packing()
