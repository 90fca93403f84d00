import json
import math
import re
from pathlib import Path

import pytest

from halos.data.files import Row
from halos.data.formats import NEGATIVE_MARGIN, as_kind, parse, read_example, read_prompt
from halos.errors import UserError
from halos.examples import SampledTokens
from halos.types import Comparison, Demonstration, Judgement, Scored

from .tokenizers import says, turn, user

WHERE = "a.jsonl:12"
Q, GOOD, BAD = (user("One?"),), (says("one"),), (says("two"),)


def read(score: str = "last", **columns):
    return read_example(Row(columns, WHERE), score=score)


def refuses(message: str, **columns) -> None:
    with pytest.raises(UserError, match=rf"a\.jsonl:12: .*{message}"):
        read(**columns)


# --- columns ----------------------------------------------------------------------------------------------------------


def test_prompt_and_completion_are_a_demonstration_as_text_or_as_messages():
    assert read(messages=[turn("User", "One?"), turn("ASSISTANT", "one")]) == Demonstration(Q, GOOD)
    assert read(prompt="One?", completion="one") == Demonstration(Q, GOOD)
    assert read(prompt=list(Q), completion=list(GOOD)) == Demonstration(Q, GOOD)
    assert read(prompt=list(Q), completion=[*Q, *GOOD]) == Demonstration(Q, GOOD), "the prompt repeated"


def test_a_label_makes_it_a_judgement():
    assert read(prompt="One?", completion="one", label=True) == Judgement(Q, GOOD, True)
    assert read(prompt="One?", completion="two", label=0) == Judgement(Q, BAD, False)
    assert read(prompt="One?", completion="two", label=None) == Demonstration(Q, BAD), "an empty column is no column"
    refuses("label is 'fine'", prompt="One?", completion="one", label="fine")
    refuses("label is -1", prompt="One?", completion="one", label=-1)
    refuses("label is 0.5", prompt="One?", completion="one", label=0.5)


def test_chosen_and_rejected_are_a_comparison_with_its_margin():
    assert read(prompt="One?", chosen="one", rejected="two") == Comparison(Q, GOOD, BAD)
    assert read(prompt="One?", chosen="one", rejected="two", margin=2) == Comparison(Q, GOOD, BAD, 2.0)
    assert read(prompt="One?", chosen=list(GOOD), rejected="two") == Comparison(Q, GOOD, BAD)
    said = {margin: parse(Row({"prompt": "One?", "chosen": "one", "rejected": "two", "margin": margin}, "a"), score="last").notes
            for margin in (-1, 0)}  # fmt: skip
    assert said == {-1: (NEGATIVE_MARGIN,), 0: ()}
    refuses("margin is 'far'", prompt="One?", chosen="one", rejected="two", margin="far")
    refuses("margin is nan", prompt="One?", chosen="one", rejected="two", margin=float("nan"))


def test_the_prompt_may_be_the_shared_turns_of_both_conversations():
    system = turn("system", "Be brief.")
    assert read(chosen=[*Q, *GOOD], rejected=[*Q, *BAD]) == Comparison(Q, GOOD, BAD)
    assert read(chosen=[system, *Q, *GOOD], rejected=[system, *Q, *BAD]) == Comparison((system, *Q), GOOD, BAD)
    # As UltraFeedback has it: the prompt as text, and once more in front of each conversation.
    both = read(prompt="One?", chosen=[*Q, *GOOD], rejected=[*Q, *BAD], messages=[*Q, *GOOD])
    assert both == Comparison(Q, GOOD, BAD)
    refuses("repeat another prompt", prompt="Two?", chosen=[*Q, *GOOD], rejected=[*Q, *BAD])
    refuses("share all turns", chosen=[*Q, *GOOD], rejected=[user("Two?"), *BAD])
    refuses("share all turns", chosen=[*Q, *GOOD, *Q, *GOOD], rejected=[*Q, *GOOD, user("Two?"), *BAD])
    refuses("a column 'prompt' is needed", chosen="one", rejected="two")


def test_the_last_assistant_turn_of_messages_is_scored_or_all_of_them():
    talk = [*Q, *GOOD, user("Two?"), *BAD, user("Thanks.")]
    assert read(messages=talk) == Demonstration((*Q, *GOOD, user("Two?")), BAD)
    assert read("all", messages=talk) == Demonstration(Q, (*GOOD, user("Two?"), *BAD))


def test_tool_calls_are_kept_and_null_keys_are_not():
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add"}}], "name": None}
    read_call = read(messages=[*Q, call]).completion[0]
    assert read_call == {"role": "assistant", "tool_calls": [{"function": {"name": "add"}}]}
    refuses("tools must be a list of objects", messages=[*Q, *GOOD], tools={"name": "add"})
    assert read(messages=[*Q, *GOOD], tools=[]) == Demonstration(Q, GOOD)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"messages": [user("One?")]}, "no assistant turn"),
        ({"messages": [says("one")]}, "there is no turn to answer"),
        ({"messages": []}, "messages must be text or a list"),
        ({"messages": [user("One?"), says(" ")]}, "the assistant says nothing"),
        ({"messages": [{"who": "human", "value": "One?"}]}, "needs role and content, one has who, value"),
        ({"messages": ["One?"]}, "needs role and content, one is str"),
        ({"messages": [user("One?"), turn("bot", "one")]}, "unknown role 'bot'; roles are system"),
        ({"messages": [user("One?"), {"role": "assistant"}]}, "content is NoneType, not text"),
        ({"messages": [user("One?"), {"role": "assistant", "content": [{"type": "text"}]}]}, "a part of type text, without text"),
        ({"prompt": "One?", "completion": ""}, "completion is empty"),
        ({"prompt": 1, "completion": "one"}, "prompt must be text or a list"),
        ({"prompt": "One?", "completion": [user("two")]}, "must start and end with an assistant turn"),
        ({"prompt": "One?", "chosen": "one", "rejected": [says("two"), user("so?")]}, "rejected must start and end"),
        ({"prompt": "One?"}, "columns found: prompt; a row that can be trained on has messages; prompt"),
        ({"title": "One?", "id": 7}, "columns found: title, id;"),
        ({"prompt": "One?", "chosen": None, "rejected": "2"}, r"columns found: prompt, rejected \(and null: chosen\);"),
        ({}, "columns found: none"),
    ],
)
def test_a_row_that_is_no_example_is_named_with_the_reason(columns, message: str):
    refuses(message, **columns)


# --- HALOs' records ----------------------------------------------------------------------------------------------------


def test_label_one_of_pairwise_feedback_prefers_the_first_output():
    record = {"type": "pairwise_feedback", "prompt": list(Q), "output_A": list(GOOD), "output_B": list(BAD)}
    assert read(**record, label=1) == Comparison(Q, GOOD, BAD)
    assert read(**record, label=0) == Comparison(Q, BAD, GOOD)
    assert read(**record, label=0, reward_A=1.5, reward_B=4.0) == Comparison(Q, BAD, GOOD, 2.5)
    refuses("lacks label", **record)


def test_binary_feedback_is_a_judgement_and_minus_one_is_undesirable():
    record = {"type": "binary_feedback", "prompt": list(Q), "output": list(GOOD), "reward": 0.3}
    assert read(**record, label=1) == Judgement(Q, GOOD, True)
    assert [read(**record, label=label).desirable for label in (0, -1)] == [False, False]


def test_scalar_feedback_has_a_reward_and_the_samplers_own_tokens():
    row = {"type": "scalar_feedback", "prompt": list(Q), "output": list(GOOD), "reward": 0.5}
    assert read(**row) == Scored(Q, GOOD, 0.5)
    assert read(prompt="One?", completion="one", reward=2) == Scored(Q, GOOD, 2.0)
    kept = read(**row, output_ids=[5, 6], logps=[-0.5, -1.0], vocabulary="v")
    assert kept == Scored(Q, GOOD, 0.5, (5, 6), (-0.5, -1.0), "v")
    refuses("logps has 1 numbers for 2 output_ids", **row, output_ids=[5, 6], logps=[-0.5])
    for logps, shown in (([None], r"\[None\]"), (["a"], r"\['a'\]"), (5, "5"), ([-math.inf], r"\[-inf\]"), ("7", "7")):
        refuses(f"logps is {shown}, not a list of finite numbers", **row, output_ids=[5], logps=logps)
    assert read(**row, masked=1).masked
    refuses("masked is 'true'; it takes true or false", **row, masked="true")
    refuses("reward is 'much', not a number", **{**row, "reward": "much"})
    refuses("output is empty", **{**row, "output": ""})
    assert read(**{**row, "output": ""}, output_ids=[1]).ids == (1,), "a model may end at once"


def test_feedback_on_samples_keeps_their_tokens_whatever_the_loss_learns_from():
    tokens = (SampledTokens((5, 6), "v"), SampledTokens((7,), "v", cut=True))
    record = {"type": "pairwise_feedback", "prompt": list(Q), "output_A": list(BAD), "output_B": list(GOOD), "label": 0,
              "output_ids_A": [7], "vocabulary_A": "v", "finish_A": "length", "output_ids_B": [5, 6], "vocabulary_B": "v",
              "finish_B": "stop"}  # fmt: skip
    pair = read(**record)
    assert pair == Comparison(Q, GOOD, BAD, sampled=tokens)
    assert [each.sampled for each in serves(pair, Judgement)] == [tokens[:1], tokens[1:]]
    assert [each.sampled for each in serves(pair, Scored)] == [tokens[:1], tokens[1:]]
    assert [each.sampled for each in serves(pair, Demonstration)] == [tokens[:1]]
    label = {"type": "binary_feedback", "prompt": list(Q), "output": list(GOOD), "label": 1, "output_ids": [7],
             "vocabulary": "v", "finish": "length"}  # fmt: skip
    assert read(**label) == Judgement(Q, GOOD, True, sampled=tokens[1:])
    for kind in (Demonstration, Scored):
        assert [each.sampled for each in serves(read(**label), kind)] == [tokens[1:]]
    assert read(**{**label, "type": "scalar_feedback", "reward": 1}).sampled == tokens[1:]
    assert read(**{**label, "type": "sample"}).sampled == tokens[1:]
    refuses("output_ids_A is 5 6, not a list of token ids", **{**record, "output_ids_A": "5 6"})
    refuses(r"output_ids is \[-1\], not a list of token ids", **{**label, "output_ids": [-1]})


def test_labels_and_pairs_stand_for_rewards_of_one_and_minus_one():
    assert serves(Judgement(Q, GOOD, False), Scored) == [Scored(Q, GOOD, -1.0)]
    assert serves(Comparison(Q, GOOD, BAD, None), Scored) == [Scored(Q, GOOD, 1.0), Scored(Q, BAD, -1.0)]
    assert serves(Scored(Q, GOOD, 0.5), Demonstration) == [Demonstration(Q, GOOD)]
    assert serves(Scored(Q, ({"role": "assistant", "content": " "},), 0.5, (1,)), Demonstration) == []
    with pytest.raises(UserError, match=r"halos.online.label makes pairs or labels of samples"):
        serves(Scored(Q, GOOD, 0.5), Comparison, reward=0.5)


def test_a_prompt_is_read_from_any_row_with_its_answer():
    assert read_prompt(Row({"prompt": "One?", "answer": "1"}, WHERE)) == (Q, "1")
    assert read_prompt(Row({"prompt": "One?"}, WHERE)) == (Q, None)
    assert read_prompt(Row({"prompt": "One?", "chosen": "one", "rejected": "two"}, WHERE)) == (Q, "one")
    assert read_prompt(Row({"prompt": "One?", "completion": "two", "label": False}, WHERE)) == (Q, None)
    assert read_prompt(Row({"messages": [*Q, *GOOD]}, WHERE)) == (Q, "one")


def test_a_sample_is_a_demonstration():
    assert read(type="sample", prompt=list(Q), output="one") == Demonstration(Q, GOOD)
    assert read(type="sample", instruction="One?", output="one") == Demonstration(Q, GOOD)
    assert read(type="maths", prompt="One?", completion="one") == Demonstration(Q, GOOD), "other data have a type too"


# --- conversion of examples --------------------------------------------------------------------------------------------


def serves(example, kind, **columns):
    return as_kind(example, kind, Row(columns, WHERE))


def test_a_comparison_is_also_two_judgements_or_one_demonstration():
    pair = Comparison(Q, GOOD, BAD, 1.0)
    assert serves(pair, Comparison) == [pair]
    assert serves(pair, Judgement) == [Judgement(Q, GOOD, True), Judgement(Q, BAD, False)]
    assert serves(pair, Demonstration) == [Demonstration(Q, GOOD)]


def test_only_a_desirable_judgement_is_a_demonstration():
    assert serves(Judgement(Q, GOOD, True), Demonstration) == [Demonstration(Q, GOOD)]
    assert serves(Judgement(Q, BAD, False), Demonstration) == []


def test_a_pair_of_equal_completions_prefers_nothing_but_can_be_imitated():
    pair = Comparison(Q, GOOD, GOOD)
    assert serves(pair, Comparison) == serves(pair, Judgement) == []
    assert serves(pair, Demonstration) == [Demonstration(Q, GOOD)]


@pytest.mark.parametrize(
    ("example", "kind", "message"),
    [
        (Demonstration(Q, GOOD), Comparison, "columns found: prompt, completion. .*sft.*learns from pairs: prompt . chosen"),
        (Demonstration(Q, GOOD), Judgement, "only losses on demonstrations.*learns from labels"),
        (Judgement(Q, GOOD, True), Comparison, "losses on labels, such as kto.*learns from pairs"),
    ],
)
def test_columns_that_cannot_serve_the_loss_say_which_they_can(example, kind, message: str):
    with pytest.raises(UserError, match=rf"a\.jsonl:12: .*{message}"):
        serves(example, kind, prompt="One?", completion="one", label=None)


# --- columns and keys besides text


def test_a_system_column_is_the_first_turn():
    system = turn("system", "In French.")
    assert read(system="In French.", prompt="One?", completion="one") == Demonstration((system, *Q), GOOD)
    assert read(system="In French.", prompt="One?", chosen="one", rejected="two") == Comparison((system, *Q), GOOD, BAD)
    assert read(system="In French.", chosen=[*Q, *GOOD], rejected=[*Q, *BAD]) == Comparison((system, *Q), GOOD, BAD)
    assert read(system="In French.", messages=[*Q, *GOOD]) == Demonstration((system, *Q), GOOD)
    assert read(system="In French.", messages=[system, *Q, *GOOD]) == Demonstration((system, *Q), GOOD)
    assert read(system="", messages=[*Q, *GOOD]) == Demonstration(Q, GOOD)
    assert read(type="qa", system="In French.", prompt="One?", completion="one") == Demonstration((system, *Q), GOOD), (
        "a type that is none of HALOs' names no form"
    )
    refuses("'system' and the system turn of messages differ", system="In German.", messages=[system, *Q, *GOOD])
    refuses("system must be text", system=7, messages=[*Q, *GOOD])


def test_a_system_column_precedes_a_greeting_by_the_assistant():
    begun = (turn("system", "In French."), says("Hello."), *Q)
    assert read(system="In French.", messages=[*begun[1:], *GOOD]) == Demonstration(begun, GOOD)
    assert read(system="In French.", prompt=[*begun[1:]], completion="one") == Demonstration(begun, GOOD)
    assert read(system="In French.", prompt=[*begun[1:]], chosen=[*GOOD], rejected=[*BAD]) == Comparison(begun, GOOD, BAD)
    assert read(system="In French.", chosen=[*begun[1:], *GOOD], rejected=[*begun[1:], *BAD]) == Comparison(begun, GOOD, BAD)


def test_a_column_that_would_be_lost_is_refused_unless_it_is_empty():
    for named in ({}, {"type": "chat"}):
        refuses("'history' is not read", prompt="One?", history=[["a"]], completion="one", **named)
    with pytest.raises(UserError, match="'input' is not read, and would be lost: put its content into instruction"):
        read_prompt(Row({"instruction": "Add.", "input": "1, 1"}, "a.jsonl:12", schemas=False))
    assert read_prompt(Row({"instruction": "One?", "input": "", "history": []}, "a.jsonl:12")) == (Q, None)
    assert read(prompt="One?", input="One?", completion="one") == Demonstration(Q, GOOD), "the prompt holds it"


def test_arguments_of_a_tool_call_become_an_object():
    def arguments(given: object) -> object:
        call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add", "arguments": given}}]}
        return read(messages=[*Q, call]).completion[0]["tool_calls"][0]["function"]["arguments"]

    assert arguments('{"city": "Rome", "unit": null}') == {"city": "Rome", "unit": None}
    assert arguments({"city": "Rome", "of_another_row": None, "of": {"x": None, "y": 1}}) == {"city": "Rome", "of": {"y": 1}}
    assert arguments("Rome") == "Rome"
    assert arguments("") == arguments(None) == arguments([]) == {}
    assert arguments([("city", "Rome")]) == {"city": "Rome"}, "a map of a table"
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "add", "arguments": {"x": 1, "unit": None}}}]}
    parsed = parse(Row({"messages": [*Q, call]}, WHERE), score="last")
    assert parsed.notes == ("with arguments of tool calls that are null, which are left out",)
    refuses("tool_calls of messages must be a list of objects", messages=[*Q, {**says("a"), "tool_calls": "add"}])


def test_calls_and_tools_of_openai_s_older_form_are_those_of_the_newer():
    function = {"name": "add", "arguments": '{"x": 1}'}
    older = [*Q, {"role": "assistant", "content": "So:", "function_call": function}, turn("function", "2"), *GOOD]
    newer = [*Q, {"role": "assistant", "content": "So:", "tool_calls": [{"type": "function", "function": function}]},
             turn("tool", "2"), *GOOD]  # fmt: skip
    tools = [{"name": "add", "parameters": {"type": "object"}}]
    assert read("all", messages=older) == read("all", messages=newer)
    assert read(messages=older, functions=tools) == read(messages=newer, tools=tools) != read(messages=newer)
    assert read(messages=older, functions="[1]") == read(messages=newer)
    assert read(messages=older, functions=json.dumps(tools)) == read(messages=newer, tools=tools)
    described = [{"name": "now", "description": "time"}]
    assert read(messages=older, functions=described) == read(messages=newer, tools=described) != read(messages=newer)
    assert read(messages=older, functions=[{"name": "main", "code": "int x;"}]) == read(messages=newer), "of another meaning"
    refuses("tool_calls and function_call", messages=[*Q, {**newer[1], "function_call": function}])


@pytest.mark.parametrize("key", ["weight", "train", "loss"])
def test_a_turn_of_weight_0_is_not_trained_on(key: str):
    talk = [*Q, {**GOOD[0], key: 0}, user("Two?"), {**BAD[0], key: 1}, user("So?"), {**says("no"), key: False}]
    unlearned = {**GOOD[0], "weight": 0}
    for score in ("last", "all"):
        assert read(score, messages=talk) == Demonstration((*Q, unlearned, user("Two?")), BAD)
    refuses("no assistant turn of a weight other than 0", messages=[*Q, {**GOOD[0], key: 0}])
    refuses(f"whose {key} is 0.5", messages=[*Q, {**GOOD[0], key: 0.5}])
    refuses("starts or ends with a turn of weight 0", prompt="One?", completion=[{**GOOD[0], key: 0}])


def test_the_manuals_rows_are_what_it_says_that_they_are() -> None:
    manual = (Path(__file__).resolve().parents[2] / "halos" / "data" / "README.md").read_text()
    of_forms, of_prompts = re.findall(r"```json\n(.*?)```", manual, re.S)
    rows = [Row(json.loads(line), "README.md") for line in of_forms.splitlines()]
    kinds = [type(read_example(row, score="last")) for row in rows]
    assert kinds == [Demonstration, Demonstration, Comparison, Judgement, Scored]
    assert read_prompt(Row(json.loads(of_prompts), "README.md")) == ((user("What is 2 + 3?"),), "5")
