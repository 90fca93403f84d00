"""A loss, or a trainer, of a user's own that returns what it should not is one message, and not a wrong number."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from halos.errors import UserError
from halos.trainers.base import Trainer
from halos.trainers.loss_checks import RESERVED, checked_loss, checked_statistics, refuse_metrics
from halos.types import Loss, Mean, PairScores, TokenLogps

TOKENS = TokenLogps(torch.zeros(3, 5), torch.ones(3, 5, dtype=torch.bool))
LEARNED = TokenLogps(torch.zeros(3, 5, requires_grad=True), TOKENS.mask)
COUNT = Mean.of(torch.ones(3))


@pytest.mark.parametrize("shape", [(3,), (3, 5)])
def test_losses_of_items_or_tokens_pass(shape: tuple[int, ...]) -> None:
    loss = Loss(torch.zeros(shape), {"mine": COUNT}, per="token")
    assert checked_loss(loss, "mine", TOKENS, 3) is loss


@pytest.mark.parametrize(
    ("loss", "policy", "message"),
    [
        (torch.zeros(3), TOKENS, "returns a Tensor: return a halos.types.Loss"),
        (Loss(torch.zeros(()), {}), TOKENS, r"values of shape \(\) for 3 items: the loss of each item or token, not reduced"),
        (Loss(torch.zeros(1), {}), TOKENS, r"has the shape \(3,\) or \(3, 5\)"),
        (Loss(torch.zeros(3, 3), {}), TOKENS, r"shape \(3, 3\) for 3 items"),
        (
            Loss(torch.zeros(3, 3), {}),
            PairScores(*torch.zeros(3, 3)),
            r"the loss of each item, not reduced, has the shape \(3,\)$",
        ),
        (Loss(torch.zeros(3), {}, per="items"), TOKENS, "per='items': it is item or token or completion_token"),  # type: ignore[arg-type]
        (Loss(torch.zeros(3), {"stop": COUNT}), TOKENS, "a metric stop, which is the trainer's"),
        (Loss(torch.zeros(3), {"step": COUNT}), TOKENS, "a metric step, which is the trainer's"),
        (Loss(torch.zeros(3), [("mine", COUNT)]), TOKENS, "a list as its metrics: return a dict of halos.types.Mean"),  # type: ignore[arg-type]
        (Loss(torch.zeros(3), {7: COUNT}), TOKENS, "a metric 7, whose name is a int: names are text"),  # type: ignore[dict-item]
        (Loss(torch.zeros(3), {"mine": Mean(torch.zeros(3), torch.ones(3))}), TOKENS, r"metric mine .*: use halos.types.Mean.of"),
        (Loss(torch.zeros(3), {"mine": Mean(1.0, 2.0)}), TOKENS, r"metric mine .*: use halos.types.Mean.of"),  # type: ignore[arg-type]
        (Loss(0.5, {}), TOKENS, "mine returns a float as its values: return a tensor"),  # type: ignore[arg-type]
        (Loss(torch.ones(3), {}), LEARNED, "values without a gradient: compute them from its first argument"),
        (Loss(torch.zeros(3), {"mine": 0.5}), TOKENS, "a float as metric mine: return halos.types.Mean.of"),  # type: ignore[dict-item]
    ],
)
def test_what_a_loss_may_return_by_mistake_is_named(loss: Any, policy: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        checked_loss(loss, "mine", policy, 3)


def test_a_loss_of_zeros_or_nan_needs_no_gradient_and_neither_does_an_evaluation() -> None:
    for number in (0.0, torch.nan):
        checked_loss(Loss(torch.full((3,), number), {}), "mine", LEARNED, 3)
    with torch.no_grad():
        checked_loss(Loss(torch.ones(3), {}), "mine", LEARNED, 3)


def test_losses_in_half_precision_are_summed_in_float32() -> None:
    values = checked_loss(Loss(torch.full((3,), 30000.0, dtype=torch.float16), {}), "mine", TOKENS, 3).values
    assert values.sum() == 90000.0
    assert checked_loss(Loss(torch.zeros(3, dtype=torch.float64), {}), "mine", TOKENS, 3).values.dtype == torch.float64


def test_a_metric_of_the_losss_own_is_not_overwritten_by_a_derived_one(trainer: Callable[..., Trainer]) -> None:
    built = trainer("loss=sft")
    assert built.derived({"nll": 0.0}) == {"perplexity": 1.0}
    assert built.derived({"nll": 0.0, "perplexity": 7.0}) == {}


@pytest.mark.parametrize(("values", "message"), [(torch.zeros(1), r"shape \(1,\) for 3 items"), (0.5, "a float for 3 items")])
def test_statistics_are_one_for_each_item(values: Any, message: str) -> None:
    assert checked_statistics(torch.zeros(3, 2), "mine", 3).shape == (3, 2)
    with pytest.raises(UserError, match=message):
        checked_statistics(values, "mine", 3)


def test_no_name_that_the_trainer_logs_may_be_a_metric_of_a_loss(trainer: Callable[..., Trainer]) -> None:
    built = trainer("loss=sft", "train.steps=1", "train.eval_every=null", "checkpoint.every=null", "train.log_every=1")
    built.fit()
    own = {"perplexity", "logps/completion", "nll"}  # of the loss and its input type
    assert built.run.last_train.keys() - own <= RESERVED
    for name in RESERVED:
        with pytest.raises(UserError, match=f"a metric {name}, which is the trainer's"):
            refuse_metrics({name: COUNT}, "mine")


def test_a_step_checks_what_its_loss_and_its_statistics_return(trainer: Callable[..., Trainer]) -> None:
    built = trainer("loss=kto", "train.batch_size=4")
    loss, indices = built.loss, built.order.batch(0)

    def reduced(*arguments: Any) -> Loss:
        whole = loss.function(*arguments)
        return replace(whole, values=whole.values.mean())

    def one(*_: Tensor) -> Tensor:
        return torch.zeros(1)

    for broken, message in (
        (replace(loss, function=reduced), "shape"),
        (replace(loss, statistics=one), "statistics of the loss"),
    ):
        built.loss = broken
        with pytest.raises(UserError, match=message):
            built.step(indices)


@pytest.mark.parametrize(("step", "message"), [(lambda _: None, "NoneType"), (lambda _: {}, "run.step=0, from 0")])
def test_a_trainers_step_that_does_not_step_is_named(
    trainer: Callable[..., Trainer], step: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = trainer("loss=sft", "train.eval_at_start=false")
    monkeypatch.setattr(built, "step", step)
    with pytest.raises(UserError, match=f"Trainer.step returned .*{message}"):
        built.fit()


def test_a_hook_that_sets_stop_to_something_else_is_told_what_it_takes(trainer: Callable[..., Trainer]) -> None:
    run = trainer("loss=sft").run
    run.stop = True  # type: ignore[assignment]
    with pytest.raises(UserError, match="has set run"):
        assert run.stopped_early
