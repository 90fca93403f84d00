"""Malformed rows and files: each is read, or refused by one message that names its place; nothing else is raised."""

import random
from pathlib import Path
from typing import Any

import pytest

from halos.data.files import Row, reader_for
from halos.data.formats import as_kind, parse, read_prompt
from halos.data.tokenize import Encoder
from halos.errors import UserError
from halos.examples import Comparison, Demonstration, Example, Judgement, Scored

from . import malformed
from .tokenizers import TOOLS, jsonl, prepared, tokenizer

WHERE = "a.jsonl:12"
KINDS: tuple[type[Example], ...] = (Comparison, Demonstration, Judgement, Scored)


def require(place: str, error: UserError) -> None:
    """One message of one line, that names the place."""
    assert place in str(error)
    assert "\n" not in str(error).strip()


def _tokenised(row: Row, score: str, encoder: Encoder) -> str:
    example = parse(row, score=score).example
    for kind in KINDS if example is not None else ():
        try:
            examples = as_kind(example, kind, row)
        except UserError as error:  # a kind that such rows never serve
            require(WHERE, error)
            continue
        if examples:
            encoder.encode([(each, row.where) for each in examples])
    return "dropped" if example is None else "read"


def outcome_of(row: Row, score: str, encoder: Encoder) -> str:
    for reads in (lambda: read_prompt(row), lambda: _tokenised(row, score, encoder)):
        try:
            result = reads()
        except UserError as error:
            require(WHERE, error)
            result = "refused"
    assert isinstance(result, str)
    return result


@pytest.mark.parametrize("count", [1500, pytest.param(10_000, marks=pytest.mark.slow)])
def test_rows(count: int) -> None:
    encoder, outcomes = Encoder(tokenizer(), max_length=200, truncation="truncate"), dict[str, int]()
    for seed in range(count):
        draw = random.Random(seed)
        row = Row(malformed.row(draw), WHERE)
        try:
            outcome = outcome_of(row, draw.choice(("last", "all")), encoder)
        except Exception as error:
            raise AssertionError(f"seed {seed}: {str(row.record)[:500]}") from error
        outcomes[outcome] = outcomes.get(outcome, 0) + 1
    assert min(outcomes[name] / count for name in ("read", "refused")) > 0.1
    assert outcomes["dropped"]


def test_what_is_nested_too_deeply_is_one_message(tmp_path: Path) -> None:
    deep: dict[str, Any] = {}
    for _ in range(900):
        deep = {"a": deep}
    asked = {"role": "user", "content": "One?"}
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "add", "arguments": deep}}]}
    answered = [asked, {"role": "assistant", "content": "one"}]
    for row in ({"messages": [asked, call]}, {"messages": answered, "tools": "[" * 200_000},
                {"messages": answered, "chat_template_kwargs": "[" * 200_000}):  # fmt: skip
        with pytest.raises(UserError, match=r"a\.jsonl:1: ") as error:
            prepared(jsonl(tmp_path / "a.jsonl", [row]), tmp_path, tokenizer=tokenizer(TOOLS))
        assert len(str(error.value)) < 500


@pytest.mark.parametrize("count", [60, pytest.param(1000, marks=pytest.mark.slow)])
def test_files(count: int, tmp_path: Path) -> None:
    refused = set[str]()
    for path in malformed.files(tmp_path):
        whole = path.read_bytes()
        assert len(list(reader_for(path, None)(path))) == 3
        for seed in range(count):
            path.write_bytes(malformed.damaged(whole, random.Random(seed)))
            try:
                rows = list(reader_for(path, None)(path))
            except UserError as error:
                require(str(path), error)
                refused.add(path.name)
            except Exception as error:
                raise AssertionError(f"{path.name}, seed {seed}") from error
            else:
                assert all(row.where.startswith(str(path)) for row in rows)
    assert len(refused) == 11
