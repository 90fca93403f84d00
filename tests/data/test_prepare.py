import importlib
import json
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from halos.data import compose, row_tokeniser
from halos.data import prepare as room
from halos.data.dataset import Dataset, open_dataset
from halos.data.tokenize import Encoder
from halos.errors import UserError
from halos.losses.csft import examples as csft_examples
from halos.types import Comparison, Demonstration, Judgement, Scored

from .tokenizers import LLAMA3, THINKING, jsonl, prepared, tokenizer, turn

PAIRS = [
    {"prompt": "What is one?", "chosen": "one", "rejected": "two", "margin": 0.5},
    {"prompt": "What is two?", "chosen": "two", "rejected": "five five five"},
    {"prompt": "What is one?", "chosen": "One, and no more.", "rejected": "three"},
]


def words(data: Dataset, row: int) -> list[str]:
    return [tokenizer().decode(each.ids) for each in data[row].completions]


def test_pairs_come_back_as_they_were_written(tmp_path: Path):
    data = prepared(jsonl(tmp_path / "a.jsonl", PAIRS), tmp_path, kind=Comparison)
    assert list(data.labels) == ["margin"]
    assert words(data, 1) == ["two<|im_end|>", "five five five<|im_end|>"]
    assert [item.labels["margin"] for item in data] == [0.5, 0.0, 0.0]
    assert data.groups.tolist() == [0, 1, 0]


def test_whole_columns_agree_with_the_items(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(row_tokeniser, "BATCH", 2)  # so that rows lie in several arrow batches
    data = prepared([jsonl(tmp_path / name, PAIRS) for name in ("a.jsonl", "b.jsonl")], tmp_path, kind=Comparison)
    items = list(data)
    assert len(items) == len(data) == 6
    assert data.prompt_lengths.tolist() == [len(item.prompt) for item in items]
    assert data.lengths.tolist() == [[len(item.prompt) + len(c.ids) for c in item.completions] for item in items]
    assert data.scored.tolist() == [[c.scored.sum() for c in item.completions] for item in items]
    assert data.sources.tolist() == [0, 0, 0, 1, 1, 1]
    assert [item.id for item in items[:2]] == [f"{tmp_path}/a.jsonl:1#0", f"{tmp_path}/a.jsonl:2#0"]
    assert len({item.id for item in items}) == 6
    with pytest.raises(IndexError):
        data[6]


def test_rows_of_one_line_of_json_that_lose_turns_are_not_taken_for_each_other(tmp_path: Path):
    rows = [{"messages": [turn("user", f"{n}? {'more ' * 40}"), turn("assistant", "one"), turn("user", f"{n}!"),
                          turn("assistant", f"two {n}")]} for n in range(3)]  # fmt: skip
    rows.append({"messages": [turn("user", "short?"), turn("assistant", "yes")]})
    (tmp_path / "a.json").write_text(json.dumps(rows))
    data, by_line = (prepared(path, tmp_path, max_length=60, truncation="truncate")
                     for path in (str(tmp_path / "a.json"), jsonl(tmp_path / "a.jsonl", rows)))  # fmt: skip
    assert [data.place(row) for row in range(4)] == [f"{tmp_path}/a.json:1{part}" for part in ("", "[2]", "[3]", "[4]")]
    assert [words(data, row) for row in range(4)] == [["two 0<|im_end|>"], ["two 1<|im_end|>"], ["two 2<|im_end|>"],
                                                      ["yes<|im_end|>"]]  # fmt: skip
    assert (data.content, data.report[0].cut_turns) == (by_line.content, 3)


def test_scored_masks_of_several_turns_are_stored(tmp_path: Path):
    talk = [turn("user", "a"), turn("assistant", "one"), turn("user", "b"), turn("assistant", "two")]
    data = prepared(jsonl(tmp_path / "a.jsonl", [{"messages": talk}]), tmp_path, score="all")
    completion = data[0].completions[0]
    assert tokenizer().decode(completion.ids[completion.scored]) == "one<|im_end|>two<|im_end|>"
    assert data.scored[0, 0] == completion.scored.sum() < len(completion.ids)


def test_a_pair_serves_losses_on_labels_and_on_demonstrations(tmp_path: Path):
    path = jsonl(tmp_path / "a.jsonl", PAIRS[:1])
    labels = prepared(path, tmp_path, kind=Judgement)
    assert [(words(labels, n), labels[n].labels["desirable"]) for n in range(2)] == [
        (["one<|im_end|>"], 1.0),
        (["two<|im_end|>"], 0.0),
    ]
    assert [item.id.rpartition("#")[2] for item in labels] == ["1", "2"]
    assert words(prepared(path, tmp_path, kind=Demonstration), 0) == ["one<|im_end|>"]


def test_completions_that_are_imitated_whatever_their_reward_are_counted(tmp_path: Path):
    rows = [{"prompt": "Q?", "completion": f"A {n}", "reward": n} for n in (1, 0, -5)]
    path = jsonl(tmp_path / "a.jsonl", [*rows, {"prompt": "Q?", "completion": "B"}])
    [line] = prepared(path, tmp_path).lines()
    assert "4 rows, 4 examples kept; 3 with a reward, which is not read: all are imitated (data.filter='reward > 0'" in line
    assert "not read" not in prepared(jsonl(tmp_path / "b.jsonl", rows), tmp_path, kind=Scored).lines()[0]
    [line] = prepared({"path": path, "filter": "reward is None or reward > 0"}, tmp_path).lines()
    assert "2 examples kept" in line


def test_a_completion_of_several_pairs_counts_once_in_its_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(row_tokeniser, "BATCH", 3)  # so that the halves of a pair lie in several batches
    pairs = [{"prompt": "Q?", "chosen": chosen, "rejected": "X"} for chosen in "ABC"]
    (other := pairs[0].copy())["prompt"] = "R?"
    again = {"prompt": "Q?", "completion": "A", "reward": 1}  # a sample that was drawn twice stays
    data = prepared(jsonl(tmp_path / "a.jsonl", [*pairs, other, again, again]), tmp_path, kind=Scored)
    said = [(words(data, row)[0][0], data[row].labels["reward"], int(data.groups[row])) for row in range(len(data))]
    assert said == [("A", 1, 0), ("X", -1, 0), ("B", 1, 0), ("C", 1, 0), ("A", 1, 1), ("X", -1, 1), ("A", 1, 0), ("A", 1, 0)]
    assert "6 rows, 8 examples kept; dropped 2 (2 completions that another pair of their prompt has too)" in data.lines()[0]
    assert len(prepared(jsonl(tmp_path / "b.jsonl", pairs), tmp_path, kind=Judgement)) == 6, "KTO has no groups"


def test_a_tokenizer_without_an_end_token_serves_where_the_template_writes_one(tmp_path: Path):
    without = tokenizer()
    without.eos_token = None
    assert words(prepared(jsonl(tmp_path / "a.jsonl", PAIRS[:1]), tmp_path, tokenizer=without), 0) == ["one<|im_end|>"]


def test_a_transform_rewrites_examples_before_tokenisation(tmp_path: Path):
    signs = partial(csft_examples, desirable_token="<|good|>", undesirable_token="<|bad|>")
    path = jsonl(tmp_path / "a.jsonl", PAIRS[:1])
    data = prepared(path, tmp_path, kind=Judgement, transform=signs, transform_key="csft")
    assert not data.labels
    assert [words(data, n) for n in range(2)] == [["<|good|>one<|im_end|>"], ["<|bad|>two<|im_end|>"]]
    assert list(prepared(path, tmp_path, kind=Judgement).labels) == ["desirable"], "the key tells them apart"


def test_another_transform_by_the_same_name_makes_other_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A loss of this package is no plugin, whose code the key would have, and an update may change it."""
    monkeypatch.syspath_prepend(str(tmp_path))
    path, module = jsonl(tmp_path / "a.jsonl", PAIRS[:1]), tmp_path / "lossofmine.py"
    for sign in ("<|good|>", "<|bad|>"):
        module.write_text(
            "from dataclasses import replace\n\ndef examples(row, **settings):\n"
            f"    return replace(row, completion=({{**row.completion[0], 'content': {sign!r}}},))\n"
        )
        monkeypatch.delitem(sys.modules, "lossofmine", raising=False)
        importlib.invalidate_caches()
        transform = partial(importlib.import_module("lossofmine").examples, beta=1)
        assert words(prepared(path, tmp_path, kind=Judgement, transform=transform, transform_key="mine"), 0) == [
            f"{sign}<|im_end|>"
        ]
    monkeypatch.delitem(sys.modules, "lossofmine")


def test_every_dropped_or_shortened_row_is_counted(tmp_path: Path):
    rows = [
        {"prompt": "What is one?", "completion": "one", "label": True},
        {"prompt": "What is one?", "completion": "two", "label": False},
        {"prompt": "What is two?", "completion": "five " * 60, "label": True},
        {"prompt": "one " * 99, "completion": "five", "label": True},
    ]
    path = jsonl(tmp_path / "a.jsonl", rows)
    report = prepared(path, tmp_path, max_length=60).report[0]
    assert (report.rows, report.kept) == (4, 1)
    assert report.dropped == {
        "undesirable, not to be imitated": 1,
        "longer than max_length": 1,
        "with a prompt that fills max_length": 1,
    }
    data = prepared(path, tmp_path, max_length=60, truncation="truncate")
    assert (data.report[0].kept, data.report[0].cut_completions) == (2, 1)
    assert "4 rows, 2 examples kept; dropped 2 (1 und" in data.lines()[0]
    assert "1 completions cut" in data.lines()[0]


def test_rows_that_do_not_continue_the_generation_prompt_are_counted(tmp_path: Path):
    data = prepared(jsonl(tmp_path / "a.jsonl", PAIRS), tmp_path, kind=Comparison, tokenizer=tokenizer(THINKING))
    assert data.report[0].inexact == 3
    assert "3 do not continue the template's generation prompt" in data.lines()[0]


def test_a_source_without_any_kept_row_is_an_error(tmp_path: Path):
    path = jsonl(tmp_path / "a.jsonl", PAIRS)
    with pytest.raises(UserError, match=r"a\.jsonl: 3 rows, 0 examples kept; dropped 3.*none of them can be used"):
        prepared(path, tmp_path, max_length=4)
    with pytest.raises(UserError, match=r"data\.train: no entry"):
        prepared([], tmp_path)


# --- the cache ---------------------------------------------------------------------------------------------------------


def test_rows_are_tokenised_only_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = jsonl(tmp_path / "a.jsonl", PAIRS)
    first = prepared(path, tmp_path, kind=Comparison)

    def must_not_run(*_: object) -> None:
        raise AssertionError("tokenised twice")

    monkeypatch.setattr(Encoder, "encode", must_not_run)
    again = prepared(path, tmp_path, kind=Comparison)
    assert [item.id for item in again] == [item.id for item in first]
    jsonl(tmp_path / "a.jsonl", PAIRS[:2])
    with pytest.raises(AssertionError, match="tokenised twice"):
        prepared(path, tmp_path, kind=Comparison)


@pytest.mark.parametrize("name", ["rows.arrow", "meta.json"])
def test_damaged_tokenised_rows_are_written_again(name: str, tmp_path: Path):
    source = jsonl(tmp_path / "a.jsonl", PAIRS)
    before = [item.prompt.tolist() for item in prepared(source, tmp_path, kind=Comparison)]
    (path,) = (tmp_path / "data").glob(f"*/{name}")
    whole = path.read_bytes()
    for at in range(9, len(whole), max(1, len(whole) // 8)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        again = prepared(source, tmp_path, kind=Comparison)
        assert [item.prompt.tolist() for item in again] == before
        assert path.read_bytes() == whole
    path.write_bytes(b"")
    assert len(prepared(source, tmp_path, kind=Comparison)) == len(before)


def test_everything_that_decides_the_ids_is_part_of_the_key(tmp_path: Path):
    path = jsonl(tmp_path / "a.jsonl", PAIRS)
    grown = tokenizer()
    grown.add_tokens(["<|new|>"], special_tokens=True)
    splits = tokenizer()
    splits.split_special_tokens = True
    changes = [
        {},
        {"max_length": 100},
        {"truncation": "truncate"},
        {"score": "all"},
        {"kind": Comparison},
        {"kind": Judgement},
        {"transform_key": "x"},
        {"purpose": "eval"},
        {"tokenizer": tokenizer(LLAMA3)},
        {"tokenizer": tokenizer(eos="<|im_end|>")},
        {"tokenizer": grown},
        {"tokenizer": splits},
        {"lost": "drop"},
    ]
    settings = {"max_length": 200, "truncation": "drop", "score": "last", "cache_dir": tmp_path, "kind": Demonstration}
    made = tokenizer()
    paths = [room.prepare([path], **{**settings, "tokenizer": made, **change}) for change in changes]
    paths.append(room.prepare([{"path": path, "weight": 2}], **{**settings, "tokenizer": made}))
    paths.append(room.prepare([{"path": path, "split": "[:2]"}], **{**settings, "tokenizer": made}))
    assert len(set(paths)) == len(changes) + 2
    amounts = [{}, {"count": 3}, {"count": 4}, {"epochs": 3}, {"epochs": 4}, {"weight": 3}]
    drawn = [room.prepare([{"path": path, **amount}], **{**settings, "tokenizer": made}) for amount in amounts]
    assert len({Dataset(each).content for each in drawn}) == len(amounts), "which a resume compares"
    made("some text", padding="max_length", truncation=True, max_length=5)
    assert room.prepare([path], **{**settings, "tokenizer": made}) == paths[0], "what a tokenizer was used for before is not"


def test_a_run_that_fails_leaves_nothing_behind(tmp_path: Path):
    path = jsonl(tmp_path / "a.jsonl", [*PAIRS, {"prompt": "a"}])
    with pytest.raises(UserError, match=r"a\.jsonl:4"):
        prepared(path, tmp_path / "cache", kind=Comparison)
    assert list((tmp_path / "cache" / "data").iterdir()) == []


def test_a_second_process_uses_the_result_of_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = jsonl(tmp_path / "a.jsonl", PAIRS)
    write, other = compose.write, tmp_path / "other"

    def overtaken(directory: Path, *rest: Any) -> None:
        write(directory, *rest)
        if not list((tmp_path / "data").glob("[!.]*")):  # another process finishes first
            finished = directory.with_name(directory.name[1:].rpartition("-")[0])
            write(other, *rest)
            other.rename(finished)

    other.mkdir()
    monkeypatch.setattr(compose, "write", overtaken)
    assert len(prepared(path, tmp_path, kind=Comparison)) == 3
    assert len(list((tmp_path / "data").iterdir())) == 1, "the loser's copy is gone"


def test_two_concurrent_processes_both_get_the_rows(tmp_path: Path):
    path = jsonl(tmp_path / "a.jsonl", PAIRS * 50)
    with ThreadPoolExecutor(2) as pool:
        found = [pool.submit(prepared, path, tmp_path, kind=Comparison) for _ in range(2)]
        assert [len(each.result()) for each in found] == [150, 150]
    assert len(list((tmp_path / "data").iterdir())) == 1


def test_nothing_in_the_cache_is_pickled(tmp_path: Path):
    path = room.prepare(
        [jsonl(tmp_path / "a.jsonl", PAIRS)],
        kind=Comparison,
        tokenizer=tokenizer(),
        max_length=200,
        truncation="drop",
        score="last",
        cache_dir=tmp_path,
    )
    assert sorted(file.name for file in path.iterdir()) == ["meta.json", "rows.arrow"]
    for file in path.iterdir():
        with pytest.raises((pickle.UnpicklingError, KeyError, ValueError, EOFError)):
            pickle.loads(file.read_bytes())
    assert isinstance(open_dataset(path)[0].prompt, np.ndarray)


def test_neither_writing_nor_reading_imports_pandas(tmp_path: Path):
    path = jsonl(tmp_path / "a.jsonl", PAIRS)
    code = f"""
import sys
from pathlib import Path
from halos.types import Comparison
from tests.data.tokenizers import prepared
assert prepared({path!r}, Path({str(tmp_path)!r}), kind=Comparison)[2].id
sys.exit("pandas" in sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


def test_an_unwritable_cache_is_a_user_error(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cache_dir="):
        prepared(jsonl(tmp_path / "a.jsonl", PAIRS), tmp_path / "file")


def test_a_masked_sample_is_counted_as_one_that_is_not_imitated(tmp_path: Path):
    row = {"type": "scalar_feedback", "prompt": "One?", "output": "one", "reward": 1}
    path = jsonl(tmp_path / "a.jsonl", [row, {**row, "masked": True}])
    data = prepared(path, tmp_path, kind=Demonstration)
    assert data.lines() == [
        f"{path}: 2 rows, 1 examples kept; dropped 1 (1 masked or empty, not to be imitated); 1 {row_tokeniser.IMITATED}"
    ]


def test_text_as_it_is_ends_with_one_end_token_and_its_special_tokens_are_counted(tmp_path: Path):
    rows = [{"text": text} for text in ("one</s>\n", "two", "three <|im_end|> four", "five</s>")]
    data = prepared(jsonl(tmp_path / "a.jsonl", rows), tmp_path, kind=Demonstration)
    made = tokenizer()
    texts = [made.decode(data[n].completions[0].ids) for n in range(len(data))]
    assert texts == ["one</s>", "two</s>", "three <|im_end|> four</s>", "five</s>"]
    assert [line for line in data.lines() if "have the text of a special token in their words (<|im_end|>)" in line]
