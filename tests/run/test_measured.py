"""An objective that no evaluation gives is refused before a model loads, whichever loss it is typed beside."""

from collections.abc import Callable
from pathlib import Path

import pytest

from halos.config.bind import bind_loss
from halos.config.schema import Config
from halos.errors import UserError
from halos.run import measured
from halos.run.assemble import assemble
from halos.trainers.base import Trainer
from tests.losses import cases


@pytest.mark.parametrize("case", cases.of_this_package(), ids=lambda case: case.name)
def test_what_each_loss_is_judged_by_is_among_what_it_measures(case: cases.Case) -> None:
    loss = bind_loss(case.settings, [])
    names = measured.metrics_of(loss)
    assert names is not None
    assert {"loss", "examples", case.objective} <= names


@pytest.mark.parametrize("loss", ["kto", "sft"])
def test_what_is_said_to_be_measured_is_what_an_evaluation_gives(loss: str, trainer: Callable[..., Trainer]) -> None:
    made = trainer(f"loss={loss}", "train.batch_size=24")
    made.evaluate()
    names = measured.metrics_of(made.loss)
    assert names == made.run.last_eval.keys() - {"step", "split", "seconds"}


def test_a_mistyped_objective_is_refused_although_nothing_is_evaluated_for_long(
    configure: Callable[..., Config], tmp_path: Path
) -> None:
    from halos.distributed.launch import make_accelerator

    config = configure("loss=dpo", "objective.metric=rewards/margin", "train.eval_at_start=false", "checkpoint.keep_best=1")
    config.model.name_or_path = str(tmp_path / "none")  # which it never comes to
    with pytest.raises(
        UserError, match=r"objective.metric=rewards/margin is not measured with loss=dpo: did you mean rewards/margins"
    ):
        assemble(config, [], make_accelerator("auto"))


def test_an_objective_that_a_loss_of_ones_own_does_not_measure_costs_nothing_that_was_trained(
    trainer: Callable[..., Trainer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measured, "made_up", lambda kind: None)  # as to a loss that does not take what is made up
    made = trainer("loss=sft", "objective.metric=none", "train.batch_size=24", "train.steps=2", "train.eval_at_start=false")
    with pytest.raises(UserError, match=r"objective.metric=none is not measured; there are examples, logps/completion, loss"):
        made.fit()
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000002"]
