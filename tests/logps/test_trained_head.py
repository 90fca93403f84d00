"""A trained head's log-probs and gradients are those of the formula in float64, whatever is done to the logits and however
many chunks there are; in bfloat16 its weight's gradient is not the worse for their number."""

import pytest
import torch
from torch import Tensor, nn

from halos.logps.trained_head import Softmax, is_covered, logps

ROWS, HIDDEN, VOCABULARY = 96, 16, 50


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def expected(hidden: Tensor, layer: nn.Linear, targets: Tensor, settings: Softmax) -> list[Tensor]:
    """Values, and gradients of hidden states, weight and bias, of a weighted sum: by autograd, in float64, all rows at once."""
    double = nn.Linear(HIDDEN, VOCABULARY, bias=layer.bias is not None, dtype=torch.float64)
    double.load_state_dict({name: value.double() for name, value in layer.state_dict().items()})
    states = hidden.detach().double().requires_grad_()
    logits = double(states) * settings.scale
    logits = logits if settings.softcap is None else settings.softcap * torch.tanh(logits / settings.softcap)
    values = (logits / settings.temperature).log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    (values * torch.linspace(-1, 2, ROWS, dtype=torch.float64)).sum().backward()
    return [values.detach(), *(each.grad for each in (states, *double.parameters()) if each.grad is not None)]


def obtained(hidden: Tensor, layer: nn.Linear, targets: Tensor, settings: Softmax) -> list[Tensor]:
    layer.zero_grad()
    states = hidden.detach().clone().requires_grad_()
    values = logps(layer, states, targets, settings)
    (values * torch.linspace(-1, 2, ROWS)).sum().backward()
    return [values.detach(), *(each.grad for each in (states, *layer.parameters()) if each.grad is not None)]


def off(mine: Tensor, truth: Tensor) -> float:
    return ((mine.double() - truth).norm() / truth.norm()).item()


@pytest.mark.parametrize("rows", [1, 7, ROWS])
@pytest.mark.parametrize(("scale", "softcap", "temperature"), [(1.0, None, 1.0), (0.5, 3.0, 1.0), (2.0, 4.0, 0.7)])
@pytest.mark.parametrize("bias", [False, True])
def test_values_and_gradients_are_those_of_the_formula(
    rows: int, scale: float, softcap: float | None, temperature: float, bias: bool
) -> None:
    torch.manual_seed(0)
    layer, hidden = nn.Linear(HIDDEN, VOCABULARY, bias=bias), drawn(ROWS, HIDDEN, seed=1).float()
    targets = torch.arange(ROWS) % VOCABULARY
    settings = Softmax(scale, softcap, temperature, rows)
    wanted, found = expected(hidden, layer, targets, settings), obtained(hidden, layer, targets, settings)
    assert len(wanted) == len(found) == 3 + bias
    assert max(off(*pair) for pair in zip(found, wanted, strict=True)) < 1e-6


def test_in_bfloat16_the_weights_gradient_is_no_worse_for_more_chunks() -> None:
    torch.manual_seed(0)
    layer, hidden = nn.Linear(HIDDEN, VOCABULARY, bias=False), drawn(ROWS, HIDDEN, seed=1).float()
    targets, errors = torch.arange(ROWS) % VOCABULARY, {}
    for rows in (ROWS, 1):
        settings = Softmax(1.0, None, 1.0, rows)
        with torch.autocast("cpu", torch.bfloat16):
            found = obtained(hidden, layer, targets, settings)
        assert found[2].dtype is torch.float32
        errors[rows] = off(found[2], expected(hidden, layer, targets, settings)[2])
    assert errors[1] < 1.1 * errors[ROWS] < 0.01


def test_a_layer_that_is_more_than_its_table_is_left_to_its_own_forward() -> None:
    class Other(nn.Linear):
        pass

    class Shard(Tensor):
        pass

    hidden = torch.zeros(2, HIDDEN)
    assert is_covered(nn.Linear(HIDDEN, VOCABULARY), hidden)
    assert not is_covered(Other(HIDDEN, VOCABULARY), hidden)
    assert not is_covered(nn.Linear(HIDDEN, VOCABULARY).requires_grad_(False), hidden)
    assert not is_covered(nn.Linear(HIDDEN, VOCABULARY), hidden.bfloat16())
    sharded = nn.Linear(HIDDEN, VOCABULARY)
    sharded.weight = nn.Parameter(sharded.weight.detach().as_subclass(Shard))
    assert not is_covered(sharded, hidden), "of which this process has a part"
    hooked = nn.Linear(HIDDEN, VOCABULARY)
    hooked.register_forward_hook(lambda *_: None)
    assert not is_covered(hooked, hidden)
