"""Prepare a run up to loading its weights: every check that needs no weights, in one order, for runs and dry runs alike."""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
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
from halos.config.reference_checks import has_reference
from halos.config.resume_policy import Change
from halos.config.schema import Config
from halos.confined import expanded
from halos.data.template import template_of_run
from halos.data.tokenize import end_of_turn
from halos.distributed.agreement import from_rank_0, require_same_on_all_ranks
from halos.distributed.strategies import requested_strategy
from halos.distributed.strategy import Strategy
from halos.distributed.turns import rank_0_first
from halos.errors import UserError
from halos.hooks.alarms import Alarms
from halos.hooks.base import Hook, PlannedRun, can_measure
from halos.hooks.checkpoint import CheckpointHook
from halos.hooks.early_stopping import EarlyStopping
from halos.hooks.entropy import EntropyCoefficient
from halos.hooks.kl import KLCoefficient
from halos.hooks.log import MetricsLog
from halos.hooks.loss_state import LOSS_STATE, LossState
from halos.hooks.progress import ProgressBar
from halos.lock import RunLock
from halos.logps.model import bare
from halos.logps.router import refuse_without_router
from halos.logps.vocabulary import Vocabulary, table
from halos.models import positions
from halos.models.load import keep_marks_special, load_tokenizer
from halos.models.locate import locate
from halos.online import live
from halos.prove.verdict import Verdict
from halos.run import datasets, input_hashes, models, proof, step_checks
from halos.run.available_metrics import refuse_failing_loss, refuse_padded_loss, refuse_unavailable_objective
from halos.run.batch_source import BatchSource
from halos.run.batches import open_batch_source
from halos.run.initial_adapter import refuse_mismatched_adapter
from halos.run.optimizer import refuse_unfit, state_bytes
from halos.run.optimizer_trial import try_out
from halos.run.stream_source import STREAM, StreamPosition
from halos.rundir import RunDir
from halos.trainers.base import Parts, Trainer

log = logging.getLogger(__name__)

VALUE_HEAD = ("value_head.weight", "value_head.bias")  # parameters of a policy with a value head

REPLACEABLE = ("progress", "early_stopping", "alarms")  # names of built-in hooks that a hook of the user's may have


@dataclass(frozen=True, slots=True)
class Structure:
    """The model of a run without weights: the base's files, the tokenizer, the model on the meta device."""

    loader: models.ModelLoader
    model: nn.Module  # with its adapter
    reference: Path | None  # the directory of the configured reference model
    limits: positions.Limits
    max_length: int  # tokens of a sequence
    verdict: Verdict  # of the proof of the forward pass

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.loader.tokenizer


@dataclass(frozen=True, slots=True)
class PreparedRun:
    """A run that has passed every check that needs no weights."""

    config: Config
    loss: LossSpec
    trainer: Callable[[Parts], Trainer]
    directory: RunDir
    structure: Structure
    strategy: Strategy
    batches: BatchSource
    optimizer: OptimizerSpec
    schedule: ScheduleSpec
    checkpoint: CheckpointHook
    hooks: Mapping[str, Hook]
    planned: PlannedRun
    content: ContentHashes | None  # of the run's inputs; on rank 0
    changed: Sequence[Change]  # inputs that differ from the last start's


def prepare(config: Config, accelerator: Accelerator, lock: RunLock | None) -> PreparedRun:
    """Check everything that needs no weights. Raises UserError; writes nothing but caches."""
    datasets.refuse_entries(config)
    loss = bind_loss(config.loss, config.plugins)
    trainer = bind_trainer(config.trainer, loss, config.plugins)
    trained = config.model.dtype if config.peft.name == "none" else "float32"  # an adapter is float32
    requested_strategy().refuse_settings(max_grad_norm=config.train.max_grad_norm, trained=trained)
    checkpoint, hooks = hooks_of(config, loss)
    if config.trainer["_target_"] is None:
        measuring = [name for name, hook in hooks.items() if can_measure(hook)]
        refuse_failing_loss(loss)
        refuse_unavailable_objective(config, loss, measuring)
        refuse_padded_loss(loss)
        if measuring and not config.data.has_eval and accelerator.is_main_process:
            log.warning("without data.eval there is no evaluation: on_eval of hooks.%s is not called", ", hooks.".join(measuring))
    directory = RunDir(config.run_dir)
    if accelerator.is_main_process:
        if lock:
            lock.refuse_held(wait=bool(config.resume))
        directory.require_run() if config.resume else directory.refuse_occupied(overwrite=config.overwrite)
    with rank_0_first():
        base = locate_base(config)
    refuse_damaged_inputs(config, base, accelerator)
    day = from_rank_0(accelerator, lambda: run_config.day_of(config, directory.read_attempts() if config.resume else {}))
    structure = structure_of(config, loss, accelerator, base, day)
    strategy = structure.loader.strategy(accelerator)
    strategy.refuse_model(structure.model)
    step_checks.refuse_unfit(config.train, structure.model, strategy, accelerator)
    batches = open_batch_source(config, loss, structure.tokenizer, accelerator, structure.max_length, day)
    datasets.refuse_other_teacher(config, loss, batches.splits)
    known = len(table(bare(structure.model).get_input_embeddings()))
    batches.known_ids = max(known, len(structure.tokenizer))
    datasets.refuse_unknown_ids(batches.known_ids, batches.splits)
    vocabulary = structure.loader.vocabulary
    batches.checks += (datasets.frozen_tokens(batches.splits, structure.model, vocabulary, structure.tokenizer),)
    optimizer, schedule = bind_optimizer(config.optim, config.plugins), bind_schedule(config.schedule, config.plugins)
    schedule.check_range(batches.total)
    planned = plan_run(config, structure, loss, total=batches.total, main=accelerator.is_main_process)
    require_same_on_all_ranks(accelerator, "hooks", ", ".join(hooks), problem_with_hooks(checkpoint, hooks.values(), planned))
    content, changed = hash_inputs(config, loss, structure, batches, accelerator)
    return PreparedRun(
        config, loss, trainer, directory, structure, strategy, batches, optimizer, schedule, checkpoint, hooks, planned, content,
        changed,
    )  # fmt: skip


def hash_inputs(
    config: Config, loss: LossSpec, structure: Structure, batches: BatchSource, accelerator: Accelerator
) -> tuple[ContentHashes | None, Sequence[Change]]:
    """Hash the run's inputs, and compare them with the last start's. Raises UserError for changes that are not allowed."""
    content, changed, code, problem = None, list[Change](), "", None
    try:
        code = "\n".join(f"{key} {value}" for key, value in input_hashes.code(config).items())
        if accelerator.is_main_process:
            base, reference = structure.loader.base, structure.reference
            refuse_mismatched_adapter(config, base, structure.tokenizer)
            content = input_hashes.read(config, structure.tokenizer, batches.content_hashes(), base=base, reference=reference)
            if config.resume:
                changed = input_hashes.changed(config, run_facts(config, loss, structure), content, batches.tokens_until)
    except UserError as error:
        problem = str(error)
    require_same_on_all_ranks(accelerator, "code of yours (by its hash)", code, problem)
    return content, changed


def run_facts(config: Config, loss: LossSpec, structure: Structure) -> RunFacts:
    """Return the facts that decide which versions of the arithmetic affect this run."""
    plan, loader, directory = structure.verdict.plan, structure.loader, RunDir(config.run_dir)
    before = run_config.load(directory.read_config(), directory.read_attempts(), str(directory.path)) if config.resume else {}
    half = loader.machine.mixed_precision != "no" or loader.dtype is not torch.float32
    return RunFacts(
        config, before, bare(structure.model).config.get_text_config().to_dict(), half=half, reads=loss.inputs.head,
        refers=loss.needs_reference, packed=plan.is_packed, head=plan.head,
        device=loader.machine.device.type,
    )  # fmt: skip


def refuse_damaged_inputs(config: Config, base: Path, accelerator: Accelerator) -> None:
    """Raises UserError if files that an earlier run has saved, and this one starts from, have changed since."""
    problem, optimizer = None, config.optim["init_from"]
    inputs = [("model.name_or_path", base), ("reference.name_or_path", config.reference.name_or_path),
             ("peft.init_from", config.peft.init_from if config.peft.name == "lora" else None),
             ("optim.init_from", Path(optimizer) / "state" if optimizer is not None else None)]  # fmt: skip
    try:
        if accelerator.is_main_process:
            integrity.check_all(inputs, Path(config.cache_dir).expanduser())
    except UserError as error:
        problem = str(error)
    require_same_on_all_ranks(accelerator, "start", "", problem)


def locate_base(config: Config) -> Path:
    """Return the directory of the model to train, or of the base of its adapter."""
    assert config.model.name_or_path is not None, "the config's validation lets no run through without a model"
    return locate(config.model.name_or_path, config.model.revision, expanded(config.cache_dir))


def structure_of(config: Config, loss: LossSpec, machine: models.Machine, base: Path, day: date) -> Structure:
    """Load tokenizer and models without weights, and prove the forward pass; a chat template that writes a date writes `day`.
    Raises UserError for an unsupported model, and for a tokenizer, adapter or reference that does not fit the base."""
    tokenizer, new_tokens = load_tokenizer(base, add_tokens=config.model.add_tokens)
    if machine.is_main_process and isinstance(tokenizer.chat_template, dict) and len(tokenizer.chat_template) > 1:
        names = ", ".join(tokenizer.chat_template)
        log.warning("%s has several chat templates (%s): one of them is used, and saved", base, names)
    tokenizer.chat_template = template_of_run(
        tokenizer, config.model.chat_template, config.data.chat_template_kwargs, config.data.system, day
    )
    keep_marks_special(tokenizer, new_tokens)
    vocabulary = Vocabulary.of(tokenizer, new_tokens)
    loader = models.ModelLoader(config, base, tokenizer, vocabulary, end_of_turn(tokenizer), machine, requested_strategy())
    model = models.policy_structure(loader, reward=loss.reward)
    refuse_without_router(bare(model).config, config.train.router_aux_loss)
    reference = models.locate_reference(loader) if has_reference(config, loss) else None
    limits = positions.limits(model)
    if reference is not None:
        other = models.reference_structure(loader, reference)
        limits = positions.smaller(limits, positions.limits(other))
        if config.reference.sync_every is not None:
            models.refuse_other_shape(model, other)
    if loss.candidates > (known := bare(model).config.get_text_config().vocab_size):
        raise UserError(f"loss.top_k={loss.candidates} is more than the {known} ids of the policy's vocabulary: at most as many")
    verdict = proof.prove_copies(loss, loader, model, reference)
    return Structure(loader, model, reference, limits, positions.longest_allowed(limits, config.train.max_length), verdict)


@dataclass(frozen=True, slots=True)
class DriverMachine:
    """A `Machine` for a process that checks models but does not train."""

    device: torch.device
    mixed_precision: str
    is_main_process: bool = True


def plan_run(config: Config, structure: Structure, loss: LossSpec, *, total: int, main: bool) -> PlannedRun:
    """Raises UserError for an optimizer that does not fit the model, or the strategy."""
    optimizer, loader = bind_optimizer(config.optim, config.plugins), structure.loader
    refuse_unfit(structure.model, optimizer, more=VALUE_HEAD if loss.inputs.head == "value" else ())
    sizes = try_out(optimizer, loader.machine.device, loader.strategy.parameter_layout)
    return PlannedRun(
        config=config, directory=RunDir(config.run_dir), base=structure.loader.base, tokenizer=structure.tokenizer,
        vocabulary=structure.loader.vocabulary, model=structure.model, reward=loss.reward, total_steps=total,
        max_length=structure.max_length, main=main, optimizer_bytes=state_bytes(structure.model, optimizer, sizes),
    )  # fmt: skip


def problem_with_hooks(checkpoint: CheckpointHook, hooks: Iterable[Hook], planned: PlannedRun) -> str | None:
    """Return the first problem that the checkpoint policy or a hook has with the run; None if there is none."""
    try:
        preflight.check(checkpoint, planned)
        for hook in hooks:
            hook.check(planned)
    except UserError as error:
        return str(error)
    return None


def hooks_of(config: Config, loss: LossSpec) -> tuple[CheckpointHook, dict[str, Hook]]:
    """Return the checkpoint hook, and all hooks by name in order: it first, then built-in ones, then the config's."""
    checkpoint = bind_hook("checkpoint", config.checkpoint, config.plugins)()
    if not isinstance(checkpoint, CheckpointHook):
        raise UserError(f"checkpoint._target_={config.checkpoint['_target_']} is no CheckpointHook")
    hooks: dict[str, Hook] = {"checkpoint": checkpoint, "metrics": MetricsLog(), "progress": ProgressBar()}
    if config.train.early_stopping is not None:
        hooks["early_stopping"] = EarlyStopping(patience=config.train.early_stopping)
    if config.train.alarms != "off":
        hooks["alarms"] = Alarms(act="stop" if config.train.alarms == "stop" else "warn")
    if loss.adapt is not None:
        hooks["kl_coefficient"] = KLCoefficient(loss.settings["kl_coefficient"])
    if loss.start is not None and loss.update is not None:
        if LOSS_STATE in config.hooks:
            raise UserError(f"hooks.{LOSS_STATE} is the name of the hook that holds the state of {loss.name}: choose another")
        hooks[LOSS_STATE] = LossState(loss.name, loss.start, loss.update)
    if config.data.stream:
        if STREAM in config.hooks:
            raise UserError(f"hooks.{STREAM} is the name of the hook that holds the position in the stream: choose another")
        hooks[STREAM] = StreamPosition()
    if loss.adapt_entropy is not None and loss.settings.get("entropy_target") is not None:
        hooks["entropy_coefficient"] = EntropyCoefficient(loss.settings["entropy_coefficient"])
    needed = {*hooks, *live.HOOKS} - {*REPLACEABLE}
    if taken := [name for name in config.hooks if name in needed]:
        own = "a policy of yours is checkpoint._target_" if taken[0] == "checkpoint" else "choose another"
        raise UserError(f"hooks.{taken[0]} is the name of a hook without which the run would not be whole: {own}")
    return checkpoint, hooks | {name: bind_hook(f"hooks.{name}", node, config.plugins)() for name, node in config.hooks.items()}
