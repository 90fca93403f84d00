"""DPO: -log sigmoid(beta h)."""

import numpy as np
import pytest

from halos.losses.dpo import dpo

from .samples import POLICY, REFERENCE, H, gradients, margins, number, numbers, pair, softplus


def test_the_value_is_the_one_worked_by_hand():
    loss = dpo(pair(*POLICY), pair(*REFERENCE), beta=0.1)
    assert numbers(loss) == pytest.approx(softplus(-0.1 * H), abs=1e-6)
    assert numbers(loss) == pytest.approx([0.620957, 0.744397], abs=1e-6)  # log(1 + e^-.15), log(1 + e^.1)


def test_a_policy_that_equals_its_reference_costs_ln_2_and_has_rewards_of_exactly_zero():
    loss = dpo(pair(*POLICY), pair(*POLICY), beta=0.1)
    assert numbers(loss) == pytest.approx(np.log(2), abs=1e-6)
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins"):
        assert loss.metrics[name].total.item() == 0


def test_length_is_not_divided_out():
    """eric-mitchell/dpo#40: the same gain per token over twice the tokens is twice the margin."""
    rejected = [[-1.0]]

    def margin(tokens: int) -> float:
        policy, reference = pair([[-0.5] * tokens], rejected), pair([[-1.0] * tokens], rejected)
        return number(dpo(policy, reference, beta=1.0).metrics["rewards/margins"])

    assert [margin(2), margin(4)] == pytest.approx([1.0, 2.0])


def test_every_chosen_token_is_pushed_up_and_every_rejected_one_down_by_as_much():
    policy = pair(*POLICY)
    chosen, rejected = gradients(dpo(policy, pair(*REFERENCE), beta=0.1), policy.chosen.values, policy.rejected.values)
    push = 0.1 / (1 + np.exp(0.1 * H))  # beta sigmoid(-beta h): eq. 7's weight, larger where the pair is ranked wrongly
    assert chosen[policy.chosen.mask] == pytest.approx(-np.repeat(push, [3, 2]), abs=1e-6)
    assert rejected[policy.rejected.mask] == pytest.approx(np.repeat(push, [2, 4]), abs=1e-6)


def test_swapping_chosen_and_rejected_adds_the_margin():
    """-log s(-z) = -log s(z) + z."""
    there = dpo(pair(*POLICY), pair(*REFERENCE), beta=0.1)
    back = dpo(pair(*reversed(POLICY)), pair(*reversed(REFERENCE)), beta=0.1)
    assert numbers(back) - numbers(there) == pytest.approx(0.1 * H, abs=1e-6)
    assert number(back.metrics["rewards/margins"]) == pytest.approx(-number(there.metrics["rewards/margins"]))
    assert number(back.metrics["rewards/accuracies"]) == 1 - number(there.metrics["rewards/accuracies"])


def test_metrics_are_the_ones_worked_by_hand():
    metrics = {k: number(v) for k, v in dpo(pair(*POLICY), pair(*REFERENCE), beta=0.1).metrics.items()}
    assert metrics == pytest.approx(
        {
            "rewards/chosen": 0.1 * (0.75 - 0.75) / 2,
            "rewards/rejected": 0.1 * (-0.75 + 0.25) / 2,
            "rewards/margins": 0.1 * (1.5 - 1.0) / 2,
            "rewards/accuracies": 1 / 2,
            "logps/chosen": (-1.75 - 2.5) / 2,
            "logps/rejected": (-1.75 - 3.0) / 2,
            "logps/accuracies": 3 / 4,  # the first pair ties, which is half of one; the second is -2.5 against -3
        },
        abs=1e-6,
    )


def test_reward_accuracy_and_ranking_accuracy_differ_at_the_start():
    """Every implicit reward ties at 0 there, as a coin would rank, while the policy already ranks as its reference does."""
    policy, _ = margins(0.0, 0.0, 0.0)
    metrics = dpo(policy, policy, beta=0.1).metrics
    assert number(metrics["rewards/accuracies"]) == 0.5
    assert number(metrics["logps/accuracies"]) == 1


@pytest.mark.parametrize("h", [-2e4, 2e4])
def test_margins_of_any_size_stay_finite(h: float):
    policy, reference = margins(h)
    loss = dpo(policy, reference, beta=0.1)
    chosen, rejected = gradients(loss, policy.chosen.values, policy.rejected.values)
    assert numbers(loss) == pytest.approx([max(0.0, -0.1 * h)], abs=1e-3)
    assert chosen[0, 0] == pytest.approx(-0.1 if h < 0 else 0, abs=1e-6)
    assert rejected[0, 0] == pytest.approx(0.1 if h < 0 else 0, abs=1e-6)
