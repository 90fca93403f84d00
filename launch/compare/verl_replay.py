"""Run verl's losses, advantages and corrections on given log-probs: no model, no data, no copy of a formula."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from tensordict import TensorDict
from tensors import Batch, Outcome, entropies
from torch import Tensor
from verl.trainer.distillation.fsdp.losses import compute_forward_kl_topk
from verl.trainer.ppo import core_algos
from verl.trainer.ppo.rollout_corr_helper import compute_rollout_correction_and_rejection_mask
from verl.utils import tensordict_utils
from verl.workers.config import ActorConfig, CriticConfig, PolicyLossConfig
from verl.workers.utils.losses import ppo_loss, value_loss


@dataclass(frozen=True)
class Counts:
    """Of a global batch."""

    tokens: int
    rows: int
    ranks: int = 1


ONE = {"strategy": "fsdp", "rollout_n": 1, "ppo_mini_batch_size": 1, "ppo_micro_batch_size_per_gpu": 1}


def actor(loss_mode: str, *, of_loss: dict[str, Any] | None = None, **settings: Any) -> ActorConfig:
    """verl's own defaults but for `settings`, and `of_loss` in the section of the policy loss."""
    return ActorConfig(**ONE, policy_loss=PolicyLossConfig(loss_mode=loss_mode, **(of_loss or {})), **settings)


def micro_batch(mask: Tensor, kept: Tensor | None = None, counts: Counts | None = None, **parts: Tensor) -> TensorDict:
    """One prompt token and a response in each row, of which `kept` tokens are learned from, with the counts that verl's engine
    sends along."""
    first, kept = torch.ones(len(mask), 1, dtype=torch.long), mask if kept is None else kept
    whole = {"prompts": first, "responses": mask.long(), "attention_mask": torch.cat([first, mask.long()], 1)}
    data = TensorDict({**whole, "response_mask": kept, **parts}, batch_size=len(mask))
    counts = counts or Counts(int(kept.sum()), len(mask))
    tensordict_utils.assign_non_tensor(data, dp_size=counts.ranks, batch_num_tokens=counts.tokens, global_batch_size=counts.rows)
    return data


def unpadded(values: Tensor, mask: Tensor) -> Tensor:
    """As a model without padding gives it, a position earlier: (tokens of all rows with their prompts,)."""
    behind = values.new_zeros(1)
    return torch.cat([part for row, kept in zip(values, mask, strict=True) for part in (row[: int(kept.sum())], behind)])


def verl_policy(
    batch: Batch, advantages: Tensor, config: ActorConfig, *, weights: Tensor | None = None, reference: Tensor | None = None,
    kept: Tensor | None = None, counts: Counts | None = None,
) -> Outcome:  # fmt: skip
    """Run the actor's whole loss; `batch.reference` are the old log-probs, `advantages` (rows,) or (rows, time)."""
    given = advantages if advantages.ndim == 2 else advantages[:, None] * batch.mask
    parts = {"old_log_probs": batch.reference, "advantages": given}
    parts |= {} if weights is None else {"rollout_is_weights": weights}
    parts |= {} if reference is None else {"ref_log_prob": reference}
    output = {"log_probs": unpadded(batch.policy, batch.mask)}
    if config.entropy_coeff:
        output["entropy"] = unpadded(entropies(batch), batch.mask)
    loss, logged = ppo_loss(config, output, micro_batch(batch.mask, kept, counts, **parts))
    return batch.outcome(loss, named(logged))


def named(logged: dict[str, Any]) -> dict[str, float]:
    """verl's metrics under our names, where they are the same quantity."""
    values = {name: float(getattr(metric, "values", [metric])[0]) for name, metric in logged.items()}
    found = {"kl": values["kl_loss"]} if "kl_loss" in values else {}
    if "actor/pg_clipfrac" in values:
        found["clip_fraction"] = values["actor/pg_clipfrac"] + values.get("actor/pg_clipfrac_lower", 0.0)
    return found


def verl_value(
    values: Tensor, old: Tensor, returns: Tensor, mask: Tensor, clip: float, counts: Counts | None = None
) -> tuple[Tensor, dict[str, float]]:
    """The critic's loss, and its metrics under our names."""
    config = CriticConfig(**{name: value for name, value in ONE.items() if name != "rollout_n"}, cliprange_value=clip)
    data = micro_batch(mask, counts=counts, values=old, returns=returns)
    loss, logged = value_loss(config, {"values": unpadded(values, mask)}, data)
    return loss, {"value/loss": loss.item(), "value/mean": logged["critic/vpred_mean"]}


def verl_advantages(name: str, rewards: Tensor, mask: Tensor, groups: Sequence[Any], **more: Any) -> tuple[Tensor, Tensor]:
    """Advantages and returns (rows, time) by one of its estimators; `rewards` (rows,) or (rows, time)."""
    last = mask & (mask.cumsum(-1) == mask.sum(-1, keepdim=True))
    given = rewards if rewards.ndim == 2 else torch.where(last, rewards[:, None], 0.0)
    estimator = core_algos.get_adv_estimator_fn(name)
    if name == "gae":
        return estimator(given, response_mask=mask.float(), **more)
    return estimator(given, response_mask=mask.float(), index=groups, **more)


def verl_correction(old: Tensor, sampled: Tensor, mask: Tensor, **settings: Any) -> tuple[Tensor | None, Tensor]:
    """Weights (rows, time) or None, and the mask of what is not rejected."""
    weights, kept, _ = compute_rollout_correction_and_rejection_mask(old, sampled, mask.float(), **settings)
    return None if weights is None else weights.batch["rollout_is_weights"], kept.bool()


def verl_topk(student: Tensor, teacher: Tensor, ids: Tensor, least: float | None) -> Tensor:
    """The loss of each token by the teacher's likeliest `ids`, of logits (tokens, ids) and log-probs (tokens, k)."""
    loss = SimpleNamespace(log_prob_min_clamp=least, use_chunked_topk=False)
    lengths = torch.tensor([0, len(student)])
    nested = [torch.nested.nested_tensor_from_jagged(part, offsets=lengths) for part in (teacher, ids)]
    found = compute_forward_kl_topk(student[None], *nested, SimpleNamespace(distillation_loss=loss), "thd")
    return found["distillation_losses"][0]
