"""Settings that contradict data.stream: rows that are read while training runs, of which nobody knows the number."""

from __future__ import annotations

from collections.abc import Sequence

from halos.config.overrides import typed_keys
from halos.config.schema import Config

AMOUNTS = ("weight", "count", "epochs")  # of an entry of data.train


def complaint(config: Config, overrides: Sequence[str]) -> str | None:
    """Return the first contradiction."""
    data, batch = config.data, config.train.batch_size
    entries = [entry for entry in data.train or [] if isinstance(entry, dict)]
    if any("stream" in entry for entry in entries):
        return "data.train: stream is no key of an entry, since all of them are read as one stream: data.stream=true"
    if not data.stream:
        typed = "data.stream_block" in typed_keys(overrides) and config.resume is None
        return f"data.stream_block={data.stream_block} has no effect without data.stream=true: leave it out" if typed else None
    if config.online is not None:
        return "data.stream is of losses on a data set, and loss=online reads all prompts at its start: leave it out"
    if config.train.steps is None:
        return (
            "data.stream: how many rows there are is not known before all of them were read, so train.epochs is no length: give"
            " the number of steps, for example train.steps=1000"
        )
    if data.eval_fraction is not None:
        return (
            f"data.eval_fraction={data.eval_fraction:g} needs all rows before the first step, and data.stream reads them while it"
            " trains: give rows for evaluation in data.eval"
        )
    if given := next((f"{name}={entry[name]}" for entry in entries for name in AMOUNTS if entry.get(name) is not None), None):
        return (
            f"data.train: {given} is a part of an epoch, whose rows data.stream does not know: leave it out; rows that are to be"
            " mixed must be mixed in the files"
        )
    if data.stream_block < batch:
        return f"data.stream_block={data.stream_block} rows are no batch of train.batch_size={batch}: give {batch} or more"
    if config.reference.cache == "always":
        return "reference.cache=always reads all rows before the first step, and data.stream while it trains: leave it out"
    return None
