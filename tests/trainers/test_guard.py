"""A step that is not finite changes only the step counter, its rows are recorded, and too many in a row end the run."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from halos.checkpoint import known_good, select
from halos.config.resume_policy import Change
from halos.config.schema import Config
from halos.errors import UserError
from halos.run.lifecycle import run
from halos.rundir import RunDir
from halos.trainers import guard
from halos.trainers.base import Trainer
from halos.trainers.guard import Contribution, Guard, not_finite, propagate_nonfinite
from halos.types import Loss

BATCHES = [np.arange(start, start + 4) for start in (0, 4, 8, 12)]
WORDS = ["train.batch_size=4", "train.microbatch_size=2", "train.steps=4", "optim.lr=1e-3", "schedule.warmup=0.9"]


def state(trainer: Trainer) -> list[Tensor]:
    """Weights, moments and the optimizer's own count of steps."""
    optimizer = trainer.run.optimizer
    moments = [value for p in trainer.run.module.parameters() for value in optimizer.state.get(p, {}).values()]
    return [tensor.detach().clone() for tensor in (*trainer.run.module.parameters(), *moments)]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


def break_loss(trainer: Trainer, how: Callable[[Tensor], Tensor]) -> Callable[[], None]:
    """`how` changes the loss's values from now on, until the call that is given back."""
    whole = trainer.loss

    def function(*given: Any) -> Loss:
        loss = whole.function(*given)
        return replace(loss, values=how(loss.values))

    trainer.loss = replace(whole, function=function)
    return lambda: setattr(trainer, "loss", whole)


class Sampled:
    """Rows that are no data set."""

    def __init__(self, rows: Any) -> None:
        self.rows, self.labels = rows, rows.labels

    def __getitem__(self, number: int) -> Any:
        return self.rows[number]


def recorded(trainer: Trainer) -> list[dict[str, Any]]:
    return [json.loads(line) for line in trainer.run.directory.bad_rows.read_text().splitlines()]


def of_first(values: Tensor, number: float) -> Tensor:
    return torch.cat([values[:1] * number, values[1:]])


def test_a_skipped_step_advances_the_step_counter_and_nothing_else(
    trainer: Callable[..., Trainer], caplog: pytest.LogCaptureFixture
) -> None:
    made, other = (trainer("loss=dpo", *WORDS, f"exp_name=g{number}") for number in range(2))
    made.step(BATCHES[0])
    before = state(made)
    mend = break_loss(made, lambda values: of_first(values, math.nan))
    made._log(made.step(BATCHES[1]))
    mend()
    assert same(before, state(made))
    assert not any(p.grad is not None and p.grad.any() for p in made.run.module.parameters())
    current = made.run
    assert (current.step, current.examples, current.bad_steps, current.skipped_steps, current.finite_at) == (2, 8, 1, 1, 0)
    row = current.last_train
    assert math.isnan(row["loss"])
    assert (row["skipped_steps"], row["step"]) == (1, 2)
    assert "rewards/margins" not in row, "a mean over nothing"
    made._log(made.step(BATCHES[2]))
    assert (current.bad_steps, current.skipped_steps, current.finite_at) == (0, 1, 2)
    assert math.isfinite(current.last_train["loss"])

    other.step(BATCHES[0])
    other.run.step = 2  # as if the second batch had never been there: its rate and its dropout are those of the third step
    other.step(BATCHES[2])
    assert same(state(made), state(other))

    [record] = recorded(made)
    assert (record["step"], record["split"], record["loss"], record["grad_norm"], record["bad_steps"]) == (
        2,
        "train",
        "nan",
        "nan",
        1,
    )
    items = [made.train.rows[int(row)] for row in BATCHES[1]]
    assert [row["id"] for row in record["rows"]] == [item.id for item in items]
    assert [row["row"] for row in record["rows"]] == BATCHES[1].tolist()
    broken = [row for row in record["rows"] if row["loss"] == "nan"]
    assert [row["place"] for row in broken] == [0, 2], "the first of each micro-batch"
    assert broken[0]["prompt"] == made.run.tokenizer.decode(items[0].prompt)
    assert f"step 2 was skipped: gradient norm nan, loss nan ({items[0].id}, {items[2].id})" in caplog.text

    sampled: Any = SimpleNamespace(rows=Sampled(made.train.rows), mismatched_partners=None)
    made.guard.skip(sampled, [Contribution(BATCHES[1], np.arange(4), torch.ones(4))], loss=1.0, norm=math.inf)
    texts = [row["prompt"] for row in recorded(made)[1]["rows"]]
    assert texts == [made.run.tokenizer.decode(item.prompt) for item in items], "of rows that stand in no file"


def test_a_gradient_of_zero_proves_nothing_about_the_weights() -> None:
    current: Any = SimpleNamespace(step=7, bad_steps=2, finite_at=3)
    made = Guard(current, lambda items: None)
    assert made.passes(0.0, [])
    assert (current.bad_steps, current.finite_at) == (2, 3)
    assert not made.passes(math.inf, [])
    assert made.passes(1e-30, [])
    assert (current.bad_steps, current.finite_at) == (0, 7)


@pytest.mark.parametrize("number", [math.inf, -math.inf, math.nan])
def test_a_loss_that_is_not_finite_takes_its_gradient_with_it(number: float) -> None:
    weight = torch.tensor([1.0, 2.0], requires_grad=True)
    output = weight * 5
    (output.sum() + number).backward()  # type: ignore[no-untyped-call]
    assert torch.isfinite(weight.grad).all(), "which does not show in the gradient by itself"
    output, weight.grad = weight * 5, None
    propagate_nonfinite(output.detach().sum() + number, [output, torch.ones(1)]).backward()
    assert not torch.isfinite(weight.grad).any()
    output, weight.grad = weight * 5, None
    propagate_nonfinite(3 * output.sum(), [output]).backward()
    assert weight.grad.tolist() == [15.0, 15.0]


BROKEN = {
    "infinite, with a finite gradient": lambda values: (
        values + torch.where(torch.arange(len(values)) == 0, math.inf, 0.0)[:, None]
    ),
    "no number, and clipped": lambda values: torch.where(values > -9, math.nan, values),
    "no number, of no parameter": lambda values: torch.full_like(values, math.nan),
}


def test_a_loss_that_is_not_finite_is_skipped_whatever_its_gradient_is(trainer: Callable[..., Trainer]) -> None:
    made = trainer("loss=sft", *WORDS, "train.max_grad_norm=null", "train.max_bad_steps=null")
    before = state(made)
    for number, how in enumerate(BROKEN.values(), 1):
        mend = break_loss(made, how)
        assert made.step(BATCHES[0]) == {}
        mend()
        assert same(before, state(made))
        assert made.run.bad_steps == number
    assert [row["loss"] for row in recorded(made)[0]["rows"]].count("inf") == 2


def test_equal_rewards_without_an_epsilon_are_a_step_and_one_of_nan_is_skipped_and_leaves_the_kl_coefficient(
    trainer: Callable[..., Trainer], tmp_path: Path
) -> None:
    from halos.data import arithmetic

    prompts = [row["prompt"] for row, _ in zip(arithmetic.rows("train"), range(2), strict=False)]
    rows = [
        {"type": "scalar_feedback", "prompt": prompt, "output": "so " * (n + 1), "reward": 1}
        for prompt in prompts
        for n in range(2)
    ]
    (tmp_path / "equal.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [f"data.train=['{tmp_path / 'equal.jsonl'}']", "data.eval=[]", "train.batch_size=4", "train.steps=3"]
    made = trainer("loss=grpo", "loss.epsilon=0", *words, "exp_name=equal")
    made.prepare()
    weights = state(made)
    assert made.step(np.arange(4)) != {}
    assert same(weights, state(made)[: len(weights)]), "no completion is better than another"
    assert not made.run.directory.bad_rows.exists()

    made = trainer("loss=ppo", "loss.kl_target=1.0", "loss.kl_horizon=100", *words, "exp_name=nan")
    made.prepare()
    made.train.rows.labels["reward"] = np.array([math.nan, 1.0, 0.0, 1.0])
    hook: Any = made.run.hooks["kl_coefficient"]
    before, coefficient = state(made), hook.value
    assert made.step(np.arange(4)) == {}
    assert [str(row["reward"]) for row in recorded(made)[0]["rows"]] == ["nan", "1.0", "0.0", "1.0"]
    assert same(before, state(made))
    assert hook.value == coefficient


def test_an_evaluation_loss_that_is_not_finite_is_reported_with_its_rows(
    trainer: Callable[..., Trainer], caplog: pytest.LogCaptureFixture
) -> None:
    words = ["objective.metric=loss", "objective.mode=min", "train.early_stopping=2", "train.eval_every=1"]
    made = trainer("loss=dpo", *WORDS, *words)
    early: Any = made.run.hooks["early_stopping"]
    mend = break_loss(made, lambda values: of_first(values, math.nan) if len(values) == 2 else values)
    made.run.step = 1
    made.evaluate()
    mend()
    [record] = recorded(made)
    assert (record["split"], record["loss"], len(record["rows"])) == ("eval", "nan", 6)
    assert "step 1: the held-out loss is nan, by 6 of 12 rows (arithmetic[eval]:1#0" in caplog.text
    made.run.step = 2
    made.evaluate()
    assert math.isfinite(early.best), "nothing is better than nan, so that nothing would ever improve on it"
    assert made.run.finite_at == -1, "a loss alone makes no checkpoint good"


def beside(names: list[str], fine: bool) -> Callable[[list[Any]], list[Any]]:
    """gather_object beside a process whose part of the weights is broken at `names`, and whose rows' log-probs are `fine`."""
    other = {list: names, bool: fine}
    return lambda own: [*own, other[type(own[0])]]


# --- the weights -------------------------------------------------------------------------------------------------------


def test_weights_that_are_not_finite_are_refused_at_the_start_and_as_final_model(
    trainer: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = trainer("loss=sft", *WORDS, "data.eval=[]")
    parameter = dict(made.run.module.named_parameters())["model.model.layers.1.mlp.up_proj.weight"]
    made.step(BATCHES[0])
    assert not_finite(made.run.module) == []
    assert not made.guard.refuse_final()
    assert made.run.finite_at == 1
    for process in (beside(["model.norm.weight"], True), beside([], False)):
        with monkeypatch.context() as patch:
            patch.setattr(guard, "gather_object", process)
            assert made.guard.refuse_final()
    kept = parameter.detach().clone()
    for number in (math.nan, math.inf, -math.inf):
        with torch.no_grad():
            parameter[3, 5] = number
        assert not_finite(made.run.module) == ["model.layers.1.mlp.up_proj.weight"]
    assert made.guard.refuse_final()
    assert (made.run.failure or "").startswith("no FINAL was saved: model.layers.1.mlp.up_proj.weight holds values that are not")
    with pytest.raises(UserError, match=r"the checkpoint of step 1 cannot be trained: model.layers.1.mlp.up_proj.weight holds"):
        made.fit()
    with torch.no_grad():
        parameter.copy_(kept * 1e25)  # finite, as is the other, and no log-prob behind their product
        dict(made.run.module.named_parameters())["model.model.layers.1.mlp.gate_proj.weight"].mul_(1e25)
    made.guard.check_evaluation(made.train, [], 0.5)  # of the weights before the next step
    made.run.step = 2
    assert not_finite(made.run.module) == []
    for _ in range(2):
        assert made.guard.refuse_final()
        made.guard.check_evaluation(made.train, [], math.nan)  # of these
    assert "with the last weights the log-probs or scores of rows that had been finite are not finite" in (made.run.failure or "")


def test_a_run_whose_every_step_was_skipped_has_no_final_model(trainer: Callable[..., Trainer], tmp_path: Path) -> None:
    made = trainer("loss=sft", *WORDS, "train.max_bad_steps=null", "checkpoint.every=null", "train.eval_at_start=false")
    break_loss(made, lambda values: values * math.nan)
    made.fit()
    assert made.run.step == 4
    assert "all 4 steps were skipped, so nothing was trained" in (made.run.failure or "")
    assert not (tmp_path / "run" / "FINAL").exists()


# --- a whole run -------------------------------------------------------------------------------------------------------

RUN = ["loss=sft", "train.batch_size=8", "schedule=constant", "schedule.warmup=0", "train.eval_every=1", "checkpoint.every=1",
       "checkpoint.keep_last=1"]  # fmt: skip


def test_a_learning_rate_that_breaks_the_weights_leaves_the_last_good_checkpoint_to_resume_from(
    configure: Callable[..., Config], tmp_path: Path
) -> None:
    place = tmp_path / "run"
    assert run(configure(*RUN, "train.steps=2"), []) == 0
    assert [path.name for path in select.checkpoints(place / "checkpoints")] == ["step-00000002"]
    assert known_good.read(RunDir(place)) == known_good.KnownGood(2)
    assert [row["step"] for row in RunDir(place).commits.read().rows] == [1, 2], "the one that is gone has been there"

    again = [*RUN, f"resume={place}", "resume_changes=allow", "train.steps=9"]
    changed = [Change("train.steps", 2, 9, None)]
    assert run(configure(*again, "optim.lr=1e20"), [], changed) == 1
    result = json.loads((place / "result.json").read_text())
    assert (result["status"], result["step"]) == ("failed", 6)
    assert "steps 4 to 6 were all not finite: gradient norm nan, loss" in result["reason"]
    assert f"{place / 'bad_steps.jsonl'}; where they are right, a lower optim.lr (now 1e+20)" in result["reason"]
    assert f"resume={place} resumes from the checkpoint of step 2, the last good one" in result["reason"]
    assert [path.name for path in select.checkpoints(place / "checkpoints")] == ["step-00000002", "step-00000005"]
    assert known_good.read(RunDir(place)) == known_good.KnownGood(2, doubted_at=6)
    rows = [json.loads(line) for line in (place / "metrics.jsonl").read_text().splitlines()]
    assert [row["loss"] is None for row in rows if row["split"] == "train"] == [False] * 3 + [True] * 3

    # the count of steps in a row is part of a checkpoint: from the one of step 5, two bad steps old, one more is enough
    five = place / "checkpoints" / "step-00000005"
    assert (
        run(configure(*again[:-3], f"resume={five}", "resume_changes=allow", "train.steps=9", "optim.lr=1e20"), [], changed) == 1
    )
    assert json.loads((place / "result.json").read_text())["step"] == 6
    assert json.loads((place / "metrics.jsonl").read_text().splitlines()[-1])["skipped_steps"] == 3

    assert run(configure(*again, "optim.lr=1e-5"), [], changed) == 0
    text = (place / "train.log").read_text()
    assert "step-00000005 passed over: no step after it was finite, and so the run failed" in text
    assert "resuming from checkpoints/step-00000002\n" in text
    assert known_good.read(RunDir(place)) == known_good.KnownGood(9)
    assert json.loads((place / "FINAL" / "metrics.json").read_text())["train"]["skipped_steps"] == 0
