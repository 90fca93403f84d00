"""From a checked config to a trainer that is ready for `fit`: the composition root."""

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import set_seed

from halos.checkpoint import weights
from halos.checkpoint.checkpointer import Checkpointer
from halos.checkpoint.state import load_optimizer, restore
from halos.config.resume_policy import Change
from halos.config.schema import Config
from halos.hooks.base import Run
from halos.lock import RunLock
from halos.models.load import refuse_different_architecture
from halos.online.generate import PolicyGenerator
from halos.online.unsharded import Unsharded
from halos.run import header, models, proof, resume
from halos.run.blueprint import Prepared, prepare
from halos.run.optimizer import make as make_optimizer
from halos.schedules import LearningRates
from halos.trainers.base import Trainer

log = logging.getLogger(__name__)


def assemble(
    config: Config, typed: list[str], made: Accelerator, changed: Sequence[Change] = (), lock: RunLock | None = None
) -> Trainer | None:
    """Everything a run needs, ready for `fit`; None for a dry run, which ends where weights would be read."""
    set_seed(config.seed % 2**32)  # for what hooks and plugins draw; weights and steps have seeds of their own
    run = prepare(config, made, lock)
    if config.dry_run:
        if config.resume and made.is_main_process:
            resume.look(config, run.directory, run.rows.total)
        header.write(run, made)
        log.info("everything fits together; nothing was trained")
        return None
    source = resume.begin(config, run.directory, made, run.rows.total, lock)
    current = _load(run, made, source.path)
    against = models.reference(run.structure.shelf, current.model, run.structure.named) if run.loss.needs_reference else None
    against = run.strategy.wrap_frozen(against) if against else None
    if source.path is not None:
        restore(current, source.path)  # last: loading models draws random numbers
    elif config.optim["init_from"] is not None:
        load_optimizer(Path(config.optim["init_from"]) / "state", current.strategy, current.module, current.optimizer)
    proof.of_start(current, run.structure.verdict)
    policy = Unsharded(current, partial(models.structure, run.structure.shelf, reward=False))
    current.generator = None if current.reward else PolicyGenerator(current, policy)
    rows = run.rows.open(current, policy)
    trainer = run.trainer(
        current, run.loss, Checkpointer(current, run.checkpoint), train=rows.train, held_out=rows.held_out, order=rows.order,
        reference=against, exam=rows.exam,
    )  # fmt: skip
    trainer.refuse_lost()
    if made.is_main_process:
        resume.record(current, typed, source, changed, run.changed)  # only now: what is refused leaves a run as it was
    header.write(run, made)
    return trainer


def _load(run: Prepared, made: Accelerator, checkpoint: Path | None) -> Run:
    """Model and optimizer as the strategy wants them; the weights are those of the checkpoint that the run goes on from."""
    config, shelf, blueprint = run.config, run.structure.shelf, run.blueprint
    fill = None
    if checkpoint is not None and config.peft.name == "none":
        place, sharded = weights.saved_model(checkpoint)
        refuse_different_architecture(shelf.base, place)
        fill = partial(weights.load_shards, checkpoint, run.strategy) if sharded else None
    inner = models.policy(shelf, reward=blueprint.reward, refers=run.loss.needs_reference, checkpoint=checkpoint)
    module, optimizer = run.strategy.wrap(
        models.wrapped(shelf, inner, run.loss.inputs, checkpoint),
        partial(make_optimizer, spec=run.optimizer),
        max_grad_norm=config.train.max_grad_norm,
        fill=fill,
    )
    return Run(
        config=config, directory=run.directory, accelerator=made, strategy=run.strategy, module=module, model=inner,
        base=shelf.base, vocabulary=shelf.vocabulary, optimizer=optimizer, tokenizer=shelf.tokenizer, reward=blueprint.reward,
        total_steps=blueprint.total_steps, max_length=blueprint.max_length, unmeasured=run.rows.unmeasured, hooks=dict(run.hooks),
        content=run.content, learning_rates=LearningRates(optimizer, run.schedule.multiplier, blueprint.total_steps),
    )  # fmt: skip
