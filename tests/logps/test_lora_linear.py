"""Adapted linear layers against the formula, and against PEFT's own wherever something else takes part."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn

from halos.logps import lora_linear
from halos.logps.lora_linear import LoraLinear, fuse
from halos.logps.working_weights import kept_casts
from halos.trainers.base import Trainer


class Two(nn.Module):
    def __init__(self, *, bias: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(7, 5, bias=bias), nn.Linear(5, 6, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


def adapted(*, dtype: torch.dtype = torch.float64, bias: bool = True, **settings: object) -> nn.Module:
    torch.manual_seed(0)
    config = LoraConfig(**{"target_modules": ["first", "second"], "r": 3, "lora_alpha": 7.5, **settings})
    model = get_peft_model(Two(bias=bias).to(dtype), config).to(dtype)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.5)
    return model


def trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: each for name, each in model.named_parameters() if each.requires_grad}


def results(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Output, gradient of x and of the trained parameters, of a loss that weighs every output otherwise."""
    x = x.clone().requires_grad_()
    output = model(x)
    weights = torch.linspace(-1, 2, output.numel(), dtype=output.dtype).view(output.shape)
    return [output, *torch.autograd.grad((output * weights).sum(), [x, *trained(model).values()])]


def by_formula(model: nn.Module, x: Tensor) -> Tensor:
    """W x + b + (alpha/r) B A x, of weights alone."""
    named = dict(model.named_parameters())
    for layer in ("first", "second"):
        start = f"base_model.model.{layer}"
        weight, a, b = (named[f"{start}.{end}.weight"] for end in ("base_layer", "lora_A.default", "lora_B.default"))
        x = x @ (weight + 7.5 / 3 * b @ a).T + named.get(f"{start}.base_layer.bias", 0.0)
        x = torch.tanh(x) if layer == "first" else x
    return x


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(4, 7), (1, 4, 7), (2, 3, 7), (0, 7)])
def test_values_and_gradients_are_those_of_the_formula(shape: tuple[int, ...], bias: bool) -> None:
    model, x = adapted(bias=bias), torch.randn(shape, dtype=torch.float64)
    fuse(model)
    wrapped = nn.Module()
    wrapped.forward = lambda x: by_formula(model, x)  # type: ignore[method-assign]
    for name, parameter in trained(model).items():
        wrapped.register_parameter(name.replace(".", "_"), parameter)
    for mine, expected in zip(results(model, x), results(wrapped, x), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-12, atol=1e-12)


def test_gradients_are_those_of_finite_differences() -> None:
    model, x = adapted(), torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    fuse(model)
    parameters = list(trained(model).values())
    assert torch.autograd.gradcheck(lambda x, *_: model(x), (x, *parameters))


def test_of_several_calls_the_gradients_are_summed_in_float32_where_casts_are_kept_too() -> None:
    model, inputs = adapted(dtype=torch.bfloat16), [torch.randn(5, 7).bfloat16() for _ in range(64)]
    fuse(model)
    for parameter in trained(model).values():
        parameter.data = parameter.data.float()

    def gradients(keep: bool) -> tuple[Tensor, ...]:
        with kept_casts(keep):
            with torch.autocast("cpu", torch.bfloat16):
                loss = torch.stack([model(x).float().square().sum() for x in inputs]).sum()
            return torch.autograd.grad(loss, list(trained(model).values()))

    for kept, expected in zip(gradients(True), gradients(False), strict=True):
        assert torch.equal(kept, expected)


def test_of_a_noncontiguous_input_and_one_that_needs_no_gradient() -> None:
    model, x = adapted(), torch.randn(7, 4, dtype=torch.float64).T
    fuse(model)
    torch.testing.assert_close(model(x), by_formula(model, x))
    model(x).sum().backward()
    assert all(parameter.grad is not None for parameter in trained(model).values())


def test_a_fresh_adapter_changes_not_one_bit() -> None:
    model = get_peft_model(Two(bias=True), LoraConfig(target_modules=["first", "second"], r=3))
    fuse(model)
    x = torch.randn(5, 7)
    with model.disable_adapter():
        base = model(x)
    assert torch.equal(model(x), base)


@pytest.fixture
def applied(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """Holds an entry for each layer that was computed so."""
    calls, apply = list[None](), lora_linear.adapted_linear
    monkeypatch.setattr(lora_linear, "adapted_linear", lambda *given: (calls.append(None), apply(*given))[1])
    return calls


def hooked(model: nn.Module) -> None:
    model.base_model.model.first.base_layer.register_forward_hook(lambda *_: None)  # type: ignore[union-attr]


def on_a(model: nn.Module) -> None:
    model.base_model.model.first.lora_A["default"].register_forward_pre_hook(lambda *_: None)  # type: ignore[index, union-attr]


def trains_base(model: nn.Module) -> None:
    model.base_model.model.first.base_layer.weight.requires_grad_()  # type: ignore[union-attr]


def second_adapter(model: nn.Module) -> None:
    model.add_adapter("other", LoraConfig(target_modules=["first"], r=2, init_lora_weights=False))  # type: ignore[operator]
    model.base_model.set_adapter(["default", "other"])  # type: ignore[operator, union-attr]


@pytest.mark.parametrize(
    ("settings", "change", "fused"),
    [
        ({}, None, 2), ({"lora_dropout": 0.4}, None, 0), ({"use_dora": True}, None, 0), ({"lora_bias": True}, None, 0),
        ({}, hooked, 1), ({}, on_a, 1), ({}, trains_base, 1), ({}, second_adapter, 1), ({"use_rslora": True}, None, 2),
    ],
)  # fmt: skip
def test_where_something_else_takes_part_it_is_peft_that_computes(
    settings: dict[str, object], change: Callable[[nn.Module], None] | None, fused: int, applied: list[None]
) -> None:
    model, x = adapted(**settings), torch.randn(4, 7, dtype=torch.float64)
    if change:
        change(model)
    torch.manual_seed(1)
    expected = results(model, x)
    fuse(model)
    torch.manual_seed(1)
    for mine, its in zip(results(model, x), expected, strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-12, atol=1e-12)
    assert len(applied) == fused


@pytest.mark.parametrize(("base", "autocast", "fused"), [("bfloat16", True, 2), ("float32", True, 0), ("bfloat16", False, 0)])
def test_in_half_precision_it_is_no_farther_from_float64_than_peft(
    base: str, autocast: bool, fused: int, applied: list[None]
) -> None:
    """On average over 20 batches. Trained factors are float32, as in a run."""
    model = adapted(dtype=getattr(torch, base))
    for parameter in trained(model).values():
        parameter.data = parameter.data.float()
    exact = adapted()
    exact.load_state_dict({name: value.double() for name, value in model.state_dict().items()})
    batches = [torch.randn(64, 7).to(getattr(torch, base)) for _ in range(20)]
    expected = [results(exact, x.double()) for x in batches]

    def distances() -> Tensor:
        """Of each result, relative."""
        by_batch = []
        for x, values in zip(batches, expected, strict=True):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                computed = results(model, x)
            by_batch.append(
                [
                    float((one.detach() - its.detach()).norm() / its.detach().norm())
                    for one, its in zip(computed, values, strict=True)
                ]
            )
        return torch.tensor(by_batch).mean(0)

    of_peft = distances()
    assert not applied
    fuse(model)
    assert (distances() <= 1.1 * of_peft).all()
    assert len(applied) == fused * len(batches)
    assert {each.dtype for each in trained(model).values()} == {torch.float32}


def test_a_run_with_lora_computes_so_in_all_its_adapted_layers(trainer: Callable[..., Trainer], applied: list[None]) -> None:
    run = trainer("loss=dpo", "peft=lora", "train.steps=1")
    layers = [module for module in run.run.module.modules() if isinstance(module, Linear)]
    assert layers
    assert {type(module) for module in layers} == {LoraLinear}
    run.step(np.arange(4))
    assert applied
