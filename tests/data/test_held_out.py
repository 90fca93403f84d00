"""Rows held out of the training data by the content of their prompts; similar prompts are on one side."""

import hashlib
import random
from collections.abc import Iterable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from halos.data import near_duplicates
from halos.data.dataset import Dataset, open_dataset
from halos.data.held_out import Rule, Side, Sides, prompt_text
from halos.data.near_duplicates import HASHES, NearDuplicates, rows_of_band, shingles, signature, similarity
from halos.data.prepare import prepare
from halos.errors import UserError
from halos.examples import Comparison, Demonstration
from tests.data.tokenizers import jsonl, says, tokenizer, turn, user

HALF = Rule(0.5, 0.8)
TAIL = "and seven more words that are always the same here"


def texts(side: Side, words: str = TAIL) -> Iterator[str]:
    """Texts whose own hash puts them on a side, of an even split: the first bit of it decides."""
    for number in count():
        text = f"item {number} {words}"
        if (hashlib.blake2b(text.encode(), digest_size=16).digest()[0] < 128) == (side == Side.EVAL):
            yield text


# --- similarity --------------------------------------------------------------------------------------------------------


def test_similarity_is_that_of_the_sets_of_three_words_in_a_row():
    one, other = "a b c d e", "a b c d f"  # abc bcd cde; abc bcd cdf: two of four
    assert similarity(shingles(one), shingles(other)) == 0.5
    assert similarity(shingles(one), shingles("A, B; c d -- e!".casefold())) == 1.0, "words, without marks"
    assert similarity(shingles("a b c a b c"), shingles("a b c")) == 1 / 3  # abc bca cab
    assert similarity(shingles("a b"), shingles("a b")) == 1.0
    assert similarity(shingles("a b"), shingles("b a")) == 0.0
    assert similarity(shingles("猫は好きです"), shingles("猫は好きだ")) == 2 / 5, (
        "a character each: 猫は好 は好き 好きで きです; 猫は好 は好き 好きだ"
    )


def test_the_similarity_of_long_texts_is_estimated_from_a_part(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(near_duplicates, "SKETCH", 4)
    one, other = np.array([1, 3, 5, 7], np.uint64), np.array([2, 3, 7, 9], np.uint64)  # the four smallest of each
    assert similarity(one, other) == 1 / 4  # 1 2 3 5 are the smallest of both together, and 3 is in both


def test_signatures_agree_in_as_many_places_as_sets_are_similar():
    words = [f"w{number}" for number in range(3000)]
    one, other = " ".join(words[:2000]), " ".join(words[1000:])
    share = (signature(shingles(one)) == signature(shingles(other))).mean()
    assert abs(share - 1 / 3) < 4 * np.sqrt(2 / 9 / HASHES)


def test_a_band_has_as_many_hashes_as_find_what_is_similar_enough():
    # 64 hashes: 1 - (1 - 0.8^4)^16 = 0.9998, and of five 1 - (1 - 0.8^5)^12 = 0.9915
    assert rows_of_band(0.8) == 4
    assert rows_of_band(1.0) == HASHES
    assert rows_of_band(0.01) == 1


def test_all_pairs_that_are_similar_are_found_and_no_others():
    drawn = random.Random(0)
    words = [f"w{number}" for number in range(500)]
    base = [drawn.choices(words, k=drawn.randint(3, 60)) for _ in range(60)]
    every = [" ".join(drawn.choice(words) if drawn.random() < share else word for word in text)
             for text in base for share in (0, 0.02, 0.05, 0.1)]  # fmt: skip

    sets = [{tuple(text.split()[n : n + 3]) for n in range(len(text.split()) - 2)} for text in every]

    def exact(one: int, other: int) -> float:
        return len(sets[one] & sets[other]) / len(sets[one] | sets[other])

    for threshold in (0.5, 0.8, 1.0):
        near, found, wanted = NearDuplicates(threshold), list[bool](), list[bool]()
        for number, text in enumerate(every):
            described = near.describe(text)
            found.append(near.has_similar(described, number % 2) or near.has_similar(described, 1 - number % 2))
            near.add(described, number % 2)
            wanted.append(any(exact(number, earlier) >= threshold for earlier in range(number)))
        assert found == wanted
        assert 0 < sum(wanted) < len(every)


# --- sides -------------------------------------------------------------------------------------------------------------


def test_a_prompt_is_on_the_side_of_its_hash_whatever_comes_with_it():
    trained, held_out = (next(texts(side)) for side in (Side.TRAIN, Side.EVAL))
    for rule in (HALF, Rule(0.5, None)):
        assert Sides(rule).side(trained) == Side.TRAIN
        assert Sides(rule).side(held_out) == Side.EVAL
    drawn = [hashlib.blake2b(f"{number}".encode()).hexdigest() for number in range(2000)]
    found = {text: Sides(Rule(0.1, None)).side(text) for text in drawn}
    assert abs(sum(found.values()) - 200) < 4 * np.sqrt(2000 * 0.1 * 0.9)
    other = Sides(Rule(0.1, None))
    assert {text: other.side(text) for text in reversed(drawn)} == found
    wider = {text: Sides(Rule(0.3, None)).side(text) for text in drawn}
    assert all(wider[text] == Side.EVAL for text in drawn if found[text] == Side.EVAL), "more are held out, and none comes back"


def test_a_similar_prompt_is_where_the_first_is_and_one_between_the_sides_is_on_none():
    long = " ".join(f"w{number}" for number in range(40))
    sides, (first, *others) = Sides(HALF), [f"{long} {end}" for end in "abcdefgh"]
    side = sides.side(first)
    assert side in (Side.TRAIN, Side.EVAL)
    assert {sides.side(each) % 2 for each in others} == {side}, "38 of 40 groups of three words are the same"
    assert {sides.side(each) for each in others} == {side, Side(side + 2)}, "some have the other side's hash, and are counted"
    assert sides.side(others[0]) == sides.side(others[0])
    words = [f"w{number}" for number in range(60)]  # 58 groups of three: with six other words at one end 52, of 64 together
    left, right = " ".join([*(f"x{n}" for n in range(6)), *words[6:]]), " ".join([*words[:54], *(f"y{n}" for n in range(6))])
    assert similarity(shingles(left), shingles(right)) < 0.7 < 0.8 < similarity(shingles(left), shingles(" ".join(words)))
    for number in count():  # until the two ends are on different sides
        ends = f"{left} {number}", f"{right} {number}"
        bridged = Sides(HALF)
        if {bridged.side(each) for each in ends} == {Side.TRAIN, Side.EVAL}:
            break
    assert bridged.side(" ".join(words)) == Side.NEITHER
    assert Sides(Rule(0.5, None)).side(" ".join(words)) in (Side.TRAIN, Side.EVAL)


def test_the_words_of_a_prompt_are_without_system_turns_case_and_blanks():
    shared = turn("system", "Be brief.")
    assert prompt_text(Demonstration((shared, user("What  is\nONE?")), (says("1"),))) == "what is one?"
    assert prompt_text(Demonstration((user("A"), says("b"), user("C")), (says("d"),))) == "a b c"
    assert prompt_text(Demonstration((), (turn("text", "Just TEXT"),))) == "just text"


# --- data sets ---------------------------------------------------------------------------------------------------------


def both(paths: list[Any], cache: Path, rule: Rule, *, evaluated: Iterable[Any] = (), kind: Any = Comparison) -> list[Dataset]:
    settings: dict[str, Any] = {"max_length": 200, "truncation": "drop", "score": "last", "tokenizer": tokenizer(), "kind": kind}
    settings |= {"cache_dir": cache, "rule": rule}
    return [open_dataset(prepare(paths, **settings)),
            open_dataset(prepare([*evaluated], purpose="eval", train=paths, **settings))]  # fmt: skip


def pair(prompt: str, number: int = 0) -> dict[str, str]:
    return {"prompt": prompt, "chosen": f"one {number}", "rejected": f"no {number}"}


def places(data: Dataset) -> list[str]:
    return [data.place(row).rpartition("/")[2] for row in range(len(data))]


def test_rows_are_trained_on_or_held_out_and_all_are_counted(tmp_path: Path):
    trained, held_out = texts(Side.TRAIN, "?"), texts(Side.EVAL, "?")
    t, e = [next(trained) for _ in range(3)], [next(held_out) for _ in range(2)]
    rows = [pair(t[0]), pair(e[0]), pair(t[1]), pair(e[0].upper(), 1), pair(f" {t[0]} ", 2), pair(e[1]), pair(t[2])]
    path, more = jsonl(tmp_path / "a.jsonl", rows), jsonl(tmp_path / "b.jsonl", [pair(t[0], 3), pair(e[0], 4)])
    one, other = both([path, {"path": more, "weight": 2}], tmp_path, HALF, evaluated=[jsonl(tmp_path / "c.jsonl", [pair("C?")])])
    assert places(one) == ["a.jsonl:1", "a.jsonl:3", "a.jsonl:5", "a.jsonl:7", "b.jsonl:1"]
    assert places(other) == ["c.jsonl:1", "a.jsonl:2", "a.jsonl:4", "a.jsonl:6", "b.jsonl:2"]
    assert other.names == ("c", "a", "b")
    assert other.sources.tolist() == [0, 1, 1, 1, 2]
    assert one.lines()[0].endswith("a.jsonl: 7 rows, 4 examples kept; 3 held out for evaluation")
    assert other.lines()[1].endswith("a.jsonl: 3 rows, 3 examples kept")
    grown = jsonl(tmp_path / "a.jsonl", [*rows, *(pair(f"{word} grew", n) for n, word in enumerate(("this", "that", "it")))])
    after, held = both([grown, {"path": more, "weight": 2}], tmp_path, HALF)
    assert [place for place in places(after) if int(place.rpartition(":")[2]) <= 7] == places(one), (
        "rows that are added move none"
    )
    assert len(after) + len(held) == 12


def test_near_duplicates_are_counted_and_a_key_turns_them_off(tmp_path: Path):
    tail = " ".join(
        f"w{number}" for number in range(20)
    )  # "item 1" before it changes 2 of 20 groups of three: 18 of 22 are equal
    trained, held_out, other = texts(Side.TRAIN, tail), texts(Side.EVAL, tail), texts(Side.EVAL, "?")
    t, e, far = [next(trained) for _ in range(3)], [next(held_out) for _ in range(3)], next(other)
    path = jsonl(tmp_path / "a.jsonl", [pair(t[0]), pair(e[0]), pair(e[1]), pair(far)])
    one, held = both([path], tmp_path, HALF)
    assert (places(one), places(held)) == (["a.jsonl:1", "a.jsonl:2", "a.jsonl:3"], ["a.jsonl:4"])
    assert "; 2 near duplicates of earlier prompts, which are trained on" in one.lines()[0]
    one, held = both([path], tmp_path, Rule(0.5, None))
    assert (places(one), places(held)) == (["a.jsonl:1"], ["a.jsonl:2", "a.jsonl:3", "a.jsonl:4"])
    path = jsonl(tmp_path / "b.jsonl", [pair(e[2]), pair(t[1]), pair(next(texts(Side.TRAIN, "?"))), pair(t[1], 1)])
    one, held = both([path], tmp_path, HALF)
    assert (places(one), places(held)) == (["b.jsonl:3"], ["b.jsonl:1", "b.jsonl:2", "b.jsonl:4"])
    assert (
        "1 held out for evaluation; 2 held out for evaluation, as near duplicates of earlier prompts that are" in one.lines()[0]
    )


def test_data_of_which_nothing_is_held_out_are_refused(tmp_path: Path):
    path = jsonl(tmp_path / "a.jsonl", [pair(next(texts(Side.TRAIN)))])
    with pytest.raises(UserError, match=r"data\.eval_fraction holds none of the rows of data\.train out: increase it"):
        both([path], tmp_path, HALF)


def test_a_row_that_is_nested_too_deeply_is_refused_by_name(tmp_path: Path) -> None:
    deep: Any = 1
    for _ in range(300):
        deep = [{"name": deep}]
    path = jsonl(tmp_path / "a.jsonl", [{**pair("One?"), "tools": deep}])
    with pytest.raises(UserError, match=r"a\.jsonl:1: its columns are nested too deeply to be read"):
        both([path], tmp_path, HALF)
