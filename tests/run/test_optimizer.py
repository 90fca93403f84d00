"""Which parameters an optimizer decays, and with what it was set up."""

import pytest
from torch import nn
from torch.optim import SGD, Adam, AdamW, RMSprop

from halos.config.schema import Optim
from halos.run.models import optimizer


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.layer = nn.Linear(4, 5)
        self.frozen = nn.Linear(4, 5).requires_grad_(False)
        self.norm = nn.LayerNorm(5)
        self.experts = nn.Parameter(nn.Linear(4, 10).weight.detach().view(2, 5, 4).clone())
        self.scale = nn.Parameter(nn.Linear(1, 1).bias.detach()[0].clone())


def settings(name: str) -> Optim:
    return Optim(
        name=name, lr=0.25, lr_by_peft={}, lr_from_scratch={}, betas=[0.8, 0.95], eps=1e-7, weight_decay=0.3, init_from=None
    )


def test_matrices_are_decayed_and_norms_biases_and_what_is_frozen_are_not() -> None:
    block = Block()
    names = {id(parameter): name for name, parameter in block.named_parameters()}
    made = optimizer(block, settings("adamw"))
    decay = {names[id(p)]: group["weight_decay"] for group in made.param_groups for p in group["params"]}
    assert decay == {
        "embed.weight": 0.3, "layer.weight": 0.3, "experts": 0.3,
        "layer.bias": 0.0, "norm.weight": 0.0, "norm.bias": 0.0, "scale": 0.0,
    }  # fmt: skip
    assert sum(len(group["params"]) for group in made.param_groups) == len(decay), "each once"


@pytest.mark.parametrize(("name", "kind"), [("adamw", AdamW), ("adam", Adam), ("rmsprop", RMSprop), ("sgd", SGD)])
def test_an_optimizer_is_the_one_that_was_asked_for_with_its_settings(name: str, kind: type) -> None:
    made = optimizer(Block(), settings(name))
    assert type(made) is kind
    wanted = {"lr": 0.25, "betas": (0.8, 0.95), "eps": 1e-7}
    for group in made.param_groups:
        assert {key: group[key] for key in wanted if key in group} == {key: wanted[key] for key in wanted if key in group}
