"""Made-up samples of several prompts for the rows about rollouts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from tensors import PAIRS, WIDTH, Batch
from torch import Tensor

GROUP = 4
SHORT = 10  # a row of 3 tokens with an advantage below 0
REWARDS = (1.0, 0.0, 0.0, 1.0, 0.5, 0.5, 0.5, 0.5, -1.0, 2.0, 0.0, 1.0, 0.2, 0.7, 0.1, 0.3)  # of the second prompt all are equal


@dataclass(frozen=True)
class Samples:
    """Four samples of each of four prompts, of 2 to 12 tokens; log-ratios beyond every clip."""

    batch: Batch  # its reference are the old log-probs
    first_pass: Batch  # the same policy, whose old log-probs are its own
    far: Batch  # with a token of which pi / pi_old is e^35, in a short row with an advantage below 0
    left: Batch  # with a token of which it is e^-4
    rewards: Tensor  # (rows,)
    advantages: Tensor  # (rows,)
    sampled: Tensor  # (rows, time) log-probs as the sampler has them, near the old ones
    values: tuple[Tensor, Tensor, Tensor]  # (rows, time) a critic's, with a gradient; its old ones; returns
    groups: tuple[str, ...]  # of each row its prompt

    @classmethod
    def random(cls, seed: int) -> Samples:
        drawn = Batch.random(seed)
        generator = torch.Generator().manual_seed(seed + 1)
        noise = torch.randn(5, 2 * PAIRS, WIDTH, generator=generator)
        policy = (drawn.reference + 0.7 * noise[0]).clamp(max=-0.01) * drawn.mask
        batch = Batch(policy.requires_grad_(), drawn.reference, drawn.mask)
        own = Batch(policy.detach().clone().requires_grad_(), policy.detach(), drawn.mask)
        rewards = torch.tensor(REWARDS)
        means = rewards.view(-1, GROUP).mean(1).repeat_interleave(GROUP)
        values = [part * drawn.mask for part in noise[2:]]
        sampled = (drawn.reference + 0.5 * noise[1]).clamp(max=-0.01) * drawn.mask
        return cls(
            batch, own, _moved(batch, -35), _moved(batch, 4), rewards, rewards - means, sampled,
            (values[0].requires_grad_(), values[1], values[2]), tuple(f"prompt {n // GROUP}" for n in range(2 * PAIRS)),
        )  # fmt: skip


def _moved(batch: Batch, nats: float) -> Batch:
    """The batch with one token's old log-prob so many nats above the policy's."""
    reference = batch.reference.clone()
    reference[SHORT, 0] = batch.policy[SHORT, 0].item() + nats
    return Batch(batch.policy.detach().clone().requires_grad_(), reference, batch.mask)
