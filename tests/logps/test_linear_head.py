"""A linear head's log-probs and gradients are those of the formula in float64, whatever is done to the logits and however
many chunks there are; in bfloat16 its weight's gradient is not the worse for their number."""

import pytest
import torch
from torch import Tensor, nn

from halos.logps import linear_head
from halos.logps.distribution import Reading
from halos.logps.linear_head import Softmax, is_covered, is_plain, products, read

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
    values = read(layer, states, Reading(targets), settings)[:, 0]
    (values * torch.linspace(-1, 2, ROWS)).sum().backward()
    return [values.detach(), *(each.grad for each in (states, *layer.parameters()) if each.grad is not None)]


def off(mine: Tensor, truth: Tensor) -> float:
    return ((mine.double() - truth).norm() / truth.norm()).item()


@pytest.mark.parametrize("rows", [1, 7, ROWS])
@pytest.mark.parametrize(("scale", "softcap", "temperature"), [(1.0, None, 1.0), (0.5, 3.0, 1.0), (2.0, 4.0, 0.7)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("trained", [False, True])
def test_values_and_gradients_are_those_of_the_formula(
    rows: int, scale: float, softcap: float | None, temperature: float, bias: bool, trained: bool
) -> None:
    torch.manual_seed(0)
    layer, hidden = nn.Linear(HIDDEN, VOCABULARY, bias=bias).requires_grad_(trained), drawn(ROWS, HIDDEN, seed=1).float()
    targets = torch.arange(ROWS) % VOCABULARY
    settings = Softmax(scale, softcap, temperature, rows)
    wanted, found = expected(hidden, layer, targets, settings), obtained(hidden, layer, targets, settings)
    assert len(wanted) == 3 + bias
    assert len(found) == (3 + bias if trained else 2)
    assert max(off(*pair) for pair in zip(found, wanted, strict=False)) < 1e-6


@pytest.mark.parametrize("trained", [False, True])
def test_of_no_rows_there_is_no_value_and_no_gradient(trained: bool) -> None:
    """Of a micro-batch of samples that were cut nothing is learned."""
    layer, hidden = nn.Linear(HIDDEN, VOCABULARY).requires_grad_(trained), torch.zeros(0, HIDDEN, requires_grad=True)
    for dtype in (torch.float32, torch.bfloat16):
        with torch.autocast("cpu", dtype, enabled=dtype is not torch.float32):
            table = read(layer, hidden, Reading(torch.zeros(0, dtype=torch.long)), Softmax(1.0, None, 1.0, 4))
        assert (table.shape, table.dtype) == ((0, 1), torch.float32)
        table.sum().backward()
    assert hidden.grad is not None
    assert (layer.weight.grad is None) or not layer.weight.grad.any()


@pytest.mark.parametrize("trained", [False, True])
def test_a_frozen_layers_logits_are_computed_once(trained: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    chunks, real = list[int](), products
    monkeypatch.setattr(linear_head, "products", lambda hidden, *more: chunks.append(len(hidden)) or real(hidden, *more))
    layer = nn.Linear(HIDDEN, VOCABULARY).requires_grad_(trained)
    obtained(drawn(ROWS, HIDDEN, seed=1).float(), layer, torch.arange(ROWS) % VOCABULARY, Softmax(1.0, None, 1.0, 32))
    assert chunks == [32] * 3 * (1 + trained)


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


TWO_TERMS = 2**-17  # relative to a logit: each term is rounded to 8 bits, the second of what the first has lost


@pytest.mark.parametrize(("dtype", "has_terms", "error"), [
    (torch.bfloat16, True, TWO_TERMS), (torch.bfloat16, False, 1e-6), (torch.float16, True, 1e-6),
])  # fmt: skip
def test_logits_of_half_precision_are_not_rounded_to_a_half_and_the_weight_is_never_cast_whole(
    dtype: torch.dtype, has_terms: bool, error: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear_head, "COLUMNS", 7)
    monkeypatch.setattr(linear_head, "has_two_terms", lambda: has_terms)
    casts, cast = set[tuple[int, ...]](), Tensor.float
    monkeypatch.setattr(Tensor, "float", lambda self: casts.add(tuple(self.shape)) or cast(self))
    shapes = (ROWS, HIDDEN), (VOCABULARY, HIDDEN), (VOCABULARY,)
    hidden, weight, bias = (10 * drawn(*shape, seed=seed) for seed, shape in enumerate(shapes))
    halves = [each.to(dtype) for each in (hidden, weight, bias)]
    truth = halves[0].double() @ halves[1].double().T + halves[2].double()
    with torch.autocast("cpu", torch.bfloat16):
        result = products(*halves)
    assert result.dtype is torch.float32
    assert off(result, truth) < error
    assert casts <= {(ROWS, HIDDEN), (HIDDEN, 7), (HIDDEN, VOCABULARY % 7)}


@pytest.mark.parametrize("rows", [1, 2, 3, 17, 300])
@pytest.mark.parametrize("inner", [8, 64, 576])
def test_two_terms_hold_for_products_of_any_size(rows: int, inner: int) -> None:
    if not linear_head.has_two_terms():
        pytest.skip("this CPU rounds a product before it subtracts")
    for tokens in (1, 5, 40, 5000):
        hidden, weight = drawn(rows, inner, seed=1).bfloat16(), drawn(tokens, inner, seed=2).bfloat16()
        assert off(products(hidden, weight, None), hidden.double() @ weight.double().T) < TWO_TERMS


def test_products_that_round_before_they_subtract_have_no_second_term(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "addmm", lambda total, left, right, *, beta: beta * total + left @ right)
    assert not linear_head.has_two_terms.__wrapped__()


def test_blocks_of_rows_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    for vocabulary in (VOCABULARY, 50_257):
        weight, hidden = drawn(vocabulary, HIDDEN, seed=1), drawn(43, HIDDEN, seed=2).requires_grad_()
        results = list[tuple[Tensor, ...]]()
        for elements in (2**30, 21 * vocabulary, 5 * vocabulary):
            monkeypatch.setattr(linear_head, "IN_CACHE", elements)
            reading = Reading(torch.arange(43) % vocabulary)
            values = linear_head._FrozenLogProbs.apply(hidden, weight, None, reading.targets, Softmax(0.5, 9.0, 2.0, 43))
            results.append((values, *torch.autograd.grad(values.sum(), hidden)))
        assert all(torch.equal(*pair) for other in results[1:] for pair in zip(results[0], other, strict=True))


@pytest.mark.parametrize("trained", [False, True])
def test_log_probs_of_half_precision_are_those_of_its_hidden_states_and_weight(trained: bool) -> None:
    layer = nn.Linear(HIDDEN, VOCABULARY, bias=False, dtype=torch.bfloat16).requires_grad_(trained)
    layer.weight.data.copy_(drawn(VOCABULARY, HIDDEN, seed=2))
    hidden, targets = (8 * drawn(ROWS, HIDDEN, seed=1)).bfloat16(), torch.arange(ROWS) % VOCABULARY
    settings = Softmax(1.0, None, 1.0, 16)
    wanted, found = expected(hidden, layer, targets, settings), obtained(hidden, layer, targets, settings)
    assert is_covered(layer, hidden)
    assert off(found[0], wanted[0]) < TWO_TERMS, "rounding logits of this size to bfloat16 would give 1e-3"
    assert len(found) == 2 + trained
    assert max(off(*pair) for pair in zip(found[1:], wanted[1:], strict=False)) < 0.01
    with torch.no_grad():
        assert torch.equal(read(layer, hidden, Reading(targets), settings)[:, 0], found[0]), "the reference's path"


def test_a_layer_that_is_more_than_its_table_is_left_to_its_own_forward() -> None:
    class Other(nn.Linear):
        pass

    class Shard(Tensor):
        pass

    hidden = torch.zeros(2, HIDDEN)
    assert is_covered(nn.Linear(HIDDEN, VOCABULARY), hidden)
    with torch.no_grad():
        assert not is_covered(nn.Linear(HIDDEN, VOCABULARY), hidden)
    assert not is_covered(nn.Linear(HIDDEN, VOCABULARY), hidden.bfloat16())
    assert is_plain(nn.Linear(HIDDEN, VOCABULARY))
    assert not is_plain(Other(HIDDEN, VOCABULARY))
    sharded = nn.Linear(HIDDEN, VOCABULARY)
    sharded.weight = nn.Parameter(sharded.weight.detach().as_subclass(Shard))
    assert not is_plain(sharded), "of which this process has a part"
    hooked = nn.Linear(HIDDEN, VOCABULARY)
    hooked.register_forward_hook(lambda *_: None)
    assert not is_plain(hooked)
