"""In a step the host waits for the device once: to read the gradient norm, and with it everything else that it reads.

The step runs on the meta device, which computes nothing: whatever would wait for a GPU has no answer there.
"""

import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from halos.trainers.base import Trainer

from .test_rollouts import scored  # noqa: F401  a fixture

META = torch.device("meta")
FROM_HOST = (torch.tensor, torch.as_tensor, Tensor.new_tensor)  # on a GPU they copy from memory that is not pinned
READS = ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__")


class Reads(TorchFunctionMode):
    """Counts what reads a tensor of the device, and answers with ones, and at the end of a table with zeros: no unknown names."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = Counter[str]()

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(function, "__name__", "")
        if name in READS and args[0].device == META:
            self.seen[name] += 1
            answer = torch.ones(args[0].shape)
            if answer.ndim:
                answer[-1] = 0
            return function(answer, *args[1:], **(kwargs or {}))
        result = function(*args, **(kwargs or {}))
        if function in FROM_HOST and result.device == META:
            self.seen[f"torch.{name} of numbers of the host"] += 1
        return result


class Copies(TorchDispatchMode):
    """Counts copies from the host other than those of `to_device`. Operations whose result's size depends on values fail."""

    def __init__(self) -> None:
        super().__init__()
        self.others, self.count = Counter[str](), 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        given, made = ({leaf.device.type for leaf in tree_leaves(part) if isinstance(leaf, Tensor)} for part in (args, result))
        if "cpu" in given and "meta" in given | made:
            frames = [frame.name for frame in traceback.extract_stack()]
            self.count += 1
            self.others[str(function)] += "to_device" not in frames
        return result


def on_meta(made: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Move the trainer to a device without values, where autocast is not known and there is nothing to update."""
    own, is_enabled = torch.autocast, torch.is_autocast_enabled
    made.run.module.to(META)
    if made.reference is not None:
        made.reference.to(META)
    monkeypatch.setattr(Accelerator, "device", property(lambda _: META))
    monkeypatch.setattr(made.run.strategy, "step", lambda optimizer: None)
    monkeypatch.setattr(torch, "autocast", lambda kind, **rest: nullcontext() if kind == "meta" else own(kind, **rest))
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind="cuda": kind != "meta" and is_enabled(kind))


BATCH, WORDS = np.arange(11), ("train.batch_size=11", "train.microbatch_size=4")  # three micro-batches


@pytest.mark.parametrize(
    ("loss", "copies"),  # from the host: the rows of each micro-batch, and what else its loss takes
    [("dpo", 3), ("kto", 12), ("reward", 9), ("grpo", 13), ("ppo", 22)],
)
def test_the_host_waits_once_in_a_step(
    loss: str, copies: int, request: pytest.FixtureRequest, trainer: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = (request.getfixturevalue("scored"), "data.eval=[]") if loss in ("grpo", "ppo") else ()
    made = trainer(f"loss={loss}", *data, *WORDS, *(["peft=lora"] if loss == "dpo" else []))
    made.prepare()
    made.step(BATCH)  # from now on the names of all metrics are known
    on_meta(made, monkeypatch)
    with Reads() as reads, Copies() as seen:
        totals = made.step(BATCH)
    assert made.run.step == 2
    assert {"loss", "grad_norm"} <= totals.keys(), "what is logged of a step is of that step"
    assert reads.seen == {"tolist": 1}
    assert not +seen.others
    assert seen.count == copies


def test_what_waits_is_seen() -> None:
    values = torch.zeros(3, device=META)
    with Reads() as reads, Copies() as copies:
        assert values.sum().item() == 1.0
        assert bool(values.any())
        torch.tensor([1.0], device=META)
        torch.ones(2).to(META)
        with pytest.raises(NotImplementedError):
            values[values > 0]
    assert reads.seen == {"item": 1, "__bool__": 1, "torch.tensor of numbers of the host": 1}
    assert copies.others.total() == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="of a GPU")
def test_a_gpu_says_so_too(trainer: Callable[..., Trainer]) -> None:
    made = trainer("loss=dpo", *WORDS)
    made.step(BATCH)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            made.step(BATCH)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len([one for one in said if "synchronizing CUDA operation" in str(one.message)]) == 1
