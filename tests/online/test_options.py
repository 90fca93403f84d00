"""A key of a sampler, a scorer or feedback is in the YAML and the schema; the options of stage commands are derived from it."""

import argparse
import re
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

import halos
from halos.config.defaults import help_texts, section
from halos.config.schema import Feedback, Sampler, Scorer
from halos.errors import UserError
from halos.online import label, sample
from halos.online.options import FEEDBACK, SAMPLER, SCORER, Options

HALOS = Path(halos.__file__).parent
COMMANDS: list[Any] = [
    (SAMPLER, sample.parser(), ["tiny", "--data", "a", "--output", "o.jsonl"], {}),
    (SCORER, label.parser(), ["s", "f", "--reward", "ends"], {"name": "function", "functions": ["ends"], "model": None}),
    (FEEDBACK, label.parser(), ["s", "f", "--reward", "ends"], {"kind": "pairwise"}),
]
CHANGED: list[Any] = [
    Sampler("vllm", 0.7, 0.9, 5, 17, 3, 128, "/bin/python", "http://x/v1", "m", 2, 3, 4),
    Scorer("function", ["ends"], "normalised", None, 1, 2, 3, 4.5, "http://x", True, "r.txt", 6, 7, 8.5, 0.25, 0.5),
    Feedback("pairwise", "min", "0.5", True),
]
NAMES = ["sampler", "scorer", "feedback"]


@pytest.mark.parametrize(("options", "parser", "command", "own"), COMMANDS, ids=NAMES)
def test_an_option_that_is_not_passed_has_the_yamls_default(
    options: Options[Any], parser: argparse.ArgumentParser, command: list[str], own: dict[str, Any]
) -> None:
    assert options.read(parser.parse_args(command), **own) == replace(section(options.schema), **own)


@pytest.mark.parametrize("number", range(len(COMMANDS)), ids=NAMES)
def test_the_arguments_of_a_stage_are_parsed_as_the_rounds_own_settings(number: int) -> None:
    (options, parser, command, own), settings = COMMANDS[number], CHANGED[number]
    defaults = section(options.schema)
    same = [each.name for each in fields(settings) if getattr(settings, each.name) == getattr(defaults, each.name)]
    assert not set(same) - set(own), "each key has another value than by default"
    assert options.read(parser.parse_args([*command, *options.arguments(settings)]), **own) == settings


def test_a_value_out_of_its_range_is_refused_with_the_options_name() -> None:
    for words, said in (
        (["--batch-size", "0"], r"--batch-size takes a whole number \(at least 1\), not 0"),
        (["--sampler", "vlm"], r"--sampler takes hf, openai, vllm, not 'vlm' \(did you mean vllm\?\)"),
    ):
        with pytest.raises(UserError, match=said):
            SAMPLER.read(sample.parser().parse_args([*COMMANDS[0][2], *words]))


@pytest.mark.parametrize(
    ("words", "option"),
    [(["--judge", "j", "--url", "http://alice:hunter2pass@host"], "--url"),
     (["--judge", "http://host?key=hunter2pass"], "--judge"),
     (["--reward", "{function: ends, at: 'http://host?key=hunter2pass'}"], "--reward")],
)  # fmt: skip
def test_a_secret_in_a_url_is_refused_with_the_options_name(words: list[str], option: str) -> None:
    with pytest.raises(UserError, match=f"^{option} holds a .* in a URL") as refused:
        SCORER.read_choice(label.parser().parse_args(["s", "f", *words]))
    assert "hunter2" not in str(refused.value)


def test_every_key_has_the_yamls_comment_as_its_help() -> None:
    assert help_texts(Sampler)["cache_tokens"] == "hf: tokens of the key-value cache"
    assert "hf: tokens of the key-value cache (default 32768)" in " ".join(sample.parser().format_help().split())
    assert all(words for schema in (Sampler, Scorer, Feedback) for words in help_texts(schema).values())


@pytest.mark.parametrize(
    ("key", "reader"), [("cache_tokens", "engines/hf.py"), ("price_in", "scorers/judge.py"), ("max_requests", "scorers/judge.py")]
)
def test_a_key_of_an_engine_or_a_scorer_is_in_the_schema_and_where_it_is_read(key: str, reader: str) -> None:
    read = re.compile(rf"(?<!online\.sampler\.)\b{key}\b")  # advice in messages is not counted
    named = {path.relative_to(HALOS).as_posix() for path in HALOS.rglob("*.py") if read.search(path.read_text())}
    assert named == {"config/schema.py", f"rollout/{reader}"}
