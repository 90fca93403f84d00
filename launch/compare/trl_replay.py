"""Run the loss methods of TRL's trainers on given log-probs: no model, no data, no copy of a formula."""

from collections import defaultdict
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import Accelerator
from tensors import WIDTH, Batch, Outcome, entropies
from torch import Tensor
from transformers.utils import ModelOutput
from trl import DPOTrainer, GRPOConfig, GRPOTrainer, KTOTrainer, RewardTrainer, RLOOTrainer, SFTTrainer
from trl.experimental.cpo import CPOTrainer
from trl.experimental.gkd import GKDTrainer
from trl.experimental.orpo import ORPOTrainer
from trl.trainer.utils import FusedCausalLMOutput


class Replay(torch.nn.Module):
    """A stub of a model: each call returns the next of the given outputs."""

    is_gradient_checkpointing = False

    def __init__(self, *outputs: ModelOutput) -> None:
        super().__init__()
        self.outputs = list(outputs)

    def forward(self, *_: Any, **__: Any) -> ModelOutput:
        return self.outputs.pop(0)


def bare(trainer: type, **settings: Any) -> Any:
    """Create a trainer of TRL with only the attributes that its loss method reads."""
    instance = object.__new__(trainer)
    instance.accelerator = Accelerator(cpu=True)
    instance.aux_loss_enabled = False
    instance._metrics = {"train": defaultdict(list), "eval": defaultdict(list)}
    instance._total_train_tokens, instance._tp_size = 0, 1
    instance.args = SimpleNamespace(gradient_checkpointing_kwargs=None)
    for name, value in settings.items():
        setattr(instance, name, value)
    return instance


def logged(trainer: Any) -> dict[str, float]:
    return {name: values[-1] for name, values in trainer._metrics["train"].items()}


def fused(values: Tensor, mask: Tensor, log_sum_squares: Tensor | None = None) -> FusedCausalLMOutput:
    """Return the output of a model with TRL's fused head; fields that only metrics read are 0."""
    nothing = torch.zeros_like(values)
    return FusedCausalLMOutput(
        log_probs=values, entropy=nothing, mean_logits=nothing, is_top1=torch.zeros_like(mask), label_mask=mask,
        log_sum_sq_probs=log_sum_squares,
    )  # fmt: skip


def behind_a_prompt(mask: Tensor) -> Tensor:
    """Prepend one prompt token, as TRL's masks have it: (rows, 1 + time)."""
    return torch.cat([torch.zeros(len(mask), 1, dtype=torch.long), mask.long()], 1)


def trl_dpo(
    batch: Batch, loss_type: str, *, beta: float, label_smoothing: float = 0.0, discopop_tau: float | None = None,
    log_sum_squares: Tensor | None = None, **settings: Any,
) -> Outcome:  # fmt: skip
    """Run DPO's trainer. `settings` are attributes of it: ld_alpha, f_divergence_type, use_weighting, loss_types."""
    plain = {"ld_alpha": None, "f_divergence_type": "reverse_kl", "use_weighting": False, "loss_types": [loss_type],
             "loss_weights": [1.0]}  # fmt: skip
    trainer = bare(
        DPOTrainer,
        model=Replay(fused(batch.policy, batch.mask, log_sum_squares)),
        ref_model=Replay(fused(batch.reference, batch.mask)),
        precompute_ref_logps=False,
        beta=beta,
        label_smoothing=label_smoothing,
        **(plain | settings),
    )
    trainer.args.discopop_tau = discopop_tau
    mask = behind_a_prompt(batch.mask)
    inputs = {"input_ids": torch.ones_like(mask), "attention_mask": torch.ones_like(mask), "completion_mask": mask}
    loss = trainer.compute_loss(trainer.model, inputs)
    return batch.outcome(loss, logged(trainer))


def trl_cpo(batch: Batch, loss_type: str, *, beta: float, gamma: float = 0.0, alpha: float = 0.0) -> Outcome:
    settings = {"loss_type": loss_type, "simpo_gamma": gamma, "cpo_alpha": alpha, "label_smoothing": 0.0, "alpha": 0.0}
    return _from_logits(bare(CPOTrainer, beta=beta, **settings), batch)


def trl_orpo(batch: Batch, *, beta: float) -> Outcome:
    return _from_logits(bare(ORPOTrainer, beta=beta), batch)


def _from_logits(trainer: Any, batch: Batch) -> Outcome:
    """Run a trainer that starts from logits: each log-prob p becomes two, log(1 - e^p) and p, whose log-softmax is themselves."""
    first = torch.zeros(len(batch.policy), 1)
    values = torch.cat([batch.policy, first], 1)
    wrong = torch.log(-torch.expm1(values.clamp(max=-1e-6)))
    logits = torch.stack([wrong, values], -1)
    trainer.is_encoder_decoder, trainer.pad_token_id, trainer.padding_value = False, 0, 0
    mask = behind_a_prompt(batch.mask)
    labels = torch.where(mask.bool(), 1, -100)
    inputs = {}
    for name, rows in zip(("chosen", "rejected"), labels.chunk(2), strict=True):
        read = torch.cat([torch.ones(len(rows), 1, dtype=torch.long), (rows[:, 1:] == 1).long()], 1)
        inputs |= {f"{name}_input_ids": torch.ones_like(rows), f"{name}_attention_mask": read}
        inputs[f"{name}_labels"] = rows
    loss, metrics = trainer.get_batch_loss_metrics(Replay(ModelOutput(logits=logits)), inputs)
    return batch.outcome(loss, metrics)


def trl_kto(batch: Batch, mismatched: Batch, labels: Sequence[bool], *, beta: float, weights: tuple[float, float]) -> Outcome:
    policy = (fused(mismatched.policy.detach(), mismatched.mask), fused(batch.policy, batch.mask))
    trainer = bare(
        KTOTrainer,
        model=Replay(*policy),
        ref_model=Replay(fused(mismatched.reference, mismatched.mask), fused(batch.reference, batch.mask)),
        calculate_KL=True,
        precompute_ref_logps=False,
        loss_type="kto",
        beta=beta,
        desirable_weight=weights[0],
        undesirable_weight=weights[1],
    )
    mask, other = behind_a_prompt(batch.mask), behind_a_prompt(mismatched.mask)
    inputs = {"input_ids": mask, "attention_mask": torch.ones_like(mask), "completion_mask": mask, "label": torch.tensor(labels)}
    inputs |= {"KL_input_ids": other, "KL_attention_mask": torch.ones_like(other), "KL_completion_mask": other}
    loss = trainer.compute_loss(trainer.model, inputs)
    return batch.outcome(loss, logged(trainer))


def trl_reward(scores: Tensor, margin: Tensor | None, centering: float | None) -> Outcome:
    trainer = bare(RewardTrainer, args=SimpleNamespace(center_rewards_coefficient=centering))
    trainer.model = Replay(ModelOutput(logits=scores[:, None]))
    inputs = {"attention_mask": torch.ones(len(scores), 1, dtype=torch.long)} | ({} if margin is None else {"margin": margin})
    loss = trainer.compute_loss(trainer.model, inputs)
    return Outcome(loss.detach(), torch.autograd.grad(loss, scores)[0], logged(trainer))


def trl_sft(batches: Sequence[Batch], loss_type: str = "nll") -> Outcome:
    """Run the micro-batches of one step with the token count of the whole step, as transformers' Trainer passes it."""
    tokens = sum(batch.mask.sum() for batch in batches)
    losses, gradients = [], []
    for batch in batches:
        trainer = bare(SFTTrainer, compute_loss_func=None, label_smoother=None)
        trainer.args = SimpleNamespace(loss_type=loss_type, average_tokens_across_devices=False)
        trainer.model = Replay(fused(batch.policy, batch.mask))
        mask = behind_a_prompt(batch.mask)
        inputs = {"input_ids": mask, "attention_mask": mask, "labels": mask}
        part = batch.outcome(trainer.compute_loss(trainer.model, inputs, num_items_in_batch=tokens), {})
        losses.append(part.loss)
        gradients.append(part.gradient)
    return Outcome(torch.stack(losses).sum(), torch.cat(gradients), {})


def trl_grpo(batch: Batch, advantages: Tensor, **settings: Any) -> Outcome:
    """Run GRPO's trainer; `batch.reference` are the old log-probs, and those of the reference model where beta is not 0."""
    default = GRPOConfig.__dataclass_fields__["use_bias_correction_kl"].default
    corrects, delta = settings.pop("use_bias_correction_kl", default), settings.pop("delta", None)
    positive, negative = settings.pop("tau", (None, None))
    bonus = settings.pop("entropy_coef", 0.0)
    merged: dict[str, Any] = {
        "loss_type": "grpo", "importance_sampling_level": "token", "epsilon_low": 0.2, "epsilon_high": 0.2, "beta": 0.0,
        "max_completion_length": WIDTH, "off_policy_mask_threshold": None, **settings,
    }  # fmt: skip
    trainer = bare(
        GRPOTrainer, top_entropy_quantile=1.0, use_vllm=False, _entropy_bonus_enabled=bonus > 0,
        entropy_coef=bonus, use_adaptive_entropy=False,
        vllm_importance_sampling_correction=False, current_gradient_accumulation_steps=1, **merged,
    )  # fmt: skip
    trainer.args = SimpleNamespace(use_bias_correction_kl=corrects, delta=delta, steps_per_generation=1,
                                   sapo_temperature_pos=positive, sapo_temperature_neg=negative)  # fmt: skip
    return _sampled(trainer, batch, advantages)


def trl_rloo(batch: Batch, advantages: Tensor) -> Outcome:
    return _sampled(bare(RLOOTrainer, epsilon_low=0.2, epsilon_high=0.2), batch, advantages)


def _sampled(trainer: Any, batch: Batch, advantages: Tensor) -> Outcome:
    trainer.model = Replay().train()
    trainer._get_per_token_logps_and_entropies = lambda *_, **__: (batch.policy, entropies(batch), None)
    mask = batch.mask.long()
    inputs = {
        "prompt_ids": mask[:, :1], "prompt_mask": mask[:, :1], "completion_ids": mask, "completion_mask": mask,
        "advantages": advantages, "old_per_token_logps": batch.reference, "ref_per_token_logps": batch.reference,
        "old_logps": batch.reference.sum(1), "num_items_in_batch": mask.sum(),
    }  # fmt: skip
    return batch.outcome(trainer._compute_loss(trainer.model, inputs), logged(trainer))


def trl_gkd(student: Tensor, teacher: Tensor, mask: Tensor, *, beta: float, temperature: float) -> Outcome:
    """Run GKD's loss on logits (rows, time, ids), per scored token."""
    labels, tokens = torch.where(mask, 0, -100), int(mask.sum())
    loss = GKDTrainer.generalized_jsd_loss(student, teacher, labels, beta, temperature, num_items_in_batch=tokens)
    return Outcome(loss.detach(), torch.autograd.grad(loss, student)[0], {})


def averaged(outcomes: Sequence[Outcome]) -> Outcome:
    """Return the mean of micro-batches' means, as gradient accumulation computes it where a trainer passes no global count."""
    count = len(outcomes)
    return Outcome(
        torch.stack([x.loss for x in outcomes]).mean(), torch.cat([x.gradient for x in outcomes]) / count, outcomes[0].metrics
    )
