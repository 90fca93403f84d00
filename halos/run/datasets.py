"""The data of a run: tokenised once, by one process, and opened by all."""

from pathlib import Path

from accelerate import Accelerator
from transformers import PreTrainedTokenizerBase

from halos.config.bind import LossSpec
from halos.config.schema import Config
from halos.data.dataset import Dataset, open_dataset
from halos.data.order import GroupOrder, Order, partners
from halos.data.prepare import prepare
from halos.distributed.launch import agree
from halos.errors import UserError
from halos.trainers.deal import Split
from halos.types import (
    Comparison,
    Demonstration,
    Judgement,
    Labelled,
    Mismatched,
    Pair,
    PairScores,
    Rollouts,
    Scored,
    TokenLogps,
    ValuedRollouts,
)

KINDS: dict[type, type] = {
    TokenLogps: Demonstration, Pair: Comparison, PairScores: Comparison, Labelled: Judgement, Rollouts: Scored,
    ValuedRollouts: Scored,
}  # fmt: skip


def load(
    config: Config, loss: LossSpec, tokenizer: PreTrainedTokenizerBase, made: Accelerator, max_length: int
) -> tuple[Split, Split | None]:
    """Training and held-out rows. Raises UserError for every mistake in them, before any model loads."""
    train = _open(config, loss, tokenizer, made, max_length, "train")
    held_out = _open(config, loss, tokenizer, made, max_length, "eval") if config.data.eval else None
    return _split(train, loss, config.seed), _split(held_out, loss, config.seed) if held_out is not None else None


def _open(
    config: Config, loss: LossSpec, tokenizer: PreTrainedTokenizerBase, made: Accelerator, max_length: int, purpose: str
) -> Dataset:
    path, problem = None, None
    entries = config.data.train if purpose == "train" else config.data.eval
    with made.main_process_first():  # the others find what the first one has written
        try:
            path = prepare(
                entries,
                purpose=purpose,
                kind=loss.example_type or KINDS[loss.inputs],
                tokenizer=tokenizer,
                max_length=max_length,
                truncation=config.train.truncation,
                score=config.data.score,
                transform=loss.examples,
                transform_key=f"{loss.name} {loss.settings}" if loss.examples else "",
                cache_dir=Path(config.cache_dir).expanduser(),
            )
        except UserError as error:
            problem = str(error)
    agree(made, f"data.{purpose} (by its hash)", path.name if path else None, problem)
    assert path is not None
    return open_dataset(path)


def _split(rows: Dataset, loss: LossSpec, seed: int) -> Split:
    return Split(rows, partners(rows.groups, seed) if loss.statistics_inputs is Mismatched else None)


def order(rows: Dataset, loss: LossSpec, config: Config) -> Order | GroupOrder:
    if loss.on_rollouts:
        return GroupOrder(rows.groups, rows.weights, config.train.batch_size, config.seed)
    return Order(rows.sources, rows.weights, config.train.batch_size, config.seed)
