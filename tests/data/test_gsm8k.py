import json
from pathlib import Path

import pytest

from halos.data.formats import as_kind, read_example
from halos.data.gsm8k import normalise
from halos.data.sources import Source, open_source
from halos.errors import UserError
from halos.types import Comparison, Demonstration, Example, Judgement, Scored, Stepwise


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Twenty problems in each file, each with right, wrong, right and wrong solutions."""

    def solved(n: int, right: bool, by: str) -> dict:
        return {"is_correct": right, "solution": f"{by}: 1+{n} = <<1+{n}={n + 1}>>{n + 1}\nA: {n + 1 if right else n}"}

    train = [{"question": f"Train {n}?", "answer": f"1+{n} = <<1+{n}={n + 1}>>{n + 1}\n#### {n + 1}"} for n in range(20)]
    names = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")
    test = [
        {"question": f"Test {n}?", "ground_truth": f"A: {n + 1}"}
        | {name: solved(n, place % 2 == 0, name) for place, name in enumerate(names)}
        for n in range(20)
    ]
    for name, rows in (("train.jsonl", train), ("model_solutions.jsonl", test)):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def examples(root: Path, kind: type[Example], purpose: str = "train") -> list:
    opened = open_source(Source.of({"path": str(root), "format": "gsm8k", "split": purpose}), kind, purpose)
    return [read_example(row, score="last") for row in opened.rows()]


def test_demonstrations_lose_the_calculator_marks_and_keep_the_answer_line(root: Path):
    first = examples(root, Demonstration)[3]
    assert first == Demonstration(
        ({"role": "user", "content": "Train 3?"},), ({"role": "assistant", "content": "1+3 = 4\n#### 4"},)
    )


def test_pairs_are_all_right_over_wrong_solutions_of_one_problem(root: Path):
    pairs = examples(root, Comparison)
    assert len(pairs) == 18 * 4
    said = {(pair.chosen[0]["content"].split(":")[0], pair.rejected[0]["content"].split(":")[0]) for pair in pairs[:4]}
    assert said == {(r, w) for r in ("6b_finetuning", "175b_finetuning") for w in ("6b_verification", "175b_verification")}
    for pair in pairs:
        number = int(pair.prompt[0]["content"].split()[1][:-1])
        assert pair.chosen[0]["content"].endswith(f"\n#### {number + 1}")
        assert pair.rejected[0]["content"].endswith(f"\n#### {number}")


def test_labels_are_each_solution_once(root: Path):
    labels = examples(root, Judgement)
    assert len(labels) == 18 * 4
    assert [label.desirable for label in labels[:4]] == [True, False, True, False]
    assert len({label.completion[0]["content"] + label.prompt[0]["content"] for label in labels}) == 18 * 4


@pytest.mark.parametrize("kind", [Scored, Stepwise])
def test_losses_on_rewards_and_steps_learn_from_each_solution_once_whatever_the_others_are(root: Path, kind: type[Example]):
    file = root / "model_solutions.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    for solution in ("6b_verification", "175b_verification"):
        rows[0][solution]["is_correct"] = True  # all four are right, so that no pair has them
    rows[1]["6b_verification"]["is_correct"] = True
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    opened = open_source(Source.of({"path": str(root), "format": "gsm8k"}), kind, "train")
    made = [each for row in opened.rows() for each in as_kind(read_example(row, score="last"), kind, row)]
    values = [each.reward if isinstance(each, Scored) else each.step_labels[0] for each in made]
    wrong = -1 if kind is Scored else 0
    assert (len(made), values[:12]) == (18 * 4, [1, 1, 1, 1, 1, 1, 1, wrong, 1, wrong, 1, wrong])
    if kind is Stepwise:
        assert all(len(each.steps) == 1 for each in made), "the label is of the whole solution"


@pytest.mark.parametrize("kind", [Demonstration, Comparison, Judgement])
def test_the_last_tenth_of_the_problems_is_the_eval_split(root: Path, kind):
    train, held_out = ({each.prompt[0]["content"] for each in examples(root, kind, purpose)} for purpose in ("train", "eval"))
    assert len(train) == 18
    assert {int(name.split()[1][:-1]) for name in held_out} == {18, 19}


def test_answer_lines_of_both_files_get_the_same_form():
    assert normalise("So 2*2 = <<2*2=4>>4.\nA: 4") == "So 2*2 = 4.\n#### 4"
    assert normalise("It is 1,080.\nA:  1,080\n") == "It is 1,080.\n#### 1,080"
    assert normalise("Person\nA: 3 apples.\nSo 3.\n#### 3") == "Person\nA: 3 apples.\nSo 3.\n#### 3", "only the last line"


def test_other_files_are_refused(root: Path):
    def refuses(message: str, **entry) -> None:
        with pytest.raises(UserError, match=message):
            list(open_source(Source.of({"path": str(root), "format": "gsm8k", **entry}), Comparison, "train").rows())

    refuses("no split 'test'", split="test")
    (root / "model_solutions.jsonl").write_text('{"prompt": "a"}\n' * 3)
    refuses(r"model_solutions\.jsonl:1: no column 'question'")
    (root / "model_solutions.jsonl").unlink()
    refuses(r"not found; data\.root must be")
