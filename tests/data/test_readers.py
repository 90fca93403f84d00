"""Files of every kind, compressed or not: rows with their lines, and one message for what cannot be read."""

import bz2
import gzip
import json
import lzma
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from halos.data.files import Row
from halos.data.formats import read_example
from halos.data.readers import json_rows
from halos.data.readers.kinds import READERS
from halos.data.readers.streams import CODECS
from halos.data.sources import Source, open_source
from halos.errors import UserError
from halos.types import Demonstration

from .test_sources import mutated
from .tokenizers import jsonl

ROWS: list[dict[str, Any]] = [{"prompt": f"{n}?\nüber", "completion": f"{n},"} for n in range(10)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def read(entry: Any, purpose: str = "train") -> list[Row]:
    return list(open_source(Source.of(entry), Demonstration, purpose).rows())


def records(entry: Any, purpose: str = "train") -> list[dict[str, Any]]:
    return [row.record for row in read(entry, purpose)]


def refuses(entry: Any, message: str, purpose: str = "train") -> None:
    with pytest.raises(UserError, match=message):
        read(entry, purpose)


def by_pyarrow(codec: str) -> Callable[[bytes], bytes]:
    return lambda data: pa.compress(data, codec=codec, asbytes=True)


COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "zst": by_pyarrow("zstd"), "lz4": by_pyarrow("lz4"),
}  # fmt: skip


@pytest.mark.parametrize("codec", CODECS)
def test_compressed_files_are_read_with_their_lines_and_a_part_of_one_is_refused(tmp_path: Path, codec: str) -> None:
    path = tmp_path / f"a.jsonl.{codec}"
    whole = COMPRESS[codec](LINES)
    path.write_bytes(whole)
    rows = read(str(path))
    assert [row.record for row in rows] == ROWS
    assert rows[9].where == f"{path}:10"
    path.write_bytes(whole + whole)  # as parallel compressors and `cat` write it
    assert records(str(path)) == ROWS * 2
    path.write_bytes(whole[:-3])
    refuses(str(path), rf"a\.jsonl\.{codec}: ends within its compressed data, so a part of it is missing")
    path.write_bytes(LINES)
    refuses(str(path), rf"a\.jsonl\.{codec}: is no \.{codec} file, or a damaged one")
    path.write_bytes(COMPRESS[codec](LINES + b"{"))
    refuses(str(path), rf"a\.jsonl\.{codec}:11: not valid JSON")
    others = {"b.json": json.dumps(ROWS).encode(), "c.csv": b"prompt,completion\na,b\n", "d.tsv": b"prompt\tcompletion\na\tb\n"}
    for name, content in others.items():
        (tmp_path / f"{name}.{codec}").write_bytes(COMPRESS[codec](content))
        assert records(str(tmp_path / f"{name}.{codec}"))[0].keys() == {"prompt", "completion"}
    (tmp_path / "e.parquet.gz").write_bytes(b"x")
    refuses(str(tmp_path / "e.parquet.gz"), "a .parquet file is read as it is, not compressed as a whole")


def test_csv_rows_are_named_by_the_line_on_which_they_start(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('\ufeffprompt,"completion",label\r\n"a ""b"",\r\nc",d,1\r\n\r\ne,f,\r\n', newline="")
    rows = read(str(path))
    assert [row.record for row in rows] == [
        {"prompt": 'a "b",\r\nc', "completion": "d", "label": "1"}, {"prompt": "e", "completion": "f", "label": None},
    ]  # fmt: skip
    assert [row.where.rpartition(":")[2] for row in rows] == ["2", "5"]
    for text, message in {
        "a,b\n1,2\n1,2,3\n": r"a\.csv:3: 3 fields, and the first line names 2 columns \(a, b\)",
        'a,b\n1,"2\n3\n': r"a\.csv:2: not a valid row: unexpected end of data",
        "a,b,a\n1,2,3\n": r"a\.csv:1: two columns are named 'a'",
        "a,b\n": "no rows",
        "a,b\n\"[{'role': 'user'}]\",2\n": r"a\.csv:2: a is a list of messages as Python prints it: write it as JSON",
    }.items():
        path.write_text(text)
        refuses(str(path), message)
    for rows in (0, 5000):  # of several blocks of the decoder
        path.write_bytes(b"a,b\n" + b"1,2\n" * rows + b"1,\xfc\n1,3\n")
        refuses(str(path), rf"a\.csv:{rows + 2}: not UTF-8 text: convert it, for example iconv -f WINDOWS-1252")


def test_other_separators_and_messages_in_a_field(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "a, b"}]
    (tmp_path / "a.csv").write_text("prompt;completion\na,b;c\n")
    (tmp_path / "b.tsv").write_text('prompt\tcompletion\na,"b"\tc\n')
    quoted = json.dumps(turns, indent=1).replace('"', '""')
    (tmp_path / "c.csv").write_text(f'prompt,completion\n"{quoted}",[{{}}\n')
    (tmp_path / "d.csv").write_text('prompt, completion\n"a, b", "c"\n" d", " e"\n')
    assert records(str(tmp_path / "d.csv")) == [{"prompt": "a, b", "completion": "c"}, {"prompt": " d", "completion": " e"}]
    assert records(str(tmp_path / "a.csv")) == [{"prompt": "a,b", "completion": "c"}]
    assert records(str(tmp_path / "b.tsv")) == [{"prompt": 'a,"b"', "completion": "c"}]
    assert records(str(tmp_path / "c.csv")) == [{"prompt": turns, "completion": "[{}"}]
    (tmp_path / "f.csv").write_text("sep=;\nprompt;completion\na,b;c\nd;e;f\n")
    assert records({"path": str(tmp_path / "f.csv"), "split": "[:1]"}) == [{"prompt": "a,b", "completion": "c"}]
    refuses(str(tmp_path / "f.csv"), r"f\.csv:4: 3 fields")
    (tmp_path / "g.csv").write_text("prompt,completion\na,b\n", encoding="utf-16")
    refuses(str(tmp_path / "g.csv"), r"g\.csv:1: not UTF-8 text: convert it, for example iconv -f UTF-16")
    (tmp_path / "e.csv").write_text('completion,scores\n"[{""a"": 1}]","[{""a"": 1}]"\n')
    assert records(str(tmp_path / "e.csv")) == [{"completion": '[{"a": 1}]', "scores": [{"a": 1}]}], "an answer in JSON"


def test_an_object_that_names_a_column_twice_is_refused(tmp_path: Path) -> None:
    twice = '{"prompt": "a", "completion": "b", "completion": "c"}'
    for name, text in {
        "a.jsonl": f"{LINES.decode()}{twice}\n",
        "a.json": f"[{twice}]",
        "b.jsonl": '{"x": [' + twice + "]}",
    }.items():
        (tmp_path / name).write_text(text)
        refuses(str(tmp_path / name), rf"{name}:\d+: not valid JSON: an object names 'completion' twice")


def test_a_long_json_list_is_read_a_part_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"prompt": "ü" * n, "n": [n, -1.5e300, True, None, {'a\\"': "\u2028]"}]} for n in range(40)]
    path = tmp_path / "a.json"
    path.write_text(json.dumps(rows, indent=1, ensure_ascii=False))
    whole = read(str(path))
    assert [row.record for row in whole] == rows
    asked = list[int]()
    for chunk in (1, 7, 100):
        monkeypatch.setattr(json_rows, "CHUNK", chunk)
        assert read(str(path)) == whole
    grow = json_rows._Window._grow
    monkeypatch.setattr(json_rows._Window, "_grow", lambda self: (asked.append(1), grow(self))[1])
    assert len(read({"path": str(path), "split": "[:2]"})) == 2
    assert len(asked) < 15, "the rest is not read"
    text = json.dumps(rows, indent=1)
    at = text.index('"n": [\n   30,')
    path.write_text(f"{text[:at]}!{text[at:]}")
    line = text.count("\n", 0, at) + 1
    refuses(str(path), rf"a\.json:{line}: not valid JSON: .* at column 3")


@pytest.mark.parametrize("writer", ["new_file", "new_stream"])
def test_arrow_files_are_read_and_a_part_of_one_is_refused(tmp_path: Path, writer: str) -> None:
    table = pa.Table.from_pylist(ROWS)
    path = tmp_path / "a.arrow"
    with getattr(pa.ipc, writer)(str(path), table.schema) as file:
        for batch in table.to_batches(max_chunksize=3):
            file.write_batch(batch)
    rows = read(str(path))
    assert [row.record for row in rows] == ROWS
    assert rows[9].where == f"{path}:10"
    path.write_bytes(path.read_bytes()[:-8])
    refuses(str(path), r"a\.arrow: ")


def test_a_table_with_two_columns_of_one_name_is_refused(tmp_path: Path) -> None:
    table = pa.Table.from_arrays(
        [pa.array(["a"]), pa.array(["b"]), pa.array(["c"])], names=["prompt", "completion", "completion"]
    )
    pq.write_table(table, tmp_path / "a.parquet")
    refuses(str(tmp_path / "a.parquet"), r"a\.parquet: two columns are named 'completion'")


def test_directories_of_save_to_disk_are_read_in_their_order(tmp_path: Path) -> None:
    whole = datasets.Dataset.from_list(ROWS)
    whole.save_to_disk(tmp_path / "one", num_shards=3)
    datasets.DatasetDict(train_sft=whole, test=whole.select([3, 1])).save_to_disk(tmp_path / "two")
    assert records(str(tmp_path / "one")) == ROWS
    assert records(str(tmp_path / "two")) == ROWS
    assert records(str(tmp_path / "two"), "eval") == [ROWS[3], ROWS[1]]
    assert len(records({"path": str(tmp_path / "two"), "split": "train_sft+test[:1]"})) == 11
    refuses({"path": str(tmp_path / "two"), "split": "dev"}, r"no files of split 'dev' \(found: train_sft, test\)")
    state = json.loads((tmp_path / "two" / "test" / "state.json").read_text())
    (tmp_path / "two" / "test" / "state.json").write_text(
        json.dumps({**state, "_indices_files": [{"filename": "indices.arrow"}]})
    )
    refuses({"path": str(tmp_path / "two"), "split": "test"}, "its rows are selected by an index beside them")
    (tmp_path / "one" / "data-00001-of-00003.arrow").unlink()
    refuses(str(tmp_path / "one"), r"its state\.json names data-00001-of-00003\.arrow, which is missing")


def test_the_number_of_a_class_whose_name_is_a_verdict_is_a_label_by_its_name(tmp_path: Path) -> None:
    """`class_encode_column` numbers the words of a column in their alphabetical order: chosen is 0."""
    rows = [{"prompt": "?", "completion": "!", "label": word, "kind": "b"} for word in ("chosen", "rejected", None)]
    whole = datasets.Dataset.from_list(rows).class_encode_column("label").class_encode_column("kind")
    assert whole["label"] == [0, 1, None]
    whole.save_to_disk(tmp_path / "saved")
    whole.to_parquet(tmp_path / "a.parquet")
    for path in (tmp_path / "saved", tmp_path / "a.parquet"):
        one, other, none = read(str(path))
        for row, label in ((one, True), (other, False)):
            again = pickle.loads(pickle.dumps(row))._replace(schemas=False)  # as it is sent to a process
            for each in (row, again, row._replace(record={**row.record, "label": None, "kto_tag": row.record["label"]})):
                assert read_example(each, score="last").numbers() == {"desirable": label}
        assert [one.record["label"], other.record["label"], none.record["label"], one.record["kind"]] == [0, 1, None, 0]


# --- patterns and sums of splits ---------------------------------------------------------------------------------------


def test_a_pattern_names_files(tmp_path: Path) -> None:
    for number, name in enumerate(("part-1.jsonl", "part-0.jsonl", "held_out.jsonl")):
        jsonl(tmp_path / name, ROWS[number : number + 1])
    (tmp_path / "README.md").write_text("about")
    assert records(f"{tmp_path}/part-*.jsonl") == [ROWS[1], ROWS[0]]
    assert len(records(f"{tmp_path}/*")) == 3
    refuses(f"{tmp_path}/*.parquet", r"\*\.parquet: no file matches this pattern")
    for name in ("train", "test"):
        (tmp_path / name).mkdir()
        jsonl(tmp_path / name / "x.jsonl", ROWS[5:6])
    refuses(f"{tmp_path}/t*", "only directories match this pattern")
    refuses(f"{tmp_path}/*/x.jsonl", r"matches files of test, train: narrow the pattern, or write \{path: .*, split: test\}")
    assert records({"path": f"{tmp_path}/**/x.jsonl", "split": "train"}) == [ROWS[5]]
    jsonl(tmp_path / "[a].jsonl", ROWS[:1])
    assert records(f"{tmp_path}/[a].jsonl") == ROWS[:1], "a file of that name comes before a pattern"


def test_a_sum_of_splits_gives_the_rows_of_each(tmp_path: Path) -> None:
    jsonl(tmp_path / "train.jsonl", ROWS[:4])
    jsonl(tmp_path / "validation.jsonl", ROWS[4:])
    assert records({"path": str(tmp_path), "split": "train[:1]+validation[-2:]"}) == [ROWS[0], *ROWS[-2:]]
    assert records({"path": "arithmetic", "split": "eval[:1] + train[:1]"})[0] == records("arithmetic", "eval")[0]
    refuses({"path": str(tmp_path), "split": "train+train"}, "must be a sum of different, named splits")
    refuses({"path": str(tmp_path), "split": "train+[:5]"}, "must be a sum of different, named splits")
    refuses({"path": str(tmp_path), "split": "train+dev"}, "no files of split 'dev'")


# --- what cannot be read -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "ways"),
    [
        ("a.xlsx", r"pandas\.read_excel\(r'.*a\.xlsx'\).*a\.jsonl.*; or read it with a function of yours"),
        ("a.zip", "unzip '.*a.zip' -d '.*a'; or read it"),
        ("a.txt", "convert it.*'text': line.*; or name its kind with format: jsonl if it is one; or read it"),
        (
            "a.foo",
            r"name its kind with format: jsonl \| .*; or read it with .*\{path: .*a.foo, reader: mymodule.read\} and plugins",
        ),
    ],
)
def test_a_file_that_is_not_read_is_told_with_the_ways_that_would_work(tmp_path: Path, name: str, ways: str) -> None:
    (tmp_path / name).write_text("x")
    refuses(str(tmp_path / name), f"{name}: .json, .jsonl, .csv.* files are read, and this is none of them: .*{ways}")


def test_no_mutation_of_any_kind_of_file_is_a_traceback(tmp_path: Path) -> None:
    """Bytes of files of each kind are flipped, removed, doubled and replaced, with a fixed seed."""
    draw, table = random.Random(1), pa.Table.from_pylist(ROWS * 20)
    with pa.ipc.new_stream(str(tmp_path / "whole.arrow"), table.schema) as file:
        file.write_table(table)
    text = "prompt,completion\n" + "".join(f'"{n}, ""é""\n?",{n}\n' for n in range(30))
    whole = {"csv": text.encode(), "tsv": text.replace(",", "\t").encode(), "arrow": (tmp_path / "whole.arrow").read_bytes()}
    whole |= {f"jsonl.{codec}": COMPRESS[codec](LINES) for codec in CODECS}
    refused = 0
    for turn in range(320):
        kind = list(whole)[turn % len(whole)]
        path = tmp_path / f"mutated.{kind}"
        path.write_bytes(mutated(whole[kind], draw))
        try:
            read(str(path))
        except UserError as error:
            refused += 1
            assert str(path) in str(error)  # noqa: PT017  read or refused: either is right
    assert refused > 150


def test_the_manual_names_every_kind_that_is_read() -> None:
    manual = (Path(__file__).parents[2] / "halos" / "data" / "README.md").read_text()
    for kind in (*READERS, *CODECS):
        assert f"`.{kind}`" in manual, kind
