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
from halos.logps import working_weights
from halos.logps.model import bare
from halos.run import token_budget
from halos.run.lifecycle import run
from halos.run.token_budget import LEAST, MOST, TRIALS, Cost, on_grid, settle
from halos.trainers.base import Trainer
from halos.trainers.microbatches import Bounds
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
    assert on_grid(cost.fitting(memory)) == tokens


def test_it_is_measured_and_leaves_no_trace(trainer: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch) -> None:
    made = trainer("loss=sft", "train.max_length=300")
    run, train = made.run, made.run.config.train
    run.module.eval()
    before, random = [p.detach().clone() for p in run.module.parameters()], torch.get_rng_state()

    def measured(free: float, optimizer_bytes: int = 0) -> Any:
        train.microbatch_tokens = "auto"
        settled = settle(run, optimizer_bytes, 0, Memory(made, round(free)))
        assert settled == {"microbatch_tokens": run.microbatch_tokens, "activation_checkpointing": False}
        return run.microbatch_tokens

    fits = (FIXED + 6144 * PER_TOKEN) / token_budget.SHARE
    assert measured(fits + 1) == 6144
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


def test_trials_hold_the_casts_that_a_step_holds(trainer: Callable[..., Trainer]) -> None:
    """To the end of the backward pass, where nothing else would keep them."""
    for kept in ("step", "microbatch"):
        made = trainer("loss=sft", "train.precision=bfloat16", f"train.working_weights={kept}", f"exp_name={kept}")
        held = list[bool]()

        class Casts(Memory):
            def peak(self, held: list[bool] = held) -> int:
                held.append(bool(working_weights._kept))
                return super().peak()

        made.run.config.train.microbatch_tokens = "auto"
        settle(made.run, 0, 0, Casts(made, 80 * GB))
        assert held
        assert all(each is (kept == "step") for each in held)


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
        assert settle(made.run, 0, 0) == {"microbatch_tokens": tokens}
        assert made.run.microbatch_tokens == tokens
    typed = trainer("loss=sft", "train.microbatch_tokens=99", "exp_name=typed")
    assert typed.bounds.tokens == 99
    assert run_config.recorded_budget(typed.run.directory.read_attempts()) is None


class Checkpointing(Memory):
    """A device on which checkpointed activations take a tenth, and which may have no room for a trial without."""

    def __init__(self, made: Trainer, free: int, *, most: float = float("inf")) -> None:
        super().__init__(made, free)
        self.model, self.most = bare(made.run.model), most

    def peak(self) -> int:
        taken = FIXED + (super().peak() - FIXED) // (10 if self.model.is_gradient_checkpointing else 1)
        if taken > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        return taken


def room_for(tokens: int) -> int:
    return round((FIXED + tokens * PER_TOKEN) / token_budget.SHARE)


def test_activations_are_checkpointed_only_where_the_longest_item_does_not_fit_without(
    trainer: Callable[..., Trainer], caplog: pytest.LogCaptureFixture
) -> None:
    made, roomy = trainer("loss=sft"), trainer("loss=sft", "exp_name=roomy")
    for each in (made, roomy):
        each.run.config.train.microbatch_tokens = "auto"
    caplog.set_level("INFO")
    fits = Checkpointing(roomy, room_for(2000))
    assert settle(roomy.run, 0, 1999, fits) == {"microbatch_tokens": 1536, "activation_checkpointing": False}
    assert not roomy.run.activation_checkpointing
    assert not fits.model.is_gradient_checkpointing
    small = Checkpointing(made, room_for(2000))
    assert settle(made.run, 0, 2001, small) == {"microbatch_tokens": 16_384, "activation_checkpointing": True}
    assert made.run.activation_checkpointing
    assert small.model.is_gradient_checkpointing
    assert "checkpointed: 2000 tokens fit, and a micro-batch may have 2001" in caplog.text


@pytest.mark.parametrize(
    ("typed", "longest", "expected"), [(2001, 9, True), (1999, 9, False), (9, 2001, True), (None, 1999, False)]
)
def test_with_a_typed_budget_activations_are_checkpointed_where_that_or_an_item_does_not_fit(
    trainer: Callable[..., Trainer], *, typed: int | None, longest: int, expected: bool
) -> None:
    made = trainer("loss=sft", f"train.microbatch_tokens={'null' if typed is None else typed}")
    settled = settle(made.run, 0, longest, Checkpointing(made, room_for(2000)))
    assert settled == {"activation_checkpointing": expected}
    assert made.run.microbatch_tokens == typed
    assert made.run.activation_checkpointing is expected is bare(made.run.model).is_gradient_checkpointing


@pytest.mark.parametrize("tokens", ["auto", 96])
@pytest.mark.parametrize("recorded", [True, False])
def test_a_resume_checkpoints_as_the_run_began_on_any_device(
    trainer: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch, *, recorded: bool, tokens: str | int
) -> None:
    made = trainer("loss=sft")
    made.run.config.resume, made.run.config.train.microbatch_tokens = "runs/mine", tokens
    attempts = {"001.yaml": "{}", "002.yaml": f"{{activation_checkpointing: {recorded}, microbatch_tokens: 96}}"}
    monkeypatch.setattr(type(made.run.directory), "read_attempts", lambda _: attempts)
    settled = settle(made.run, 0, 10**6 if recorded else 1, Checkpointing(made, room_for(2000)))
    assert settled == {**({"microbatch_tokens": 96} if tokens == "auto" else {}), "activation_checkpointing": recorded}
    assert made.run.activation_checkpointing is recorded is bare(made.run.model).is_gradient_checkpointing
    assert made.run.microbatch_tokens == 96


@pytest.mark.parametrize("typed", [True, False])
def test_what_is_typed_is_kept(trainer: Callable[..., Trainer], *, typed: bool) -> None:
    made = trainer("loss=sft", "train.microbatch_tokens=auto", f"train.activation_checkpointing={typed}".lower())
    settled = settle(made.run, 0, 10**6, Checkpointing(made, room_for(2000)))
    assert settled == {"microbatch_tokens": 16_384 if typed else 1536}
    assert made.run.activation_checkpointing is typed is bare(made.run.model).is_gradient_checkpointing


def test_a_trial_that_runs_out_of_memory_is_one_that_does_not_fit(trainer: Callable[..., Trainer]) -> None:
    made = trainer("loss=sft", "train.microbatch_tokens=auto")
    scarce = FIXED + PER_TOKEN * TRIALS[0] - 1
    settled = settle(made.run, 0, 1, Checkpointing(made, room_for(1100), most=scarce))
    assert settled == {"microbatch_tokens": 8192, "activation_checkpointing": True}
    assert all(parameter.grad is None for parameter in made.run.module.parameters())
    with pytest.raises(torch.OutOfMemoryError):  # with and without
        settle(made.run, 0, 1, Checkpointing(made, room_for(1100), most=1))


def test_where_no_trial_can_be_made_nothing_is_said_of_activations(
    trainer: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = trainer("loss=sft", "train.microbatch_tokens=auto")
    monkeypatch.setattr(type(made.run.strategy), "takes_trials", False)
    assert settle(made.run, 0, 10**6, Checkpointing(made, room_for(2000))) == {"microbatch_tokens": token_budget.ON_CPU}


def test_the_longest_item_is_counted_with_its_prompt_once_where_that_is_shared(trainer: Callable[..., Trainer]) -> None:
    rows = trainer("loss=dpo").train.rows
    shared, apart = (token_budget.longest_item(rows, Bounds(None, None, share), 9) for share in (True, False))
    assert apart == rows.lengths.sum(1).max()
    assert shared < apart
    assert token_budget.longest_item(object(), Bounds(None, None, share=True), 9) == 9


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
