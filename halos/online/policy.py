"""The policy in training as a sampling engine: gathered into this process, or loaded into a server."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from halos.checkpoint import weights
from halos.checkpoint.commit import staged
from halos.config.rollout_modules import engine_class
from halos.config.schema import Config
from halos.hooks.base import Run
from halos.logps.model import bare
from halos.merge import merge
from halos.merge.merge_and_prove import case_of
from halos.online.unsharded import POLICY, Unsharded
from halos.rollout.engines.engine import Engine, PolicyServer, open_engine, stop_ids


class PolicyEngine:
    """Opens the engine of `online.sampler` with the current weights."""

    def __init__(self, run: Run, server: PolicyServer | None, policy: Unsharded) -> None:
        assert run.config.online is not None
        self.run, self.server, self.policy = run, server, policy
        self.settings = run.config.online.sampler
        self._served: int | None = None  # the step whose weights the server has
        if server is not None:
            server.stops = tuple(stop_ids(bare(run.model).generation_config, run.tokenizer))

    @contextmanager
    def opened(self) -> Iterator[Engine]:
        """The engine with the weights of this step. Every rank enters."""
        if self.server is not None:
            self._push(self.server)
            yield self.server
            return
        with self.policy.opened() as model:
            dtype = str(model.dtype).removeprefix("torch.")
            yield open_engine(self.settings, POLICY, directory=None, tokenizer=self.run.tokenizer, model=lambda: model,
                              dtype=dtype)  # fmt: skip

    def _push(self, server: PolicyServer) -> None:
        """Load the policy into the server, once a step, through a directory that both can read; LoRA is merged into the base."""
        run, directory = self.run, self.run.directory.path / "served"
        if self._served == run.step:
            return
        adapter = isinstance(run.model, PeftModel)
        state = run.strategy.gathered(run.module, trained_only=adapter)
        if run.main:
            with staged(directory, main=True, facts={"step": run.step}) as hidden:
                weights.save_weights(hidden, run.model, state, run.vocabulary)
                if adapter:  # not proved here: the final model's merge, by the same function, is
                    run.tokenizer.save_pretrained(hidden)
                    case = case_of(run.base, hidden / "adapter", run.vocabulary, dtype=bare(run.model).dtype)
                    (hidden / "model").mkdir()
                    merge.merge(case.base, case.adapter, hidden / "model", model=bare(run.model), dtype=case.dtype,
                                vocabulary=case.vocabulary, tokens=case.tokens)  # fmt: skip
            server.load(directory / "model")
        server.weights, self._served = directory / "model", run.step
        run.accelerator.wait_for_everyone()


def server_of(config: Config, tokenizer: PreTrainedTokenizerBase) -> PolicyServer | None:
    """The server that samples; None where this process does. Raises UserError for an engine whose weights cannot be replaced."""
    assert config.online is not None
    sampler, model = config.online.sampler, str(config.model.name_or_path)
    return engine_class(sampler.name).open_server(sampler, POLICY, tokenizer=tokenizer, model=model)
