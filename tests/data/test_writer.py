"""What is written of items is what is read, and the hash of a data set's content is the one that earlier runs have recorded."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from halos.data import row_tokeniser
from halos.data.dataset import Dataset
from halos.data.writer import Writer, as_rows
from halos.examples import Completion, Item
from halos.types import Comparison

from .tokenizers import jsonl, prepared


def ids(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def floats(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


def completion(start: int, length: int, *spans: tuple[int, int]) -> Completion:
    scored = np.zeros(length, bool)
    for first, end in spans:
        scored[first:end] = True
    return Completion(np.arange(start, start + length, dtype=np.int32), scored)


ITEMS = {
    "pairs": [
        Item(ids(1, 2, 3), (completion(0, 4, (0, 4)), completion(7, 3, (0, 3))), "a.jsonl:1#0", {"margin": 0.5}),
        Item(ids(1, 2, 3), (completion(0, 6, (0, 2), (4, 6)), completion(7, 2, (1, 2))), "a.jsonl:2#0", {"margin": 0.0}),
    ],
    "labels": [
        Item(ids(5), (completion(0, 2, (0, 2)),), "b:1#0", {"desirable": 1.0}),
        Item(ids(), (completion(0, 3, (1, 3)),), "b:2#0", {"desirable": 0.0}),
    ],
    "rollouts": [
        Item(ids(5, 6), (completion(0, 2, (0, 2)),), "c:1#0", {"reward": -1.25}, floats(-0.5, -1.5)),
        Item(ids(5, 7), (completion(0, 1, (0, 1)),), "c:2#0", {"reward": float("inf")}),
    ],
    "own": [Item(ids(9), (completion(0, 2, (0, 2)),), "d:1#0", {"help": 0.1, "margin": 2.0, "harm": 3.0})],
    "steps": [
        Item(ids(1), (completion(0, 4, (1, 2), (3, 4)),), "e:1#0", {}, None, floats(1, 0)),
        Item(ids(1), (completion(0, 4, (1, 2)),), "e:2#0", {}, None, floats(1)),
    ],
    "taught": [
        Item(ids(1), (completion(0, 3, (1, 3)),), "f:1#0", {}, None, None, floats(0, 1, 2, 3, 4, 5).reshape(2, 3)),
        Item(ids(1), (completion(0, 3, (1, 3)),), "f:2#0", {}),
    ],
}
RECORDED = {  # by versions that hashed item by item
    "pairs": "b8fe07df8b9f1a59de284747f028c7df23d3b3a5ff38ea3fa57c65acd5f031ee",
    "labels": "76c64144bf60286249678465f6568589ef3151ccbd1a9491cbbc244489e33c30",
    "rollouts": "3ac8b826c63eceddfe01b8c50467aca1645f7a7537eb35d3887be012daa301ef",
    "own": "728326c0373cacc0e7e0cd1431a6e267ee94927cd33c4c4b74de2876401b2895",
    "steps": "faf0171bcf8dacd06e216a9191071bd573adbaf851e06fe7ad315e0adfa416fb",
    "taught": "af4473dd579053c6280073448718c538182af1f0d903a312dd18eb2e607568f8",
}


def written(directory: Path, kind: str, items: Sequence[Item], batch: int) -> Dataset:
    directory.mkdir()
    writer = Writer(directory)
    for start in range(0, len(items), batch):
        part = items[start : start + batch]
        writer.write(as_rows(part), range(start, start + len(part)))
    writer.finish({"kind": kind, "weights": [1.0, 2.0], "report": []})
    writer.close()
    return Dataset(directory)


def plain(item: Item) -> list[Any]:
    arrays = [item.prompt, item.logps, item.step_labels, item.teacher_logps]
    arrays += [part for each in item.completions for part in (each.ids, each.scored)]
    return [item.id, item.labels, *(None if each is None else (each.dtype.name, each.tolist()) for each in arrays)]


@pytest.mark.parametrize("kind", ITEMS)
@pytest.mark.parametrize("batch", [1, 2])
def test_items_are_read_as_they_were_written_under_the_recorded_hash(tmp_path: Path, kind: str, batch: int) -> None:
    data = written(tmp_path / "data", kind, ITEMS[kind], batch)
    assert [plain(each) for each in data] == [plain(each) for each in ITEMS[kind]]
    assert data.content == RECORDED[kind]
    assert data.sources.tolist() == list(range(len(ITEMS[kind])))
    prompts = [item.prompt.tobytes() for item in ITEMS[kind]]
    assert data.groups.tolist() == [list(dict.fromkeys(prompts)).index(prompt) for prompt in prompts]
    assert data.scored.tolist() == [[int(each.scored.sum()) for each in item.completions] for item in ITEMS[kind]]


@pytest.mark.parametrize("truncation", ["truncate", "drop"])
def test_rows_within_max_length_and_beyond_it_keep_their_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, truncation: str
) -> None:
    """Short rows, long ones, equal ones and some with the text of a special token lie side by side in each batch."""
    monkeypatch.setattr(row_tokeniser, "BATCH", 7)
    words = [" ".join(["one two three"] * (1 + n * 5 % 12)) + " <|eot|>" * (n % 4 == 1) for n in range(40)]
    rows = [
        {"prompt": f"What is {n % 3}?", "chosen": word, "rejected": "four" if n % 5 else word} for n, word in enumerate(words)
    ]
    path = jsonl(tmp_path / "a.jsonl", rows)
    longer = prepared([path], tmp_path / "any", kind=Comparison, max_length=10_000)
    limit = int(np.median(longer.lengths.max(1)))
    data = prepared([path], tmp_path / "data", kind=Comparison, max_length=limit, truncation=truncation)
    expected = list[Item]()
    for item in longer:
        if len(item.prompt) + max(len(each.ids) for each in item.completions) <= limit:
            expected.append(item)
        elif truncation == "truncate":
            room = limit - len(item.prompt)
            cut = tuple(Completion(each.ids[:room], each.scored[:room]) for each in item.completions)
            expected.append(Item(item.prompt, cut, item.id, item.labels))
    assert [plain(each) for each in data] == [plain(each) for each in expected]
    (report,) = data.report
    assert report.kept == len(expected)
    assert report.kept + sum(report.dropped.values()) == report.examples == len(rows)
    cut = [item for item in longer if len(item.prompt) + len(item.completions[0].ids) > limit]
    assert 5 < len(cut) < len(longer) - 5
    assert report.cut_completions == (len(cut) if truncation == "truncate" else 0)
    ((note, count),) = report.noted.items()
    noted = [item for item in expected if int(item.id.split(":")[1].split("#")[0]) % 4 == 2]  # counted from 1
    assert (count, report.places[note]) == (len(noted), [item.id.removesuffix("#0") for item in noted[:3]])
    content = hashlib.sha256()
    for item in expected:
        arrays = [item.prompt, *(part for each in item.completions for part in (each.ids, each.scored))]
        head = [0, True, item.labels["margin"], 0.0, [len(each) for each in arrays]]
        content.update(json.dumps(head).encode() + b"".join(each.tobytes() for each in arrays))
    content.update(json.dumps(["Comparison", [1.0]]).encode())
    assert data.content == content.hexdigest()
