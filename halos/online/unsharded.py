"""The policy in training as one whole model, whatever the strategy that holds it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PreTrainedModel

from halos.checkpoint import weights
from halos.hooks.base import Run
from halos.logps.model import bare
from halos.rollout.types import Origin

POLICY = Origin("policy")


class Unsharded:
    """The current policy, unsharded: under FSDP or ZeRO-3 a temporary full copy on every rank, since each samples other texts.

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
            yield from self._whole()

    def _whole(self) -> Iterator[PreTrainedModel]:
        strategy, module, model = self.run.strategy, self.run.module, self.run.model
        if not strategy.is_sharded:
            yield bare(model)
            return
        self._copy = self._copy if self._copy is not None else self._skeleton()
        state = strategy.gathered(module, trained_only=False, offload=False)
        without_head = {name: value for name, value in state.items() if not name.startswith(weights.HEAD)}
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
