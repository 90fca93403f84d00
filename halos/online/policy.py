"""The policy in training as an engine: gathered into this process, or handed to a server that samples in its place."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from halos.checkpoint import weights
from halos.checkpoint.commit import staged
from halos.config.schema import Config
from halos.errors import UserError
from halos.hooks.base import Run
from halos.logps.model import bare
from halos.merge import merge
from halos.merge.merge_and_prove import case_of
from halos.rollout.engines.engine import Engine
from halos.rollout.engines.hf import HFEngine
from halos.rollout.engines.vllm import ServerEngine
from halos.rollout.servers import refuse_silent
from halos.rollout.types import Origin

POLICY = Origin("policy")


class PolicyEngine:
    """`skeleton` makes the policy without weights, for those of a sharded one to be gathered in."""

    def __init__(self, run: Run, server: ServerEngine | None, skeleton: Callable[[], nn.Module]) -> None:
        assert run.config.online is not None
        self.run, self.server, self._skeleton = run, server, skeleton
        self.settings = run.config.online.sampler
        self._unsharded: nn.Module | None = None
        self._served: int | None = None  # the step whose weights the server has

    @contextmanager
    def opened(self) -> Iterator[Engine]:
        """With the weights of this step; every process opens it."""
        if self.server is not None:
            self._push(self.server)
            yield self.server
            return
        with self._unsharded_model() as model:
            yield HFEngine(model, self.run.tokenizer, self.settings, POLICY)

    @contextmanager
    def _unsharded_model(self) -> Iterator[PreTrainedModel]:
        """The current policy, unsharded: under FSDP or ZeRO-3 a temporary full copy on every rank, since ranks sample different
        texts."""
        strategy, module, model = self.run.strategy, self.run.module, self.run.model
        if not strategy.is_sharded:
            yield bare(model)
            return
        self._unsharded = self._unsharded if self._unsharded is not None else self._skeleton()
        state = strategy.gathered(module, trained_only=False, offload=False)
        own = {name: value for name, value in state.items() if not name.startswith(weights.HEAD)}
        self._unsharded.load_state_dict(own, strict=False, assign=True)
        for name, buffer in model.named_buffers():  # rotary tables and the like, which no state dict holds
            parent, _, last = name.rpartition(".")
            self._unsharded.get_submodule(parent).register_buffer(last, buffer.detach(), persistent=False)
        copy = bare(self._unsharded)
        copy.tie_weights()
        try:
            yield copy
        finally:
            self._unsharded.to("meta")

    def _push(self, server: ServerEngine) -> None:
        """The policy's weights to the server, once a step, by a directory that both see; with LoRA merged into the base."""
        run, place = self.run, self.run.directory.path / "served"
        if self._served == run.step:
            return
        adapter = isinstance(run.model, PeftModel)
        state = run.strategy.gathered(run.module, trained_only=adapter)
        if run.main:
            with staged(place, main=True, facts={"step": run.step}) as hidden:
                weights.save_weights(hidden, run.model, state, run.vocabulary)
                if adapter:  # unproved: the final save's merge, which is proved, is this one
                    run.tokenizer.save_pretrained(hidden)
                    case = case_of(run.base, hidden / "adapter", run.vocabulary, dtype=bare(run.model).dtype)
                    (hidden / "model").mkdir()
                    merge.merge(case.base, case.adapter, hidden / "model", model=bare(run.model), dtype=case.dtype,
                                vocabulary=case.vocabulary, tokens=case.tokens)  # fmt: skip
            server.load(place / "model")
        self._served = run.step
        run.accelerator.wait_for_everyone()


def server_of(config: Config, tokenizer: PreTrainedTokenizerBase) -> ServerEngine | None:
    """The server that samples, None where this process does. Raises UserError for a sampler that cannot follow a policy."""
    assert config.online is not None
    sampler = config.online.sampler
    if sampler.name == "hf":
        return None
    if sampler.name != "vllm" or sampler.url is None:
        raise UserError("a live loop samples with online.sampler.name=hf, or vllm with online.sampler.url of a running server")
    refuse_silent(sampler.url, "online.sampler.url")
    return ServerEngine(tokenizer, sampler, POLICY, model=str(config.model.name_or_path))
