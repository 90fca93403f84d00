"""Runs whose chat template writes the current date."""

from datetime import date
from pathlib import Path

import pytest
import yaml
from conftest import compose
from transformers import AutoTokenizer
from world import TEMPLATE, World, attempts, copied, final, log_of, losses, refusal, resume, stopped

from halos import seals
from halos.config import run_config
from halos.run.lifecycle import run

DATED = "{{ 'Today is ' + strftime_now('%d %b %Y') + '\n' }}" + TEMPLATE
FIRST, NEXT = date(2031, 5, 7), date(2031, 5, 8)


def today(monkeypatch: pytest.MonkeyPatch, day: date) -> None:
    class Today(date):
        @classmethod
        def today(cls) -> "Today":
            return cls(day.year, day.month, day.day)

    monkeypatch.setattr(run_config, "date", Today)


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    made = World(tmp_path / "world", tmp_path / "cache")
    made.template.write_text(DATED)
    today(monkeypatch, FIRST)
    return made


@pytest.mark.parametrize("more", [(), ("data.stream=true", "data.stream_block=8")])
def test_a_run_that_is_resumed_on_another_day_keeps_the_date_of_its_beginning(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: tuple[str, ...]
) -> None:
    whole = world.train("whole", *more)
    directory = stopped(copied(whole, tmp_path))
    assert "date       2031-05-07, which the chat template writes" in log_of(whole)
    assert "Today is 07 May 2031" in log_of(whole)
    today(monkeypatch, NEXT)
    assert resume(directory) == 0
    assert [record["date"] for record in attempts(directory)] == ["2031-05-07"] * 2
    assert (final(directory), losses(directory)) == (final(whole), losses(whole))
    other = world.train("other", *more)
    assert "Today is 08 May 2031" in log_of(other)
    assert final(other) != final(whole)
    given = world.train("given", *more, "data.date=2031-05-07")
    assert (final(given), losses(given)) == (final(whole), losses(whole))


def test_the_saved_templates_write_the_date_of_their_use(world: World) -> None:
    directory = world.train("saved")
    for place in (directory / "FINAL", directory / "checkpoints" / "step-00000002" / "tokenizer"):
        assert AutoTokenizer.from_pretrained(place).chat_template == DATED


@pytest.mark.parametrize(
    ("more", "named"),
    [((), "data.train"), (("data.stream=true", "data.stream_block=8"), "data.date (content) '2031-05-07' -> '2031-05-08'")],
)
def test_another_date_changes_the_rows_and_a_resume_says_so(world: World, more: tuple[str, ...], named: str) -> None:
    directory = world.begin("run", *more)
    assert named in refusal(directory, "data.date=2031-05-08")
    assert resume(directory, "data.date=2031-05-07") == 0


def test_a_run_that_recorded_no_date_resumes_on_its_day_or_with_it(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = world.begin("run")
    settings, record = yaml.safe_load((directory / "config.yaml").read_text()), attempts(directory)[0]
    assert (settings["data"].pop("date"), record.pop("date")) == (None, "2031-05-07")
    (directory / "config.yaml").write_text(text := yaml.safe_dump(settings))
    (directory / "attempts" / "000.yaml").write_text(seals.attempt(record, config=text, before=None))
    today(monkeypatch, NEXT)
    assert "data.train" in refusal(directory)
    assert resume(directory, "data.date=2031-05-07") == 0


def test_a_date_that_is_none_or_that_no_template_writes_is_refused(world: World) -> None:
    assert "data.date=soon: give a day, such as data.date=2031-05-07" in world.refusal("run", "data.date=soon")
    world.template.write_text(TEMPLATE)
    assert "data.date=2031-05-07: the chat template writes no date: leave it out" in world.refusal("run", "data.date=2031-05-07")
    directory = world.train("plain")
    assert "date" not in attempts(directory)[0]


def test_a_date_that_only_some_rows_would_have_is_kept_too(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.template.write_text("{% if dated %}{{ 'Today is ' + strftime_now('%d %b %Y') + '\n' }}{% endif %}" + TEMPLATE)
    directory = world.begin("run", "data.date=2031-05-06")
    assert "date       2031-05-06, which the chat template may write" in log_of(directory)
    today(monkeypatch, NEXT)
    assert resume(directory) == 0
    assert [record["date"] for record in attempts(directory)] == ["2031-05-06"] * 2


def test_another_run_on_the_same_day_finds_its_rows_in_the_cache(world: World, tmp_path: Path) -> None:
    world.train("run")
    before = sorted((world.cache / "data").iterdir())
    assert run(compose(world.cache, tmp_path, *world.words("again")), []) == 0
    assert sorted((world.cache / "data").iterdir()) == before
