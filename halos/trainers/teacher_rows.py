"""Rows with what a teacher says of them, from the cache of a run: on another machine they train without the teacher."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from halos.config.schema import Config
from halos.confined import expanded
from halos.data.custom_format import entries_of
from halos.data.dataset import Dataset
from halos.data.encoded import Encoded
from halos.data.formats import as_kind, parse
from halos.data.row import Row
from halos.data.sources import Source, open_source
from halos.data.teacher import IDS, LOGPS, ROW, TEMPERATURE, TOKEN_LOGPS, VOCABULARY
from halos.data.tokenize import Encoder, vocabulary_of
from halos.errors import UserError
from halos.examples import TEXT, Demonstration, Item, row_hash
from halos.trainers.microbatches import Split
from halos.trainers.reference import ReferenceLogps

log = logging.getLogger(__name__)

CUT, WRITTEN = "as it is trained on, a row of its own cannot be written of it: it was cut, or is one of several turns", "written"


def export(config: Config, tokenizer: PreTrainedTokenizerBase, splits: Mapping[str, Split], known: ReferenceLogps) -> None:
    """Write train.jsonl and eval.jsonl into reference.export. Raises UserError where they cannot be written."""
    directory = expanded(str(config.reference.export))
    for name, split in splits.items():
        assert isinstance(split.rows, Dataset), "reference.export is refused for rows that are not on the disk"
        counts, file = Counter[str](), directory / f"{name}.jsonl"
        hidden = file.with_name(f".{file.name}")
        try:
            directory.mkdir(parents=True, exist_ok=True)
            with hidden.open("w", encoding="utf-8") as lines:
                for record in _records(config, tokenizer, name, split.rows, known, counts):
                    lines.write(json.dumps(record, ensure_ascii=False) + "\n")
            hidden.rename(file)
        except OSError as error:
            raise UserError(f"reference.export={config.reference.export}: {file} cannot be written: {error.strerror}") from error
        of = f"{counts[WRITTEN]} of {len(split.rows)} rows with what the teacher says of them"
        log.info("%-10s %s: %s%s", "exported", of, file, f"; {counts[CUT]} left out ({CUT})" if counts[CUT] else "")


def _records(
    config: Config, tokenizer: PreTrainedTokenizerBase, name: str, rows: Dataset, known: ReferenceLogps, counts: Counter[str]
) -> Iterator[dict[str, Any]]:
    """The rows of a data set in the order of their files, each item once, written as a prompt and a completion."""
    items = {rows[number].id: number for number in range(len(rows))}
    encoder = Encoder(tokenizer, max_length=2**31, truncation="error", lost=config.data.lost)
    vocabulary, num_ids = vocabulary_of(tokenizer), len(tokenizer)
    for row, example in _demonstrations(config, name):
        if (number := items.pop(f"{row.where}#0", None)) is None:
            continue
        item, record = rows[number], _written(example)
        (again,) = encoder.encode([(_read(record, row.where), row.where)])
        if not isinstance(again, Encoded) or row_hash((again.prompt, again.completions[0])) != _hash(item):
            counts[CUT] += 1
            continue
        counts[WRITTEN] += 1
        columns = _columns(known.find((item.prompt, item.completions[0])), num_ids)
        of = {VOCABULARY: vocabulary, ROW: _hash(item).hex(), TEMPERATURE: config.train.temperature}
        yield {**record, **columns, **of}
    counts[CUT] += len(items)


def _demonstrations(config: Config, name: str) -> Iterator[tuple[Row, Demonstration]]:
    """The rows that the items of a split are of; where rows of data.train are held out, of these too."""
    entries = entries_of(config.data, name)
    entries += entries_of(config.data, "train") if name == "eval" and config.data.eval_fraction is not None else []
    for entry in entries:
        for row in open_source(Source.of(entry), Demonstration, name).rows():
            example = None if row.left_out else parse(row, score=config.data.score).example
            if example is not None:
                yield from ((row, each) for each in as_kind(example, Demonstration, row) if isinstance(each, Demonstration))


def _written(example: Demonstration) -> dict[str, Any]:
    if len(example.completion) == 1 and example.completion[0]["role"] == TEXT:
        return {"text": example.completion[0]["content"]}
    return {"prompt": [*example.prompt], "completion": [*example.completion]}


def _read(record: Mapping[str, Any], where: str) -> Demonstration:
    example = parse(Row(dict(record), where), score="last").example
    assert isinstance(example, Demonstration), "that is how it was written"
    return example


def _hash(item: Item) -> bytes:
    return row_hash((item.prompt, item.completions[0]))


def _columns(table: np.ndarray, num_ids: int) -> dict[str, Any]:
    """The columns of (scored, 1 + 2 k): without ids that are in no text, with which a model's vocabulary may be padded."""
    width = table.shape[1] // 2
    logps, ids = np.minimum(table[:, : 1 + width], 0.0), table[:, 1 + width :].astype(np.int64)
    kept = ids < num_ids
    lists = [[float(f"{each:.9g}") for each in some[keep]] for some, keep in zip(logps[:, 1:], kept, strict=True)]
    return {
        IDS: [some[keep].tolist() for some, keep in zip(ids, kept, strict=True)],
        LOGPS: lists,
        TOKEN_LOGPS: [float(f"{each:.9g}") for each in logps[:, 0]],
    }
