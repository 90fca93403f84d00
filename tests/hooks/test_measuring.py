"""Hooks that measure: their metrics join an evaluation, hooks that record see all metrics, bad return values are refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from halos.config.schema import Config
from halos.errors import UserError
from halos.hooks.base import Hook, call_on_eval
from halos.run.lifecycle import run
from halos.trainers.base import Trainer

Run: Any = object()


class Returns(Hook):
    def __init__(self, given: Any) -> None:
        self.given = given

    def on_eval(self, run: Any, metrics: Any) -> Any:
        return self.given


class Records(Hook):
    records = True

    def __init__(self) -> None:
        self.seen: list[dict[str, Any]] = []

    def on_eval(self, run: Any, metrics: Any) -> None:
        self.seen.append(dict(metrics))


def test_hooks_that_record_come_last_and_see_every_metric() -> None:
    log, one, two = Records(), Returns({"a": 1}), Returns({"b": 2.5})
    whole = call_on_eval({"log": log, "one": one, "none": Returns(None), "two": two}, Run, {"loss": 0.5})
    assert whole == {"loss": 0.5, "a": 1.0, "b": 2.5}
    assert log.seen == [whole]


def test_the_metrics_of_rank_0_count() -> None:
    whole = call_on_eval({"one": Returns({"a": 7})}, Run, {}, lambda value: {"a": 1})
    assert whole == {"a": 1.0}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"loss": 1.0}, "hooks.mine measures loss, which the evaluation has already: name it mine/loss"),
        ({"a": "much"}, "hooks.mine measures a as 'much': a metric is a number with a name"),
        ([1.0], "hooks.mine: on_eval returned a list: return metrics by name, or None"),
    ],
)
def test_a_return_value_that_is_no_metric_is_refused_with_the_hooks_name(given: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        call_on_eval({"mine": Returns(given)}, Run, {"loss": 0.5})


def test_a_completion_is_a_function_of_prompt_and_seed_and_changes_no_step(trainer: Callable[..., Trainer]) -> None:
    words = ["loss=sft", "peft=lora", "train.eval_every=null"]
    one, other = trainer(*words, "exp_name=one"), trainer(*words, "exp_name=other")
    asked = ["What is 1 + 1?", [{"role": "user", "content": "Name a number."}], "What is 1 + 1?"]
    before = torch.get_rng_state()
    greedy = one.run.generate(asked, max_new_tokens=5)
    assert torch.equal(torch.get_rng_state(), before)
    assert len(greedy) == 3
    assert greedy[0] == greedy[2]
    drawn = one.run.generate(asked, max_new_tokens=5, temperature=1.0, seed=1)
    assert drawn == one.run.generate(asked, max_new_tokens=5, temperature=1.0, seed=1)
    assert drawn != one.run.generate(asked, max_new_tokens=5, temperature=1.0, seed=2)
    for made in (one, other):
        made.step(made.order.batch(0))
    mine, theirs = (made.run.module.state_dict() for made in (one, other))
    assert all((mine[name] == theirs[name]).all() for name in mine)
    with pytest.raises(UserError, match=r"run\.generate: prompt 1 leaves no room for max_new_tokens=\d+ within \d+ tokens"):
        one.run.generate(["a", "many " * 5000], max_new_tokens=8)


def test_a_reward_model_does_not_generate(trainer: Callable[..., Trainer]) -> None:
    with pytest.raises(UserError, match="a reward model does not generate"):
        trainer("loss=reward").run.generate(["a"], max_new_tokens=1)


@pytest.fixture
def words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A run with a hook that measures."""
    code = "from halos.hooks.base import Hook\n\nclass Mine(Hook):\n    def on_eval(self, run, metrics): return {'mine': 1}\n"
    (tmp_path / "measuring.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    return ["loss=sft", "+hooks.mine._target_=measuring.Mine", "plugins=[measuring]", "train.steps=1"]


def test_without_evaluation_data_a_hook_that_measures_is_announced_as_idle_and_is_no_objective(
    configure: Callable[..., Config], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*words, "data.eval=[]", "dry_run=true"]
    assert run(configure(*words), []) == 0
    said = "".join(capsys.readouterr())
    assert said.count("without data.eval there is no evaluation: on_eval of hooks.mine is not called\n") == 1
    with pytest.raises(UserError, match=r"objective\.metric=mine is not measured.*give data\.eval for hooks\.mine"):
        run(configure(*words, "objective.metric=mine", "objective.mode=max"), [])


def test_an_objective_that_no_hook_measures_is_refused_at_the_first_evaluation(
    configure: Callable[..., Config], words: list[str]
) -> None:
    assert run(configure(*words, "objective.metric=mine", "objective.mode=max", "exp_name=right"), []) == 0
    with pytest.raises(UserError, match="metric=min is not measured; there are examples, logps/completion, loss, mine, "):
        run(configure(*words, "objective.metric=min", "objective.mode=max", "exp_name=wrong"), [])
