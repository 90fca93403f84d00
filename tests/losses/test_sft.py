"""SFT: cross-entropy, averaged over every scored token of the global batch."""

import numpy as np
import pytest
import torch

from halos.losses.sft import sft
from halos.types import TokenLogps

from .samples import add_up, gradients, logps, number

ROWS = [[-0.5, -1.0, -0.25], [-2.0], [-0.75, -0.25]]


def test_the_value_is_the_one_worked_by_hand():
    policy = logps(ROWS)
    loss = sft(policy)
    assert loss.per == "token"
    assert loss.values.shape == (3, 3)
    assert (loss.values.sum() / policy.mask.sum()).item() == pytest.approx((1.75 + 2.0 + 1.0) / 6)
    assert number(loss.metrics["logps/completion"]) == pytest.approx(-4.75 / 3)


def test_a_uniform_model_costs_the_log_of_its_vocabulary():
    policy = logps([[-np.log(50.0)] * 4, [-np.log(50.0)] * 2])
    assert (sft(policy).values.sum() / policy.mask.sum()).item() == pytest.approx(np.log(50.0), rel=1e-6)


def test_every_token_weighs_the_same_whatever_micro_batch_it_came_in():
    """HALOs and others average the micro-batches' means, so a token of a short row weighs more (trl#2175)."""
    parts = [logps(ROWS[:1]), logps(ROWS[1:])]
    exact = sum(sft(part).values.sum().item() for part in parts) / sum(part.mask.sum().item() for part in parts)
    of_means = np.mean([(sft(part).values.sum() / part.mask.sum()).item() for part in parts])
    assert exact == pytest.approx(4.75 / 6)
    assert of_means == pytest.approx((1.75 / 3 + 3.0 / 3) / 2)
    assert add_up(map(sft, parts))["logps/completion"] == pytest.approx((-4.75, 3.0))


def test_a_token_that_is_certain_counts_although_its_log_prob_is_zero():
    """HALOs takes "log-prob is not 0" for the mask."""
    policy = logps([[0.0, -1.0], [0.0]])
    (gradient,) = gradients(sft(policy), policy.values)
    assert policy.mask.sum().item() == 3
    assert policy.length.tolist() == [2, 1]
    assert (sft(policy).values.sum() / policy.mask.sum()).item() == pytest.approx(1 / 3)
    assert (gradient[policy.mask] == -1).all()


def test_every_scored_token_is_pushed_up_by_the_same():
    policy = logps(ROWS)
    (gradient,) = gradients(sft(policy), policy.values)
    assert (gradient[policy.mask] == -1).all()


def test_values_keep_float32():
    policy = TokenLogps(torch.full((1, 3), -1.0001), torch.ones(1, 3, dtype=torch.bool))
    assert sft(policy).values.dtype == torch.float32
    assert sft(policy).values.sum().item() == pytest.approx(3.0003, abs=1e-6)  # bfloat16 would say 3
