"""Version of the arithmetic: the changes that make a resumed run differ from an uninterrupted one in steps, metrics or FINAL.

Every start of a run and every checkpoint record the version that they were computed with.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from halos.config.resume_policy import Change, drawn_in
from halos.config.schema import Config
from halos.reward_kind import RewardKind

PAIRED = ("dpo", "cdpo", "ipo", "simpo", "slic", "bradley_terry")
ON_ROLLOUTS = ("grpo", "rloo", "ppo", "reinforce_plus_plus")
KEY = "arithmetic"  # under which an attempt's record, a lineage and a manifest hold the version


@dataclass(frozen=True, slots=True)
class RunFacts:
    """Facts of a run that decide which changes of the arithmetic affect it."""

    config: Config
    before: Mapping[str, Any]  # its configuration as recorded in the run directory
    model: Mapping[str, Any]  # the model's config.json, or its text model's part
    half: bool  # weights or autocast products are in half precision
    reads: str  # kind of head that the model is read through: language | value | score | steps (types.py)
    refers: bool  # the loss needs a reference
    packed: bool  # sequences are packed (logps/plan.py)
    head: str  # how hidden states become log-probs: layer | own | whole (logps/plan.py)
    device: str  # its type: cpu | cuda | ...


@dataclass(frozen=True, slots=True)
class Revision:
    """One change: of the steps of the runs that it affects, or only of their metrics or their final model; `kept`: of no run that
    began before it."""

    number: int
    date: str
    what: str
    concerns: Callable[[RunFacts], bool]
    of: Literal["steps", "metrics", "FINAL", "kept"] = "steps"


def _sums_head_in_parts(now: RunFacts) -> bool:
    """Return whether a trained head's gradient is a sum of chunks, or not in float32; of one chunk it is the same to the bit."""
    if now.config.peft.name != "none" or RewardKind.of(now.reads):
        return False
    train = now.config.train
    rows = 2 * (train.microbatch_size or train.batch_size) * train.max_length  # at most
    bent = [now.model.get(name) for name in ("final_logit_softcapping", "logit_scale", "logits_scaling")]
    return now.half or any(bent) or rows * int(now.model["vocab_size"]) > 2**25


def _drops_by_tokens(now: RunFacts) -> bool:
    """Return whether dropout, or noise, depends on how the tokens of shared prompts are counted."""
    train, peft = now.config.train, now.config.peft
    drops = (peft.name == "lora" and peft.lora_dropout > 0) or drawn_in(now.model) is not None
    return train.share_prompts and train.microbatch_tokens is not None and drops


def _drops_before_head(now: RunFacts) -> bool:
    """Return whether an adapter with dropout is on the head, which all-linear leaves out."""
    peft = now.config.peft
    if peft.name != "lora" or not peft.lora_dropout:
        return False
    return any(word in str(peft.target_modules) for word in ("head", "embed_out", "output_layer"))


def _trains_biases(now: RunFacts) -> bool:
    return now.refers and now.config.peft.name == "lora" and now.config.peft.bias != "none"


def _refers_to_other_values(now: RunFacts) -> bool:
    """Return whether the policy is its own reference at every step, with other values of what it trains."""
    peft, reference = now.config.peft, now.config.reference
    is_own = now.refers and peft.name == "lora" and reference.name_or_path is None and reference.cache != "always"
    starts_adapted = peft.init_from is not None and reference.adapter == "start"
    return now.half and is_own and (peft.bias != "none" or starts_adapted or reference.sync_every is not None)


def _trains_whole_layers(now: RunFacts) -> bool:
    return now.half and now.config.peft.name == "lora" and bool(now.config.peft.modules_to_save)


def _samples_by_directory(now: RunFacts) -> bool:
    data = now.before.get("data") or {}
    entries = [entry for purpose in ("train", "eval") for entry in data.get(purpose) or []]
    paths = [entry.get("path") if isinstance(entry, Mapping) else entry for entry in entries]
    return now.config.online is not None and any("/" in str(path) for path in paths)


def _merges(now: RunFacts) -> bool:
    return now.config.peft.name == "lora" and bool(now.config.checkpoint.get("merge_lora"))


def _of_loss(*names: str) -> Callable[[RunFacts], bool]:
    return lambda now: str(now.config.loss.get("_target_")).rpartition(".")[2] in names


def _imitates_live(now: RunFacts) -> bool:
    online = now.config.online
    return _of_loss("sft")(now) and online is not None and online.steps is not None


def _learns_from_labelled_rounds(now: RunFacts) -> bool:
    """Return whether online rounds learn from pairs or labels, which lacked the tokens of their samples."""
    online = now.config.online
    return online is not None and online.steps is None and not _learns_from_rollouts(now)


def _learns_from_rollouts(now: RunFacts) -> bool:
    """Return whether an online run's loss is a policy gradient, of whose later batches or rounds nothing is computed yet."""
    online = now.config.online
    return online is not None and online.loss not in (*PAIRED, "reward", "sft", "csft", "kto")


def _sums_own_rewards(now: RunFacts) -> bool:
    """Return whether the score is a sum of several reward functions, one of which is the user's and may return None."""
    scorer = (now.before.get("online") or {}).get("scorer") or {}
    paths = [str(each.get("function") if isinstance(each, Mapping) else each) for each in scorer.get("functions") or []]
    return len(paths) > 1 and any("." in path and not path.startswith("halos.") for path in paths)


def _matches_answers(now: RunFacts) -> bool:
    """Return whether rewards compare final answers; the code of our own functions is not among what a resume compares."""
    scorer = (now.before.get("online") or {}).get("scorer") or {}
    paths = [str(each.get("function") if isinstance(each, Mapping) else each) for each in scorer.get("functions") or []]
    own = ("halos.online.rewards.", "halos.rollout.rewards.")  # where they stood, and stand
    names = {path.removeprefix(own[0]).removeprefix(own[1]) for path in paths}
    return not names.isdisjoint(("exact_match", "maths"))


def _adds_nothing_to_deviations(now: RunFacts) -> bool:
    return _of_loss("grpo")(now) and now.config.loss.get("epsilon") == 0


def _names_beginnings(now: RunFacts) -> bool:
    """Return whether a pattern of optim.lr_by_name may depend on what a parameter's name begins with."""
    return any(re.search(r"^\W|\^|model|module", str(pattern)) for pattern in now.config.optim.get("lr_by_name") or {})


def _clamps(now: RunFacts) -> bool:
    return now.config.humanline.low is not None or now.config.humanline.high is not None


def _renders_otherwise_in_rounds(now: RunFacts) -> bool:
    online, data = now.config.online, now.config.data
    return online is not None and online.steps is None and bool(data.system != "keep" or data.chat_template_kwargs)


# Oldest first. Whoever changes the arithmetic adds an entry here, with a higher number; changes of one release share it.
HISTORY = (
    Revision(1, "2026-11-26", "a trained head's gradient is summed in float32 over its chunks", _sums_head_in_parts),
    Revision(1, "2026-11-26", "this model's sequences are not packed, since they would attend to each other",
             lambda now: not now.packed),
    Revision(1, "2026-11-26", "log-probs come from this model's own head, which is more than a layer, a scale and a soft cap",
             lambda now: not RewardKind.of(now.reads) and now.head != "layer"),
    Revision(1, "2026-11-26", "the reference of a policy with trained biases has the biases of the base", _trains_biases),
    Revision(1, "2026-11-26", "the samples of a prompt depend on the name of its file, and not on its directory",
             _samples_by_directory),
    Revision(1, "2026-11-26", "adapters are merged in float64 and rounded once", _merges, of="FINAL"),
    Revision(1, "2026-11-26", "a pair with equal rewards counts half in accuracies", _of_loss(*PAIRED), of="metrics"),
    Revision(1, "2026-11-26", "kl is the raw estimate, which may be negative; z0 is the clamped one of the loss",
             _of_loss("kto"), of="metrics"),
    Revision(2, "2026-11-27", "with the loss sft a live loop learns only from desirable samples (online.feedback), as rounds do",
             _imitates_live),
    Revision(3, "2026-11-27", "advantages/std is a standard deviation, and not the mean of absolute values",
             _of_loss("grpo", "rloo"), of="metrics"),
    Revision(4, "2026-11-27", "old log-probs are the trainer's own, and not the sampler's", _learns_from_rollouts),
    Revision(4, "2026-11-27", "a live batch is refilled until it is full, and train.batch_size counts pairs for a loss on pairs",
             lambda now: now.config.online is not None and now.config.online.steps is not None),
    Revision(5, "2026-11-27", "rounds learn pairs and labels from the tokens that were sampled, without an end token where a"
             " sample was cut", _learns_from_labelled_rounds),
    Revision(6, "2026-11-27", "logits of half-precision products are float32 sums, not rounded to a half",
             lambda now: now.half and not RewardKind.of(now.reads) and now.head == "layer"),
    Revision(6, "2026-11-27", "a reward function that returns None does not apply, and no longer costs the sample its score",
             _sums_own_rewards),
    Revision(7, "2026-11-27", "a frozen head's logits are computed once", lambda now: now.head == "layer", of="kept"),
    Revision(8, "2026-11-27", "this model's sequences are not packed, since its attention would be another",
             lambda now: not now.packed and now.model.get("model_type") in ("llama4_text", "minimax_m3_vl_text")),
    Revision(8, "2026-11-27", "in train.microbatch_tokens the prompt of a completion that is too long to share it counts again",
             _drops_by_tokens),
    Revision(9, "2026-11-27", "items of a prompt are side by side in micro-batches, if possible on one rank",
             lambda now: now.packed, of="kept"),
    Revision(10, "2026-11-27", "the dropout of an adapter on the head is the same in the backward pass as in the forward pass",
             _drops_before_head),
    Revision(11, "2026-11-28", "an evaluation on several sources has no batch with rows of two, and metrics of each",
             lambda now: len((now.before.get("data") or {}).get("eval") or []) > 1, of="kept"),
    Revision(12, "2026-11-28", "with loss.epsilon=0 equal rewards have advantages of 0, and not NaN or those of rounding",
             _adds_nothing_to_deviations),
    Revision(13, "2026-11-28", "objective=cispo bounds its ratio from below where loss.clip_low is given",
             lambda now: now.config.loss.get("objective") == "cispo", of="kept"),
    Revision(14, "2026-11-28", "of data that a run sees at most half of, the reference's log-probs are those of what it sees",
             lambda now: now.refers, of="kept"),
    Revision(14, "2026-11-28", "of several steps mismatch/max is the largest, and not a mean",
             lambda now: _of_loss(*ON_ROLLOUTS)(now) and now.config.train.log_every > 1, of="metrics"),
    Revision(15, "2026-11-28", "the products of a layer's adapter add to the layer's own",
             lambda now: now.config.peft.name == "lora", of="kept"),
    Revision(16, "2026-11-29", "on a GPU model.attention=auto may be one kernel for all packed sequences",
             lambda now: now.packed and now.half and now.config.model.attention == "auto", of="kept"),
    Revision(17, "2026-11-29", "after its own reference a policy computes in half precision from its own values, and not from the"
             " reference's", _refers_to_other_values),
    Revision(17, "2026-11-29", "layers of peft.modules_to_save compute in the base's dtype, and a head among them sums in"
             " float32", _trains_whole_layers),
    Revision(18, "2026-11-29", "on a CPU logits of bfloat16 products are sums of two terms, and attention in bfloat16 is by"
             " blocks of queries", lambda now: now.half and now.device == "cpu"),
    Revision(18, "2026-11-29", "exact_match compares numbers by their values, and by one rule in answers and solutions; an answer"
             " begins after the last ####", _matches_answers),
    Revision(18, "2026-11-29", "rounds train with data.system and data.chat_template_kwargs, with which they sample",
             _renders_otherwise_in_rounds),
    Revision(18, "2026-11-29", "optim.lr_by_name matches names of the model itself, without what wraps it in a launch",
             _names_beginnings),
    Revision(18, "2026-11-29", "an evaluation of a loss on rollouts has all samples of a prompt in one batch",
             _of_loss(*ON_ROLLOUTS), of="metrics"),
    Revision(18, "2026-11-29", "with humanline logps/... and nll are of the policy's log-probs, and not of clamped ones",
             _clamps, of="metrics"),
    Revision(18, "2026-11-29", "perplexity is that of the metric nll, and not of a loss which may be something else",
             lambda now: now.reads == "language" and not str(now.config.loss.get("_target_")).startswith("halos."), of="metrics"),
    Revision(18, "2026-11-29", "a live batch is refilled with the prompts after its own, and the next goes on after these",
             lambda now: now.config.online is not None and now.config.online.steps is not None, of="kept"),
)  # fmt: skip
VERSION = HISTORY[-1].number
FROZEN_HEAD_ONCE, SIBLINGS_TOGETHER, EVALUATED_BY_SOURCE, CISPO_BOUNDED_BELOW, VISITED_ROWS, FUSED_LORA = 7, 9, 11, 13, 14, 15
ATTENTION_IN_ONE_CALL = 16


def recorded_version(record: Mapping[str, Any] | None) -> int:
    """Return the version that a record holds; 0 where there is no record, or it predates versions."""
    version = str((record or {}).get(KEY))
    return int(version) if version.isdecimal() else 0


def changes_since(since: int, now: RunFacts) -> list[Change]:
    """Return what would change the steps of a run that was computed with version `since`."""
    if since > VERSION:
        return [Change(KEY, since, VERSION, "a newer version of halos computed it: resume with that version")]
    steps = [f"since {one.date} {one.what}" for one in _between(since, now) if one.of == "steps"]
    return [Change(KEY, since, VERSION, "; ".join(steps))] if steps else []


def notes_since(since: int, now: RunFacts) -> list[str]:
    """Return the changes since version `since` that affect metrics or the final model of a run, and none of its steps."""
    return [f"{one.of}: since {one.date} {one.what}" for one in _between(since, now) if one.of in ("metrics", "FINAL")]


def _between(since: int, now: RunFacts) -> Iterator[Revision]:
    return (one for one in HISTORY if one.number > since and one.concerns(now))
