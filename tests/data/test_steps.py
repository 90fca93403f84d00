"""Steps with labels: rows of TRL's form, the tokens that end steps, and what becomes of them at max_length."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from halos.data.formats import as_kind, read_example
from halos.data.row import Row
from halos.errors import UserError
from halos.losses.prm import examples
from halos.types import Comparison, Demonstration, Judgement, Stepwise
from tests.data.tokenizers import jsonl, prepared, says, tokenizer, user

ROW: dict[str, Any] = {"prompt": "Add 1 and 2, then 3.", "completions": ["1 + 2 = 3.", "So it is 5."], "labels": [True, 0.25]}


def read(**changed: Any) -> Stepwise:
    example = read_example(Row({**ROW, **changed}, "a.jsonl:4"), score="last")
    assert isinstance(example, Stepwise)
    return example


def test_a_row_in_trls_form_is_a_completion_in_steps() -> None:
    assert read() == Stepwise((user(ROW["prompt"]),), (says("1 + 2 = 3."), says("So it is 5.")), (1.0, 0.25))
    assert read(prompt=[user("Q")], labels=[0, "1"]) == Stepwise((user("Q"),), read().steps, (0.0, 1.0))


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"labels": [True]}, "1 labels for 2 steps: each step has one"),
        ({"labels": [True, 1.5]}, r"labels\[1\] is 1.5: a step's label is true, false, or a number from 0 to 1"),
        ({"labels": [True, -1]}, r"labels\[1\] is -1: "),
        ({"labels": [None, True]}, r"labels\[0\] is None: "),
        ({"labels": [float("nan"), 1]}, r"labels\[0\] is nan: "),
        ({"labels": "10"}, "labels is '10', not a list with a label for each step"),
        ({"completions": ["1 + 2 = 3.", " "]}, r"completions\[1\] is ' ': a step without words"),
        ({"completions": [], "labels": []}, "completions is empty: there is no step"),
        ({"completions": "1 + 2 = 3."}, "completions is '1 [+] 2 = 3.', not a list of steps, each of them text"),
        ({"completions": [says("x"), says("y")]}, "completions is .*, not a list of steps, each of them text"),
        ({"reward": 1.0}, "The row is read as prompt [+] completions [+] labels, so 'reward' would be lost"),
    ],
)
def test_what_is_no_completion_in_steps_is_refused_with_its_row(changed: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=f"^a.jsonl:4: .*{said}"):
        read(**changed)


def test_steps_train_nothing_else_and_a_labelled_completion_is_one_step() -> None:
    row = Row(ROW, "a.jsonl:4")
    with pytest.raises(UserError, match=r"a\.jsonl:4: columns found: .* can train only losses on steps, such as prm; the loss"):
        as_kind(read(), Demonstration, row)
    question, good, bad = (user("Q"),), (says("yes"),), (says("no"),)
    one = [Stepwise(question, good, (1.0,)), Stepwise(question, bad, (0.0,))]
    assert as_kind(Comparison(question, good, bad), Stepwise, row) == one
    assert as_kind(Judgement(question, bad, False), Stepwise, row) == one[1:]
    with pytest.raises(UserError, match="the loss of this run learns from steps with labels"):
        as_kind(Judgement(question, (*good, user("And?"), *good), True), Stepwise, row)


def test_of_the_last_step_alone_a_label_is_learned() -> None:
    assert examples(read(), separator=" ;", last_step_only=False) == Stepwise(read().prompt, read().steps, (1.0, 0.25), " ;")
    assert examples(read(), separator="\n", last_step_only=True).step_labels == (None, 0.25)


@pytest.mark.parametrize("separator", ["\n", " ки"])
def test_every_step_ends_in_a_token_of_its_own_and_the_ids_are_those_of_its_parts(separator: str, tmp_path: Path) -> None:
    words, rows = tokenizer(), [ROW, {**ROW, "completions": ["One.\n", "  Two\n"], "labels": [0.5, True]}]
    data = prepared(
        jsonl(tmp_path / "a.jsonl", rows), tmp_path, kind=Stepwise, transform_key=separator,
        transform=lambda row: examples(row, separator=separator, last_step_only=False),
    )  # fmt: skip

    def ids(text: str) -> list[int]:
        return words(text, add_special_tokens=False)["input_ids"]

    for item, row in zip(data, rows, strict=True):
        prompt = words.apply_chat_template([user(row["prompt"])], tokenize=False, add_generation_prompt=True)
        parts = [ids(step) + ids(separator) for step in row["completions"]]
        assert item.prompt.tolist() == ids(prompt)
        (completion,) = item.completions
        assert completion.ids.tolist() == [each for part in parts for each in part]
        ends = np.cumsum([len(part) for part in parts]) - 1
        assert np.flatnonzero(completion.scored).tolist() == ends.tolist()
        assert item.step_labels is not None
        assert item.step_labels.tolist() == [float(label) for label in row["labels"]]
    assert not data.report[0].oddities
    assert data.scored.tolist() == [[2], [2]]


def test_without_a_template_the_tokens_are_those_of_trl(tmp_path: Path) -> None:
    """A BOS, the prompt's, and for each step its own and the separator's (PRMTrainer.tokenize_row of TRL 0.24)."""
    words = tokenizer("{{ bos_token }}{% for turn in messages %}{{ turn.content }}{% endfor %}", bos=True)

    def ids(text: str) -> list[int]:
        return words(text, add_special_tokens=False)["input_ids"]

    (item,) = prepared(jsonl(tmp_path / "a.jsonl", [ROW]), tmp_path, kind=Stepwise, tokenizer=words)
    first, second = (ids(step) + ids("\n") for step in ROW["completions"])
    assert item.prompt.tolist() == [words.bos_token_id, *ids(ROW["prompt"])]
    assert item.completions[0].ids.tolist() == first + second
    labels = np.full(len(first + second), -100.0)
    labels[[len(first) - 1, -1]] = ROW["labels"]
    assert np.where(item.completions[0].scored, 1, -100).tolist() == np.where(labels >= 0, 1, -100).tolist()


def test_words_that_a_template_writes_itself_are_not_taken_for_a_step(tmp_path: Path) -> None:
    """As Qwen3 begins an answer with an empty thought, in which a step such as `t` is found too."""
    template = (
        "{% for m in messages %}{{ m.role + ':' + ('<think></think>' if m.role == 'assistant' else '') }}"
        "{{ m.content + '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    )
    words, rows = tokenizer(template), [{**ROW, "completions": [step], "labels": [True]} for step in ("t", " think", "im")]
    data = prepared(jsonl(tmp_path / "a.jsonl", rows), tmp_path, kind=Stepwise, tokenizer=words)
    texts = [words.decode(item.completions[0].ids) for item in data]
    assert texts == ["<think></think>t\n", "<think></think> think\n", "<think></think>im\n"]


def test_steps_beyond_max_length_are_counted_and_whole_rows_follow_truncation(tmp_path: Path) -> None:
    rows = [ROW, {**ROW, "completions": ["1 + 2 = 3."] * 9, "labels": [True] * 8 + [False]}, {**ROW, "prompt": "Add. " * 30}]
    path = jsonl(tmp_path / "a.jsonl", rows)
    lengths = prepared(path, tmp_path, kind=Stepwise, max_length=2000).lengths[:, 0]
    shorter = {"kind": Stepwise, "max_length": int(lengths[0])}
    with pytest.raises(UserError, match=rf"a\.jsonl:2: {lengths[1]} tokens, and train\.max_length is {lengths[0]}"):
        prepared(path, tmp_path, truncation="error", **shorter)
    assert prepared(path, tmp_path, truncation="drop", **shorter).report[0].dropped == {
        "longer than max_length": 1, "with a prompt that fills max_length": 1,
    }  # fmt: skip
    data = prepared(path, tmp_path, truncation="truncate", **shorter)
    labels = [item.step_labels for item in data]
    assert [len(data), data.scored.tolist(), data.report[0].dropped] == [
        2, [[2], [len(labels[1])]], {"with a prompt that fills max_length": 1},
    ]  # fmt: skip
    assert 0 < len(labels[1]) < 9
    assert data.report[0].cut_steps == 9 - len(labels[1])
    assert f"{9 - len(labels[1])} steps cut off at max_length" in data.lines()[0]


def test_the_last_step_is_not_taken_for_another_where_it_is_cut_off(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", [ROW, {**ROW, "completions": ["1 + 2 = 3."] * 9, "labels": [True] * 9}])
    length = int(prepared(path, tmp_path, kind=Stepwise, max_length=2000).lengths[0, 0])
    data = prepared(
        path, tmp_path, kind=Stepwise, max_length=length, truncation="truncate", transform_key="last",
        transform=lambda row: examples(row, separator="\n", last_step_only=True),
    )  # fmt: skip
    assert [item.step_labels.tolist() for item in data] == [[0.25]]
    assert data.report[0].dropped == {"longer than max_length": 1}


def test_earlier_turns_go_before_steps_do(tmp_path: Path) -> None:
    turns = [user("Long. " * 20), says("Yes."), user("Add.")]
    path = jsonl(tmp_path / "a.jsonl", [ROW, {**ROW, "prompt": turns}])
    length = int(prepared(path, tmp_path, kind=Stepwise, max_length=2000).lengths[0, 0])
    data = prepared(path, tmp_path, kind=Stepwise, max_length=length, truncation="truncate")
    assert (len(data), data.report[0].cut_turns, data.report[0].cut_steps) == (2, 1, 0)
    assert data.scored.tolist() == [[2], [2]]


def test_the_same_steps_with_other_labels_are_other_content(tmp_path: Path) -> None:
    found = [prepared(jsonl(tmp_path / f"{n}.jsonl", [{**ROW, "labels": [True, n]}]), tmp_path, kind=Stepwise).content
             for n in (0, 1)]  # fmt: skip
    assert found[0] != found[1]
