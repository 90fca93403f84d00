import json
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from halos.data import arithmetic
from halos.data.files import Row
from halos.data.sources import Source, Split, open_source
from halos.errors import UserError
from halos.types import Comparison, Demonstration

from .kit import jsonl

ROWS = [{"prompt": f"{n}?", "completion": f"{n}."} for n in range(10)]


def read(entry, purpose: str = "train", kind=Demonstration) -> list[Row]:
    return list(open_source(Source.of(entry), kind, purpose).rows())


def prompts(entry, purpose: str = "train") -> list[str]:
    return [row.record["prompt"] for row in read(entry, purpose)]


def refuses(entry, message: str, purpose: str = "train") -> None:
    with pytest.raises(UserError, match=message):
        read(entry, purpose)


# --- files -------------------------------------------------------------------------------------------------------------


def test_jsonl_rows_know_their_line_and_blank_lines_count(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "\xc3\xa9\xe2\x80\xa8"}\r\n\n{"prompt": "b"}')
    assert read(str(path)) == [Row({"prompt": "é\u2028"}, f"{path}:1"), Row({"prompt": "b"}, f"{path}:3")]


def test_a_bad_line_is_named(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt": "b"\n')
    refuses(str(path), r"a\.jsonl:2: not valid JSON.*column")
    path.write_text('{"prompt": "a"}\n\n[1]\n')
    refuses(str(path), r"a\.jsonl:3: a row is an object.*a list")
    path.write_bytes(b'{"prompt": "a"}\n{"prompt": "\xff"}\n')
    refuses(str(path), r"a\.jsonl:2: not UTF-8")


def test_json_rows_know_the_line_on_which_they_start(tmp_path: Path):
    path = tmp_path / "a.json"
    path.write_text('[\n {"prompt":\n  "a]"},\n\n {"prompt": "b"}, {"prompt": "c"}\n]\n')
    assert [row.where.rpartition(":")[2] for row in read(str(path))] == ["2", "5", "5"]
    assert prompts(str(path)) == ["a]", "b", "c"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"prompt": "a"},\n {"prompt": }]', r"a\.json:2: not valid JSON"),
        ('[{"prompt": "a"}\n {"prompt": "b"}]', r"a\.json:2: not valid JSON: expected ','"),
        ('[{"prompt": "a"},\n "b"]', r"a\.json:2: a row is an object.*text"),
        ('[{"prompt": "a"}', r"a\.json:1: not valid JSON"),
        ("[] x", "something follows"),
        ('{"version": 1, "data": [{"prompt": "a"}]}', r"holds one object.*its key 'data' holds one"),
        ('{"version": 1}', "holds one object, not a list of rows"),
        ("17", "holds a list of objects, this one a number"),
        ("[]", "no rows"),
        ("", "is empty"),
    ],
)
def test_a_json_file_that_is_no_list_of_rows_says_why(tmp_path: Path, text: str, message: str):
    (tmp_path / "a.json").write_text(text)
    refuses(str(tmp_path / "a.json"), message)


def test_a_json_file_of_one_object_a_line_is_read_as_jsonl(tmp_path: Path):
    path = tmp_path / "a.json"
    path.write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    assert prompts(str(path)) == ["a", "b"]
    path.write_text('{"prompt": "a"}\n{"prompt": "b"\n')
    refuses(str(path), r"a\.json:2: not valid JSON")


def test_parquet_rows_are_read_and_counted(tmp_path: Path):
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet", row_group_size=3)
    rows = read(str(tmp_path / "a.parquet"))
    assert [row.record for row in rows] == ROWS
    assert rows[9].where.endswith("a.parquet:10")
    (tmp_path / "b.parquet").write_text("no parquet")
    refuses(str(tmp_path / "b.parquet"), r"b\.parquet: not a readable parquet file")


def test_a_file_of_another_name_needs_its_format(tmp_path: Path):
    path = jsonl(tmp_path / "a.txt", ROWS)
    refuses(path, "name its kind with format")
    assert len(prompts({"path": path, "format": "jsonl"})) == 10


# --- directories and splits --------------------------------------------------------------------------------------------


def test_a_directory_gives_the_files_of_the_split_that_is_meant(tmp_path: Path):
    (tmp_path / "data").mkdir()
    jsonl(tmp_path / "data" / "train-00001-of-00002.jsonl", ROWS[2:4])
    jsonl(tmp_path / "data" / "train-00000-of-00002.jsonl", ROWS[:2])
    jsonl(tmp_path / "data" / "validation.jsonl", ROWS[4:5])
    (tmp_path / "test").mkdir()
    jsonl(tmp_path / "test" / "part.jsonl", ROWS[5:7])
    (tmp_path / "README.md").write_text("about")
    (tmp_path / "dataset_infos.json").write_text("{}")
    root = str(tmp_path)
    assert prompts(root) == ["0?", "1?", "2?", "3?"]
    assert prompts(root, "eval") == ["4?"], "validation comes before test"
    assert prompts({"path": root, "split": "test"}) == ["5?", "6?"]
    refuses({"path": root, "split": "dev"}, "no files of split 'dev'.*train")


def test_a_directory_without_splits_is_read_whole_and_one_without_the_split_is_refused(tmp_path: Path):
    jsonl(tmp_path / "a.jsonl", ROWS[:1])
    jsonl(tmp_path / "training_notes.jsonl", ROWS[1:2])
    assert prompts(str(tmp_path)) == prompts(str(tmp_path), "eval") == ["0?", "1?"]
    refuses({"path": str(tmp_path), "split": "test"}, "no files of split 'test'")
    jsonl(tmp_path / "train.jsonl", ROWS)
    refuses(str(tmp_path), r"a\.jsonl belongs to no split")


def test_a_directory_must_hold_files_of_one_kind(tmp_path: Path):
    refuses(str(tmp_path), "no .json, .jsonl or .parquet file")
    jsonl(tmp_path / "a.jsonl", ROWS)
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "b.parquet")
    refuses(str(tmp_path), "several kinds")


@pytest.mark.parametrize(
    ("split", "wanted"),
    [("[:3]", "012"), ("train[:30%]", "012"), ("[-2:]", "89"), ("[20%:40%]", "23"), ("[8:]", "89"), ("train", "0123456789")],
)
def test_a_slice_takes_a_part_of_the_rows(tmp_path: Path, split: str, wanted: str):
    path = jsonl(tmp_path / "a.jsonl", ROWS)
    assert "".join(prompts({"path": path, "split": split})) == "".join(f"{n}?" for n in wanted)


def test_slices_that_say_nothing_are_refused(tmp_path: Path):
    path = jsonl(tmp_path / "a.jsonl", ROWS)
    refuses({"path": path, "split": "[100:]"}, r"no rows in \[100:\]")
    refuses({"path": path, "split": "train[1]"}, "is not understood")
    assert Split.of("a-b[1:2]") == Split("a-b", "1", "2")


def test_rows_of_one_file_that_carry_a_split_are_told_apart(tmp_path: Path):
    path = jsonl(tmp_path / "a.jsonl", [{**row, "split": "train" if n < 8 else "test"} for n, row in enumerate(ROWS)])
    assert prompts({"path": path, "split": "test"}) == ["8?", "9?"]
    assert len(prompts(path)) == 10
    refuses({"path": path, "split": "eval"}, r"no row of split 'eval' \(its rows are: test, train\)")


# --- entries -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"path": "a.jsonl", "wieght": 2}, "no key 'wieght'; did you mean 'weight'"),
        ({"path": "a.jsonl", "zzz": 2}, "it takes path, split, weight, revision, format"),
        ({"split": "train"}, "names nothing"),
        ({"path": None, "format": "gsm8k"}, r"set data\.root"),
        ({"path": "a.jsonl", "weight": 0}, "weight=0 must be a number above 0"),
        ({"path": "a.jsonl", "weight": "2"}, "must be a number"),
        ({"path": "a.jsonl", "format": "csv"}, "format='csv' must be one of gsm8k, jsonl"),
        ({"path": "arithmetic", "revision": "main"}, "is for data sets of the hub"),
        (17, "give a path, a name, or"),
        ("no/such/file.jsonl", r"no/such/file\.jsonl: no such file"),
        ("missing.jsonl", "no such file"),
        ("missing.csv", "no such file"),
        ("/tmp/missing/rows", "no such file"),
        ({"path": "arithmetic", "split": "test"}, "it has train and eval"),
    ],
)
def test_a_wrong_entry_says_what_would_be_right(entry, message: str):
    refuses(entry, message)


def test_the_fingerprint_follows_the_content(tmp_path: Path):
    def print_of(entry) -> str:
        return open_source(Source.of(entry), Demonstration, "train").fingerprint

    path = jsonl(tmp_path / "a.jsonl", ROWS)
    before = print_of(path)
    assert print_of(path) == before
    jsonl(tmp_path / "a.jsonl", ROWS[:-1])
    assert print_of(path) != before
    assert print_of("arithmetic") != print_of({"path": "arithmetic", "split": "eval"})


def test_the_built_in_problems_have_a_train_and_an_eval_split():
    train, held_out = read("arithmetic", kind=Comparison), read("arithmetic", "eval", kind=Comparison)
    assert [row.record for row in held_out] == list(arithmetic.rows("eval"))
    assert train[2].where == "arithmetic[train]:3"
    assert not {str(row.record["prompt"]) for row in train} & {str(row.record["prompt"]) for row in held_out}


# --- the hub -----------------------------------------------------------------------------------------------------------


def test_a_hub_name_is_loaded_with_its_configuration_split_and_revision(monkeypatch: pytest.MonkeyPatch):
    asked = {}

    def load(name, config=None, *, split=None, revision=None):
        asked.update(name=name, config=config, split=split, revision=revision)
        parts = {"train": datasets.Dataset.from_list(ROWS), "test": datasets.Dataset.from_list(ROWS[:4])}
        return parts[split] if split else datasets.DatasetDict(**parts)

    monkeypatch.setattr(datasets, "load_dataset", load)
    rows = read({"path": "org/name:main", "split": "test[:50%]", "revision": "abc"})
    assert asked == {"name": "org/name", "config": "main", "split": "test", "revision": "abc"}
    assert rows == [Row(ROWS[0], "org/name:main[test]:1"), Row(ROWS[1], "org/name:main[test]:2")]
    assert len(prompts("org/name")) == 10
    assert len(prompts("org/name", "eval")) == 4, "the test split where there is no other"


def test_a_hub_that_cannot_be_reached_is_one_message(monkeypatch: pytest.MonkeyPatch):
    def fail(*_: object, **__: object) -> None:
        raise ConnectionError("Couldn't reach 'arithmetik' on the Hub (OfflineModeIsEnabled)")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    refuses("arithmetik", "neither a file or directory here.*Couldn't reach.*did you mean 'arithmetic'")


def test_a_hub_set_without_the_split_that_is_meant_lists_its_own(monkeypatch: pytest.MonkeyPatch):
    parts = datasets.DatasetDict({"train_prefs": datasets.Dataset.from_list(ROWS)})
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: parts)
    refuses("org/name", "which split.*train_prefs")


def test_objects_nested_in_rows_arrive_as_they_were(tmp_path: Path):
    row = {"messages": [{"role": "user", "content": "a", "tool_calls": [{"function": {"arguments": {"x": 1}}}]}]}
    (tmp_path / "a.json").write_text(json.dumps([row]))
    assert read(str(tmp_path / "a.json"))[0].record == row


def test_a_name_below_a_directory_that_exists_is_not_asked_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "org").mkdir()
    monkeypatch.chdir(tmp_path)
    refuses("org/missing", "org/missing: no such file or directory")
