import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase
from transformers.utils import chat_template_utils

from halos.data import rendering
from halos.data.files import Row
from halos.data.formats import read_example, read_prompt
from halos.data.messages import SETTINGS
from halos.data.rendering import Renderer
from halos.data.shorten import shortened
from halos.data.template import Layout, Template
from halos.errors import UserError
from halos.types import Demonstration

from .tokenizers import CHATML, TOOLS, says, tokenizer, turn, user

TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
WITH_TOOLS = "{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}{{ '/no_think' if thinking is false }}" + TOOLS
ASKED = {"messages": [user("What is 1 + 1?"), says("It is 2.")]}


def read(row: dict[str, Any]) -> Demonstration:
    example = read_example(Row(row, "a.jsonl:7"), score="last")
    assert isinstance(example, Demonstration)
    return example


def laid_out(template: str, row: dict[str, Any]) -> Layout:
    example = read(row)
    return Template(tokenizer(template)).lay_out(example.prompt, [example.completion], "a.jsonl:7")


def test_content_in_parts_of_text_is_joined_and_another_part_is_refused_by_its_type():
    parts = [{"type": "text", "text": "What is ", "image_url": None}, {"type": "text", "text": "1 + 1?"}]
    assert read({"messages": [turn("user", parts), says("It is 2.")]}) == read(ASKED)
    assert read({"prompt": [turn("user", parts)], "completion": "It is 2."}) == read(ASKED)
    with pytest.raises(
        UserError, match=r"a\.jsonl:7: messages has a turn of role user whose content has a part of type image_url"
    ):
        read({"messages": [turn("user", [*parts, {"type": "image_url", "image_url": "x.png"}]), says("It is 2.")]})


def test_reasoning_has_one_name_and_the_template_gets_it_under_each():
    for name in ("reasoning_content", "reasoning", "thinking"):
        said = {**says("It is 2."), name: "one and one", "reasoning_content" if name == "thinking" else "thinking": None}
        assert read({"messages": [user("x"), said]}).completion == ({**says("It is 2."), "reasoning_content": "one and one"},)
        reads = CHATML.replace("m['content'] +", f"(m['{name}'] or '') + m['content'] +")
        assert laid_out(reads, {"messages": [user("x"), said]}).completions == ("one and oneIt is 2.<|im_end|>",)
    with pytest.raises(UserError, match="it takes one of them"):
        read({"messages": [user("x"), {**says("y"), "reasoning": "one", "thinking": "two"}]})


def test_tools_of_a_row_reach_the_template_and_are_refused_where_it_reads_none():
    for tools in ([TOOL], [TOOL["function"]], '[{"name": "weather", "parameters": {"type": "object"}}]'):
        for row in (ASKED, {"prompt": "What is 1 + 1?", "completion": "It is 2."}):
            assert laid_out(WITH_TOOLS, {**row, "tools": tools}).prompt.startswith(
                '{"type": "function", "function": {"name": "weather"'
            )
    with pytest.raises(UserError, match=r"a\.jsonl:7: the chat template does not read tools"):
        laid_out(CHATML, {**ASKED, "tools": [TOOL]})
    with pytest.raises(UserError, match=r"a\.jsonl:7: the chat template leaves out the tools"):
        laid_out("{% if tools %}{% endif %}" + CHATML, {**ASKED, "tools": [TOOL]})
    for wrong in ("no JSON", {"a": 1}, ["weather"], 3):
        with pytest.raises(UserError, match=r"a\.jsonl:7: tools "):
            read({**ASKED, "tools": wrong})
    assert laid_out(CHATML, {**ASKED, "tools": None}) == laid_out(CHATML, {**ASKED, "tools": "[]"}) == laid_out(CHATML, ASKED)


def test_settings_of_a_row_reach_the_template_in_training_and_for_samplers():
    row = {**ASKED, SETTINGS: {"thinking": False, "of_another_row": None}}
    assert laid_out(WITH_TOOLS, row).prompt.startswith("/no_think<|im_start|>user")
    assert laid_out(WITH_TOOLS, {**row, SETTINGS: '{"thinking": true}'}) == laid_out(WITH_TOOLS, ASKED)
    prompt, _ = read_prompt(Row({**row, "tools": [TOOL]}, "a.jsonl:7"))
    assert Template(tokenizer(WITH_TOOLS)).generation_prompt(prompt, "").count("/no_think") == 1
    with pytest.raises(UserError, match=r"a\.jsonl:7: the chat template does not read enable_thinking"):
        laid_out(WITH_TOOLS, {**ASKED, SETTINGS: {"enable_thinking": False}})


def test_a_conversation_that_loses_its_oldest_turns_keeps_its_tools():
    turns = [user("one"), says("two"), user("three"), says("four"), user("five"), says("six")]
    whole = read({"messages": turns, "tools": [TOOL]})
    shorter = [
        *shortened(whole),
        *shortened(replace(whole, prompt=whole.prompt[:1], completion=(*whole.prompt[1:], *turns[-1:]))),
    ]
    assert len(shorter) == 4
    assert all(each.prompt[0][SETTINGS] == {"tools": [TOOL]} for each in shorter)
    assert all(SETTINGS not in each for example in shorter for each in example.prompt[1:])


def test_a_developers_turn_is_the_systems_where_the_template_knows_no_developer():
    two = CHATML.replace("for m in messages", "for m in messages if m['role'] in ('system', 'user', 'assistant')")
    row = {"messages": [turn("developer", "Be brief."), *ASKED["messages"]]}
    assert laid_out(CHATML, row).prompt.startswith("<|im_start|>developer\nBe brief.")
    assert laid_out(two, row).prompt.startswith("<|im_start|>system\nBe brief.")
    with pytest.raises(UserError, match="leaves out words of the developer"):
        laid_out(two.replace("'system', ", ""), row)


def test_arguments_are_given_as_text_where_the_template_joins_them_to_text():
    joining = TOOLS.replace("call['function'] | tojson", "call['function']['name'] + call['function']['arguments']")
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": "é"}}}
    row = {"messages": [user("x"), {"role": "assistant", "content": None, "tool_calls": [call]}]}
    assert laid_out(joining, row).completions == ('<tool_call>add{"a": "é"}</tool_call><|im_end|>',)
    assert '"arguments": {"a": ' in laid_out(TOOLS, row).completions[0]


def test_a_turn_without_tool_calls_is_the_same_with_an_empty_list_of_them():
    strict = CHATML.replace("m['content'] +", "('called' if 'tool_calls' in m else '') + m['content'] +")
    assert laid_out(strict, {"messages": [user("x"), {**says("y"), "tool_calls": []}]}).completions == ("y<|im_end|>",)


def test_arguments_are_given_as_text_where_the_template_would_print_an_object_as_python_does():
    prints = (
        "{% for m in messages %}<|im_start|>{{ m['content'] }}{% for c in m['tool_calls'] or [] %}"
        "{{ c['function']['name'] }}{{ ARGUMENTS }}{% endfor %}<|im_end|>{% endfor %}"
    )
    arguments = {"city": "Rome", "days": [1], "warm": True, "unit": "°C"}
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "weather", "arguments": arguments}}]}
    written = json.dumps(arguments, ensure_ascii=False)
    for printed in ("c['function']['arguments']", "'' ~ c.function.arguments"):
        (completion,) = laid_out(prints.replace("ARGUMENTS", printed), {"messages": [user("x"), call]}).completions
        assert written in completion
    dumps = prints.replace("ARGUMENTS", "c['function']['arguments'] | tojson")
    (completion,) = laid_out(dumps, {"messages": [user(str(arguments)), call]}).completions  # words like a printed object
    assert written in completion


# --- turns of words alone

TALKS = [
    [user("What is 1 + 1?")],
    [turn("system", "Be brief."), user(" a\n"), says("<b>two</b> {{ x }}"), user("é 你好"), says("")],
    [user("x"), says("<think>one</think>two"), user("y"), says("z")],
]


def by_transformers(made: PreTrainedTokenizerBase, jinja: str, turns: list[Any], *, generate: bool) -> str | None:
    try:
        text = made.apply_chat_template(turns, chat_template=jinja, tokenize=False, add_generation_prompt=generate)
    except Exception:
        return None
    assert isinstance(text, str)
    return text


@pytest.mark.parametrize("file", sorted((Path(__file__).parent / "templates").glob("*.jinja")), ids=lambda file: file.stem)
def test_turns_of_words_are_rendered_as_transformers_renders_them(file: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(rendering, "FIRST", 0)
    monkeypatch.setattr(rendering, "CHECKED", 10**9)  # so that this test alone compares
    made, jinja = tokenizer(), file.read_text()
    quick = Renderer(made, jinja)._of_words
    for turns in TALKS:
        for generate in (True, False):
            assert quick.render(turns, generate=generate) == by_transformers(made, jinja, turns, generate=generate)
    assert quick._count > 0


def test_turns_with_more_than_words_are_left_to_transformers():
    quick = Renderer(tokenizer(TOOLS), TOOLS)._of_words
    assert quick.render([user("x")], generate=True) is not None
    for other in ({**says("x"), "tool_calls": []}, turn("user", [{"type": "text", "text": "x"}]), {"role": "assistant"}):
        assert quick.render([user("x"), other], generate=False) is None


@pytest.mark.parametrize("first", [0, 8])
def test_what_transformers_renders_otherwise_it_renders_alone(
    first: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(rendering, "FIRST", first)
    monkeypatch.setattr(rendering, "CHECKED", 3)
    whole = chat_template_utils._compile_jinja_template
    monkeypatch.setattr(chat_template_utils, "_compile_jinja_template", lambda jinja: whole(jinja + "!"))
    render = Renderer(tokenizer(), CHATML)
    monkeypatch.undo()
    monkeypatch.setattr(rendering, "FIRST", first)
    monkeypatch.setattr(rendering, "CHECKED", 3)
    texts = [render([user("x")], "a row", generate=False) for _ in range(5)]
    right = "<|im_start|>user\nx<|im_end|>\n"
    assert texts == ([right] * 5 if first else [right + "!"] * 2 + [right] * 3)
    assert caplog.text.count("transformers renders a conversation otherwise") == 1


def test_a_tokenizer_with_a_rendering_of_its_own_is_asked(monkeypatch: pytest.MonkeyPatch):
    made = tokenizer()
    monkeypatch.setattr(type(made), "apply_chat_template", lambda self, turns, **given: "its own")
    assert Renderer(made, CHATML)([user("x")], "a row", generate=True) == "its own"


def test_without_the_function_of_transformers_it_renders_all(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delattr(chat_template_utils, "_compile_jinja_template")
    quick = Renderer(tokenizer(), CHATML)._of_words
    assert quick.render([user("x")], generate=True) is None
