"""The policy in training as a sampler uses it: in the precision of training, and as it was before afterwards."""

import threading
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from halos.online.unsharded import computing_as_trained


class Model(nn.Linear):
    dtype = torch.float32


def accelerator(precision: str) -> Any:
    return SimpleNamespace(
        mixed_precision=precision, device=torch.device("cpu"), autocast=lambda: torch.autocast("cpu", dtype=torch.bfloat16)
    )


def in_thread(model: nn.Module, row: torch.Tensor) -> torch.Tensor:
    results = []
    thread = threading.Thread(target=lambda: results.append(model(row)))
    thread.start()
    thread.join()
    return results[0].detach()


def test_within_any_thread_computes_under_autocast_and_afterwards_nothing_is_left_of_it() -> None:
    model, row = Model(8, 8), torch.randn(1, 8)
    exact, weight = model(row).detach(), model.weight.detach().clone()
    with computing_as_trained(model, accelerator("bf16")):
        assert model.dtype == torch.bfloat16
        assert in_thread(model, row).dtype == model(row).dtype == torch.bfloat16
    assert (type(model), model.dtype, "forward" in vars(model)) == (Model, torch.float32, False)
    assert not torch.is_autocast_enabled("cpu")
    assert torch.equal(model(row), exact)
    with torch.no_grad():
        model.weight.mul_(2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        now = model(row)
    expected = (row.bfloat16() @ (2 * weight).bfloat16().T).float() + model.bias
    torch.testing.assert_close(now.float(), expected, rtol=2e-2, atol=2e-2)
    now.sum().backward()
    assert model.weight.grad is not None, "no cast of the sampler is left in the graph"


def test_in_float32_the_model_is_left_alone() -> None:
    model = Model(2, 2)
    with computing_as_trained(model, accelerator("no")):
        assert (type(model), "forward" in vars(model)) == (Model, False)
