"""The state of a loss: of the whole global batch, whatever its cut; in every checkpoint; unmoved by a step that is skipped."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from halos.config.bind import bind_loss
from halos.errors import UserError
from halos.hooks.loss_state import LossState
from halos.trainers.base import Trainer

BATCHES = [np.arange(11), np.arange(11, 22)]


def state_of(made: Trainer) -> dict[str, float]:
    hook = made.run.hooks["loss_state"]
    assert isinstance(hook, LossState)
    return dict(hook.values)


@pytest.mark.parametrize("loss", ["bco", "bco_pair"])
def test_the_shift_is_the_mean_of_the_last_steps_rewards_however_they_were_cut(
    loss: str, trainer: Callable[..., Trainer]
) -> None:
    states = []
    for size in (11, 4):
        made = trainer(
            f"loss={loss}", "train.batch_size=11", f"train.microbatch_size={size}", "optim.lr=1e-2", f"exp_name=s{size}"
        )
        made.step(BATCHES[0])
        assert all(value == 0 for name, value in state_of(made).items() if name.endswith("sum")), "policy and reference are equal"
        second, before = made.step(BATCHES[1]), state_of(made)
        third = made.step(BATCHES[0])
        (chosen, some), (rejected, others) = second["rewards/chosen"], second["rewards/rejected"]
        seen = {side: before[f"{side}/count"] for side in ("chosen", "rejected")}
        expected = (chosen / seen["chosen"] + rejected / seen["rejected"]) / 2
        assert some > 0 < others
        assert abs(expected) > 1e-3
        assert third["rewards/shift"][0] / third["rewards/shift"][1] == pytest.approx(expected, rel=1e-6)
        made.evaluate()
        states.append(state_of(made))
    assert states[1] == pytest.approx(states[0], rel=1e-5)
    assert states[0]["chosen/count"] + states[0]["rejected/count"] == 33 * (2 if loss == "bco_pair" else 1)


def test_a_skipped_step_leaves_the_state(trainer: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch) -> None:
    made = trainer("loss=bco_pair", "train.batch_size=11", "optim.lr=1e-2")
    made.step(BATCHES[0])
    before = state_of(made)
    monkeypatch.setattr(made.run.strategy, "clip", lambda *_: torch.tensor(math.inf))
    assert made.step(BATCHES[1]) == {}
    assert state_of(made) == before


STATEFUL = """
from typing import Annotated
from halos.types import Loss, Pair, Range

def start(*, first: Annotated[float, Range(least=0)]):
    return START

def update(state, totals):
    return AFTER

def mine(policy: Pair, state) -> Loss:
    return Loss(-policy.chosen.sum * state["seen"], {})
"""
START, AFTER = '{"seen": first}', '{"seen": state["seen"] + totals["loss"][1]}'


@pytest.fixture
def stateful(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., LossState]:
    """`stateful(name, start=..., after=...)`: the state of a user's own loss."""
    monkeypatch.syspath_prepend(tmp_path)

    def make(name: str, start: str = START, after: str = AFTER) -> LossState:
        (tmp_path / f"{name}.py").write_text(STATEFUL.replace("START", start).replace("AFTER", after))
        spec = bind_loss({"_target_": f"{name}.mine", "first": 2.0}, [name])
        assert spec.start is not None
        assert spec.update is not None
        return LossState(spec.name, spec.start, spec.update)

    return make


def test_a_users_own_loss_has_a_state_by_three_functions(stateful: Callable[..., LossState]) -> None:
    hook = stateful("whole_state")
    assert hook.values == {"seen": 2.0}
    hook.update({"loss": (1.0, 4.0)})
    assert hook.state_dict() == {"seen": 6.0}
    hook.load_state_dict({"seen": 9.5})
    assert hook.values == {"seen": 9.5}
    hook.load_state_dict({"other": 1.0})
    assert hook.values == {"seen": 9.5}, "the state of another loss is of no use"


@pytest.mark.parametrize(("name", "start", "message"), [
    ("no_mapping", "3.0", r"start\(\) of the loss no_mapping returns 3.0: return a dict of numbers by name"),
    ("no_number", '{"seen": None}', r"start\(\) of the loss no_number returns None as seen: return a number"),
])  # fmt: skip
def test_an_initial_state_that_no_checkpoint_would_keep_is_refused(
    name: str, start: str, message: str, stateful: Callable[..., LossState]
) -> None:
    with pytest.raises(UserError, match=message):
        stateful(name, start=start)


@pytest.mark.parametrize(("name", "after", "message"), [
    ("other_names", '{"soon": 1.0}', r"update\(\) of the loss other_names returns soon: its state is seen"),
    ("no_float", '{"seen": totals}', r"update\(\) of the loss no_float returns .* as seen: return a number"),
])  # fmt: skip
def test_a_state_that_becomes_something_else_is_refused(
    name: str, after: str, message: str, stateful: Callable[..., LossState]
) -> None:
    hook = stateful(name, after=after)
    with pytest.raises(UserError, match=message):
        hook.update({"loss": (1.0, 4.0)})


def test_a_state_without_its_functions_or_out_of_order_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    head = "from halos.types import Loss, Pair\n"
    (tmp_path / "stateless.py").write_text(f"{head}def start(): return {{'x': 0}}\ndef mine(policy: Pair, state) -> Loss: ...\n")
    (tmp_path / "disordered.py").write_text(f"{head}def mine(policy: Pair, state, reference: Pair) -> Loss: ...\n")
    with pytest.raises(UserError, match="stateless has a parameter `state`, but stateless has no function `update`"):
        bind_loss({"_target_": "stateless.mine"}, ["stateless"])
    with pytest.raises(UserError, match="then optionally `reference`, `statistics` and `state`, in this order"):
        bind_loss({"_target_": "disordered.mine"}, ["disordered"])
