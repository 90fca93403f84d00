"""Online runs whose chat template writes the current date."""

import json
from datetime import date
from pathlib import Path

import yaml

from halos import seals
from halos.data.dates import with_date
from halos.models.tiny import TEMPLATE
from halos.online.sample import _digest

from .test_rounds import StartedRun

DATED = "{{ 'Today: ' + strftime_now('%d %b %Y') + '\n' }}" + TEMPLATE


def test_all_rounds_sample_and_train_with_the_date_on_which_the_run_began(tmp_path: Path, cache: Path) -> None:
    (template := tmp_path / "dated.jinja").write_text(DATED)
    started = StartedRun(tmp_path, cache, [f"model.chat_template={template}", "online.loss=dpo"])
    began = date.today()
    started.finish("online.rounds=1")
    path = started.run / "attempts" / "000.yaml"
    record = yaml.safe_load(path.read_text())
    assert record["date"] in (str(began), str(date.today()))
    another = {**record, "date": "2031-05-07"}  # a resume must not take the day from the clock
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
