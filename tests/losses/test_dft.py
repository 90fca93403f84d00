"""DFT: cross-entropy whose tokens are weighed by their own probability."""

from pathlib import Path

import numpy as np
import pytest
import yaml

from halos.losses.dft import dft

from .samples import gradients, logps, number, numbers

ROWS = [[-0.5, -1.0, -0.25], [-2.0, -0.5]]
LP = np.array([[-0.5, -1.0, -0.25], [-2.0, -0.5, 0.0]])


def test_the_value_is_the_one_worked_by_hand_and_the_weight_has_no_gradient():
    policy = logps(ROWS)
    loss = dft(policy)
    assert loss.per == "token"
    assert numbers(loss) == pytest.approx(-np.exp(LP) * LP, abs=1e-7)
    (gradient,) = gradients(loss, policy.values)
    assert gradient[policy.mask.numpy()] == pytest.approx(-np.exp(LP)[policy.mask.numpy()], abs=1e-7)
    assert number(loss.metrics["nll"]) == pytest.approx(4.25 / 5)


def test_perplexity_is_of_the_cross_entropy_and_not_of_the_loss():
    policy = logps(ROWS)
    means = {"loss": 0.1, **{name: number(mean) for name, mean in dft(policy).metrics.items()}}
    assert policy.derived(means) == {"perplexity": pytest.approx(np.exp(0.85))}
    assert policy.derived({"loss": 0.5}) == {}


def test_the_objective_improves_where_tokens_become_likelier_though_the_loss_rises():
    objective = yaml.safe_load((Path(__file__).parents[2] / "config" / "loss" / "dft.yaml").read_text())["objective"]
    assert objective["mode"] == "min"
    means = []
    for row in ([-4.0, -3.0], [-2.0, -1.5], [-0.75, -0.5]):
        loss = dft(logps([row]))
        means.append({"loss": float(loss.values.detach().mean()), **{name: number(mean) for name, mean in loss.metrics.items()}})
    assert means[0]["loss"] < means[1]["loss"], "worse by the loss"
    values = [each[objective["metric"]] for each in means]
    assert values == sorted(values, reverse=True)
