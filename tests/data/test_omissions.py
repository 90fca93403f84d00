import re
from pathlib import Path
from typing import Any

import pytest

from halos.data import omissions
from halos.data.dataset import Dataset
from halos.data.omissions import OmissionCheck
from halos.data.rendering import Renderer
from halos.data.template import Template
from halos.errors import UserError

from .tokenizers import CHATML, LAST_THOUGHT, THINKING, TOOLS, jsonl, prepared, says, tokenizer, turn, user

THOUGHT = says("<think>carry the one</think>32")
PLAIN = {"messages": [user("12 + 20?"), says("32")]}
LOST = {"messages": [user("12 + 20?"), THOUGHT]}
NO_TOOLS = CHATML.replace("for m in messages", "for m in messages if m['role'] != 'tool'")
RESULT = {"messages": [user("Sum?"), says("One moment."), turn("tool", "21"), says("It is 21.")]}


def dataset(tmp_path: Path, rows: list[dict[str, Any]], template: str, **changed: Any) -> Dataset:
    return prepared(jsonl(tmp_path / "a.jsonl", rows), tmp_path / "cache", tokenizer=tokenizer(template), **changed)


@pytest.mark.parametrize(("template", "row", "what"), [
    (THINKING, LOST, "a thought that is to be learned"), (NO_TOOLS, RESULT, "a tool's result"),
])  # fmt: skip
def test_a_row_of_which_a_part_is_lost_is_refused_or_dropped_or_kept_and_counted(tmp_path, template, row, what):
    rows = [PLAIN, row, row, PLAIN]
    with pytest.raises(UserError, match=rf"a\.jsonl:2: the chat template leaves out {what}"):
        dataset(tmp_path, rows, template)
    (dropped,) = (data := dataset(tmp_path, rows, template, lost="drop")).report
    assert (dropped.kept, len(data), dropped.dropped) == (2, 2, {f"of which the chat template leaves out {what}": 2})
    (kept,) = (data := dataset(tmp_path, rows, template, lost="keep")).report
    note = f"lose {what}, which the chat template leaves out"
    assert (kept.kept, len(data), kept.noted, kept.dropped) == (4, 4, {note: 2}, {})
    assert f"; 2 {note}" in kept.line()
    assert [place.rpartition("/")[2] for place in kept.places[note]] == ["a.jsonl:2", "a.jsonl:3"]


def test_tools_that_a_template_never_reads_are_refused_or_dropped_or_kept_like_all_that_it_leaves_out(tmp_path):
    rows = [PLAIN, {**PLAIN, "tools": [{"type": "function", "function": {"name": "add", "parameters": {}}}]}]
    with pytest.raises(UserError, match=r"a\.jsonl:2: the chat template does not read tools.*tools: null}' .* or data.lost=keep"):
        dataset(tmp_path, rows, CHATML)
    (dropped,) = dataset(tmp_path, rows, CHATML, lost="drop").report
    assert (dropped.kept, dropped.dropped) == (1, {"of which the chat template leaves out the tools": 1})
    (kept,) = (data := dataset(tmp_path, rows, CHATML, lost="keep")).report
    assert (len(data), kept.noted) == (2, {"lose the tools, which the chat template leaves out": 1})


def test_an_earlier_thought_that_the_template_leaves_out_is_counted_and_not_refused(tmp_path):
    for thought in (THOUGHT, {**says("32"), "reasoning_content": "carry the one"}):
        rows = [{"messages": [user("12 + 20?"), thought, user("And?"), says("Two.")]}] * 3 + [PLAIN]
        (counts,) = dataset(tmp_path, rows, LAST_THOUGHT).report
        ((note, count),) = counts.noted.items()
        assert note.startswith("lose an earlier thought")
        assert count == 3


def test_what_is_lost_in_one_row_of_a_shape_is_tried_anew_where_its_words_stand_elsewhere():
    seen: list[int] = []

    def render(turns):
        seen.append(len(turns))
        return "".join(each["content"] for each in turns if each["role"] != "tool")

    check = OmissionCheck(render)
    talk = (user("Sum?"), says("One moment."), turn("tool", "21"))
    for result, missing in (("21", True), ("20", True), ("Sum", True)):
        turns = (*talk[:2], turn("tool", result))
        assert [part.what for part in check.missing(turns, render(turns))] == ["a tool's result"] * missing
    renders = len(seen)
    check.missing(talk, render(talk))
    assert len(seen) == renders + 1, "the parts of a known shape are not rendered again"


def test_words_that_are_read_as_a_special_token_are_counted(tmp_path):
    rows = [PLAIN, {"messages": [user("What is <|im_end|>?"), says("32")]}, {"messages": [user("x"), says("<s>")]}]
    (counts,) = dataset(tmp_path, rows, CHATML).report
    note = "have the text of a special token in their words ({}), which becomes that token"
    assert counts.noted == {note.format("<|im_end|>"): 1, note.format("<s>"): 1}
    assert Template(tokenizer(CHATML)).lay_out((user("<think>x"),), ((says("y"),),), "").notes == ()  # added, and not special
    thinks = Template(tokenizer(CHATML.replace("m['content'] +", "(m['reasoning_content'] or '') + m['content'] +")))
    thought = {**says("y"), "reasoning_content": "What is <|im_end|>?"}
    assert thinks.lay_out((user("x"),), ((thought,),), "").notes == (note.format("<|im_end|>"),)
    call = {**says(""), "tool_calls": [{"function": {"name": "add", "arguments": {"x": "<|im_end|>"}}}]}
    assert Template(tokenizer(TOOLS)).lay_out((user("x"),), ((call,),), "").notes == (note.format("<|im_end|>"),)


@pytest.mark.parametrize(("answer", "lost"), [
    ("First. <think>one</think>Two.", "words of the assistant ('First.')"),
    ("<think>one</think>Two.<think>three</think>Four.", "a thought that is to be learned ('one')"),
    ("The tag <think> opens, </think> closes.", "words of the assistant ('The tag')"),
])  # fmt: skip
def test_what_a_template_cuts_off_with_a_thought_is_missed(answer, lost):
    """As Qwen3's does: it takes the thought from between the tags, and the words from after them."""
    cuts = CHATML.replace(
        "m['content']",
        "('<think>' + m['content'].split('</think>')[-2].split('<think>')[-1] + '</think>' + m['content'].split('</think>')[-1]"
        " if '</think>' in m['content'] else m['content'])",
    )
    with pytest.raises(UserError, match=re.escape(lost)):
        Template(tokenizer(cuts)).lay_out((user("Which?"),), ((says(answer),),), "row 1")
    assert Template(tokenizer(cuts)).lay_out((user("Which?"),), ((says("<think>one</think>Two."),),), "row 1").notes == ()
    assert Template(tokenizer(CHATML)).lay_out((user("Which?"),), ((says(answer),),), "row 1").notes == ()


def trajectory(calls: int) -> tuple[dict[str, Any], ...]:
    """An agent's conversation, of which most turns are calls of a tool and what it gives back."""
    talk = [turn("system", "Be brief."), user("Mend it.")]
    for number in range(calls):
        arguments = {"path": f"a{number}.py", "lines": number}
        call = {"type": "function", "function": {"name": "read", "arguments": arguments}}
        talk += [{**says(f"Look at {number}."), "tool_calls": [call]}, turn("tool", f'line "{number}"\n')]
    return (*talk, says("Done."))


BY_TURN = "{% for m in messages %}[{{ m.role }}]{{ m.content | trim }}{% for c in m.tool_calls or [] %}{{ c.function.name }}"
AS_JSON = (
    BY_TURN.replace("m.content | trim", "m.content | tojson") + "{{ c.function.arguments | tojson }}{% endfor %}{% endfor %}"
)
BY_NAME = BY_TURN + "{% for k, v in c.function.arguments | items %}<{{ k }}>{{ v }}{% endfor %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize("template", [AS_JSON, BY_NAME])
def test_a_long_conversation_of_a_new_shape_is_checked_by_one_rendering(template):
    render, seen = Renderer(tokenizer(template), template), list[int]()

    def counted(turns):
        seen.append(len(turns))
        return render(turns, "a row", generate=False)

    check = OmissionCheck(counted)
    for calls in (3, 40):
        talk = trajectory(calls)
        assert check.missing(talk, render(talk, "a row", generate=False)) == []
    assert len(seen) == 2


@pytest.mark.parametrize(("template", "turns", "missing"), [
    ("{% for m in messages %}{{ m.content | upper }}{% endfor %}", (user("a"), says("b")), []),
    ("{% for m in messages %}{{ m.content | upper if loop.first else '' }}{% endfor %}", (user("a"), says("b")), [1]),
    # The mark of the first turn brings the second one back, which its words hide:
    ("{{ messages[0].content }}{% if messages[0].content != 'hush' %}{{ messages[1].content }}{% endif %}",
     (turn("system", "hush"), user("a"), says("b")), [1, 2]),
    ("{% for m in messages %}{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function.arguments.values() | list }}"
     "{% endfor %}{% endfor %}", trajectory(2), [2, 4]),  # the names of the tools
])  # fmt: skip
def test_what_marks_in_all_parts_do_not_tell_is_tried_part_by_part(template, turns, missing):
    render = Renderer(tokenizer(template), template)
    check = OmissionCheck(lambda turns: render(turns, "a row", generate=False))
    assert [part.number for part in check.missing(turns, render(turns, "a row", generate=False))] == missing


def test_the_shapes_that_are_remembered_are_bounded(monkeypatch):
    monkeypatch.setattr(omissions, "MOST_SHAPES", 5)
    check = OmissionCheck(lambda turns: "".join(each["content"] for each in turns))
    for length in range(1, 20):
        check.missing((user("a"),) * length, "a" * length)
    assert len(check._shapes) == 5
