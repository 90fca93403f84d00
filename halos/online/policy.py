"""The policy in training as an engine: gathered into this process, or handed to a server that samples in its place."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from halos.checkpoint import weights
from halos.checkpoint.commit import staged
from halos.config.engines import engine_class
from halos.config.schema import Config
from halos.hooks.base import Run
from halos.logps.model import bare
from halos.merge import merge
from halos.merge.merge_and_prove import case_of
from halos.online.unsharded import POLICY, Unsharded
from halos.rollout.engines.engine import Engine, PolicyServer, open_engine


class PolicyEngine:
    """As the config's `online.sampler` wants it."""

    def __init__(self, run: Run, server: PolicyServer | None, policy: Unsharded) -> None:
        assert run.config.online is not None
        self.run, self.server, self.policy = run, server, policy
        self.settings = run.config.online.sampler
        self._served: int | None = None  # the step whose weights the server has

    @contextmanager
    def opened(self) -> Iterator[Engine]:
        """With the weights of this step; every process opens it."""
        if self.server is not None:
            self._push(self.server)
            yield self.server
            return
        with self.policy.opened() as model:
            yield open_engine(self.settings, POLICY, directory=None, tokenizer=self.run.tokenizer, model=lambda: model)

    def _push(self, server: PolicyServer) -> None:
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


def server_of(config: Config, tokenizer: PreTrainedTokenizerBase) -> PolicyServer | None:
    """The server that samples, None where this process does. Raises UserError for a sampler that cannot follow a policy."""
    assert config.online is not None
    sampler, model = config.online.sampler, str(config.model.name_or_path)
    return engine_class(sampler.name).open_server(sampler, POLICY, tokenizer=tokenizer, model=model)
