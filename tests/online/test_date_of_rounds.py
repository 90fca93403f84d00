"""Online runs whose chat template writes the current date."""

import json
from datetime import date
from pathlib import Path

import pytest
import torch
import yaml
from conftest import SMALL
from transformers import AutoModelForSequenceClassification
from world import attempts

import train
from halos import seals
from halos.config import run_config
from halos.data.dates import with_date
from halos.errors import UserError
from halos.models.load import load_tokenizer
from halos.models.locate import locate
from halos.models.tiny import TEMPLATE
from halos.online.sample import _digest
from halos.run import batch_source

from .test_live import LIVE
from .test_rounds import StartedRun

DATED = "{{ 'Today: ' + strftime_now('%d %b %Y') + '\n' }}" + TEMPLATE


@pytest.fixture
def dated_scorer(cache: Path, tmp_path: Path) -> list[str]:
    """The words that choose a reward model whose template writes the date."""
    source = locate("tiny", None, cache)
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(source, num_labels=1)
    model.score.weight.data.normal_()
    model.config.pad_token_id = 0
    model.save_pretrained(tmp_path / "rm")
    tokenizer = load_tokenizer(source, add_tokens=[])[0]
    tokenizer.chat_template = DATED
    tokenizer.save_pretrained(tmp_path / "rm")
    return ["online.scorer.name=reward_model", f"online.scorer.model={tmp_path / 'rm'}", "online.scorer.functions=[]"]


def of_any_scorer(words: list[str]) -> list[str]:
    return [word for word in words if not word.startswith("online.scorer.")]


def test_all_rounds_sample_and_train_with_the_date_on_which_the_run_began(tmp_path: Path, cache: Path) -> None:
    (template := tmp_path / "dated.jinja").write_text(DATED)
    started = StartedRun(tmp_path, cache, [f"model.chat_template={template}", "online.loss=dpo"])
    began = date.today()
    started.finish("online.rounds=1")
    path = started.run / "attempts" / "000.yaml"
    record = yaml.safe_load(path.read_text())
    assert record["date"] == record["content"]["data.date"]
    assert record["date"] in (str(began), str(date.today()))
    # a resume must not take the day from the clock
    another = {**record, "date": "2031-05-07", "content": {**record["content"], "data.date": "2031-05-07"}}
    path.write_text(seals.attempt(another, config=(started.run / "config.yaml").read_text(), before=None))
    started.finish("online.rounds=2")
    for number, day in enumerate((record["date"], "2031-05-07")):
        place = started.run / "rounds" / f"{number:03d}"
        asked = json.loads((place / "samples.meta.json").read_text())["request"]
        assert asked["template"] == _digest(with_date(DATED, date.fromisoformat(day)))
        assert yaml.safe_load((place / "train" / "config.yaml").read_text())["data"]["date"] == day
        assert f"date       {day}, which the chat template writes" in (log := (place / "train" / "train.log").read_text())
        assert f"Today: {date.fromisoformat(day):%d %b %Y}" in log
    assert (started.run / "FINAL" / "chat_template.jinja").read_text() == DATED
    refused = started.start("online.rounds=3", "data.date=2020-01-01")
    assert "data.date (content) '2031-05-07' -> '2020-01-01'" in refused.communicate(timeout=600)[0]
    assert refused.returncode == 2


def test_a_reward_model_that_writes_the_date_writes_that_of_the_run_in_all_rounds(
    tmp_path: Path, cache: Path, dated_scorer: list[str]
) -> None:
    started = StartedRun(tmp_path, cache, [*dated_scorer, "online.loss=dpo", "data.date=2031-05-07"])
    started.finish("online.rounds=1")
    started.finish("online.rounds=2")
    assert [record["date"] for record in attempts(started.run)] == ["2031-05-07"] * 2
    for place in (*sorted((started.run / "rounds").iterdir()), started.run / "exam"):
        assert json.loads((place / "scores.meta.json").read_text())["request"]["date"] == "2031-05-07"
    first = started.run / "rounds" / "000" / "train"
    assert yaml.safe_load((first / "config.yaml").read_text())["data"]["date"] is None, "the policy's template writes none"


def today(monkeypatch: pytest.MonkeyPatch, day: date) -> None:
    class Today(date):
        @classmethod
        def today(cls) -> "Today":
            return cls(day.year, day.month, day.day)

    monkeypatch.setattr(run_config, "date", Today)


def of_train(run: Path) -> list[float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["reward"] for row in rows if row["split"] == "train"]


def test_a_live_loop_scores_by_its_own_date_after_a_resume(
    tmp_path: Path, cache: Path, dated_scorer: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    common = [*SMALL, *of_any_scorer(LIVE), *dated_scorer, f"cache_dir={cache}", f"output_root={tmp_path}", "data.eval=[]",
              "schedule.warmup=0", "train.prove=off"]  # fmt: skip
    today(monkeypatch, date(2031, 5, 7))
    assert train.start([*common, "exp_name=whole", "online.steps=3"]) == 0
    assert train.start([*common, "exp_name=cut", "online.steps=2"]) == 0
    today(monkeypatch, date(2031, 5, 28))
    assert train.start([f"resume={tmp_path / 'cut'}", "online.steps=3"]) == 0
    assert [record["date"] for record in attempts(tmp_path / "cut")] == ["2031-05-07"] * 2
    assert of_train(tmp_path / "cut") == of_train(tmp_path / "whole")
    assert "date       2031-05-07, which the scorer's chat template may write" in (tmp_path / "cut" / "train.log").read_text()
    assert train.start([*common, "exp_name=other", "online.steps=1"]) == 0
    assert of_train(tmp_path / "other") != of_train(tmp_path / "whole")[:1]


def test_another_date_of_a_live_loop_is_refused_and_an_older_run_goes_on(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (template := tmp_path / "dated.jinja").write_text(DATED)
    run, common = tmp_path / "run", [*SMALL, *LIVE, "data.eval=[]", "schedule.warmup=0", "train.prove=off", "checkpoint.every=1"]
    today(monkeypatch, date(2031, 5, 7))
    with monkeypatch.context() as earlier:  # whose hashes had no date
        earlier.setattr(batch_source, "content_entry", lambda *_: {})
        words = [f"model.chat_template={template}", f"cache_dir={cache}", f"output_root={tmp_path}", "exp_name=run"]
        assert train.start([*common, *words, "online.steps=1"]) == 0
    assert "data.date" not in attempts(run)[0]["content"]
    today(monkeypatch, date(2031, 5, 8))
    assert train.start([f"resume={run}", "online.steps=2"]) == 0
    assert [record["date"] for record in attempts(run)] == ["2031-05-07"] * 2
    assert attempts(run)[1]["content"]["data.date"] == "2031-05-07"
    with pytest.raises(UserError, match=r"data\.date \(content\) '2031-05-07' -> '2020-01-01'"):
        train.start([f"resume={run}", "online.steps=3", "data.date=2020-01-01"])
    assert train.start([f"resume={run}", "online.steps=3", "data.date=2020-01-01", "resume_changes=allow"]) == 0
    assert attempts(run)[2]["date"] == "2020-01-01"
