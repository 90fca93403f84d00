"""Suggest a key or loss for one that does not exist: the nearest name, or what it is called here."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields, is_dataclass
from difflib import SequenceMatcher
from functools import cache
from typing import Any, Literal, get_args, get_origin, get_type_hints

from halos.config.schema import Config, Scope
from halos.config.values import describe
from halos.repository import COMMAND

# Names of keys elsewhere (TRL, verl, transformers, PEFT's wrappers, the HALOs repository) -> here
OTHER_NAMES = {
    "learning_rate": "optim.lr",
    "optimizer": "optim",
    "max_steps": "train.steps",
    "n_epochs": "train.epochs",
    "num_train_epochs": "train.epochs",
    "gradient_checkpointing": "train.activation_checkpointing",
    "eval_steps": "train.eval_every",
    "logging_steps": "train.log_every",
    "save_steps": "checkpoint.every",
    "save_every": "checkpoint.every",
    "save_total_limit": "checkpoint.keep_last",
    "load_best_model_at_end": "checkpoint.keep_best",
    "resume_from_checkpoint": "resume",
    "sequence_len": "train.max_length",
    "max_seq_length": "train.max_length",
    "val_set_size": "data.eval_fraction",
    "eval_dataset": "data.eval",
    "lora_target_modules": "peft.target_modules",
    "reward_funcs": "online.scorer.functions",
    "output_dir": "run_dir",
    "lora_r": "peft.r",
    "warmup_ratio": "schedule.warmup",
    "warmup_steps": "schedule.warmup",
    "load_in_4bit": "model.quantize",
    "datasets": "data.train",
    "sync_reference": "reference.sync_every",
    "sync_ref_model": "reference.sync_every",
    "ref_model_sync_steps": "reference.sync_every",
    "ref_model_mixup_alpha": "reference.sync_weight",
    "log_epsilon_P": "humanline.low",
    "log_epsilon_R": "humanline.high",
    "ref_model": "reference.name_or_path",
    "reference_model": "reference.name_or_path",
    "lr_scheduler_type": "schedule",
    "num_generations": "online.samples_per_prompt",
    "max_completion_length": "online.sampler.max_new_tokens",
    "vllm_importance_sampling_mode": "train.correction",
    "vllm_importance_sampling_cap": "train.correction_cap",
    "vllm_importance_sampling_clip_max": "train.correction_cap",
    "vllm_importance_sampling_clip_min": "train.correction_floor",
    "rollout_is": "train.correction",
    "rollout_is_threshold": "train.correction_cap",
    "rollout_rs": "train.correction",
    "rollout_rs_threshold": "train.correction_floor",
}


# Keys of other frameworks that have no counterpart here, and what to use instead.
EXPLANATIONS = {
    "gradient_accumulation_steps": "train.batch_size is global, and is split into micro-batches of train.microbatch_tokens:"
    " the number of accumulated ones follows from the two and the number of processes",
    "per_device_train_batch_size": "train.batch_size is global, over all processes; train.microbatch_tokens is what one of"
    " them computes at once, train.microbatch_size a bound in items",
    "per_device_eval_batch_size": "an evaluation has global batches of train.batch_size, and micro-batches as training",
    "loss_type": "a loss is a choice, loss=dpo (TRL's sigmoid), loss=ipo; several with weights are parts of loss=mixture",
    "use_weighting": "it is a loss of its own, loss=wpo",
    "reference_free": "losses without a reference are loss=simpo, cpo, orpo and slic",
    "precompute_ref_log_probs": "reference.cache=always computes the reference's log-probs once, before the first step; auto, the"
    " default, does where that saves time or memory",
    "cache_reference_logprobs": "reference.cache=always computes the reference's log-probs once, before the first step; auto, the"
    " default, does where that saves time or memory",
    "max_prompt_length": "train.max_length bounds prompt and completion together, and train.truncation says what becomes of"
    " longer ones",
    "bf16": "train.precision=bfloat16 computes in it, model.dtype=bfloat16 holds the weights in it",
    "report_to": "a tracker is a choice, logging=wandb or logging=tensorboard",
    "use_peft": "LoRA is a choice, peft=lora",
    "push_to_hub": "python -m halos.checkpoint export RUN --output DIRECTORY --push-to-hub NAME does that once the run has ended",
    "padding_free": "rows are always packed, without padding",
    "assistant_only_loss": "only answers are trained on, always; data.score says which of a conversation's",
    "train_on_inputs": "only answers are trained on, always; data.score says which of a conversation's",
    "packing": "rows are always packed end to end, up to train.microbatch_tokens, and do not attend to each other",
    "f_alpha_divergence_coef": "it is 1 - loss.alpha, with loss=f_dpo loss.divergence=alpha",
}
# Keys of losses elsewhere -> the key here, and the losses that have it.
OF_LOSSES = {
    "label_smoothing": ("label_smoothing", "cdpo, robust, exo, aot or aot_unpaired"),
    "desirable_weight": ("desirable_weight", "kto"),
    "undesirable_weight": ("undesirable_weight", "kto"),
    "cpo_alpha": ("alpha", "cpo"),
    "rpo_alpha": ("alpha", "rpo"),
    "ld_alpha": ("alpha", "ld_dpo"),
    "simpo_gamma": ("gamma", "simpo"),
    "gamma_beta_ratio": ("gamma_over_beta", "simpo"),
    "discopop_tau": ("tau", "discopop"),
    "f_divergence_type": ("divergence", "f_dpo"),
    "loss_weights": ("parts", "mixture"),
    "center_rewards_coefficient": ("centering", "reward"),
    "epsilon_high": ("clip_high", "grpo"),
    "scale_rewards": ("advantage_scale", "grpo"),
    "importance_sampling_level": ("ratio", "grpo"),
    "use_bias_correction_kl": ("kl_ratio", "grpo"),
    "cliprange": ("clip_low", "ppo"),
    "clip_ratio_low": ("clip_low", "grpo"),
    "clip_ratio_high": ("clip_high", "grpo"),
    "clip_ratio_c": ("dual_clip", "grpo"),
    "loss_agg_mode": ("aggregation", "grpo"),
    "loss_scale_factor": ("max_tokens", "dr_grpo"),
    "norm_adv_by_std_in_grpo": ("advantage_scale", "grpo"),
    "kl_loss_coef": ("beta", "grpo"),
    "kl_loss_type": ("kl_estimator", "grpo"),
    "entropy_coeff": ("entropy_coefficient", "grpo"),
    "entropy_coef": ("entropy_coefficient", "grpo"),
    "tau_pos": ("tau_positive", "sapo"),
    "tau_neg": ("tau_negative", "sapo"),
    "off_policy_mask_threshold": ("off_policy_threshold", "grpo"),
    "cliprange_value": ("value_clip", "ppo"),
    "vf_coef": ("value_coefficient", "ppo"),
    "kl_coef": ("kl_coefficient", "ppo"),
    "lam": ("gae_lambda", "ppo"),
}
# Known losses that are not built in, with their papers.
LOSSES = {
    "rdpo": "arXiv:2403.19159", "tdpo": "arXiv:2404.11999", "rrhf": "arXiv:2304.05302",
    "xpo": "arXiv:2405.21046", "nash_md": "arXiv:2312.00886", "raft": "arXiv:2304.06767", "remax": "arXiv:2310.10505",
    "prime": "arXiv:2502.01456", "vapo": "arXiv:2504.05118", "luspo": "arXiv:2602.05261", "vespo": "arXiv:2602.10693",
}  # fmt: skip
NAMESAKES = {"sigmoid": "dpo", "dpo_pair": "dpo", "rm": "reward", "reward_model": "reward", "bradley_terry": "reward",
             "lm": "sft", "kto_pair": "kto", "reinforce++": "reinforce_plus_plus", "reinforce_pp": "reinforce_plus_plus",
             "cross_entropy": "sft", "online_dpo": "online", "rso": "hinge", "apo": "apo_zero", "exo_pair": "exo",
             "nca_pair": "nca", "bco_unpaired": "bco", "sppo_hard": "sppo", "sigmoid_norm": "dpo_norm",
             "distillation": "gkd"}  # fmt: skip

MODIFIERS = {"humanline": "humanline=on", "tr_dpo": "reference.sync_every=512", "trdpo": "reference.sync_every=512"}


def about_loss(loss: str) -> str | None:
    """Return a hint for a loss that is known under another name or not built in; None for an unknown one."""
    name = loss.lower().replace("-", "_")
    if name in NAMESAKES:
        return f"here it is loss={NAMESAKES[name]}"
    if name in MODIFIERS:
        return f"here it modifies any loss with a reference: loss=dpo {MODIFIERS[name]}"
    if name not in LOSSES:
        return None
    return f"it is known ({LOSSES[name]}) but not built in: halos/losses/README.md says why under Not built in, and what to use"


def of_losses(name: str, legal: Iterable[str]) -> str | None:
    """Return a hint for a loss's key that is called otherwise here, or that a loss with the keys `legal` lacks; else None."""
    key, losses = OF_LOSSES.get(name, ("", ""))
    if not key:
        return None
    return f"did you mean {key}?" if key in legal else f"it is loss.{key} of loss={losses}"


def nearest(word: str, known: Iterable[str]) -> str | None:
    """Return the known name most similar to `word`, with most weight on the last part; None where none is similar."""

    def similarity(name: str) -> float:
        whole = SequenceMatcher(None, word.lower(), name.lower()).ratio()
        last = SequenceMatcher(None, word.lower().rpartition(".")[2], name.lower().rpartition(".")[2]).ratio()
        return 0.75 * last + 0.25 * whole  # people leave out or mistake the section

    known = list(known)
    if OTHER_NAMES.get(word.rpartition(".")[2]) in known:
        return OTHER_NAMES[word.rpartition(".")[2]]
    swapped = {word[:i] + word[i + 1] + word[i] + word[i + 2 :] for i in range(len(word) - 1)}
    if (meant := next((name for name in known if name in swapped), None)) is not None:
        return meant  # dop is dpo, though dpop has more of its letters in order
    best = max(known, key=similarity, default=None)
    return best if best is not None and similarity(best) > 0.6 else None


@cache
def schema_keys() -> dict[str, Any]:
    """Return every key that a command may set, sections included, with its type: `train.steps` -> int."""
    return _keys_of(Config, "")


def _keys_of(schema: Any, prefix: str) -> dict[str, Any]:
    keys: dict[str, Any] = {}
    hints = get_type_hints(schema)
    for field in fields(schema):
        if field.metadata.get("scope") is Scope.RECORD:
            continue
        kind = hints[field.name]
        kind = next((part for part in get_args(kind) if is_dataclass(part)), kind)  # a section that may be null
        keys[prefix + field.name] = kind
        if section := kind if is_dataclass(kind) else field.metadata.get("shared"):
            keys |= _keys_of(section, f"{prefix}{field.name}.")
    return keys


def kind_of(key: str) -> Literal["section", "value", "free", "unknown"]:
    """Classify a dotted key; `free` is one inside a mapping or list, whose keys the schema does not name."""
    keys = schema_keys()
    if key in keys:
        return "section" if is_dataclass(keys[key]) or get_origin(keys[key]) is dict else "value"
    parent = key.rpartition(".")[0]
    while parent:
        if parent in keys:
            free = keys[parent] is Any or get_origin(keys[parent]) in (dict, list)
            return "free" if free else "unknown"
        parent = parent.rpartition(".")[0]
    return "unknown"


def unknown_key(key: str, known: Iterable[str]) -> str:
    """Return the message for a key that does not exist."""
    known = set(known) | set(schema_keys())
    if explanation := EXPLANATIONS.get(key.rpartition(".")[2]):
        return f"there is no key {key!r}: {explanation}"
    if hint := of_losses(key.rpartition(".")[2], ()):
        return f"there is no key {key!r}: {hint}"
    near = nearest(key, sorted(known - {""}))
    if near:
        return f"there is no key {key!r}; did you mean {near}?"
    if key.startswith("hydra."):
        return f"there is no key {key!r}; {COMMAND} --hydra-help lists those of Hydra"
    section = key.rpartition(".")[0]
    if kind_of(section) == "value":
        return f"there is no key {key!r}; {section} takes {describe(schema_keys()[section])}"
    inside = sorted(name.removeprefix(f"{section}.") for name in known if name.rpartition(".")[0] == section)
    if section and inside:
        return f"there is no key {key!r}; {section} takes {', '.join(inside)}"
    return f"there is no key {key!r}; {COMMAND} --help lists them"
