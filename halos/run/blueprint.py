"""From a checked config to a run before its weights: every check that needs none, in one order, for runs and dry runs alike."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedTokenizerBase

from halos.checkpoint import integrity, preflight
from halos.config import run_config
from halos.config.arithmetic_version import RunFacts
from halos.config.bind import LossSpec, bind_hook, bind_loss, bind_trainer
from halos.config.bind_optim import OptimizerSpec, ScheduleSpec, bind_optimizer, bind_schedule
from halos.config.content_hashes import ContentHashes
from halos.config.resume_policy import Change
from halos.config.schema import Config
from halos.confined import expanded
from halos.data.template import chat_template
from halos.data.tokenize import end_of_turn
from halos.distributed.launch import require_same_on_all_ranks
from halos.distributed.strategies import requested_strategy
from halos.distributed.strategy import Strategy
from halos.errors import UserError
from halos.hooks.base import Blueprint, Hook, can_measure
from halos.hooks.checkpoint import CheckpointHook
from halos.hooks.early_stopping import EarlyStopping
from halos.hooks.kl import KLCoefficient
from halos.hooks.log import MetricsLog
from halos.hooks.progress import ProgressBar
from halos.lock import RunLock
from halos.logps.model import bare
from halos.logps.router import refuse_without_router
from halos.logps.vocabulary import Vocabulary
from halos.models import positions
from halos.models.load import load_tokenizer
from halos.models.locate import locate
from halos.prove.verdict import Verdict
from halos.run import contents, models, proof
from halos.run.batch_source import Feed, feed
from halos.run.beginnings import refuse_other_start
from halos.run.measured import refuse_unmeasured
from halos.run.optimizer import refuse_unfit, state_bytes
from halos.run.optimizer_trial import try_out
from halos.rundir import RunDir
from halos.trainers.base import Trainer

log = logging.getLogger(__name__)

VALUE_HEAD = ("value_head.weight", "value_head.bias")  # of a policy that is read through one


@dataclass(frozen=True, slots=True)
class Structure:
    """What a run trains, without a weight: the base's files, the tokenizer, the model on the meta device."""

    shelf: models.Shelf
    model: nn.Module  # with its adapter
    named: Path | None  # the reference that the config names
    limits: positions.Limits
    max_length: int  # tokens of a row
    verdict: Verdict  # on the forward

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.shelf.tokenizer


@dataclass(frozen=True, slots=True)
class Prepared:
    """A run that nothing is known to stand in the way of."""

    config: Config
    loss: LossSpec
    trainer: type[Trainer]
    directory: RunDir
    structure: Structure
    strategy: Strategy
    rows: Feed
    optimizer: OptimizerSpec
    schedule: ScheduleSpec
    checkpoint: CheckpointHook
    hooks: Mapping[str, Hook]
    blueprint: Blueprint
    content: ContentHashes | None  # what the run stands on; on the first process
    changed: Sequence[Change]  # in it, since it was last started


def prepare(config: Config, made: Accelerator, lock: RunLock | None) -> Prepared:
    """Raises UserError for whatever is known to stand in a run's way before its weights are read; leaves nothing behind but
    what is cached."""
    loss = bind_loss(config.loss, config.plugins)
    trainer = bind_trainer(loss, config.plugins)
    trained = config.model.dtype if config.peft.name == "none" else "float32"  # an adapter always is
    requested_strategy().refuse_settings(max_grad_norm=config.train.max_grad_norm, trained=trained)
    checkpoint, hooks = hooks_of(config, loss)
    if not any(can_measure(hook) for hook in hooks.values()):
        refuse_unmeasured(config, loss)
    directory = RunDir(config.run_dir)
    if made.is_main_process:
        if lock:
            lock.refuse_held(wait=bool(config.resume))
        directory.require_run() if config.resume else directory.refuse_occupied(overwrite=config.overwrite)
    with made.main_process_first():
        base = locate_base(config)
    refuse_damaged(config, base, made)
    structure = structure_of(config, loss, made, base)
    strategy = structure.shelf.engine(made)
    strategy.refuse_model(structure.model)
    rows = feed(config, loss, structure.tokenizer, made, structure.max_length)
    optimizer, schedule = bind_optimizer(config.optim, config.plugins), bind_schedule(config.schedule, config.plugins)
    schedule.check_range(rows.total)
    blueprint = draw(config, structure, loss, total=rows.total, main=made.is_main_process)
    require_same_on_all_ranks(made, "hooks", ", ".join(hooks), complaint(checkpoint, hooks.values(), blueprint))
    content, changed = stand_on(config, loss, structure, rows, made)
    return Prepared(
        config, loss, trainer, directory, structure, strategy, rows, optimizer, schedule, checkpoint, hooks, blueprint, content,
        changed,
    )  # fmt: skip


def stand_on(
    config: Config, loss: LossSpec, structure: Structure, rows: Feed, made: Accelerator
) -> tuple[ContentHashes | None, Sequence[Change]]:
    """What the run stands on, by content, and what of it has changed. Raises UserError for a change that was not allowed."""
    content, changed, problem = None, list[Change](), None
    if made.is_main_process:
        try:
            base, named = structure.shelf.base, structure.named
            refuse_other_start(config, base, structure.tokenizer)
            content = contents.read(config, structure.tokenizer, rows.contents(), base=base, reference=named)
            if config.resume:
                changed = contents.changed(config, computed(config, loss, structure), content, rows.tokens_until)
        except UserError as error:
            problem = str(error)
    require_same_on_all_ranks(made, "content", "", problem)
    return content, changed


def computed(config: Config, loss: LossSpec, structure: Structure) -> RunFacts:
    """What decides which changes of the arithmetic concern a run."""
    plan, shelf, directory = structure.verdict.plan, structure.shelf, RunDir(config.run_dir)
    before = run_config.load(directory.read_config(), directory.read_attempts(), str(directory.path)) if config.resume else {}
    half = shelf.made.mixed_precision != "no" or shelf.dtype is not torch.float32
    return RunFacts(
        config, before, bare(structure.model).config.get_text_config().to_dict(), half=half, reads=loss.inputs.head,
        refers=loss.needs_reference, packed=plan.is_packed, head=plan.head,
    )  # fmt: skip


def refuse_damaged(config: Config, base: Path, made: Accelerator) -> None:
    """Raises UserError where what an earlier run saved, and this one goes on from, is no longer what was saved."""
    problem, optimizer = None, config.optim["init_from"]
    given = [("model.name_or_path", base), ("reference.name_or_path", config.reference.name_or_path),
             ("peft.init_from", config.peft.init_from if config.peft.name == "lora" else None),
             ("optim.init_from", Path(optimizer) / "state" if optimizer is not None else None)]  # fmt: skip
    try:
        if made.is_main_process:
            integrity.check_all(given, Path(config.cache_dir).expanduser())
    except UserError as error:
        problem = str(error)
    require_same_on_all_ranks(made, "start", "", problem)


def locate_base(config: Config) -> Path:
    """The directory of what is trained, or of what its adapter is put on."""
    assert config.model.name_or_path is not None, "the gate lets no run through without a model"
    return locate(config.model.name_or_path, config.model.revision, expanded(config.cache_dir))


def structure_of(config: Config, loss: LossSpec, machine: models.Machine, base: Path) -> Structure:
    """Raises UserError for a tokenizer, adapter or reference that does not go with the base, and for what is no model of ours."""
    tokenizer, new_tokens = load_tokenizer(base, add_tokens=config.model.add_tokens)
    if machine.is_main_process and isinstance(tokenizer.chat_template, dict) and len(tokenizer.chat_template) > 1:
        names = ", ".join(tokenizer.chat_template)
        log.warning("%s has several chat templates (%s): one is trained with, and saved", base, names)
    tokenizer.chat_template = chat_template(tokenizer, config.model.chat_template)
    vocabulary = Vocabulary.of(tokenizer, new_tokens)
    shelf = models.Shelf(config, base, tokenizer, vocabulary, end_of_turn(tokenizer), machine, requested_strategy())
    model = models.structure(shelf, reward=loss.inputs.head == "score")
    refuse_without_router(bare(model).config, config.train.router_aux_loss)
    named = models.named_reference(shelf) if loss.needs_reference else None
    limits = positions.limits(model)
    if named is not None:
        limits = positions.smaller(limits, positions.limits(models.structure_of_reference(shelf, named)))
    verdict = proof.of_copies(loss, shelf, model, named)
    return Structure(shelf, model, named, limits, positions.longest_allowed(limits, config.train.max_length), verdict)


@dataclass(frozen=True, slots=True)
class Driver:
    """Stands for the processes that will train, in one that trains nothing itself."""

    device: torch.device
    mixed_precision: str
    is_main_process: bool = True


def draw(config: Config, structure: Structure, loss: LossSpec, *, total: int, main: bool) -> Blueprint:
    """Raises UserError for an optimizer that does not go with the model, or with how it will be held."""
    optimizer, shelf = bind_optimizer(config.optim, config.plugins), structure.shelf
    refuse_unfit(structure.model, optimizer, more=VALUE_HEAD if loss.inputs.head == "value" else ())
    sizes = try_out(optimizer, shelf.made.device, shelf.engine.parameter_layout)
    return Blueprint(
        config=config, directory=RunDir(config.run_dir), base=structure.shelf.base, tokenizer=structure.tokenizer,
        vocabulary=structure.shelf.vocabulary, model=structure.model, reward=loss.inputs.head == "score", total_steps=total,
        max_length=structure.max_length, main=main, optimizer_bytes=state_bytes(structure.model, optimizer, sizes),
    )  # fmt: skip


def complaint(checkpoint: CheckpointHook, hooks: Iterable[Hook], blueprint: Blueprint) -> str | None:
    """What its saves, or the first of the hooks, have against it."""
    try:
        preflight.check(checkpoint, blueprint)
        for hook in hooks:
            hook.check(blueprint)
    except UserError as error:
        return str(error)
    return None


def hooks_of(config: Config, loss: LossSpec) -> tuple[CheckpointHook, dict[str, Hook]]:
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
