"""Assemble a trainer that is ready for `fit` from a checked config: the composition root."""

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn

from halos.checkpoint import weights
from halos.checkpoint.checkpointer import Checkpointer
from halos.checkpoint.state import load_optimizer, restore
from halos.config import run_config
from halos.config.arithmetic_version import EVALUATED_BY_SOURCE, FROZEN_HEAD_ONCE, FUSED_LORA, SIBLINGS_TOGETHER
from halos.config.reference_checks import has_reference
from halos.config.resume_policy import Change
from halos.config.schema import Config
from halos.data.dataset import Dataset
from halos.data.dates import date_of
from halos.data.stream import StreamRows
from halos.hooks.base import Run
from halos.inspection.findings import refuse_errors
from halos.lock import RunLock
from halos.logps import compiled, lora_linear
from halos.logps.model import ActorCritic, LanguageModel
from halos.logs import Recorded
from halos.models.load import refuse_different_architecture
from halos.online.generate import PolicyGenerator
from halos.online.unsharded import Unsharded
from halos.run import dry_run, header, models, proof, reference, resume, token_budget
from halos.run.optimizer import make_optimizer
from halos.run.prepare import PreparedRun, prepare
from halos.schedules import LearningRates
from halos.trainers.base import Batches, Parts, Trainer
from halos.trainers.microbatches import Bounds, Split

log = logging.getLogger(__name__)


def assemble(
    config: Config, overrides: list[str], accelerator: Accelerator, changed: Sequence[Change] = (), lock: RunLock | None = None
) -> Trainer | None:
    """Assemble everything a run needs; return None for a dry run, which ends where weights would be loaded."""
    set_seed(config.seed % 2**32)  # for hooks and plugins; weights and steps have seeds of their own
    if config.dry_run:
        return _check(config, overrides, accelerator, lock)
    run = reference.decided(prepare(config, accelerator, lock))
    refuse_errors(run.batches.checks)
    config = run.config
    resumed_from = resume.prepare_directory(config, run.directory, accelerator, run.batches.total, lock)
    version = run_config.first_version(run.directory.read_attempts(), str(run.directory.path))
    current = _load(run, accelerator, resumed_from.path)
    _keep_arithmetic(current.module, version)
    if config.train.compile:
        compiled.compile_regions(current.module)
    frozen, kept = reference.opened(run, current, accelerator, version, resumed_from.path)
    if resumed_from.path is not None:
        restore(current, resumed_from.path)  # after loading models, which draws random numbers
    elif config.optim["init_from"] is not None:
        load_optimizer(Path(config.optim["init_from"]) / "state", current.strategy, current.module, current.optimizer)
    settled = token_budget.settle(current, run.planned.optimizer_bytes, _longest_item(run))
    day = date_of(current.tokenizer) or run.batches.scorer_date
    settled |= {} if day is None else {run_config.DATE: day}
    proof.prove_loaded(current, run.structure.verdict)
    policy = Unsharded(current, partial(models.policy_structure, run.structure.loader, reward=None))
    current.generator = None if current.reward else PolicyGenerator(current, policy)
    data = run.batches.open(current, policy)
    current.rows_of_step = partial(_rows_of_step, data.train, data.order)
    checkpointer = Checkpointer(current, run.checkpoint)
    split = data.train, data.eval_data, data.order
    trainer = run.trainer(Parts(current, run.loss, checkpointer, *split, frozen, data.generation_evaluation, kept))
    trainer.deals_together = version >= SIBLINGS_TOGETHER
    trainer.evaluates_by_source = version >= EVALUATED_BY_SOURCE
    trainer.refuse_lost_cache()
    if accelerator.is_main_process:
        # last: a refused resume leaves the run as it was
        resume.record_attempt(current, overrides, resumed_from, changed, run.changed, settled)
    header.write(run, accelerator)
    return trainer


def _rows_of_step(split: Split, order: Batches, step: int) -> list[str]:
    """Where the rows of a global batch came from; none of a live loop, whose rows of earlier steps are gone."""
    return [split.rows[int(row)].id for row in order.batch(step)] if isinstance(split.rows, Dataset | StreamRows) else []


def _longest_item(run: PreparedRun) -> int:
    bounds = Bounds(None, None, run.config.train.share_prompts and run.structure.verdict.plan.shares)
    items = [token_budget.longest_item(split.rows, bounds, run.planned.max_length) for _, split in run.batches.splits]
    return max(items, default=run.planned.max_length)


def _check(config: Config, overrides: list[str], accelerator: Accelerator, lock: RunLock | None) -> None:
    """Make every check that needs no weights, and write the page of the dry run, for refused data too."""
    with Recorded() as lines:
        run = reference.decided(prepare(config, accelerator, lock))
        if config.resume and accelerator.is_main_process:
            resume.report_checkpoint(config, run.directory, run.batches.total)
        header.write(run, accelerator)
        if accelerator.is_main_process:
            dry_run.write(run, accelerator, overrides, lines)
    refuse_errors(run.batches.checks)
    log.info("everything fits together; nothing was trained")


def _load(run: PreparedRun, accelerator: Accelerator, checkpoint: Path | None) -> Run:
    """Load the model, from `checkpoint` if the run resumes, distribute it, and create the optimizer."""
    config, loader, planned = run.config, run.structure.loader, run.planned
    fill = None
    if checkpoint is not None and config.peft.name == "none":
        saved_model, sharded = weights.saved_model(checkpoint)
        refuse_different_architecture(loader.base, saved_model)
        fill = partial(weights.load_shards, saved_model, run.strategy) if sharded else None
    refers = has_reference(run.config, run.loss)
    model = models.load_policy(loader, reward=planned.reward, refers=refers, checkpoint=checkpoint)
    module, optimizer = run.strategy.wrap(
        models.add_head(loader, model, run.loss, checkpoint),
        partial(make_optimizer, spec=run.optimizer),
        max_grad_norm=config.train.max_grad_norm,
        fill=fill,
    )
    return Run(
        config=config, directory=run.directory, accelerator=accelerator, strategy=run.strategy, module=module, model=model,
        base=loader.base, vocabulary=loader.vocabulary, optimizer=optimizer, tokenizer=loader.tokenizer, reward=planned.reward,
        total_steps=planned.total_steps, max_length=planned.max_length, unmeasured=run.batches.unmeasured, hooks=dict(run.hooks),
        content=run.content, learning_rates=LearningRates(optimizer, run.schedule.multiplier, planned.total_steps),
    )  # fmt: skip


def _keep_arithmetic(module: nn.Module, version: int) -> None:
    """Compute a resumed run's steps as the version that began it did."""
    for part in module.modules():
        if isinstance(part, LanguageModel | ActorCritic):
            part.recomputes_head = version < FROZEN_HEAD_ONCE
    if version >= FUSED_LORA:
        lora_linear.fuse(module)
