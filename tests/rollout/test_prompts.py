"""No prompt is used twice before all were used once, whatever the size of a round."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from halos.errors import UserError
from halos.rollout.prompts import digest, drawn_after, eval_prompts, read_prompts, unused_rows
from halos.rollout.types import Prompt, requests_for

ROWS = [Prompt(str(n), ({"role": "user", "content": str(n)},)) for n in range(10)]


def ids(prompts: list[Prompt]) -> list[str]:
    return [prompt.id for prompt in prompts]


def test_no_prompt_comes_again_before_all_have() -> None:
    rounds = [ids(drawn_after(ROWS, 4 * k, count=4, samples=2, seed=0)) for k in range(5)]
    assert len(set(rounds[0] + rounds[1])) == 8
    assert sorted(name for names in rounds for name in names) == sorted(ids(ROWS) * 2)
    assert rounds != [ids(drawn_after(ROWS, 4 * k, count=4, samples=2, seed=1)) for k in range(5)]
    assert rounds[3] == ids(drawn_after(ROWS, 12, count=4, samples=9, seed=0)), "it does not depend on what was drawn before"
    assert rounds[0] + rounds[1] == ids(drawn_after(ROWS, 0, count=8, samples=2, seed=0)), "nor on how many at once"


def test_a_round_larger_than_the_data_has_each_prompt_once() -> None:
    assert sorted(ids(drawn_after(ROWS, 10, count=99, samples=2, seed=0))) == sorted(ids(ROWS))


def test_evaluation_prompts_are_answered_once_and_greedily() -> None:
    rows = eval_prompts(ROWS, count=3, seed=0)
    assert [(row.samples, row.temperature, row.split) for row in rows] == [(1, 0.0, "eval")] * 3


def test_several_answers_have_seeds_of_their_own_the_same_in_every_round(tmp_path: Path) -> None:
    held_out = eval_prompts(ROWS, count=3, seed=0, samples=2, temperature=0.7)
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(prompt.to_row()) + "\n" for prompt in held_out))
    again = read_prompts([str(tmp_path / "prompts.jsonl")], "train")
    assert again == held_out, "as a stage of a round reads them"

    def seeds(prompts: list[Prompt], seed: int) -> set[int]:
        return {each.seed for each in requests_for(prompts, samples=9, temperature=1.0, max_new_tokens=4, seed=seed)}

    assert len(seeds(held_out, 0)) == 6
    assert seeds(held_out, 0) == seeds(again, 1_000_003), "whatever the round's seed"
    same_ids = [replace(prompt, samples=2, temperature=None, seed=None, split="train") for prompt in held_out]
    assert not seeds(held_out, 0) & {seed for number in range(500) for seed in seeds(same_ids, number)}
    assert seeds(held_out, 0) != seeds(eval_prompts(ROWS, count=3, seed=1, samples=2, temperature=0.7), 0)


def test_rows_of_one_prompt_are_one_and_answers_come_along(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    rows = [{"prompt": "One?", "completion": "1"}, {"prompt": "Two?", "answer": "2"}, {"prompt": "One?", "completion": "one"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = read_prompts([str(path)], "train")
    assert [(row.turns[0]["content"], row.columns["solution"]) for row in found] == [("One?", "1"), ("Two?", "2")]
    assert found[0].id.endswith("a.jsonl:1")


def test_rows_that_give_no_prompt_are_counted_by_why(tmp_path: Path) -> None:
    path, unused = tmp_path / "a.jsonl", Counter[str]()
    rows = [{"prompt": f"{n // 2}?", "answer": "1", "level": n % 3} for n in range(9)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert len(read_prompts([{"path": str(path), "filter": "level > 0"}], "train", unused=unused)) == 5
    repeated = "of data.train with the prompt of an earlier row"
    assert unused_rows(unused) == f"; 3 rows of data.train filtered out by level > 0; 1 row {repeated}"
    assert unused_rows({repeated: 0}) == ""


def test_rows_without_a_prompt_and_shared_ids_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "One?"}\n')
    with pytest.raises(UserError, match=r"a.jsonl:1: columns found: text"):
        read_prompts([str(path)], "train")
    path.write_text('{"prompt_id": 1, "prompt": "One?"}\n{"prompt_id": 1, "prompt": "Two?"}\n')
    with pytest.raises(UserError, match="two prompts have the prompt_id '1'"):
        read_prompts([str(path)], "train")


def test_a_file_of_prompts_is_what_it_was_and_read_again_gives_the_same(tmp_path: Path) -> None:
    """To the byte, and with its hash, which runs that were begun before compare."""
    asked = Prompt("a", ({"role": "user", "content": "1 + 1?"},), columns={"solution": "2"})
    written = [*drawn_after([asked], 0, count=1, samples=4, seed=0), *eval_prompts([asked], count=1, seed=0)]
    assert [json.dumps(prompt.to_row()) for prompt in written] == [
        '{"type": "prompt", "prompt_id": "a", "prompt": [{"role": "user", "content": "1 + 1?"}], "solution": "2",'
        ' "samples": 4, "split": "train"}',
        '{"type": "prompt", "prompt_id": "a", "prompt": [{"role": "user", "content": "1 + 1?"}], "solution": "2",'
        ' "samples": 1, "temperature": 0.0, "split": "eval"}',
    ]
    assert digest([asked]) == "0e442f60a4442da614985c76ba0e07ba482c0ba6ef1c7073be818ec5730369ea"
    (tmp_path / "prompts.jsonl").write_text(json.dumps(written[1].to_row()) + "\n")
    assert read_prompts([str(tmp_path / "prompts.jsonl")], "train") == [written[1]]


@pytest.mark.parametrize("named", [{}, {"prompt_id": "p"}], ids=["by file and line", "by the data"])
def test_a_prompt_of_both_training_and_evaluation_is_in_a_round_twice(named: dict[str, str], tmp_path: Path) -> None:
    path, round_file = tmp_path / "a.jsonl", tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"prompt": "One?", **named}) + "\n")
    train = read_prompts([str(path)], "train")
    held_out = read_prompts([str(path)], "eval", others=ids(train))
    both = [*drawn_after(train, 0, count=1, samples=2, seed=0), *eval_prompts(held_out, count=1, seed=0)]
    round_file.write_text("".join(json.dumps(prompt.to_row()) + "\n" for prompt in both))
    name = named.get("prompt_id", "a.jsonl:1")
    again = read_prompts([str(round_file)], "train")
    assert [(prompt.id, prompt.split) for prompt in again] == [(name, "train"), (f"{name}~2", "eval")]


def test_a_row_that_is_nested_too_deeply_is_refused_by_name(tmp_path: Path) -> None:
    deep = '[{"name":' * 300 + "1" + "}]" * 300
    (path := tmp_path / "a.jsonl").write_text(f'{{"prompt": "One?", "tools": {deep}}}\n')
    with pytest.raises(UserError, match=r"a\.jsonl:1: its columns are nested too deeply to be read"):
        read_prompts([str(path)], "train")
