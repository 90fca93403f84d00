"""Rows of schemas that are told by their columns."""

import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from halos.data.files import Row
from halos.data.formats import parse, read_example, read_prompt
from halos.data.numbers import DESIRABLE, UNDESIRABLE
from halos.data.row import EQUAL
from halos.data.schemas import pairs
from halos.data.schemas.schema import Schema
from halos.data.schemas.table import SCHEMAS, manual
from halos.errors import UserError
from halos.types import Comparison, Demonstration, Judgement

from .tokenizers import jsonl, prepared, says, tokenizer, turn, user

WHERE = "a.jsonl:12"
Q, GOOD, BAD = (user("One?"),), (says("one"),), (says("two"),)


def read(**columns: Any) -> Any:
    return read_example(Row(columns, WHERE), score="last")


def refuses(message: str, **columns: Any) -> None:
    with pytest.raises(UserError, match=rf"a\.jsonl:12: .*{message}"):
        read(**columns)


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: schema.name)
def test_a_row_of_a_schema_gives_the_example_of_its_built_in_form(schema: Schema) -> None:
    assert read(**schema.row) == read(**schema.same)
    built_in = read_example(Row(dict(schema.same), WHERE, schemas=schema.name == "text"), score="last")
    assert built_in == read(**schema.same)
    if schema.name != "text":
        with pytest.raises((UserError, AssertionError)):  # without the schema it is another row, or none
            assert read_example(Row(dict(schema.row), WHERE, schemas=False), score="last") == built_in


def test_the_manual_has_the_table() -> None:
    written = (Path(__file__).parents[2] / "halos" / "data" / "README.md").read_text()
    assert manual() in written, "python -c 'from halos.data.schemas.table import manual; print(manual())'"


# --- ShareGPT ----------------------------------------------------------------------------------------------------------


def said(who: str, words: Any, **more: Any) -> dict[str, Any]:
    return {"from": who, "value": words, **more}


def test_turns_of_sharegpt_have_all_its_roles() -> None:
    call = {"name": "add", "arguments": {"x": 1}}
    talk = [said("system", "S"), said("Human", "H"), said("function_call", json.dumps(call)), said("observation", "2"),
            said("gpt", "G"), said("user", "U", weight=None), said("bing", "B", weight=0), said("human", "W"),
            said("chatgpt", "C")]  # fmt: skip
    example = read(conversations=talk, id=7)
    assert example.completion == (says("C"),)
    assert example.prompt[2:4] == (
        {"role": "assistant", "tool_calls": [{"type": "function", "function": call}]},
        turn("tool", "2"),
    )
    assert example.prompt[6] == says("B") | {"weight": 0}, "it is not trained on"
    assert read(conversation=[*Q, *GOOD]) == read(messages=[said("human", "One?"), said("gpt", "one")]) == Demonstration(Q, GOOD)
    refuses("conversations has a turn from 'bot'; known are human, user", conversations=[said("bot", "x")])
    refuses("function_call that is no JSON object", conversations=[said("human", "x"), said("function_call", "add(1)")])
    refuses("columns 'conversations' and 'messages' hold different", conversations=[said("human", "x")], messages=[*Q, *GOOD])


def test_pairs_of_sharegpt_have_one_turn_each_or_several() -> None:
    pair = Comparison(Q, GOOD, BAD)
    asked = [said("human", "One?")]
    assert read(conversations=asked, chosen=said("gpt", "one"), rejected=said("gpt", "two")) == pair
    assert read(prompt="One?", chosen=[said("gpt", "one")], rejected=[said("gpt", "two")]) == pair
    assert read(chosen=[*asked, said("gpt", "one")], rejected=[*asked, said("gpt", "two")]) == pair


# --- prompts and answers under other names -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"query": "One?", "answer": "a", "response": "1"}, "could be the completion: data.columns={answer: null} takes"),
        ({"prompt": "One?", "question": "Two?", "answer": "one"}, "question could be the prompt: data.columns={question: null}"),
        ({"instruction": "One?", "query": "Two?", "chosen": "a", "rejected": "b"}, "any of instruction, query could be the"),
        ({"instruction": "Add.", "input": "1", "context": "2", "output": "3"}, "both 'input' and 'context' may belong"),
        ({"system": "A", "system_prompt": "B", "question": "One?", "response": "one"}, "'system' and 'system_prompt' differ"),
        ({"text": "a b", "prompt": "a"}, "'text' beside prompt could be the whole or a part of it: data.columns={prompt: null}"),
        ({"text": "a b", "system": "b"}, "'text' beside system could be the whole"),
        ({"text": "a b", "answer": "b"}, "data.columns={prompt: text} as a part"),
        ({"question": "One?", "label": "good"}, "columns found: question, label; a row that can be trained on has"),
        ({"question": "One?", "answer": 1}, "completion must be text or a list"),
        ({"question": "One?", "answer": "one", "reward": 1, "label": "good"}, "so 'reward' would be lost"),
        ({"text": "a", "label": 1}, "read as text, so 'label' would be lost"),
        ({"prompt": None, "chosen": "It is 5", "rejected": "It is 6"}, "prompt is null, and chosen and rejected are text"),
        ({"problem": "2+3", "chosen": "It is 5", "rejected": "It is 6"}, "it may be problem"),
        ({"completion": '[{"role": "assistant", "text": "Yo"}]', "prompt": "One?"}, "content is NoneType, not text"),
        ({"prompt": '[{"role": "user", "content": "Hi"}, {"who": 1}]', "completion": "one"}, "needs role and content"),
        ({"asks": "二加三等于多少", "chosen": "It is 5", "rejected": "It is 6"}, "it may be asks"),
        ({"asks": ["What is it?"], "chosen": "It is 5", "rejected": "It is 6"}, "it may be asks"),
        ({"chosen": "Human: Hi\nAssistant: Hello!", "rejected": "Human: Hi\nAssistant: No."}, "marks of turns"),
        ({"Prompt": "One?", "Completion": "one"}, "data.columns={prompt: Prompt, completion: Completion}; a row that"),
        ({"question": "Add", "answer": ""}, "answer is empty: the assistant says nothing"),
        ({"instruction": "Add.", "input": "1, 1", "output": ""}, "output is empty: the assistant says nothing"),
        ({"instruction": [*Q], "input": "1", "output": "2"}, "input beside instruction, which is no text"),
    ],
)  # fmt: skip
def test_what_could_be_read_in_several_ways_or_lost_is_refused(columns: dict[str, Any], words: str) -> None:
    refuses(words.replace("{", r"\{"), **columns)


def test_answers_that_are_json_of_other_objects_are_text() -> None:
    for answer in ('{"from": "Berlin", "to": "Rome"}', '{"name": "Bob", "role": "admin"}', '[{"name": "Bob"}]'):
        assert read(prompt="One?", completion=answer) == Demonstration(Q, (says(answer),))


def test_a_row_of_empty_text_is_dropped_and_counted() -> None:
    for text in (" ", "", None):
        row = {"text": text, "id": 3, "url": "https://a.b/?c=d"}
        assert parse(Row(row, WHERE), score="last").dropped == "whose text is empty"
        refuses("columns found: (text, )?problem", text=text, problem="What is it?")
        assert text or read(text=text, prompt="One?", completion="one") == Demonstration(Q, GOOD)
        refuses("columns found: (text, )?dialogue", text=text, dialogue=["Hi", "Yo"])


def test_columns_beside_a_pair_of_texts_that_ask_nothing_are_ignored() -> None:
    others = {"user": "u17", "source": "https://x.y/?id=3", "category": "数学", "tags": ["open qa"], "Input": 3}
    pair = {"chosen": "It is 5", "rejected": "It is 6"}
    assert read(**pair, **others) == read(**pair) == Comparison((user("It is"),), (says("5"),), (says("6"),))


def test_turns_as_json_text_are_turns_in_every_column_and_python_s_are_refused() -> None:
    talk = [{"from": "human", "value": "One?"}, {"from": "gpt", "value": "one"}]
    for columns in ({"messages": [*Q, *GOOD]}, {"conversations": talk}, {"prompt": "One?", "completion": GOOD[0]}):
        text = {name: json.dumps(value, indent=2) if name != "prompt" else value for name, value in columns.items()}
        assert read(**text) == Demonstration(Q, GOOD)
    pair = {"chosen": f" {json.dumps([*Q, *GOOD])}", "rejected": json.dumps([*Q, *BAD])}
    assert read(prompt="One?", **pair) == read(prompt=json.dumps([*Q]), **pair) == Comparison(Q, GOOD, BAD)
    assert read_prompt(Row({"prompt": json.dumps([*Q])}, WHERE)) == (Q, None)
    for column in ("prompt", "completion"):
        refuses(f"{column} is a list of messages as Python prints it", **{"prompt": "a", "completion": "b", column: f"[ {Q[0]}]"})
    for other in ('[{"city": "Rome"}]', '{"a": 1}', "[{", "[{'a': 1}]", "{{ x }}"):
        assert read(prompt="One?", completion=other) == Demonstration(Q, (says(other),)), "text that holds no turns"


def test_names_of_prompts_and_answers() -> None:
    for asked in ("prompt", "instruction", "question", "query", "input"):
        for answer in ("completion", "response", "answer", "output"):
            assert read(**{asked: "One?", answer: "one"}) == Demonstration(Q, GOOD)
        assert read(**{asked: "One?", "chosen": "one", "rejected": "two"}) == Comparison(Q, GOOD, BAD)
    assert read(question="One?", answer="one", label="yes", reward=None) == Judgement(Q, GOOD, True)
    assert read(question="One?", answer="one", response="one") == Demonstration(Q, GOOD), "twice the same is one"
    assert read(prompt="One?", completion="one", answer="1", question="no") == Demonstration(Q, GOOD), (
        "the built-in form is first"
    )
    assert read(instruction="Q", context="C", response="one").prompt == (user("Q\n\nC"),)
    history = [["a", "b"]]
    assert read(instruction="Q", input="", history=history, output="one").prompt == (user("a"), says("b"), user("Q"))
    assert read(system="S", prompt="One?", history=history, completion="one").prompt == (
        turn("system", "S"),
        user("a"),
        says("b"),
        *Q,
    )
    pair = {"chosen": [*Q, *GOOD], "rejected": [*Q, *BAD]}
    assert read(question="another", **pair) == Comparison(Q, GOOD, BAD), "conversations have their prompt"


def test_a_prompt_alone_is_read_under_any_name_and_nothing_of_its_answer_is_refused() -> None:
    def asked(**columns: Any) -> Any:
        return read_prompt(Row(columns, WHERE))

    assert asked(question="One?", answer="1", response="one") == (Q, "1")
    assert asked(question="One?", answer="1", solution="It is 1.") == (Q, "1")
    assert asked(instruction="", input="One?") == (Q, None)
    assert asked(instruction="Add.", input="1, 1") == ((user("Add.\n\n1, 1"),), None)
    assert asked(prompt="\n\nHuman: One?\n\nAssistant:") == (Q, None)
    assert asked(prompt="One?", text="x", input="y", question="no") == (Q, None)
    assert asked(conversations=[said("human", "One?"), said("gpt", "one")]) == (Q, "one")


# --- pairs -------------------------------------------------------------------------------------------------------------


def test_the_mark_of_a_system_turn_inside_a_text_of_hh_is_a_part_of_it() -> None:
    machine = "My machine:\n\nSystem: Linux\n\nDone."
    assert pairs.hh_turns(f"System: Be brief.\n\nHuman: One?\n\nAssistant: {machine}\n\nHuman: And?\n\nAssistant: no") == [
        turn("system", "Be brief."), *Q, says(machine), user("And?"), says("no")]  # fmt: skip


def test_text_with_the_markers_of_hh_is_turns() -> None:
    first = "\n\nHuman: Hi:\n\nthere\n\nAssistant: Hello!\n\nHuman: One?\n\nAssistant:"
    prompt = (user("Hi:\n\nthere"), says("Hello!"), *Q)
    assert read(chosen=f"{first} one", rejected=f"{first} two") == Comparison(prompt, GOOD, BAD)
    assert read(chosen=f"{first} one".replace("\n", "\r\n"), rejected=f"{first} two") == Comparison(prompt, GOOD, BAD)
    assert read(prompt=first, chosen=" one", rejected=" two", response=" one") == Comparison(prompt, GOOD, BAD)
    assert read(prompt=first, completion=" one") == Demonstration(prompt, GOOD)
    refuses(
        "chosen is empty|must share all turns|starts and ends|must start and end",
        chosen=f"{first} one\n\nHuman: so?",
        rejected=f"{first} two",
    )
    assert read(prompt="Human: One?", completion="one").prompt == (user("Human: One?"),), "no markers"


def test_answers_that_begin_alike_are_no_prompt_where_another_column_may_be_it() -> None:
    """The question would be lost, and the first words of both answers would be learned as the prompt."""
    answers = {"chosen": "The answer is one.", "rejected": "The answer is two."}
    refuses(r"it may be problem \(data\.columns=\{prompt: problem\}\), or how both begin", problem="How many suns?", **answers)
    assert read(id="a-17", source="web", **answers).prompt == (user("The answer is"),)


def test_the_prompt_of_texts_that_begin_alike_ends_at_a_word() -> None:
    example = read(chosen="Count to two: one, two", rejected="Count to two: once")
    assert example == Comparison((user("Count to two:"),), (says("one, two"),), (says("once"),))
    parsed = parse(Row({"chosen": "a b", "rejected": "a b"}, WHERE), score="last")
    assert (parsed.example, parsed.dropped) == (None, EQUAL)
    refuses("a column 'prompt' is needed", chosen="one", rejected="once")
    refuses("rejected is empty", chosen="Say one. two", rejected="Say one. ")


def test_scores_are_margins_unless_they_contradict_the_order() -> None:
    pair = {"prompt": "One?", "chosen": "one", "rejected": "two"}
    for good, bad in pairs.SCORES:
        assert read(**pair, **{good: "8.5", bad: 6}).margin == 2.5
        parsed = parse(Row({**pair, good: 1, bad: 2}, WHERE), score="last")
        assert parsed.dropped == f"whose scores contradict their order ({good} < {bad})"
        assert read(**pair, **{good: Decimal("2.5"), bad: Decimal(1)}).margin == 1.5, "of a decimal column"
        assert read(**pair, **{good: 1, bad: 2, "margin": 7}).margin == 7
        assert read(**pair, **{good: None, bad: 2}).margin is None


def test_ultrafeedback_prefers_the_best_to_the_worst() -> None:
    def completions(*scores: Any) -> dict[str, Any]:
        return {
            "instruction": "One?",
            "completions": [{"response": f"{n}", "overall_score": score} for n, score in enumerate(scores)],
        }

    assert read(**completions(3, 9.5, None, 1, float("nan"))) == Comparison(Q, (says("1"),), (says("3"),), 8.5)
    for scores, why in {(2, 2): pairs.EQUAL_SCORES, (2, None): pairs.FEW_SCORES}.items():
        assert parse(Row(completions(*scores), WHERE), score="last").dropped == why


def test_labels_may_be_words() -> None:
    row = {"prompt": "One?", "completion": "one"}
    for words, wanted in (((*DESIRABLE, "1.0"), True), ((*UNDESIRABLE, "0.0", "-1.0"), False)):
        for word in words:
            assert read(**row, label=f" {word.title()} ").desirable is wanted
    assert read(**row, label="Thumbs_Up") == read(**row, kto_tag=1) == Judgement(Q, GOOD, True)
    refuses("label is 'fine', no known verdict: good, true", **row, label="fine")
    refuses("label is '2', no known verdict", **row, label="2")


# --- the header, and text ----------------------------------------------------------------------------------------------


def test_a_label_beside_messages_is_about_the_last_turn() -> None:
    talk = [user("Zero?"), says("zero"), *Q, *BAD]
    wrong = Judgement((user("Zero?"), says("zero"), *Q), BAD, desirable=False)
    for label in ({"label": False}, {"kto_tag": False}, {"label": "bad"}, {"label": 0, "kto_tag": "False"}):
        assert read(messages=talk, **label) == wrong
    assert read(conversations=[said("human", "One?"), said("gpt", "one")], kto_tag=True) == Judgement(Q, GOOD, desirable=True)
    assert read(messages=json.dumps([*Q, *GOOD]), label="1") == Judgement(Q, GOOD, desirable=True)
    assert read_prompt(Row({"messages": [*Q, *GOOD, *Q], "label": True}, WHERE)) == (Q, "one")
    refuses("so 'kto_tag' would be lost", messages=[*talk, user("Sure?")], kto_tag=True)
    refuses("there is no turn to answer", messages=[says("one")], label=True)
    refuses("so 'label' would be lost", messages=talk, label=True, chosen=[*Q, *GOOD])


def test_what_was_made_of_rows_is_counted(tmp_path: Path) -> None:
    rows = [{"chosen": f"Say {n}. one", "rejected": f"Say {n}. two", "score_chosen": n, "score_rejected": 1} for n in range(3)]
    path = jsonl(tmp_path / "a.jsonl", [*rows, {"chosen": "a", "rejected": "a"}])
    assert prepared(path, tmp_path, kind=Comparison).lines() == [
        f"{path}: 4 rows, 2 examples kept; dropped 2 (1 whose scores contradict their order (score_chosen < score_rejected),"
        " 1 with equal completions); 3 whose prompt is how both texts begin; 2 with a margin, score_chosen - score_rejected"
    ]
    plain = prepared(
        {"path": jsonl(tmp_path / "b.jsonl", [{"prompt": "a", **rows[2]}]), "schemas": False}, tmp_path, kind=Comparison
    )
    assert plain.labels["margin"].tolist() == [0.0]


def test_a_row_is_counted_under_one_reading(tmp_path: Path) -> None:
    rows = [{"instruction": f"Add {n}.", "input": about, "output": "2"} for n, about in enumerate(["1, 1", "", " ", None])]
    data = prepared(jsonl(tmp_path / "a.jsonl", rows), tmp_path)
    assert data.report[0].noted == {"read as Alpaca": 3, "read as instruction + output": 1}
    assert read(**rows[1]) == read(instruction="Add 1.", output="2")
    pair = {"instruction": "Add.", "input": "", "chosen": "2", "rejected": "3"}
    assert parse(Row(pair, WHERE), score="last").notes == ("read as Alpaca",)


@pytest.mark.parametrize("bos", [True, False])
def test_text_is_trained_on_as_it_is(tmp_path: Path, bos: bool) -> None:
    made = tokenizer(bos=bos)
    texts = ["Once upon a time", "<s>Once</s>", "<|im_start|>user\nHi<|im_end|></s>\n"]
    data = prepared(jsonl(tmp_path / "a.jsonl", [{"text": text} for text in texts]), tmp_path, tokenizer=made)
    whole = [made.decode([*item.prompt, *item.completions[0].ids]) for item in data]
    start = "<s>" if bos else ""
    assert whole == [f"{start}Once upon a time</s>", "<s>Once</s>", f"{start}{texts[2].rstrip()}"]
    for item in data:
        (completion,) = item.completions
        assert completion.scored.tolist() == [bos, *[True] * (len(completion.ids) - 1)], "the first token has nothing before it"
    assert made.decode(data[0].prompt) == start
    cut = prepared(
        jsonl(tmp_path / "a.jsonl", [{"text": "one two " * 50}]), tmp_path, tokenizer=made, max_length=9, truncation="truncate"
    )
    assert cut.lengths.tolist() == [[9]]
    with pytest.raises(UserError, match=r"columns found: text\. They can train only losses on demonstrations"):
        prepared(jsonl(tmp_path / "a.jsonl", [{"text": "a"}]), tmp_path, kind=Comparison)
