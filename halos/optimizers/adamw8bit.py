"""AdamW with 8-bit moments, from bitsandbytes where it is installed."""

from collections.abc import Mapping, Sequence
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Annotated, Any

import torch
from torch.optim import Optimizer

from halos.optimizers.standard import Betas, Eps, Group
from halos.ranges import Range

MAPS = {"qmap1": "dynamic", "qmap2": "udynamic"}  # the quantization maps from bytes to values, with bitsandbytes' names for them


def adamw8bit(
    params: Sequence[Group], lr: float, *, betas: Betas, eps: Eps, min_8bit_size: Annotated[int, Range(least=1)]
) -> Optimizer:
    """arXiv:2110.02861. bitsandbytes' moments are plain tensors, which a checkpoint can hold; torchao's are not."""
    return _optimizer_class()(params, lr=lr, betas=betas, eps=eps, min_8bit_size=min_8bit_size)


def check() -> str | None:
    """An error message where bitsandbytes is not installed."""
    if find_spec("bitsandbytes") is None:
        return "it needs the package bitsandbytes: pip install bitsandbytes; optim=adafactor takes little memory without it"
    return None


@cache
def _optimizer_class() -> Any:
    bnb: Any = import_module("bitsandbytes.optim")  # here: only these runs need it

    class TensorStateAdamW8bit(bnb.AdamW8bit):
        """AdamW8bit whose state_dict holds one tensor per parameter and name. bitsandbytes' own wraps them in a mapping, counts
        steps in Python ints, and repeats the same quantization maps for every parameter."""

        def state_dict(self) -> dict[str, Any]:
            whole = Optimizer.state_dict(self)
            return {**whole, "state": {key: _tensors(state) for key, state in whole["state"].items()}}

        def load_state_dict(self, state_dict: dict[str, Any], move_to_device: bool = True) -> None:
            states = {key: _tensors(state) for key, state in state_dict["state"].items()}
            super().load_state_dict({**state_dict, "state": states}, move_to_device)
            for parameter, state in self.state.items():
                state["step"] = int(state["step"])
                if state["state1"].dtype is torch.uint8:
                    state |= {key: self.name2qmap[name].to(parameter.device) for key, name in MAPS.items()}

    return TensorStateAdamW8bit


def _tensors(state: Mapping[str, Any]) -> dict[str, Any]:
    return {**{key: value for key, value in state.items() if key not in MAPS}, "step": torch.tensor(float(state["step"]))}
