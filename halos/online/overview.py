"""A run of rounds in a few lines, for its header and for a dry run."""

from __future__ import annotations

import logging

from halos.online.plan import OnlinePlan
from halos.online.round_size import MANY_STEPS
from halos.rollout import evaluation
from halos.rollout.prompts import unused_rows

log = logging.getLogger(__name__)


def write(plan: OnlinePlan) -> None:
    """Log what the rounds sample and learn from."""
    online, size, held_out = plan.online, plan.size, min(plan.online.eval_prompts, len(plan.eval_prompts))
    given = "online.prompts_per_round" if online.prompts_per_round is not None else "online.steps_per_round"
    log.info("online     %d rounds of %s, %s feedback by %s", online.rounds, online.loss, plan.kind, online.scorer.name)
    log.info("prompts    %d, %d a round, %d samples of each; %d held out%s%s", len(plan.prompts), size.prompts,
             online.samples_per_prompt, held_out, evaluation.plan_of(online) if held_out else "",
             unused_rows(plan.unused))  # fmt: skip
    log.info("steps      up to %d a round on one set of samples (by %s)", size.steps, plan.steps_are_set_by or given)
    log.info("optimizer  %s", _optimizer(plan))
    if (tokens := plan.inner.loss.get("max_tokens")) is not None:
        log.info("divisor    %d tokens, by which the sum over a completion is divided (loss.max_tokens)", tokens)
    if size.steps > MANY_STEPS:
        log.warning(
            "%d optimizer steps on one set of samples: after the first few these are no longer the policy's own. A lower"
            " online.prompts_per_round, or none, gives fewer", size.steps,
        )  # fmt: skip


def _optimizer(plan: OnlinePlan) -> str:
    schedule = plan.inner.schedule["_target_"].rpartition(".")[2]
    state = "its state is carried over rounds" if plan.online.carry_optimizer else "a fresh one in each round"
    if plan.one_warmup:
        return f"{state}; one {schedule} learning rate, whose warm-up is in the first"
    return f"{state}; the {schedule} schedule from its start in each"
