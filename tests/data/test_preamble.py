import re
from dataclasses import replace
from typing import Any

import pytest

from halos.data.preamble import with_preamble, without_preamble
from halos.data.template import Template, template_of_run
from halos.errors import UserError
from launch.templates import cells, families

from .tokenizers import CHATML, GEMMA, LLAMA3, says, tokenizer, turn, user

READS = "{{ 'mood=' + mood | string if mood is defined else 'no mood' }}{{ 'odd' if odd }}" + CHATML
TALK = (turn("system", "Be brief."), user("One?"), says("one"), user("Two?"))


def prompt(template: str, turns: tuple[Any, ...] = TALK, **row: Any) -> str:
    first = {**turns[0], "chat_template_kwargs": row} if row else turns[0]
    return Template(tokenizer(template)).generation_prompt((first, *turns[1:]), "a.jsonl:7")


@pytest.mark.parametrize("value", [False, True, 0.5, -3, 'it\'s "so"\n{% x %} {{ é😀 }}', [1, ["a", None]], {"b c": {"d": True}}])
def test_a_setting_of_the_run_is_what_the_template_would_get_as_an_argument_and_a_rows_own_comes_first(value):
    template = with_preamble(READS, {"mood": value}, merges_system=False)
    assert prompt(template) == prompt(READS, mood=value) != prompt(READS)
    assert prompt(template, mood="low").startswith("mood=low")
    assert without_preamble(template) == READS


def test_a_setting_that_the_template_does_not_read_is_refused_by_its_key():
    for name in ("enable_thinking", "mo", "messages", "a b"):
        with pytest.raises(UserError, match=rf"data\.chat_template_kwargs.*{name}"):
            with_preamble(READS, {name: True}, merges_system=False)
    with pytest.raises(UserError, match=r"data\.chat_template_kwargs\.mood.*JSON"):
        with_preamble(READS, {"mood": float("nan")}, merges_system=False)


def test_a_run_on_a_model_that_another_saved_keeps_its_settings_and_changes_those_that_it_names():
    made = tokenizer(with_preamble(READS, {"mood": "low", "odd": 1}, merges_system=True))
    assert template_of_run(made, None, {}, "keep") == made.chat_template
    again = template_of_run(made, None, {"mood": "high"}, "merge")
    assert again == with_preamble(READS, {"mood": "high", "odd": 1}, merges_system=True)
    assert prompt(again).startswith("mood=highodd<|im_start|>user\nBe brief.\n\nOne?<|im_end|>")


def test_a_system_turn_goes_into_the_first_user_turn_where_the_run_says_so():
    with pytest.raises(
        UserError, match=r"System role not supported; data\.system=merge puts a system turn into the first user turn"
    ):
        prompt(GEMMA)
    for template in (GEMMA, LLAMA3, CHATML):
        merged = with_preamble(template, {}, merges_system=True)
        for first in (TALK[0], turn("developer", "Be brief.")):
            assert prompt(merged, (first, *TALK[1:])) == prompt(template, (user("Be brief.\n\nOne?"), *TALK[2:]))
        assert prompt(merged, TALK[1:]) == prompt(template, TALK[1:])


def test_under_every_family_a_merged_system_turn_is_in_the_prompt():
    for family in families(["gemma-2", "mistral-nemo", "mistral-v3"]):
        before = {name: cell for name, (cell, _) in cells(family).items()}
        after = cells(replace(family, template=with_preamble(family.template, {}, merges_system=True)))
        assert [before[name] for name in ("sys", "sys-all", "pair-sys", "developer")] == ["refused"] * 4
        assert [after[name] for name in ("sys", "sys-all", "pair-sys", "developer")] == [("ok", "")] * 4
        assert all(re.fullmatch("ok|refused", cell) for cell, _ in after.values())
