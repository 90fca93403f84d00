"""A reference that follows the policy: what it is after each step, and that tokens far from it are clamped."""

from collections.abc import Callable
from math import log

import numpy as np
import pytest
import torch

from halos.config import schema
from halos.config.schema import Config
from halos.errors import UserError
from halos.logps.model import ModelWithHead
from halos.trainers.base import Trainer
from halos.trainers.humanline import Humanline
from halos.types import TokenLogps

from .test_exact_step import _unsettle

STEPS = ["train.batch_size=4", "optim.lr=0.01", "schedule=constant", "train.steps=6"]


def policy_values(trainer: Trainer) -> dict[str, torch.Tensor]:
    own = next(part for part in trainer.run.module.modules() if isinstance(part, ModelWithHead))
    trained = {name: value.detach().clone() for name, value in own.named_parameters() if value.requires_grad}
    assert trained
    return trained


def reference_values(trainer: Trainer) -> dict[str, torch.Tensor]:
    if trainer.reference is not None:
        return dict(trainer.reference.named_parameters())
    return next(part for part in trainer.run.module.modules() if isinstance(part, ModelWithHead)).reference_values


def take_steps(trainer: Trainer, number: int) -> tuple[list[dict[str, torch.Tensor]], list[float]]:
    """The policy before each step, and the losses."""
    policies, losses = [], []
    for _ in range(number):
        policies.append(policy_values(trainer))
        total, count = trainer.step(trainer.order.batch(trainer.run.step))["loss"]
        losses.append(total / count)
    return policies, losses


@pytest.mark.parametrize("peft", ["none", "lora"])
def test_the_reference_is_the_policy_before_the_update_of_the_step_at_which_it_moved(
    peft: str, trainer: Callable[..., Trainer]
) -> None:
    one = trainer("loss=dpo", f"peft={peft}", "reference.sync_every=2", *STEPS)
    start = policy_values(one)
    policies, losses = take_steps(one, 5)
    # moved at steps 2 and 4, whose policies are the second and the fourth
    for name, value in reference_values(one).items():
        assert torch.equal(value, policies[3][name]), name
    assert any(not torch.equal(policies[3][name], start[name]) for name in start)
    assert losses[0] == pytest.approx(log(2), abs=1e-6)
    assert abs(losses[2] - log(2)) > 1e-4  # it moved before the update of step 2, which is all that they differ by
    assert abs(losses[4] - log(2)) > 1e-4


@pytest.mark.parametrize("peft", ["none", "lora"])
def test_a_part_of_the_policy_moves_it_by_an_average(peft: str, trainer: Callable[..., Trainer]) -> None:
    one = trainer("loss=ipo", f"peft={peft}", "reference.sync_every=1", "reference.sync_weight=0.25", *STEPS)
    policies, _ = take_steps(one, 3)
    for name, value in reference_values(one).items():
        expected = policies[0][name].double()
        for policy in policies:
            expected = 0.25 * policy[name].double() + 0.75 * expected
        torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=1e-7)


def test_clamped_by_hand() -> None:
    """Six tokens, of which one is below -1, one above 0.5, and one is padding far from everything."""
    policy = torch.tensor([[-1.0, -4.0, -0.5], [-2.0, -1.5, 0.0]], requires_grad=True)
    reference = torch.tensor([[-1.5, -2.5, -2.0], [-2.25, -1.5, 0.0]])
    mask = torch.tensor([[True, True, True], [True, True, False]])
    values = policy + 0.0
    clamped, share = Humanline(-1.0, 0.5).clamp(TokenLogps(values, mask), TokenLogps(reference, mask))
    # ratios 0.5 (at the bound: kept), -1.5 (clamped to -1: -3.5), 1.5 (to 0.5: -1.5), 0.25, 0
    torch.testing.assert_close(clamped.values, torch.tensor([[-1.0, -3.5, -1.5], [-2.0, -1.5, 0.0]]), rtol=0, atol=0)
    assert (share.total.item(), share.count.item()) == (2.0, 5.0)
    clamped.values.sum().backward()
    assert policy.grad is not None
    assert policy.grad.tolist() == [[1.0, 0.0, 0.0], [1.0, 1.0, 1.0]]
    assert Humanline.of(schema.Humanline(None, None)) is None
    one_sided = Humanline.of(schema.Humanline(None, 0.5))
    assert one_sided == Humanline(-torch.inf, 0.5)


def test_bounds_that_no_token_reaches_change_not_one_bit_and_narrow_ones_hold_the_rewards(
    trainer: Callable[..., Trainer],
) -> None:
    moves = ["loss=dpo", "reference.sync_every=2", "optim.lr=0.1", *STEPS[:1], "train.steps=6"]
    wide = ["humanline.low=-1e6", "humanline.high=1e6", "exp_name=wide"]
    assert take_steps(trainer(*moves), 3)[1] == take_steps(trainer(*moves, *wide), 3)[1]
    narrow = trainer(*moves, "exp_name=narrow", "humanline.low=-0.01", "humanline.high=0.02")
    narrow.step(narrow.order.batch(0))
    totals = narrow.step(narrow.order.batch(1))
    clamped, count = totals["humanline/clamped"]
    assert 0 < clamped <= count
    scored = narrow.train.rows.scored[narrow.order.batch(1)]
    assert count == scored.sum()
    for name, total in (("rewards/chosen", totals["rewards/chosen"][0]), ("rewards/rejected", totals["rewards/rejected"][0])):
        assert abs(total) <= 0.1 * 0.02 * scored.sum() + 1e-6, name  # beta times the bound, of every token


@pytest.mark.parametrize(
    "loss",
    [["loss=dpo"], ["loss=kto"], ["loss=mixture", "loss.parts={wpo: {weight: 1}, sft: {weight: 1}}"]],
    ids=["dpo", "kto", "mix"],
)
def test_log_probs_are_reported_as_the_policy_has_them_and_rewards_as_they_are_clamped(
    loss: list[str], trainer: Callable[..., Trainer]
) -> None:
    found = []
    for bounds in ([], ["humanline.low=-0.001", "humanline.high=0.001", "exp_name=narrow"]):
        one = trainer(*loss, "train.microbatch_size=3", *bounds, *STEPS)
        _unsettle(one)
        one.evaluate()
        found.append(one.run.last_eval)
    free, narrow = found
    assert free.keys() == narrow.keys() - {"humanline/clamped"}
    own = [name for name in free if "logps" in name]
    assert len(own) >= 2
    assert {name: narrow[name] for name in own} == {name: free[name] for name in own}
    [rewards] = [name for name in free if name.endswith("rewards/chosen")]
    assert abs(narrow[rewards]) < 0.1 * abs(free[rewards])


def test_the_mismatched_completions_of_kto_are_clamped_too(trainer: Callable[..., Trainer]) -> None:
    """Between bounds of almost nothing the KL is almost nothing, far from what it is without them."""
    kls = []
    for bounds in ([], ["humanline.low=-1e-6", "humanline.high=1e-6", "exp_name=narrow"]):
        one = trainer("loss=kto", "train.microbatch_size=2", *bounds, *STEPS)
        statistics = []
        original = one._statistics
        one._statistics = lambda *arguments, keep=statistics, call=original: keep.append(call(*arguments)) or keep[-1]  # type: ignore[method-assign]
        for number in range(3):
            one.step(one.order.batch(number))
        kls.append(float(np.abs(statistics[2].numpy()).max()))
    assert kls[0] > 1e-2
    assert kls[1] < 1e-3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["loss=simpo", "humanline=on"], "humanline.low=-1.5 bounds .* loss=simpo uses none: humanline=off"),
        (["loss=simpo", "reference.sync_every=2"], "loss=simpo uses none"),
        (["loss=reward", "humanline.low=-1"], "loss=reward uses none"),
        (["loss=grpo", "humanline.high=1", "loss.beta=0.1"], "loss=grpo clips its ratios"),
        (["loss=grpo", "reference.sync_every=2", "loss.beta=0.1"], "computed once, before the first step: leave it out"),
        (["loss=dpo", "reference.sync_weight=0.5"], "has no effect without reference.sync_every"),
        (["loss=dpo", "humanline.low=0", "humanline.high=0"], "no token would have a gradient"),
        (["loss=dpo", "humanline.low=1"], "humanline.low takes a number"),
        (["loss=dpo", "reference.sync_every=0"], "reference.sync_every takes"),
        (["loss=dpo", "reference.sync_weight=0", "reference.sync_every=1"], "reference.sync_weight takes"),
        (["loss=dpo", "peft=lora", "reference.sync_every=1", "reference.name_or_path=tiny"], "is an adapter"),
    ],
)
def test_what_it_cannot_mean_is_refused(words: list[str], message: str, configure: Callable[..., Config]) -> None:
    with pytest.raises(UserError, match=message):
        configure(*words)


def test_log_probs_of_a_reference_that_moves_are_not_kept(trainer: Callable[..., Trainer]) -> None:
    assert trainer("loss=dpo", "reference.sync_every=2", "train.epochs=3").reference_logps is None
    with pytest.raises(UserError, match=r"reference\.cache=always: the reference moves"):
        trainer("loss=dpo", "reference.sync_every=2", "reference.cache=always", "exp_name=other")
