"""Checks before any weights are read of what would only fail at the end: the merge, and the space on the disk."""

import shutil
from pathlib import Path

from peft import PeftModel

from halos.checkpoint import manifest, select, space
from halos.checkpoint.final import merged_dtype
from halos.errors import UserError
from halos.hooks.base import Blueprint
from halos.hooks.checkpoint import CheckpointHook
from halos.logps.model import bare
from halos.merge.merge_and_prove import case_of
from halos.merge.rehearsal import rehearse
from halos.rundir import nearest_existing


def check(policy: CheckpointHook, blueprint: Blueprint) -> None:
    """Raises UserError if the adapter could not be merged or the disk is too small; adds a header line on disk use."""
    if not blueprint.main:
        return
    if isinstance(blueprint.model, PeftModel) and policy.merge_lora:
        dtype = merged_dtype(policy, bare(blueprint.model))
        case = case_of(blueprint.base, Path("adapter"), blueprint.vocabulary, dtype=dtype, reward=blueprint.reward)
        rehearse(case, blueprint.model)
    if problem := too_little_space(policy, blueprint):
        raise UserError(problem)


def too_little_space(policy: CheckpointHook, blueprint: Blueprint) -> str | None:
    """Return the complaint if the disk cannot hold the checkpoints to come and FINAL, else None."""
    model, vocabulary, config = blueprint.model, len(blueprint.tokenizer), blueprint.config
    adapter, directory = isinstance(model, PeftModel), blueprint.directory.checkpoints
    one = space.checkpoint_bytes(model, adapter=adapter, optimizer=blueprint.optimizer_bytes, vocabulary=vocabulary)
    final = space.final_bytes(model, adapter_alone=adapter and not policy.merge_lora, vocabulary=vocabulary)
    steps = [step for step in range(1, blueprint.total_steps + 1) if policy.due_at(step)] or [blueprint.total_steps]
    most = policy.retention(largest=config.objective.mode == "max").max_on_disk(steps)
    free = shutil.disk_usage(nearest_existing(directory)).free
    present = sum(not manifest.verify(path, contents=False) for path in select.checkpoints(directory))
    sizes = [manifest.human_size(size) for size in (one, final, free)]
    text = f"at most {most} checkpoint{'s' * (most != 1)} of about {sizes[0]}, FINAL of about {sizes[1]}; {sizes[2]} free"
    blueprint.lines.append(("disk", text))
    return space.too_little(directory, free=free, one=one, most=most, present=present, final=final)
