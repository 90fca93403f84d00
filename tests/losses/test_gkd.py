"""Distillation: divergences of two distributions of which k outcomes are known, against numbers worked by hand in float64."""

import numpy as np
import pytest
import torch
from torch import Tensor

from halos.losses.gkd import Distilled, gkd

from .samples import number, numbers

P = np.array([[[0.5, 0.25], [0.125, 0.75], [0.5, 0.5 - 1e-9]], [[0.25, 0.25], [0.9, 0.05], [1.0, 1.0]]])  # the teacher's
Q = np.array([[[0.25, 0.5], [0.25, 0.5], [0.5, 0.25]], [[0.25, 0.25], [0.6, 0.3], [1.0, 1.0]]])  # the policy's
MASK = np.array([[True, True, True], [True, True, False]])


def of(probabilities: np.ndarray, padding: int = 0) -> Distilled:
    """Rows of 3 and 2 tokens; the log-prob of the target is that of the first id."""
    logps, mask = torch.from_numpy(np.log(probabilities)).float(), torch.from_numpy(MASK)
    logps = torch.nn.functional.pad(torch.where(mask[..., None], logps, 0.0), (0, 0, 0, padding)).requires_grad_()
    mask = torch.nn.functional.pad(mask, (0, padding))
    return Distilled(logps[..., 0].detach(), mask, candidates=logps)


def whole(probabilities: np.ndarray, tail: str) -> np.ndarray:
    if tail == "drop":
        return probabilities
    return np.concatenate([probabilities, np.maximum(1 - probabilities.sum(-1, keepdims=True), 2.0**-23)], -1)


def by_hand(beta: float, tail: str) -> np.ndarray:
    p, q = whole(P, tail), whole(Q, tail)
    if beta == 0:
        return (p * np.log(p / q)).sum(-1)
    if beta == 1:
        return (q * np.log(q / p)).sum(-1)
    m = beta * p + (1 - beta) * q
    return (beta * p * np.log(p / m) + (1 - beta) * q * np.log(q / m)).sum(-1)


@pytest.mark.parametrize("tail", ["bucket", "drop"])
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_the_value_is_the_divergence_of_what_is_known(beta: float, tail: str) -> None:
    loss = gkd(of(Q), of(P), beta=beta, tail=tail)
    assert loss.per == "token"
    np.testing.assert_allclose(numbers(loss)[MASK], by_hand(beta, tail)[MASK], rtol=2e-6, atol=2e-7)
    assert numbers(loss)[1, 2] == 0.0
    assert number(loss.metrics["nll"]) == pytest.approx(-np.log(Q[MASK][:, 0]).mean(), rel=1e-6)
    assert number(loss.metrics["teacher/nll"]) == pytest.approx(-np.log(P[MASK][:, 0]).mean(), rel=1e-6)
    assert number(loss.metrics["teacher/mass"]) == pytest.approx(P[MASK].sum(-1).mean(), rel=1e-6)
    assert numbers(gkd(of(Q, 2), of(P, 2), beta=beta, tail=tail)).sum() == pytest.approx(numbers(loss).sum(), abs=1e-6)


def test_the_forward_divergence_of_a_token_is_this_number() -> None:
    """.5 log 2 - .25 log 2 + .25 log 1, and .125 log(1/2) + .75 log(3/2) + .125 log(1/2)."""
    first = numbers(gkd(of(Q), of(P), beta=0.0, tail="bucket"))[0]
    assert first[:2] == pytest.approx([0.25 * np.log(2), 0.75 * np.log(1.5) - 0.25 * np.log(2)], rel=1e-6)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_an_equal_policy_has_no_loss_and_no_gradient(beta: float) -> None:
    policy = of(P)
    loss = gkd(policy, of(P), beta=beta, tail="bucket")
    assert np.abs(numbers(loss)).max() < 1e-7
    logits = torch.tensor([0.3, -0.2, 1.0], requires_grad=True)
    logps = logits.log_softmax(-1)[None, None, :2]
    mask = torch.ones(1, 1, dtype=torch.bool)
    student, teacher = (Distilled(each[..., 0], mask, candidates=each) for each in (logps, logps.detach()))
    own = gkd(student, teacher, beta=beta, tail="bucket")
    assert torch.autograd.grad(own.values.sum(), logits)[0].abs().max() < 1e-7


def full(beta: float, p: Tensor, q: Tensor) -> Tensor:
    """Of whole distributions, from the definition."""
    if beta == 0:
        return (p * (p / q).log()).sum()
    if beta == 1:
        return (q * (q / p).log()).sum()
    m = beta * p + (1 - beta) * q
    return beta * (p * (p / m).log()).sum() + (1 - beta) * (q * (q / m).log()).sum()


@pytest.mark.parametrize("beta", [0.0, 0.7, 1.0])
def test_with_all_ids_but_one_value_and_gradient_are_those_of_the_whole(beta: float) -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 6, generator=generator, dtype=torch.float64)
    student.requires_grad_()
    p, q, mask = teacher.softmax(-1), student.softmax(-1), torch.ones(1, 1, dtype=torch.bool)
    ids = teacher.topk(5).indices
    given = [
        Distilled(each.log()[None, None, 0].float(), mask, candidates=each.log()[ids][None, None].float()) for each in (q, p)
    ]
    loss = gkd(*given, beta=beta, tail="bucket").values.sum()
    wanted = full(beta, p, q)
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    mine, theirs = (torch.autograd.grad(each, student, retain_graph=True)[0] for each in (loss, wanted))
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)
    likelier = torch.autograd.grad(wanted, student)[0]
    assert likelier[(q - p).argmax()] > 0, "descent makes less likely what the policy has too often"
