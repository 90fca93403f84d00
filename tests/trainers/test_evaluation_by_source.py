"""An evaluation on several sources: metrics of each are those of an evaluation on it alone, for every kind of loss."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from halos.config import arithmetic_version
from halos.config.arithmetic_version import EVALUATED_BY_SOURCE
from halos.errors import UserError
from halos.run.available_metrics import refuse_hidden_metrics
from halos.run.lifecycle import run
from halos.trainers.base import Trainer

PARTS = {
    "first": "{path: arithmetic, split: 'eval[:7]', name: first}",
    "second": "{path: arithmetic, split: 'eval[7:12]', name: second}",
}
BOTH = f"data.eval=[{', '.join(PARTS.values())}]"
WORDS = ["train.batch_size=4", "train.microbatch_size=3"]
NOT_METRICS = {"step", "split", "seconds"}


def metrics(trainer: Callable[..., Trainer], *words: str) -> dict[str, float]:
    made = trainer(*WORDS, *words)
    made.evaluate()
    return {name: value for name, value in made.run.last_eval.items() if name not in NOT_METRICS}


@pytest.mark.parametrize("loss", ["dpo", "sft", "reward"])
def test_metrics_of_a_source_are_those_of_an_evaluation_on_it_alone(loss: str, trainer: Callable[..., Trainer]) -> None:
    both = metrics(trainer, f"loss={loss}", BOTH)
    overall = {name: value for name, value in both.items() if not name.startswith(("first/", "second/"))}
    assert (both["first/examples"], both["second/examples"], both["examples"]) == (7, 5, 12)
    for name, entry in PARTS.items():
        alone = metrics(trainer, f"loss={loss}", f"data.eval=[{entry}]", f"exp_name={name}")
        assert "first/loss" not in alone
        assert {metric: both[f"{name}/{metric}"] for metric in overall} == alone
    per_item = {"dpo": "rewards/accuracies", "sft": None, "reward": "accuracy"}[loss]
    if per_item is not None:
        whole = (7 * both[f"first/{per_item}"] + 5 * both[f"second/{per_item}"]) / 12
        assert overall[per_item] == pytest.approx(whole, rel=1e-12)
        assert overall["loss"] == pytest.approx((7 * both["first/loss"] + 5 * both["second/loss"]) / 12, rel=1e-12)


def test_statistics_of_a_batch_do_not_mix_sources(trainer: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch) -> None:
    batches = list[list[int]]()
    made = trainer(*WORDS, "loss=kto", BOTH)  # a pair is two rows
    split = made._microbatches

    def seen(data: Any, indices: Any) -> Any:
        batches.append(indices.tolist())
        return split(data, indices)

    monkeypatch.setattr(made, "_microbatches", seen)
    made.evaluate()
    assert batches == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13], [14, 15, 16, 17], [18, 19, 20, 21], [22, 23]]
    assert {"first/z0", "second/rewards/margins", "loss"} <= made.run.last_eval.keys()


def test_a_run_watches_a_source_and_says_its_loss(configure: Callable[..., Any], tmp_path: Path) -> None:
    watch = ["train.early_stopping=1", "objective.metric=second/loss", "objective.mode=min"]
    assert run(configure("loss=sft", *WORDS, BOTH, "train.steps=2", "train.eval_every=1", "optim.lr=10", *watch), []) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["second/examples"] for row in rows if row["split"] == "eval"] == [5] * 2
    log = (tmp_path / "run" / "train.log").read_text()
    assert "(loss of first " in log
    assert "second/loss has not improved on" in log


def test_an_unknown_source_is_refused_before_anything_loads(configure: Callable[..., Any]) -> None:
    one = "data.eval=[{path: arithmetic, split: 'eval[:3]', name: a}]"
    for words, message in (
        (["objective.metric=secnd/loss"], r"did you mean second/loss\? There are .*; and each of first, second alone"),
        ([one, "objective.metric=a/loss"], "objective.metric=a/loss is not measured"),
    ):
        config = configure("loss=sft", BOTH, "model.name_or_path=no/such", "objective.mode=min", *words)
        with pytest.raises(UserError, match=message):
            run(config, [])
    refuse_hidden_metrics(["math"], {"loss", "value/loss"})
    with pytest.raises(UserError, match="value/loss would be a metric of the source value, and is one over all data"):
        refuse_hidden_metrics(["value"], {"loss", "value/loss"})
    with pytest.raises(UserError, match=r"second/loss is better low, and objective\.mode is max"):
        configure("loss=dpo", BOTH, "objective.metric=second/loss")


def test_a_run_of_an_earlier_version_keeps_its_batches(trainer: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arithmetic_version, "VERSION", EVALUATED_BY_SOURCE - 1)
    assert "first/loss" not in metrics(trainer, "loss=sft", BOTH)
