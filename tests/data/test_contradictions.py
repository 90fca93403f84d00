"""A row is read in one form: what it would be trained on by another form is not lost silently."""

import pytest

from halos.data.files import Row
from halos.data.formats import parse, read_example, read_prompt
from halos.data.oddities import BLANKS_APART, of_example
from halos.errors import UserError
from halos.types import Comparison, Demonstration, Judgement, Scored

from .tokenizers import says, turn, user

Q, GOOD, BAD = (user("One?"),), (says("one"),), (says("two"),)
PAIR = {"prompt": "One?", "chosen": [*Q, *GOOD], "rejected": [*Q, *BAD]}
DONE, TALK = {"prompt": "One?", "completion": "one"}, {"messages": [*Q, *GOOD]}


def read(columns: dict[str, object]) -> object:
    return read_example(Row(columns, "a.jsonl:12"), score="last")


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({**DONE, "label": True, "reward": 0.5}, "read as prompt [+] completion [+] label, so 'reward' would be lost: leave"),
        ({**DONE, "label": True, "margin": 2.0}, "so 'margin' would be lost"),
        ({**TALK, "label": "maths"}, "columns found: messages, label. The row is read as messages, so 'label' would be lost"),
        ({**TALK, "label": 3}, "read as messages, so 'label' would be lost"),
        ({**TALK, "reward": -3.0}, "so 'reward' would be lost: .*data.format"),
        ({**PAIR, "label": 0}, "read as prompt [+] chosen [+] rejected, so 'label' would be lost"),
        ({**PAIR, "completion": "three"}, "so 'completion', which holds another answer, would be lost"),
        ({**PAIR, "messages": [*Q, says("three")]}, "so 'messages', which holds another answer"),
        ({**DONE, "messages": [*Q, *BAD]}, "read as prompt [+] completion, so 'messages', which"),
        ({**DONE, "rejected": "two"}, "so 'rejected', which"),
        ({**TALK, "completion": "two"}, "so 'completion', which"),
        ({**TALK, "chosen": [*Q, *BAD]}, "so 'chosen', which"),
        ({**DONE, "weight": 0}, "the row has weight=0, which would be lost: a turn of messages may have a weight of 0"),
        ({**TALK, "weight": 0.5}, "weight=0.5"),
        ({**PAIR, "train": False}, "train=False"),
        ({**DONE, "weight": "0.5"}, "weight='0.5'"),  # of a csv file
        ({**DONE, "train": "False"}, "train='False'"),
        ({**TALK, "kto_tag": "maths"}, "so 'kto_tag' would be lost"),
        ({**TALK, "label": True, "reward": 0.5}, "so 'label' would be lost"),
        ({**DONE, "kto_tag": False, "label": True}, "so 'kto_tag' would be lost"),
        ({"type": "binary_feedback", "prompt": "One?", "output": "one", "label": 1, "weight": 0}, "weight=0"),
    ],
)  # fmt: skip
def test_a_column_that_another_form_learns_from_is_refused_by_name(columns: dict[str, object], words: str) -> None:
    with pytest.raises(UserError, match=rf"^a\.jsonl:12: .*{words}"):
        read(columns)


@pytest.mark.parametrize("columns", [
    {"instruction": "Add one.", "input": 41, "output": "42"}, {"instruction": "Sort.", "input": ["b", "a"], "output": "a b"},
    {"prompt": "Translate.", "input": "Bonjour", "output": "Hello"},
    {"prompt": "Who?", "context": "Bob did.", "completion": "Bob did."},
    {"prompt": [user("Who?")], "context": "Bob did.", "chosen": "Bob", "rejected": "Al"},
    {"question": "Who?", "context": {"title": ["A"], "sentences": [["Bob is here."]]}, "answer": "Bob"},
    {"prompt": "Who?", "context": ["Bob is here."], "completion": "Bob"},
    {"question": "Who?", "choices": ["Bob", "Al"], "answer": "A"},
])  # fmt: skip
def test_what_a_prompt_is_about_is_refused_where_it_is_not_joined_to_it(columns: dict[str, object]) -> None:
    name = next(name for name in ("input", "context", "choices") if name in columns)
    with pytest.raises(UserError, match=rf"^a\.jsonl:12: a column '{name}' is not read, and would be lost: .*{name}: null"):
        read(columns)
    # it is in the prompt, or has no words, or the row is of another form, where it is counted
    read({"prompt": "Who? Bob did.", "context": " Bob did. ", "completion": "Bob"})
    read({"prompt": "Who?", "context": {"source": "web"}, "completion": "Bob"})
    read({"prompt": "Who?", "completion": "Bob", "weight": "1", "train": "true", "label": True, "kto_tag": "yes"})
    parsed = parse(Row({**TALK, "prompt": "One?", "context": "Bob did.", "input": "One?"}, "a.jsonl:12"), score="last")
    assert parsed.notes == ("with a column 'context', which is not read beside messages",)
    read({"prompt": "Who?\nA. Bob  Low\nB. Al", "choices": {"label": ["A", "B"], "text": ["Bob Low", "Al"]}, "completion": "A"})
    read({"prompt": "Who? Bob did.\nIs it?", "context": {"a": [["Bob did. Is"]], "of": "the web"}, "completion": "Bob"})
    read({"prompt": "Who?", "choices": [{"index": 0, "text": "Bob Low"}], "completion": "Bob Low"})
    with pytest.raises(UserError, match="a column 'context' is not read"):
        read_prompt(Row({"prompt": "Who?", "context": "Bob did."}, "a.jsonl:12"))


@pytest.mark.parametrize(
    ("columns", "example"),
    [
        (PAIR | {"messages": [*Q, *GOOD], "id": "h", "score_chosen": 8.5, "score_rejected": 6}, Comparison(Q, GOOD, BAD, 2.5)),
        (PAIR | {"completion": "one ", "margin": 2.0, "reward": None}, Comparison(Q, GOOD, BAD, 2.0)),
        (PAIR | {"messages": [*Q]}, Comparison(Q, GOOD, BAD)),
        (TALK | {"prompt": "One?", "prompt_id": "h", "completion": "one"}, Demonstration(Q, GOOD)),
        (TALK | {"instruction": "One?", "output": "one", "score": 3, "weight": 1, "train": True}, Demonstration(Q, GOOD)),
        (DONE | {"messages": [turn("system", "Be brief."), *Q, *GOOD], "weight": "70 kg"}, Demonstration(Q, GOOD)),
        (DONE | {"label": True, "reward": None}, Judgement(Q, GOOD, True)),
        (
            {"type": "scalar_feedback", "prompt_id": "p", "prompt": "One?", "output": "one", "reward": 0.5, "label": 1},
            Scored(Q, GOOD, 0.5),
        ),
    ],
)  # fmt: skip
def test_columns_that_repeat_an_answer_or_describe_the_row_are_accepted(columns: dict[str, object], example: object) -> None:
    assert read(columns) == example


def test_rows_that_give_prompts_may_have_any_columns_and_a_bad_answer_is_no_solution() -> None:
    assert read_prompt(Row({**TALK, "label": "positive", "weight": 0}, "a.jsonl:12")) == (Q, "one")
    assert read_prompt(Row({**TALK, "label": False}, "a.jsonl:12")) == (Q, None)


def test_completions_that_differ_in_their_thoughts_do_not_differ_in_blanks_alone() -> None:
    def thinks(thought: str, answer: str) -> tuple[dict[str, str], ...]:
        return ({"role": "assistant", "content": answer, "reasoning_content": thought},)

    assert BLANKS_APART not in of_example(Comparison(Q, thinks("One.", "1"), thinks("Two.", "1")))
    assert BLANKS_APART in of_example(Comparison(Q, thinks("One.", "1"), thinks("One. ", " 1")))
