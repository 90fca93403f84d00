"""Each check of the data finds what it is for, in rows made for it, and nothing in sound ones."""

import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from halos.data.dataset import Dataset
from halos.data.oddities import NO_EARLIER_END, SAMPLED_WITHOUT_END, EndTokens, Sampling
from halos.data.tokenize import Encoded, vocabulary_of
from halos.errors import UserError
from halos.examples import Completion
from halos.inspection import template_checks
from halos.inspection.data_checks import checks_of
from halos.inspection.findings import Check, Finding, refuse_errors
from halos.reward_kind import RewardKind
from halos.types import Comparison, Demonstration, Example, Judgement, Scored
from tests.data.tokenizers import CHATML, GEMMA, LAST_THOUGHT, LLAMA3, NO_END, jsonl, prepared, says, tokenizer, turn, user

SOUND = [{"prompt": f"What is {n}?", "completion": f"It is {n}."} for n in range(8)]
FIRST_PLAIN = """\
{{ bos_token }}{{ messages[0]['content'] }}{% for m in messages[1:] %}{{ '<|start|>' + m['content'] + '<|eot|>' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|start|>' }}{% endif %}"""  # a first turn that may begin with anything
PADDING = "the padding token is the end token </s>: scores are read at the token before it"
TWO_TURNS = {"messages": [user("a"), says("one"), user("b"), says("two")]}


def findings(data: Dataset, held_out: Dataset | None = None, used: Any = None, **more: Any) -> list[Finding]:
    settings = {"reward": None, "on_rollouts": False, **more}
    checks = checks_of(data, held_out, used or tokenizer(), **settings)
    return [finding for check in checks for finding in check.findings]


def of_rows(place: Path, rows: list[dict[str, Any]], *, kind: type[Example] = Demonstration, **settings: Any) -> list[Finding]:
    """The findings on a file of rows, without the directory in their places."""
    found = findings(prepared(jsonl(place / "a.jsonl", rows), place, kind=kind, **settings), used=settings.get("tokenizer"))
    short = partial(re.sub, r"/\S*/", "")
    return [replace(one, text=short(one.text), places=tuple(map(short, one.places))) for one in found]


def pair(prompt: str, chosen: str, rejected: str) -> dict[str, Any]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def test_nothing_is_found_in_sound_rows(tmp_path: Path) -> None:
    assert of_rows(tmp_path, SOUND) == []
    pairs = [pair("Who?", "one", "two"), pair("Who?", "one", "three"), pair("Which?", "two", "one")]
    assert of_rows(tmp_path, pairs, kind=Comparison) == []
    assert of_rows(tmp_path, pairs, kind=Judgement)[0].level == "note", "the first completion is the same in two pairs"
    talk = {"messages": [turn("system", "Be kind."), user("a"), says("one"), user("b"), says("two")]}
    assert of_rows(tmp_path, [talk], score="all") == []


ANSWERED = {"prompt": [user("Hi"), says("Hello")], "completion": [says("and again")]}
CASES = [
    ("a prompt that ends with the assistant", Demonstration, [*SOUND, ANSWERED], {},
     ("warning", "data.train: 1 prompt ends with a turn of the assistant", ("a.jsonl:9",))),
    ("a last turn without an answer", Demonstration, [*SOUND, {"messages": [*TWO_TURNS["messages"], user("c")]}], {},
     ("note", "data.train: 1 conversation ends with turns that the assistant does not answer: nothing is learned from them, and"
      " they are left out", ("a.jsonl:9",))),
    ("a prompt without words", Demonstration, [*SOUND, {"prompt": " \n", "completion": "x"}], {},
     ("warning", "data.train: 1 prompt has no words", ("a.jsonl:9",))),
    ("rows of several splits", Demonstration, [{**row, "split": "test" if n > 5 else "train"} for n, row in enumerate(SOUND)], {},
     ("warning", "data.train: a.jsonl mixes rows of several splits (split=train 6, split=test 2)", ())),
    ("pairs that blanks alone tell apart", Comparison, [pair("Who?", "a b", "a  b\n"), pair("How?", "x", "y")], {},
     ("warning", "data.train: 1 pair differs in blanks alone", ("a.jsonl:1",))),
    ("pairs of equal completions", Comparison, [pair("Who?", "a", "a"), pair("How?", "x", "y")], {},
     ("note", "data.train: 1 pair of equal completions was dropped", ("a.jsonl:1",))),
    ("pairs that contradict each other", Comparison, [pair("Who?", "a", "b"), pair("How?", "x", "y"), pair("Who?", "b", "a")], {},
     ("warning", "data.train: 2 pairs prefer what others reject", ("a.jsonl:1", "a.jsonl:3"))),
    ("labels that contradict each other", Judgement,
     [{"prompt": "Who?", "completion": "me", "label": n == 0} for n in range(2)] + [{**SOUND[0], "label": True}], {},
     ("warning", "data.train: 2 examples are labelled both desirable and undesirable", ("a.jsonl:1", "a.jsonl:2"))),
    ("rows that repeat others", Demonstration, [*SOUND, *SOUND[:2]], {},
     ("warning", "data.train: 2 examples repeat another token for token", ("a.jsonl:1", "a.jsonl:2"))),
    ("equal rewards", Scored, [{**row, "reward": 0.5} for row in SOUND], {},
     ("warning", "data.train: all 8 rewards are 0.5", ())),
    ("one label only", Judgement, [{**row, "label": False} for row in SOUND], {},
     ("warning", "data.train: every example is undesirable", ())),
    ("a BOS in the rows", Demonstration, [*SOUND, {"prompt": "<s>", "completion": "x"}], {"tokenizer": tokenizer(FIRST_PLAIN)},
     ("warning", "data.train: 1 prompt begins with two BOS tokens", ("a.jsonl:9",))),
    ("a template that writes two", Demonstration, SOUND, {"tokenizer": tokenizer("{{ bos_token }}" + LLAMA3)},
     ("error", "data.train: every prompt begins with two BOS tokens", ("a.jsonl:1", "a.jsonl:2", "a.jsonl:3", "..."))),
    ("sampled tokens without an end", Demonstration,
     [{"type": "sample", "prompt": "Hi", "output": "one", "output_ids": [5, 6], "vocabulary": None}, *SOUND], {},
     ("warning", f"data.train: 1 example was {SAMPLED_WITHOUT_END}", ("a.jsonl:1",))),
    ("nothing to learn from", Scored, [{**row, "reward": n, "masked": True} for n, row in enumerate(SOUND)], {},
     ("error", "data.train: no token of any example is scored", ("a.jsonl:1", "a.jsonl:2", "a.jsonl:3", "..."))),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "rows", "settings", "wanted"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_a_mistake_in_the_data_is_found(
    kind: type[Example],
    rows: list[dict[str, Any]],
    settings: dict[str, Any],
    wanted: tuple[str, str, tuple[str, ...]],
    tmp_path: Path,
) -> None:
    rows = [{**row, "vocabulary": vocabulary_of(tokenizer())} if "vocabulary" in row else row for row in rows]
    (found,) = of_rows(tmp_path, rows, kind=kind, **settings)
    assert (found.level, found.text, found.places) == wanted
    assert found.level == "note" or found.remedy


def test_the_split_that_is_named_as_a_remedy_is_the_largest_that_may_be_trained_on(tmp_path: Path) -> None:
    (tmp_path / "more held out").mkdir()
    most = [{**row, "split": "Train-a" if n < 2 else "test"} for n, row in enumerate(SOUND)]
    (found,) = of_rows(tmp_path / "more held out", most)
    assert "split: Train-a}" in found.remedy
    (found,) = of_rows(tmp_path, [{**row, "split": "train" if n else "test"} for n, row in enumerate(SOUND)])
    assert re.fullmatch(r"\{path: \S*a.jsonl, split: train\} takes one", found.remedy)
    assert of_rows(tmp_path, [{**row, "subset": f"topic {n % 2}"} for n, row in enumerate(SOUND)]) == [], "topics are no splits"


def test_an_earlier_turn_without_an_end_is_found_and_rows_of_text_have_none(tmp_path: Path) -> None:
    used = tokenizer(NO_END)
    data = prepared(jsonl(tmp_path / "a.jsonl", [TWO_TURNS, *SOUND]), tmp_path, score="all", tokenizer=used)
    assert len(data) == len(SOUND) + 2, "each of the two turns is an example"
    assert findings(data, used=used) == []
    end, ends = used.eos_token_id, EndTokens.of(used, 200)
    odd = Completion(np.array([5, 6, 7, end], np.int32), np.array([True, False, True, True]))
    sound = replace(odd, ids=np.array([end, 6, 7, end], np.int32))
    example = Demonstration((user("a"),), (says("one"),))
    prompt = np.array([5], np.int32)
    assert [ends.missing(Encoded(prompt, (each,), True, False), Sampling.of(example)) for each in (odd, sound)] == [
        NO_EARLIER_END,
        None,
    ]
    data.report[0].note(NO_EARLIER_END, "a.jsonl:1")
    (found,) = findings(data, used=used)
    assert (found.level, found.places) == ("warning", ("a.jsonl:1",))
    assert found.text == "data.train: 1 example has an earlier scored turn without a scored end token"


def test_few_repetitions_are_only_noted_and_masked_samples_are_no_mistake(tmp_path: Path) -> None:
    many = [{"prompt": f"What is {n}?", "completion": f"It is {n}."} for n in range(200)]
    (found,) = of_rows(tmp_path, [*many, many[3]])
    assert (found.level, found.text) == ("note", "data.train: 1 example repeats another token for token")
    samples = [{**row, "reward": n} for n, row in enumerate(many[:9])]
    data = prepared(jsonl(tmp_path / "b.jsonl", [*samples, {**samples[3], "masked": True}]), tmp_path, kind=Scored)
    assert findings(data, on_rollouts=True) == []


def test_rows_sampled_at_another_temperature_than_training_are_found(tmp_path: Path) -> None:
    ids, vocabulary = [5, 6], vocabulary_of(tokenizer())
    tokens = {"output_ids": ids, "logps": [-1.0, -2.0], "vocabulary": vocabulary, "finish": "length"}
    heats = [1, 0.7, 0.7, None, 0]
    rows = [{"prompt": f"Who is {n}?", "completion": "x", "reward": n, **tokens, "temperature": t} for n, t in enumerate(heats)]
    rows.append({**rows[1], "prompt": "Where?", "output_ids": None, "logps": None})
    rows.append({**rows[1], "prompt": "Who else?", "vocabulary": "another"})  # whose log-probs are not kept
    data = prepared(jsonl(tmp_path / "a.jsonl", rows), tmp_path, kind=Scored)
    warm, greedy = findings(data, on_rollouts=True, temperature=1.0)
    assert warm.level == "warning"
    assert warm.text == "data.train: 2 rows were sampled at temperature 0.7, and train.temperature=1"
    assert warm.places == tuple(f"{tmp_path}/a.jsonl:{n}" for n in (2, 3))
    assert "train.temperature=0.7 makes the two equal, or sample at 1" in warm.remedy
    assert "1 row was sampled at temperature 0 (greedily, with log-probs at 1), and" in greedy.text
    assert "train.temperature=0" not in greedy.remedy, "which it does not take"
    found = findings(data, on_rollouts=True, temperature=0.7)
    assert [one.text.partition("sampled at temperature ")[2][:2] for one in found] == ["1,", "0 "]
    assert findings(data, temperature=0.3) == [], "only losses on rollouts read log-probs"
    for wrong in ("hot", -1):
        with pytest.raises(UserError, match=r"wrong.jsonl:1: temperature is ('hot'|-1); beside logps it takes the number"):
            prepared(jsonl(tmp_path / "wrong.jsonl", [{**rows[0], "temperature": wrong}]), tmp_path, kind=Scored)


def test_examples_that_never_end_are_refused_and_some_are_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EndTokens, "of", lambda *_: EndTokens(frozenset(), 200))
    (found,) = of_rows(tmp_path, SOUND)
    assert (found.level, found.text) == ("error", "data.train: every example is without a scored end token")
    monkeypatch.setattr(EndTokens, "of", lambda *_: EndTokens(frozenset({tokenizer().convert_tokens_to_ids("<|im_end|>")}), 200))
    cut = {"type": "sample", "prompt": "Hi", "output": "one, and more", "finish": "length"}
    assert of_rows(tmp_path / "..", [cut, *SOUND]) == [], "what was cut needs no end"


def test_rows_on_which_a_run_is_both_trained_and_evaluated_are_found(tmp_path: Path) -> None:
    train = prepared(jsonl(tmp_path / "a.jsonl", SOUND), tmp_path)
    held = [{**SOUND[2], "prompt": "Another"}, SOUND[5], {**SOUND[3], "completion": "another"}]
    found = findings(train, prepared(jsonl(tmp_path / "b.jsonl", held), tmp_path))
    assert [(one.level, one.text) for one in found] == [("warning", "1 of 3 rows of data.eval are rows of data.train too")]
    assert found[0].places == (f"{tmp_path}/b.jsonl:2",)
    (found,) = findings(train, prepared(jsonl(tmp_path / "b.jsonl", held[2:]), tmp_path))
    assert found.level == "note"
    assert found.text == "1 of 1 prompts of data.eval are prompts of data.train, with other completions"


def test_prompts_without_tokens_are_found_among_others_but_not_in_plain_text(tmp_path: Path) -> None:
    bare = tokenizer("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    empty = {"prompt": "", "completion": "all of this"}
    found = of_rows(tmp_path, [*SOUND, empty], tokenizer=bare)
    assert [one.text for one in found] == [
        "data.train: 1 prompt has no words",
        "data.train: 1 prompt has no tokens, so that all of the row is scored",
    ]


def test_a_reward_model_needs_no_end_tokens_but_a_padding_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EndTokens, "of", lambda *_: EndTokens(frozenset(), 200))
    data = prepared(jsonl(tmp_path / "a.jsonl", [pair("Who?", "a", "b")]), tmp_path, kind=Comparison)
    (found,) = findings(data, reward=RewardKind.OUTCOME)
    assert (found.level, found.text) == ("note", f"{PADDING}, as transformers' classifiers do")
    other = tokenizer(eos="<|im_end|>")
    assert findings(data, used=other, reward=RewardKind.OUTCOME) == []


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (CHATML, []),
        (GEMMA, ["the chat template refuses system turns"]),
        (CHATML.replace("{{", "{{ '' if m['role'] == 'system' else", 1), ["the chat template leaves system turns out"]),
        (LAST_THOUGHT + "{% if messages | length == 2 %}{{ 'x' }}{% endif %}", ["changes an answer once another turn follows"]),
        (CHATML.replace("<|im_end|>", "<|nowhere|>"), ["the chat template writes <|nowhere|>, which the tokenizer spells out"]),
        (CHATML.replace("assistant\n", "assistant\n<think>"), ["renders a prompt otherwise once it is answered"]),
    ],
)
def test_what_a_template_does_to_turns_is_noted(template: str, said: list[str]) -> None:
    found = [one for check in template_checks.checks_of(tokenizer(template)) for one in check.findings]
    assert len(found) == len(said)
    assert all(part in one.text and one.level == "note" for part, one in zip(said, found, strict=True))


def test_the_level_of_a_check_is_that_of_its_worst_finding() -> None:
    note, warning = Finding("note", "a"), Finding("warning", "b", ("x:1", "x:2"), "do this")
    assert Check("all is well").level is None
    assert Check("all is well", (note, warning)).level == "warning"
    assert warning.line() == "b (x:1, x:2): do this"
    with pytest.raises(UserError, match="c"):
        refuse_errors([Check("all is well", (note, Finding("error", "c")))])
    refuse_errors([Check("all is well", (note, warning))])
