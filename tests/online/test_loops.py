"""The keys of online runs in rounds and in live loops: the same in both, or refused in one."""

import json
import re
from dataclasses import fields
from pathlib import Path

import pytest

import train
from halos.config.schema import Online
from halos.errors import UserError

MANUAL = Path(train.__file__).parent / "halos" / "online" / "README.md"
BASE = ["loss=online", "model=tiny", "data=arithmetic", "exp_name=x", "dry_run=true"]
LIVE = ["online.loss=grpo", "online.steps=3"]
TRIED = {  # values that are not the default
    "train.steps": "7", "train.epochs": "2", "online.rounds": "2", "online.minibatches": "2", "online.epochs": "2",
    "online.prompts_per_round": "9", "online.steps_per_round": "9", "online.reference": "last", "online.carry_optimizer": "false",
    "online.keep_rollouts": "3", "online.rescore": "3",
    "online.keep_rounds": "3", "online.kl_samples": "9", "online.config_file": "cpu2", "online.num_processes": "2",
}  # fmt: skip
WITHIN = [("online.scorer.pairwise=true", "online.scorer.pairwise is of rounds"),
          ("online.feedback.kind=pairwise", "a live loop of grpo learns from scalar feedback"),
          ("online.sampler.name=openai online.sampler.url=http://x/v1", "a live loop samples with")]  # fmt: skip


def table() -> dict[str, tuple[str, str]]:
    """What the manual says of each key: in rounds, and in live loops."""
    lines = [line for line in MANUAL.read_text().splitlines() if re.match(r"\| `(train|online|schedule)", line)]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {key: (rounds, live) for keys, rounds, live in cells for key in re.findall(r"`([^`]+)`", keys)}


def test_the_manual_says_of_every_key_what_it_is_in_rounds_and_in_live_loops() -> None:
    assert {f"online.{each.name}" for each in fields(Online)} <= table().keys()
    refused = {key for key, cells in table().items() if any(cell.startswith("refused") for cell in cells)}
    assert refused == TRIED.keys()


def test_the_header_counts_the_rows_that_give_no_prompt(tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{n % 7}?", "answer": "1", "level": n % 2}) + "\n" for n in range(16)))
    words = [*BASE, f"data.train=[{path}]", "data.eval=[]", "data.filter='level > 0'", f"cache_dir={cache}"]
    for loop in (["online.loss=grpo"], LIVE):
        assert train.start([*words, *loop, "online.scorer.functions=[exact_match]", f"output_root={tmp_path}"]) == 0
        [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("prompts ")]
        assert line.startswith("prompts    7"), line
        assert line.endswith(
            "; 8 rows of data.train filtered out by level > 0; 1 row of data.train with the prompt of an earlier row"
        )


@pytest.mark.parametrize("key", TRIED)
def test_a_key_is_refused_in_the_loop_that_does_not_read_it(key: str, tmp_path: Path, cache: Path) -> None:
    words = [*BASE, f"{key}={TRIED[key]}", f"cache_dir={cache}", f"output_root={tmp_path}"]
    for loop, cell in zip((["online.loss=grpo"], LIVE), table()[key], strict=True):
        if cell.startswith("refused"):
            with pytest.raises(UserError, match=re.escape(key)):
                train.start([*words, *loop])


@pytest.mark.parametrize(("words", "said"), WITHIN)
def test_what_a_live_loop_does_not_take_of_a_section_is_refused(words: str, said: str, tmp_path: Path, cache: Path) -> None:
    with pytest.raises(UserError, match=re.escape(said)):
        train.start([*BASE, *LIVE, *words.split(), f"cache_dir={cache}", f"output_root={tmp_path}"])
