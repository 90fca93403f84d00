"""The policy in training as a sampling engine: gathered into this process, or loaded into a server."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from halos.checkpoint import weights
from halos.checkpoint.commit import exchanged
from halos.config.rollout_modules import engine_class
from halos.config.schema import Config
from halos.hooks.base import Run
from halos.logps.model import ActorCritic, LanguageModel, bare
from halos.merge import merge
from halos.merge.merge_and_prove import case_of
from halos.online.unsharded import Unsharded, policy_origin
from halos.rollout import rescore
from halos.rollout.engines.engine import Engine, PolicyServer, open_engine, stop_ids
from halos.rollout.kl import token_logps
from halos.rollout.ranks import Ranks
from halos.rollout.types import Request


class PolicyEngine:
    """Opens the engine of `online.sampler` with the current weights."""

    def __init__(self, run: Run, server: PolicyServer | None, policy: Unsharded, probed: Sequence[Request]) -> None:
        """`probed` are requests of the run, from whose prompts a server is asked what it samples from."""
        assert run.config.online is not None
        self.run, self.server, self.policy = run, server, policy
        self.probed, self._reloads = rescore.probe_requests(probed), rescore.ReloadProof()
        self.settings = run.config.online.sampler
        self.origin = policy_origin(run.tokenizer)
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
            yield open_engine(self.settings, self.origin, directory=None, tokenizer=self.run.tokenizer, model=lambda: model,
                              dtype=dtype)  # fmt: skip

    def _push(self, server: PolicyServer) -> None:
        """Load the policy into the server, through a directory that both can read; LoRA is merged into the base. The directory is
        written once a step, and loaded again each time: the server may have been restarted since the step's evaluation."""
        run, directory = self.run, self.run.directory.path / "served"
        if self._served == run.step:
            if run.main:
                server.load(directory / "model")
            run.accelerator.wait_for_everyone()
            return
        adapter = isinstance(run.model, PeftModel)
        state = run.strategy.gathered(run.module, trained_only=adapter)
        if run.main:
            with exchanged(directory) as hidden:
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
        if not self._reloads.is_complete:
            self._prove(server)

    def _prove(self, server: PolicyServer) -> None:
        """Raises UserError, on every rank, where the server does not sample from the weights that it was given."""
        samples = server.probe(self.probed) if self.run.main else []
        samples = Ranks(self.run.accelerator.process_index, self.run.accelerator.num_processes).from_rank_0(samples)
        if samples:
            probe = rescore.compared(samples, self.probed, self.own_logps)
            self._reloads.add(probe, self.own_logps, where=server.where)
            policy = f"the model of this run, which is in {server.weights}"
            rescore.refuse_other_policy(probe, self.own_logps, where=server.where, policy=policy)

    def own_logps(self, pairs: Sequence[rescore.Pair], temperature: float) -> list[np.ndarray]:
        """The policy's own log-probs of sampled tokens, as it is trained. Every rank calls, with the same."""
        run, module = self.run, self.run.module
        head = next(part for part in module.modules() if isinstance(part, LanguageModel | ActorCritic))
        of_training, training = head.temperature, module.training
        module.eval()
        head.temperature = temperature or 1.0
        try:
            with run.accelerator.autocast():
                return token_logps(module, pairs, device=run.accelerator.device, what="rescoring")
        finally:
            head.temperature = of_training
            run.strategy.reshard(module)
            module.train(training)


def server_of(config: Config, tokenizer: PreTrainedTokenizerBase) -> PolicyServer | None:
    """The server that samples; None where this process does. Raises UserError for an engine whose weights cannot be replaced."""
    assert config.online is not None
    sampler, model = config.online.sampler, str(config.model.name_or_path)
    return engine_class(sampler.name).open_server(sampler, policy_origin(tokenizer), tokenizer=tokenizer, model=model)
