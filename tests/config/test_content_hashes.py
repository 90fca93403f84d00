"""Comparison of two records of a run's inputs: differences are named, and what one of them lacks is not compared."""

from typing import Any

from halos.config.content_hashes import ContentHashes, compare

SOURCE: dict[str, Any] = {"path": "a.jsonl", "hash": "train 1111"}


def told(before: ContentHashes, now: ContentHashes, **places: str) -> list[tuple[str, Any, Any]]:
    return [(change.key, change.old, change.new) for change in compare(before, now, places)]


def test_an_added_or_removed_input_is_a_change_and_an_unrecorded_one_is_none() -> None:
    one, other = ContentHashes({"peft.init_from": None}), ContentHashes({"peft.init_from": "abc", "model.tokenizer": "new"})
    assert told(one, other, peft="adapter") == [("peft.init_from adapter (content)", "none", "abc")]
    assert told(other, ContentHashes({"peft.init_from": None, "model.tokenizer": "new"})) == [
        ("peft.init_from (content)", "abc", "none")
    ]


def test_changed_rows_are_attributed_to_the_file_that_changed() -> None:
    rows, second = {"data.train": "rows"}, {"path": "b.jsonl", "hash": "2222"}
    before = ContentHashes(rows, {"train": [SOURCE, second]})
    now = ContentHashes({"data.train": "others"}, {"train": [SOURCE, {**second, "hash": "3333"}]})
    assert told(before, now) == [("data.train b.jsonl (content)", "2222", "3333")]
    assert told(before, ContentHashes(rows, now.sources)) == [], "other bytes, and the same rows of them"
    [change] = compare(before, ContentHashes({"data.train": "others"}, before.sources), {})
    assert (change.key, change.old, change.new) == ("data.train (content)", "rows", "others")
    assert "its files are the same" in (change.why or "")


def test_an_older_record_is_compared_by_its_sources() -> None:
    before = ContentHashes({"model.weights": "w"}, {"train": [SOURCE]})
    assert told(before, ContentHashes({"data.train": "rows"}, {"train": [SOURCE]})) == []
    more = ContentHashes({"data.train": "rows"}, {"train": [SOURCE, SOURCE]})
    assert told(before, more) == [("data.train (number of sources)", 1, 2)]
