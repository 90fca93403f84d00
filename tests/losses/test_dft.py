"""DFT: cross-entropy whose tokens are weighed by their own probability."""

import numpy as np
import pytest

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
    assert policy.derived({"loss": 0.5}) == {"perplexity": pytest.approx(np.exp(0.5))}
