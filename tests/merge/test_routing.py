"""Tokens of a mixture take the routes of another model, and where they would have gone is known."""

from copy import deepcopy
from typing import Any

import pytest
import torch
import transformers

from halos.merge.probe import outputs_and_routes, outputs_of
from halos.merge.routing import decisions, recorded, rerouted_fraction
from tests.mixtures import build

KNOBS: dict[str, Any] = {"temperature": 1.0, "reward": False}
IDS = torch.randint(3, 90, (3, 11), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Two of four experts are taken in each of two layers."""
    base = build("Mixtral", tmp_path_factory.mktemp("routing") / "base")
    return transformers.AutoModelForCausalLM.from_pretrained(base).eval()


def with_routers(model: Any, factor: float, *, first: int = 0) -> Any:
    other = deepcopy(model)
    for layer in other.model.layers[first:]:
        layer.mlp.gate.weight.data *= factor
    return other


def test_every_token_takes_the_route_that_is_laid_down(mixture: Any) -> None:
    values, routes = outputs_and_routes(mixture, IDS, **KNOBS)
    contrary = with_routers(mixture, -1.0)  # of four experts it takes the other two
    assert decisions(routes) == 2 * IDS.numel()
    assert not torch.allclose(outputs_of(contrary, IDS, **KNOBS), values, atol=1e-3)
    along, chosen = outputs_and_routes(contrary, IDS, **KNOBS, routes=routes)
    assert torch.equal(along, values)
    assert rerouted_fraction(chosen, routes) == 1
    assert torch.equal(outputs_of(mixture, IDS, **KNOBS), values)  # nothing stays behind


def test_experts_that_a_router_chooses_itself_have_its_own_weights(mixture: Any) -> None:
    values, routes = outputs_and_routes(mixture, IDS, **KNOBS)
    keener = with_routers(mixture, 3.0, first=1)  # the same experts, and other weights
    along, chosen = outputs_and_routes(keener, IDS, **KNOBS, routes=routes)
    assert rerouted_fraction(chosen, routes) == 0
    assert torch.equal(along, outputs_of(keener, IDS, **KNOBS))
    assert not torch.allclose(along, values, atol=1e-3)


def test_decisions_are_counted_one_by_one(mixture: Any) -> None:
    with recorded(mixture) as routes:
        outputs_of(mixture, IDS, **KNOBS)
    index, weights = routes[1]
    other = index.clone()
    other[4] = torch.tensor([each for each in range(4) if each not in index[4]])
    other[5] = index[5].flip(0)  # in which order they are named is nothing
    changed = [routes[0], (other, weights)]
    assert rerouted_fraction(changed, routes) == pytest.approx(1 / (2 * IDS.numel()))
    assert rerouted_fraction(routes[:1], routes) == pytest.approx(1 / 2), "a module that recorded nothing agrees in nothing"
