"""The datasets of a run: tokenised once, by rank 0, and opened by all ranks."""

from collections.abc import Iterable
from functools import partial

import numpy as np
from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedTokenizerBase

from halos.config.bind import LossSpec, learns_from_single
from halos.config.plugins import code_hash
from halos.config.reference_checks import reads_teacher_columns
from halos.config.schema import Config
from halos.confined import expanded
from halos.data import teacher
from halos.data.custom_format import entries_of
from halos.data.dataset import Dataset, open_dataset
from halos.data.held_out import Rule
from halos.data.mixture import Amount, per_epoch, refuse_unmixable
from halos.data.names import names_of
from halos.data.order import Epochs, GroupOrder, Mixture, Order, mismatched_partners
from halos.data.prepare import Making, prepare
from halos.data.sources import Source
from halos.distributed.agreement import require_same_on_all_ranks
from halos.distributed.turns import rank_0_first
from halos.errors import UserError
from halos.inspection import data_checks, template_checks
from halos.inspection.findings import Check
from halos.logps.model import bare
from halos.logps.vocabulary import Vocabulary
from halos.trainers.microbatches import Split
from halos.types import Labelled, Mismatched


def refuse_entries(config: Config) -> None:
    """Raises UserError for entries of data.train and data.eval that do not fit together, before anything is read."""
    train, held_out = ([Source.of(entry) for entry in entries_of(config.data, purpose)] for purpose in ("train", "eval"))
    refuse_unmixable(train, config.data.weights)
    names_of(train, "train")
    names_of([*held_out, *(train if config.data.eval_fraction is not None else [])], "eval")


def eval_sources(config: Config) -> list[str]:
    """Return the names of the sources that an evaluation measures apart: of several entries of data.eval, and of data.train where
    rows of it are held out."""
    entries = [*entries_of(config.data, "eval"), *(entries_of(config.data, "train") if config.data.eval_fraction else [])]
    return names_of([Source.of(entry) for entry in entries], "eval") if len(entries) > 1 else []


def load(
    config: Config, loss: LossSpec, tokenizer: PreTrainedTokenizerBase, accelerator: Accelerator, max_length: int
) -> tuple[Split, Split | None]:
    """Return training and evaluation data. Raises UserError for every mistake in them, before any model loads."""
    train = _open(config, loss, tokenizer, accelerator, max_length, "train")
    held_out = load_eval(config, loss, tokenizer, accelerator, max_length)
    return split_of(train, loss, config.seed, "train"), held_out


def load_eval(
    config: Config, loss: LossSpec, tokenizer: PreTrainedTokenizerBase, accelerator: Accelerator, max_length: int
) -> Split | None:
    """Return the evaluation data, as `load` does."""
    if not config.data.has_eval:
        return None
    return split_of(_open(config, loss, tokenizer, accelerator, max_length, "eval"), loss, config.seed, "eval")


def making(config: Config, loss: LossSpec, tokenizer: PreTrainedTokenizerBase, max_length: int, purpose: str) -> Making:
    """Return how a run makes items of rows."""
    return Making(
        loss.example_type or loss.inputs.example, tokenizer, max_length, config.train.truncation, config.data.score,
        config.data.lost, purpose, loss.examples,
        f"{loss.name} {loss.settings} {code_hash(config.loss['_target_'])}" if loss.examples else "",
        config.train.temperature if loss.candidates else None,
    )  # fmt: skip


def _open(
    config: Config, loss: LossSpec, tokenizer: PreTrainedTokenizerBase, accelerator: Accelerator, max_length: int, purpose: str
) -> Dataset:
    path, problem = None, None
    entries, fraction = entries_of(config.data, purpose), config.data.eval_fraction
    with rank_0_first():  # the other ranks read what rank 0 has written
        try:
            path = prepare(
                entries,
                purpose=purpose,
                kind=loss.example_type or loss.inputs.example,
                tokenizer=tokenizer,
                max_length=max_length,
                truncation=config.train.truncation,
                score=config.data.score,
                lost=config.data.lost,
                transform=loss.examples,
                transform_key=f"{loss.name} {loss.settings} {code_hash(config.loss['_target_'])}" if loss.examples else "",
                temperature=config.train.temperature if loss.candidates else None,
                cache_dir=expanded(config.cache_dir),
                rule=None if fraction is None else Rule(fraction, config.data.near_duplicates),
                train=() if fraction is None or purpose == "train" else entries_of(config.data, "train"),
            )
        except UserError as error:
            problem = str(error)
    require_same_on_all_ranks(accelerator, f"data.{purpose} (by its hash)", path.name if path else None, problem)
    assert path is not None
    return open_dataset(path)


def split_of(rows: Dataset, loss: LossSpec, seed: int, purpose: str) -> Split:
    """Raises UserError if a loss compares completions of one prompt, and every prompt has only one; and for rewards that a loss
    cannot take."""
    if purpose == "train" and loss.on_rollouts and len(np.unique(rows.groups)) == len(rows) and not learns_from_single(loss):
        raise UserError(
            f"{loss.name} compares completions of one prompt, and each of the {len(rows)} prompts of data.train has one: nothing"
            " would be learnt. Provide several for each prompt, or use a loss for single ones, such as ppo"
        )
    if loss.check_rewards is not None and (complaint := loss.check_rewards(rows.labels["reward"])) is not None:
        raise UserError(f"data.{purpose}: {complaint}")
    context = f"data.{purpose}: {loss.name}"
    return Split(rows, mismatched_partners(rows.groups, seed, what=context) if loss.statistics_inputs is Mismatched else None)


def refuse_other_teacher(config: Config, loss: LossSpec, splits: Iterable[tuple[str, Split]]) -> None:
    """Raises UserError for a loss on what a teacher says where rows lack it and no teacher is named, or where both say it."""
    if not loss.candidates:
        return
    for name, rows in [(name, split.rows) for name, split in splits if isinstance(split.rows, Dataset)]:
        if reads_teacher_columns(config, loss) and not rows.has_teacher.all():
            lacking = rows.place(int(np.argmin(rows.has_teacher)))
            raise UserError(
                f"loss={loss.name} learns from a teacher, and there is none: reference.name_or_path, a directory or a hub id; or"
                f" rows with {teacher.IDS} and {teacher.LOGPS}, which {(~rows.has_teacher).sum()} of {len(rows)} rows of"
                f" data.{name} lack, such as {lacking}"
            )
        if not reads_teacher_columns(config, loss) and rows.has_teacher.any():
            raise UserError(
                f"reference.name_or_path={config.reference.name_or_path} is a teacher, and {rows.has_teacher.sum()} rows of"
                f" data.{name} have what another says ({teacher.IDS}): leave out reference.name_or_path, or the columns:"
                f" 'data.columns={{{teacher.IDS}: null, {teacher.LOGPS}: null}}'"
            )


def refuse_unknown_ids(known: int, splits: Iterable[tuple[str, Split]]) -> None:
    """Raises UserError for a row with a token id for which the policy has no embedding: it has `known`."""
    for name, rows in [(name, split.rows) for name, split in splits if isinstance(split.rows, Dataset)]:
        if rows.largest_id >= known:
            largest = (max(int(ids.max(initial=-1)) for ids in (item.prompt, *(each.ids for each in item.completions)))
                       for item in rows)  # fmt: skip
            row, unknown = next((row, each) for row, each in enumerate(largest) if each >= known)
            raise UserError(
                f"data.{name}: {rows.place(row)} has the token id {unknown}, and the policy knows {known} ids: its sampled tokens"
                " (output_ids) are another model's; without them its text is tokenised"
            )


def frozen_tokens(splits: Iterable[tuple[str, Split]], policy: nn.Module, vocabulary: Vocabulary,
                  tokenizer: PreTrainedTokenizerBase) -> Check:  # fmt: skip
    """Check that no scored token is one that was added whose row of the policy's head stays as it is."""
    head = bare(policy).get_output_embeddings()
    trained = head is None or any(parameter.requires_grad for parameter in head.parameters())
    data = [("eval" if name == "held out" else name, split.rows) for name, split in splits if isinstance(split.rows, Dataset)]
    return data_checks.of_frozen_tokens(data, () if trained else vocabulary.new, tokenizer)


def single_completions(rows: Dataset, loss: LossSpec) -> str | None:
    """Return a line about prompts with one completion, from which a loss that compares several learns nothing; None without."""
    if not loss.on_rollouts or learns_from_single(loss):
        return None
    _, sizes = np.unique(rows.groups, return_counts=True)
    count = int((sizes == 1).sum())
    return f"{count} of {len(sizes)} prompts have one completion: {loss.name} learns nothing from it" if count else None


def unavailable_metrics(config: Config, loss: LossSpec, eval_data: Split | None) -> frozenset[str]:
    """Return metrics that evaluation data with a single label cannot yield. Raises UserError if the run depends on one."""
    if eval_data is None or loss.inputs is not Labelled or not isinstance(eval_data.rows, Dataset):
        return frozenset()
    rows = eval_data.rows
    parts = [("", rows.labels["desirable"], "data.eval")]
    if len(rows.names) > 1:
        parts += [(f"{name}/", rows.labels["desirable"][rows.sources == number], f"{name} in data.eval")
                  for number, name in enumerate(rows.names)]  # fmt: skip
    lacking = dict[str, str]()  # metric -> which rows have one label
    for prefix, labels, where in parts:
        absent, kind = ("rejected", "desirable") if labels.any() else ("chosen", "undesirable")
        if len(labels) and not 0 < labels.mean() < 1:
            names = ("rewards/margins", f"rewards/{absent}", f"logps/{absent}")
            lacking |= {f"{prefix}{name}": f"{where} are {kind}" for name in names}
    metric = config.objective.metric
    watchers = {"train.early_stopping": config.train.early_stopping, "checkpoint.keep_best": config.checkpoint.get("keep_best")}
    watching = [f"{key}={value}" for key, value in watchers.items() if value]
    if metric in lacking and watching:
        raise UserError(
            f"{watching[0]} watches {metric}, which needs both labels, and all rows of {lacking[metric]}: evaluate on both, or"
            " watch another metric, objective.metric=loss objective.mode=min"
        )
    return frozenset(lacking)


def checks(
    train: Split, eval_data: Split | None, loss: LossSpec, tokenizer: PreTrainedTokenizerBase, temperature: float
) -> tuple[Check, ...]:
    """Check what the rows and the chat template would teach."""
    assert isinstance(train.rows, Dataset)
    held_out = eval_data.rows if eval_data and isinstance(eval_data.rows, Dataset) else None
    return (
        *data_checks.checks_of(
            train.rows, held_out, tokenizer, reward=loss.reward, on_rollouts=loss.on_rollouts, temperature=temperature
        ),
        *template_checks.checks_of(tokenizer),
    )


def order(rows: Dataset, loss: LossSpec, config: Config) -> Epochs | GroupOrder:
    """Return the order of training. Raises UserError for amounts of sources that leave one of them out."""
    size, seed, share_out = config.train.batch_size, config.seed, None
    if config.data.weights == "share" and any(amount != Amount() for amount in rows.amounts):
        share_out = partial(per_epoch, amounts=rows.amounts, names=rows.names)
    if loss.on_rollouts:
        weights = rows.weights if share_out is None else ()
        return GroupOrder(rows.groups, weights, size, seed, sources=rows.sources, share_out=share_out)
    return Order(rows.sources, rows.weights, size, seed) if share_out is None else Mixture(rows.sources, share_out, size, seed)


def mixture_lines(rows: Dataset, order: Epochs | GroupOrder, total: int) -> list[str]:
    """Return how much of an epoch comes from each source, and how often a run of so many steps passes over it; nothing where all
    of one source comes once."""
    if len(order.sizes) == 1 and order.per_epoch == order.sizes:
        return []
    unit, whole = "prompts" if isinstance(order, GroupOrder) else "examples", sum(order.per_epoch)
    facts = zip(rows.names, order.sizes, order.per_epoch, order.draws(total), strict=True)
    return [
        f"{name}: {drawn} of an epoch's {whole} {unit} ({drawn / whole:.1%}), {drawn / size:.3g} passes over its {size};"
        f" {in_run / size:.3g} in {total} steps"
        for name, size, drawn, in_run in facts
    ]
