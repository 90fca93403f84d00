import json
import random
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from halos.data import arithmetic
from halos.data.files import Row
from halos.data.sources import Source, open_source
from halos.data.split import Split
from halos.errors import UserError
from halos.types import Comparison, Demonstration

from .tokenizers import jsonl

ROWS = [{"prompt": f"{n}?", "completion": f"{n}."} for n in range(10)]


def read(entry, purpose: str = "train", kind=Demonstration) -> list[Row]:
    return list(open_source(Source.of(entry), kind, purpose).rows())


def prompts(entry, purpose: str = "train") -> list[str]:
    return [row.record["prompt"] for row in read(entry, purpose)]


def refuses(entry, message: str, purpose: str = "train") -> None:
    with pytest.raises(UserError, match=message):
        read(entry, purpose)


# --- files -------------------------------------------------------------------------------------------------------------


def test_jsonl_rows_have_their_line_number_and_blank_lines_count(tmp_path: Path):
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


def test_json_rows_have_the_line_number_of_their_start(tmp_path: Path):
    path = tmp_path / "a.json"
    path.write_text('[\n {"prompt":\n  "a]"},\n\n {"prompt": "b"}, {"prompt": "c"}\n]\n')
    assert [row.where.rpartition(":")[2] for row in read(str(path))] == ["2", "5", "5[2]"]
    assert prompts(str(path)) == ["a]", "b", "c"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"prompt": "a"},\n {"prompt": }]', r"a\.json:2: not valid JSON"),
        ('[{"prompt": "a"}\n {"prompt": "b"}]', r"a\.json:2: not valid JSON: expected ','"),
        ('[{"prompt": "a"},\n "b"]', r"a\.json:2: a row is an object.*text"),
        ('[{"prompt": "a"}', r"a\.json:1: not valid JSON"),
        ("[] x", "there is text after the list"),
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


def test_a_directory_gives_the_files_of_the_requested_split(tmp_path: Path):
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
    refuses({"path": str(tmp_path), "split": "test"}, r"no files of split 'test'.*split: '\[:100\]'")
    assert prompts({"path": str(tmp_path), "split": "[:1]"}) == ["0?"]
    jsonl(tmp_path / "train.jsonl", ROWS)
    refuses(str(tmp_path), r"a\.jsonl belongs to no split")


def test_a_directory_may_hold_files_of_several_kinds_but_not_the_same_rows_twice(tmp_path: Path):
    refuses(str(tmp_path), r"\.parquet and \.arrow files are read, and this directory has none")
    pq.write_table(pa.Table.from_pylist(ROWS[:2]), tmp_path / "b.parquet")
    jsonl(tmp_path / "a.jsonl", ROWS[2:4])
    (tmp_path / "c.csv").write_text("prompt,completion\n4?,4.\n")
    assert prompts(str(tmp_path)) == ["2?", "3?", "0?", "1?", "4?"]
    assert open_source(Source.of(str(tmp_path)), Demonstration, "train").files == "1 jsonl, 1 parquet, 1 csv"
    jsonl(tmp_path / "b.jsonl", ROWS)
    refuses(str(tmp_path), r"b\.jsonl and b\.parquet seem to hold the same rows, which would count twice")


@pytest.mark.parametrize(
    ("split", "wanted"),
    [("[:3]", "012"), ("train[:30%]", "012"), ("[-2:]", "89"), ("[20%:40%]", "23"), ("[8:]", "89"), ("train", "0123456789")],
)
def test_a_slice_takes_a_part_of_the_rows(tmp_path: Path, split: str, wanted: str):
    path = jsonl(tmp_path / "a.jsonl", ROWS)
    assert "".join(prompts({"path": path, "split": split})) == "".join(f"{n}?" for n in wanted)


def test_rows_after_a_slice_are_not_read():
    rows = iter(ROWS)
    assert list(Split.of("train[1:3]").select(lambda: rows)) == ROWS[1:3]
    assert next(rows) == ROWS[3]


def test_malformed_slices_are_refused(tmp_path: Path):
    path = jsonl(tmp_path / "a.jsonl", ROWS)
    refuses({"path": path, "split": "[100:]"}, r"no rows in \[100:\]")
    refuses({"path": path, "split": "train[1]"}, "is not understood")
    assert Split.of("a-b[1:2]") == Split("a-b", "1", "2")


def test_rows_of_one_file_are_selected_by_their_column_split(tmp_path: Path):
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
        ({"split": "train"}, "is empty"),
        ({"path": None, "format": "gsm8k"}, r"set data\.root"),
        ({"path": "a.jsonl", "weight": 0}, "weight=0 must be a number above 0"),
        ({"path": "a.jsonl", "weight": "2"}, "must be a number"),
        ({"path": "a.jsonl", "format": "xlsx"}, "format='xlsx' must be one of gsm8k, hh, .*jsonl"),
        ({"path": "arithmetic", "revision": "main"}, "applies to data sets of the hub only"),
        (17, "give a path, a name, or"),
        ("no/such/file.jsonl", r"no/such/file\.jsonl: no such file"),
        ("missing.jsonl", "no such file"),
        ("missing.csv", "no such file"),
        ("/tmp/missing/rows", "no such file"),
        ({"path": "arithmetic", "split": "test"}, "it has train and eval"),
    ],
)
def test_a_wrong_entry_gets_a_remedy(entry, message: str):
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


def test_a_hub_data_set_without_the_requested_split_lists_its_splits(monkeypatch: pytest.MonkeyPatch):
    parts = datasets.DatasetDict({"train_prefs": datasets.Dataset.from_list(ROWS)})
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: parts)
    refuses("org/name", "which split.*train_prefs")


def test_nested_objects_are_unchanged(tmp_path: Path):
    row = {"messages": [{"role": "user", "content": "a", "tool_calls": [{"function": {"arguments": {"x": 1}}}]}]}
    (tmp_path / "a.json").write_text(json.dumps([row]))
    assert read(str(tmp_path / "a.json"))[0].record == row


def test_the_hub_is_not_asked_for_a_path_below_an_existing_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "org").mkdir()
    monkeypatch.chdir(tmp_path)
    refuses("org/missing", "org/missing: no such file or directory")


# --- damaged, hostile and skipped files -----------------------------------------------------------------------------------


def damaged(path: Path) -> None:
    """A parquet file with a whole footer and damaged pages."""
    pq.write_table(pa.Table.from_pylist([{"prompt": f"{n}" * 50, "completion": "b" * 50} for n in range(3000)]), path)
    data = bytearray(path.read_bytes())
    for at in range(200, len(data) // 2, 7):
        data[at] ^= 0x5A
    path.write_bytes(bytes(data))


BAD = {
    "half of a character in a list": ("a.json", rb'[{"a": "\ud83d b"}]', r"a\.json:1: holds a lone surrogate"),
    "half of a character in a line": ("a.jsonl", rb'{"a": "\ud83d b"}', r"a\.jsonl:1: holds a lone surrogate"),
    "half of a character in a name": ("a.jsonl", rb'{"\udc00": 1}', r"a\.jsonl:1: holds a lone surrogate"),
    "a long number in a line": ("a.jsonl", b'{"a": ' + b"1" * 5000 + b"}", r"a\.jsonl:1: not valid JSON: Exceeds the limit"),
    "a long number in a list": ("a.json", b'[{"a": ' + b"1" * 5000 + b"}]", r"a\.json:1: not valid JSON: Exceeds the limit"),
    "lists without end in a line": ("a.jsonl", b'{"a": ' + b"[" * 10**5, r"a\.jsonl:1: .* nested too deeply"),
    "lists without end in a list": ("a.json", b'[{"a": ' + b"[" * 10**5, r"a\.json:1: .* nested too deeply"),
    "objects without end": ("a.json", b'{"a":' * 10**5, r"a\.json: .* nested too deeply"),
    "a parquet file of nothing": ("a.parquet", b"PAR1PAR1", r"a\.parquet: not a readable parquet file"),
    "bytes that are no text": (
        "a.jsonl",
        b'{"a": "\xff"}',
        r"a\.jsonl:1: not UTF-8 text: convert it, for example iconv -f WINDOWS",
    ),
    "another encoding": (
        "a.jsonl",
        '{"a": 1}'.encode("utf-16"),
        r"a\.jsonl:1: not UTF-8 text: .* iconv -f UTF-16 .*a\.utf8\.jsonl",
    ),
}


@pytest.mark.parametrize(("name", "content", "said"), BAD.values(), ids=BAD)
def test_damaged_rows_are_one_message_that_names_the_file(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(content)
    refuses(str(tmp_path / name), said)


def test_a_damaged_page_names_its_file(tmp_path: Path) -> None:
    damaged(tmp_path / "a.parquet")
    refuses(str(tmp_path / "a.parquet"), r"a\.parquet: not a readable parquet file, from row \d+ on")


def test_a_file_name_may_begin_with_a_tilde(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    jsonl(Path("~draft.jsonl"), ROWS)
    assert len(read("./~draft.jsonl")) == len(ROWS)


def test_linked_directories_are_read_and_circular_links_end(tmp_path: Path) -> None:
    for place in ("real", "d"):
        (tmp_path / place).mkdir()
    jsonl(tmp_path / "real" / "part.jsonl", ROWS[:3])
    jsonl(tmp_path / "d" / "train.jsonl", ROWS[3:5])
    (tmp_path / "d" / "train").symlink_to(tmp_path / "real")
    (tmp_path / "real" / "again").symlink_to(tmp_path / "d")
    assert len(read(str(tmp_path / "d"))) == 5


@pytest.mark.parametrize(
    "name", ["train-00001.jsonl.zip", "train.parquet.gz", "train/data.pkl", "train.gz", "b.xlsx", "b.orc", "b.jsonl.gz.part"]
)
def test_data_that_would_be_skipped_is_named(tmp_path: Path, name: str) -> None:
    jsonl(tmp_path / "train-00000.jsonl", ROWS)
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(b"x")
    (tmp_path / "README.md").write_text("of no matter")
    refuses(str(tmp_path), f"holds {name} next to train-00000.jsonl")


def test_splits_with_longer_names_are_selected_by_name_and_never_mixed(tmp_path: Path) -> None:
    for number, name in enumerate(("train_prefs", "train_sft", "test_prefs")):
        for part in range(2):
            jsonl(tmp_path / f"{name}-0000{part}-of-00002.jsonl", ROWS[number : number + 1])
    assert prompts({"path": str(tmp_path), "split": "train_prefs"}) == ["0?", "0?"]
    assert prompts(str(tmp_path), "eval") == ["2?", "2?"]
    refuses(str(tmp_path), "which of train_prefs, train_sft")
    refuses({"path": str(tmp_path), "split": "train"}, "which of train_prefs, train_sft")
    jsonl(tmp_path / "train.jsonl", ROWS[3:4])
    refuses(str(tmp_path), "which of train, train_prefs, train_sft")
    assert prompts({"path": str(tmp_path), "split": "train"}) == ["3?"]


@pytest.mark.parametrize("names", [("unit_test", "law"), ("web-dev", "finance"), ("human_eval",), ("lesson-00002-of-00005",)])
def test_the_end_of_a_name_is_no_split_where_no_other_file_ends_in_another(tmp_path: Path, names: tuple[str, ...]) -> None:
    for number, name in enumerate(names):
        jsonl(tmp_path / f"{name.replace('lesson-00002-of-00005', 'lesson-2-of-5')}.jsonl", ROWS[number : number + 1])
    assert sorted(prompts(str(tmp_path))) == [f"{number}?" for number in range(len(names))]


def test_numbered_files_of_another_split_may_be_missing(tmp_path: Path) -> None:
    for name in ("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00002"):
        jsonl(tmp_path / f"{name}.jsonl", ROWS[:1])
    assert prompts(str(tmp_path)) == ["0?", "0?"]
    refuses(str(tmp_path), r"test-\*: 1 of 2 files are here", "eval")


@pytest.mark.parametrize(
    "names", [("a_train", "a_test"), ("training", "testing"), ("a-training-00001", "b-evaluation"), ("a_train", "b_test")]
)
def test_a_split_may_be_the_end_of_a_name(tmp_path: Path, names: tuple[str, str]) -> None:
    for number, name in enumerate(names):
        jsonl(tmp_path / f"{name}.jsonl", ROWS[number : number + 1])
    assert (prompts(str(tmp_path)), prompts(str(tmp_path), "eval")) == (["0?"], ["1?"])
    refuses(f"{tmp_path}/*.jsonl", "matches files of")


def test_numbered_files_of_the_hub_may_have_a_hash_in_their_names(tmp_path: Path) -> None:
    for number, name in enumerate(("train-{}-of-00003-a3ecf92756993583", "train_prefs-{}-of-00001-a3ecf92756993583")):
        for part in range(3 - 2 * number):
            jsonl(tmp_path / f"{name.format(f'{part:05d}')}.jsonl", ROWS[number : number + 1])
    assert prompts({"path": str(tmp_path), "split": "train"}) == ["0?"] * 3
    assert prompts({"path": str(tmp_path), "split": "train_prefs"}) == ["1?"]
    (tmp_path / "train-00001-of-00003-a3ecf92756993583.jsonl").unlink()
    refuses({"path": str(tmp_path), "split": "train"}, r"train-\*: 2 of 3 files are here, and number 1 is missing")


@pytest.mark.parametrize("numbers", [(0, 2), (1, 2), (0,), (2, 3)])
def test_a_directory_without_some_of_its_numbered_files_is_refused(tmp_path: Path, numbers: tuple[int, ...]) -> None:
    for number in numbers:
        jsonl(tmp_path / f"train-{number:05d}-of-00003.jsonl", ROWS[:1])
    refuses(str(tmp_path), rf"train-\*: {len(numbers)} of 3 files are here, and number \d is missing")
    for number in (1, 2, 3) if 3 in numbers else (0, 1, 2):
        jsonl(tmp_path / f"train-{number:05d}-of-00003.jsonl", ROWS[:1])
    assert prompts(str(tmp_path)) == ["0?"] * 3


def test_no_mutation_of_a_file_of_rows_is_a_traceback(tmp_path: Path) -> None:
    """Bytes of files of each kind are flipped, removed, doubled and replaced, with a fixed seed."""
    draw, rows = random.Random(0), [{"prompt": f"é{n}", "completion": [n, None, 1.5, {"a": "\U0001f600"}]} for n in range(6)]
    table = pa.Table.from_pylist([{"prompt": f"{n}", "completion": ["a", "b"]} for n in range(200)])
    pq.write_table(table, tmp_path / "whole.parquet")
    whole = {
        "jsonl": "".join(json.dumps(row) + "\n" for row in rows).encode(),
        "json": json.dumps(rows, indent=1).encode(),
        "parquet": (tmp_path / "whole.parquet").read_bytes(),
    }
    refused = 0
    for turn in range(450):
        kind = ("jsonl", "json", "parquet")[turn % 3]
        path = tmp_path / f"mutated.{kind}"
        path.write_bytes(mutated(whole[kind], draw))
        try:
            read(str(path))
        except UserError as error:
            refused += 1
            assert str(path) in str(error)  # noqa: PT017  read or refused: either is right
    assert refused > 200


def mutated(data: bytes, draw: random.Random) -> bytes:
    """Return data with some bytes changed."""
    for _ in range(draw.randint(1, 4)):
        at, more = draw.randrange(len(data)), draw.randint(1, 12)
        middle = draw.choice((b"", draw.randbytes(more), data[at : at + more] * 2, b"[" * 2000, b"9" * 5000, b"\\ud800", b"\x00"))
        data = data[:at] + middle + data[at + draw.choice((0, 1, more)) :]
    return data
