"""A type of input and of example from a module of the user's own, as the manual shows one: no table of ours knows it."""

import json
import math
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from halos.config.bind import bind_loss
from halos.config.schema import Config
from halos.data.custom_format import convert_rows
from halos.data.files import Row
from halos.data.formats import as_kind, read_example
from halos.errors import UserError
from halos.run import available_metrics
from halos.run.batch_source import refuse_unfit_for_live
from halos.trainers.base import Trainer
from halos.types import Comparison, Judgement
from tests.data.tokenizers import jsonl, prepared, says, user

ROOT = Path(__file__).resolve().parents[2]
RANKED = [{"prompt": f"Count to {n}.", "ranked": [f"1 to {n}", f"{n}", "no " * (n + 1)]} for n in range(8)]
RATED = """
from dataclasses import dataclass
from halos.types import Comparison, Example, Turns

@dataclass(frozen=True, slots=True)
class Rated(Example):
    labels = ("stars", "votes")
    answer: Turns
    stars: float
    votes: int | None = None
    completed = ("answer",)

    @classmethod
    def of(cls, other):
        if isinstance(other, Comparison):
            return [cls(other.prompt, other.chosen, 5), cls(other.prompt, other.rejected, 1, 3)]
        return [other] if type(other) is cls else None

def read(row):
    return Rated(({"role": "user", "content": "Q"},), ({"role": "assistant", "content": "A"},), row["stars"])
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    text = (ROOT / "halos" / "losses" / "README.md").read_text()
    ((name, code),) = re.findall(r"```python\n# (myranks\.py)\n(.*?)```", text, re.S)
    (tmp_path / name).write_text(code)
    (tmp_path / "myrates.py").write_text(RATED)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    for each in ("myranks", "myrates"):
        sys.modules.pop(each, None)


def overrides(tmp_path: Path) -> list[str]:
    data = jsonl(tmp_path / "ranked.jsonl", RANKED)
    return ["loss=dpo", "loss._target_=myranks.plackett_luce", "loss.beta=0.5", "data.format=myranks.rows", "plugins=[myranks]",
            f"data.train=[{data}]", f"data.eval=[{data}]", "train.batch_size=4", "train.microbatch_size=2", "train.steps=2",
            "train.log_every=1", "optim.lr=1e-3", "objective.metric=loss", "objective.mode=min"]  # fmt: skip


def test_an_input_type_of_the_users_own_is_one_class_and_trains(
    module: None, trainer: Callable[..., Trainer], tmp_path: Path
) -> None:
    made = trainer(*overrides(tmp_path))
    before = {name: value.clone() for name, value in made.run.model.state_dict().items()}
    made.fit()
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    train = [row for row in rows if row["split"] == "train"]
    assert [row["step"] for row in train] == [1, 2]
    # where policy and reference are equal, all 3! orders are as likely
    assert train[0]["loss"] == pytest.approx(math.log(6), abs=1e-5)
    assert train[0]["rewards/best"] == pytest.approx(0, abs=1e-6)
    assert any(not torch.equal(before[name], value) for name, value in made.run.model.state_dict().items())
    assert [row["examples"] for row in rows if row["split"] == "eval"][-1] == len(RANKED)
    assert rows[-1]["loss"] < math.log(6), "what was trained on is ranked better"


def test_what_a_loss_on_it_measures_is_known_before_a_run(module: None, configure: Callable[..., Config], tmp_path: Path) -> None:
    config = configure(*overrides(tmp_path))
    assert available_metrics.metrics_of(bind_loss(config.loss, config.plugins)) == {"loss", "examples", "rewards/best"}


def test_labels_of_an_example_reach_its_items_and_are_part_of_what_data_is_known_by(module: None, tmp_path: Path) -> None:
    path = jsonl(tmp_path / "pairs.jsonl", [{"prompt": "Q", "chosen": "A", "rejected": "B"}])
    from myrates import Rated  # type: ignore[missing-import]

    data = prepared(path, tmp_path, kind=Rated)
    assert [item.labels for item in data] == [{"stars": 5.0, "votes": 0.0}, {"stars": 1.0, "votes": 3.0}]
    assert data.content != prepared(path, tmp_path, kind=Judgement).content
    (tmp_path / "myrates.py").write_text(RATED.replace("1, 3", "1, 4"))
    del sys.modules["myrates"]
    from myrates import Rated  # type: ignore[missing-import]

    other = prepared(path, tmp_path, kind=Rated)
    assert other[1].labels["votes"] == 4.0, "other code makes other examples"
    assert other.content != data.content


def test_a_live_loop_is_refused_where_samples_do_not_make_its_examples(
    module: None, configure: Callable[..., Config], tmp_path: Path
) -> None:
    config = configure(*overrides(tmp_path))
    words = r"learns from Ranking, and a live loop makes Scored of its samples: it needs online\.rounds"
    with pytest.raises(UserError, match=words):
        refuse_unfit_for_live(bind_loss(config.loss, config.plugins))
    for name in ("sft", "dpo", "kto", "reward", "grpo", "ppo"):
        config = configure(f"loss={name}")
        refuse_unfit_for_live(bind_loss(config.loss, config.plugins))


def test_what_it_cannot_be_made_of_is_refused_with_both_named(module: None, tmp_path: Path) -> None:
    from myrates import Rated  # type: ignore[missing-import]

    [row] = convert_rows("myrates.read", iter([Row({"stars": 4}, "x:1")]))
    assert read_example(row, score="last") == Rated((user("Q"),), (says("A"),), 4)
    with pytest.raises(UserError, match=r"x:1: a Rated\. .*losses on Rated; .* learns from pairs"):
        as_kind(read_example(row, score="last"), Comparison, row)
    pair = Row({"prompt": "Q", "completion": "A"}, "x:2")
    with pytest.raises(UserError, match=r"x:2: columns found: prompt, completion.* learns from Rated, which a function of"):
        as_kind(read_example(pair, score="last"), Rated, pair)
    [row] = convert_rows("myrates.read", iter([Row({"stars": float("nan")}, "x:3")]))
    with pytest.raises(UserError, match="x:3: stars is nan, not a number"):
        read_example(row, score="last")
