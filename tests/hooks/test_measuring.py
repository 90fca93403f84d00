"""Hooks that measure: what they give back joins an evaluation, hooks that record see all of it, nonsense is refused by name."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from halos.config.schema import Config
from halos.errors import UserError
from halos.hooks.base import Hook, evaluated
from halos.run.lifecycle import run
from halos.trainers.base import Trainer

Run: Any = object()


class Gives(Hook):
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


def test_what_records_is_told_last_and_of_everything() -> None:
    log = Records()
    whole = evaluated({"log": log, "one": Gives({"a": 1}), "none": Gives(None), "two": Gives({"b": 2.5})}, Run, {"loss": 0.5})
    assert whole == {"loss": 0.5, "a": 1.0, "b": 2.5}
    assert log.seen == [whole]


def test_of_several_processes_the_first_ones_numbers_count() -> None:
    whole = evaluated({"one": Gives({"a": 7})}, Run, {}, lambda mine: {"a": 1})
    assert whole == {"a": 1.0}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"loss": 1.0}, "hooks.mine measures loss, which is measured already: call it mine/loss"),
        ({"a": "much"}, "hooks.mine measures a as 'much': a metric is a number under a name"),
        ([1.0], "hooks.mine: on_eval gives back a list: give metrics by name, or None"),
    ],
)
def test_what_is_no_metric_is_refused_by_the_hooks_name(given: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        evaluated({"mine": Gives(given)}, Run, {"loss": 0.5})


def test_what_is_generated_is_a_function_of_prompt_and_seed_and_changes_no_step(trainer: Callable[..., Trainer]) -> None:
    words = ["loss=sft", "peft=lora", "train.eval_every=null"]
    one, other = trainer(*words, "exp_name=one"), trainer(*words, "exp_name=other")
    asked = ["What is 1 + 1?", [{"role": "user", "content": "Name a number."}], "What is 1 + 1?"]
    greedy = one.run.generate(asked, max_new_tokens=5)
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


def test_an_objective_that_no_hook_measures_is_told_at_the_first_evaluation(
    configure: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = "from halos.hooks.base import Hook\n\nclass Mine(Hook):\n    def on_eval(self, run, metrics): return {'mine': 1}\n"
    (tmp_path / "measuring.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    words = ["loss=sft", "+hooks.mine._target_=measuring.Mine", "plugins=[measuring]", "train.steps=1"]
    assert run(configure(*words, "objective.metric=mine", "exp_name=right"), []) == 0
    with pytest.raises(UserError, match="metric=min is not measured; there are examples, logps/completion, loss, mine, "):
        run(configure(*words, "objective.metric=min", "exp_name=wrong"), [])
