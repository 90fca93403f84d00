"""Columns that are renamed or left out, rows that are filtered, and readers of the user's own."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from halos.config.custom_formats import custom_formats
from halos.config.schema import Data
from halos.data.custom_format import entries_of
from halos.data.row_filter import RowFilter
from halos.data.sources import Source, content_hash, open_source
from halos.errors import UserError
from halos.types import Comparison, Demonstration

from .tokenizers import jsonl, prepared

ROW = {
    "score_ratio": 3.0,
    "lang": "EN",
    "n": "12",
    "tags": ["a", "b"],
    "meta": {"ok": True},
    "none": None,
    "flag": "True",
    "id": "1234567890123456789",
    "whole": 1234567890123456789,
    "ten": "10",
    "hundred": "100",
    "nine": "9.5",
    "chosen-rating": 4,
    "column": 7,
}


@pytest.mark.parametrize(
    ("text", "holds"),
    [
        ("score_ratio >= 2 and lower(lang) == 'en'", True),
        ("score_ratio >= 2 and lang == 'en'", False),
        ("1 < score_ratio < 3", False),
        ("n > 9 and n == 12 and -n < 0", True),  # a number as text, which a csv file has
        ("flag == True and flag and not flag == False", True),
        ("len(tags) == 2 and 'a' in tags and 'c' not in tags", True),
        ("lang in ['DE', 'EN'] or lang > 'Z'", True),
        ("none is None and lang is not None and missing is None", True),
        ("none == 'x' or lower(none) == 'x' or meta['no'] == 1 or none['a'] == 1", False),
        ("meta['ok'] and tags[0] == 'a' and tags[-1] == 'b' and tags[5] is None", True),
        ("score_ratio - 1 >= n / 6 and 2 * 3 + 1 == 7", True),
        ("ten > nine and hundred > ten and ten < 'b' and not ten > '9'", True),  # two numbers as text are compared as numbers
        ("id == 1234567890123456789 and whole > 1234567890123456788 and id - 1 == 1234567890123456788", True),
        ("id == 1234567890123456788 or whole < id", False),
        ("column('chosen-rating') == 4 and column('column') == column and column('meta')['ok']", True),
    ],
)  # fmt: skip
def test_a_filter_is_a_condition_on_columns(text: str, holds: bool) -> None:
    assert RowFilter(text).holds(ROW, "a:1") is holds


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is not understood; it takes columns"),
        ("lang ==", "is not understood"),
        ("__import__('os').system('true')", "is not understood"),
        ("lang.lower() == 'en'", "is not understood"),
        ("open('x')", "is not understood"),
        ("[n for n in tags]", "is not understood"),
        ("(lambda: True)()", "is not understood"),
        ("lang is 'EN'", "is not understood"),
        ("n ** 99999", "is not understood"),
        ("column(lang) == 1", "is not understood; it takes columns [(]one whose name is no word as column[(]'chosen-rating'[)]"),
        ("score_ratio > 'x'", "a:1: filter=.*'x' is no number"),
        ("none > 2", "a:1: filter=.*null is no number; write `column is not None and"),
        ("len(none) > 2", "len\\(\\) of null; write"),
        ("lower(tags) == 'a'", "lower\\(\\) of \\['a', 'b'\\], which is no text"),
        ("'a' in n or 'a' in score_ratio", "'a' is looked for in 3.0, which is neither"),
        ("lang['x'] == 1", "'EN' has no part \\['x'\\]"),
        ("score_ratio", "3.0 is neither true nor false"),
        ("n / (n - 12) > 1", "divides by zero"),
        ("'a' * 9 == 'a'", "'a' is no number"),
    ],
)
def test_what_is_no_condition_is_refused(text: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        RowFilter(text).holds(ROW, "a:1")


ROWS: list[dict[str, Any]] = [
    {"question": f"{n}?", "best": f"{n}", "worst": "no", "score": n, "prompt": "id", "label": 1, "more": n, "b-rating": n}
    for n in range(6)
]
COLUMNS = {"prompt": "question", "chosen": "best", "rejected": "worst", "label": None}


def read(entry: Any) -> list[dict[str, Any]]:
    return [row.record for row in open_source(Source.of(entry), Demonstration, "train").rows()]


def test_columns_are_renamed_and_left_out_and_rows_filtered_before(tmp_path: Path) -> None:
    path = jsonl(
        tmp_path / "a.jsonl", [{key: value for key, value in row.items() if key != "more" or row["score"]} for row in ROWS]
    )
    entry = {"path": path, "columns": COLUMNS, "filter": "score >= 2 and question != '3?'"}
    data = prepared(entry, tmp_path, kind=Comparison)
    assert data.lines() == [f"{path}: 6 rows, 3 examples kept; dropped 3 (3 filtered out by score >= 2 and question != '3?')"]
    assert read({"path": path, "columns": COLUMNS})[0] == {
        "prompt": "0?", "chosen": "0", "rejected": "no", "score": 0, "b-rating": 0,
    }  # fmt: skip
    assert read({"path": path, "columns": {"prompt": "question", "question": "prompt"}})[1]["question"] == "id"
    assert [row.get("more") for row in read({"path": path, "filter": "more is not None"})] == [None, 1, 2, 3, 4, 5], (
        "the first row lacks it"
    )
    assert len(list((tmp_path / "data").iterdir())) == 1
    prepared({**entry, "filter": "score >= 3"}, tmp_path, kind=Comparison)
    prepared({**entry, "columns": {**COLUMNS, "rejected": "question"}}, tmp_path, kind=Comparison)
    assert len(list((tmp_path / "data").iterdir())) == 3, "each is tokenised on its own"
    assert content_hash(entry, "train") == content_hash(path, "train"), "the files are the same"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"columns": {"prompt": "questoin"}},
            "columns: prompt: questoin: its rows have no column 'questoin'; did you mean 'question'",
        ),
        ({"columns": {"lable": None}}, "columns: lable: null: its rows have no column 'lable'; did you mean 'label'"),
        ({"filter": "scor > 1"}, "filter='scor > 1': its rows have no column 'scor'; did you mean 'score'"),
        ({"filter": 7}, "filter=7 must be text"),
        ({"filter": "score >"}, r"data entry .*a\.jsonl: filter='score >' is not understood"),
        ({"filter": "b-rating > 3"}, "no column 'b'; column[(]'b-rating'[)] in a filter is 'b-rating'; it has [(]question"),
        ({"columns": ["a"]}, "columns=\\['a'\\] must be names"),
        ({"columns": {"prompt": 1}}, "must be names"),
    ],
)
def test_a_column_that_no_row_has_is_refused_with_the_nearest(tmp_path: Path, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        read({"path": jsonl(tmp_path / "a.jsonl", ROWS), **settings})


# --- readers -----------------------------------------------------------------------------------------------------------

CODE = """
def read(path):
    for line in path.read_text().splitlines():
        asked, said, *split = line.split("=")
        yield {"prompt": asked, "completion": said, **({"split": split[0]} if split else {})}

def fails(path):
    yield {"prompt": "a"}
    raise KeyError("b")

def no_rows(path): return ["a"]

def unnamed(path): return [{0: "a"}]

def nothing(path): return None

def two(path, other): ...
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "ownreader.py").write_text(CODE)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path / "ownreader.py"
    sys.modules.pop("ownreader", None)


def test_a_reader_turns_any_file_into_rows_and_its_code_counts(own: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.eq"
    path.write_text("1+1=2\n2+2=4=test\n")
    entry = {"path": str(path), "reader": "ownreader.read"}
    rows = list(open_source(Source.of(entry), Demonstration, "train").rows())
    assert [(row.record["completion"], row.where) for row in rows] == [("2", f"{path}:1"), ("4", f"{path}:2")]
    assert [row["completion"] for row in read({**entry, "split": "test"})] == ["4"]
    assert [row["answer"] for row in read({**entry, "path": f"{tmp_path}/*.eq", "columns": {"answer": "completion"}})] == [
        "2",
        "4",
    ]
    prepared(entry, tmp_path)
    own.write_text(CODE.replace('"completion": said', '"completion": said * 2'))
    del sys.modules["ownreader"]
    prepared(entry, tmp_path)
    assert len(list((tmp_path / "data").iterdir())) == 2
    assert content_hash(entry, "train") == content_hash({"path": str(path), "format": "jsonl"}, "train")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("fails", r"a\.eq:2: ownreader\.fails fails: KeyError: 'b'"),
        ("no_rows", r"a\.eq:1: ownreader\.no_rows: it yields str: a row must be a dict"),
        ("unnamed", r"a\.eq:1: ownreader\.unnamed: it yields a row with a column 0: names of columns must be text"),
        ("nothing", r"a\.eq:1: ownreader\.nothing fails: TypeError: 'NoneType' object is not iterable"),
        ("two", "ownreader.two is no reader: it must be a function of one path"),
        ("red", "ownreader has no 'red'; it has"),
    ],
)
def test_errors_of_a_reader_name_the_row(own: Path, tmp_path: Path, name: str, words: str) -> None:
    (tmp_path / "a.eq").write_text("x")
    with pytest.raises(UserError, match=words):
        read({"path": str(tmp_path / "a.eq"), "reader": f"ownreader.{name}"})


def test_keys_of_data_apply_to_entries_that_have_none_of_their_own(tmp_path: Path) -> None:
    data = Data(train=["a", {"path": "b", "filter": "x > 1"}], eval=[{"path": "c", "reader": "my.own"}], root=None, format=None,
                reader="my.read", columns={"prompt": "q"}, filter="y", schemas=True, score="last")  # fmt: skip
    assert entries_of(data, "train")[1] == {"path": "b", "filter": "x > 1", "reader": "my.read", "columns": {"prompt": "q"}}
    assert entries_of(data, "eval")[0]["reader"] == "my.own"
    assert custom_formats(data) == {"data.reader": "my.read", "data.eval.0.reader": "my.own"}
    for entry, words in {"jsonl": "so format=jsonl has no effect", None: "reader='own' must name a function"}.items():
        with pytest.raises(UserError, match=words):
            Source.of({"path": "a", "reader": "my.own" if entry else "own", "format": entry})
