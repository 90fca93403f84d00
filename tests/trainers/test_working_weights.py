"""bfloat16 copies of trained float32 weights that live for a step: the same numbers, and one cast of each weight."""

from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from halos.errors import UserError
from halos.run.step_checks import refuse_unfit
from halos.trainers.base import Trainer

CAST = torch.ops.aten._to_copy.default


class Casts(TorchDispatchMode):
    """Counts casts to bfloat16 by the float32 tensor, which is kept so that no other gets its id."""

    def __init__(self) -> None:
        super().__init__()
        self.count, self.kept = Counter[int](), list[Any]()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is CAST and (kwargs or {}).get("dtype") is torch.bfloat16:
            self.kept.append(args[0])
            self.count[args[0].data_ptr()] += 1
        return function(*args, **(kwargs or {}))


def backward_in_another_thread(trainer: Trainer) -> None:
    """As autograd does on a GPU."""
    strategy = trainer.run.strategy
    backward = strategy.backward

    def elsewhere(*given: Any, **named: Any) -> None:
        with ThreadPoolExecutor(1) as pool:
            pool.submit(backward, *given, **named).result()

    strategy.backward = elsewhere  # type: ignore[method-assign]


def steps(trainer: Trainer) -> tuple[list[Any], dict[str, torch.Tensor], Counter[int]]:
    """The totals and the weights of two steps in several micro-batches, and how often each weight was cast in the second."""
    totals: Sequence[Any] = [trainer.step(np.arange(8))]
    with Casts() as casts:
        totals = [*totals, trainer.step(np.arange(8, 16))]
    weights = {name: value.detach().clone() for name, value in trainer.run.module.named_parameters()}
    own = {value.data_ptr() for value in trainer.run.module.parameters() if value.requires_grad and value.ndim == 2}
    return list(totals), weights, Counter({address: times for address, times in casts.count.items() if address in own})


SETTINGS = ["train.precision=bfloat16", "train.microbatch_size=2", "train.batch_size=8", "optim.lr=1e-2"]


@pytest.mark.parametrize(
    ("words", "threaded"),
    [
        ("loss=kto", False),  # which reads other rows without gradients first
        ("loss=sft train.activation_checkpointing=true", True),
        ("loss=dpo peft=lora peft.r=2 model.dtype=bfloat16", True),
    ],
)
def test_a_step_is_the_same_to_the_bit_and_casts_each_weight_once(
    words: str, threaded: bool, trainer: Callable[..., Trainer]
) -> None:
    settings = [*words.split(), *SETTINGS]
    totals, weights, often = steps(trainer(*settings))
    kept = trainer(*settings, "train.working_weights=step", "exp_name=kept")
    if threaded:
        backward_in_another_thread(kept)
    same, equal, once = steps(kept)
    assert same == totals
    assert all(torch.equal(value, equal[name]) for name, value in weights.items())
    assert min(often.values()) >= 4  # micro-batches
    assert len(once) == len(often)
    assert set(once.values()) == {1}


def test_no_cast_outlives_the_values_that_a_reference_sets(trainer: Callable[..., Trainer]) -> None:
    settings = ["loss=dpo", "peft=lora", "peft.r=2", "model.dtype=bfloat16", "reference.sync_every=1", *SETTINGS]
    (totals, weights, _), (same, equal, _) = (
        steps(trainer(*settings, f"train.working_weights={kept}", f"exp_name={kept}")) for kept in ("microbatch", "step")
    )
    assert same == totals
    assert all(torch.equal(value, equal[name]) for name, value in weights.items())


@pytest.mark.parametrize(
    ("sharded", "precision", "message"),
    [
        (True, "bf16", "train.working_weights=step: ZeRO-3 gathers the parameters of each layer"),
        (False, "no", "where the run computes in float32: leave it out, or set train.precision=bfloat16"),
    ],
)
def test_copies_that_would_not_be_made_or_not_be_freed_are_refused(sharded: bool, precision: str, message: str) -> None:
    train: Any = SimpleNamespace(compile=False, working_weights="step")
    strategy: Any = SimpleNamespace(is_sharded=sharded, name="ZeRO-3")
    accelerator: Any = SimpleNamespace(mixed_precision=precision)
    with pytest.raises(UserError, match=message):
        refuse_unfit(train, torch.nn.Linear(1, 1), strategy, accelerator)
