"""Which parameters an optimizer decays and how fast each learns, with what it was set up, and what is tried of it."""

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from torch import nn
from torch.optim import SGD, Adafactor, Adam, AdamW, RMSprop
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_layers import GradientCheckpointingLayer

from halos.config.bind_optim import OptimizerSpec, bind_optimizer
from halos.errors import UserError
from halos.logps.model import ActorCritic, LanguageModel
from halos.optimizers.muon import CombinedOptimizer
from halos.run.optimizer import (
    hidden_matrices,
    make_optimizer,
    parameter_groups,
    refuse_unfit,
    state_bytes,
    trained_parameters,
)
from halos.run.optimizer_trial import try_out

CONFIG = Path(__file__).parents[2] / "config"
CHOICES = sorted(path.stem for path in (CONFIG / "optim").glob("*.yaml") if path.stem not in ("own", "adamw8bit"))
SHARED = {"lr": 0.25, "lr_by_peft": {}, "lr_from_scratch": {}, "lr_by_name": {}, "loraplus_lr_ratio": None, "weight_decay": 0.3,
          "init_from": None}  # fmt: skip
CPU = torch.device("cpu")


class Layer(GradientCheckpointingLayer):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 5)
        self.positions = nn.Embedding(3, 5)
        self.lora_A = nn.Linear(4, 2, bias=False)
        self.lora_B = nn.Linear(2, 5, bias=False)
        self.experts = nn.Parameter(nn.Linear(4, 10).weight.detach().view(2, 5, 4).clone())


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.layer = Layer()
        self.frozen = nn.Linear(4, 5).requires_grad_(False)
        self.norm = nn.LayerNorm(5)
        self.scale = nn.Parameter(nn.Linear(1, 1).bias.detach()[0].clone())


def spec(choice: str = "adamw", **values: Any) -> OptimizerSpec:
    node = yaml.safe_load((CONFIG / "optim" / f"{choice}.yaml").read_text())
    base = yaml.safe_load((CONFIG / "optim" / "adamw.yaml").read_text()) if node.pop("defaults", None) else {}
    return bind_optimizer({**SHARED, **base, **node, **values}, [])


def by_name(module: nn.Module, spec: OptimizerSpec, key: str) -> dict[str, float]:
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    found = [(names[id(p)], group[key]) for group in make_optimizer(module, spec).param_groups for p in group["params"]]
    assert len(dict(found)) == len(found), "each once"
    return dict(found)


def test_matrices_are_decayed_and_norms_biases_and_what_is_frozen_are_not() -> None:
    assert by_name(Block(), spec(), "weight_decay") == {
        "embed.weight": 0.3, "layer.linear.weight": 0.3, "layer.positions.weight": 0.3, "layer.lora_A.weight": 0.3,
        "layer.lora_B.weight": 0.3, "layer.experts": 0.3,
        "layer.linear.bias": 0.0, "norm.weight": 0.0, "norm.bias": 0.0, "scale": 0.0,
    }  # fmt: skip


def test_rates_go_by_name_then_by_lora_plus_then_by_the_optimizers_own() -> None:
    rates = by_name(Block(), spec(loraplus_lr_ratio=16.0, lr_by_name={r"norm\.": 0.5, "^embed": 0.0}), "lr")
    assert {name: rate for name, rate in rates.items() if rate != 0.25} == {
        "layer.lora_B.weight": 4.0, "norm.weight": 0.5, "norm.bias": 0.5, "embed.weight": 0.0,
    }  # fmt: skip
    first = parameter_groups(list(Block().named_parameters()), spec(lr_by_name={"embed": 1.0}))[0]
    assert first["lr"] == 0.25, "the first group's is the one that is logged"


class Wrapped(nn.Module):
    """As DDP holds a module."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


@pytest.mark.parametrize("wrap", [LanguageModel, ActorCritic, lambda model: Wrapped(ActorCritic(model))])
def test_names_are_those_of_the_model_whatever_wraps_it(wrap: Callable[[nn.Module], nn.Module]) -> None:
    model = LlamaForCausalLM(
        LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2, vocab_size=9)
    )
    own = dict(model.named_parameters())
    module = wrap(model)
    found = dict(trained_parameters(module))
    assert {name: parameter for name, parameter in found.items() if not name.startswith("value_head.")} == own
    rates = {r"^model\.layers\.0\.": 0.0, "^value_head": 0.5, r"model\.norm": 0.125}
    groups = make_optimizer(module, spec(lr_by_name=rates)).param_groups
    given = {parameter: group["lr"] for group in groups for parameter in group["params"]}
    for name, parameter in found.items():
        kind = name.startswith("model.layers.0."), name.startswith("value_head."), name == "model.norm.weight"
        assert given[parameter] == (0.0 if kind[0] else 0.5 if kind[1] else 0.125 if kind[2] else 0.25), name
    refuse_unfit(model, spec(lr_by_name=rates), more=["value_head.weight"])


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"lr_by_name": {"value_hed": 1.0}}, ["optim.lr_by_name", "'value_hed'; there is scale"]),
        ({"lr_by_name": {"embed": 1.0, "weight": 2.0}}, ["optim.lr_by_name gives embed.weight several learning rates: 1, 2"]),
    ],
)
def test_a_name_that_is_nowhere_and_two_that_differ_are_refused(values: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UserError) as told:
        refuse_unfit(Block(), spec(**values))
    assert all(word in str(told.value) for word in words)
    refuse_unfit(Block(), spec(lr_by_name={"value_head": 1.0}), more=["value_head.weight"])


@pytest.mark.parametrize(
    ("choice", "kind", "wanted"),
    [
        ("adamw", AdamW, {"betas": (0.8, 0.95), "eps": 1e-7, "fused": None}), ("adam", Adam, {"betas": (0.8, 0.95), "eps": 1e-7}),
        ("rmsprop", RMSprop, {"eps": 1e-7}), ("sgd", SGD, {}),
        ("adafactor", Adafactor, {"beta2_decay": -0.8, "eps": (None, 1e-3)}),
    ],
)  # fmt: skip
def test_an_optimizer_is_the_one_that_was_asked_for_with_its_settings(choice: str, kind: type, wanted: dict[str, Any]) -> None:
    optimizer = make_optimizer(Block(), spec(choice, **{key: value for key, value in {"betas": [0.8, 0.95], "eps": 1e-7}.items()
                                         if key in wanted and choice != "adafactor"}))  # fmt: skip
    assert type(optimizer) is kind
    for group in optimizer.param_groups:
        assert {key: group[key] for key in wanted} == wanted
        assert group["lr"] == 0.25


def test_one_kernel_is_asked_for_where_all_parameters_lie_on_a_gpu() -> None:
    from halos.optimizers import standard

    def group(*devices: str) -> dict[str, Any]:
        return {"params": [SimpleNamespace(device=torch.device(device)) for device in devices]}

    assert standard.on_gpu([group("cuda", "cuda:1"), group("cuda")])
    assert not standard.on_gpu([group("cuda"), group("cuda", "cpu")])
    assert make_optimizer(Block(), spec(fused=True)).param_groups[0]["fused"] is True
    assert make_optimizer(Block(), spec(fused=False)).param_groups[0]["fused"] is None, "as torch chooses, and as it was before"


def test_muon_moves_the_matrices_of_hidden_layers_and_adamw_all_else() -> None:
    block = Block()
    names = {parameter: name for name, parameter in block.named_parameters()}
    assert {names[p] for p in hidden_matrices(block)} == {"layer.linear.weight", "layer.lora_A.weight", "layer.lora_B.weight"}
    optimizer = make_optimizer(block, spec("muon", weight_decay=0.0, adjust_lr="original", lr=0.1))
    for parameter in names:
        parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
    before = {name: parameter.detach().clone() for parameter, name in names.items()}
    optimizer.step()
    moved = {name: before[name] - parameter.detach() for parameter, name in names.items()}
    # of a gradient of rank one all singular values but one are 0: what is left of it is that one, brought to between 0.7 and 1.2
    norm = torch.linalg.matrix_norm(moved["layer.linear.weight"], 2) / (0.1 * (5 / 4) ** 0.5)
    assert 0.65 < norm < 1.25
    assert moved["layer.linear.weight"].std() < 1e-3 * moved["layer.linear.weight"].mean()
    for name in ("embed.weight", "norm.weight", "layer.experts", "layer.positions.weight", "layer.linear.bias"):
        assert torch.allclose(moved[name], torch.full_like(moved[name], 0.1), rtol=1e-3), f"{name}: Adam's first step is the rate"
    assert not moved["frozen.weight"].any()


def test_muon_over_nothing_that_it_is_for_is_refused() -> None:
    with pytest.raises(UserError, match="matrices of hidden layers"):
        refuse_unfit(nn.Linear(3, 3), spec("muon"))


@pytest.mark.parametrize("choice", CHOICES)
def test_every_optimizer_goes_on_to_the_bit_and_says_what_it_keeps(choice: str) -> None:
    sizes = try_out(spec(choice), CPU, "whole")
    adam = {"hidden": 8.0, "matrix": 8.0, "vector": 8.0}
    wanted = {"adamw": adam, "adam": adam, "muon": {**adam, "hidden": 4.0}, "rmsprop": dict.fromkeys(adam, 4.0),
              "sgd": dict.fromkeys(adam, 0.0), "adafactor": {"hidden": 0.09, "matrix": 0.09, "vector": 4.0}}  # fmt: skip
    assert sizes == {kind: pytest.approx(size, abs=0.04) for kind, size in wanted[choice].items()}


@pytest.mark.parametrize("layout", ["rows", "flat"])
def test_what_works_on_whole_matrices_is_refused_where_they_are_shared_out(layout: Any) -> None:
    for choice in CHOICES:
        if choice not in ("muon", "adafactor"):
            try_out(spec(choice), CPU, layout)
            continue
        with pytest.raises(UserError, match=f"optim {choice} needs whole parameters.*cpu2.yaml"):
            try_out(spec(choice), CPU, layout)


def test_what_is_kept_counts_each_parameter_by_its_kind() -> None:
    sizes = {"hidden": 1.0, "matrix": 100.0, "vector": 10000.0}
    assert state_bytes(Block(), spec("muon"), sizes) == (20 + 8 + 10) + 100 * (28 + 15 + 40) + 10000 * (5 + 5 + 5 + 1)
    assert state_bytes(Block(), spec("adamw"), sizes) == 100 * (20 + 8 + 10 + 28 + 15 + 40) + 10000 * 16


class Step(torch.optim.Optimizer):
    """Moves by the rate and by what `move` makes of a gradient and the parameter's state."""

    def __init__(self, params: Any, move: Any) -> None:
        super().__init__(params, {})
        self.move, self.count = move, 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter -= group["lr"] * self.move(self, parameter.grad, self.state[parameter], group)


class OneRate(torch.optim.SGD):
    """Moves by the rate that it was made with."""

    def __init__(self, params: Any) -> None:
        super().__init__(params)
        self.rate = self.param_groups[0]["lr"]

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["lr"] = self.rate
        super().step()


class FirstGroup(torch.optim.AdamW):
    def __init__(self, params: Any) -> None:
        super().__init__(params[:1])


def counts_in_a_number(self: Step, grad: torch.Tensor, state: Any, group: Any) -> Any:
    state["step"] = state.get("step", 0) + 1
    return grad / state["step"]


def counts_outside_its_state(self: Step, grad: torch.Tensor, state: Any, group: Any) -> Any:
    self.count += 1
    return grad / self.count


def acts_after_the_trial(self: Step, grad: torch.Tensor, state: Any, group: Any) -> Any:
    self.count += 1
    return grad if self.count % 15 else 0.5 * grad  # at the fifth step of three parameters


def acts_by_its_group_after_the_trial(self: Step, grad: torch.Tensor, state: Any, group: Any) -> Any:
    group["seen"] = [*group.get("seen", ()), 1]
    return grad if len(group["seen"]) % 10 else 0.5 * grad


def acts_by_another_object_after_the_trial(self: Step, grad: torch.Tensor, state: Any, group: Any) -> Any:
    self.helper = helper = getattr(self, "helper", SimpleNamespace(inner=SimpleNamespace(count=0)))
    helper.inner.count += 1
    return grad if helper.inner.count % 15 else 0.5 * grad


SEEN: list[int] = []


def counts_outside_itself(self: Step, grad: torch.Tensor, state: Any, group: Any) -> Any:
    SEEN.append(1)
    return grad / len(SEEN)


def sets_a_cache_once(self: Step, grad: torch.Tensor, state: Any, group: Any) -> Any:
    self.scale = 1.0  # type: ignore[attr-defined]
    return counts_in_a_tensor(self, grad, state, group)


def counts_in_its_group(self: Step, grad: torch.Tensor, state: Any, group: Any) -> Any:
    group["k"] = group.get("k", 0) + 1
    return grad / group["k"]


def counts_in_a_tensor(self: Step, grad: torch.Tensor, state: Any, group: Any) -> Any:
    state["step"] = state.get("step", torch.zeros(())) + 1
    return grad / state["step"] + group["weight_decay"]


SHARED_BY_ALL = torch.ones(3)


def shares_a_tensor(self: Step, grad: torch.Tensor, state: Any, group: Any) -> Any:
    state["table"] = SHARED_BY_ALL
    return grad + group["weight_decay"]


def looks_ahead(self: Step, grad: torch.Tensor, state: Any, group: Any) -> Any:
    self.slow = slow = getattr(self, "slow", {})  # type: ignore[attr-defined]
    slow.setdefault(grad.shape, grad.clone())  # and reads it at the fifth step
    return counts_in_a_tensor(self, grad, state, group)


def averages_elsewhere(self: Step, grad: torch.Tensor, state: Any, group: Any) -> Any:
    self.means = means = getattr(self, "means", {})  # type: ignore[attr-defined]
    means[grad.shape] = 0.5 * means.get(grad.shape, 0.0) + grad
    return counts_in_a_tensor(self, grad, state, group)


def looks_at_what_is_saved(self: Step, grad: torch.Tensor, state: Any, group: Any) -> Any:
    state.setdefault("mean", torch.zeros_like(grad)).mul_(0.5).add_(grad)
    self.views = [state["mean"].view(-1)]  # type: ignore[attr-defined]
    self.scratch = {grad.shape: torch.full_like(grad, float("nan"))}  # type: ignore[attr-defined]
    return state["mean"] + group["weight_decay"]


def averages_squares_elsewhere(self: Step, grad: torch.Tensor, state: Any, group: Any) -> Any:
    self.squares = squares = getattr(self, "squares", {})  # type: ignore[attr-defined]
    squares[grad.shape] = 0.5 * squares.get(grad.shape, 0.0) + grad**2
    return counts_in_a_tensor(self, grad, state, group)


def overwrites_a_buffer(self: Step, grad: torch.Tensor, state: Any, group: Any) -> Any:
    self.buffer = {grad.shape: grad * 2, "table": torch.arange(256)}  # type: ignore[attr-defined]
    return counts_in_a_tensor(self, self.buffer[grad.shape] / 2, state, group)


def fails(self: Step, grad: torch.Tensor, state: Any, group: Any) -> Any:
    raise ZeroDivisionError("of mine")


@pytest.mark.parametrize(
    ("move", "message"),
    [
        (counts_in_a_number, "keeps 'step' in its state as int.*torch.tensor"),
        (counts_outside_its_state, r"optim Step: steps change self\.count, which a checkpoint does not hold"),
        (counts_in_its_group, r"steps change param_groups\[0\]\['k'\]"),
        (acts_after_the_trial, r"steps change self\.count, which"),
        (acts_by_its_group_after_the_trial, r"steps change param_groups\[0\]\['seen'\]"),
        (acts_by_another_object_after_the_trial, r"steps change self\.helper, which"),
        (looks_ahead, r"optim Step: self\.slow\[0\], .* outlasts a step, and a checkpoint does not hold it"),
        (averages_elsewhere, r"optim Step: self\.means\[0\], self\.means\[1\], self\.means\[2\] outlasts a step"),
        (averages_squares_elsewhere, r"optim Step: self\.squares\[0\], .* outlasts a step"),
        (counts_outside_itself, "does not resume from its saved state bit for bit"),
        (shares_a_tensor, "fails on small parameters: RuntimeError.*share memory"),
        (fails, "fails on small parameters: ZeroDivisionError: of mine"),
        (lambda self, grad, state, group: grad, "optim.weight_decay=0.3: Step has no weight decay"),
    ],
)
def test_an_optimizer_that_would_not_resume_exactly_is_refused_before_training(move: Any, message: str) -> None:
    tried = replace(spec(), name="Step", make=partial(Step, move=move))
    with pytest.raises(UserError, match=message):
        try_out(tried, CPU, "whole")
    for accepted in (counts_in_a_tensor, sets_a_cache_once, overwrites_a_buffer, looks_at_what_is_saved):
        try_out(replace(tried, make=partial(Step, move=accepted)), CPU, "whole")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (OneRate, "optim OneRate: the learning rate of its groups, which the schedule sets, changes nothing"),
        (FirstGroup, r"optim FirstGroup: steps leave a parameter of shape \(130,\) as it was"),
    ],
)
def test_an_optimizer_that_ignores_a_group_or_its_learning_rate_is_refused(make: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        try_out(replace(spec(weight_decay=0.0 if make is OneRate else 0.3), name=make.__name__, make=make), CPU, "whole")


def test_a_function_that_returns_no_optimizer_is_refused() -> None:
    with pytest.raises(UserError, match="optim adamw gives a list"):
        try_out(replace(spec(), make=lambda params: params), CPU, "whole")


def test_trying_an_optimizer_leaves_the_runs_random_state_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    try_out(spec("muon"), CPU, "whole")
    assert torch.equal(before, torch.get_rng_state())


def test_one_state_and_one_list_of_groups_serve_several_optimizers() -> None:
    optimizer = make_optimizer(Block(), spec("muon"))
    assert isinstance(optimizer, CombinedOptimizer)
    assert [group["momentum"] for group in optimizer.param_groups if "momentum" in group] == [0.95]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    before = [p.detach().clone() for group in optimizer.param_groups for p in group["params"]]
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.ones_like(parameter)
    optimizer.load_state_dict(optimizer.state_dict())
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.step()
    after = [p.detach() for group in optimizer.param_groups for p in group["params"]]
    assert all(map(torch.equal, before, after)), "the groups that a load has put there are those that a step reads"
    assert len(optimizer.state) == len(after)


def test_eight_bits_need_their_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setattr("halos.optimizers.adamw8bit.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install bitsandbytes"):
        spec("adamw8bit")
