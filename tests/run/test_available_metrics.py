"""An objective that no evaluation yields is refused before a model loads, for every loss."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from halos.config.bind import bind_loss
from halos.config.loss_spec import LossSpec
from halos.config.schema import Config
from halos.errors import UserError
from halos.run import available_metrics
from halos.run.assemble import assemble
from halos.trainers.base import Trainer
from halos.types import Loss, Mean, Pair, TokenLogps
from tests.losses import cases


@pytest.mark.parametrize("case", cases.of_this_package(), ids=lambda case: case.name)
def test_the_objective_of_each_loss_is_among_its_metrics(case: cases.Case) -> None:
    loss = bind_loss(case.settings, [])
    names = available_metrics.metrics_of(loss)
    assert names is not None
    assert {"loss", "examples", case.objective} <= names


@pytest.mark.parametrize("loss", ["kto", "sft"])
def test_the_available_metrics_are_those_of_an_evaluation(loss: str, trainer: Callable[..., Trainer]) -> None:
    training = trainer(f"loss={loss}", "train.batch_size=24")
    training.evaluate()
    names = available_metrics.metrics_of(training.loss)
    assert names == training.run.last_eval.keys() - {"step", "split", "seconds"}


def of_pairs(function: Callable[..., Any]) -> LossSpec:
    dpo = bind_loss(next(case.settings for case in cases.of_this_package() if case.name == "dpo"), [])
    return replace(dpo, name="mine", function=function)


def margins(policy: Pair, reference: Pair) -> Tensor:
    return policy.chosen.sum - policy.rejected.sum - reference.chosen.sum + reference.rejected.sum


@pytest.mark.parametrize("case", cases.of_this_package(), ids=lambda case: case.name)
def test_no_loss_of_ours_fails_on_made_up_rows(case: cases.Case, caplog: pytest.LogCaptureFixture) -> None:
    available_metrics.refuse_failing_loss(bind_loss(case.settings, []))
    assert not caplog.records


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda policy, reference: F.softplus(-margins(policy, reference)), "returns a Tensor: return a halos.types.Loss"),
        (lambda policy, reference: Loss(margins(policy, reference).mean(), {}), r"returns values of shape \(\) for 2 items"),
        (lambda policy, reference: Loss(policy.chosen.values.sum(0), {}), r"returns values of shape \(3,\) for 2 items"),
        (lambda policy, reference: Loss(margins(policy, reference).detach(), {}), "returns values without a gradient"),
        (
            lambda policy, reference: Loss(margins(policy, reference), {"lr": Mean.of(torch.ones(2))}),
            "returns a metric lr, which is the",
        ),
    ],
)
def test_what_a_loss_returns_is_checked_before_a_run(function: Callable[..., Any], message: str) -> None:
    with pytest.raises(UserError, match=rf"^the loss mine \(.*test_available_metrics\.py:\d+\) {message}"):
        available_metrics.refuse_failing_loss(of_pairs(function))


def test_a_loss_whose_code_is_wrong_is_refused_and_one_that_needs_other_rows_is_warned_of(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with pytest.raises(
        UserError, match=r"the loss mine raises an error on made-up rows, in .*metrics\.py:\d+: AttributeError: 'Pai"
    ):
        available_metrics.refuse_failing_loss(of_pairs(lambda policy, reference: Loss(policy.choosen.sum, {})))
    with pytest.raises(UserError, match=r"in .*test_available_metrics\.py:\d+: TypeError: "):
        available_metrics.refuse_failing_loss(of_pairs(lambda policy, reference: Loss(torch.tanh("h"), {})))
    assert not caplog.records
    available_metrics.refuse_failing_loss(of_pairs(lambda policy, reference: Loss(margins(policy, reference).topk(5).values, {})))
    assert "the first step tells whether it does on those of the run" in caplog.text


def test_a_users_loss_is_called_before_a_model_loads(
    configure: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from halos.distributed.launch import make_accelerator

    code = "from halos.types import Loss, TokenLogps\n\ndef mine(policy: TokenLogps) -> Loss:\n    return Loss(policy.sums, {})\n"
    (tmp_path / "sumloss.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    config = configure("loss=sft", "loss._target_=sumloss.mine", "plugins=[sumloss]")
    config.model.name_or_path = str(tmp_path / "none")  # which is never looked at
    with pytest.raises(UserError, match=r"raises an error on made-up rows, in .*sumloss\.py:4: AttributeError: .* 'sums'"):
        assemble(config, [], make_accelerator("auto"))


def test_a_loss_that_depends_on_padding_is_refused() -> None:
    for case in cases.of_this_package():
        available_metrics.refuse_padded_loss(bind_loss(case.settings, []))
    sft = bind_loss(next(case.settings for case in cases.of_this_package() if case.name == "sft"), [])

    def judge(values: Callable[[TokenLogps], Tensor]) -> None:
        available_metrics.refuse_padded_loss(replace(sft, function=lambda policy: Loss(values(policy), {})))

    with pytest.raises(UserError, match=r"the loss sft depends on padding: .* its sum is -1.66667, not -2.5. Use `sum`, `mean`"):
        judge(lambda policy: policy.values.mean(-1))
    with pytest.raises(UserError, match="depends on padding"):
        judge(lambda policy: F.softplus(-policy.values))
    judge(lambda policy: F.softplus(-policy.values) * policy.mask)
    judge(lambda policy: policy.values * torch.rand_like(policy.values))  # random


def test_a_mistyped_objective_is_refused_even_if_the_first_evaluation_is_far_off(
    configure: Callable[..., Config], tmp_path: Path
) -> None:
    from halos.distributed.launch import make_accelerator

    config = configure("loss=dpo", "objective.metric=rewards/margin", "train.eval_at_start=false", "checkpoint.keep_best=1")
    config.model.name_or_path = str(tmp_path / "none")  # which is never looked at
    with pytest.raises(
        UserError, match=r"objective.metric=rewards/margin is not measured with loss=dpo: did you mean rewards/margins"
    ):
        assemble(config, [], make_accelerator("auto"))


def test_the_rewards_of_one_file_among_several_are_constant_too(configure: Callable[..., Config], tmp_path: Path) -> None:
    """And those that a hook measures are not, whatever it is called."""
    (tmp_path / "a.jsonl").write_text("{}\n")
    entries = f"data.eval=[{{path: {tmp_path}/a.jsonl, name: one}}, {{path: {tmp_path}/a.jsonl, name: two}}]"
    loss = bind_loss(next(case.settings for case in cases.of_this_package() if case.name == "grpo"), [])
    for metric in ("one/reward", "gen/reward"):
        config = configure("loss=grpo", "data=files", f"data.train=[{tmp_path}/a.jsonl]", entries, "checkpoint.keep_best=1",
                           f"objective.metric={metric}", "objective.mode=max")  # fmt: skip
        with pytest.raises(UserError, match="is not measured" if metric == "gen/reward" else "one/reward, which.* never changes"):
            available_metrics.refuse_unavailable_objective(config, loss, [])


def test_an_objective_that_a_users_loss_does_not_measure_costs_no_training(
    trainer: Callable[..., Trainer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(available_metrics, "metrics_of", lambda _: None)  # as of a loss that fails on dummy inputs
    training = trainer(
        "loss=sft",
        "objective.metric=none",
        "objective.mode=max",
        "train.batch_size=24",
        "train.steps=2",
        "train.eval_at_start=false",
    )
    with pytest.raises(UserError, match=r"objective.metric=none is not measured; there are examples, logps/completion, loss"):
        training.fit()
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000002"]
