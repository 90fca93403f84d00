"""The data sets of config/data, on rows of their real schemas."""

import json
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pytest
import yaml

from halos.data import hub
from halos.data.adapters import oasst, rows, shp
from halos.data.adapters.table import ADAPTERS
from halos.data.formats import as_kind, parse, read_prompt
from halos.data.row import Row
from halos.data.sources import Source, open_source
from halos.errors import UserError
from halos.types import Comparison, Demonstration, Example, Judgement, Stepwise

from .tokenizers import jsonl, says, turn, user

ROOT = Path(__file__).resolve().parents[2]
NAMED = {path.stem: yaml.safe_load(path.read_text()) for path in sorted((ROOT / "config" / "data").glob("*.yaml"))}
for bundled in ("files", "arithmetic", "gsm8k"):
    del NAMED[bundled]
HI, HELLO, NO = user("Hi"), says("Hello!"), says("No.")
CHATS = {"chosen": [HI, HELLO], "rejected": [HI, NO]}
PAIR = Comparison((HI,), (HELLO,), (NO,))


def marked(*words: str) -> str:
    return "".join(f"\n\n{who}: {text}" for who, text in zip(("Human", "Assistant") * 2, words, strict=False))


SHP = {"post_id": "a", "domain": "askculinary_train", "upvote_ratio": 0.98, "history": "Hi", "c_root_id_A": "x",
       "c_root_id_B": "y", "created_at_utc_A": 1600000000, "created_at_utc_B": 1600000100, "score_A": 12, "score_B": 4,
       "human_ref_A": "Hello !", "human_ref_B": "No .", "labels": 1, "seconds_difference": 100.0, "score_ratio": 3.0}  # fmt: skip
HH = {"chosen": marked("Hi", "Hello!"), "rejected": marked("Hi", "No.")}
MESSAGE = {"user_id": "u", "created_date": "2023-02-01T00:00:00+00:00", "lang": "en", "review_count": 3, "review_result": True,
           "deleted": False, "synthetic": False, "model_name": None, "detoxify": None, "message_tree_id": "m1",
           "tree_state": "ready_for_export", "emojis": None, "labels": None}  # fmt: skip
TREE = [
    MESSAGE | {"message_id": "m1", "parent_id": None, "text": "Hi", "role": "prompter", "rank": None},
    MESSAGE | {"message_id": "m2", "parent_id": "m1", "text": "No.", "role": "assistant", "rank": 1},
    MESSAGE | {"message_id": "m3", "parent_id": "m1", "text": "Hello!", "role": "assistant", "rank": 0},
]
ARMORM = {"prompt_id": "h", "prompt": "Hi", "all_generated_responses": ["Hello!", "No."], "all_rm_scores": [0.17, 0.11], **CHATS}
TALK = {"prompt": "Hi", "prompt_id": "h", "messages": [HI, NO, user("Oh"), HELLO]}
TALKED = Demonstration((HI, NO, user("Oh")), (HELLO,))
S1K = {"solution": "4", "question": "Hi", "cot_type": "math", "source_type": "x", "metadata": "{}",
       "gemini_thinking_trajectory": "t", "gemini_attempt": "a", "deepseek_thinking_trajectory": "two",
       "deepseek_attempt": "4"}  # fmt: skip
WILD = {"id": 1, "session_id": "s", "conversation_input": [{**HI, "language": "English", "redacted": False}], "checklist": ["c"],
        "references": {"gpt-4": "Hello!"}, "intent": "x", "primary_tag": "Math", "secondary_tags": []}  # fmt: skip
SCORED = PAIR.__class__((HI,), (HELLO,), (NO,), 2.5)
STEPS = {"prompt": "Hi", "completions": ["Hello!", "No."], "labels": [True, False]}
STEPWISE = Stepwise((HI,), (HELLO, NO), (1.0, 0.0))
# the rows of each, and what they give; of those without a completion the prompt
GIVEN: dict[str, tuple[list[dict[str, Any]], Any]] = {
    "shp": ([SHP], PAIR), "hh": ([HH], PAIR), "hh_helpful": ([HH], PAIR), "hh_harmless": ([HH], PAIR), "oasst": (TREE, PAIR),
    "ultrabin": ([{"prompt": "Hi", "prompt_id": "h", "messages": [HI, HELLO], "score_chosen": 8.5, "score_rejected": 6.0,
                   **CHATS}], SCORED),
    "ultrafeedback_armorm": ([ARMORM], PAIR), "ultrachat": ([TALK], Demonstration((HI,), (NO, user("Oh"), HELLO))),
    "alpacaeval": ([{"instruction": "Hi", "output": "Hello!", "generator": "text_davinci_003", "dataset": "helpful_base"}],
                   Demonstration((HI,), (HELLO,))),
    "safe_rlhf": ([{"prompt": "Hi", "response_0": "No.", "response_1": "Hello!", "better_response_id": 1}], PAIR),
    "s1k": ([S1K], Demonstration((HI,), (says("<think>\ntwo\n</think>\n\n4"),))),
    "wildbench": ([WILD], Demonstration((HI,), (HELLO,))),
    "trl_ultrafeedback": ([{"score_chosen": 8.5, "score_rejected": 6.0, **CHATS}], SCORED),
    "trl_tldr": ([{"prompt": "Hi", "completion": " Hello!"}], Demonstration((HI,), (says(" Hello!"),))),
    "trl_tldr_preference": ([{"prompt": "Hi", "chosen": "Hello!", "rejected": "No."}], PAIR),
    "trl_capybara": ([{"source": "x", "messages": TALK["messages"], "num_turns": 2}], TALKED),
    "trl_math_shepherd": ([STEPS], STEPWISE), "trl_prm800k": ([STEPS], STEPWISE),
    "trl_kto_mix": ([{"prompt": [HI], "completion": [HELLO], "label": True}], Judgement((HI,), (HELLO,), True)),
    "trl_hh_helpful": ([{"prompt": [HI], "chosen": [HELLO], "rejected": [NO]}], PAIR),
    "trl_deepmath": ([{"prompt": [HI], "solution": "4"}], ((HI,), "4")),
    "trl_ultrafeedback_prompt": ([{"prompt": [HI]}], ((HI,), None)),
}  # fmt: skip


@pytest.fixture
def on_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """`on_hub(rows)`: what every name of the hub holds; returns what was asked of it."""

    def holds(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
        asked = list[dict[str, Any]]()

        def load(name: str, config: str | None = None, **settings: Any) -> datasets.Dataset:
            asked.append({"name": name, "config": config, **settings})
            return datasets.Dataset.from_list(found)

        def download(name: str, file: str, **settings: Any) -> str:
            asked.append({"name": name, "file": file, **settings})
            (tmp_path / file).write_text(json.dumps(found))
            return str(tmp_path / file)

        monkeypatch.setattr(datasets, "load_dataset", load)
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
        monkeypatch.setattr(hub, "_resolves", lambda url: True)
        return asked

    return holds


@pytest.mark.parametrize("name", NAMED)
def test_a_named_data_set_is_read(name: str, on_hub: Any) -> None:
    found, wanted = GIVEN[name]
    asked = on_hub(found)
    settings = NAMED[name]
    assert settings["train"] or settings["eval"]
    for purpose in ("train", "eval"):
        for entry in settings[purpose] or []:
            kind = type(wanted) if isinstance(wanted, Example) else Demonstration
            read = [row for row in open_source(Source.of(entry), kind, purpose).rows() if not row.left_out]
            if not isinstance(wanted, Example):
                assert [read_prompt(row) for row in read] == [wanted]
                continue
            parsed = [parse(row, score=settings.get("score", "last")) for row in read]
            assert [each.example for each in parsed] == [wanted]
            assert as_kind(wanted, kind, read[0]) == [wanted]
    comment = (ROOT / "config" / "data" / f"{name}.yaml").read_text().replace("\n# ", " ")
    assert all(f"Hub: {each['name']}" in comment for each in asked)
    assert f"`{name}`" in (ROOT / "halos" / "data" / "README.md").read_text()


def test_every_adapter_is_named() -> None:
    entries = [entry for settings in NAMED.values() for key in ("train", "eval") for entry in settings[key] or []]
    assert {entry.get("format") for entry in entries if isinstance(entry, dict)} - {None} == {*ADAPTERS}


def read(tmp_path: Path, format: str, found: list[dict[str, Any]], purpose: str = "train", **entry: Any) -> list[Row]:
    path = jsonl(tmp_path / "a.jsonl", found)
    return list(open_source(Source.of({"path": path, "format": format, **entry}), Comparison, purpose).rows())


def test_training_on_shp_takes_five_pairs_of_a_post_that_do_not_depend_on_their_order(tmp_path: Path) -> None:
    found = [{**SHP, "human_ref_A": f"{n}", "labels": n % 2, "score_ratio": n / 2} for n in range(40)]
    found += [{**SHP, "history": f"post {n}"} for n in range(3)]
    taken = [row for row in read(tmp_path, "shp", found, filter="score_ratio >= 2") if not row.left_out]
    assert [row.record["prompt"] for row in taken] == ["Hi"] * 5 + ["post 0", "post 1", "post 2"]
    chosen = {row.original["human_ref_A"] for row in taken if row.original} - {"Hello !"}
    assert len(chosen) == 5
    assert min(map(int, chosen)) >= 4
    again = read(tmp_path, "shp", found[::-1], filter="score_ratio >= 2")
    assert {row.original["human_ref_A"] for row in again if row.original} - {"Hello !"} == chosen
    left = [row.note for row in read(tmp_path, "shp", found) if row.left_out]
    assert left == [shp.BEYOND] * 35
    assert not any(row.left_out for row in read(tmp_path, "shp", found, "eval"))
    assert [row.record["chosen"] for row in read(tmp_path, "shp", found[:2], "eval")] == ["No.", "1"], "1 prefers A"
    with pytest.raises(UserError, match=r"a\.jsonl:1: no row of SHP: KeyError 'human_ref_A'; columns found: history"):
        read(tmp_path, "shp", [{"history": "Hi"}])


def test_pairs_of_hh_that_are_none_are_left_out_with_the_reason(tmp_path: Path) -> None:
    found = [
        {"chosen": marked("Hi", "a", "Oh", "b"), "rejected": marked("Hi", "a", "Oh", "c")},
        {"chosen": marked("Hi", "a", "Oh", "b"), "rejected": marked("Hi", "x", "Oh", "c")},
        {"chosen": marked("Hi", "a"), "rejected": marked("Hi", " ")},
        {"chosen": marked("Hi", "a", "Oh"), "rejected": marked("Hi", "b")},
        {"chosen": "Hi", "rejected": "Oh"},
    ]
    first, *others = read(tmp_path, "hh", found)
    assert first.record == {"prompt": [HI, says("a"), user("Oh")], "chosen": [says("b")], "rejected": [says("c")]}
    assert [row.note for row in others] == [rows.PARTED, rows.UNANSWERED, rows.UNANSWERED, rows.NOT_TURNS]


def test_answers_in_trees_are_paired_with_the_next_better_one(tmp_path: Path) -> None:
    def message(name: str, parent: str | None, rank: int | None, **more: Any) -> dict[str, Any]:
        role = "prompter" if len(name) % 2 else "assistant"
        return {**MESSAGE, "message_id": name, "parent_id": parent, "text": name, "role": role, "rank": rank, **more}

    found = [message("abcx", "abc", 2), message("abcy", "abc", 0), message("abcz", "abc", 1), message("abcw", "abc", None),
             message("ab", "a", 0), message("a", None, None), message("abc", "ab", 0), message("ac", "a", 1, lang="de"),
             message("pqrs", "pqr", 0), message("pqrt", "pqr", 1), message("ad", "a", 2, deleted=True),
             message("abd", "ab", 1), message("ae", "a", 3)]  # fmt: skip
    made = read(tmp_path, "oasst", found, filter="lang == 'en'")
    path = [user("a"), turn("assistant", "ab"), user("abc")]
    assert [(row.record["chosen"], row.record["rejected"]) for row in made if not row.left_out] == [
        ("abcz", "abcx"),
        ("abcy", "abcz"),
    ]
    assert [row.record["prompt"] for row in made if not row.left_out] == [path, path]
    assert [(row.where.rpartition(":")[2], row.note) for row in made if row.left_out] == [
        ("8", "filtered out by lang == 'en'"), ("10", oasst.INCOMPLETE), ("13", oasst.NO_BETTER),
    ]  # fmt: skip
    with pytest.raises(UserError, match=r"a\.jsonl:1: no row of oasst, which has message_id, parent_id"):
        read(tmp_path, "oasst", [{"text": "a", "role": "b", "rank": 1}])


def test_a_hub_that_cannot_be_reached_names_the_way_round(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = list[bool]()

    def load(*_: Any, **__: Any) -> None:
        seen.append(huggingface_hub.constants.HF_HUB_OFFLINE)
        raise ConnectionError("Couldn't reach it")

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(hub, "_resolves", lambda url: False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(
        UserError, match=r"Couldn't reach it; .* cannot be reached from here; a local copy is given as \{path: DIRECTORY"
    ):
        list(open_source(Source.of({"path": "org/name", "format": "hh"}), Comparison, "train").rows())
    assert seen == [True], "the client would try again for a minute"
    assert not huggingface_hub.constants.HF_HUB_OFFLINE
    for path, words in {"hf://datasets/org": "is written hf://datasets/org/name/file.json"}.items():
        with pytest.raises(UserError, match=words):
            open_source(Source.of(path), Comparison, "train")
