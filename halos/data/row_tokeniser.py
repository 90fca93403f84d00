"""From rows to token ids: parse, convert to what the loss takes, render, tokenise; and count what becomes of each row."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from itertools import islice
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from halos.data import oddities
from halos.data.dataset import Counts
from halos.data.formats import as_kind, parse
from halos.data.oddities import EndTokens, Sampling
from halos.data.remarks import Remarks
from halos.data.row import EQUAL, HELD_OUT, LEFT_OUT, Row, depth_limited
from halos.data.tokenize import Encoder
from halos.examples import Demonstration, Example, Item, Judgement, Scored

BATCH = 1000  # examples tokenised in one call
IMITATED = "with a reward, which is not read: all are imitated (data.filter='reward > 0' leaves some out)"
UNDESIRABLE = "undesirable, not to be imitated"
NOT_IMITATED = "masked or empty, not to be imitated"
_NOTHING_TO_LEARN: dict[type[Example], str] = {Judgement: UNDESIRABLE, Scored: NOT_IMITATED}  # of other examples: pairs


class Outcome(NamedTuple):
    """What becomes of one example."""

    where: str  # its row
    id: str
    result: tuple[Item, Remarks] | str  # or why it is dropped, which is not counted yet


NamedExample = tuple[Example, str, str]  # the example, the position of its row, and its id


class RowTokeniser:
    """Makes items of rows, by settings that are the same for all of them. It can be sent to another process.

    The one item of a row has the id `a.jsonl:12#0`; several, the halves of a pair, are numbered from 1.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        kind: type[Example],
        score: str,
        max_length: int,
        truncation: str,
        lost: str = "error",
        transform: Callable[[Any], Example] | None = None,
        temperature: float | None = None,
    ) -> None:
        self.tokenizer, self.kind, self.transform = tokenizer, kind, transform
        self._settings: dict[str, Any] = {"score": score, "max_length": max_length, "truncation": truncation, "lost": lost,
                                          "temperature": temperature}  # fmt: skip

    def __reduce__(self) -> tuple[Any, ...]:
        return _again, (self.tokenizer, {"kind": self.kind, "transform": self.transform, **self._settings})

    @cached_property
    def _encoder(self) -> Encoder:
        return Encoder(self.tokenizer, **{name: value for name, value in self._settings.items() if name != "score"})

    @cached_property
    def _ends(self) -> EndTokens:
        return EndTokens.of(self.tokenizer, self._settings["max_length"])

    def batches(self, rows: Iterable[Row], counts: Counts) -> Iterator[tuple[type[Example], list[Outcome]]]:
        """Yield what becomes of the examples of rows, some at a time, and their type. Raises UserError, naming the row."""
        examples = self._examples(rows, counts)
        while batch := list(islice(examples, BATCH)):
            yield type(batch[0][0]), self._outcomes(batch, counts)

    def _examples(self, rows: Iterable[Row], counts: Counts) -> Iterator[NamedExample]:
        for row in rows:
            counts.rows += 1
            if row.note and (not row.left_out or row.note.startswith(HELD_OUT)):
                counts.read_as((row.note,))
            if row.left_out and row.note.startswith(HELD_OUT):
                continue
            if row.left_out:
                counts.examples += 1
                counts.drop(row.note or LEFT_OUT, row.where)
                continue
            with depth_limited(row.where):
                parsed = parse(row, score=self._settings["score"])
            counts.read_as(parsed.notes)
            if (example := parsed.example) is None:
                counts.examples += 1
                counts.drop(parsed.dropped, row.where)
                continue
            oddities.count_split(row.original or row.record, counts)
            for oddity in (*parsed.oddities, *oddities.of_example(example)):
                counts.note(oddity, row.where)
            converted = as_kind(example, self.kind, row)
            if not converted:
                counts.examples += 1
                counts.drop(_NOTHING_TO_LEARN.get(type(example), EQUAL), row.where)
            elif isinstance(example, Scored) and isinstance(converted[0], Demonstration):
                counts.read_as((IMITATED,))
            for number, each in enumerate(converted, int(len(converted) > 1)):
                counts.examples += 1
                yield self.transform(each) if self.transform else each, row.where, f"{row.where}#{number}"

    def _outcomes(self, batch: Sequence[NamedExample], counts: Counts) -> list[Outcome]:
        outcomes, encoded_batch = [], self._encoder.encode_turns([(each, where) for each, where, _ in batch])
        for parts, (example, where, name) in zip(encoded_batch, batch, strict=True):
            counts.examples += len(parts) - 1
            for number, encoded in enumerate(parts):
                own = f"{name}.{number}" if len(parts) > 1 else name
                if isinstance(encoded, str):
                    outcomes.append(Outcome(where, own, encoded))
                    continue
                sampling = Sampling.of(example)
                temperature = example.temperature if isinstance(example, Scored) else None
                remarks = Remarks.of(encoded, self._ends.missing(encoded, sampling), sampling, temperature)
                item = Item(encoded.prompt, encoded.completions, own, example.numbers(), encoded.logps, encoded.step_labels,
                            encoded.teacher_logps)  # fmt: skip
                outcomes.append(Outcome(where, own, (item, remarks)))
        return outcomes


def _again(tokenizer: PreTrainedTokenizerBase, settings: dict[str, Any]) -> RowTokeniser:
    return RowTokeniser(tokenizer, **settings)
