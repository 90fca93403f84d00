"""Custom formats: a user function converts rows, and its errors name the row."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from halos.config.custom_formats import custom_formats
from halos.config.schema import Data
from halos.data.custom_format import convert_rows, entries_of, with_common
from halos.data.formats import read_example
from halos.data.row import LEFT_OUT
from halos.data.sources import Source, content_hash, open_source
from halos.errors import UserError
from halos.types import Comparison, Demonstration, Judgement, Scored

from .tokenizers import jsonl, prepared, says, user

CODE = """
from halos.errors import UserError
from halos.types import Comparison, Demonstration, Judgement, Scored

ASKED = ({"role": "user", "content": "Q"},)
SAID = ({"role": "assistant", "content": "A"},)

def asks(row):
    return {"prompt": row.pop("q"), "completion": row["a"]}

def each(row):
    return [{"prompt": row["q"], "completion": word} for word in row["a"].split()] + [None]

def lenient(row): return {"prompt": row.get("q", "Q"), "completion": row.get("a", "A")}

def nothing(row): return None if row["a"] == "two" else []

def typed(row):
    return {"d": Demonstration(ASKED, SAID), "c": Comparison(ASKED, SAID, ({"role": "assistant", "content": "B"},), 0.5),
            "j": Judgement(ASKED, SAID, False), "s": Scored(ASKED, SAID, 1.5, (3, 4), (-1.0, -2.0), "v")}[row["q"]]

def number(row): return 3

def told(row): raise UserError("no answer")

def two(row, other): ...
"""
ROWS = [{"q": "one?", "a": "one"}, {"q": "two?", "a": "two"}]


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "ownrows.py").write_text(CODE)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path / "ownrows.py"
    sys.modules.pop("ownrows", None)


@pytest.fixture
def rows(own: Path, tmp_path: Path) -> Callable[[str], list[Any]]:
    def read(name: str) -> list[Any]:
        entry = {"path": jsonl(tmp_path / "a.jsonl", ROWS), "format": f"ownrows.{name}"}
        return list(open_source(Source.of(entry), Demonstration, "train").rows())

    return read


def test_a_row_becomes_built_in_columns_and_keeps_its_position(rows: Callable[[str], list[Any]], tmp_path: Path) -> None:
    first, second = rows("asks")
    assert (first.record, second.where) == ({"prompt": "one?", "completion": "one"}, f"{tmp_path}/a.jsonl:2")
    assert read_example(first, score="last") == Demonstration((user("one?"),), (says("one"),))


def test_one_row_may_become_several_or_none(rows: Callable[[str], list[Any]], tmp_path: Path) -> None:
    found = rows("each")
    assert [(row.where.rpartition("/")[2], row.left_out) for row in found] == [
        ("a.jsonl:1.1", False), ("a.jsonl:1.2", True), ("a.jsonl:2.1", False), ("a.jsonl:2.2", True),
    ]  # fmt: skip
    assert [row.left_out for row in rows("nothing")] == [True, True], "an empty list too"


def test_a_function_does_not_see_rows_that_a_filter_left_out(rows: Callable[[str], list[Any]], tmp_path: Path) -> None:
    rows("lenient")
    entry = {"path": str(tmp_path / "a.jsonl"), "format": "ownrows.lenient", "filter": "q == 'one?'"}
    kept, left = open_source(Source.of(entry), Demonstration, "train").rows()
    assert (kept.record["prompt"], left.left_out, left.note) == ("one?", True, "filtered out by q == 'one?'")


@pytest.mark.parametrize(("kind", "wanted"), [
    ("d", Demonstration((user("Q"),), (says("A"),))), ("c", Comparison((user("Q"),), (says("A"),), (says("B"),), 0.5)),
    ("j", Judgement((user("Q"),), (says("A"),), False)),
    ("s", Scored((user("Q"),), (says("A"),), 1.5, (3, 4), (-1.0, -2.0), "v")),
])  # fmt: skip
def test_an_example_stands_for_its_columns(own: Path, kind: str, wanted: Any) -> None:
    from halos.data.files import Row

    [row] = convert_rows("ownrows.typed", iter([Row({"q": kind}, "x:1")]))
    assert read_example(row, score="last") == wanted


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("number", "a.jsonl:1: ownrows.number returns int: it must return a dict"),
        ("told", "a.jsonl:1: ownrows.told: no answer"),
        ("typed", "a.jsonl:1: ownrows.typed fails: KeyError: 'one\\?'; columns found: q, a"),
        ("two", "ownrows.two is no format: it must be a function of one row"),
        ("ASKED", "ownrows.ASKED is no format"),
        ("ask", "ownrows has no 'ask'; it has asks, each"),
    ],
)
def test_its_errors_name_the_row(rows: Callable[[str], list[Any]], name: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        rows(name)


def test_rows_left_out_are_counted_and_changed_code_converts_again(own: Path, tmp_path: Path) -> None:
    entry = {"path": jsonl(tmp_path / "a.jsonl", [*ROWS, {"q": "three?", "a": "three"}]), "format": "ownrows.each"}
    before = prepared(entry, tmp_path)
    assert len(before) == 3
    assert any(LEFT_OUT in line for line in before.lines())
    prepared(entry, tmp_path)
    kept, files = len(list((tmp_path / "data").iterdir())), content_hash(entry, "train")
    assert kept == 1
    own.write_text(CODE.replace('row["a"].split()', 'row["a"].upper().split()'))
    del sys.modules["ownrows"]
    after = prepared(entry, tmp_path)
    assert len(list((tmp_path / "data").iterdir())) == 2
    assert after.content != before.content
    assert content_hash(entry, "train") == files, "which are the same"


def test_data_format_applies_to_entries_without_a_format() -> None:
    data = Data(train=["a.jsonl", {"path": "b.jsonl", "format": "json"}, {"path": "c", "format": "my.rows"}], eval=[],
                root=None, format="mine.rows", reader=None, columns={}, filter=None, schemas=True, score="last")  # fmt: skip
    assert [entry["format"] for entry in entries_of(data, "train")] == ["mine.rows", "json", "my.rows"]
    assert custom_formats(data) == {"data.format": "mine.rows", "data.train.2.format": "my.rows"}
    assert with_common("a.jsonl", {}) == "a.jsonl"
