"""From a checked config to a trainer that is ready for `fit`: the composition root."""

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import set_seed

from halos.checkpoint.state import load_optimizer
from halos.config.bind import LossSpec, bind_hook, bind_loss
from halos.config.changes import Change
from halos.config.schema import Config
from halos.data.template import chat_template
from halos.distributed import strategy
from halos.distributed.deepspeed_config import refuse_settings
from halos.errors import UserError
from halos.hooks.base import Hook, Run
from halos.hooks.checkpoint import CheckpointHook, restore
from halos.hooks.early_stopping import EarlyStopping
from halos.hooks.kl import KLCoefficient
from halos.hooks.log import MetricsLog
from halos.hooks.progress import ProgressBar
from halos.lock import RunLock
from halos.models.load import load_tokenizer, refuse_other_model
from halos.models.locate import locate
from halos.run import header, models, resume
from halos.run.batch_source import feed
from halos.rundir import RunDir
from halos.trainers.base import Trainer
from halos.trainers.paired import PairedTrainer
from halos.trainers.policy_gradient import PolicyGradientTrainer
from halos.trainers.reward import RewardTrainer
from halos.trainers.sft import SFTTrainer
from halos.trainers.unpaired import UnpairedTrainer
from halos.types import Labelled, Pair, PairScores, Rollouts, TokenLogps, ValuedRollouts

log = logging.getLogger(__name__)

TRAINERS: dict[type, type[Trainer]] = {
    TokenLogps: SFTTrainer,
    Pair: PairedTrainer,
    Labelled: UnpairedTrainer,
    PairScores: RewardTrainer,
    Rollouts: PolicyGradientTrainer,
    ValuedRollouts: PolicyGradientTrainer,
}


def assemble(
    config: Config, typed: list[str], made: Accelerator, changed: Sequence[Change] = (), lock: RunLock | None = None
) -> Trainer | None:
    """Everything a run needs, ready for `fit`; None for a dry run. What can be wrong is found before the model loads."""
    loss = bind_loss(config.loss, config.plugins)
    trained = config.model.dtype if config.peft.name == "none" else "float32"  # an adapter always is
    refuse_settings(max_grad_norm=config.train.max_grad_norm, trained=trained)
    set_seed(config.seed % 2**32)  # for what hooks and plugins draw; weights and steps have seeds of their own
    checkpoint, hooks = _hooks(config, loss)
    directory = RunDir(config.run_dir)
    if made.is_main_process:
        if lock:
            lock.refuse_held(wait=bool(config.resume))
        directory.open() if config.resume else directory.refuse_occupied(overwrite=config.overwrite)
    base = _base(config, made)
    tokenizer, new_tokens = load_tokenizer(base, add_tokens=config.model.add_tokens)
    tokenizer.chat_template = chat_template(tokenizer, config.model.chat_template)
    source_of_rows = feed(config, loss, tokenizer, made)
    total = source_of_rows.total
    if config.dry_run:
        for name, line in source_of_rows.lines():
            log.info("%-10s %s", name, line)
        log.info("%d steps of %d; everything fits together, nothing was trained", total, config.train.batch_size)
        return None
    named = models.named_reference(config, tokenizer, new_tokens) if loss.needs_reference else None
    source = resume.begin(config, directory, made, total, lock)
    shelf = models.Shelf(config, base, tokenizer, new_tokens, made)
    current = _load(shelf, loss, hooks, directory, total, source.path)
    against = models.reference(shelf, current.model, named) if loss.needs_reference else None
    against = strategy.distribute_frozen(against, made) if against else None
    if source.path is not None:
        restore(current, source.path)  # last: loading models draws random numbers
    elif config.optim.init_from is not None:
        load_optimizer(Path(config.optim.init_from) / "state", current.module, current.optimizer)
    if made.is_main_process:
        resume.record(current, typed, source, changed)
    rows = source_of_rows.open(current, partial(models.skeleton, shelf))
    header.write(current, loss, source_of_rows.lines(), rows.train, rows.held_out, against)
    return TRAINERS[loss.inputs](
        current, loss, checkpoint, train=rows.train, held_out=rows.held_out, order=rows.order, reference=against, exam=rows.exam
    )


def _hooks(config: Config, loss: LossSpec) -> tuple[CheckpointHook, dict[str, Hook]]:
    """The checkpoint hook; and all hooks in order: it first, the run's own record, then the config's, in its order."""
    checkpoint = bind_hook("checkpoint", config.checkpoint, config.plugins)()
    if not isinstance(checkpoint, CheckpointHook):
        raise UserError(f"checkpoint._target_={config.checkpoint['_target_']} is no CheckpointHook")
    hooks: dict[str, Hook] = {"checkpoint": checkpoint, "metrics": MetricsLog(), "progress": ProgressBar()}
    if config.train.early_stopping is not None:
        hooks["early_stopping"] = EarlyStopping(patience=config.train.early_stopping)
    if loss.adapt is not None:
        hooks["kl_coefficient"] = KLCoefficient(loss.settings["kl_coefficient"])
    return checkpoint, hooks | {name: bind_hook(f"hooks.{name}", given, config.plugins)() for name, given in config.hooks.items()}


def _base(config: Config, made: Accelerator) -> Path:
    assert config.model.name_or_path is not None, "the gate lets no run through without a model"
    with made.main_process_first():
        return locate(config.model.name_or_path, config.model.revision, Path(config.cache_dir).expanduser())


def _load(
    shelf: models.Shelf, loss: LossSpec, hooks: dict[str, Hook], directory: RunDir, total: int, checkpoint: Path | None
) -> Run:
    """Model and optimizer as the strategy wants them; the weights are those of the checkpoint that the run goes on from."""
    reward = loss.inputs is PairScores
    if checkpoint is not None and shelf.config.peft.name == "none":
        refuse_other_model(shelf.base, checkpoint / "model")
    inner = models.policy(shelf, reward=reward, checkpoint=checkpoint)
    module, optimizer = strategy.distribute(
        models.wrapped(shelf, inner, loss.inputs, checkpoint),
        shelf.made,
        partial(models.optimizer, settings=shelf.config.optim),
        max_grad_norm=shelf.config.train.max_grad_norm,
    )
    current = Run(
        config=shelf.config, directory=directory, accelerator=shelf.made, module=module, model=inner, base=shelf.base,
        optimizer=optimizer, tokenizer=shelf.tokenizer, reward=reward, total_steps=total, hooks=hooks,
    )  # fmt: skip
    return current
