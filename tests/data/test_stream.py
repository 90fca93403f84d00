"""Streams: the order of their batches is a pure function, any position leads to the same ones, and little is on the disk."""

import gzip
import json
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import numpy as np
import pytest

from halos.data import shards, stream_blocks
from halos.data.order import block_order, mismatched_partners
from halos.data.prepare import Making
from halos.data.prune import is_held
from halos.data.row import End, Row
from halos.data.sampled import PART, PARTS, sampled_hash
from halos.data.sources import OpenSource, Source, open_source
from halos.data.stored import stored
from halos.data.stream import SPAN, Position, StreamOrder, StreamPartners, StreamRows
from halos.data.stream_blocks import Blocks
from halos.data.stream_rows import START, StreamReader
from halos.errors import UserError
from halos.types import Comparison

from . import tokenizers

TOKENIZER = tokenizers.tokenizer()


def jsonl(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    return Path(tokenizers.jsonl(path, rows))


def pairs(count: int, first: int = 0) -> list[dict[str, Any]]:
    return [{"prompt": f"What is {n}?", "chosen": f"one {n}", "rejected": "two", "n": n} for n in range(first, first + count)]


class Stream:
    """A stream of entries, in blocks of 10 rows and batches of 4."""

    def __init__(
        self, entries: Sequence[Any], cache: Path, *, size: int = 10, batch: int = 4, seed: int = 3, total: int = 99
    ) -> None:
        given = [{**(each if isinstance(each, dict) else {"path": str(each)}), "stream": True} for each in entries]
        sources = [open_source(Source.of(entry), Comparison, "train") for entry in given]
        making = Making(Comparison, TOKENIZER, 128, "drop", "last", "error", "train", None, "")
        self.blocks, self.fetched, self.most = Blocks(cache / "streams" / "a", sources, making, size, cache), list[int](), 0
        self.cache, self.blocks.leads = cache, True
        self.order = StreamOrder(self.blocks, self._fetch, self._partners, batch, seed, total)
        self.rows = StreamRows(self.order.opened, [])

    def _fetch(self, number: int, place: Any) -> Any:
        self.fetched.append(number)
        return self.blocks.get(number, place)

    def _partners(self, block: Any) -> np.ndarray | None:
        return mismatched_partners(block.data.groups, 0, what="the test") if block.kept > 1 else None

    def batches(self, first: int, last: int) -> list[list[str]]:
        """Return where the rows of batches come from: a.jsonl:3."""
        found = []
        for number in range(first, last):
            rows = self.order.batch(number)
            self.most = max(self.most, len(self.blocks.at_hand()))
            found.append([self.rows[int(row)].id.partition("#")[0].rpartition("/")[2] for row in rows])
        return found


@pytest.fixture
def start(tmp_path: Path) -> Any:
    """`start(entries, state, number)`: a stream that goes on at a saved position, with a cache of its own."""
    made = list[Stream]()

    def begin(entries: Sequence[Any], state: Any = None, number: int = 0, **settings: Any) -> Stream:
        stream = Stream(entries, tmp_path / f"cache{len(made)}", **settings)
        made.append(stream)
        saved = json.loads(json.dumps(state))
        stream.order.start(Position() if saved is None else Position.of(saved), number)
        stream.order.ahead()
        return stream

    yield begin
    for each in made:
        each.blocks.close(remove=True)


def names(path: Path, count: int) -> list[str]:
    return [f"{path.name}:{n}" for n in range(1, count + 1)]


def test_every_row_comes_once_an_epoch_and_two_blocks_are_on_the_disk(tmp_path: Path, start: Callable[..., Stream]) -> None:
    path = jsonl(tmp_path / "a.jsonl", pairs(44))
    stream = start([path])
    first, second = stream.batches(0, 11), stream.batches(11, 22)
    for epoch in (first, second):
        assert sorted(chain(*epoch)) == sorted(names(path, 44))
    assert first != second, "each epoch is shuffled anew"
    blocks = [sorted([*chain(*first)][at : at + 10]) for at in (0, 10, 20)]
    assert blocks == [sorted(names(path, 44)[at : at + 10]) for at in (0, 10, 20)], "blocks come in the order of the file"
    assert stream.fetched == [0, 1, 2, 3, 0, 1, 2, 3], "the last block takes the four rows that would be few"
    assert stream.most == 2
    assert start([path]).batches(0, 22) == first + second
    assert start([path], seed=4).batches(0, 11) != first
    short = start([path], total=2)
    assert (short.batches(0, 2), short.most, short.fetched) == (first[:2], 1, [0]), "none is made that no batch needs"
    (listed,) = stored(stream.cache)
    assert (listed.kind, is_held(listed)) == ("stream", True)
    stream.blocks.close(remove=True)
    assert not stream.blocks.at_hand()
    assert not stored(stream.cache)


def test_the_order_of_a_block_is_that_of_its_seed_epoch_and_number_in_every_version() -> None:
    orders = [block_order(*key, 6).tolist() for key in ((3, 0, 0), (3, 1, 0), (3, 0, 1), (4, 0, 0))]
    assert orders == [[5, 2, 4, 0, 1, 3], [2, 0, 4, 1, 5, 3], [3, 2, 1, 0, 5, 4], [0, 3, 4, 5, 2, 1]]


def test_a_batch_may_span_several_blocks_and_its_columns_are_those_of_its_rows(
    tmp_path: Path, start: Callable[..., Stream]
) -> None:
    stream = start([jsonl(tmp_path / "a.jsonl", pairs(20))], size=4, batch=7)
    partners = StreamPartners(stream.order.opened)
    for number in range(6):
        rows, _ = stream.order.batch(number), stream.order.batch(number + 1)  # as a trainer asks, which packs the next one
        items = [stream.rows[int(row)] for row in rows]
        lengths = [[len(item.prompt) + len(each.ids) for each in item.completions] for item in items]
        assert stream.rows.lengths[rows].tolist() == lengths
        assert stream.rows.prompt_lengths[rows].tolist() == [len(item.prompt) for item in items]
        assert stream.rows.scored[rows].tolist() == [[int(each.scored.sum()) for each in item.completions] for item in items]
        assert len(set(stream.rows.groups[rows].tolist())) == len(rows), "no two rows have one prompt"
        others = partners[rows]
        assert (others // SPAN == rows // SPAN).all(), "a partner is of the same block"
        assert all(list(stream.rows[int(other)].prompt) != list(item.prompt) for other, item in zip(others, items, strict=True))


@pytest.mark.parametrize(
    ("kind", "positions"), [("jsonl", (1, 5, 6, 7, 10)), ("two", (3, 6)), ("gz", (4,)), ("csv", (4,)), ("filtered", (3,))]
)
def test_any_position_leads_to_the_same_batches(
    tmp_path: Path, start: Callable[..., Stream], kind: str, positions: Sequence[int]
) -> None:
    """In the middle of a block, at its edge and in an epoch's last batch; of lines of JSON, and of rows that are counted."""
    rows = pairs(27)
    entries: list[Any] = [jsonl(tmp_path / "a.jsonl", rows)]
    if kind == "two":
        (tmp_path / "more").mkdir()
        jsonl(tmp_path / "more" / "c.jsonl", pairs(8, 40))
        jsonl(tmp_path / "more" / "d.jsonl", pairs(6, 50))
        entries = [jsonl(tmp_path / "a.jsonl", rows[:13]), tmp_path / "more", jsonl(tmp_path / "b.jsonl", rows[13:])]
    elif kind == "gz":
        (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
        entries = [tmp_path / "a.jsonl.gz"]
    elif kind == "csv":
        lines = ["prompt,chosen,rejected", *(f"{row['prompt']},{row['chosen']},{row['rejected']}" for row in rows)]
        (tmp_path / "a.csv").write_text("\n".join(lines))
        entries = [tmp_path / "a.csv"]
    elif kind == "filtered":
        entries = [{"path": str(entries[0]), "filter": "n < 3 or n > 12", "columns": {"prompt": "prompt"}}]
    whole = start(entries)
    states, batches = list[Any](), list[list[str]]()
    for number in range(11):
        states.append(whole.order.state(number))
        batches += whole.batches(number, number + 1)
    assert len({*chain(*batches)}) == {"two": 41, "filtered": 17}.get(kind, 27)
    for number in positions:
        again = start(entries, states[number], number)
        assert again.batches(number, 11) == batches[number:], number
        assert again.fetched[0] == states[number]["block"], "earlier blocks are not made"


def test_a_resume_reads_no_earlier_line_of_json_and_refuses_other_rows(tmp_path: Path, start: Callable[..., Stream]) -> None:
    path = jsonl(tmp_path / "a.jsonl", pairs(40))
    whole = start([path])
    batches = whole.batches(0, 8)
    state, lines = whole.order.state(6), path.read_text().splitlines()
    assert state["place"][:2] == [0, 20]
    path.write_text("\n".join(["x" * len(line) for line in lines[:20]] + lines[20:]))
    assert start([path], state, 6).batches(6, 8) == batches[6:]
    path.write_text("\n".join([*lines[:24], lines[24].replace("one", "two"), *lines[25:]]))
    with pytest.raises(UserError, match=r"a.jsonl:21 to .*a.jsonl:30 are others than when the run read them"):
        start([path], state, 6)
    path.write_text("longer than it was\n" + path.read_text().partition("\n")[2])
    changed = Stream([path], tmp_path / "changed")
    changed.order.start(Position.of(state).of_changed_files(), 6)
    assert changed.batches(6, 8) == batches[6:], "as resume_changes=allow lets it"
    changed.blocks.close(remove=True)


def test_an_epoch_of_other_rows_than_the_first_is_refused(tmp_path: Path, start: Callable[..., Stream]) -> None:
    path = jsonl(tmp_path / "a.jsonl", pairs(40))
    stream = start([path])
    stream.batches(0, 8)
    path.write_text(path.read_text().replace("one 35", "two 35"))
    with pytest.raises(UserError, match="epoch 2 had other rows than the first"):
        stream.batches(8, 21)


def test_a_row_that_cannot_be_read_is_named_when_its_block_is_needed(tmp_path: Path, start: Callable[..., Stream]) -> None:
    path = jsonl(tmp_path / "a.jsonl", pairs(40))
    whole = start([path]).batches(0, 5)
    for line, message in (("{", "a.jsonl:24: not valid JSON"), ('{"prompt": "a", "chosen": 7, "rejected": "b"}', "a.jsonl:24")):
        rows = path.read_text().splitlines()
        path.write_text("\n".join([*rows[:23], line, *rows[24:]]))
        stream = start([path])
        assert stream.batches(0, 5) == whole, "what is before its block is trained on"
        for _ in range(2):
            with pytest.raises(UserError, match=message):
                stream.batches(5, 6)


def test_blocks_without_a_usable_row_are_passed_over_and_an_epoch_of_them_is_refused(
    tmp_path: Path, start: Callable[..., Stream]
) -> None:
    path = str(jsonl(tmp_path / "a.jsonl", pairs(40)))
    stream = start([{"path": path, "filter": "n in [3, 31, 32]"}])
    for epoch in stream.batches(0, 4):
        assert sorted(epoch) == ["a.jsonl:32", "a.jsonl:33", "a.jsonl:4"]
    (counts,) = Position.of(stream.order.state(4)).report
    assert (counts.rows, counts.kept, counts.dropped) == (30, 1, {"filtered out by n in [3, 31, 32]": 29})
    with pytest.raises(UserError, match=r"40 rows, 0 examples kept; dropped 40 .*none of them can be used"):
        start([{"path": path, "filter": "n > 99"}])


def test_many_rows_are_tokenised_by_another_process_as_by_this_one(
    tmp_path: Path, start: Callable[..., Stream], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = jsonl(tmp_path / "a.jsonl", pairs(20))
    plain, asked = start([path]), list[int]()
    expected = plain.batches(0, 10)

    class Recorded:
        def __init__(self, tokenise: Any) -> None:
            self.tokenise = tokenise

        def write_shard(self, directory: Path, rows: Any, path: str) -> None:
            asked.append(len(rows))
            shards.write_shard(directory, rows, self.tokenise, path)

        def close(self) -> None:
            pass

    monkeypatch.setattr(stream_blocks, "SHARD", 9)
    monkeypatch.setattr(stream_blocks, "Worker", Recorded)
    other = start([path])
    assert other.batches(0, 10) == expected
    assert asked == [9, 1, 9, 1], "a process gets as many at a time as a shard has"
    states = [each.order.state(10) for each in (plain, other)]
    assert states[0] == states[1]


def test_no_block_ends_between_rows_that_a_function_made_of_one(tmp_path: Path) -> None:
    """For a reader goes on after the line that they are of."""
    ends = [End(0, 10 * line, line) for line in (1, 2, 3, 3, 3, 4, 5, 5, 6, 7)]
    rows = [Row({}, f"a.jsonl:{end.line}.{n}", end=end) for n, end in enumerate(ends)]

    def after(end: End) -> Iterator[Row]:
        return (row for row in rows if row.end is not None and row.end.line > end.line)

    source = OpenSource(Source("a.jsonl"), "", lambda: iter(rows), after=after)
    reader, place, blocks = StreamReader([source], 3), START, list[list[Row]]()
    while True:
        block = reader.read(place)
        again = StreamReader([source], 3).read(place)
        assert again == block
        blocks.append([row for _, row in block.rows])
        if block.after is None:
            break
        place = block.after
    assert blocks == [rows[:5], rows[5:8], rows[8:]]


def test_a_large_file_is_known_by_its_size_and_parts_of_it(tmp_path: Path) -> None:
    path, size = tmp_path / "a.jsonl", 3 * PARTS * PART
    path.write_bytes(bytes(size))
    before = sampled_hash([path])
    for change in (0, size - 1, size // 2 // PART * PART):
        content = bytearray(size)
        content[change : change + 3 * PART] = b"x" * len(content[change : change + 3 * PART])
        path.write_bytes(content)
        assert sampled_hash([path]) != before
    path.write_bytes(bytes(size + 1))
    assert sampled_hash([path]) != before
    path.write_bytes(bytes(size))
    assert sampled_hash([path]) == before
    with pytest.raises(UserError, match="cannot be read"):
        sampled_hash([tmp_path / "none"])


def test_a_data_set_of_the_hub_is_fetched_as_it_is_read_at_one_commit(
    tmp_path: Path, start: Callable[..., Stream], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = list[tuple[Any, ...]]()

    def load(name: str, config: str | None, *, revision: str, streaming: bool) -> Any:
        asked.append((name, config, revision, streaming))
        return {"train": datasets.Dataset.from_list(pairs(27)).to_iterable_dataset()}

    class Api:
        def dataset_info(self, name: str, *, revision: str | None) -> Any:
            return type("Info", (), {"sha": f"commit of {revision}"})

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    entry = {"path": "org/name:main", "revision": "v1"}
    whole = start([entry])
    batches, state = whole.batches(0, 4), whole.order.state(4)
    batches += whole.batches(4, 9)
    assert asked[0] == ("org/name", "main", "commit of v1", True)
    assert sorted(chain(*batches[:7])) == sorted(f"name:main[train]:{n}" for n in range(1, 28))
    assert start([entry], state, 4).batches(4, 6) == batches[4:6]
    assert open_source(Source.of({**entry, "stream": True}), Comparison, "train").fingerprint.endswith("commit of v1")
    with pytest.raises(UserError, match="which split\\? It has train"):
        start([{"path": "org/name:main", "split": "other", "revision": "v1"}])
