"""Command lines that are nearly right, by seeds: each makes a configuration, or is refused by one message."""

import random
from collections.abc import Iterator

import pytest
from omegaconf import DictConfig

from halos.cli.compose import ConfigTree
from halos.cli.overrides import parse
from halos.errors import UserError
from tests.composed import config_of

BASE = ["model=tiny", "data=arithmetic", "exp_name=malformed"]
LOSSES = ("dpo", "sft", "kto", "grpo", "reward", "orpo", "online")
VALUES = (
    "null", "true", "false", "0", "-1", "1", "2", "1.5", "1e400", "nan", "inf", "-inf", "99999999999999999999999", "''", "' '",
    "x", "auto", "none", "[]", "[1]", "[null]", "{}", "{a: 1}", "[[1]]", "[{path: 1}]", "[{path: x.jsonl, split: 3}]",
    "/nonexistent",
    "'${oc.env:NOPE}'", "'${nope}'", "'???'", "a.b.c", "os.system", "halos.losses.dpo.dpo", "'é中'", "0x10", "1_000", "1,2",
    "[", "{", r"'\x00'",
)  # fmt: skip
CHOICES = ("loss=", "loss=nope", "model=nope", "=", "x", "--x", "loss", "peft=lora", "optim=nope", "schedule=nope", "hooks=nope")


def _keys(node: DictConfig, before: str = "") -> Iterator[str]:
    for name in node:
        part = node._get_node(name)
        if isinstance(part, DictConfig) and not part._is_none() and not part._is_missing() and len(part):
            yield from _keys(part, f"{before}{name}.")
        else:
            yield f"{before}{name}"


def _line(draw: random.Random, keys: list[str]) -> list[str]:
    line = []
    for _ in range(draw.choice((1, 1, 2, 3))):
        key, chance = draw.choice(keys), draw.random()
        if chance < 0.05:
            line.append(f"~{key}")
            continue
        key = key[:-1] if chance < 0.15 else f"+{key}" if chance < 0.2 else f"++{key}.x" if chance < 0.25 else key
        line.append(f"{key}={draw.choice(VALUES)}")
    return [f"loss={draw.choice(LOSSES)}", *BASE, *line, *([draw.choice(CHOICES)] if draw.random() < 0.2 else [])]


@pytest.mark.slow
def test_command_lines() -> None:
    tree, accepted, count = ConfigTree(), 0, 1000
    composed, _ = tree.compose_parsed([parse(text, tree.choices) for text in ["loss=dpo", *BASE]])
    keys = sorted(_keys(composed))
    assert len(keys) > 80
    for seed in range(count):
        line = _line(random.Random(seed), keys)
        try:
            config_of(*line)
            accepted += 1
        except UserError as error:
            message = str(error)
        except BaseException as error:
            raise AssertionError(f"seed {seed}: {line}") from error
        else:
            continue
        assert message.strip()
        assert "\n" not in message.strip(), f"seed {seed}: {line}"
    assert accepted > 0.02 * count


@pytest.mark.parametrize("word", ["++peft.modules_to_save.x=a", "++data.train.x=3", "~data.train.x"])
def test_a_key_within_a_list_is_refused(word: str) -> None:
    with pytest.raises(UserError, match=r"is a list, which has no key 'x': give all of it|takes a list"):
        config_of("loss=dpo", *BASE, word)
