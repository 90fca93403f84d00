"""`run.generate`, for hooks: completions by the policy in training, under every strategy."""

from __future__ import annotations

import torch

from halos.config.defaults import section
from halos.config.schema import Sampler
from halos.data.tokenize import Encoder
from halos.errors import UserError
from halos.hooks.base import Prompts, Run
from halos.online.unsharded import Unsharded
from halos.rollout.prompts import fitting
from halos.rollout.ranks import Ranks
from halos.rollout.types import Origin, Prompt, Sample, requests_for


class PolicyGenerator:
    """Implements `Run.generate`. A completion is a function of weights, prompt and seed, on one kind of hardware."""

    def __init__(self, run: Run, policy: Unsharded) -> None:
        self.run, self.policy = run, policy
        self.encoder = Encoder(run.tokenizer, max_length=2**31, truncation="drop")
        self.ranks = Ranks(run.accelerator.process_index, run.accelerator.num_processes)

    @torch.no_grad()
    def __call__(self, prompts: Prompts, *, max_new_tokens: int, temperature: float, seed: int) -> list[str]:
        from halos.rollout.engines.hf import HFEngine  # here: most runs do not need its imports

        turns = [[{"role": "user", "content": each}] if isinstance(each, str) else each for each in prompts]
        numbered = [Prompt(str(number), tuple(map(dict, each))) for number, each in enumerate(turns)]
        room = self.run.max_length - max_new_tokens
        fitted = fitting(numbered, self.encoder, room)
        if len(fitted) < len(numbered):
            too_long = next(int(each.id) for each in numbered if each.id not in {one.id for one in fitted})
            raise UserError(
                f"run.generate: prompt {too_long} leaves no room for max_new_tokens={max_new_tokens} within"
                f" {self.run.max_length} tokens"
            )
        requests = requests_for(fitted, samples=1, temperature=temperature, max_new_tokens=max_new_tokens, seed=seed)
        samples = list[Sample]()
        with self.policy.opened() as model:
            if mine := requests[self.ranks.rank :: self.ranks.world]:
                settings = section(Sampler, temperature=temperature, max_new_tokens=max_new_tokens)
                samples = list(HFEngine(model, self.run.tokenizer, settings, Origin("policy")).sample(mine))
        texts = {key: text for part in self.ranks.gather([(each.key, each.text) for each in samples]) for key, text in part}
        return [texts[request.key] for request in requests]
