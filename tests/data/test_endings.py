from dataclasses import replace

import numpy as np
import pytest

from halos.data.template import Layout, Template
from halos.data.tokenize import APART, Encoded, Encoder, end_of_turn
from halos.errors import UserError
from halos.types import Comparison, Demonstration
from launch.templates import CHECKS, FIXTURES, Family, asks, cells, families, fault_of, line, says

from .tokenizers import CHATML, GEMMA, LAST_THOUGHT, LLAMA3, NO_END, THINKING, jsonl, prepared, tokenizer, turn, user
from .tokenizers import says as answer

PROMPT = (user("What is 1 + 1?"),)
TALK = (answer("It is 2."), user("And then?"), answer("Three."))
# As Command-R's later ones: the words are closed before the turn is, and the next turn begins at once.
CLOSED = """\
{% for m in messages %}{{ '<|start|>' + m['role'] + '<|end|>' + m['content'] + '<|im_end|><|eot|>' }}{% endfor %}\
<|start|>assistant{% if add_generation_prompt %}<|end|>{% endif %}"""
# As GLM-4.5's: a turn is ended by the token that begins the next one.
BY_NEXT = """\
{% for m in messages %}{{ {'user': '<|user|>', 'tool': '<|good|>', 'assistant': '<|assistant|>'}[m['role']] }}{{ m['content'] }}\
{% for call in m['tool_calls'] or [] %}{{ '<tool_call>' + call['function'] | tojson + '</tool_call>' }}{% endfor %}{% endfor %}\
{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"""
BOS_FIRST = """\
{% for m in messages %}{{ ('<s>Q:' if m['role'] == 'user' else 'A:') + m['content'] }}{% endfor %}\
{% if add_generation_prompt %}{{ 'A:' }}{% endif %}"""
ODD = CHATML.replace("+ '<|im_end|>'", "+ ('<|im_end|>' if m['content'] != 'It is 2.' or loop.last else '')")


def scored(template: str, *, eos: str = "</s>") -> list[str]:
    layout: Layout = Template(tokenizer(template, eos=eos)).lay_out(PROMPT, (TALK,), "a.jsonl:7")
    return [layout.completions[0][start:end] for start, end in layout.spans[0]]


def stops(template: str, *, eos: str = "</s>") -> list[str]:
    made = tokenizer(template, eos=eos)
    return made.convert_ids_to_tokens(list(end_of_turn(made)))


def test_the_end_token_is_the_last_before_the_next_turn_and_every_scored_turn_has_it():
    for eos in ("<|eot|>", "</s>"):
        assert scored(CLOSED, eos=eos) == ["It is 2.<|im_end|><|eot|>", "Three.<|im_end|><|eot|>"]
        assert stops(CLOSED, eos=eos) == ["<|eot|>"]


def test_where_the_next_turn_ends_a_turn_its_first_token_is_scored_and_stops_generation():
    assert scored(BY_NEXT) == ["It is 2.<|user|>", "Three.<|user|>"]
    assert stops(BY_NEXT) == ["<|user|>", "<|good|>"]
    call = {**turn("assistant", ""), "tool_calls": [{"function": {"name": "add", "arguments": {"a": 1}}}]}
    layout = Template(tokenizer(BY_NEXT)).lay_out(PROMPT, ((call, turn("tool", "2"), *TALK),), "")
    text, spans = layout.completions[0], layout.spans[0]
    assert [text[start:end].rpartition(">")[0].rpartition("<")[2] for start, end in spans] == ["|good|", "|user|", "|user|"]


@pytest.mark.parametrize("template", [CHATML, LLAMA3, GEMMA, THINKING, BY_NEXT.replace("m['tool_calls']", "none")])
def test_a_turn_of_which_the_template_drops_the_calls_ends_as_its_words_would_alone(template: str):
    made = tokenizer(template)
    call = {**answer("It is 2."), "tool_calls": [{"function": {"name": "add", "arguments": {"a": 1}}}]}
    kept, plain = (Template(made, lost="keep").lay_out(PROMPT, ((each,),), "") for each in (call, answer("It is 2.")))
    assert (kept.completions, kept.spans) == (plain.completions, plain.spans)
    assert plain.completions[0].endswith(made.convert_ids_to_tokens(end_of_turn(made)[0]))


@pytest.mark.parametrize(
    "template",
    [NO_END, BOS_FIRST, ODD, CHATML.replace("+ '<|im_end|>'", "+ ('</s>' if loop.last and m['role'] != 'user' else '')")],
)
def test_earlier_turns_that_no_token_ends_are_not_scored_silently(template):
    with pytest.raises(UserError, match=r"a\.jsonl:7: the chat template writes no end token after an assistant turn that others"):
        scored(template)
    layout = Template(tokenizer(template)).lay_out((*PROMPT, *TALK[:2]), (TALK[2:],), "")
    assert layout.completions == ("Three.<|im_end|>" if template == ODD else "Three.</s>",)


# --- known families


@pytest.mark.parametrize("family", families(), ids=lambda family: family.name)
def test_no_conversation_is_tokenised_wrong_and_none_more_is_refused(family: Family):
    found = cells(family)
    assert not {name: why for name, (cell, why) in found.items() if cell == "WRONG"}
    assert line(family.name, *(cell for cell, _ in found.values())) in (FIXTURES / "table.md").read_text().splitlines()


def test_the_table_has_every_family_and_conversation():
    first, _, *rows = (FIXTURES / "table.md").read_text().splitlines()
    assert first == line("template", *CHECKS)
    assert [row.split(" | ")[0][2:] for row in rows[: len(families())]] == [family.name for family in families()]


def test_the_rule_of_the_table_sees_every_wrong_flag_of_a_mask():
    (family,) = families(["chatml"])
    made, talk = family.tokenizer(), [asks("ask1z"), says("say2z"), asks("ask3z"), says("say4z")]
    talk[1].scored = talk[3].scored = True
    example = Demonstration((talk[0].turn,), tuple(said.turn for said in talk[1:]))
    (done,) = Encoder(made, max_length=1000, truncation="error").encode([(example, "")])
    assert isinstance(done, Encoded)
    pieces = [made.decode([token]) for token in (*done.prompt, *done.completions[0].ids)]
    right = np.concatenate([np.zeros(len(done.prompt), bool), done.completions[0].scored])

    def fault(mask: np.ndarray, family: Family = family) -> str | None:
        flags = [bool(flag) for piece, flag in zip(pieces, mask, strict=True) for _ in piece]
        return fault_of(family, "".join(pieces), flags, talk, ())

    assert fault(right) is None
    for n in range(len(right)):
        assert fault(right ^ (np.arange(len(right)) == n)), f"token {n}, {pieces[n]!r}"
    for shift in (-1, 1):
        assert fault(np.roll(right, shift))
    assert fault(right, replace(family, end="<|endoftext|>"))
    talk[1].words.append("lost5z")
    assert "lost" in (fault(right) or "")


# --- scored turns that cannot be one sequence

THOUGHTS = (answer("<think>x</think>One."), user("And then?"), answer("<think>y</think>Two."))


def test_scored_turns_that_change_once_others_follow_become_an_example_each_as_a_sampler_met_them():
    encoder = Encoder(tokenizer(LAST_THOUGHT), max_length=1000, truncation="error")
    plain = Demonstration(PROMPT, (answer("One."),))
    parts, (other,) = encoder.encode_turns([(Demonstration(PROMPT, THOUGHTS), ""), (plain, "")])
    alone = [Demonstration(PROMPT, THOUGHTS[:1]), Demonstration((*PROMPT, *THOUGHTS[:2]), THOUGHTS[2:])]
    for part, same in zip(parts, encoder.encode([(each, "") for each in alone]), strict=True):
        assert isinstance(part, Encoded)
        assert isinstance(same, Encoded)
        assert part.prompt.tolist() == same.prompt.tolist()
        assert part.completions[0].ids.tolist() == same.completions[0].ids.tolist()
        assert part.completions[0].scored.all()
        assert APART in part.notes
    assert isinstance(other, Encoded)
    assert other.notes == ()
    half = Demonstration(PROMPT, ({**THOUGHTS[0], "weight": 0}, *THOUGHTS[1:], user("So?"), THOUGHTS[2]))
    assert len(encoder.encode_turns([(half, "")])[0]) == 2, "a turn of weight 0 is none of them"
    pair = Comparison(PROMPT, THOUGHTS, (answer("No."),))
    with pytest.raises(UserError, match=r"a\.jsonl:7: the chat template changes an assistant turn once others follow"):
        encoder.encode_turns([(pair, "a.jsonl:7")])


def test_turns_of_a_conversation_that_are_examples_are_counted_and_named_apart(tmp_path):
    rows = [{"messages": [*PROMPT, *THOUGHTS]}, {"messages": [*PROMPT, answer("One.")]}]
    data = prepared(jsonl(tmp_path / "a.jsonl", rows), tmp_path / "cache", score="all", tokenizer=tokenizer(LAST_THOUGHT))
    (counts,) = data.report
    assert (counts.rows, counts.examples, counts.kept, counts.noted[APART]) == (2, 3, 3, 2)
    assert len({item.id for item in data}) == len(data) == 3
    longest = int(data.lengths.max())
    short = prepared(jsonl(tmp_path / "a.jsonl", rows), tmp_path / "cache", score="all", tokenizer=tokenizer(LAST_THOUGHT),
                     max_length=longest - 1)  # fmt: skip
    assert (short.report[0].examples, short.report[0].kept, sum(short.report[0].dropped.values())) == (3, 2, 1)
