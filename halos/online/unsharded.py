"""The policy in training as one whole model, whatever the strategy that holds it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from halos.checkpoint import weights
from halos.data.tokenize import vocabulary_of
from halos.hooks.base import Run
from halos.logps.compiled import eager
from halos.logps.model import bare
from halos.rollout.types import Origin


def policy_origin(tokenizer: PreTrainedTokenizerBase) -> Origin:
    """What samples of the policy in training say of where they come from: with it a data set of them keeps their ids."""
    return Origin("policy", vocabulary_of(tokenizer))


class Unsharded:
    """The current policy, unsharded: under FSDP or ZeRO-3 a temporary full copy on every rank, since each samples other texts.
    It computes in the precision of training.

    `skeleton` builds the policy without weights, into which those of a sharded one are gathered.
    """

    def __init__(self, run: Run, skeleton: Callable[[], nn.Module]) -> None:
        self.run, self._skeleton = run, skeleton
        self._copy: nn.Module | None = None

    @contextmanager
    def opened(self) -> Iterator[PreTrainedModel]:
        """The model with the weights of this step. Every rank enters. torch's generators are left as they were: the skeleton and
        transformers' continuous batching seed them anew."""
        device = self.run.accelerator.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            for model in self._whole():
                with computing_as_trained(model, self.run.accelerator), eager():
                    yield model

    def _whole(self) -> Iterator[PreTrainedModel]:
        strategy, module, model = self.run.strategy, self.run.module, self.run.model
        if not strategy.is_sharded:
            yield bare(model)
            return
        self._copy = self._copy if self._copy is not None else self._skeleton()
        state = strategy.gathered(module, trained_only=False, offload=False)
        dtypes = strategy.forward_dtypes(module)  # layer norms round too, which autocast leaves in float32
        without_head = {name: value.to(dtypes.get(name, value.dtype)) for name, value in state.items()
                        if not name.startswith(weights.HEAD)}  # fmt: skip
        self._copy.load_state_dict(without_head, strict=False, assign=True)
        for name, buffer in model.named_buffers():  # rotary tables and the like, which no state dict holds
            parent, _, last = name.rpartition(".")
            self._copy.get_submodule(parent).register_buffer(last, buffer.detach(), persistent=False)
        copy = bare(self._copy)
        copy.tie_weights()
        try:
            yield copy
        finally:
            self._copy.to("meta")


@contextmanager
def computing_as_trained(model: nn.Module, accelerator: Accelerator) -> Iterator[None]:
    """Within, the model's forward runs under the autocast of training, in whatever thread calls it, and `dtype`, from which
    sampling takes that of its key-value cache, is autocast's.

    A thread enters autocast once, so that its casts of float32 weights are made once and not for every token; all are dropped at
    the end, before the weights change.
    """
    if accelerator.mixed_precision == "no":
        yield
        return
    forward, own, kind, thread = model.forward, vars(model).get("forward"), type(model), threading.local()

    @wraps(forward)
    def cast(*args: Any, **kwargs: Any) -> Any:
        if not hasattr(thread, "entered"):
            thread.entered = accelerator.autocast()
            thread.entered.__enter__()
        return forward(*args, **kwargs)

    dtype = torch.get_autocast_dtype(accelerator.device.type)
    model.forward = cast
    model.__class__ = type(kind.__name__, (kind,), {"dtype": property(lambda self: dtype)})
    try:
        yield
    finally:
        if hasattr(thread, "entered"):  # it was called in this thread, which goes on
            thread.entered.__exit__(None, None, None)
        torch.clear_autocast_cache()
        model.__class__ = kind
        if own is None:
            del model.forward
        else:
            model.forward = own
