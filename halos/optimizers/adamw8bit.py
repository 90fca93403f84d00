"""AdamW whose moments are kept in 8 bits, of bitsandbytes where it is installed."""

from collections.abc import Mapping, Sequence
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Annotated, Any

import torch
from torch.optim import Optimizer

from halos.optimizers.standard import Betas, Eps, Group
from halos.ranges import Range

MAPS = {"qmap1": "dynamic", "qmap2": "udynamic"}  # from bytes to values, with the names of bitsandbytes'


def adamw8bit(
    params: Sequence[Group], lr: float, *, betas: Betas, eps: Eps, min_8bit_size: Annotated[int, Range(least=1)]
) -> Optimizer:
    """arXiv:2110.02861. bitsandbytes' moments are plain tensors, which a checkpoint can hold; torchao's are not."""
    return _kind()(params, lr=lr, betas=betas, eps=eps, min_8bit_size=min_8bit_size)


def check() -> str | None:
    """The complaint where the package is not installed."""
    if find_spec("bitsandbytes") is None:
        return "it needs the package bitsandbytes: pip install bitsandbytes; optim=adafactor takes little memory without it"
    return None


@cache
def _kind() -> Any:
    own: Any = import_module("bitsandbytes.optim")  # here: only these runs need it

    class Saved(own.AdamW8bit):
        """With its state as tensors by parameter. Its own hides them in a mapping, counts steps in numbers of Python's, and has
        the same maps from bytes to values with every parameter."""

        def state_dict(self) -> dict[str, Any]:
            found = Optimizer.state_dict(self)
            return {**found, "state": {key: _tensors(state) for key, state in found["state"].items()}}

        def load_state_dict(self, state_dict: dict[str, Any], move_to_device: bool = True) -> None:
            states = {key: _tensors(state) for key, state in state_dict["state"].items()}
            super().load_state_dict({**state_dict, "state": states}, move_to_device)
            for parameter, state in self.state.items():
                state["step"] = int(state["step"])
                if state["state1"].dtype is torch.uint8:
                    state |= {key: self.name2qmap[name].to(parameter.device) for key, name in MAPS.items()}

    return Saved


def _tensors(state: Mapping[str, Any]) -> dict[str, Any]:
    return {**{key: value for key, value in state.items() if key not in MAPS}, "step": torch.tensor(float(state["step"]))}
