"""Checks before any weights are read of what would only fail at the end: the merge, and the space on the disk."""

import logging
import shutil
from pathlib import Path

from peft import PeftModel

from halos.checkpoint import manifest, select, space
from halos.checkpoint.final import merged_dtype
from halos.config.checkpoint_checks import pinned_beyond
from halos.confined import expanded
from halos.errors import UserError
from halos.hooks.base import PlannedRun
from halos.hooks.checkpoint import CheckpointHook
from halos.logps.model import bare
from halos.merge.merge_and_prove import case_of
from halos.merge.preflight import check_merge_once
from halos.rundir import nearest_existing

log = logging.getLogger(__name__)
MOST_STEPS = 10**6  # whose checkpoints are counted: of a longer run, what it keeps for ever is underestimated


def check(policy: CheckpointHook, planned: PlannedRun) -> None:
    """Raises UserError if the adapter could not be merged, the disk is too small, or a pinned step is beyond the run's end; adds
    a header line on disk use, and warns where the best checkpoints are chosen by evaluations of earlier steps."""
    if not planned.main:
        return
    if beyond := pinned_beyond(planned.config, planned.total_steps):
        if planned.config.train.steps is not None:
            raise UserError(beyond)
        log.warning("%s", beyond)  # epochs end elsewhere with other rows: rounds of an online run have as many as were sampled
    if earlier := judged_by_earlier(policy, planned.config.train.eval_every, planned.total_steps):
        log.warning("%s", earlier)
    if isinstance(planned.model, PeftModel) and policy.merge_lora:
        dtype = merged_dtype(policy, bare(planned.model))
        case = case_of(planned.base, Path("adapter"), planned.vocabulary, dtype=dtype, reward=planned.reward)
        check_merge_once(case, planned.model, expanded(planned.config.cache_dir))
    if problem := too_little_space(policy, planned):
        raise UserError(problem)


def judged_by_earlier(policy: CheckpointHook, eval_every: int | None, total: int) -> str | None:
    """Return a warning where checkpoints have the objective of an evaluation before their own step; None where they do not."""
    every = policy.every
    if not policy.keep_best or every is None or eval_every is None or every % eval_every == 0 or every >= total:
        return None
    before = every - every % eval_every  # 0: of the weights that the run starts from, where train.eval_at_start
    example = f", step {every} by {before}" if before else ""
    fitting = -(-every // eval_every) * eval_every
    divisor = max(number for number in range(1, min(every, eval_every) + 1) if every % number == 0)
    return (
        f"checkpoint.keep_best={policy.keep_best}: checkpoint.every={every} is no multiple of train.eval_every={eval_every}, so"
        f" checkpoints between evaluations are judged by the last one before them{example}:"
        f" checkpoint.every={fitting} or train.eval_every={divisor} judges each by its own"
    )


def too_little_space(policy: CheckpointHook, planned: PlannedRun) -> str | None:
    """Return the complaint if the disk cannot hold the checkpoints to come and FINAL, else None."""
    model, vocabulary, config = planned.model, len(planned.tokenizer), planned.config
    adapter, directory = isinstance(model, PeftModel), planned.directory.checkpoints
    one = space.checkpoint_bytes(model, adapter=adapter, optimizer=planned.optimizer_bytes, vocabulary=vocabulary)
    if config.reference.sync_every is not None:
        one += space.weight_bytes(model, adapter=adapter)
    final = space.final_bytes(model, adapter_alone=adapter and not policy.merge_lora, vocabulary=vocabulary)
    ahead = range(1, min(planned.total_steps, MOST_STEPS) + 1)
    steps = [step for step in ahead if policy.due_at(step)] or [planned.total_steps]
    most = policy.retention(largest=config.objective.mode == "max").max_on_disk(steps)
    free = shutil.disk_usage(nearest_existing(directory)).free
    present = sum(not manifest.verify(path, contents=False) for path in select.checkpoints(directory))
    sizes = [manifest.human_size(size) for size in (one, final, free)]
    text = f"at most {most} checkpoint{'s' * (most != 1)} of about {sizes[0]}, FINAL of about {sizes[1]}; {sizes[2]} free"
    planned.lines.append(("disk", text))
    return space.too_little(directory, free=free, one=one, most=most, present=present, final=final)
