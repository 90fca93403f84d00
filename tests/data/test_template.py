from pathlib import Path

import pytest

from halos.data.template import PLAIN, Layout, Template, chat_template
from halos.errors import UserError

from .tokenizers import CHATML, GEMMA, LAST_THOUGHT, LLAMA3, NO_END, THINKING, TOOLS, says, tokenizer, turn, user

PROMPT, ANSWER = (user("What is 1 + 1?"),), (says("It is 2."),)


def lay_out(template: str | None, prompt=PROMPT, *completions, **how) -> Layout:
    return Template(tokenizer(template, **how)).lay_out(prompt, completions or (ANSWER,), "a.jsonl:7")


def test_the_end_token_belongs_to_the_completion_and_the_newline_after_it_does_not():
    layout = lay_out(CHATML)
    assert layout.prompt == "<|im_start|>user\nWhat is 1 + 1?<|im_end|>\n<|im_start|>assistant\n"
    assert layout.completions == ("It is 2.<|im_end|>",)
    assert layout.spans == (((0, len("It is 2.<|im_end|>")),),)
    assert layout.exact


def test_the_end_token_is_the_one_of_the_template_and_not_the_eos_of_the_tokenizer():
    assert lay_out(LLAMA3).completions == ("It is 2.<|eot|>",)
    assert lay_out(GEMMA).completions == ("It is 2.<end_of_turn>",)
    assert lay_out(GEMMA).prompt.endswith("<start_of_turn>model\n")


def test_a_template_without_an_end_token_gets_the_eos_of_the_tokenizer_in_place_of_its_newline():
    assert lay_out(NO_END).completions == ("It is 2.</s>",)


def test_an_end_token_within_the_content_does_not_end_the_completion():
    layout = lay_out(CHATML, PROMPT, (says("Write <|im_end|> to stop."),))
    assert layout.completions == ("Write <|im_end|> to stop.<|im_end|>",)


def test_of_several_end_tokens_the_last_ends_the_completion_or_the_tokenizers_own():
    twice = CHATML.replace("'<|im_end|>'", "'<|eot|><|im_end|>'")
    assert twice != CHATML
    assert lay_out(twice).completions == ("It is 2.<|eot|><|im_end|>",)
    assert lay_out(twice, eos="<|eot|>").completions == ("It is 2.<|eot|>",)


def test_trimmed_content_still_ends_at_its_end_token():
    assert lay_out(LLAMA3, PROMPT, (says("  It is 2. \n"),)).completions == ("It is 2.<|eot|>",)


def test_where_the_template_opens_a_thought_the_prompt_ends_before_it_and_the_row_is_not_exact():
    layout = lay_out(THINKING)
    assert layout.prompt == "<s><|user|>What is 1 + 1?<|assistant|>"
    assert layout.completions == ("It is 2.</s>",)
    assert not layout.exact


def test_a_completion_that_shares_characters_with_the_opened_thought_keeps_them():
    assert lay_out(THINKING, PROMPT, (says("<b>2</b>"),)).completions == ("<b>2</b></s>",)
    spoken = THINKING.replace("<think>\n", "Let me think:")
    assert lay_out(spoken, PROMPT, (says("Let us add."),)).completions == ("Let us add.</s>",)
    tagged = THINKING.replace("m['content'].split", "'<thought>' + m['content'].split")
    assert lay_out(tagged).completions == ("<thought>It is 2.</s>",)  # <th is common to <think> and <thought>


def test_both_completions_share_the_prompt_even_where_one_deviates_from_the_template_earlier():
    keeps = THINKING.replace(".split('</think>')[-1]", "")
    layout = lay_out(keeps, PROMPT, (says("<think>\nOne and one.</think>2"),), (says("2"),))
    assert layout.prompt.endswith("<|assistant|>")
    assert layout.completions == ("<think>\nOne and one.</think>2</s>", "2</s>")


def test_a_template_that_renders_the_prompt_differently_once_it_is_answered_is_refused_by_row():
    shifting = "{{ messages | length }}" + CHATML
    with pytest.raises(UserError, match=r"a\.jsonl:7.*renders the prompt differently"):
        lay_out(shifting)


def test_a_row_that_the_template_refuses_is_named():
    with pytest.raises(UserError, match=r"a\.jsonl:7.*System role not supported"):
        lay_out(GEMMA, (turn("system", "Be brief."), *PROMPT))


def test_every_assistant_turn_of_a_completion_is_scored_with_its_end_token_and_nothing_else():
    talk = (says("One."), user("And then?"), says("Two."))
    layout = lay_out(CHATML, PROMPT, talk)
    text = layout.completions[0]
    assert [text[start:end] for start, end in layout.spans[0]] == ["One.<|im_end|>", "Two.<|im_end|>"]
    assert text.endswith("Two.<|im_end|>")


def test_turns_that_a_template_rewrites_later_cannot_be_scored_together():
    talk = (says("<think>x</think>One."), user("And then?"), says("Two."))
    with pytest.raises(UserError, match=r"a\.jsonl:7.*data\.score=last"):
        lay_out(LAST_THOUGHT, PROMPT, talk)


def call(name: str) -> dict:
    return {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"type": "function", "function": {"name": name, "arguments": {}}}],
    }


def test_a_tool_call_is_scored_up_to_the_end_of_its_turn():
    layout = lay_out(TOOLS, PROMPT, (call("add"), turn("tool", "2"), says("It is 2.")))
    text = layout.completions[0]
    assert [text[start:end] for start, end in layout.spans[0]][1] == "It is 2.<|im_end|>"
    assert text[slice(*layout.spans[0][0])].endswith("</tool_call><|im_end|>")
    assert lay_out(TOOLS, PROMPT, (call("add"),)).completions[0].endswith("</tool_call><|im_end|>")


def test_a_template_that_leaves_tool_calls_out_is_refused():
    silent = CHATML.replace("m['content']", "(m['content'] or '')")
    with pytest.raises(UserError, match=r"a\.jsonl:7.*leaves out.*add"):
        lay_out(silent, PROMPT, (call("add"),))


def test_without_a_template_the_plain_default_serves_and_ends_with_eos():
    layout = lay_out(None, (turn("system", "Be brief."), *PROMPT))
    assert layout.prompt == "Be brief.\n\nUser: What is 1 + 1?\n\nAssistant:"
    assert layout.completions == (" It is 2.</s>",)
    with pytest.raises(UserError, match="no tool calls"):
        lay_out(None, PROMPT, (call("add"),))


def test_the_plain_default_starts_with_bos_only_where_the_tokenizer_adds_one():
    assert lay_out(None, bos=True).prompt.startswith("<s>User")
    assert lay_out(None, bos=False).prompt.startswith("User")


def test_a_chat_template_may_be_jinja_or_a_file(tmp_path: Path):
    made = tokenizer(CHATML)
    assert chat_template(made, None) == CHATML
    assert chat_template(made, GEMMA) == GEMMA
    (tmp_path / "mine.jinja").write_text(LLAMA3)
    assert chat_template(made, str(tmp_path / "mine.jinja")) == LLAMA3
    assert chat_template(tokenizer(None), None) == PLAIN
    with pytest.raises(UserError, match=r"model\.chat_template=.*no such file"):
        chat_template(made, str(tmp_path / "other.jinja"))


# --- omissions of a template


def test_an_omitted_part_of_a_row_is_refused_by_name():
    tells_of_no_tool = CHATML.replace("for m in messages", "for m in messages if m['role'] != 'tool'")
    talk = (*PROMPT, says("One moment."), turn("tool", "2"))
    for result in ("21 degrees", "2"):  # which stands in the answer too
        with pytest.raises(UserError, match=r"a\.jsonl:7: the chat template leaves out a tool's result"):
            lay_out(tells_of_no_tool, (*talk[:-1], turn("tool", result)), (says("It is 2."),))
    assert lay_out(CHATML, talk, (says("It is 2."),)).completions == ("It is 2.<|im_end|>",)
    without_system = CHATML.replace("for m in messages", "for m in messages if m['role'] != 'system'")
    with pytest.raises(UserError, match=r"leaves out words of the system \('Be brief\.'\)"):
        lay_out(without_system, (turn("system", "Be brief."), *PROMPT))
    silent = TOOLS.replace("call['function'] | tojson", "call['function']['name']")
    asked = {**call("add"), "tool_calls": [{"function": {"name": "add", "arguments": {"a": 1}}}]}
    with pytest.raises(UserError, match="leaves out the arguments of a tool call"):
        lay_out(silent, PROMPT, (asked,))
    assert '"a": 1' in lay_out(TOOLS, PROMPT, (asked,)).completions[0]


def test_a_thought_that_is_trained_on_must_be_rendered_and_one_of_an_earlier_turn_need_not():
    thought = says("<think>\ncarry the one\n</think>\n\n32")
    for one in (thought, {**says("32"), "reasoning_content": "carry the one"}):
        with pytest.raises(UserError, match=r"leaves out a thought that is to be learned.*'carry the one'"):
            lay_out(THINKING, PROMPT, (one,))
    assert lay_out(THINKING, (*PROMPT, thought, user("And then?")), (says("Two."),)).completions == ("Two.</s>",)
    assert "carry the one" in lay_out(LAST_THOUGHT, PROMPT, (thought,)).completions[0]


def test_trimmed_escaped_and_repeated_words_are_not_omitted():
    quoting = CHATML.replace("m['content']", "m['content'] | tojson")
    assert lay_out(quoting, (user('Say "one"\n'),), (says("one"),)).prompt.count('Say \\"one\\"') == 1
    assert lay_out(LLAMA3, (user("  x \n"), says(" x "), user("x")), (says(" x"),)).completions == ("x<|eot|>",)


def test_a_turn_of_weight_0_is_in_the_row_and_is_not_scored():
    talk = (says("Two."), user("Sure?"), {**says("No."), "weight": 0}, user("So?"), says("Yes."))
    layout = lay_out(CHATML, PROMPT, talk)
    assert [layout.completions[0][start:end] for start, end in layout.spans[0]] == ["Two.<|im_end|>", "Yes.<|im_end|>"]
    assert "No.<|im_end|>" in layout.completions[0]


def test_one_of_several_templates_must_be_the_default():
    several = tokenizer(CHATML)
    several.chat_template = {"tool_use": CHATML, "rag": CHATML}
    with pytest.raises(UserError, match=r"several chat templates \(tool_use, rag\) and no default: model.chat_template=FILE"):
        chat_template(several, None)
    assert chat_template(several, GEMMA) == GEMMA
    several.chat_template = {"tool_use": GEMMA, "default": CHATML}
    assert chat_template(several, None) == CHATML
