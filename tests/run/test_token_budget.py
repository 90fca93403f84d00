"""train.microbatch_tokens=auto: the tokens that fit into the memory of the device, the same on every rank and in every resume."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from halos.config import run_config
from halos.config.schema import Config
from halos.errors import UserError
from halos.run import token_budget
from halos.run.lifecycle import run
from halos.run.token_budget import LEAST, MOST, TRIALS, Cost, settle
from halos.trainers.base import Trainer
from train import start

GB = 10**9
FIXED, PER_TOKEN = 5_000, 700


class Memory:
    """A device on which a micro-batch takes so many bytes for every token that the model gets."""

    def __init__(self, made: Trainer, free: int) -> None:
        self.bytes, self.tokens = free, list[int]()
        made.run.module.register_forward_pre_hook(lambda _, given: self.tokens.append(len(given[0].ids)))

    def free(self) -> int:
        return self.bytes

    def start(self) -> None:
        self.tokens.clear()

    def peak(self) -> int:
        (tokens,) = self.tokens
        return FIXED + PER_TOKEN * tokens


@pytest.mark.parametrize(
    ("memory", "tokens"),
    [(80 * GB, 24_576), (81.3 * GB, 32_768), (40 * GB, 12_288), (12 * GB, 4096), (2 * GB, LEAST), (500 * GB, MOST)],
)
def test_the_budget_is_what_fits_rounded_down_to_a_grid(memory: float, tokens: int) -> None:
    cost = Cost.of((3 * GB, 5 * GB))  # 2 GB for each 1024 tokens, and 1 GB besides
    assert cost.fixed == 1 * GB
    assert cost.tokens_in(memory) == tokens


def test_it_is_measured_and_leaves_no_trace(trainer: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch) -> None:
    made = trainer("loss=sft", "train.max_length=300")
    run, train = made.run, made.run.config.train
    run.module.eval()
    before, random = [p.detach().clone() for p in run.module.parameters()], torch.get_rng_state()

    def measured(free: float, optimizer_bytes: int = 0) -> Any:
        train.microbatch_tokens = "auto"
        return settle(run, optimizer_bytes, Memory(made, round(free)))

    fits = (FIXED + 6144 * PER_TOKEN) / token_budget.SHARE
    assert measured(fits + 1) == run.microbatch_tokens == 6144
    assert measured(fits - 1) == 4096
    assert measured(fits + 1_000_001, 1_000_000) == 6144
    assert measured(fits + 1_000_001, 1_000_000 + 2) == 4096, "moments that the first step will make"
    run.optimizer.state[next(iter(run.module.parameters()))] = {"step": torch.zeros(())}
    assert measured(fits + 1, 1_000_000) == 6144, "those of a resumed run are there"
    monkeypatch.setattr(token_budget, "gather_object", lambda own: [*own, *([1536, 2048] if own[0] else [])])
    assert measured(fits + 1) == 1536, "the least of all ranks"
    assert all(torch.equal(p, was) and p.grad is None for p, was in zip(run.module.parameters(), before, strict=True))
    assert torch.equal(torch.get_rng_state(), random)
    assert not run.module.training


def test_trials_are_of_rows_as_long_as_any(trainer: Callable[..., Trainer]) -> None:
    made = trainer("loss=sft", "train.max_length=300")
    for tokens in TRIALS:
        lengths = [len(prompt) + len(completion.ids) for prompt, completion in token_budget._rows(tokens, made.run)]
        assert (sum(lengths), max(lengths)) == (tokens, 300)


def test_a_resume_keeps_what_was_recorded(trainer: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch) -> None:
    made = trainer("loss=sft", "train.microbatch_tokens=auto")
    train = made.run.config.train
    assert train.microbatch_tokens == "auto", "as the saved configuration has it"
    assert made.run.microbatch_tokens == made.bounds.tokens == token_budget.ON_CPU
    assert run_config.recorded_budget(made.run.directory.read_attempts()) == token_budget.ON_CPU
    recorded = token_budget.ON_CPU
    monkeypatch.setattr(token_budget, "ON_CPU", 2 * recorded)
    for resume, tokens in ((None, 2 * recorded), ("runs/mine", recorded)):
        train.microbatch_tokens, made.run.config.resume = "auto", resume
        assert settle(made.run, 0) == made.run.microbatch_tokens == tokens
    typed = trainer("loss=sft", "train.microbatch_tokens=99", "exp_name=typed")
    assert typed.bounds.tokens == 99
    assert run_config.recorded_budget(typed.run.directory.read_attempts()) is None


def test_a_run_that_was_saved_with_auto_resumes(configure: Callable[..., Config], tmp_path: Path) -> None:
    words = ["loss=sft", "train.microbatch_tokens=auto", "train.batch_size=4", "train.steps=2", "checkpoint.every=1"]
    assert run(configure(*words), []) == 0
    place = tmp_path / "run"
    shutil.rmtree(place / "FINAL")
    shutil.rmtree(place / "checkpoints" / "step-00000002")
    assert start([f"resume={place}"]) == 0
    assert [json.loads(line)["step"] for line in (place / "metrics.jsonl").read_text().splitlines()][-1] == 2
    assert "changed" not in max((place / "attempts").iterdir()).read_text()


def test_other_words_are_refused(configure: Callable[..., Config]) -> None:
    assert configure("loss=sft", "train.microbatch_tokens=null").train.microbatch_tokens is None
    for value in ("many", "0"):
        with pytest.raises(UserError, match=r"train.microbatch_tokens takes a whole number \(at least 1\) or auto or null, not"):
            configure("loss=sft", f"train.microbatch_tokens={value}")
